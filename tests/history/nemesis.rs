//! What goes wrong, and when: a plan drawn from the seed, carried out one step at a time.

use std::{fmt, time::Duration};

use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};
use tokio::time::sleep;

use super::{
    cluster::Cluster,
    record::{Disturbance, Excuse, NEVER, Recorder},
};
use crate::support::{
    database::Engine,
    proxy::{Fault, Link},
    redis::RedisServer,
};

/// After the end of a fault: the longest pause between two attempts to connect (2 s), one attempt to connect (1 s),
/// and one blocking read, after which a log that was reset is noticed (1 s).
pub const RECOVERY: Duration = Duration::from_secs(4);

/// Something that can go wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    Break(usize, Link, Fault),
    StopInstance(usize),
    KillInstance(usize),
    StopRedis,
    /// It comes back empty.
    KillRedis,
    FlushAll,
    FlushScripts,
    KillClients,
    TrimLog,
    /// Between an instance and the database.
    BreakDatabase(usize, Fault),
    StopDatabase,
    /// The instances', on the database.
    KillSessions,
}

use Act::*;

impl Act {
    fn lasts(self) -> bool {
        !matches!(self, FlushAll | FlushScripts | KillClients | TrimLog | KillSessions)
    }

    /// What is broken: two at once are of different things.
    fn thing(self) -> (u8, usize) {
        match self {
            Break(instance, ..) => (0, instance),
            StopInstance(instance) | KillInstance(instance) => (1, instance),
            BreakDatabase(instance, _) => (3, instance),
            StopDatabase | KillSessions => (4, 0),
            _ => (2, 0),
        }
    }

    /// What it excuses; `None`: nothing, it must not be noticed at all.
    fn disturbance(self, what: String) -> Option<Disturbance> {
        let (instance, excuse) = match self {
            FlushScripts | TrimLog => return None,
            BreakDatabase(instance, _) => (Some(instance), Excuse::Ignorance),
            StopDatabase | KillSessions => (None, Excuse::Ignorance),
            Break(instance, ..) => (Some(instance), Excuse::Deafness),
            StopInstance(instance) => (Some(instance), Excuse::Pause),
            KillInstance(instance) => (Some(instance), Excuse::Death),
            StopRedis | KillRedis | FlushAll | KillClients => (None, Excuse::Deafness),
        };
        Some(Disturbance { what, from: NEVER, to: NEVER, instance, excuse, recovery: RECOVERY })
    }
}

/// One thing going wrong, and perhaps another within it.
#[derive(Clone, Debug)]
pub struct Step {
    outer: Act,
    lasts: Duration,
    /// With its share of the step: from, to.
    inner: Option<(Act, f64, f64)>,
    pub after: After,
}

/// What follows a step.
#[derive(Clone, Copy, Debug)]
pub enum After {
    /// Writers wait until every instance shows what the database holds: what one has missed is not covered up.
    Settle,
    /// Everybody goes on.
    Rest(Duration),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} for {} ms", self.outer, self.lasts.as_millis())?;
        if let Some((act, from, to)) = self.inner {
            write!(f, ", in it {act:?} from {:.0} % to {:.0} %", from * 100.0, to * 100.0)?;
        }
        write!(f, "; then {:?}", self.after)
    }
}

/// What a step is about. Each comes before any comes again.
#[derive(Clone, Copy)]
enum Theme {
    /// One instance hears nothing for longer than it may trust what it has.
    Deaf,
    /// One misses notices, which may be gone when it is back.
    Gap,
    /// Redis is away for longer than a batch is retried.
    Outage,
    /// The database cannot be asked, by one instance or by all.
    Ignorance,
    Anything,
}

/// The steps for this seed: as many as begin within `length`.
pub fn plan(seed: u64, engine: Engine, instances: usize, length: Duration) -> Vec<Step> {
    let mut dice = StdRng::seed_from_u64(seed);
    let (mut steps, mut themes, mut taken) = (Vec::new(), Vec::new(), Duration::ZERO);
    while taken < length {
        if themes.is_empty() {
            themes = vec![Theme::Deaf, Theme::Gap, Theme::Outage, Theme::Anything, Theme::Anything, Theme::Anything];
            if engine != Engine::Sqlite {
                themes.extend([Theme::Ignorance, Theme::Ignorance]);
            }
            themes.shuffle(&mut dice);
        }
        let step = step(&mut dice, themes.pop().unwrap(), instances);
        taken += step.lasts + if let After::Rest(rest) = step.after { rest } else { Duration::from_secs(1) };
        steps.push(step);
    }
    steps
}

fn step(dice: &mut StdRng, theme: Theme, instances: usize) -> Step {
    let instance = dice.random_range(0..instances);
    let (link, fault) = silence(dice);
    let silent = Break(instance, link, fault);
    let settles = dice.random::<bool>();
    let (outer, lasts_ms, inner, settles) = match theme {
        Theme::Deaf => {
            let stop = dice.random::<bool>().then_some((StopInstance(instance), 0.1..0.2, 0.4..0.6));
            (silent, 5500..7000, stop, settles)
        }
        Theme::Gap => {
            let loss = *[TrimLog, TrimLog, FlushAll, FlushScripts].choose(dice).unwrap();
            (silent, 500..2500, dice.random::<bool>().then_some((loss, 0.5..0.9, 0.5..0.9)), true)
        }
        Theme::Outage => {
            let death = dice.random_ratio(1, 3).then_some((KillInstance(instance), 0.1..0.4, 0.5..0.9));
            (*[StopRedis, KillRedis, silent].choose(dice).unwrap(), 2500..4000, death, settles)
        }
        Theme::Ignorance => {
            let faults = [Fault::Refuse, Fault::Stall, Fault::StallRequests, Fault::CutMidReply, Fault::Garbage];
            let broken = BreakDatabase(instance, *faults.choose(dice).unwrap());
            let outer = *[broken, broken, broken, StopDatabase, KillSessions].choose(dice).unwrap();
            let inner = dice.random::<bool>().then(|| (within(dice, outer, instances), 0.1..0.5, 0.5..0.95));
            (outer, 500..3000, inner, settles)
        }
        Theme::Anything => {
            let outer = draw(dice, instances);
            let inner = dice.random::<bool>().then(|| (within(dice, outer, instances), 0.1..0.5, 0.5..0.95));
            (outer, 200..2000, inner, settles)
        }
    };
    let lasts = Duration::from_millis(if outer.lasts() { dice.random_range(lasts_ms) } else { 0 });
    let inner = inner.filter(|_| outer.lasts()).map(|(act, from, to)| {
        let (from, to) = (dice.random_range(from), dice.random_range(to));
        if act.lasts() { (act, from, to) } else { (act, to, to) }
    });
    let rest = After::Rest(Duration::from_millis(*[100, 300, 1000].choose(dice).unwrap()));
    Step { outer, lasts, inner, after: if settles { After::Settle } else { rest } }
}

fn draw(dice: &mut StdRng, instances: usize) -> Act {
    let instance = dice.random_range(0..instances);
    match dice.random_range(0..14) {
        0..4 => {
            let slow = Fault::Slow(Duration::from_millis(dice.random_range(5..400)));
            let link = *[Link::Every, Link::Every, Link::Log, Link::NotLog].choose(dice).unwrap();
            Break(instance, link, *[Fault::CutMidReply, Fault::Garbage, slow, slow].choose(dice).unwrap())
        }
        4..6 => {
            let (link, fault) = silence(dice);
            Break(instance, link, fault)
        }
        6 => StopInstance(instance),
        7 => KillInstance(instance),
        8 => StopRedis,
        9 => KillRedis,
        10 => FlushAll,
        11 => FlushScripts,
        12 => KillClients,
        _ => TrimLog,
    }
}

/// A fault after which the log is not heard.
fn silence(dice: &mut StdRng) -> (Link, Fault) {
    let link = *[Link::Every, Link::Log].choose(dice).unwrap();
    (link, *[Fault::Refuse, Fault::Stall, Fault::StallRequests].choose(dice).unwrap())
}

/// A second act that breaks something else.
fn within(dice: &mut StdRng, outer: Act, instances: usize) -> Act {
    let redis_answers = !matches!(outer, StopRedis | KillRedis);
    loop {
        let act = draw(dice, instances);
        if act.thing() != outer.thing() && (act.lasts() || redis_answers) {
            return act;
        }
    }
}

/// Carries the acts out, and notes what each excuses.
pub struct Nemesis<'a> {
    pub cluster: &'a Cluster,
    pub recorder: &'a Recorder,
    pub redis: RedisServer,
}

impl Nemesis<'_> {
    /// Carries a step out, without what follows; afterwards everything is whole.
    pub async fn carry_out(&mut self, step: &Step) {
        let outer = self.begin(step.outer).await;
        let mut passed = Duration::ZERO;
        if let Some((act, from, to)) = step.inner {
            passed = step.lasts.mul_f64(to);
            sleep(step.lasts.mul_f64(from)).await;
            let inner = self.begin(act).await;
            sleep(step.lasts.mul_f64(to - from)).await;
            self.end(act, inner).await;
        }
        sleep(step.lasts - passed).await;
        self.end(step.outer, outer).await;
    }

    async fn begin(&mut self, act: Act) -> Option<usize> {
        let place = act.disturbance(format!("{act:?}")).map(|disturbance| self.recorder.disturbed(disturbance));
        match act {
            Break(instance, link, fault) => self.cluster.proxy(instance).set_on(link, fault),
            StopInstance(instance) => self.cluster.signal(instance, "STOP"),
            KillInstance(instance) => self.cluster.kill(instance),
            StopRedis => self.redis.signal("STOP"),
            KillRedis => self.redis.kill(),
            FlushAll => drop(self.redis.command(&["FLUSHALL"]).await),
            FlushScripts => drop(self.redis.command(&["SCRIPT", "FLUSH"]).await),
            KillClients => drop(self.redis.command(&["CLIENT", "KILL", "TYPE", "normal"]).await),
            TrimLog => drop(self.redis.command(&["XTRIM", "{product-cache}:log", "MAXLEN", "1"]).await),
            BreakDatabase(instance, fault) => self.cluster.database_proxy(instance).set(fault),
            StopDatabase => self.cluster.database.signal("STOP"),
            KillSessions => self.cluster.database.kill_sessions().await,
        }
        place
    }

    async fn end(&mut self, act: Act, place: Option<usize>) {
        match act {
            Break(instance, ..) => self.cluster.proxy(instance).set(Fault::None),
            StopInstance(instance) => self.cluster.signal(instance, "CONT"),
            KillInstance(instance) => self.cluster.revive(instance, self.recorder).await,
            StopRedis => self.redis.signal("CONT"),
            KillRedis => self.redis.restart().await,
            BreakDatabase(instance, _) => self.cluster.database_proxy(instance).set(Fault::None),
            StopDatabase => self.cluster.database.signal("CONT"),
            FlushAll | FlushScripts | KillClients | TrimLog | KillSessions => {}
        }
        if let Some(place) = place {
            self.recorder.over(place);
        }
    }
}
