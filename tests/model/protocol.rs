//! One key of the cache as a state and its steps: what `src/cache` does, one indivisible action at a time.
//!
//! A step is what nobody can interrupt: a script or a command in Redis, or what an instance does under one lock.
//! Replies are kept between the two, so any other step may come before they are acted upon. Versions, floors and ids
//! are small numbers. Fields marked *ghost* exist only to be judged by; no step depends on them.

use std::{cmp::Ordering, collections::BTreeSet, iter, mem};

use super::{Bug, Model};

pub type Version = u8;
/// Redis' clock in milliseconds; 0 is before everything.
pub type Clock = u8;
/// Id of a notice; 0 is `0-0`. Never given twice, as Redis makes them from the time.
pub type Id = u8;
pub type Token = u8;
/// How many expiries of everything there have been; 0 is not known.
pub type Generation = u8;
/// As many as an instance that has just started does not reach soon.
const GENERATION: Generation = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The version that is committed.
    pub database: Version,
    /// Ghost: the newest expiry that was acknowledged to the host.
    pub acknowledged: Version,
    /// Ghost: the newest expiry whose notice ever was in the log.
    pub appended: Version,
    pub redis: Redis,
    /// What a fail-over would bring back.
    pub replica: Option<Box<Redis>>,
    /// A primary that was replaced and does not know, and its clock.
    pub replaced: Option<Box<(Redis, Clock)>>,
    /// Ghost: a fail-over lost notices.
    pub lost: bool,
    pub clock: Clock,
    pub last_id: Id,
    pub instances: Vec<Instance>,
    pub left: Budget,
}

/// What may still go wrong, or go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    pub commits: u8,
    /// Notices about other keys.
    pub others: u8,
    /// Expiries of everything by who is no more.
    pub everythings: u8,
    /// Redis' clock moves on by itself.
    pub ticks: u8,
    pub crashes: u8,
    pub disconnects: u8,
    /// Redis loses everything.
    pub flushes: u8,
    /// Redis goes back to its replica.
    pub failovers: u8,
    pub trims: u8,
    /// A lease ends before its load, a wait for one ends before it, an invocation ends before its delivery.
    pub timeouts: u8,
    pub failed_loads: u8,
    /// Loads of what is fresh in memory.
    pub refreshes: u8,
    /// Entries whose duration is over.
    pub durations: u8,
}

impl Budget {
    pub const NONE: Self = Self {
        commits: 0,
        others: 0,
        everythings: 0,
        ticks: 0,
        crashes: 0,
        disconnects: 0,
        flushes: 0,
        failovers: 0,
        trims: 0,
        timeouts: 0,
        failed_loads: 0,
        refreshes: 0,
        durations: 0,
    };
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Redis {
    pub entry: Entry,
    pub lease: Option<Lease>,
    pub log: Vec<Notice>,
}

/// An entry in memory or in Redis; of a stale one only that it is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    #[default]
    Nothing,
    Stale,
    Fresh {
        version: Version,
        /// `l`, when its load began; 0 in memory.
        began: Clock,
        /// What its loader knew when it began; 0 in memory.
        generation: Generation,
        /// Ghost: a fail-over that lost notices brought it back, and who uses it was not told.
        suspect: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub token: Token,
    pub began: Clock,
    pub generation: Generation,
    /// Ghost, as in [`Entry::Fresh`].
    pub suspect: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    Nothing,
    Key,
    Everything,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Notice {
    pub id: Id,
    pub previous: Id,
    pub floor: Floor,
    /// `None`: an instance that is no more.
    pub author: Option<usize>,
    pub scope: Scope,
    /// Ghost: the newest expiry in the log up to here.
    pub covers: Version,
    /// Ghost: the log up to here has an expiry of everything that came after the fail-over.
    pub told: bool,
}

impl Notice {
    /// What stands before the first one.
    const NONE: Self =
        Self { id: 0, previous: 0, floor: Floor::NONE, author: None, scope: Scope::Nothing, covers: 0, told: false };
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance {
    pub memory: Entry,
    pub flights: Vec<Flight>,
    pub floor: Floor,
    /// `None`: the log was not read yet.
    pub position: Option<Id>,
    /// Read from the log and not yet acted upon.
    pub reply: Option<Reply>,
    pub own: Own,
    /// When something was last heard or acknowledged, by the clock that Redis has now; 0: never.
    pub youngest: Clock,
    /// Still connected to the primary that was replaced.
    pub behind: bool,
    pub queue: Queue,
    /// The host waits for this.
    pub invocation: Option<Item>,
    pub cut_off: bool,
    /// Ghost: the newest expiry that this instance was told of, by the host or by the log.
    pub known: Version,
    /// Ghost: it knows of the fail-over.
    pub told: bool,
    /// Ghost: it had read or written notices that the fail-over lost.
    pub witness: bool,
    /// Ghost: a reader got what it must not get.
    pub wronged: bool,
}

/// The instance's own notices, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Own {
    /// Acknowledged and not heard yet.
    pub unheard: Vec<Id>,
    /// Acknowledged when the log was behind them already.
    pub doubtful: Vec<Id>,
    /// Heard before it was acknowledged; 0: none.
    pub early: Id,
}

/// What the last expiry of everything left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Floor {
    pub at: Clock,
    pub generation: Generation,
}

impl Floor {
    const NONE: Self = Self { at: 0, generation: 0 };

    fn and(self, model: &Model, other: Self) -> Self {
        let is_unread = self.generation == 0 || other.generation == 0;
        let alike = is_unread || self.generation == other.generation;
        if alike || model.bug == Some(Bug::HigherFloorCounts) {
            return Self { at: self.at.max(other.at), generation: self.generation.max(other.generation) };
        }
        if self.generation > other.generation { self } else { other }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Queue {
    pub key: Option<Item>,
    pub everything: Option<Item>,
    pub delivery: Option<Delivery>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Item {
    pub covers: Version,
    /// Added since the delivery under way began.
    pub late: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Delivery {
    pub scope: Scope,
    pub covers: Version,
    pub done: Done,
}

/// How far a delivery has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Done {
    /// The first of the two commands.
    Half,
    /// Both commands; the notice, and the floor that it has.
    Both(Id, Floor),
    /// What came into memory meanwhile is stale too.
    Here,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    Missed,
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reply {
    pub why: Option<Why>,
    pub notice: Notice,
    /// The notice is only where to go on from.
    pub start: bool,
    /// Its floor was said after whatever may be lost.
    pub answers: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flight {
    pub joinable: bool,
    pub overtaken: bool,
    /// Does not ask Redis: it began while the key's expiry was queued, or before the log was heard.
    pub alone: bool,
    /// Wants a younger entry than Redis has.
    pub refresh: bool,
    pub token: Option<Token>,
    pub way: Way,
    /// Ghost: what its first reader must not get less than.
    pub least: Version,
    /// Ghost: its instance knew of the fail-over when it began.
    pub told: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// About to ask Redis.
    Look,
    /// Redis had it.
    Found {
        version: Version,
        suspect: bool,
    },
    /// Another flight has the lease.
    Wait,
    /// About to load.
    Load,
    Loading {
        version: Version,
    },
    Filled {
        version: Version,
        refused: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Commit,
    /// Somebody expires another key.
    ExpireOther,
    /// Somebody who is no more expires everything.
    ExpireAll,
    Tick,
    /// The host delivers what is not acknowledged.
    Invoke(usize, Scope),
    /// The host gives up waiting.
    InvocationEnds(usize),
    ExpireInRedis(usize),
    /// `ticks`: whether Redis' clock moves before and after.
    Append(usize, [bool; 2]),
    ExpireHere(usize),
    Acknowledge(usize),
    ReadLog(usize),
    /// Only with [`Bug::ResumesFromNow`].
    Resume(usize),
    Hear(usize),
    Arrive(usize),
    Refresh(usize),
    Look(usize, usize),
    WaitEnds(usize, usize),
    BeginLoad(usize, usize),
    Fill(usize, usize),
    FailLoad(usize, usize),
    Land(usize, usize),
    LeaseEnds,
    DurationEndsInRedis,
    DurationEnds(usize),
    Crash(usize),
    CutOff(usize),
    Reconnect(usize),
    Flush,
    Trim,
    Replicate,
    FailOver {
        /// Replies of the old primary still come.
        late: bool,
        /// Who does not hear of it.
        behind: Option<usize>,
    },
}

impl State {
    pub fn cold(model: &Model) -> Self {
        let floor = Floor { at: model.clock - 1, generation: GENERATION };
        let first = Notice { id: 1, floor, ..Notice::NONE };
        let instance = Instance { position: Some(1), floor, ..Instance::default() };
        Self {
            database: 1,
            acknowledged: 1,
            appended: 1,
            redis: Redis { log: vec![first], ..Redis::default() },
            replica: None,
            replaced: None,
            lost: false,
            clock: model.clock,
            last_id: 1,
            instances: vec![instance; model.instances],
            left: model.budget,
        }
    }

    /// As after a read on every instance.
    pub fn warm(model: &Model) -> Self {
        let mut state = Self::cold(model);
        state.redis.entry = Entry::Fresh { version: 1, began: model.clock, generation: GENERATION, suspect: false };
        for instance in &mut state.instances {
            instance.memory = Entry::Fresh { version: 1, began: 0, generation: 0, suspect: false };
        }
        if model.restarted {
            state.instances[0] = Instance::default();
        }
        if model.cut_off_replica {
            state.replica = Some(Box::new(state.redis.clone()));
        }
        state
    }

    pub fn tail(&self) -> Option<&Notice> {
        self.redis.log.last()
    }

    /// The Redis that this instance is connected to.
    fn redis_of(&self, instance: &Instance) -> &Redis {
        match &self.replaced {
            Some(replaced) if instance.behind => &replaced.0,
            _ => &self.redis,
        }
    }

    /// Whether Redis' entry is fresh for who knows this floor.
    pub fn fresh_in_redis(&self, model: &Model, floor: Floor) -> Option<(Version, bool)> {
        match self.redis.entry {
            Entry::Fresh { version, began, generation, suspect } => {
                // Its age is never negative, though Redis' clock may have been set back.
                let began = began.min(self.clock);
                let above =
                    began > floor.at || began == floor.at && model.bug == Some(Bug::FloorIncludesItsMillisecond);
                // Either rule hides that the other one is missing, but for a clock that goes back.
                let uncounted = matches!(model.bug, Some(Bug::GenerationIgnored | Bug::FloorIncludesItsMillisecond));
                let counted = generation >= floor.generation || uncounted;
                (above && counted).then_some((version, suspect))
            }
            _ => None,
        }
    }

    /// Whether this instance's next look at the log would find nothing.
    pub fn caught_up(&self, model: &Model, instance: &Instance) -> bool {
        instance.reply.is_none() && self.read(model, instance).is_none()
    }

    pub fn is_held(&self, token: Token) -> bool {
        self.flights().any(|flight| flight.token == Some(token))
    }

    pub fn flights(&self) -> impl Iterator<Item = &Flight> {
        self.instances.iter().flat_map(|instance| &instance.flights)
    }

    pub fn actions(&self, model: &Model, actions: &mut Vec<Action>) {
        let left = &self.left;
        let pending = self.acknowledged < self.database && self.instances.iter().all(|one| one.invocation.is_none());
        for (i, instance) in self.instances.iter().enumerate() {
            self.flight_actions(model, i, instance, actions);
            self.delivery_actions(model, i, instance, actions);
            if instance.reply.is_some() {
                actions.push(Action::Hear(i));
            } else if self.read(model, instance).is_some() {
                actions.push(Action::ReadLog(i));
                if model.bug == Some(Bug::ResumesFromNow) && instance.position.is_some() {
                    actions.push(Action::Resume(i));
                }
            }
            if pending {
                actions.push(Action::Invoke(i, Scope::Key));
                if model.everything {
                    actions.push(Action::Invoke(i, Scope::Everything));
                }
            }
            if instance.invocation.is_some() && left.timeouts > 0 {
                actions.push(Action::InvocationEnds(i));
            }
            if left.durations > 0 && matches!(instance.memory, Entry::Fresh { .. }) {
                actions.push(Action::DurationEnds(i));
            }
            if left.crashes > 0 {
                actions.push(Action::Crash(i));
            }
            if instance.cut_off || instance.behind {
                actions.push(Action::Reconnect(i));
            } else if left.disconnects > 0 {
                actions.push(Action::CutOff(i));
            }
        }
        // Before a fail-over that loses all since the start, nobody would know of them after it.
        let early = model.cut_off_replica && left.failovers > 0;
        if left.commits > 0 && !(early && model.split) {
            actions.push(Action::Commit);
        }
        if left.others > 0 && !early {
            actions.push(Action::ExpireOther);
        }
        if left.everythings > 0 && !early {
            actions.push(Action::ExpireAll);
        }
        if left.ticks > 0 {
            actions.push(Action::Tick);
        }
        if self.redis.lease.is_some_and(|lease| left.timeouts > 0 || !self.is_held(lease.token)) {
            actions.push(Action::LeaseEnds);
        }
        if left.durations > 0 && matches!(self.redis.entry, Entry::Fresh { .. }) {
            actions.push(Action::DurationEndsInRedis);
        }
        if left.flushes > 0 {
            actions.push(Action::Flush);
        }
        if left.trims > 0 && self.redis.log.len() > 1 {
            actions.push(Action::Trim);
        }
        if left.failovers > 0 && self.replica.is_none() {
            actions.push(Action::Replicate);
        } else if left.failovers > 0 && model.split {
            let behind = |i| Action::FailOver { late: false, behind: Some(i) };
            actions.extend((0..self.instances.len()).map(behind));
        } else if left.failovers > 0 {
            actions.push(Action::FailOver { late: false, behind: None });
            if self.instances.iter().any(|one| one.is_unacknowledged().is_some()) {
                actions.push(Action::FailOver { late: true, behind: None });
            }
        }
    }

    fn flight_actions(&self, model: &Model, i: usize, instance: &Instance, actions: &mut Vec<Action>) {
        for (f, flight) in instance.flights.iter().enumerate() {
            match flight.way {
                Way::Look => actions.push(Action::Look(i, f)),
                Way::Wait => {
                    // To look again while nothing has changed changes nothing.
                    if self.redis_of(instance).lease.is_none() || instance.cut_off {
                        actions.push(Action::Look(i, f));
                    }
                    if self.left.timeouts > 0 {
                        actions.push(Action::WaitEnds(i, f));
                    }
                }
                Way::Load => actions.push(Action::BeginLoad(i, f)),
                Way::Loading { .. } => {
                    actions.push(if flight.token.is_some() { Action::Fill(i, f) } else { Action::Land(i, f) });
                    if self.left.failed_loads > 0 {
                        actions.push(Action::FailLoad(i, f));
                    }
                }
                Way::Found { .. } | Way::Filled { .. } => actions.push(Action::Land(i, f)),
            }
        }
        // Who joins changes nothing: a flight that can be joined is judged as if somebody had joined it just now.
        let flying = instance.flights.iter().any(|flight| flight.joinable) || self.flights().count() == model.flights;
        match instance.memory {
            _ if flying => {}
            Entry::Fresh { .. } if self.left.refreshes > 0 => actions.push(Action::Refresh(i)),
            Entry::Fresh { .. } => {}
            _ => actions.push(Action::Arrive(i)),
        }
    }

    fn delivery_actions(&self, model: &Model, i: usize, instance: &Instance, actions: &mut Vec<Action>) {
        let appends_first = model.bug == Some(Bug::AppendsBeforeExpiring);
        let queue = &instance.queue;
        let append = |actions: &mut Vec<Action>, scope| {
            if scope == Scope::Everything && model.same_millisecond {
                for ticks in [[false, false], [false, true], [true, false]] {
                    actions.push(Action::Append(i, ticks));
                }
            }
            actions.push(Action::Append(i, [true, true]));
        };
        match queue.delivery.map(|delivery| (delivery.done, delivery.scope)) {
            _ if instance.cut_off && !matches!(queue.delivery, Some(Delivery { done: Done::Here, .. })) => {}
            None if queue.everything.is_some() => append(actions, Scope::Everything),
            None if queue.key.is_some() && appends_first => append(actions, Scope::Key),
            None if queue.key.is_some() => actions.push(Action::ExpireInRedis(i)),
            None => {}
            Some((Done::Half, _)) if appends_first => actions.push(Action::ExpireInRedis(i)),
            Some((Done::Half, scope)) => append(actions, scope),
            Some((Done::Both(..), _)) => actions.push(Action::ExpireHere(i)),
            Some((Done::Here, _)) => actions.push(Action::Acknowledge(i)),
        }
    }

    pub fn step(&mut self, model: &Model, action: Action) {
        use Action::{Append, Arrive, ExpireInRedis, FailLoad, Fill, Look};
        match action {
            ExpireInRedis(i) | Append(i, _) | Arrive(i) | Look(i, _) | Fill(i, _) | FailLoad(i, _)
                if self.instances[i].behind =>
            {
                self.swap_redis();
                self.act(model, action);
                self.swap_redis();
                if let Append(i, _) = action {
                    self.forget_that_it_was_told();
                    self.instances[i].witness = true;
                }
            }
            _ => self.act(model, action),
        }
        self.forget(model);
    }

    fn swap_redis(&mut self) {
        if let Some(replaced) = &mut self.replaced {
            mem::swap(&mut replaced.0, &mut self.redis);
            mem::swap(&mut replaced.1, &mut self.clock);
        }
    }

    /// Ghost: what was said of a loss came before this one.
    fn forget_that_it_was_told(&mut self) {
        self.lost = true;
        self.redis.suspect(true);
        self.notices(|notice| notice.told = false);
        for instance in &mut self.instances {
            instance.told = false;
            instance.flights.iter_mut().for_each(|flight| flight.told = false);
        }
    }

    fn act(&mut self, model: &Model, action: Action) {
        let left = self.left;
        match action {
            Action::Commit => {
                self.left.commits -= 1;
                self.database += 1;
            }
            Action::ExpireOther => {
                self.left.others -= 1;
                self.append(None, Scope::Nothing, 0, [true, true]);
            }
            Action::ExpireAll => {
                self.left.everythings -= 1;
                self.append(None, Scope::Everything, 0, [true, true]);
            }
            Action::Tick => {
                self.left.ticks -= 1;
                self.clock += 1;
            }
            Action::Invoke(i, scope) => {
                let (covers, instance) = (self.database, &mut self.instances[i]);
                instance.invocation = Some(Item { covers, late: instance.queue.delivery.is_some() });
                instance.queue.add(model, scope, covers);
                instance.expire(model, scope);
                instance.known = instance.known.max(covers);
            }
            Action::InvocationEnds(i) => {
                self.left.timeouts -= 1;
                self.instances[i].invocation = None;
            }
            Action::ExpireInRedis(i) => self.expire_in_redis(model, i),
            Action::Append(i, ticks) => self.append_delivery(model, i, ticks),
            Action::ExpireHere(i) => {
                self.expire_here(model, i);
                if model.coarse {
                    self.acknowledge(i);
                }
            }
            Action::Acknowledge(i) => self.acknowledge(i),
            Action::ReadLog(i) => {
                if self.redis_of(&self.instances[i]).log.is_empty() {
                    self.append(Some(i), Scope::Nothing, 0, [true, true]);
                }
                let reply = self.read(model, &self.instances[i]);
                let instance = &mut self.instances[i];
                instance.reply = reply;
                // What was looked for is settled; what is acknowledged from now on is not.
                if reply.is_some_and(|reply| reply.start) {
                    instance.own = Own { early: instance.own.early, ..Own::default() };
                }
                // But for a fail-over in between, to act later is to read later.
                if left.failovers == 0 && reply.is_some_and(|reply| reply.why.is_none()) {
                    self.hear(model, i);
                }
            }
            Action::Resume(i) => self.instances[i].position = self.tail().map(|tail| tail.id),
            Action::Hear(i) => self.hear(model, i),
            Action::Arrive(i) => {
                self.instances[i].lead(model, false);
                if model.swift {
                    self.go_on(model, i, self.instances[i].flights.len() - 1);
                }
            }
            Action::Refresh(i) => {
                self.left.refreshes -= 1;
                self.instances[i].lead(model, true);
            }
            Action::Look(i, f) => {
                self.look(model, i, f);
                if model.swift {
                    self.go_on(model, i, f);
                }
                self.instances[i].land_overtaken(model);
            }
            Action::WaitEnds(i, f) => {
                self.left.timeouts -= 1;
                self.instances[i].flights[f].way = Way::Load;
                self.instances[i].land_overtaken(model);
            }
            Action::BeginLoad(i, f) => self.instances[i].flights[f].way = Way::Loading { version: self.database },
            Action::Fill(i, f) => {
                self.fill(model, i, f);
                if model.swift {
                    self.instances[i].land(model, f);
                }
                self.instances[i].land_overtaken(model);
            }
            Action::FailLoad(i, f) => self.fail_load(i, f),
            Action::Land(i, f) => self.instances[i].land(model, f),
            Action::LeaseEnds => {
                let held = self.redis.lease.is_some_and(|lease| self.is_held(lease.token));
                self.left.timeouts -= u8::from(held);
                self.redis.lease = None;
            }
            Action::DurationEndsInRedis => {
                self.left.durations -= 1;
                self.redis.entry.expire();
            }
            Action::DurationEnds(i) => {
                self.left.durations -= 1;
                self.instances[i].memory.expire();
            }
            Action::Crash(i) => {
                self.left.crashes -= 1;
                self.instances[i] = Instance::default();
                self.notices(|notice| notice.author = notice.author.filter(|author| *author != i));
            }
            Action::CutOff(i) => {
                self.left.disconnects -= 1;
                self.instances[i].cut_off = true;
                self.instances[i].lose_replies(model, false);
            }
            Action::Reconnect(i) => {
                let instance = &mut self.instances[i];
                instance.cut_off = false;
                if mem::take(&mut instance.behind) {
                    instance.lose_replies(model, false);
                    self.replaced = None;
                }
            }
            Action::Flush => {
                self.left.flushes -= 1;
                self.redis = Redis::default();
            }
            Action::Trim => {
                self.left.trims -= 1;
                self.redis.log.drain(..self.redis.log.len() - 1);
            }
            Action::Replicate => self.replica = Some(Box::new(self.redis.clone())),
            Action::FailOver { late, behind } => self.fail_over(model, late, behind),
        }
    }

    /// Leaves out what nobody can ever look at again, so that equal futures are equal states.
    fn forget(&mut self, model: &Model) {
        let heard = self.instances.iter().filter_map(|instance| instance.position).min().unwrap_or(0);
        let sought = |instance: &Instance, id| instance.is_unacknowledged() == Some(id) || instance.own.has(id);
        while self.redis.log.len() > 1
            && self.redis.log[0].id <= heard
            && !self.instances.iter().any(|instance| sought(instance, self.redis.log[0].id))
        {
            self.redis.log.remove(0);
        }
        if self.left.failovers == 0 {
            self.replica = None;
        }
        for (i, instance) in self.instances.iter_mut().enumerate() {
            if self.left.failovers == 0 && !instance.behind {
                instance.skip_own(i, &self.redis.log);
            }
            let nothing_is_lost = self.left.failovers == 0 && !self.lost && self.replaced.is_none();
            if nothing_is_lost {
                instance.own = Own::default();
            }
            if nothing_is_lost && model.budget.flushes == 0 {
                instance.youngest = 0;
            }
            // Looked for at once: later, only more would be found lost.
            if !instance.behind {
                instance.own.doubtful.retain(|own| self.redis.log.iter().all(|notice| notice.id != *own));
            }
            if instance.is_unacknowledged() != Some(instance.own.early) {
                instance.own.early = 0;
            }
        }
    }

    pub fn notices(&mut self, mut each: impl FnMut(&mut Notice)) {
        self.redis.log.iter_mut().for_each(&mut each);
        if let Some(replaced) = &mut self.replaced {
            replaced.0.log.iter_mut().for_each(&mut each);
        }
        if let Some(replica) = &mut self.replica {
            replica.log.iter_mut().for_each(&mut each);
        }
        for reply in self.instances.iter_mut().flat_map(|instance| &mut instance.reply) {
            each(&mut reply.notice);
        }
    }

    pub fn tokens(&mut self, mut each: impl FnMut(&mut Token)) {
        let in_replica = self.replica.as_deref_mut().and_then(|replica| replica.lease.as_mut());
        let in_replaced = self.replaced.as_mut().and_then(|replaced| replaced.0.lease.as_mut());
        self.redis.lease.iter_mut().chain(in_replica).chain(in_replaced).for_each(|lease| each(&mut lease.token));
        for flight in self.instances.iter_mut().flat_map(|instance| &mut instance.flights) {
            flight.token.iter_mut().for_each(&mut each);
        }
    }

    /// Calls with every id of a notice and with every time of Redis' clock.
    pub fn numbers(&mut self, mut id: impl FnMut(&mut Id), mut time: impl FnMut(&mut Clock)) {
        self.notices(|notice| {
            id(&mut notice.id);
            id(&mut notice.previous);
            time(&mut notice.floor.at);
        });
        time(&mut self.clock);
        let replaced = self.replaced.as_deref_mut().map(|(redis, clock)| {
            time(clock);
            redis
        });
        for redis in iter::once(&mut self.redis).chain(self.replica.as_deref_mut()).chain(replaced) {
            if let Entry::Fresh { began, .. } = &mut redis.entry {
                time(began);
            }
            redis.lease.iter_mut().for_each(|lease| time(&mut lease.began));
        }
        for instance in &mut self.instances {
            time(&mut instance.floor.at);
            time(&mut instance.youngest);
            let Own { unheard, doubtful, early } = &mut instance.own;
            unheard.iter_mut().chain(doubtful).chain([early]).for_each(&mut id);
            instance.position.iter_mut().for_each(&mut id);
            if let Some(Delivery { done: Done::Both(number, floor), .. }) = &mut instance.queue.delivery {
                id(number);
                time(&mut floor.at);
            }
        }
    }

    // The log.

    /// `ticks`: whether Redis' clock moves before and after; it only matters where a floor is set.
    fn append(&mut self, author: Option<usize>, scope: Scope, covers: Version, ticks: [bool; 2]) -> Notice {
        let last = self.tail().copied();
        // The first notice of a log, too: what was there may have said that what is in Redis is stale.
        let raises = scope == Scope::Everything || last.is_none();
        let known = author.map_or(0, |author| self.instances[author].floor.generation);
        let floor = last.map_or(Floor::NONE, |last| last.floor);
        self.clock += u8::from(raises && ticks[0]);
        self.last_id += 1;
        self.appended = self.appended.max(covers);
        let notice = Notice {
            id: self.last_id,
            previous: last.map_or(0, |last| last.id),
            floor: Floor {
                at: if raises { self.clock } else { floor.at },
                generation: floor.generation.max(known) + u8::from(raises),
            },
            author,
            scope,
            covers: last.map_or(0, |last| last.covers).max(covers),
            told: raises && self.lost || last.is_some_and(|last| last.told),
        };
        self.clock += u8::from(raises && ticks[1]);
        self.redis.log.push(notice);
        notice
    }

    /// What the next read of the log brings, if anything. A log without a notice gets one first.
    fn read(&self, model: &Model, instance: &Instance) -> Option<Reply> {
        let log = &self.redis_of(instance).log;
        let tail = *log.last().unwrap_or(&Notice::NONE);
        let reply = |why: Option<Why>, notice: Notice, start| {
            let why = why.filter(|_| model.bug != Some(Bug::ResetUnnoticed) || why != Some(Why::Reset));
            let answers = notice.floor.at > instance.youngest && !instance.behind;
            Some(Reply { why, notice, start, answers })
        };
        let start = |why| reply(Some(why), tail, true);
        let lacks = |own: &Id| log.iter().all(|notice| notice.id != *own);
        let Own { unheard, doubtful, .. } = &instance.own;
        let Some(position) = instance.position else {
            let at_the_end = model.bug == Some(Bug::FirstReadSeeksAtTheEnd);
            let lost = unheard.iter().chain(doubtful).any(|own| if at_the_end { *own > tail.id } else { lacks(own) });
            return start(if lost { Why::Reset } else { Why::Missed });
        };
        if doubtful.iter().any(lacks) {
            return start(Why::Reset);
        }
        let Some(notice) = log.iter().find(|notice| notice.id > position) else {
            let own_is_lost = unheard.last().is_some_and(|own| tail.id < *own);
            return if tail.id == position && !own_is_lost { None } else { start(Why::Reset) };
        };
        match notice.previous.cmp(&position) {
            Ordering::Less => reply(Some(Why::Reset), *notice, false),
            Ordering::Greater if model.bug != Some(Bug::TrimUnnoticed) => reply(Some(Why::Missed), *notice, false),
            _ => reply(None, *notice, false),
        }
    }

    fn hear(&mut self, model: &Model, i: usize) {
        let instance = &mut self.instances[i];
        let Some(Reply { mut why, notice, start, answers }) = instance.reply.take() else { return };
        if start {
            instance.own.jump(notice.id);
        } else if !instance.own.hear(model, notice.id, notice.author == Some(i)) {
            why = Some(Why::Reset);
        }
        instance.position = Some(notice.id);
        instance.youngest = self.clock;
        let known = instance.floor;
        instance.floor = known.and(model, notice.floor);
        instance.told |= notice.told || self.lost && why == Some(Why::Reset);
        instance.known = instance.known.max(notice.covers);
        let answered = match model.bug {
            Some(Bug::AnsweredUnseen) => true,
            Some(Bug::AnsweredByHigherFloor) => notice.floor.at > known.at,
            Some(Bug::AnsweredByClockAlone) => answers,
            Some(Bug::AnsweredByGenerationAlone) => notice.floor.generation > known.generation,
            // A generation that is known may have been said by the clock of the Redis before.
            _ => answers && notice.floor.generation > known.generation,
        };
        if why == Some(Why::Reset) && !answered {
            instance.queue.add(model, Scope::Everything, 0);
        }
        if why.is_some() {
            instance.expire(model, Scope::Everything);
        }
        let ignored = model.bug == Some(Bug::AbsentIgnoresNotices) && instance.memory == Entry::Nothing;
        let news = notice.author != Some(i) || notice.scope == Scope::Everything;
        if !start && news && !ignored {
            instance.expire(model, notice.scope);
        }
    }

    // An expiry.

    fn expire_in_redis(&mut self, model: &Model, i: usize) {
        self.redis.entry.expire();
        if model.bug != Some(Bug::ExpiryKeepsLease) {
            self.redis.lease = None;
        }
        let queue = &mut self.instances[i].queue;
        queue.delivery = match queue.delivery {
            // Only with Bug::AppendsBeforeExpiring.
            Some(delivery) => Some(Delivery { done: Done::Both(0, Floor::NONE), ..delivery }),
            None => queue.key.map(|item| Delivery { scope: Scope::Key, covers: item.covers, done: Done::Half }),
        };
    }

    fn append_delivery(&mut self, model: &Model, i: usize, ticks: [bool; 2]) {
        let queue = &self.instances[i].queue;
        let (scope, covers) = match (queue.delivery, queue.everything, queue.key) {
            (Some(delivery), _, _) => (delivery.scope, delivery.covers),
            (None, Some(item), _) => (Scope::Everything, item.covers),
            (None, None, item) => (Scope::Key, item.map_or(0, |item| item.covers)),
        };
        let notice = self.append(Some(i), scope, covers, ticks);
        let half = model.bug == Some(Bug::AppendsBeforeExpiring) && scope != Scope::Everything;
        let done = if half { Done::Half } else { Done::Both(notice.id, notice.floor) };
        self.instances[i].queue.delivery = Some(Delivery { scope, covers, done });
    }

    fn expire_here(&mut self, model: &Model, i: usize) {
        let instance = &mut self.instances[i];
        let Some(Delivery { scope, covers, done: Done::Both(id, floor) }) = instance.queue.delivery else {
            return;
        };
        if model.bug != Some(Bug::OwnFloorLearntLater) {
            instance.floor = instance.floor.and(model, floor);
        }
        instance.own.appended(model, id, instance.position);
        instance.youngest = self.clock;
        // What is acknowledged while a read is under way may be lost, too.
        if let Some(reply) = &mut instance.reply {
            reply.answers = false;
        }
        instance.expire(model, scope);
        instance.queue.delivery = Some(Delivery { scope, covers, done: Done::Here });
    }

    fn acknowledge(&mut self, i: usize) {
        let instance = &mut self.instances[i];
        let queue = &mut instance.queue;
        let Some(delivery) = queue.delivery.take() else { return };
        let item = if delivery.scope == Scope::Key { &mut queue.key } else { &mut queue.everything };
        *item = item.filter(|item| item.late);
        queue.nothing_is_late();
        let empty = queue.key.is_none() && queue.everything.is_none();
        match instance.invocation {
            Some(invocation) if empty || !invocation.late => {
                self.acknowledged = self.acknowledged.max(invocation.covers);
                instance.invocation = None;
            }
            Some(invocation) => instance.invocation = Some(Item { late: false, ..invocation }),
            None => {}
        }
    }

    // A flight.

    fn look(&mut self, model: &Model, i: usize, f: usize) {
        let floor = self.instances[i].floor;
        let fresh = self.fresh_in_redis(model, floor);
        let drawn = (0..).find(|token| {
            let in_replica = self.replica.as_ref().and_then(|replica| replica.lease);
            let in_replaced = self.replaced.as_ref().and_then(|replaced| replaced.0.lease);
            !self.is_held(*token)
                && ![self.redis.lease, in_replica, in_replaced].iter().flatten().any(|old| old.token == *token)
        });
        let instance = &mut self.instances[i];
        let flight = &mut instance.flights[f];
        flight.way = match fresh {
            _ if instance.cut_off => Way::Load,
            Some((version, suspect)) if !flight.refresh => Way::Found { version, suspect: suspect && !flight.told },
            _ if self.redis.lease.is_some() => Way::Wait,
            _ => {
                flight.token = drawn;
                let lease = |token| Lease { token, began: self.clock, generation: floor.generation, suspect: false };
                self.redis.lease = drawn.map(lease);
                Way::Load
            }
        };
    }

    /// To the next step that takes its time: a load, or a wait for another one.
    fn go_on(&mut self, model: &Model, i: usize, f: usize) {
        if self.instances[i].flights[f].way == Way::Look {
            self.look(model, i, f);
        }
        let flight = &mut self.instances[i].flights[f];
        match flight.way {
            Way::Load => flight.way = Way::Loading { version: self.database },
            Way::Found { .. } => self.instances[i].land(model, f),
            _ => {}
        }
    }

    fn fill(&mut self, model: &Model, i: usize, f: usize) {
        let Instance { cut_off, floor: Floor { generation, .. }, .. } = self.instances[i];
        let flight = &mut self.instances[i].flights[f];
        let Way::Loading { version } = flight.way else { return };
        let lease = self.redis.lease.filter(|lease| Some(lease.token) == flight.token);
        let unguarded = (model.bug == Some(Bug::FillsWithoutLease)).then_some(Lease {
            token: 0,
            began: self.clock,
            generation,
            suspect: false,
        });
        flight.token = None;
        flight.way = Way::Filled { version, refused: !cut_off && lease.or(unguarded).is_none() };
        if let (false, Some(Lease { began, generation, suspect, .. })) = (cut_off, lease.or(unguarded)) {
            self.redis.lease = None;
            self.redis.entry = Entry::Fresh { version, began, generation, suspect };
        }
    }

    /// Its readers get a stale copy or an error, and know it.
    fn fail_load(&mut self, i: usize, f: usize) {
        self.left.failed_loads -= 1;
        let flight = self.instances[i].flights.remove(f);
        if !self.instances[i].cut_off {
            self.redis.lease = self.redis.lease.filter(|lease| Some(lease.token) != flight.token);
        }
    }

    // Faults.

    fn fail_over(&mut self, model: &Model, late: bool, behind: Option<usize>) {
        self.left.failovers -= 1;
        let Some(replica) = self.replica.take() else { return };
        let last = |log: &[Notice]| log.last().map_or(0, |notice| notice.id);
        let end = last(&replica.log);
        self.lost = end < last(&self.redis.log);
        let old = mem::replace(&mut self.redis, *replica);
        self.redis.suspect(self.lost);
        let clock = model.clock_after_failover.unwrap_or(self.clock);
        for (i, instance) in self.instances.iter_mut().enumerate() {
            instance.behind = behind == Some(i);
            // Connections break; what was on its way is lost with them.
            if !instance.behind {
                instance.lose_replies(model, late);
            }
            let Own { unheard, doubtful, .. } = &instance.own;
            let own = unheard.iter().chain(doubtful).copied().chain(instance.is_unacknowledged()).max();
            instance.witness = instance.position.max(own) > Some(end);
            if instance.youngest > 0 {
                instance.youngest = (instance.youngest + clock).saturating_sub(self.clock);
            }
        }
        let old_clock = mem::replace(&mut self.clock, clock);
        self.replaced = behind.map(|_| Box::new((old, old_clock)));
    }
}

impl Redis {
    fn suspect(&mut self, is_suspect: bool) {
        if let Entry::Fresh { suspect, .. } = &mut self.entry {
            *suspect = is_suspect;
        }
        if let Some(lease) = &mut self.lease {
            lease.suspect = is_suspect;
        }
    }
}

impl Own {
    fn appended(&mut self, model: &Model, notice: Id, heard: Option<Id>) {
        if notice == 0 || model.bug == Some(Bug::OwnNoticeLostUnnoticed) || self.early == notice {
            return;
        }
        if Some(notice) > heard {
            self.unheard.push(notice);
        } else if model.bug != Some(Bug::LateReplyBelieved) {
            self.doubtful.push(notice);
        }
    }

    /// `false` if one of ours should have come before this notice.
    fn hear(&mut self, model: &Model, notice: Id, is_ours: bool) -> bool {
        if is_ours && !self.unheard.contains(&notice) {
            self.early = notice;
        }
        self.unheard.retain(|own| *own != notice);
        if self.unheard.first().is_none_or(|own| *own > notice) {
            return true;
        }
        self.unheard.retain(|own| *own > notice && model.bug == Some(Bug::OwnNoticeSoughtAtTheEnd));
        model.bug == Some(Bug::OwnNoticeSoughtAtTheEnd)
    }

    /// The log goes on after `tail`; what there is has been acknowledged since that was read.
    fn jump(&mut self, tail: Id) {
        let unsettled = self.doubtful.drain(..).chain(self.unheard.drain(..)).collect::<BTreeSet<_>>();
        (self.doubtful, self.unheard) = unsettled.into_iter().partition(|own| *own <= tail);
    }

    fn has(&self, notice: Id) -> bool {
        self.unheard.contains(&notice) || self.doubtful.contains(&notice)
    }
}

impl Entry {
    fn expire(&mut self) {
        if let Self::Fresh { .. } = self {
            *self = Self::Stale;
        }
    }
}

impl Queue {
    fn add(&mut self, model: &Model, scope: Scope, covers: Version) {
        let late = self.delivery.is_some();
        let newest = |item: Option<Item>| item.map_or(0, |item| item.covers).max(covers);
        match (scope, self.everything) {
            (Scope::Key, None) => self.key = Some(Item { covers: newest(self.key), late }),
            (Scope::Key, Some(_)) if model.bug == Some(Bug::EverythingSwallowsKeys) => {}
            _ => {
                let covers = newest(self.everything).max(newest(self.key));
                self.everything = Some(Item { covers, late });
                self.key = None;
            }
        }
    }

    pub fn has_key(&self) -> bool {
        self.key.is_some() || self.everything.is_some()
    }

    fn nothing_is_late(&mut self) {
        for item in [&mut self.key, &mut self.everything].into_iter().flatten() {
            item.late = false;
        }
    }
}

impl Instance {
    fn expire(&mut self, model: &Model, scope: Scope) {
        if scope == Scope::Nothing {
            return;
        }
        self.memory.expire();
        for flight in &mut self.flights {
            flight.overtaken = true;
            flight.joinable &= model.bug == Some(Bug::LateJoinerAccepts);
        }
        self.land_overtaken(model);
    }

    /// Lands overtaken flights that nothing but their readers depends on any more: when they land makes no difference.
    fn land_overtaken(&mut self, model: &Model) {
        if matches!(model.bug, Some(Bug::MemoryFillsUnguarded | Bug::LateJoinerAccepts)) {
            return;
        }
        for f in (0..self.flights.len()).rev() {
            let flight = self.flights[f];
            let done = match flight.way {
                Way::Look | Way::Wait => false,
                Way::Load | Way::Loading { .. } => flight.token.is_none(),
                Way::Found { .. } | Way::Filled { .. } => true,
            };
            if flight.overtaken && done {
                self.land(model, f);
            }
        }
    }

    fn land(&mut self, model: &Model, f: usize) {
        let flight = self.flights.remove(f);
        let (version, suspect, refused) = match flight.way {
            Way::Found { version, suspect } => (version, suspect, false),
            Way::Loading { version } => (version, false, false),
            Way::Filled { version, refused } => (version, false, refused),
            _ => return,
        };
        let overtaken = flight.overtaken || refused;
        if !overtaken || model.bug == Some(Bug::MemoryFillsUnguarded) {
            self.memory = Entry::Fresh { version, began: 0, generation: 0, suspect };
        }
        // Who joins an overtaken flight tries again, as whoever comes next: only its first reader takes the result.
        let joined = flight.joinable && (!overtaken || model.bug == Some(Bug::LateJoinerAccepts));
        let least = if joined { self.known } else { flight.least };
        self.wronged |= version < least && !suspect;
    }

    fn lead(&mut self, model: &Model, refresh: bool) {
        let alone = self.queue.has_key() && model.bug != Some(Bug::QueueIgnored) || self.position.is_none();
        let way = if alone { Way::Load } else { Way::Look };
        let (least, told) = (self.known, self.told);
        let token = None;
        self.flights.push(Flight { joinable: true, overtaken: false, alone, refresh, token, way, least, told });
    }

    /// The notice that Redis has and whose acknowledgement has not come.
    fn is_unacknowledged(&self) -> Option<Id> {
        match self.queue.delivery {
            Some(Delivery { done: Done::Both(notice, _), .. }) => Some(notice),
            _ => None,
        }
    }

    /// Reads own notices that say nothing new: whether now or later makes no difference.
    fn skip_own(&mut self, i: usize, log: &[Notice]) {
        for notice in log {
            let is_next = self.own.unheard.first().is_none_or(|own| *own >= notice.id);
            let continues = Some(notice.previous) == self.position && is_next && self.own.doubtful.is_empty();
            if Some(notice.id) <= self.position {
                continue;
            }
            if self.reply.is_some() || notice.author != Some(i) || notice.scope == Scope::Everything || !continues {
                return;
            }
            self.position = Some(notice.id);
            let was_acknowledged = self.own.has(notice.id);
            self.own.unheard.retain(|own| *own != notice.id);
            if !was_acknowledged {
                self.own.early = notice.id;
            }
        }
    }

    /// What Redis answered does not arrive, unless it is an acknowledgement that comes `late`, and what was only half sent
    /// is not carried out.
    fn lose_replies(&mut self, model: &Model, late: bool) {
        for flight in &mut self.flights {
            flight.way = match flight.way {
                Way::Found { .. } | Way::Load => {
                    flight.token = None;
                    Way::Load
                }
                Way::Filled { version, .. } => Way::Filled { version, refused: false },
                way => way,
            };
        }
        self.land_overtaken(model);
        let arrives = |done| done == Done::Here || late && matches!(done, Done::Both(..));
        if self.queue.delivery.is_some_and(|delivery| !arrives(delivery.done)) {
            self.queue.delivery = None;
            self.queue.nothing_is_late();
            self.invocation = self.invocation.map(|invocation| Item { late: false, ..invocation });
        }
    }
}
