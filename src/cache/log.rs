//! The invalidation log: one Redis Stream that tells every instance which keys were expired, in order, without gaps.
//!
//! A notice is one field `n`, as every field is sent to every reader: id and author of the notice before, the floor (see
//! [`Floor`]: milliseconds, generation), the author, and the keys, or `*` for all, with spaces between. A later form takes
//! another name: for whoever does not know it, it is about everything. Invariant (C5): a reader either hears every notice
//! after its position or is told that it may have missed some; the id of the one before shows a trimmed, emptied or older
//! log alike. Its author shows another log: two primaries, each of which takes itself for the only one, may give the same
//! id in the same millisecond.

mod own;

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    fmt,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redis::{
    Cmd, FromRedisValue, RedisError,
    streams::{StreamId, StreamRangeReply, StreamReadReply},
};
use tokio::time::Instant;

use self::own::Own;
use super::Key;
use crate::{
    config,
    redis::{Error, Redis, Script},
};

/// Appends a notice; `ARGV`: author, keys, largest length, largest age in milliseconds, the generation its author knows,
/// and in a full Redis how many notices are to stay.
const APPEND: &str = r"
-- A script that has written once is refused nothing more, and this write needs no memory.
if ARGV[6] then redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', ARGV[6]) end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local before, floor, generation, by = '0-0'
if last then
  before = last[1]
  if last[2][1] == 'n' then floor, generation, by = string.match(last[2][2], '^%d+%-%d+ %S+ (%d+) (%d+) (%S+) ') end
end
generation = math.max(tonumber(generation) or 0, tonumber(ARGV[5]))
-- After none that can be read, too: what was there may have said that what is in Redis is stale.
if ARGV[2] == '*' or not floor then
  local clock = redis.call('TIME')
  floor, generation = clock[1] * 1000 + math.floor(clock[2] / 1000), generation + 1
end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*',
  'n', table.concat({before, by or '-', floor, generation, ARGV[1], ARGV[2]}, ' '))
-- By age every hundred seconds, as eight of thirteen digits tell: each command in a script costs those who wait.
if string.sub(id, 1, 8) ~= string.sub(before, 1, 8) then
  redis.call('XTRIM', KEYS[1], 'MINID', '~', string.match(id, '^%d+') - ARGV[4])
end
return {id, floor, generation}
";

/// How long one blocking read waits: also how often an idle log is checked for having been reset, and how long a
/// silent instance's trust in its memory lags behind.
const BLOCK: Duration = Duration::from_secs(1);
/// Pause after a read that brought notices. To ask again at once would, on few cores, delay the other readers and the
/// acknowledgement that the author waits for. Notices that follow come in one read, at most two milliseconds later: timers
/// round up.
const PAUSE: Duration = Duration::from_millis(1);
/// Notices per read: bounds memory; more is read at once.
const PAGE: usize = 200;
/// Notices older than this are trimmed: nobody's memory stays fresh that long without hearing them.
const MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);
/// Notices that stay when Redis has no memory left: the log may be what fills it. Who is further behind has missed some.
const KEPT_WHEN_FULL: u64 = 1_000;
/// The field of a notice.
const FIELD: &str = "n";
/// Stands for every key.
const EVERYTHING: &str = "*";
/// Stands for the author of a notice that cannot be read, or of none.
const NOBODY: &str = "-";

/// Which keys a notice is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// These.
    Keys(Vec<Key>),
    /// All there are.
    Everything,
}

/// What a reader heard.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// This was expired.
    Expired(Scope),
    /// Notices were missed: they were trimmed, or this is the first read. What Redis holds is right.
    Missed,
    /// The log is another one or an older one: Redis lost data, and may have gone back to entries expired since.
    Reset,
}

/// What the last expiry of everything left: which entries in Redis are stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Floor {
    /// Those whose load began then or before (Redis' clock, milliseconds).
    pub(super) ms: u64,
    /// Those whose loader knew of fewer such expiries than this. It counts where Redis' clock went back since they were
    /// loaded, as it may when another node takes over. Zero is never given: it stands for what cannot be read.
    pub(super) generation: u64,
}

impl Floor {
    /// What counts of two: the later expiry's, though Redis' clock may have been set back before it.
    pub(super) fn and(self, other: Self) -> Self {
        let is_unread = self.generation == 0 || other.generation == 0;
        match self.generation.cmp(&other.generation) {
            _ if is_unread || self.generation == other.generation => {
                Self { ms: self.ms.max(other.ms), generation: self.generation.max(other.generation) }
            }
            Ordering::Greater => self,
            _ => other,
        }
    }
}

/// One read of the log.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) news: Vec<News>,
    pub(super) floor: Floor,
    /// The floor as notices state it, without what is assumed of unreadable ones: it shows that an instance has made stale
    /// all that is in Redis below.
    pub(super) said: Floor,
    /// How long before this read was sent this instance had last heard a notice or been told that one is appended: the
    /// least age of whatever may be lost. `None`: not before.
    pub(super) known_for: Option<Duration>,
    /// Nothing more was in the log when this read was sent.
    pub(super) caught_up: bool,
    /// Redis' time right after this read was sent, if it was wanted (microseconds).
    pub(super) redis_us: Option<u64>,
    /// Its time later on, if it was asked for because of what was read.
    pub(super) later_us: Option<u64>,
}

impl Heard {
    /// Whether an instance has made everything stale since whatever may be lost: it counts one more expiry of everything
    /// than this instance `knew`, and its floor is above what may be lost, by this Redis' clock. The count alone would not
    /// do where this instance went on with another primary, nor the time where the clock was set back.
    pub(super) fn is_answered(&self, knew: Floor) -> bool {
        let (Some(redis_us), Some(known_for)) = (self.redis_us.or(self.later_us), self.known_for) else { return false };
        let youngest_us = u128::from(redis_us).saturating_sub(known_for.as_micros());
        self.said.generation > knew.generation && u128::from(self.said.ms) * 1000 > youngest_us
    }
}

/// Place of a notice in the log, as Redis orders it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    ms: u64,
    number: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.number)
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, number) = text.split_once('-').ok_or(())?;
        Ok(Self { ms: ms.parse().map_err(drop)?, number: number.parse().map_err(drop)? })
    }
}

pub(super) struct Log {
    redis: Redis,
    name: String,
    author: String,
    max_length: u64,
    poll: Option<Duration>,
    own: Mutex<Own>,
    kinds: &'static [&'static str],
    append: Script,
}

impl Log {
    pub(super) fn new(redis: Redis, config: &config::Redis, author: String, kinds: &'static [&'static str]) -> Self {
        let name = config.key("log");
        let (max_length, poll) = (config.log_max_length, config.frugal_poll);
        let own = Mutex::default();
        Self { redis, name, author, max_length, poll, own, kinds, append: Script::new(APPEND) }
    }

    /// Pause after a read that caught up: always, where reads must not block the connection they share.
    pub(super) fn pause(&self, brought_notices: bool) -> Option<Duration> {
        self.poll.or(brought_notices.then_some(PAUSE))
    }

    /// Carries out `before` and then appends the notice, in one round trip; returns its place and the floor, which an
    /// expiry of everything raises above the known one. `Ok` only if all of it happened.
    pub(super) async fn append(
        &self,
        before: Vec<Cmd>,
        scope: &Scope,
        known: Floor,
    ) -> Result<(Position, Floor), Error> {
        let keys = match scope {
            Scope::Everything => EVERYTHING.to_owned(),
            Scope::Keys(keys) => keys.iter().map(Key::to_string).collect::<Vec<_>>().join(" "),
        };
        let mut call = self.append.call(&self.name);
        call.arg(&self.author).arg(keys).arg(self.max_length).arg(MAX_AGE.as_millis() as u64).arg(known.generation);
        let when_full = |call: &mut Cmd| {
            call.arg(self.max_length.min(KEPT_WHEN_FULL));
        };
        // In this order, so nobody hears of a key that is still fresh in Redis.
        let mut replies = self.redis.send_in_order(before, &self.append, call, when_full).await?;
        let appended = replies.pop().ok_or_else(|| malformed("no reply"))??;
        for reply in replies {
            reply?;
        }
        let (id, ms, generation): (String, u64, u64) = redis::from_redis_value(appended).map_err(RedisError::from)?;
        let id: Position = id.parse().map_err(|()| malformed("notice id"))?;
        Ok((id, Floor { ms, generation }))
    }

    /// Takes note that this instance's notice is in the log: it is missed if it is not heard.
    pub(super) fn appended(&self, notice: Position) {
        self.own().appended(notice);
    }

    /// Removes what stands under the log's name if no notice could be appended to it. Best effort.
    pub(super) async fn remove_unusable(&self) {
        self.redis.remove_unless("stream", vec![self.name.clone()]).await;
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader that has heard nothing yet.
    pub(super) fn reader(&self) -> Reader<'_> {
        Reader { log: self, last: None, heard_at: None }
    }

    /// The last notice, and the time, if wanted.
    async fn tail(&self, want_time: bool) -> Result<(Option<Notice>, Option<u64>), Error> {
        let mut command = redis::cmd("XREVRANGE");
        command.arg(&self.name).arg("+").arg("-").arg("COUNT").arg(1);
        let (reply, redis_us): (StreamRangeReply, _) = self.ask(command, Duration::ZERO, want_time).await?;
        Ok((reply.ids.into_iter().next().map(|entry| self.notice(entry)).transpose()?, redis_us))
    }

    /// Whether the log lacks one of these notices of ours.
    async fn lacks(&self, notices: &BTreeSet<Position>) -> Result<bool, Error> {
        if notices.is_empty() {
            return Ok(false);
        }
        let look_up = |notice: &Position| {
            let mut command = redis::cmd("XREVRANGE"); // as the end is read: no further right is needed
            command.arg(&self.name).arg(notice.to_string()).arg(notice.to_string());
            command
        };
        for reply in self.redis.send_on_log(notices.iter().map(look_up).collect(), Duration::ZERO).await? {
            let reply: StreamRangeReply = redis::from_redis_value(reply?).map_err(RedisError::from)?;
            let found = reply.ids.into_iter().next().map(|entry| self.notice(entry)).transpose()?;
            if found.is_none_or(|found| found.author != self.author) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Asks on the log's connection, which may take `block` longer than usual, and before that for the time, if wanted:
    /// about once a second, when a Redis that takes no writes is found out, too.
    async fn ask<T: FromRedisValue>(
        &self,
        command: Cmd,
        block: Duration,
        want_time: bool,
    ) -> Result<(T, Option<u64>), Error> {
        let mut replies = match want_time {
            true => self.redis.send_on_log_if_it_takes_writes([redis::cmd("TIME"), command], block).await?,
            false => self.redis.send_on_log(vec![command], block).await?,
        };
        let reply = replies.pop().ok_or_else(|| malformed("no reply"))??;
        let time = replies.pop().and_then(Result::ok).and_then(|time| redis::from_redis_value::<(u64, u64)>(time).ok());
        let reply = redis::from_redis_value(reply).map_err(RedisError::from)?;
        Ok((reply, time.map(|(seconds, microseconds)| seconds.saturating_mul(1_000_000).saturating_add(microseconds))))
    }

    fn notice(&self, entry: StreamId) -> Result<Notice, Error> {
        let position: Position = entry.id.parse().map_err(|()| malformed("notice id"))?;
        let text: String = entry.get(FIELD).unwrap_or_default();
        Ok(self.readable(position, &text).unwrap_or(Notice {
            position,
            previous: None,
            author: NOBODY.to_owned(),
            // A floor is Redis' time when the notice was appended, so it cannot state more than its own id.
            floor: Floor { ms: position.ms, generation: 0 },
            scope: Scope::Everything,
        }))
    }

    fn readable(&self, position: Position, text: &str) -> Option<Notice> {
        let mut parts = text.splitn(6, ' ');
        let previous = Some((parts.next()?.parse().ok()?, parts.next()?.to_owned()));
        let floor = Floor { ms: parts.next()?.parse().ok()?, generation: parts.next()?.parse().ok()? };
        let author = parts.next()?.to_owned();
        let scope = match parts.next()? {
            EVERYTHING => Scope::Everything,
            // A kind that this version does not know cannot be in its memory.
            keys => Scope::Keys(keys.split_ascii_whitespace().filter_map(|key| Key::parse(key, self.kinds)).collect()),
        };
        Some(Notice { position, previous, author, floor, scope })
    }
}

struct Notice {
    position: Position,
    /// The one before and its author; `None` if it does not say so in a form that is known.
    previous: Option<(Position, String)>,
    author: String,
    floor: Floor,
    scope: Scope,
}

impl Notice {
    /// The floor, if it is the notice that says it.
    fn said(&self) -> Floor {
        if self.previous.is_some() { self.floor } else { Floor::default() }
    }
}

/// Reads the log from a position, over the log's own connection.
pub(super) struct Reader<'a> {
    log: &'a Log,
    /// The last notice heard and its author.
    last: Option<(Position, String)>,
    /// When that was.
    heard_at: Option<Instant>,
}

impl Reader<'_> {
    /// The last notice heard; `None` before the first read.
    pub(super) fn position(&self) -> Option<Position> {
        self.last.as_ref().map(|(position, _)| *position)
    }

    /// Waits up to [`BLOCK`] (or not at all, where the log is polled) for notices after the position. On an error the
    /// position stays, so the next read resumes. `known`: the floor as far as this instance knows.
    pub(super) async fn read(&mut self, want_time: bool, known: Floor) -> Result<Heard, Error> {
        let (sent, heard_at) = (Instant::now(), self.heard_at);
        let heard = self.read_on(want_time, known).await?;
        let youngest = heard_at.max(self.log.own().acknowledged_at);
        let known_for = youngest.map_or(Some(Duration::MAX), |youngest| sent.checked_duration_since(youngest));
        Ok(Heard { known_for, ..heard })
    }

    async fn read_on(&mut self, want_time: bool, known: Floor) -> Result<Heard, Error> {
        let Some(position) = self.position() else { return self.start(News::Missed, known).await };
        let doubtful = self.log.own().doubtful.clone();
        if self.log.lacks(&doubtful).await? {
            return self.start(News::Reset, known).await;
        }
        self.log.own().doubtful.retain(|notice| !doubtful.contains(notice));
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(PAGE);
        let block = if self.log.poll.is_none() { BLOCK } else { Duration::ZERO };
        if !block.is_zero() {
            command.arg("BLOCK").arg(block.as_millis() as u64);
        }
        command.arg("STREAMS").arg(&self.log.name).arg(position.to_string());
        let (reply, redis_us): (Option<StreamReadReply>, _) = self.log.ask(command, block, want_time).await?;
        let entries = reply.and_then(|reply| reply.keys.into_iter().next()).map_or_else(Vec::new, |key| key.ids);
        if entries.is_empty() {
            let heard = self.check_tail(position, known).await?;
            return Ok(Heard { redis_us, later_us: heard.redis_us, ..heard });
        }
        let caught_up = entries.len() < PAGE;
        let mut heard = Heard { caught_up, redis_us, ..Heard::default() };
        let mut last = self.last.clone();
        for entry in entries {
            let notice = self.log.notice(entry)?;
            if let (Some((previous, by)), Some((last, author))) = (&notice.previous, &last) {
                match previous.cmp(last) {
                    Ordering::Greater => heard.news.push(News::Missed),
                    Ordering::Equal if by == author => {}
                    Ordering::Equal | Ordering::Less => heard.news.push(News::Reset),
                }
            }
            heard.floor = heard.floor.and(notice.floor);
            heard.said = heard.said.and(notice.said());
            let is_ours = notice.author == self.log.author;
            let mut own = self.log.own();
            if !own.hear(notice.position, is_ours) {
                own.forget(notice.position);
                heard.news.push(News::Reset);
            }
            drop(own);
            // What this instance expired itself it has expired here already; everything is expired once more, so that
            // nothing below the new floor stays.
            if !is_ours || notice.scope == Scope::Everything {
                heard.news.push(News::Expired(notice.scope));
            }
            last = Some((notice.position, notice.author));
        }
        if heard.redis_us.is_none() && heard.news.contains(&News::Reset) {
            // What was heard is heard, whether this is answered or not.
            heard.later_us = self.log.tail(true).await.ok().and_then(|(_, time)| time);
        }
        (self.last, self.heard_at) = (last, Some(Instant::now()));
        Ok(heard)
    }

    /// Nothing came: is the log still the one that was read?
    async fn check_tail(&mut self, position: Position, known: Floor) -> Result<Heard, Error> {
        // Read before the tail is, so that a notice appended meanwhile does not look lost.
        let appended = self.log.own().unheard.last().copied();
        match self.log.tail(false).await?.0 {
            Some(tail) if appended.is_some_and(|appended| tail.position < appended) => {
                self.start(News::Reset, known).await
            }
            Some(tail) if self.last.as_ref() == Some(&(tail.position, tail.author.clone())) => {
                Ok(Heard { floor: tail.floor, said: tail.said(), caught_up: true, ..Heard::default() })
            }
            Some(tail) if tail.position > position => {
                // It came since; the next read returns it.
                Ok(Heard { floor: tail.floor, said: tail.said(), ..Heard::default() })
            }
            _ => self.start(News::Reset, known).await,
        }
    }

    /// Takes the end of the log as position; whatever was heard before does not connect to it.
    async fn start(&mut self, why: News, known: Floor) -> Result<Heard, Error> {
        let before = self.log.own().unsettled();
        let (tail, redis_us) = self.log.tail(true).await?;
        let tail = match tail {
            Some(tail) => tail,
            None => {
                // A first notice, so that there is a position that a later reset cannot be mistaken for.
                self.log.append(Vec::new(), &Scope::Keys(Vec::new()), known).await?;
                self.log.tail(false).await?.0.ok_or_else(|| malformed("log without the notice just appended"))?
            }
        };
        // Ours, which a Redis has acknowledged and this one does not have.
        let lost = self.log.lacks(&before).await?;
        let (floor, said) = (tail.floor, tail.said());
        let why = if lost { News::Reset } else { why };
        self.log.own().jump(tail.position, &before);
        (self.last, self.heard_at) = (Some((tail.position, tail.author)), Some(Instant::now()));
        Ok(Heard { news: vec![why], floor, said, caught_up: true, redis_us, ..Heard::default() })
    }
}

fn malformed(what: &'static str) -> Error {
    Error::Failed(RedisError::from((redis::ErrorKind::UnexpectedReturnType, what)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_of_everything_answers_only_what_was_lost_before_it_by_the_clock_of_the_redis_that_says_so() {
        let floor = |generation| Floor { ms: 0, generation };
        let heard = |ms, known_for| Heard {
            said: Floor { ms, generation: 5 },
            known_for,
            redis_us: Some(100_000_000),
            ..Heard::default()
        };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert!(heard(95_001, seconds(5)).is_answered(floor(4)));
        assert!(heard(95_001, Some(Duration::MAX)).is_answered(floor(4)));
        assert!(!heard(95_001, seconds(5)).is_answered(floor(5)), "one that it knew, by a clock that was set back");
        assert!(!heard(95_000, seconds(5)).is_answered(floor(4)), "it may be older");
        assert!(!heard(100_000, None).is_answered(floor(4)), "something was appended meanwhile");
        let timeless = Heard { redis_us: None, ..heard(95_001, seconds(5)) };
        assert!(!timeless.is_answered(floor(4)), "nobody knows the time there");
        let later = Heard { later_us: Some(100_000_000), redis_us: None, ..heard(95_001, seconds(5)) };
        assert!(later.is_answered(floor(4)));
    }

    #[test]
    fn of_two_floors_the_later_expirys_counts_whatever_redis_clock_was_set_to() {
        let floor = |ms, generation| Floor { ms, generation };
        assert_eq!(floor(9, 1).and(floor(5, 2)), floor(5, 2));
        assert_eq!(floor(5, 2).and(floor(9, 1)), floor(5, 2));
        assert_eq!(floor(5, 2).and(floor(7, 2)), floor(7, 2));
        assert_eq!(floor(5, 2).and(floor(9, 0)), floor(9, 2), "what cannot be read may be about everything");
        assert_eq!(Floor::default().and(floor(5, 1)), floor(5, 1));
    }

    #[test]
    fn positions_are_ordered_as_redis_orders_them_not_as_text() {
        let position = |text: &str| text.parse::<Position>().expect("a position");
        assert!(position("999-9") < position("1000-0") && position("1000-9") < position("1000-10"));
        assert_eq!(position("1700000000000-3").to_string(), "1700000000000-3");
        assert!("1700000000000".parse::<Position>().is_err());
    }
}
