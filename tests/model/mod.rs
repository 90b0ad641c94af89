//! The coherence protocol of `src/cache`, every interleaving of it: a model checker walks all states that a few
//! commits and faults lead to, for one key, and judges each by the invariants C1–C5 and C7 of the design.
//!
//! `protocol` mirrors the code step by step; a change of the algorithm is made there too. A property that no planted
//! bug breaks proves nothing, so each bug below is one line of the protocol left out, and must be found.

mod protocol;

use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Property};

use self::protocol::{Action, Budget, Clock, Entry, Floor, Instance, State, Token, Way, Why};

/// What is checked.
#[derive(Clone, Copy, Debug)]
struct Model {
    instances: usize,
    /// At a time, on all instances together.
    flights: usize,
    budget: Budget,
    /// The host may also expire everything.
    everything: bool,
    /// What comes after one another may come in the same millisecond of Redis' clock.
    same_millisecond: bool,
    /// Redis' clock at first.
    clock: Clock,
    /// The replica's clock at a fail-over, if it is not the same.
    clock_after_failover: Option<Clock>,
    /// At a fail-over, one instance stays with the old primary, which goes on; a commit comes after it.
    split: bool,
    /// To save states: all begins with the entry in every memory, and an expiry is acknowledged with its last step.
    coarse: bool,
    /// To save more: a reader asks Redis and takes its answer, or begins to load, in one step, and a fill lands in one.
    swift: bool,
    /// A fail-over brings back what was at first, and no later state. What would be alike before and after it, as nobody
    /// could know of it otherwise, comes after it.
    cut_off_replica: bool,
    /// One instance has just started.
    restarted: bool,
    bug: Option<Bug>,
}

/// What is left out or done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// Expiries of everything are not counted.
    GenerationIgnored,
    /// A fill does not compare its lease with the current one.
    FillsWithoutLease,
    /// A notice about a key that memory lacks does not overtake its flight.
    AbsentIgnoresNotices,
    /// An overtaken flight's result is kept in memory.
    MemoryFillsUnguarded,
    /// A reader of the log that lost its connection goes on from the end.
    ResumesFromNow,
    /// An expiry leaves the lease to whoever is loading.
    ExpiryKeepsLease,
    /// The notice comes before Redis' entry is expired.
    AppendsBeforeExpiring,
    /// A notice that does not continue the last one heard is taken as if it did.
    TrimUnnoticed,
    /// A log that ends before the last notice heard is taken as if it did not.
    ResetUnnoticed,
    /// Flights ask Redis about keys whose expiry it does not know yet.
    QueueIgnored,
    /// Who joined a flight after its load began takes its result though an expiry has overtaken it.
    LateJoinerAccepts,
    /// The floor of an own notice is learnt when it is read from the log, after the expiry was acknowledged.
    OwnFloorLearntLater,
    /// A key that is added while everything is being delivered counts as delivered with it.
    EverythingSwallowsKeys,
    /// Only what was read from the log is missed when Redis goes back, not what was written to it.
    OwnNoticeLostUnnoticed,
    /// The same, where another notice stands after the point that Redis went back to.
    OwnNoticeSoughtAtTheEnd,
    /// An entry whose load began in the millisecond of an expiry of everything counts as loaded after it, and these are not
    /// counted.
    FloorIncludesItsMillisecond,
    /// What was acknowledged before the first read of the log is missed only if the log ends before it.
    FirstReadSeeksAtTheEnd,
    /// A notice whose acknowledgement comes when the log is behind it already is not looked for.
    LateReplyBelieved,
    /// Whoever finds the log reset leaves it to others to expire everything.
    AnsweredUnseen,
    /// A floor above the known one answers a reset, whenever it was said.
    AnsweredByHigherFloor,
    /// A floor answers a reset if the clock that Redis has now says that it is younger than all that may be lost, though
    /// another clock may have said it, or it counts for less than the known one.
    AnsweredByClockAlone,
    /// A floor that counts more expiries of everything answers a reset, though who went on with the old primary was told
    /// of an expiry since.
    AnsweredByGenerationAlone,
    /// Of two floors the higher one counts, whichever expiry was the later one.
    HigherFloorCounts,
}

const ONE_FLIGHT: &str = "C1: a key has at most one joinable flight per instance";
const FLIGHTS_END: &str = "C1: every flight can end";
const ONE_LEASE: &str = "C2: at most one load holds the lease";
const NO_LOAD_WITHOUT_LEASE: &str =
    "C2: while Redis answers, nothing is loaded without a lease but what Redis was not told of";
const READERS: &str = "C3, C4, C7: no reader gets what is older than an expiry its instance knew when it came";
const MEMORY: &str = "C3, C4, C7: memory holds nothing as fresh that is older than an expiry its instance knows";
const REDIS: &str = "C3, C4: Redis holds nothing as fresh that is older than an acknowledged expiry";
const CAUGHT_UP: &str = "C5: who has heard the whole log holds nothing as fresh that is older than any notice";
const FLOORS: &str = "who has heard that everything was expired after a fail-over uses Redis again";
const CONVERGED: &str = "when all is delivered, what is fresh is what the database has";

const TWO: Model = Model {
    instances: 2,
    flights: 2,
    budget: Budget::NONE,
    everything: false,
    same_millisecond: false,
    clock: 1,
    clock_after_failover: None,
    split: false,
    coarse: false,
    swift: false,
    cut_off_replica: false,
    restarted: false,
    bug: None,
};

/// For what does not depend on how a flight goes.
const SWIFT: Model = Model { flights: 1, coarse: true, swift: true, ..TWO };

impl Model {
    /// Whether something happened that C2 makes an exception for.
    fn had_faults(&self, state: &State) -> bool {
        let counted =
            |budget: &Budget| budget.crashes + budget.disconnects + budget.flushes + budget.failovers + budget.timeouts;
        counted(&state.left) < counted(&self.budget)
    }
}

fn one_flight(_: &Model, state: &State) -> bool {
    let joinable = |instance: &Instance| instance.flights.iter().filter(|flight| flight.joinable).count();
    state.instances.iter().all(|instance| joinable(instance) <= 1)
}

fn flights_end(_: &Model, state: &State) -> bool {
    // All else has a next step of its own; a lease that nobody has ends by itself.
    let Some(lease) = state.redis.lease else { return true };
    let holders = || state.flights().filter(|flight| flight.token == Some(lease.token));
    holders().count() == 0 || holders().any(|flight| flight.way != Way::Wait)
}

fn one_lease(_: &Model, state: &State) -> bool {
    let Some(lease) = state.redis.lease else { return true };
    state.flights().filter(|flight| flight.token == Some(lease.token)).count() <= 1
}

fn no_load_without_lease(model: &Model, state: &State) -> bool {
    model.had_faults(state)
        || state.flights().all(|flight| {
            flight.alone || flight.token.is_some() || !matches!(flight.way, Way::Load | Way::Loading { .. })
        })
}

fn readers(_: &Model, state: &State) -> bool {
    state.instances.iter().all(|instance| !instance.wronged)
}

fn memory(_: &Model, state: &State) -> bool {
    state.instances.iter().all(|instance| match instance.memory {
        Entry::Fresh { version, suspect, .. } => version >= instance.known || suspect,
        _ => true,
    })
}

fn redis(model: &Model, state: &State) -> bool {
    let (floor, told) = state.tail().map_or((Floor::default(), false), |tail| (tail.floor, tail.told));
    state
        .fresh_in_redis(model, floor)
        .is_none_or(|(version, suspect)| version >= state.acknowledged || suspect && !told)
}

fn caught_up(model: &Model, state: &State) -> bool {
    state.instances.iter().all(|instance| match instance.memory {
        Entry::Fresh { version, .. } if version < state.appended => {
            !state.caught_up(model, instance) || instance.behind || state.lost && !instance.told
        }
        _ => true,
    })
}

fn floors(model: &Model, state: &State) -> bool {
    !state.tail().is_some_and(|tail| tail.told)
        || state.instances.iter().all(|instance| {
            instance.floor.at <= state.clock
                || instance.behind
                || instance.queue.has_key()
                || !state.caught_up(model, instance)
        })
}

fn converged(model: &Model, state: &State) -> bool {
    let done = |instance: &Instance| {
        instance.flights.is_empty()
            && !instance.queue.has_key()
            && !instance.behind
            && instance.invocation.is_none()
            && state.caught_up(model, instance)
    };
    let quiet = state.acknowledged == state.database && state.instances.iter().all(done);
    let (floor, told) = state.tail().map_or((Floor::default(), false), |tail| (tail.floor, tail.told));
    // What Redis lost nobody can know of once all who knew it are gone.
    if !quiet || state.lost && !told && !state.instances.iter().any(|instance| instance.witness) {
        return true;
    }
    let right = |version| version == state.database;
    state.fresh_in_redis(model, floor).is_none_or(|(version, _)| right(version))
        && state.instances.iter().all(|instance| match instance.memory {
            Entry::Fresh { version, .. } => right(version),
            _ => true,
        })
}

fn hears(state: &State, why: Why) -> bool {
    state.instances.iter().any(|instance| instance.reply.is_some_and(|reply| reply.why == Some(why)))
}

impl stateright::Model for Model {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        if self.coarse { vec![State::warm(self)] } else { vec![State::cold(self), State::warm(self)] }
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        state.actions(self, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        state.step(self, action);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(ONE_FLIGHT, one_flight),
            Property::always(FLIGHTS_END, flights_end),
            Property::always(ONE_LEASE, one_lease),
            Property::always(NO_LOAD_WITHOUT_LEASE, no_load_without_lease),
            Property::always(READERS, readers),
            Property::always(MEMORY, memory),
            Property::always(REDIS, redis),
            Property::always(CAUGHT_UP, caught_up),
            Property::always(FLOORS, floors),
            Property::always(CONVERGED, converged),
        ];
        if self.flights > 0 {
            properties.extend([
                Property::sometimes("an overtaken flight still loads under its lease", |_, state: &State| {
                    state.flights().any(|flight| flight.overtaken && flight.token.is_some())
                }),
                Property::sometimes("stale copies stay for fail-safe", |_, state: &State| {
                    state.redis.entry == Entry::Stale && state.instances.iter().all(|one| one.memory == Entry::Stale)
                }),
                Property::sometimes(
                    "every commit is acknowledged and everybody has it in memory",
                    |model: &Model, state: &State| {
                        let newest = |entry| matches!(entry, Entry::Fresh { version, .. } if version == state.database);
                        state.left.commits == 0
                            && model.budget.commits > 0
                            && state.acknowledged == state.database
                            && state.instances.iter().all(|instance| newest(instance.memory))
                    },
                ),
            ]);
        }
        if !self.swift {
            properties.push(Property::sometimes("a fill is refused", |_, state: &State| {
                state.flights().any(|flight| matches!(flight.way, Way::Filled { refused: true, .. }))
            }));
        }
        if self.flights > 1 {
            properties.push(Property::sometimes("a flight waits for another instance's load", |_, state: &State| {
                state.flights().any(|flight| flight.way == Way::Wait)
            }));
        }
        if self.budget.others + self.budget.crashes > 0 && self.budget.failovers == 0 {
            properties.push(Property::sometimes("notices are missed", |_, state: &State| hears(state, Why::Missed)));
        }
        if self.budget.flushes + self.budget.failovers > 0 {
            properties.push(Property::sometimes("the log was reset", |_, state: &State| hears(state, Why::Reset)));
        }
        if self.budget.failovers > 0 {
            properties.push(Property::sometimes("a fail-over brings an entry back that was expired", |_, state: &State| {
                matches!(state.redis.entry, Entry::Fresh { version, .. } if version < state.acknowledged)
            }));
        }
        properties
    }
}

/// The same state with its instances in one order and its numbers without gaps: which is which makes no difference.
fn representative(state: &State) -> State {
    let mut state = state.clone();
    let mut order: Vec<usize> = (0..state.instances.len()).collect();
    order.sort_by(|a, b| state.instances[*a].cmp(&state.instances[*b]));
    if !order.is_sorted() {
        state.instances.sort_unstable();
        state.notices(|notice| notice.author = notice.author.and_then(|old| order.iter().position(|at| *at == old)));
    }
    let mut tokens = Vec::new();
    state.tokens(|token| {
        let known = tokens.iter().position(|known| known == token);
        let number = known.unwrap_or(tokens.len());
        if known.is_none() {
            tokens.push(*token);
        }
        *token = number as Token;
    });
    let (mut ids, mut times) = (1_u64, 1_u64);
    state.numbers(|id| ids |= 1 << *id, |time| times |= 1 << *time);
    let rank = |set: u64, number: u8| (set & ((1 << number) - 1)).count_ones() as u8;
    state.numbers(|id| *id = rank(ids, *id), |time| *time = rank(times, *time));
    state.last_id = ids.count_ones() as u8 - 1;
    state
}

/// Walks every state; none may break a property, and every interesting one must be reached.
fn holds(model: Model) {
    use stateright::Model as _;
    let started = Instant::now();
    let checker = model.checker().symmetry_fn(representative).spawn_dfs().join();
    println!(
        "{} states, {} distinct, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f32()
    );
    let mut found = checker.discoveries();
    for property in model.properties() {
        match (property.expectation, found.remove(property.name)) {
            (Expectation::Sometimes, None) => panic!("never reached: {}", property.name),
            (Expectation::Sometimes, _) | (_, None) => {}
            (_, Some(path)) => panic!("broken: {}, by {:#?}", property.name, path.into_actions()),
        }
    }
}

/// Finds the shortest way to break this property.
fn breaks(model: Model, property: &'static str) {
    use stateright::Model as _;
    let started = Instant::now();
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let mut found = checker.discoveries();
    let Some(path) = found.remove(property) else { panic!("{:?} breaks {:?}", model.bug, found.keys()) };
    let (states, seconds) = (checker.unique_state_count(), started.elapsed().as_secs_f32());
    println!("{:?}: {states} distinct, {seconds:.1} s: {:?}", model.bug, path.into_actions());
}

#[test]
fn every_order_of_loads_and_expiries_of_one_commit_is_right() {
    let budget = Budget { commits: 1, ..Budget::NONE };
    holds(Model { flights: 4, everything: true, same_millisecond: true, budget, ..TWO });
}

#[test]
fn every_order_of_loads_and_expiries_of_two_commits_is_right() {
    holds(Model { budget: Budget { commits: 2, ..Budget::NONE }, ..TWO });
}

#[test]
fn three_instances_are_as_right_as_two() {
    holds(Model { instances: 3, budget: Budget { commits: 1, ..Budget::NONE }, ..TWO });
}

#[test]
fn loads_that_fail_come_late_or_come_early_are_right() {
    let budget = Budget { commits: 1, failed_loads: 1, refreshes: 1, durations: 1, ..Budget::NONE };
    holds(Model { budget, ..TWO });
    holds(Model { budget: Budget { commits: 1, timeouts: 1, durations: 1, ..Budget::NONE }, coarse: true, ..TWO });
}

#[test]
fn an_instance_that_dies_or_is_cut_off_from_redis_harms_nobody() {
    holds(Model { budget: Budget { commits: 1, crashes: 1, ..Budget::NONE }, ..TWO });
    holds(Model { budget: Budget { commits: 1, disconnects: 1, ..Budget::NONE }, ..TWO });
}

#[test]
fn a_trimmed_log_is_noticed() {
    holds(Model { budget: Budget { commits: 1, others: 1, trims: 1, ..Budget::NONE }, ..TWO });
}

#[test]
fn a_flushed_redis_is_noticed() {
    let budget = Budget { commits: 1, flushes: 1, durations: 1, ..Budget::NONE };
    holds(Model { budget, flights: 1, coarse: true, ..TWO });
    // By an instance that knows of fewer expiries of everything, too.
    let budget = Budget { commits: 1, flushes: 1, ..Budget::NONE };
    let model = Model { budget, flights: 1, everything: true, restarted: true, ..SWIFT };
    holds(model);
    breaks(Model { bug: Some(Bug::AnsweredByClockAlone), ..model }, CAUGHT_UP);
}

#[test]
fn a_redis_that_goes_back_is_noticed_while_anybody_lives_who_knows() {
    let budget = Budget { commits: 1, failovers: 1, durations: 1, ..Budget::NONE };
    holds(Model { budget, flights: 1, coarse: true, ..TWO });
}

/// An instance that has not read the log yet, too; then and otherwise, others may have appended something since.
#[test]
fn an_own_notice_that_is_lost_is_looked_for_wherever_the_log_goes_on() {
    let budget = Budget { commits: 1, failovers: 1, others: 1, ..Budget::NONE };
    let model = Model { budget, cut_off_replica: true, ..SWIFT };
    let restarted = Model { restarted: true, flights: 0, ..model };
    holds(model);
    holds(restarted);
    breaks(Model { bug: Some(Bug::LateReplyBelieved), ..model }, CONVERGED);
    breaks(Model { bug: Some(Bug::FirstReadSeeksAtTheEnd), ..restarted }, CONVERGED);
}

/// What it tells the old one comes after what the new one is told, whatever their clocks say.
#[test]
fn an_instance_that_goes_on_with_the_old_primary_is_heard_in_the_end() {
    let budget = Budget { commits: 1, everythings: 1, failovers: 1, ..Budget::NONE };
    let model = Model { budget, split: true, clock_after_failover: Some(20), cut_off_replica: true, ..SWIFT };
    holds(model);
    for bug in [Bug::AnsweredByHigherFloor, Bug::AnsweredByGenerationAlone] {
        breaks(Model { bug: Some(bug), ..model }, CONVERGED);
    }
}

#[test]
fn each_rule_of_the_protocol_is_needed() {
    let commit = Budget { commits: 1, ..Budget::NONE };
    let model = Model { budget: commit, ..TWO };
    let failover = Model { budget: Budget { failovers: 1, ..commit }, ..TWO };
    let others = Model { budget: Budget { failovers: 1, others: 1, ..commit }, flights: 1, ..TWO };
    let trim = Model { budget: Budget { others: 1, trims: 1, ..commit }, ..TWO };
    let flush = Model { budget: Budget { flushes: 1, ..commit }, flights: 1, ..TWO };
    let everything = Model { everything: true, same_millisecond: true, ..model };
    let swift = Model { budget: others.budget, ..SWIFT };
    for (bug, model, property) in [
        (Bug::FillsWithoutLease, model, REDIS),
        (Bug::AbsentIgnoresNotices, model, MEMORY),
        (Bug::MemoryFillsUnguarded, model, MEMORY),
        (Bug::ResumesFromNow, model, CAUGHT_UP),
        (Bug::ExpiryKeepsLease, model, REDIS),
        (Bug::AppendsBeforeExpiring, model, MEMORY),
        (Bug::TrimUnnoticed, trim, CAUGHT_UP),
        (Bug::ResetUnnoticed, flush, CAUGHT_UP),
        (Bug::QueueIgnored, model, READERS),
        (Bug::LateJoinerAccepts, model, READERS),
        (Bug::OwnFloorLearntLater, everything, READERS),
        (Bug::EverythingSwallowsKeys, swift, REDIS),
        (Bug::OwnNoticeLostUnnoticed, failover, CONVERGED),
        (Bug::OwnNoticeSoughtAtTheEnd, others, CONVERGED),
        (Bug::FloorIncludesItsMillisecond, everything, REDIS),
        (Bug::AnsweredUnseen, failover, CONVERGED),
    ] {
        breaks(Model { bug: Some(bug), ..model }, property);
    }
}

/// Redis goes back, to a clock that is behind by more than the age of an entry that this revives, or by less.
#[test]
fn a_redis_that_goes_back_to_an_earlier_time_is_noticed_too() {
    let budget = Budget { commits: 1, failovers: 1, ..Budget::NONE };
    let model = Model { budget, clock: 20, clock_after_failover: Some(10), ..SWIFT };
    holds(model);
    breaks(Model { bug: Some(Bug::GenerationIgnored), ..model }, REDIS);
    breaks(Model { bug: Some(Bug::HigherFloorCounts), ..model }, FLOORS);
    let model = Model { budget: Budget { ticks: 2, ..budget }, clock: 7, clock_after_failover: Some(5), ..model };
    let model = Model { cut_off_replica: true, flights: 0, ..model };
    holds(model);
    breaks(Model { bug: Some(Bug::AnsweredByClockAlone), ..model }, CONVERGED);
}

/// Two things at once that are not guarded against; whoever closes it turns this into `holds`.
#[test]
fn known_limits() {
    // Redis goes back, and the log is trimmed past the place before anybody who knew has read it.
    let budget = Budget { commits: 1, others: 2, trims: 1, failovers: 1, ..Budget::NONE };
    breaks(Model { budget, cut_off_replica: true, ..SWIFT }, CONVERGED);
}
