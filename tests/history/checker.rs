//! What a history may not contain. Knows no process: it judges what was noted.
//!
//! An answer that does not say that the database failed is never older than an expiry that was acknowledged before its
//! read began, except: on another instance than the one that acknowledged, for [`GRACE`]; and while that instance is
//! disturbed in hearing the log, for [`DEAF`], or for as long as it says that the database is slow. An instance that
//! began to live after the acknowledgement has no excuse.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use super::{
    cluster::{REQUEST_TIMEOUT, UNHEARD_MAX},
    record::{Acknowledgement, Disturbance, Excuse, History, Read, Seen, Time, Write, seconds},
};

/// From an acknowledgement to the last read on an undisturbed other instance that may still be outdated. The notice
/// takes a few milliseconds; the rest is for a machine with more to do than it can.
pub const GRACE: Duration = Duration::from_millis(500);
/// The same on an instance that cannot hear the log: CACHE_UNHEARD_MAX_S, and one second for what was under way to it
/// when the expiry was acknowledged (two Redis answers of 250 ms and a slow load).
pub const DEAF: Duration = Duration::from_millis(UNHEARD_MAX.as_millis() as u64 + 1000);
/// REQUEST_TIMEOUT_MS, and a second for the machine.
const DEADLINE: Duration = Duration::from_millis(REQUEST_TIMEOUT.as_millis() as u64 + 1000);

/// Something that must not be.
#[derive(Debug)]
pub struct Violation {
    pub what: String,
    pub read: Read,
    /// When what it contradicts began.
    since: Time,
}

/// A history, put in order.
pub struct Checker<'a> {
    history: &'a History,
    /// By version.
    writes: HashMap<i64, Vec<&'a Write>>,
    /// By instance and key, by beginning.
    reads: BTreeMap<(usize, i64), Vec<&'a Read>>,
}

impl<'a> Checker<'a> {
    pub fn new(history: &'a History) -> Self {
        let mut writes: HashMap<_, Vec<_>> = HashMap::new();
        for write in &history.writes {
            writes.entry(write.key).or_default().push(write);
        }
        let mut reads: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for read in &history.reads {
            reads.entry((read.instance, read.key)).or_default().push(read);
        }
        writes.values_mut().for_each(|writes| writes.sort_by_key(|write| write.version));
        reads.values_mut().for_each(|reads| reads.sort_by_key(|read| read.from));
        Self { history, writes, reads }
    }

    /// Everything that must not be, in order of time.
    pub fn violations(&self) -> Vec<Violation> {
        let mut found: Vec<_> = self.history.reads.iter().filter_map(|read| self.judge(read)).collect();
        found.sort_by_key(|violation| violation.read.to);
        found
    }

    fn judge(&self, read: &Read) -> Option<Violation> {
        let violation = |what: String, since| Some(Violation { what, read: read.clone(), since });
        let excused = |excuse| self.excused(read.instance, read.from, read.to, excuse);
        if read.to - read.from > DEADLINE && !excused(Excuse::Pause) {
            return violation("an answer after the deadline".to_owned(), read.from);
        }
        match &read.seen {
            Seen::Nonsense(_) => return violation("not an answer".to_owned(), read.from),
            Seen::Nothing(_) if !excused(Excuse::Death) => {
                return violation("no answer from a living instance".to_owned(), read.from);
            }
            Seen::Unavailable if !excused(Excuse::Pause) && !self.ignorant(read) => {
                return violation("503 though the database answers".to_owned(), read.from);
            }
            _ if read.says_failed() && !excused(Excuse::Pause) && !self.ignorant(read) => {
                return violation("stale though the database answers".to_owned(), read.from);
            }
            _ if read.says_failed() || read.says_slow() && !read.alone => return None,
            _ => {}
        }
        let newer = match self.newest_it_can_be(read) {
            None => return None,
            Some(Err(what)) => return violation(what.to_owned(), read.from),
            Some(Ok(version)) => self.writes[&read.key].iter().filter(move |write| write.version > version),
        };
        for write in newer {
            let Some(acknowledged) = write.acknowledged.filter(|acknowledged| acknowledged.at < read.from) else {
                continue;
            };
            let (allowed, late) = (self.allowance(read, acknowledged), read.from - acknowledged.at);
            if late > allowed {
                let (late, allowed) = (late.as_millis(), allowed.as_millis());
                let what =
                    format!("version {} was acknowledged {late} ms before; {allowed} ms are allowed", write.version);
                return violation(what, write.begun);
            }
        }
        None
    }

    /// The newest version that the read can have seen; `None` if it saw none.
    fn newest_it_can_be(&self, read: &Read) -> Option<Result<u64, &'static str>> {
        let begun = |write: &&&Write| write.begun <= read.to;
        let writes = self.writes.get(&read.key).map_or(&[][..], Vec::as_slice);
        match read.seen {
            Seen::Version(version) => {
                let written = writes.iter().filter(begun).any(|write| write.version == version && !write.deleted);
                Some(if written { Ok(version) } else { Err("a version that was not written yet") })
            }
            Seen::Absent => {
                let last = writes.iter().filter(begun).rfind(|write| write.deleted);
                Some(last.map(|write| write.version).ok_or("absent, but never deleted"))
            }
            _ => None,
        }
    }

    fn allowance(&self, read: &Read, acknowledged: Acknowledgement) -> Duration {
        let reborn = self.history.births.iter().any(|(instance, life, birth)| {
            (*instance, *life) == (read.instance, read.life) && *birth > acknowledged.at
        });
        if reborn || read.instance == acknowledged.instance {
            Duration::ZERO
        } else if self.excused(read.instance, acknowledged.at, read.from, Excuse::Deafness) {
            // What merely grew old is served for slowness, and who is deaf does not know that it is more than old.
            if read.says_slow() { Duration::MAX } else { DEAF }
        } else {
            GRACE
        }
    }

    /// Reads on an undisturbed instance that saw an older version than another had seen there before. Before the newer
    /// one is acknowledged that is right: a read past the cache saw it first. Afterwards [`Self::judge`] finds it.
    pub fn steps_back(&self) -> usize {
        self.reads.values().map(|reads| self.steps_back_among(reads)).sum()
    }

    fn steps_back_among(&self, reads: &[&Read]) -> usize {
        let mut by_end: Vec<_> = reads.iter().filter(|read| !read.says_stale()).collect();
        by_end.sort_by_key(|read| read.to);
        let mut ended = by_end.into_iter().peekable();
        let mut newest: Option<(u64, &Read)> = None;
        let mut found = 0;
        for read in reads {
            while let Some(before) = ended.next_if(|before| before.to < read.from) {
                let Seen::Version(version) = before.seen else { continue };
                if newest.is_none_or(|(known, other)| version > known || other.life < before.life) {
                    newest = Some((version, before));
                }
            }
            let (Some((known, before)), Some(Ok(version))) = (newest, self.newest_it_can_be(read)) else { continue };
            let same_life = before.life == read.life && !read.says_stale();
            found += usize::from(version < known && same_life && !self.disturbed(read.instance, before.from, read.to));
        }
        found
    }

    fn disturbances(&self, instance: usize, from: Time, to: Time) -> impl Iterator<Item = &'a Disturbance> {
        self.history.disturbances.iter().filter(move |disturbance| disturbance.touches(instance, from, to))
    }

    fn disturbed(&self, instance: usize, from: Time, to: Time) -> bool {
        self.disturbances(instance, from, to).next().is_some()
    }

    fn excused(&self, instance: usize, from: Time, to: Time, excuse: Excuse) -> bool {
        self.disturbances(instance, from, to).any(|disturbance| disturbance.excuse >= excuse)
    }

    /// Whether the instance could not ask the database. It excuses nothing else.
    fn ignorant(&self, read: &Read) -> bool {
        let mut disturbances = self.disturbances(read.instance, read.from, read.to);
        disturbances.any(|disturbance| disturbance.excuse == Excuse::Ignorance)
    }

    /// From each acknowledgement to the first read on each undisturbed other instance that is right, and, where one was
    /// wrong before it, to the last that was wrong.
    pub fn propagation(&self) -> (Vec<Duration>, Vec<Duration>) {
        let (mut right, mut wrong) = (Vec::new(), Vec::new());
        for ((instance, key), reads) in &self.reads {
            for write in &self.writes[key] {
                let Some(acknowledged) = write.acknowledged.filter(|told| told.instance != *instance) else { continue };
                let after = &reads[reads.partition_point(|read| read.from < acknowledged.at)..];
                let is_right = |read: &&&Read| {
                    self.newest_it_can_be(read).is_some_and(|seen| seen.is_ok_and(|seen| seen >= write.version))
                };
                let Some(first) = after.iter().find(is_right) else { continue };
                if self.disturbed(*instance, acknowledged.at, first.from) {
                    continue;
                }
                right.push(first.from - acknowledged.at);
                let before = after.iter().take_while(|read| read.from < first.from).last();
                wrong.extend(before.map(|read| read.from - acknowledged.at));
            }
        }
        right.sort();
        wrong.sort();
        (right, wrong)
    }

    /// The part of the history that led to a violation: the key's writes, the instance's reads of it, the faults.
    pub fn slice(&self, violation: &Violation) -> String {
        let Violation { read, since, .. } = violation;
        let reads = &self.reads[&(read.instance, read.key)];
        let place = reads.partition_point(|other| other.from < read.from);
        let shown = |at: Time| at + Duration::from_secs(1) >= *since && at <= read.to + Duration::from_secs(1);
        let mut lines: Vec<(Time, String)> = Vec::new();
        let around = reads.iter().enumerate().filter(|(index, other)| index.abs_diff(place) < 10 && shown(other.from));
        lines.extend(around.map(|(_, other)| (other.from, other.to_string())));
        let writes = self.writes.get(&read.key).into_iter().flatten().filter(|write| shown(write.begun));
        lines.extend(writes.map(|write| (write.begun, write.to_string())));
        let faults = self.disturbances(read.instance, since.saturating_sub(Duration::from_secs(1)), read.to);
        lines.extend(faults.map(|fault| (fault.from, fault.to_string())));
        lines.sort();
        let lines: Vec<_> = lines.into_iter().map(|(_, line)| format!("  {line}")).collect();
        format!("{}: {}\n{}", seconds(read.from), violation.what, lines.join("\n"))
    }
}

/// `p50/p99/max of n` in milliseconds.
pub fn distribution(sorted: &[Duration]) -> String {
    let Some(max) = sorted.last() else { return "none".to_owned() };
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    format!("{:.1}/{:.1}/{:.1} ms of {}", at(0.5), at(0.99), max.as_secs_f64() * 1000.0, sorted.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::record::NEVER;

    const KEY: i64 = 5000;
    const SOUND: &str = "L1; hit; ttl=9";
    const STALE: &str = "L1; hit; ttl=0; detail=database-failed";
    const SLOW: &str = "L1; hit; ttl=0; detail=database-slow";
    const SLOW_BATCH: &str = "L1; hit; ttl=0; detail=\"database-slow: memory 2, redis 0, database 0\"";

    fn ms(ms: u64) -> Time {
        Duration::from_millis(ms)
    }

    fn write(version: u64, at: u64) -> Write {
        let acknowledged = Some(Acknowledgement { at: ms(at + 2), instance: 0, late: false });
        Write { key: KEY, version, deleted: version == 3, begun: ms(at), committed: ms(at + 1), acknowledged }
    }

    fn fault(from: u64, to: u64, excuse: Excuse) -> Disturbance {
        Disturbance {
            what: "a fault".to_owned(),
            from: ms(from),
            to: ms(to),
            instance: Some(1),
            excuse,
            recovery: ms(100),
        }
    }

    /// Version 1 from the start, 2 acknowledged at 1,002 ms by instance 0, 3 (a deletion) at 10,002 ms.
    fn violations(disturbances: &[Disturbance], reads: &[(usize, u64, Seen, &str)]) -> Vec<String> {
        let read = |(instance, from, seen, status): &(usize, u64, Seen, &str)| Read {
            instance: *instance,
            life: 1,
            key: KEY,
            from: ms(*from),
            to: ms(from + 1),
            seen: seen.clone(),
            status: (*status).to_owned(),
            alone: !status.contains("memory "),
        };
        let history = History {
            reads: reads.iter().map(read).collect(),
            writes: vec![write(1, 0), write(2, 1000), write(3, 10_000)],
            disturbances: disturbances.to_vec(),
            births: vec![(0, 1, ms(0)), (1, 1, ms(0)), (2, 1, ms(5000))],
        };
        let checker = Checker::new(&history);
        let found = checker.violations();
        found.iter().for_each(|violation| assert!(checker.slice(violation).contains(&violation.what)));
        found.into_iter().map(|violation| violation.what).collect()
    }

    #[test]
    fn what_is_allowed_is_found_right_and_what_is_not_is_found() {
        use Seen::{Absent, Nothing, Unavailable, Version};
        let deaf = || vec![fault(900, NEVER.as_millis() as u64, Excuse::Deafness)];
        let paused = || vec![fault(900, 9000, Excuse::Pause)];
        let dead = || vec![fault(900, 9000, Excuse::Death)];
        let ignorant = || vec![fault(900, 9000, Excuse::Ignorance)];
        #[rustfmt::skip] // a table reads as a table
        let cases = [
            ("before", vec![], (0, 1001, Version(1), SOUND), ""),
            ("at once where it was acknowledged", vec![], (0, 1003, Version(1), SOUND), "version 2 was acknowledged"),
            ("elsewhere, within the grace", vec![], (1, 1500, Version(1), SOUND), ""),
            ("elsewhere, after it", vec![], (1, 1600, Version(1), SOUND), "version 2 was acknowledged"),
            ("after it, but deaf", deaf(), (1, 4900, Version(1), SOUND), ""),
            ("too long deaf", deaf(), (1, 5100, Version(1), SOUND), "version 2 was acknowledged"),
            ("somebody else is deaf", deaf(), (0, 1600, Version(1), SOUND), "version 2 was acknowledged"),
            ("deaf and well again", vec![fault(0, 800, Excuse::Deafness)], (1, 1600, Version(1), SOUND), "version 2 was"),
            ("born later", deaf(), (2, 5100, Version(1), SOUND), "version 2 was acknowledged 4098 ms before; 0 ms"),
            ("stale, and says so", paused(), (1, 8000, Version(1), STALE), ""),
            ("stale without need", deaf(), (1, 8000, Version(1), STALE), "stale though the database answers"),
            ("stale while the database is away", ignorant(), (1, 8000, Version(1), STALE), ""),
            ("slow, and expired here", vec![], (0, 1003, Version(1), SLOW), "version 2 was acknowledged"),
            ("slow, and expired elsewhere", vec![], (1, 1600, Version(1), SLOW), "version 2 was acknowledged"),
            ("slow while the database is away", ignorant(), (1, 1600, Version(1), SLOW), "version 2 was acknowledged"),
            ("slow, of several", vec![], (0, 1003, Version(1), SLOW_BATCH), ""),
            ("slow and deaf", deaf(), (1, 8000, Version(1), SLOW), ""),
            ("slow, and not expired", vec![], (1, 900, Version(1), SLOW), ""),
            ("stale without saying so", ignorant(), (1, 1600, Version(1), SOUND), "version 2 was acknowledged"),
            ("503 while the database is away", ignorant(), (1, 8000, Unavailable, ""), ""),
            ("from the future", vec![], (1, 900, Version(2), SOUND), "a version that was not written yet"),
            ("from nowhere", vec![], (1, 9000, Version(7), SOUND), "a version that was not written yet"),
            ("deleted", vec![], (0, 10_003, Absent, SOUND), ""),
            ("undeleted", vec![], (0, 10_003, Version(2), SOUND), "version 3 was acknowledged"),
            ("absent too early", vec![], (1, 9000, Absent, SOUND), "absent, but never deleted"),
            ("503", deaf(), (1, 1000, Unavailable, ""), "503 though the database answers"),
            ("503 after a pause", paused(), (1, 1000, Unavailable, ""), ""),
            ("nothing", paused(), (1, 1000, Nothing(String::new()), ""), "no answer from a living instance"),
            ("nothing from the dead", dead(), (1, 1000, Nothing(String::new()), ""), ""),
            ("nonsense", dead(), (1, 1000, Seen::Nonsense("500".to_owned()), ""), "not an answer"),
        ];
        for (case, disturbances, read, expected) in cases {
            let found = violations(&disturbances, &[read]);
            match expected {
                "" => assert_eq!(found, [""; 0], "{case}"),
                expected => assert!(found.len() == 1 && found[0].contains(expected), "{case}: {found:?}"),
            }
        }
    }
}
