//! Random histories of real processes, judged afterwards (in the spirit of Jepsen).
//!
//! Three instances share one database and one Redis, each by way of proxies of its own. Writers change, delete and
//! insert rows and deliver the trigger's batches as the host does; readers read everywhere; a nemesis, drawn from a
//! seed, stops and kills instances and Redis, stops the database, breaks links, and loses what Redis holds. Then
//! `checker` says what the history should not contain, and all instances must come to show what the database holds.
//!
//! Part of `cargo test` with one new seed, which is printed. Longer, or the same again:
//!
//! ```sh
//! HISTORY_SEEDS=1,2,3 HISTORY_SECONDS=60 cargo test --test suite history -- --nocapture
//! ```
//!
//! `HISTORY_SEEDS=20x` takes twenty new ones. A seed repeats the plan of faults, not the timing of the processes.

mod checker;
mod cluster;
mod nemesis;
mod record;
mod workload;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::time::sleep;

use self::{
    checker::{Checker, GRACE, distribution},
    cluster::{Cluster, KEYS},
    nemesis::{After, Nemesis, RECOVERY, plan},
    record::{Acknowledgement, Disturbance, Excuse, NEVER, Recorder, Seen, Write},
    workload::World,
};
use crate::support::{PATIENCE, database::Engine, redis::RedisServer};

const INSTANCES: usize = 3;
/// Length of the nemesis' plan where HISTORY_SECONDS does not say.
const LENGTH: Duration = Duration::from_secs(10);
/// A pause of the test's own process that is noted, as it delays everything: hearing the log, and from a length of some
/// of the handler's deadlines on what those bound.
const HICCUP: Duration = Duration::from_millis(100);
const LONG_HICCUP: Duration = Duration::from_millis(400);
/// All of them together, from which on too little may have happened.
const MOST_HICCUPS: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_outdated_is_shown_whatever_happens() {
    nothing_outdated_is_shown(Engine::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_outdated_is_shown_whatever_happens_to_the_database_too() {
    nothing_outdated_is_shown(Engine::Postgres).await;
}

async fn nothing_outdated_is_shown(engine: Engine) {
    let seconds = std::env::var("HISTORY_SECONDS").ok().map(|text| text.parse().expect("HISTORY_SECONDS: a number"));
    let length = seconds.map_or(LENGTH, Duration::from_secs);
    for seed in seeds() {
        run(seed, engine, length).await;
    }
}

fn seeds() -> Vec<u64> {
    let new = |count| (0..count).map(|_| u64::from(rand::random::<u32>())).collect();
    match std::env::var("HISTORY_SEEDS") {
        Err(_) => new(1),
        Ok(text) => match text.strip_suffix('x') {
            Some(count) => new(count.parse().expect("HISTORY_SEEDS: a count before the x")),
            None => text.split(',').map(|seed| seed.trim().parse().expect("HISTORY_SEEDS: numbers")).collect(),
        },
    }
}

async fn run(seed: u64, engine: Engine, length: Duration) {
    let steps = plan(seed, engine, INSTANCES, length);
    println!("history: {engine:?}, seed {seed}, {} steps in {} s", steps.len(), length.as_secs());
    let (recorder, redis) = (Arc::new(Recorder::new()), RedisServer::start().await);
    let cluster = Arc::new(Cluster::start(engine, INSTANCES, &redis, &recorder).await);
    for key in KEYS {
        let acknowledged = Some(Acknowledgement { at: recorder.now(), instance: 0, late: false });
        let (begun, committed) = (Duration::ZERO, recorder.now());
        recorder.history().writes.push(Write { key, version: 1, deleted: false, begun, committed, acknowledged });
    }
    let [writing, reading] = [(); 2].map(|()| Arc::new(AtomicBool::new(true)));
    let (changing, hiccups) = Default::default();
    let world = World { cluster, recorder, seed, changing, writing, reading, hiccups };
    let pulse = feel_the_pulse(world.recorder.clone(), world.reading.clone(), world.hiccups.clone());
    let (writers, readers) = (world.write(), world.read());
    sleep(Duration::from_millis(500)).await;

    let mut nemesis = Nemesis { cluster: &world.cluster, recorder: &world.recorder, redis };
    let mut late = Vec::new();
    for step in &steps {
        nemesis.carry_out(step).await;
        match step.after {
            After::Rest(rest) => sleep(rest).await,
            After::Settle => late = settle(&world).await,
        }
        if !late.is_empty() {
            break;
        }
    }

    world.writing.store(false, Ordering::SeqCst);
    for writer in writers {
        writer.await.expect("a writer goes on to the end");
    }
    if late.is_empty() {
        late = settle(&world).await;
    }
    // What is right now stays right: the readers go on for a moment.
    sleep(Duration::from_millis(500)).await;
    world.reading.store(false, Ordering::SeqCst);
    for reader in readers {
        reader.await.expect("a reader goes on to the end");
    }
    pulse.join().expect("the pulse goes on to the end");
    judge(&world, &steps, late);
}

/// Lets no change begin, and waits until every instance shows the last version of every key; returns who does not.
async fn settle(world: &World) -> Vec<String> {
    let _unchanged = world.changing.write().await;
    let mut last = BTreeMap::new();
    for write in &world.recorder.history().writes {
        last.insert(write.key, if write.deleted { Seen::Absent } else { Seen::Version(write.version) });
    }
    let (keys, expected): (Vec<_>, Vec<_>) = last.into_iter().unzip();
    let began = world.recorder.now();
    loop {
        let mut late = Vec::new();
        for instance in 0..INSTANCES {
            let seen = world.read_once(instance, &keys, &[]).await;
            let wrong = keys.iter().zip(seen.iter().zip(&expected)).filter(|(_, (seen, expected))| seen != expected);
            let tell = |(key, (seen, expected))| format!("instance {instance}: {key} is {seen:?}, not {expected:?}");
            late.extend(wrong.map(tell));
        }
        let took = world.recorder.now() - began;
        if late.is_empty() || took > PATIENCE {
            println!("history: settled after {} ms", took.as_millis());
            return late;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

fn judge(world: &World, steps: &[nemesis::Step], late: Vec<String>) {
    let history = world.recorder.history();
    let checker = Checker::new(&history);
    let violations = checker.violations();
    let (right, wrong) = checker.propagation();
    let level = |level: &str| history.reads.iter().filter(|read| read.status.starts_with(level)).count();
    let (memory, redis, database) = (level("L1; hit"), level("L2; hit"), level("L2; fwd"));
    let failed = history.reads.iter().filter(|read| read.says_failed()).count();
    let slow = history.reads.iter().filter(|read| read.says_slow()).count();
    let slow_alone = history.reads.iter().filter(|read| read.says_slow() && read.alone).count();
    let acknowledged = history.writes.iter().filter(|write| write.acknowledged.is_some()).count();
    let by_itself = history.writes.iter().filter(|write| write.acknowledged.is_some_and(|told| told.late)).count();
    println!(
        "history: {} reads (memory {memory}, redis {redis}, database {database}; stale: for failure {failed}, for \
         slowness {slow}, {slow_alone} of them alone), {} writes ({acknowledged} acknowledged, {by_itself} of them \
         after a 503), {} faults",
        history.reads.len(),
        history.writes.len(),
        history.disturbances.len(),
    );
    println!("history: acknowledged → first right read elsewhere, p50/p99/max: {}", distribution(&right));
    println!("history: acknowledged → last wrong read elsewhere, p50/p99/max: {}", distribution(&wrong));
    println!("history: steps back before an acknowledgement: {}", checker.steps_back());

    println!("history: the plan of seed {}:", world.seed);
    steps.iter().for_each(|step| println!("  {step}"));

    if !violations.is_empty() || !late.is_empty() {
        for violation in violations.iter().take(3) {
            println!("history: {}", checker.slice(violation));
            println!("history: what instance {} said last:", violation.read.instance);
            let said = world.cluster.said(violation.read.instance);
            let last: Vec<_> = said.lines().rev().take(10).collect();
            last.iter().rev().for_each(|line| println!("  {line}"));
        }
        let first = violations.first().map_or_else(String::new, |violation| violation.what.clone());
        panic!("seed {}: {} violations {first}; not converged: {late:#?}", world.seed, violations.len());
    }
    // A test in which nothing happened has shown nothing, unless the machine had no time for it.
    let least = (memory > 100 && redis > 5 && database > 30, acknowledged > 25, right.len() > 25);
    let hiccups = world.hiccups.load(Ordering::SeqCst);
    if hiccups > MOST_HICCUPS.as_millis() as u64 {
        println!("history: the machine paused for {hiccups} ms in all; what happened: {least:?}");
    } else {
        assert_eq!(least, (true, true, true), "seed {}: too little happened", world.seed);
    }
    assert!(!steps.is_empty(), "seed {}: no step of the plan fits", world.seed);
}

/// Notes when the machine does not let this process run: then the others do not run in time either.
fn feel_the_pulse(
    recorder: Arc<Recorder>,
    reading: Arc<AtomicBool>,
    hiccups_ms: Arc<AtomicU64>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        while reading.load(Ordering::SeqCst) {
            let before = recorder.now();
            thread::sleep(Duration::from_millis(10));
            let after = recorder.now();
            let took = after - before;
            if took > HICCUP {
                let what = format!("the machine paused for {} ms", took.as_millis());
                hiccups_ms.fetch_add(took.as_millis() as u64, Ordering::SeqCst);
                let (excuse, recovery) =
                    if took < LONG_HICCUP { (Excuse::Deafness, GRACE) } else { (Excuse::Pause, RECOVERY) };
                let instance = None;
                let hiccup = Disturbance { what, from: NEVER, to: NEVER, instance, excuse, recovery };
                let place = recorder.disturbed(hiccup);
                let hiccup = &mut recorder.history().disturbances[place];
                (hiccup.from, hiccup.to) = (before, after);
            }
        }
    })
}
