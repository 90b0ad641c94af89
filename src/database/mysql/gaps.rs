//! Which versions of a change table were not there when higher ones were read.
//!
//! For engines that number a change when it is written and not when it is committed. Knows no SQL. Invariant: a version
//! up to the highest is seen, or within a gap, or was settled by a caller who asked the engine twice.

use std::{
    collections::BTreeSet,
    fmt,
    ops::{Bound, RangeInclusive},
    str::FromStr,
};

/// Looks that a gap is given before the engine is asked whether anybody still holds it: commits take less than that.
const LOOKS: u32 = 5;
/// With more gaps, the nearest of those noticed together become one, then the oldest; what was seen between them is then
/// read again.
const MAX: usize = 64;
/// The engine is asked about as much at once of what was seen in a gap: who holds something there keeps no more open.
const PART: usize = 1000;

/// As text: `<highest>`, in the midst of a look `/<looked>`, then ` <from>-<to>*<looks>` for each gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gaps {
    highest: i64,
    /// The version up to which a look has come that is to be gone on with.
    looked: Option<i64>,
    /// In order, apart from each other, below the highest.
    missing: Vec<Gap>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Gap {
    versions: RangeInclusive<i64>,
    /// How often it was looked at since it was noticed.
    looks: u32,
}

impl Gaps {
    /// From a table whose highest version is this, and which lacks these, in order, apart from each other and below it.
    pub(super) fn begin(highest: i64, missing: impl IntoIterator<Item = RangeInclusive<i64>>) -> Self {
        let missing = missing.into_iter().map(|versions| Gap { versions, looks: 0 }).collect();
        let mut gaps = Self { highest, looked: None, missing };
        gaps.join();
        gaps
    }

    /// The highest version read.
    pub(super) fn highest(&self) -> i64 {
        self.highest
    }

    /// The lowest version that is missing.
    pub(super) fn lowest(&self) -> Option<i64> {
        self.missing.first().map(|gap| *gap.versions.start())
    }

    /// Whether a look has begun and is to be gone on with.
    pub(super) fn is_looking(&self) -> bool {
        self.looked.is_some()
    }

    /// What is missing and has still to be looked at.
    pub(super) fn unlooked(&self) -> Vec<RangeInclusive<i64>> {
        let from = self.looked.map_or(0, |looked| looked + 1);
        let rest = self.missing.iter().map(|gap| from.max(*gap.versions.start())..=*gap.versions.end());
        rest.filter(|versions| !versions.is_empty()).collect()
    }

    /// Takes note of versions that were read, be they in gaps or above the highest.
    pub(super) fn seen(&mut self, versions: &BTreeSet<i64>) {
        for gap in std::mem::take(&mut self.missing) {
            let looks = gap.looks;
            let (mut from, to) = gap.versions.into_inner();
            for version in versions.range(from..=to) {
                self.add(from..=version - 1, looks);
                from = version + 1;
            }
            self.add(from..=to, looks);
        }
        for version in versions.range((Bound::Excluded(self.highest), Bound::Unbounded)) {
            self.add(self.highest + 1..=version - 1, 0);
            self.highest = *version;
        }
        self.join();
    }

    /// Makes fewer gaps of too many.
    fn join(&mut self) {
        if self.missing.len() > MAX {
            let distance = |gap: &Gap, before: &Gap| {
                (gap.looks == before.looks).then(|| gap.versions.start() - before.versions.end())
            };
            let mut distances: Vec<_> =
                self.missing.windows(2).filter_map(|pair| distance(&pair[1], &pair[0])).collect();
            distances.sort_unstable();
            let near = distances.get(self.missing.len() - MAX - 1).copied().unwrap_or(i64::MAX);
            self.missing.dedup_by(|gap, before| {
                let together = distance(gap, before).is_some_and(|distance| distance <= near);
                if together {
                    before.versions = *before.versions.start()..=*gap.versions.end();
                }
                together
            });
        }
        // The oldest ones have been looked at more than twice as often as it takes.
        while self.missing.len() > MAX {
            let oldest = self.missing.remove(0);
            let next = &mut self.missing[0];
            next.versions = *oldest.versions.start()..=*next.versions.end();
            next.looks = next.looks.max(oldest.looks);
        }
    }

    fn add(&mut self, versions: RangeInclusive<i64>, looks: u32) {
        if !versions.is_empty() {
            self.missing.push(Gap { versions, looks });
        }
    }

    /// Counts a look at what had still to be looked at, up to this version; `None`: at all of it, which ends the look.
    /// Says what has been open for so long that the engine should be asked.
    pub(super) fn look(&mut self, upto: Option<i64>) -> Vec<RangeInclusive<i64>> {
        let (before, last) = (self.looked.unwrap_or(0), upto.unwrap_or(self.highest));
        let mut due = Vec::new();
        for Gap { versions, looks } in std::mem::take(&mut self.missing) {
            let (from, to) = versions.into_inner();
            let looked_at = from.max(before + 1)..=to.min(last);
            let more = looks.saturating_add(1);
            if more.is_multiple_of(LOOKS) && !looked_at.is_empty() {
                due.push(looked_at.clone());
            }
            self.add(from..=to.min(before), looks);
            self.add(looked_at, more);
            self.add(from.max(last + 1)..=to, looks);
        }
        self.looked = upto;
        due
    }

    /// What is due, in parts of which few versions were seen.
    pub(super) fn parts(due: RangeInclusive<i64>, seen: &BTreeSet<i64>) -> Vec<RangeInclusive<i64>> {
        let (mut from, to) = due.clone().into_inner();
        let mut parts = Vec::new();
        for cut in seen.range(due).skip(PART - 1).step_by(PART) {
            parts.push(from..=*cut);
            from = cut + 1;
        }
        if from <= to {
            parts.push(from..=to);
        }
        parts
    }

    /// The engine says that nobody holds these, which were due, and nothing was seen since. The second time it is
    /// believed: a version is taken a moment before its row is written and held.
    pub(super) fn nobody_holds(&mut self, versions: &RangeInclusive<i64>) {
        for gap in std::mem::take(&mut self.missing) {
            let (from, to) = gap.versions.into_inner();
            if gap.looks < 2 * LOOKS || *versions.start() < from || to < *versions.end() {
                self.add(from..=to, gap.looks);
                continue;
            }
            self.add(from..=*versions.start() - 1, gap.looks);
            self.add(*versions.end() + 1..=to, gap.looks);
        }
    }
}

impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.highest)?;
        self.looked.iter().try_for_each(|looked| write!(f, "/{looked}"))?;
        self.missing
            .iter()
            .try_for_each(|gap| write!(f, " {}-{}*{}", gap.versions.start(), gap.versions.end(), gap.looks))
    }
}

impl FromStr for Gaps {
    type Err = ();

    /// Refuses what no [`Gaps`] are: what it would do, it would do at every look.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split(' ');
        let head = parts.next().ok_or(())?;
        let (highest, looked) = head.split_once('/').map_or((head, None), |(highest, looked)| (highest, Some(looked)));
        let highest = highest.parse().map_err(|_| ())?;
        let looked: Option<i64> = looked.map(str::parse).transpose().map_err(|_| ())?;
        let mut below = 0;
        let gap = |part: &str| {
            let (versions, looks) = part.split_once('*')?;
            let (from, to) = versions.split_once('-')?;
            let (from, to) = (from.parse().ok()?, to.parse().ok()?);
            let fits = below < from && from <= to && to < highest;
            below = to;
            fits.then_some(Gap { versions: from..=to, looks: looks.parse().ok()? })
        };
        let missing = parts.map(gap).collect::<Option<_>>().ok_or(())?;
        let fits = highest >= 0 && looked.is_none_or(|looked| (1..highest).contains(&looked));
        if fits { Ok(Self { highest, looked, missing }) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn set(versions: impl IntoIterator<Item = i64>) -> BTreeSet<i64> {
        versions.into_iter().collect()
    }

    fn missing(gaps: &Gaps) -> Vec<RangeInclusive<i64>> {
        gaps.missing.iter().map(|gap| gap.versions.clone()).collect()
    }

    #[test]
    fn a_gap_closes_when_its_version_appears() {
        let mut gaps = Gaps::begin(5, [3..=4]);
        assert_eq!(gaps.to_string(), "5 3-4*0");
        gaps.seen(&set([4]));
        assert_eq!(missing(&gaps), [3..=3]);
        gaps.seen(&set([3, 6]));
        assert_eq!(gaps.to_string(), "6");
    }

    #[test]
    fn what_nobody_wrote_is_refused() {
        for text in ["0", "7", "9223372036854775807", "9 1-2*0", "9/2 1-2*0 3-3*0 5-8*4294967295"] {
            let mut gaps: Gaps = text.parse().expect(text);
            gaps.seen(&set([2, 9]));
            gaps.look(Some(7));
        }
        for text in [
            "",
            "x",
            "-1",
            "9/",
            "9/x",
            "9/0",
            "9/9",
            "9223372036854775808",
            "9 ",
            "9 1*0",
            "9 1-2",
            "9 5-3*0",
            "9 0-3*0",
            "9 -1-3*0",
            "9 1--3*0",
            "9 1-9*0",
            "9 1-10*0",
            "9 4-5*0 1-2*0",
            "9 1-4*0 4-5*0",
            "9 1-2*-1",
            "9 1-2*4294967296",
        ] {
            assert_eq!(text.parse::<Gaps>(), Err(()), "{text:?}");
        }
    }

    #[test]
    fn a_gap_is_forgotten_when_nobody_held_it_twice() {
        let mut gaps = Gaps::begin(2, [1..=1]);
        let asked: Vec<_> = (1..=2 * LOOKS)
            .filter(|_| {
                let due = gaps.look(None);
                due.iter().for_each(|gap| gaps.nobody_holds(gap));
                !due.is_empty()
            })
            .collect();
        assert_eq!(asked, [LOOKS, 2 * LOOKS]);
        assert_eq!(missing(&gaps), []);
    }

    #[test]
    fn a_gap_that_is_held_stays_for_as_long_as_it_takes() {
        let mut gaps = Gaps::begin(2, [1..=1]);
        for _ in 0..1000 {
            gaps.look(None);
        }
        assert_eq!(missing(&gaps), [1..=1]);
    }

    #[test]
    fn more_gaps_than_are_kept_become_few_wide_ones() {
        let gaps = Gaps::begin(29_997, (0..9_999).map(|n| n * 3 + 1..=n * 3 + 2));
        assert_eq!(missing(&gaps), [1..=29_996]);
    }

    #[test]
    fn far_apart_they_stay_apart() {
        let near = |from| (0..100_i64).map(move |n| from + 2 * n..=from + 2 * n);
        let gaps = Gaps::begin(90_000, near(1001).chain(near(50_001)));
        assert_eq!(missing(&gaps), [1001..=1199, 50_001..=50_199]);
    }

    #[test]
    fn a_look_that_takes_several_pages_counts_once_for_each_gap_and_what_comes_meanwhile_is_looked_at_too() {
        let mut gaps = Gaps::begin(40, [5..=20, 30..=39]);
        gaps.look(Some(12));
        assert_eq!(
            (gaps.to_string().as_str(), gaps.unlooked()),
            ("40/12 5-12*1 13-20*0 30-39*0", vec![13..=20, 30..=39])
        );
        gaps.seen(&set([33, 43]));
        gaps.look(Some(33));
        assert_eq!(gaps.to_string(), "43/33 5-12*1 13-20*1 30-32*1 34-39*0 41-42*0");
        gaps.look(None);
        assert_eq!(gaps.to_string(), "43 5-12*1 13-20*1 30-32*1 34-39*1 41-42*1");
        assert_eq!(gaps.unlooked(), missing(&gaps));
    }

    #[test]
    fn what_somebody_holds_keeps_one_part_of_a_wide_gap_open() {
        let versions: BTreeSet<_> = (1..=10_000).map(|n| 2 * n).collect();
        let mut gaps = Gaps::begin(20_001, [1..=20_000]); // 9,001 is held
        for look in 1..=2 * LOOKS {
            gaps.seen(&versions);
            let due = gaps.look(None);
            assert_eq!(due.is_empty(), look % LOOKS != 0);
            let parts: Vec<_> = due.into_iter().flat_map(|due| Gaps::parts(due, &versions)).collect();
            for part in parts.iter().filter(|part| !part.contains(&9001)) {
                gaps.nobody_holds(part);
            }
        }
        assert_eq!(missing(&gaps), [8001..=10_000]);
    }

    #[test]
    fn one_gap_that_is_held_does_not_make_the_others_pile_up() {
        let mut gaps = Gaps::begin(2, [1..=1]); // 1 is held
        for version in (4..4000).step_by(2) {
            gaps.seen(&set([version]));
            for gap in gaps.look(None) {
                if !gap.contains(&1) {
                    gaps.nobody_holds(&gap);
                }
            }
            assert!(missing(&gaps).len() <= MAX && missing(&gaps)[0].contains(&1));
        }
    }

    proptest! {
        // However transactions of any length overlap, whichever of them are rolled back, whatever lies between their
        // versions, and however little is read at once, every version that is ever committed is asked for once it is
        // there.
        #[test]
        fn no_commit_is_skipped(
            transactions in vec((1..4_i64, 0..40_usize, 0..60_usize, any::<bool>()), 1..100),
            seen_before in 0..50_i64,
            apart in 1..4_i64,
            page in 3..40_usize,
        ) {
            let mut next = seen_before;
            let mut opened: Vec<_> = transactions.iter().map(|(versions, begin, lasts, commits)| (*begin, begin + lasts, *versions, *commits)).collect();
            opened.sort_by_key(|transaction| transaction.0);
            let opened: Vec<_> = opened.into_iter().map(|(begin, end, versions, commits)| {
                let taken: BTreeSet<_> = (1..=versions).map(|n| next + n * apart).collect();
                next += versions * apart;
                (begin, end, taken, commits)
            }).collect();
            let mut gaps = Gaps::begin(seen_before, []);
            let mut delivered = BTreeSet::new();
            for now in 0..5_000 {
                if now > 100 && gaps.missing.is_empty() {
                    break;
                }
                gaps = gaps.to_string().parse().expect("its own text");
                let visible: BTreeSet<i64> = opened.iter().filter(|(_, end, _, commits)| *commits && *end <= now)
                    .flat_map(|(_, _, taken, _)| taken.clone()).collect();
                let unlooked = gaps.unlooked();
                let found = visible.iter().copied().filter(|version| unlooked.iter().any(|gap| gap.contains(version)));
                let found: BTreeSet<_> = found.take(page + 1).collect();
                let is_full = found.len() > page;
                let found: BTreeSet<_> = found.into_iter().take(page).collect();
                delivered.extend(found.iter().copied());
                gaps.seen(&found);
                let due = gaps.look(found.last().copied().filter(|_| is_full));
                for part in due.into_iter().flat_map(|due| Gaps::parts(due, &found)) {
                    let held = opened.iter().any(|(begin, end, taken, _)| *begin <= now && now < *end
                        && taken.iter().any(|version| part.contains(version)));
                    if !held {
                        gaps.nobody_holds(&part);
                    }
                }
                let above: BTreeSet<_> = visible.into_iter().filter(|version| *version > gaps.highest()).collect();
                delivered.extend(above.iter().copied());
                gaps.seen(&above);
                prop_assert!(gaps.missing.len() <= MAX);
            }
            let committed: BTreeSet<i64> = opened.iter().filter(|transaction| transaction.3)
                .flat_map(|(_, _, taken, _)| taken.clone()).collect();
            prop_assert_eq!(delivered, committed);
            prop_assert_eq!(missing(&gaps), Vec::new());
        }
    }
}
