//! One key of the cache as a state and its steps: what `src/cache` does, one indivisible action at a time.
//!
//! A step is what nobody can interrupt: a script or a command in Redis, or what an instance does under one lock.
//! Replies are kept between the two, so any other step may come before they are acted upon. Versions, floors and ids
//! are small numbers. Fields marked *ghost* exist only to be judged by; no step depends on them.

use super::{Bug, Model};

pub type Version = u8;
/// Redis' clock in milliseconds; 0 is before everything.
pub type Clock = u8;
/// Id of a notice; 0 is `0-0`. Never given twice, as Redis makes them from the time.
pub type Id = u8;
pub type Token = u8;
/// How many expiries of everything there have been.
pub type Generation = u8;

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
    pub floor: Clock,
    pub generation: Generation,
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
    const NONE: Self = Self {
        id: 0,
        previous: 0,
        floor: 0,
        generation: 0,
        author: None,
        scope: Scope::Nothing,
        covers: 0,
        told: false,
    };
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance {
    pub memory: Entry,
    pub flights: Vec<Flight>,
    pub floor: Clock,
    pub generation: Generation,
    /// `None`: the log was not read yet.
    pub position: Option<Id>,
    /// Read from the log and not yet acted upon.
    pub reply: Option<Reply>,
    /// The last notice that this instance knows to be in the log though it has not read it there; 0: none.
    pub own: Id,
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
    /// Both commands; the floor and the generation that the notice has.
    Both(Id, Clock, Generation),
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
    FailOver,
}

impl State {
    pub fn cold(model: &Model) -> Self {
        let first = Notice { id: 1, ..Notice::NONE };
        let instance = Instance { position: Some(1), ..Instance::default() };
        Self {
            database: 1,
            acknowledged: 1,
            appended: 1,
            redis: Redis { log: vec![first], ..Redis::default() },
            replica: None,
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
        state.redis.entry = Entry::Fresh { version: 1, began: model.clock, generation: 0, suspect: false };
        for instance in &mut state.instances {
            instance.memory = Entry::Fresh { version: 1, began: 0, generation: 0, suspect: false };
        }
        state
    }

    pub fn tail(&self) -> Option<&Notice> {
        self.redis.log.last()
    }

    /// Whether Redis' entry is fresh for who knows this floor and this generation.
    pub fn fresh_in_redis(&self, model: &Model, floor: Clock, known: Generation) -> Option<(Version, bool)> {
        match self.redis.entry {
            Entry::Fresh { version, began, generation, suspect } => {
                // Its age is never negative, though Redis' clock may have been set back.
                let began = began.min(self.clock);
                let above = began > floor || began == floor && model.bug == Some(Bug::FloorIncludesItsMillisecond);
                // Either rule hides that the other one is missing, but for a clock that goes back.
                let uncounted = matches!(model.bug, Some(Bug::GenerationIgnored | Bug::FloorIncludesItsMillisecond));
                let counted = generation >= known || uncounted;
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
            if instance.cut_off {
                actions.push(Action::Reconnect(i));
            } else if left.disconnects > 0 {
                actions.push(Action::CutOff(i));
            }
        }
        if left.commits > 0 {
            actions.push(Action::Commit);
        }
        if left.others > 0 {
            actions.push(Action::ExpireOther);
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
        if left.failovers > 0 {
            actions.push(if self.replica.is_some() { Action::FailOver } else { Action::Replicate });
        }
    }

    fn flight_actions(&self, model: &Model, i: usize, instance: &Instance, actions: &mut Vec<Action>) {
        for (f, flight) in instance.flights.iter().enumerate() {
            match flight.way {
                Way::Look => actions.push(Action::Look(i, f)),
                Way::Wait => {
                    // To look again while nothing has changed changes nothing.
                    if self.redis.lease.is_none() || instance.cut_off {
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
        let left = self.left;
        match action {
            Action::Commit => {
                self.left.commits -= 1;
                self.database += 1;
            }
            Action::ExpireOther => {
                self.left.others -= 1;
                self.append(None, Scope::Nothing, 0);
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
                if self.redis.log.is_empty() {
                    self.append(Some(i), Scope::Nothing, 0);
                }
                let reply = self.read(model, &self.instances[i]);
                self.instances[i].reply = reply;
                // But for a fail-over in between, to act later is to read later.
                if left.failovers == 0 && reply.is_some_and(|reply| reply.why.is_none()) {
                    self.hear(model, i);
                }
            }
            Action::Resume(i) => self.instances[i].position = self.tail().map(|tail| tail.id),
            Action::Hear(i) => self.hear(model, i),
            Action::Arrive(i) => self.instances[i].lead(model, false),
            Action::Refresh(i) => {
                self.left.refreshes -= 1;
                self.instances[i].lead(model, true);
            }
            Action::Look(i, f) => {
                self.look(model, i, f);
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
                self.instances[i].lose_replies(model);
            }
            Action::Reconnect(i) => self.instances[i].cut_off = false,
            Action::Flush => {
                self.left.flushes -= 1;
                self.redis = Redis::default();
            }
            Action::Trim => {
                self.left.trims -= 1;
                self.redis.log.drain(..self.redis.log.len() - 1);
            }
            Action::Replicate => self.replica = Some(Box::new(self.redis.clone())),
            Action::FailOver => self.fail_over(model),
        }
        self.forget();
    }

    /// Leaves out what nobody can ever look at again, so that equal futures are equal states.
    fn forget(&mut self) {
        let heard = self.instances.iter().filter_map(|instance| instance.position).min().unwrap_or(0);
        while self.redis.log.len() > 1 && self.redis.log[0].id <= heard {
            self.redis.log.remove(0);
        }
        if self.left.failovers == 0 {
            self.replica = None;
        }
        for (i, instance) in self.instances.iter_mut().enumerate() {
            if self.left.failovers == 0 {
                instance.skip_own(i, &self.redis.log);
            }
            if self.left.failovers == 0 && !self.lost || instance.position >= Some(instance.own) {
                instance.own = 0;
            }
        }
    }

    pub fn notices(&mut self, mut each: impl FnMut(&mut Notice)) {
        self.redis.log.iter_mut().for_each(&mut each);
        if let Some(replica) = &mut self.replica {
            replica.log.iter_mut().for_each(&mut each);
        }
        for reply in self.instances.iter_mut().flat_map(|instance| &mut instance.reply) {
            each(&mut reply.notice);
        }
    }

    pub fn tokens(&mut self, mut each: impl FnMut(&mut Token)) {
        let in_replica = self.replica.as_deref_mut().and_then(|replica| replica.lease.as_mut());
        self.redis.lease.iter_mut().chain(in_replica).for_each(|lease| each(&mut lease.token));
        for flight in self.instances.iter_mut().flat_map(|instance| &mut instance.flights) {
            flight.token.iter_mut().for_each(&mut each);
        }
    }

    /// Calls with every id of a notice and with every time of Redis' clock.
    pub fn numbers(&mut self, mut id: impl FnMut(&mut Id), mut time: impl FnMut(&mut Clock)) {
        self.notices(|notice| {
            id(&mut notice.id);
            id(&mut notice.previous);
            time(&mut notice.floor);
        });
        time(&mut self.clock);
        for redis in std::iter::once(&mut self.redis).chain(self.replica.as_deref_mut()) {
            if let Entry::Fresh { began, .. } = &mut redis.entry {
                time(began);
            }
            redis.lease.iter_mut().for_each(|lease| time(&mut lease.began));
        }
        for instance in &mut self.instances {
            time(&mut instance.floor);
            id(&mut instance.own);
            instance.position.iter_mut().for_each(&mut id);
            if let Some(Delivery { done: Done::Both(number, floor, _), .. }) = &mut instance.queue.delivery {
                id(number);
                time(floor);
            }
        }
    }

    // The log.

    /// Without one rule of the script's, that the first notice of a log raises the floor whatever its scope: what holds here
    /// holds without it.
    fn append(&mut self, author: Option<usize>, scope: Scope, covers: Version) -> Notice {
        let last = self.tail().copied();
        let everything = scope == Scope::Everything;
        let known = author.map_or(0, |author| self.instances[author].generation);
        let generation = last.map_or(0, |last| last.generation).max(known) + u8::from(everything);
        self.last_id += 1;
        self.appended = self.appended.max(covers);
        let notice = Notice {
            id: self.last_id,
            previous: last.map_or(0, |last| last.id),
            floor: if everything { self.clock } else { last.map_or(0, |last| last.floor) },
            generation,
            author,
            scope,
            covers: last.map_or(0, |last| last.covers).max(covers),
            told: everything && self.lost || last.is_some_and(|last| last.told),
        };
        self.redis.log.push(notice);
        notice
    }

    /// What the next read of the log brings, if anything. A log without a notice gets one first.
    fn read(&self, model: &Model, instance: &Instance) -> Option<Reply> {
        let tail = *self.tail().unwrap_or(&Notice::NONE);
        let start = |why| Some(Reply { why, notice: tail, start: true });
        let Some(position) = instance.position else { return start(Some(Why::Missed)) };
        let own_is_lost = |after: Id, before: Id| {
            after < instance.own && instance.own < before && model.bug != Some(Bug::OwnNoticeLostUnnoticed)
        };
        let Some(notice) = self.redis.log.iter().find(|notice| notice.id > position) else {
            return match tail.id {
                0 if model.bug == Some(Bug::ResetUnnoticed) => start(None),
                id if id == position && !own_is_lost(position, Id::MAX) => None,
                _ if model.bug == Some(Bug::ResetUnnoticed) => start(None),
                _ => start(Some(Why::Reset)),
            };
        };
        let why = match notice.previous {
            previous if previous < position => Some(Why::Reset),
            previous if own_is_lost(previous, notice.id) && model.bug != Some(Bug::OwnNoticeSoughtAtTheEnd) => {
                Some(Why::Reset)
            }
            previous if previous > position => Some(Why::Missed),
            _ => None,
        };
        let unnoticed = match why {
            Some(Why::Missed) => model.bug == Some(Bug::TrimUnnoticed),
            Some(Why::Reset) => model.bug == Some(Bug::ResetUnnoticed),
            None => false,
        };
        Some(Reply { why: why.filter(|_| !unnoticed), notice: *notice, start: false })
    }

    fn hear(&mut self, model: &Model, i: usize) {
        let instance = &mut self.instances[i];
        let Some(Reply { why, notice, start }) = instance.reply.take() else { return };
        let known_floor = instance.floor;
        instance.floor = instance.floor.max(notice.floor);
        instance.generation = instance.generation.max(notice.generation);
        instance.told |= notice.told || self.lost && why == Some(Why::Reset);
        instance.position = Some(notice.id);
        instance.known = instance.known.max(notice.covers);
        if why == Some(Why::Reset) {
            instance.own = 0;
            if notice.floor <= known_floor {
                instance.queue.add(model, Scope::Everything, 0);
            }
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
            Some(delivery) => Some(Delivery { done: Done::Both(0, 0, 0), ..delivery }),
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
        // The clock only matters where a floor is set.
        let everything = scope == Scope::Everything;
        self.clock += u8::from(everything && ticks[0]);
        let notice = self.append(Some(i), scope, covers);
        self.clock += u8::from(everything && ticks[1]);
        let half = model.bug == Some(Bug::AppendsBeforeExpiring) && !everything;
        let done = if half { Done::Half } else { Done::Both(notice.id, notice.floor, notice.generation) };
        self.instances[i].queue.delivery = Some(Delivery { scope, covers, done });
    }

    fn expire_here(&mut self, model: &Model, i: usize) {
        let instance = &mut self.instances[i];
        let Some(Delivery { scope, covers, done: Done::Both(id, floor, generation) }) = instance.queue.delivery else {
            return;
        };
        if model.bug != Some(Bug::OwnFloorLearntLater) {
            instance.floor = instance.floor.max(floor);
            instance.generation = instance.generation.max(generation);
        }
        instance.own = instance.own.max(id);
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
        let Instance { floor, generation, .. } = self.instances[i];
        let fresh = self.fresh_in_redis(model, floor, generation);
        let drawn = (0..).find(|token| {
            let in_replica = self.replica.as_ref().and_then(|replica| replica.lease);
            !self.is_held(*token) && ![self.redis.lease, in_replica].iter().flatten().any(|old| old.token == *token)
        });
        let instance = &mut self.instances[i];
        let flight = &mut instance.flights[f];
        flight.way = match fresh {
            _ if instance.cut_off => Way::Load,
            Some((version, suspect)) if !flight.refresh => Way::Found { version, suspect: suspect && !flight.told },
            _ if self.redis.lease.is_some() => Way::Wait,
            _ => {
                flight.token = drawn;
                let lease = |token| Lease { token, began: self.clock, generation, suspect: false };
                self.redis.lease = drawn.map(lease);
                Way::Load
            }
        };
    }

    fn fill(&mut self, model: &Model, i: usize, f: usize) {
        let Instance { cut_off, generation, .. } = self.instances[i];
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

    fn fail_over(&mut self, model: &Model) {
        self.left.failovers -= 1;
        let Some(replica) = self.replica.take() else { return };
        let last = |log: &[Notice]| log.last().map_or(0, |notice| notice.id);
        let end = last(&replica.log);
        self.lost = end < last(&self.redis.log);
        for instance in &mut self.instances {
            instance.witness = instance.position.max(Some(instance.own)) > Some(end);
        }
        self.redis = *replica;
        if let Entry::Fresh { suspect, .. } = &mut self.redis.entry {
            *suspect = self.lost;
        }
        if let Some(lease) = &mut self.redis.lease {
            lease.suspect = self.lost;
        }
        self.clock = model.clock_after_failover.unwrap_or(self.clock);
        // Connections break; what was on its way is lost with them.
        self.instances.iter_mut().for_each(|instance| instance.lose_replies(model));
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

    /// Reads own notices that say nothing new: whether now or later makes no difference.
    fn skip_own(&mut self, i: usize, log: &[Notice]) {
        for notice in log {
            let continues =
                Some(notice.previous) == self.position && !(notice.previous + 1..notice.id).contains(&self.own);
            if Some(notice.id) <= self.position {
                continue;
            }
            if self.reply.is_some() || notice.author != Some(i) || notice.scope == Scope::Everything || !continues {
                return;
            }
            self.position = Some(notice.id);
        }
    }

    /// What Redis answered does not arrive, and what was only half sent is not carried out.
    fn lose_replies(&mut self, model: &Model) {
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
        if self.queue.delivery.is_some_and(|delivery| delivery.done != Done::Here) {
            self.queue.delivery = None;
            self.queue.nothing_is_late();
            self.invocation = self.invocation.map(|invocation| Item { late: false, ..invocation });
        }
    }
}
