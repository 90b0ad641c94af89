//! The real memory, and with it the real way of a read, under a scheduler that itself decides who goes on when.
//!
//! shuttle runs all tasks on one thread and switches at every lock and atomic of `memory` and of quick_cache, thousands
//! of times in another order. tokio's channel, semaphore and timers never switch inside, so each of their steps is one.
//! Every atomic counts as sequentially consistent: what only a weaker ordering would allow is not seen here.
//! Invariants: C1, C3, no flight is left behind, and nobody waits for ever (shuttle ends such a run as a deadlock).

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use shuttle::{
    future::{block_on, yield_now},
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
    sync::atomic::AtomicU64,
    thread,
};

use super::*;
use crate::{
    cache::{Cache, Feed, Level, Load, entry::Body},
    foreground::Foreground,
};

/// Orders that each scheduler tries per test; `INTERLEAVINGS` asks for more.
const ORDERS: usize = 1500;
/// How many times a task is preempted at the worst moment: most bugs need one or two.
const DEPTH: usize = 3;
const LONG: Duration = Duration::from_secs(3600);

fn key(id: usize) -> Key {
    Key::new("product", id as i64)
}

/// A row's version as an entry; 0: there is no row.
fn entry(version: u64) -> Entry {
    match version {
        0 => Entry::Absent,
        _ => Entry::Found(Body::new(version.to_string().as_bytes(), None)),
    }
}

fn version(answer: &Answer) -> u64 {
    match answer.entry() {
        Entry::Absent => 0,
        Entry::Found(body) => std::str::from_utf8(body.bytes()).expect("text").parse().expect("a version"),
    }
}

/// A cache without Redis, and the database behind it.
struct World {
    cache: Cache,
    /// What is in the database.
    rows: Vec<AtomicU64>,
    /// Version whose expiry is over: whoever comes later must not see an older one.
    told: Vec<AtomicU64>,
    /// Loads that still fail.
    failures: AtomicUsize,
    loads: AtomicUsize,
}

impl World {
    fn memory(&self) -> &Arc<Memory> {
        &self.cache.inner.memory
    }

    fn load(self: &Arc<Self>) -> Load {
        let world = self.clone();
        Arc::new(move |mut keys| {
            let world = world.clone();
            // As SQL answers: a row comes once, however often it is asked for.
            keys.sort_by_key(Key::id);
            keys.dedup();
            Box::pin(async move {
                world.loads.fetch_add(1, SeqCst);
                let seen: Vec<_> = keys.iter().map(|key| (*key, Ok(entry(world.row(key.id() as usize))))).collect();
                // The answer is on its way. PCT lets everybody else go first here, so a change behind it is likely.
                yield_now().await;
                match world.failures.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
                    Ok(_) => Err(Failure::Unavailable("as told".to_owned())),
                    Err(_) => Ok(seen),
                }
            })
        })
    }

    fn row(&self, id: usize) -> u64 {
        self.rows[id].load(SeqCst)
    }

    fn check(&self, id: usize, floor: u64, answer: &Answer) {
        assert!(
            version(answer) >= floor,
            "C3: row {id} in version {} for a reader that came after the expiry of version {floor}: {:?}",
            version(answer),
            answer.how,
        );
    }

    /// Reads as GetProductById does: what memory has, else a load.
    fn read(self: &Arc<Self>, id: usize) {
        let floor = self.told[id].load(SeqCst);
        let answer = match self.cache.get(&key(id), None, &self.load()) {
            Some(answer) => Ok(answer),
            None => block_on(self.cache.get_or_load(&[key(id)], None, &self.load())).remove(0),
        };
        // A failure, and what is said to be stale, is never wrong.
        if let Some(answer) = answer.ok().filter(|answer| answer.how.stale.is_none()) {
            self.check(id, floor, &answer);
        }
    }

    /// Reads as a batch does.
    fn read_all(self: &Arc<Self>, ids: &[usize]) {
        let floors: Vec<_> = ids.iter().map(|id| self.told[*id].load(SeqCst)).collect();
        let keys: Vec<_> = ids.iter().copied().map(key).collect();
        let answers = block_on(self.cache.get_or_load(&keys, None, &self.load()));
        for ((id, floor), answer) in ids.iter().zip(floors).zip(answers) {
            self.check(*id, floor, &answer.expect("the database answers"));
        }
    }

    fn change(&self, id: usize, expire: impl FnOnce(&Memory)) {
        let version = self.rows[id].fetch_add(1, SeqCst) + 1;
        expire(self.memory());
        self.told[id].fetch_max(version, SeqCst);
    }

    /// What must hold when everybody is done.
    fn check_rest(&self) {
        for id in 0..self.rows.len() {
            let kept = self.memory().get(&key(id), None).filter(|answer| answer.how.stale.is_none());
            let (kept, row) = (kept.map(|answer| version(&answer)), self.row(id));
            assert!(kept.is_none_or(|kept| kept == row), "C3: row {id} is kept in version {kept:?}, not {row}");
        }
        for flights in &self.memory().flights {
            let left = flights.lock().expect("whole").len();
            assert_eq!(left, 0, "a flight was left behind");
        }
    }

    /// At most one load, and one more for each of the `reasons` to load again.
    fn check_loads(&self, reasons: usize) {
        let loads = self.loads.load(SeqCst);
        assert!(loads <= 1 + reasons, "C1: {loads} loads, with {reasons} reasons to load again");
    }
}

/// One task's part.
type Part = Box<dyn FnOnce(&Arc<World>) + Send>;

fn part(part: impl FnOnce(&Arc<World>) + Send + 'static) -> Part {
    Box::new(part)
}

/// Says which of the orders was the wrong one.
struct Tried(Arc<AtomicUsize>, &'static str);

impl Drop for Tried {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} scheduler: found in order {}", self.1, self.0.load(SeqCst));
        }
    }
}

/// Tries many orders of the parts that `test` makes for each, and checks what is left.
fn explore(
    rows: usize,
    parts: impl Fn(&Arc<World>) -> Vec<Part> + Clone + Send + Sync + 'static,
    check: impl Fn(&World) + Clone + Send + Sync + 'static,
) {
    let mut config = config::Config::from_variables(&BTreeMap::new()).expect("valid").cache;
    config.soft_timeout = Duration::ZERO;
    if rows > 1 {
        // Room for some of the rows only.
        (config.l1_max_bytes, config.max_body_bytes) = (1000, 64);
    }
    // Timers need a runtime; nothing drives it, so none of them ever ends.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let _inside = runtime.enter();
    let background = runtime.handle().clone();
    let tried = Arc::new(AtomicUsize::new(0));
    let counted = tried.clone();
    let order = move || {
        counted.fetch_add(1, SeqCst);
        let world = Arc::new(World {
            cache: Cache::start(&config, None, Feed::None, &["product"], &background, &Foreground::default()),
            rows: (0..rows).map(|_| AtomicU64::new(0)).collect(),
            told: (0..rows).map(|_| AtomicU64::new(0)).collect(),
            failures: AtomicUsize::new(0),
            loads: AtomicUsize::new(0),
        });
        let spawn = |part: Part| {
            let world = world.clone();
            thread::spawn(move || part(&world))
        };
        let tasks: Vec<_> = parts(&world).into_iter().map(spawn).collect();
        tasks.into_iter().for_each(|task| task.join().expect("no panic"));
        world.check_rest();
        check(&world);
    };
    let orders = std::env::var("INTERLEAVINGS").ok().and_then(|orders| orders.parse().ok()).unwrap_or(ORDERS);
    run(RandomScheduler::new(orders), "random", &tried, order.clone());
    run(PctScheduler::new(DEPTH, orders), "PCT", &tried, order);
}

fn run(
    scheduler: impl Scheduler + 'static,
    name: &'static str,
    tried: &Arc<AtomicUsize>,
    order: impl Fn() + Send + Sync + 'static,
) {
    let mut config = shuttle::Config::new();
    config.stack_size = 256 * 1024; // unoptimised code, down to the hash of a body
    config.silence_warnings = true; // the header says it
    tried.store(0, SeqCst);
    let _tried = Tried(tried.clone(), name);
    shuttle::Runner::new(scheduler, config).run(order);
}

#[test]
fn an_id_that_a_batch_names_twice_is_found_twice_though_it_expires_in_between() {
    let read = || part(|world| (0..2).for_each(|_| world.read_all(&[0, 0])));
    let change = || part(|world| (0..2).for_each(|_| world.change(0, |memory| memory.expire(&key(0)))));
    explore(
        1,
        move |world| {
            world.change(0, |_| {});
            vec![read(), change(), read()]
        },
        |_| {},
    );
}

#[test]
fn readers_alone_load_once() {
    let read = || part(|world| (0..2).for_each(|_| world.read(0)));
    explore(1, move |_| vec![read(), read(), read()], |world| world.check_loads(0));
}

#[test]
fn nothing_that_was_loaded_before_an_expiry_is_kept_or_shown_after_it() {
    for times in [1, 2] {
        let read = || part(|world| (0..2).for_each(|_| world.read(0)));
        let change = move || {
            part(move |world| {
                (0..times).for_each(|_| world.change(0, |memory| memory.expire(&key(0))));
                world.read(0);
            })
        };
        explore(1, move |_| vec![read(), change(), read()], move |world| world.check_loads(times));
    }
}

#[test]
fn nor_before_an_expiry_of_everything() {
    // With something in memory, and with a flight under way.
    for reads_before in [1, 0] {
        let read = || part(|world| (0..2).for_each(|_| world.read(0)));
        let change = move || {
            part(move |world| {
                (0..reads_before).for_each(|_| world.read(0));
                world.change(0, Memory::expire_everything);
                world.read(0);
                world.change(0, |memory| memory.expire(&key(0)));
                world.read(0);
            })
        };
        explore(1, move |_| vec![read(), change(), read()], |world| world.check_loads(2));
    }
}

#[test]
fn eviction_changes_none_of_that() {
    const ROWS: usize = 4;
    let read = |from: usize| part(move |world| (from..from + ROWS).for_each(|id| world.read(id % ROWS)));
    let change = || part(|world| (0..ROWS).for_each(|id| world.change(id, |memory| memory.expire(&key(id)))));
    explore(
        ROWS,
        move |_| vec![read(0), read(2), change()],
        |world| {
            let (entries, bytes) = world.memory().size();
            assert!(bytes <= 1000 && entries < ROWS, "{entries} entries of {bytes} bytes");
        },
    );
}

#[test]
fn a_refresh_that_an_expiry_overtakes_is_not_kept() {
    fn refresh(world: &Arc<World>) {
        let Some(answer) = world.memory().get(&key(0), None) else { return };
        let Some(guard) = world.memory().refresh(key(0), &answer) else { return };
        let flight = guard.flight.clone();
        world.cache.inner.fly(vec![guard], &world.load());
        block_on(flight.landed(flight.began));
    }
    let refresh = || {
        part(|world| {
            world.read(0);
            refresh(world);
        })
    };
    let change = || {
        part(|world| {
            world.read(0);
            world.change(0, |memory| memory.expire(&key(0)));
            world.read(0);
        })
    };
    explore(1, move |_| vec![refresh(), change(), refresh()], |world| world.check_loads(3));
}

#[test]
fn failed_loads_leave_nothing_that_passes_for_fresh() {
    let read = || part(|world| (0..2).for_each(|_| world.read(0)));
    let change = || {
        part(|world| {
            world.read(0);
            world.failures.store(2, SeqCst);
            world.change(0, |memory| memory.expire(&key(0)));
            world.read(0);
        })
    };
    explore(1, move |_| vec![read(), change(), read()], |_| {});
}

#[test]
fn a_reader_out_of_patience_gets_what_is_old_but_never_what_was_expired() {
    /// Leads a flight by hand, or gives up waiting for it.
    fn impatient(world: &Arc<World>) {
        let (memory, floor) = (world.memory(), world.told[0].load(SeqCst));
        let (flight, lead) = match memory.join(key(0), None) {
            Joined::Ready(answer) => return world.check(0, floor, &answer),
            Joined::Wait(flight) => (flight, None),
            Joined::Lead(guard) => {
                let copy = memory.stale_copy(&entry(world.row(0)), LONG, false, &guard.flight);
                guard.flight.offer(copy); // from Redis
                (guard.flight.clone(), Some(guard))
            }
        };
        if let Some(answer) = memory.old(&key(0), &flight) {
            world.check(0, floor, &answer);
        }
        if let Some(guard) = lead {
            let now = memory.now();
            let times = Times { born: now, known: now, fresh_until: now };
            let loaded = flight.brings(&entry(world.row(0)), times, Duration::ZERO);
            guard.land(loaded, How::hit(Level::Database));
        }
    }
    let change = || part(|world| (0..2).for_each(|_| world.change(0, |memory| memory.expire(&key(0)))));
    let impatient = || part(|world| (0..2).for_each(|_| impatient(world)));
    explore(
        1,
        move |world| {
            world.change(0, |_| {});
            vec![impatient(), change(), impatient()]
        },
        |_| {},
    );
}

#[test]
fn an_abandoned_flight_wakes_its_readers_and_one_of_them_leads() {
    /// Reads by hand; `lets_go` gives up the first flight it leads.
    fn read(world: &Arc<World>, mut lets_go: usize) {
        let (memory, floor) = (world.memory(), world.told[0].load(SeqCst));
        let arrived = memory.now();
        loop {
            let (flight, lead) = match memory.join(key(0), None) {
                Joined::Ready(answer) => return world.check(0, floor, &answer),
                Joined::Wait(flight) => (flight, None),
                Joined::Lead(guard) => (guard.flight.clone(), Some(guard)),
            };
            match lead {
                Some(guard) if lets_go > 0 => {
                    lets_go -= 1;
                    drop(guard);
                }
                Some(guard) => {
                    let now = memory.now();
                    let times = Times { born: now, known: now, fresh_until: now + span(LONG) };
                    let loaded = flight.brings(&entry(world.row(0)), times, Duration::ZERO);
                    guard.land(loaded, How::hit(Level::Database));
                }
                None => {}
            }
            let Some(landed) = block_on(flight.landed(arrived)) else { continue };
            if let (Ok(answer), false) = (landed.result, landed.overtaken) {
                return world.check(0, floor, &answer);
            }
        }
    }
    let change = || part(|world| world.change(0, |memory| memory.expire(&key(0))));
    explore(
        1,
        move |_| {
            vec![part(|world| read(world, 1)), part(|world| read(world, 2)), part(|world| read(world, 0)), change()]
        },
        |_| {},
    );
}
