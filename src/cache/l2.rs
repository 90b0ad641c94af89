//! L2: entries and leases in Redis, one hash per key, changed only by single-key commands and single-key scripts.
//!
//! Hash fields: `b` when its load began (14 digits), the generation its loader knew (10; see [`Floor`]), how long it took
//! (10) and the envelope, `f` fresh until, `t` lease token, `u` lease until, `a` the first two of a leased load; all
//! times are Redis' own milliseconds, so instances' clocks never meet. Invariant (C3): `b` is written only by the holder
//! of the current lease, and expiring takes `f` and the lease away in one step.

use std::{ops::Range, time::Duration};

use bytes::Bytes;

use redis::{Cmd, RedisResult, Value};

use super::{InRedis, Key, entry, log::Floor};
use crate::{
    config,
    redis::{Error, Redis, Script},
    telemetry::LogLimiter,
};

/// Fresh → the envelope. Leased by somebody → wait. Else the lease is the caller's. One round trip, atomic.
const READ_OR_LEASE: &str = r"
local token, lease, max_age = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local floor, known, want_stale = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local v = redis.call('HMGET', KEYS[1], 'b', 'f', 't', 'u', 'a')
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local b, fresh_until = v[1] or '', tonumber(v[2])
local function digits(from, to) return tonumber(string.sub(b, from, to)) end
local loaded, generation, took = digits(1, 14), digits(15, 24), digits(25, 34)
if not loaded or not generation or not took then b, loaded, generation, took = '', now, known, 0 end
-- Redis' clock may be set back, or be another one's after a failover.
local age = math.max(0, now - loaded)
local above = now - age > floor and generation >= known
if b ~= '' and fresh_until and now < fresh_until and above and (max_age < 0 or age < max_age) then
  return {'fresh', age, fresh_until - now, took, b}
end
local stale = want_stale == '1' and b or ''
-- 0: expired, or none; 1: merely old; above: fresh for so long but 1 ms, and too old for the reader.
local state = fresh_until and above and math.max(1, fresh_until - now + 1) or 0
-- A lease taken more than a second in the future: the clock was set back since, and it would outlast its term.
local given = tonumber(string.sub(v[5] or '', 1, 14)) or now
if v[3] and now < tonumber(v[4]) and given <= now + 1000 then return {'leased', age, state, took, stale} end
redis.call('HSET', KEYS[1], 't', token, 'u', now + lease, 'a', string.format('%014d%010d', now, known))
if redis.call('PTTL', KEYS[1]) < lease then redis.call('PEXPIRE', KEYS[1], lease) end
return {'yours', age, state, took, stale}
";

/// Stores an envelope if the caller's lease is still the current one.
const FILL: &str = r"
local v = redis.call('HMGET', KEYS[1], 't', 'a')
if v[1] ~= ARGV[1] then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HDEL', KEYS[1], 't', 'u', 'a')
local took = math.min(math.max(0, now - tonumber(string.sub(v[2], 1, 14))), 9999999999)
redis.call('HSET', KEYS[1], 'b', v[2] .. string.format('%010d', took) .. ARGV[2], 'f', now + tonumber(ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
";

/// Gives a lease back without storing anything.
const RELEASE: &str = r"
if redis.call('HGET', KEYS[1], 't') ~= ARGV[1] then return 0 end
return redis.call('HDEL', KEYS[1], 't', 'u', 'a')
";

/// The digits in front of an envelope: when its load began, the generation, how long it took.
const LOADED: Range<usize> = 0..14;
const GENERATION: Range<usize> = 14..24;
const TOOK: Range<usize> = 24..34;

/// The right to load a key for the whole cluster: proves to Redis that no expiry came since it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token(String);

impl Token {
    /// 128 random bits: two instances never draw the same.
    pub(super) fn draw() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()))
    }
}

/// An entry as Redis has it.
pub(super) struct CachedCopy {
    pub(super) entry: entry::Entry,
    /// Since its load began.
    pub(super) age: Duration,
    /// How long it is still fresh, though maybe too old for the reader; zero for a stale one.
    pub(super) left: Duration,
    /// How long its load took.
    pub(super) took: Duration,
    /// It was expired, and did not merely grow old.
    pub(super) expired: bool,
}

/// What Redis says about a key.
pub(super) enum Read {
    /// Usable.
    Fresh(CachedCopy),
    /// Another instance is loading it.
    Leased(Option<CachedCopy>, InRedis),
    /// The caller is to load it.
    Yours(Option<CachedCopy>, InRedis),
    /// What is under this name is none of ours: the caller is to load it, and cannot store it.
    Unusable,
}

/// Whether stale copies, for fail-safe, come along with a lease.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum StaleCopies {
    Unwanted,
    Wanted,
}

/// What became of a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// It is in Redis.
    Stored,
    /// The lease was revoked or ran out: the value may be older than an expiry.
    Revoked,
    /// Redis did not say.
    Unknown,
}

/// Something to store under a lease.
pub(super) struct Fill<'a> {
    pub(super) key: Key,
    pub(super) token: &'a Token,
    pub(super) entry: &'a entry::Entry,
    pub(super) fresh: Duration,
    /// How long the copy stays for fail-safe, counted from now.
    pub(super) keep: Duration,
}

pub(super) struct L2 {
    redis: Redis,
    config: config::Redis,
    lease: Duration,
    read_or_lease: Script,
    fill: Script,
    release: Script,
    refusals: LogLimiter,
}

impl L2 {
    pub(super) fn new(redis: Redis, config: &config::Redis, lease: Duration) -> Self {
        Self {
            redis,
            config: config.clone(),
            lease,
            read_or_lease: Script::new(READ_OR_LEASE),
            fill: Script::new(FILL),
            release: Script::new(RELEASE),
            refusals: LogLimiter::default(),
        }
    }

    /// The usable ones of all keys in one round trip, by the same rules as [`READ_OR_LEASE`]; takes no lease. `now_ms`:
    /// see [`Clock`](super::clock::Clock).
    pub(super) async fn read(
        &self,
        keys: &[Key],
        max_age: Option<Duration>,
        floor: Floor,
        now_ms: u64,
    ) -> Result<Vec<Option<CachedCopy>>, Error> {
        let replies = self.fields(keys, &["b", "f"]).await?;
        let wants = |loaded_ms: u64, generation: u64| {
            // Redis' clock may be set back, or be another one's after a failover.
            let age_ms = now_ms.saturating_sub(loaded_ms);
            let young = max_age.is_none_or(|max_age| u128::from(age_ms) < max_age.as_millis());
            young && now_ms - age_ms > floor.ms && generation >= floor.generation
        };
        Ok(keys.iter().zip(replies).map(|(key, reply)| fresh(key, self.told(reply)?, now_ms, &wants)).collect())
    }

    /// Which of these keys somebody is loading: a fill ends that. No body is sent, however often this is asked.
    pub(super) async fn leased(&self, keys: &[Key], now_ms: u64) -> Result<Vec<bool>, Error> {
        let replies = self.fields(keys, &["u"]).await?;
        let until =
            |reply: RedisResult<Value>| number(&redis::from_redis_value::<(Vec<u8>,)>(self.told(reply)?).ok()?.0);
        Ok(replies.into_iter().map(|reply| until(reply).is_some_and(|until_ms| now_ms < until_ms)).collect())
    }

    async fn fields(&self, keys: &[Key], fields: &[&str]) -> Result<Vec<RedisResult<Value>>, Error> {
        let commands = keys.iter().map(|key| {
            let mut command = redis::cmd("HMGET");
            command.arg(self.name(key)).arg(fields);
            command
        });
        self.redis.send(commands.collect()).await
    }

    /// Reads or leases all keys in one round trip, each by its token. `max_age` accepts only younger entries. `Err`: some
    /// may be leased all the same.
    pub(super) async fn read_or_lease(
        &self,
        keys: &[Key],
        tokens: &[Token],
        max_age: Option<Duration>,
        floor: Floor,
        stale_copies: StaleCopies,
    ) -> Result<Vec<Read>, Error> {
        let mut reads = self.try_read_or_lease(keys, tokens, max_age, floor, stale_copies).await?;
        let damaged: Vec<_> = (0..keys.len()).filter(|index| reads[*index].is_none()).collect();
        if !damaged.is_empty() {
            // Once more for those, expired so that they can be leased.
            let keys: Vec<_> = damaged.iter().map(|index| keys[*index]).collect();
            let tokens: Vec<_> = damaged.iter().map(|index| tokens[*index].clone()).collect();
            let repair = async {
                self.redis.send(keys.iter().map(|key| self.expire(key)).collect()).await?;
                self.try_read_or_lease(&keys, &tokens, max_age, floor, stale_copies).await
            };
            // The others' leases are theirs whatever becomes of that.
            let again = repair.await.unwrap_or_else(|_| keys.iter().map(|_| Some(Read::Unusable)).collect());
            damaged.into_iter().zip(again).for_each(|(index, read)| reads[index] = read);
        }
        Ok(reads.into_iter().map(|read| read.unwrap_or(Read::Leased(None, InRedis::Unknown))).collect())
    }

    /// `None` for a key whose fresh envelope is damaged or of another version.
    async fn try_read_or_lease(
        &self,
        keys: &[Key],
        tokens: &[Token],
        max_age: Option<Duration>,
        floor: Floor,
        stale_copies: StaleCopies,
    ) -> Result<Vec<Option<Read>>, Error> {
        let max_age_ms = max_age.map_or(-1, |age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let calls = keys.iter().zip(tokens).map(|(key, token)| {
            let mut call = self.read_or_lease.call(&self.name(key));
            call.arg(&token.0).arg(self.lease.as_millis() as u64).arg(max_age_ms);
            call.arg(floor.ms).arg(floor.generation).arg(u8::from(stale_copies == StaleCopies::Wanted));
            call
        });
        let replies = self.redis.send_script(&self.read_or_lease, calls.collect()).await?;
        let replies = keys.iter().zip(replies);
        Ok(replies.map(|(key, reply)| self.told(reply).map_or(Some(Read::Unusable), |told| read(key, told))).collect())
    }

    /// Stores loaded entries in one round trip.
    pub(super) async fn fill(&self, fills: &[Fill<'_>]) -> Vec<Filled> {
        let calls = fills.iter().map(|fill| {
            let mut call = self.fill.call(&self.name(&fill.key));
            call.arg(&fill.token.0).arg(&entry::encode(&fill.key, fill.entry)[..]);
            call.arg(fill.fresh.as_millis() as u64).arg(fill.keep.as_millis() as u64);
            call
        });
        match self.redis.send_script(&self.fill, calls.collect()).await {
            Err(_) => vec![Filled::Unknown; fills.len()],
            Ok(replies) => replies
                .into_iter()
                .map(|reply| match self.told(reply) {
                    Some(Value::Int(1)) => Filled::Stored,
                    Some(_) => Filled::Revoked,
                    None => Filled::Unknown,
                })
                .collect(),
        }
    }

    /// Gives leases back, so that others need not wait for them to run out.
    pub(super) async fn release(&self, leases: &[(Key, Token)]) -> Result<(), Error> {
        let release = |(key, token): &(Key, Token)| {
            let mut call = self.release.call(&self.name(key));
            call.arg(&token.0);
            call
        };
        let calls: Vec<_> = leases.iter().map(release).collect();
        if !calls.is_empty() {
            self.redis.send_script(&self.release, calls).await?;
        }
        Ok(())
    }

    /// The command that expires a key: what is fresh becomes stale and a lease is revoked, in one step; the old copy
    /// stays for fail-safe.
    pub(super) fn expire(&self, key: &Key) -> Cmd {
        let mut command = redis::cmd("HDEL");
        command.arg(self.name(key)).arg(&["f", "t", "u", "a"]);
        command
    }

    /// Removes those of these keys that hold something else than a hash, which no expiry could reach. Best effort: an
    /// expiry that still fails is tried again.
    pub(super) async fn remove_unusable(&self, keys: &[Key]) {
        self.redis.remove_unless("hash", keys.iter().map(|key| self.name(key)).collect()).await;
    }

    /// A position kept under a name that is no entry's.
    pub(super) async fn checkpoint(&self, name: &str) -> Result<Option<String>, Error> {
        let mut command = redis::cmd("GET");
        command.arg(self.config.key(name));
        let reply = self.redis.send(vec![command]).await?.into_iter().next();
        // Somebody else's value is as good as none.
        Ok(reply.and_then(Result::ok).and_then(|reply| redis::from_redis_value(reply).ok()).flatten())
    }

    /// Keeps it; `false` if Redis cannot be reached.
    pub(super) async fn keep_checkpoint(&self, name: &str, position: &str) -> bool {
        let mut command = redis::cmd("SET");
        command.arg(self.config.key(name)).arg(position);
        self.redis.send(vec![command]).await.is_ok_and(|replies| replies.iter().all(Result::is_ok))
    }

    fn name(&self, key: &Key) -> String {
        self.config.key(key)
    }

    /// What Redis says. Reads go on without it, so that nobody else would tell of an error.
    fn told(&self, reply: RedisResult<Value>) -> Option<Value> {
        let error = match reply {
            Ok(reply) => return Some(reply),
            Err(error) => Error::from(error),
        };
        if !error.is_wrong_server()
            && let Some(unsaid) = self.refusals.next()
        {
            tracing::warn!(%error, unsaid, "redis: refuses to read or store entries");
        }
        None
    }
}

/// What a key's fields `b` and `f` hold, if it is fresh at this time and wanted.
fn fresh(key: &Key, reply: Value, now_ms: u64, wants: &impl Fn(u64, u64) -> bool) -> Option<CachedCopy> {
    let Value::Array(fields) = reply else { return None };
    let mut fields = fields.into_iter();
    let mut field = || match fields.next()? {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    };
    let (stored, fresh_until) = (Bytes::from(field()?), field()?);
    let left_ms = number(&fresh_until)?.checked_sub(now_ms).filter(|left_ms| *left_ms > 0)?;
    let digits = |range: Range<usize>| number(stored.get(range)?);
    let (loaded_ms, generation, took_ms) = (digits(LOADED)?, digits(GENERATION)?, digits(TOOK)?);
    if !wants(loaded_ms, generation) {
        return None;
    }
    Some(CachedCopy {
        entry: entry::decode(key, stored.slice(TOOK.end..))?,
        age: Duration::from_millis(now_ms.saturating_sub(loaded_ms)),
        left: Duration::from_millis(left_ms),
        took: Duration::from_millis(took_ms),
        expired: false,
    })
}

/// At most 19 digits as a number.
fn number(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, digit: &u8| digit.is_ascii_digit().then(|| sum * 10 + u64::from(digit - b'0'));
    (1..=19).contains(&digits.len()).then(|| digits.iter().try_fold(0, add)).flatten()
}

/// What a reply says; `None` if it is a fresh envelope that cannot be used.
fn read(key: &Key, reply: Value) -> Option<Read> {
    let reply: Result<(String, u64, u64, u64, Vec<u8>), _> = redis::from_redis_value(reply);
    let Ok((state, age_ms, left_ms, took_ms, stored)) = reply else { return Some(Read::Unusable) };
    let left_ms = if state == "fresh" { left_ms + 1 } else { left_ms };
    let envelope = (stored.len() > TOOK.end).then(|| Bytes::from(stored).slice(TOOK.end..));
    let copy = envelope.and_then(|envelope| entry::decode(key, envelope)).map(|entry| CachedCopy {
        entry,
        age: Duration::from_millis(age_ms),
        left: Duration::from_millis(left_ms.saturating_sub(1)),
        took: Duration::from_millis(took_ms),
        expired: left_ms == 0,
    });
    let held = match (left_ms, &copy) {
        (2.., _) => InRedis::TooOld,
        (1, _) | (_, Some(_)) => InRedis::Stale,
        (_, None) => InRedis::Absent,
    };
    match state.as_str() {
        "fresh" => copy.map(Read::Fresh),
        "yours" => Some(Read::Yours(copy, held)),
        _ => Some(Read::Leased(copy, held)),
    }
}
