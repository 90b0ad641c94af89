//! The way of a flight: Redis, else the lease, else another instance's load, else the database; then the fill.
//!
//! All of it runs apart from the readers, so that a client that goes away ends no load, but on the thread of the one that
//! began it (should that thread end, readers on others lead anew). Takes one key or a batch alike: one round trip to Redis
//! and one query for all of them. Invariants: C2 and the Redis half of C3; S1, whatever Redis does costs time but never the
//! answer.

use std::{collections::HashMap, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{
    FutureExt,
    stream::{FuturesUnordered, StreamExt},
};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Entry, Failure, How, InRedis, Inner, Key, Level, Load,
    gate::Outcome,
    l2::{CachedCopy, Fill, Filled, L2, Read, StaleCopies, Token},
    memory::{Flight, Guard, Moment, Purpose, Stored, Times, duration, span},
};
use crate::redis;

/// Least pause between two looks at another instance's load; each costs Redis one command. Timers round up: two, really.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Pauses grow with the wait, so that what was delivered after a long one is seen at most this part of it later.
const PART_OF_WAIT: u32 = 16;

/// First pause between two attempts to give back what Redis did not say that it gave; each further one is twice as long.
const AFTER_STALL: Duration = Duration::from_millis(100);

/// A flight on its way.
struct Pending {
    guard: Guard,
    /// The right to fill Redis; without it only memory is filled.
    token: Option<Token>,
    /// A lease that Redis was asked for and did not tell about: it may have been given.
    asked_for: Option<Token>,
    stale: Option<Stored>,
    /// What Redis said about it.
    redis: InRedis,
    /// Redis was asked already and did not answer.
    past_redis: bool,
}

impl From<Guard> for Pending {
    fn from(guard: Guard) -> Self {
        Self { guard, token: None, asked_for: None, stale: None, redis: InRedis::Unknown, past_redis: false }
    }
}

/// Ends every one of these flights.
pub(super) async fn run(cache: Arc<Inner>, guards: Vec<Guard>, load: Load) {
    let others = land_fresh(&cache, guards).await;
    if !others.is_empty() {
        Box::pin(lease_and_load(cache, others, load)).await; // most flights end before, and need not carry it
    }
}

/// Ends those of these flights whose entry is fresh in Redis; returns the others.
async fn land_fresh(cache: &Inner, guards: Vec<Guard>) -> Vec<Pending> {
    let mut flights: Vec<_> = guards.into_iter().map(Pending::from).collect();
    let Some(remote) = &cache.remote else { return flights };
    cache.first_hearing().await;
    // What was expired here was expired there, too, and what is to be refreshed has to be leased.
    let unknown = |guard: &Guard| cache.trusts_redis_with(&guard.key) && !cache.memory.holds(&guard.key);
    let mut others: Vec<_> = flights.extract_if(.., |pending| !unknown(&pending.guard)).collect();
    match read_fresh(cache, &remote.l2, flights).await {
        Ok(free) => others.extend(free),
        Err(unseen) => others.extend(unseen.into_iter().map(|pending| Pending { past_redis: true, ..pending })),
    }
    others
}

/// Looks at these keys in Redis, once: ends what is fresh there and returns the others. `Err`: Redis does not answer; the
/// keeper says what is wrong with the connection.
async fn read_fresh(cache: &Inner, l2: &L2, flights: Vec<Pending>) -> Result<Vec<Pending>, Vec<Pending>> {
    let sent = cache.memory.now();
    let (Some(first), Some(now_ms)) = (flights.first(), cache.clock.redis_ms(sent)) else {
        return Ok(flights); // the script asks for the time itself
    };
    let max_age = first.guard.flight.max_age;
    let keys: Vec<_> = flights.iter().map(|pending| pending.guard.key).collect();
    let Ok(copies) = l2.read(&keys, max_age, cache.floor(), now_ms).await else { return Err(flights) };
    let mut others = Vec::new();
    for (pending, copy) in flights.into_iter().zip(copies) {
        match copy {
            Some(copy) => land_copy(cache, pending.guard, copy, sent),
            None => others.push(pending),
        }
    }
    Ok(others)
}

/// Which of these keys somebody is loading, and the others. `Err`: Redis does not answer.
async fn leased(cache: &Inner, l2: &L2, flights: Vec<Pending>) -> Result<(Vec<Pending>, Vec<Pending>), Vec<Pending>> {
    let Some(now_ms) = cache.clock.redis_ms(cache.memory.now()) else { return Ok((Vec::new(), flights)) };
    let keys: Vec<_> = flights.iter().map(|pending| pending.guard.key).collect();
    let Ok(leased) = l2.leased(&keys, now_ms).await else { return Err(flights) };
    let (leased, free): (Vec<_>, Vec<_>) = flights.into_iter().zip(leased).partition(|(_, leased)| *leased);
    let pending = |(pending, _)| pending;
    Ok((leased.into_iter().map(pending).collect(), free.into_iter().map(pending).collect()))
}

/// Ends a flight with what Redis holds, as of `sent`.
fn land_copy(cache: &Inner, guard: Guard, copy: CachedCopy, sent: Moment) {
    let stored = fresh_copy(cache, &guard.flight, &copy, sent);
    guard.land(stored, How { redis: InRedis::Fresh { ttl_s: copy.left.as_secs() }, ..How::hit(Level::Redis) });
}

/// What Redis holds as fresh, as of `sent`.
fn fresh_copy(cache: &Inner, flight: &Flight, copy: &CachedCopy, sent: Moment) -> Stored {
    // Redis counts whole milliseconds, so its entry is up to one older than it says.
    let born = sent - span(copy.age + Duration::from_millis(1));
    let fresh = copy.left.min(duration_of(&copy.entry, cache.config.l1_duration, cache));
    let times = Times { born, known: cache.memory.known(born, sent), fresh_until: sent.saturating_add(span(fresh)) };
    flight.brings(&copy.entry, times, copy.took)
}

async fn lease_and_load(cache: Arc<Inner>, flights: Vec<Pending>, load: Load) {
    let asks_redis = |pending: &Pending| cache.trusts_redis_with(&pending.guard.key) && !pending.past_redis;
    let (shared, local): (Vec<_>, Vec<_>) = flights.into_iter().partition(asks_redis);
    match &cache.remote {
        Some(remote) if !shared.is_empty() => {
            let (ours, theirs) = read_or_lease(&cache, &remote.l2, shared, StaleCopies::Wanted).await;
            let load_theirs = load_late(&cache, &remote.l2, theirs, &load);
            tokio::join!(load_all(&cache, ours, &load), load_theirs, load_all(&cache, local, &load));
        }
        _ => load_all(&cache, shared.into_iter().chain(local).collect(), &load).await,
    }
}

/// Asks Redis once: ends what is fresh there; returns what is to be loaded, and what others are loading.
async fn read_or_lease(
    cache: &Arc<Inner>,
    l2: &L2,
    mut flights: Vec<Pending>,
    stale_copies: StaleCopies,
) -> (Vec<Pending>, Vec<Pending>) {
    let tokens: Vec<_> = flights.iter().map(|_| Token::draw()).collect();
    let keys: Vec<_> = flights.iter().map(|pending| pending.guard.key).collect();
    let max_age = flights.first().and_then(|pending| pending.guard.flight.max_age);
    let sent = cache.memory.now();
    let reads = match l2.read_or_lease(&keys, &tokens, max_age, cache.floor(), stale_copies).await {
        Ok(reads) => reads,
        // The keeper says what is wrong with the connection.
        Err(redis::Error::Disconnected) => return (flights, Vec::new()),
        Err(redis::Error::Failed(_)) => {
            flights.iter_mut().zip(tokens).for_each(|(pending, token)| pending.asked_for = Some(token));
            return (flights, Vec::new());
        }
    };
    // Who asks without copies is told less than before.
    let note = |pending: &mut Pending, held| {
        if stale_copies == StaleCopies::Wanted {
            pending.redis = held;
        }
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for ((mut pending, token), read) in flights.into_iter().zip(tokens).zip(reads) {
        let keep = |pending: &mut Pending, copy: Option<CachedCopy>| {
            let Some(copy) = copy else { return };
            let flight = &pending.guard.flight;
            let stored = match copy.left.is_zero() {
                true => cache.memory.stale_copy(&copy.entry, copy.age, copy.expired, flight),
                false => fresh_copy(cache, flight, &copy, sent), // and too old for whoever leads the flight alone
            };
            if !copy.expired {
                flight.offer(stored.clone());
            }
            pending.stale = Some(stored);
        };
        match read {
            Read::Fresh(copy) => land_copy(cache, pending.guard, copy, sent),
            Read::Yours(stale, held) => {
                note(&mut pending, held);
                pending.token = Some(token);
                keep(&mut pending, stale);
                ours.push(pending);
            }
            Read::Unusable => {
                pending.redis = InRedis::Absent;
                ours.push(pending);
            }
            Read::Leased(stale, held) => {
                note(&mut pending, held);
                keep(&mut pending, stale);
                theirs.push(pending);
            }
        }
    }
    (ours, theirs)
}

/// Loads what other instances do not deliver, each key as soon as it is ours to load, whatever the others wait for.
async fn load_late(cache: &Arc<Inner>, l2: &L2, mut theirs: Vec<Pending>, load: &Load) {
    let began = Instant::now();
    let mut loads = FuturesUnordered::new();
    loop {
        let mut next = pin!(wait(cache, l2, began, theirs));
        let next = loop {
            tokio::select! {
                next = &mut next => break next,
                Some(()) = loads.next() => {}
            }
        };
        let Some((late, still)) = next else { break };
        loads.push(load_all(cache, late, load));
        theirs = still;
    }
    while loads.next().await.is_some() {}
}

/// Waits for other instances' loads, since they `began` to be waited for; returns what is to be loaded after all, because
/// its lease came free or nobody delivered, and what is still to be waited for; `None` when that was all.
async fn wait(
    cache: &Arc<Inner>,
    l2: &L2,
    began: Instant,
    mut theirs: Vec<Pending>,
) -> Option<(Vec<Pending>, Vec<Pending>)> {
    while !theirs.is_empty() && began.elapsed() < cache.config.lease_wait {
        sleep((began.elapsed() / PART_OF_WAIT).max(LOOK_AGAIN)).await;
        let delivered;
        (theirs, delivered) = match leased(cache, l2, theirs).await {
            Ok(seen) => seen,
            Err(unseen) => return Some((unseen, Vec::new())),
        };
        let free = match read_fresh(cache, l2, delivered).await {
            Ok(free) => free,
            Err(unseen) => return Some((unseen, theirs)),
        };
        if !free.is_empty() {
            let (ours, leased) = read_or_lease(cache, l2, free, StaleCopies::Unwanted).await;
            theirs.extend(leased);
            if !ours.is_empty() {
                return Some((ours, theirs));
            }
        }
    }
    // A refresh that another instance did not deliver is dropped: what is in memory is still fresh.
    theirs.retain(|pending| pending.guard.flight.purpose == Purpose::Miss);
    (!theirs.is_empty()).then(|| (theirs, Vec::new()))
}

/// Loads all of these in one query and ends their flights.
async fn load_all(cache: &Arc<Inner>, flights: Vec<Pending>, load: &Load) {
    if flights.is_empty() {
        return;
    }
    let born = cache.memory.now();
    let keys: Vec<_> = flights.iter().map(|pending| pending.guard.key).collect();
    let attempt = async {
        let permit = cache.gate.enter().await?;
        let attempt = AssertUnwindSafe(async { load(keys).await }).catch_unwind();
        let result = attempt.await.unwrap_or_else(|_| Err(Failure::Broken("the load panicked".to_owned())));
        let failed = matches!(result, Err(Failure::Unavailable(_)));
        permit.end(if failed { Outcome::Failed } else { Outcome::Answered });
        result
    };
    let late = || format!("the load took longer than {} ms", cache.config.hard_timeout.as_millis());
    let result =
        timeout(cache.config.hard_timeout, attempt).await.unwrap_or_else(|_| Err(Failure::Unavailable(late())));
    let entries = match result {
        Ok(entries) => entries,
        Err(failure) => {
            let failed = flights.into_iter().map(|pending| (pending, failure.clone())).collect();
            return fail_all(cache, failed).await;
        }
    };
    let found: HashMap<Key, Result<Entry, Failure>> = entries.into_iter().collect();
    let (mut loaded, mut failed) = (Vec::with_capacity(flights.len()), Vec::new());
    for pending in flights {
        // Not taken out: of a key that a batch names twice there are two flights, if it expired between their beginnings.
        match found.get(&pending.guard.key).cloned().unwrap_or(Ok(Entry::Absent)) {
            Ok(entry) => loaded.push((pending, entry)),
            Err(failure) => failed.push((pending, failure)),
        }
    }
    drop(found); // so that each body is let go of as soon as it is stored
    tokio::join!(fill_all(cache, loaded, born), fail_all(cache, failed));
}

/// Offers the loaded entries to Redis, then to memory, and answers the readers.
async fn fill_all(cache: &Arc<Inner>, loaded: Vec<(Pending, Entry)>, born: i64) {
    let sent = cache.memory.now();
    let took = duration(sent - born);
    let mut filled = vec![Filled::Unknown; loaded.len()];
    let (mut places, mut fills, mut refused, mut asked_for) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (place, (pending, entry)) in loaded.iter().enumerate() {
        let key = pending.guard.key;
        asked_for.extend(pending.asked_for.clone().map(|token| (key, token)));
        let Some(token) = &pending.token else { continue };
        if !cache.memory.accepts(entry.packed()) || cache.queue.has(&key) {
            refused.push((key, token.clone()));
            continue;
        }
        let fresh = duration_of(entry, cache.config.l2_duration, cache);
        let keep = match entry {
            Entry::Found(_) => fresh + cache.config.fail_safe_max,
            Entry::Absent => fresh,
        };
        places.push(place);
        fills.push(Fill { key, token, entry, fresh, keep });
    }
    if let Some(remote) = &cache.remote
        && !fills.is_empty()
    {
        for ((place, fill), outcome) in places.into_iter().zip(&fills).zip(remote.l2.fill(&fills).await) {
            filled[place] = outcome;
            if outcome == Filled::Unknown {
                asked_for.push((fill.key, fill.token.clone())); // a fill that comes to pass has ended it
            }
        }
    }
    for ((pending, entry), filled) in loaded.into_iter().zip(filled) {
        let fresh = duration_of(&entry, cache.config.l1_duration, cache);
        let known = if filled == Filled::Stored { cache.memory.known(born, sent) } else { born };
        let times = Times { born, known, fresh_until: cache.memory.now().saturating_add(span(fresh)) };
        let stored = pending.guard.flight.brings(&entry, times, took);
        let how = How { redis: pending.redis, ..How::hit(Level::Database) };
        match filled {
            Filled::Revoked => pending.guard.land_overtaken(stored, how),
            Filled::Stored | Filled::Unknown => pending.guard.land(stored, how),
        }
    }
    give_back(cache, refused, asked_for).await;
}

/// Ends these flights with what is left: a stale copy each, or the failure.
async fn fail_all(cache: &Arc<Inner>, flights: Vec<(Pending, Failure)>) {
    if let Some((_, failure)) = flights.first()
        && let Some(unsaid) = cache.failures.next()
    {
        tracing::error!(keys = flights.len(), %failure, unsaid, "cannot load");
    }
    let (mut leases, mut asked_for) = (Vec::new(), Vec::new());
    for (pending, failure) in flights {
        leases.extend(pending.token.map(|token| (pending.guard.key, token)));
        asked_for.extend(pending.asked_for.map(|token| (pending.guard.key, token)));
        pending.guard.fail(failure, pending.stale);
    }
    give_back(cache, leases, asked_for).await;
}

/// Gives leases back of which no fill will come, once their readers have their answers. If Redis does not take them, and if
/// they were only `asked_for`: as soon as it answers again, as it may give them even then.
async fn give_back(cache: &Inner, leases: Vec<(Key, Token)>, mut asked_for: Vec<(Key, Token)>) {
    let Some(remote) = &cache.remote else { return };
    if remote.l2.release(&leases).await.is_err() {
        asked_for.extend(leases);
    }
    let when_it_answers = async {
        let mut pause = AFTER_STALL;
        while remote.l2.release(&asked_for).await.is_err() {
            sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause *= 2;
            remote.redis.connected().await;
        }
    };
    let _ = timeout(cache.config.lease, when_it_answers).await; // then they have run out
}

/// How long an entry is fresh: `found` for one that exists, shortened by a random share.
fn duration_of(entry: &Entry, found: Duration, cache: &Inner) -> Duration {
    let full = match entry {
        Entry::Found(_) => found,
        Entry::Absent => cache.config.absent_duration.min(found),
    };
    full.mul_f64(1.0 - rand::random_range(0.0..=cache.config.jitter))
}
