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
/// With more gaps, those noticed together become one, then the oldest; what was seen between them is then read again.
const MAX: usize = 64;

/// As text: `<highest>`, then ` <from>-<to>*<looks>` for each gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gaps {
    highest: i64,
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
        let mut gaps = Self { highest, missing };
        gaps.join();
        gaps
    }

    /// The highest version read.
    pub(super) fn highest(&self) -> i64 {
        self.highest
    }

    /// What is missing below it.
    pub(super) fn missing(&self) -> Vec<RangeInclusive<i64>> {
        self.missing.iter().map(|gap| gap.versions.clone()).collect()
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
            self.missing.dedup_by(|gap, before| {
                let together = gap.looks == before.looks;
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

    /// Counts a look at every gap, and says which have been open for so long that the engine should be asked.
    pub(super) fn look(&mut self) -> Vec<RangeInclusive<i64>> {
        let mut due = Vec::new();
        for gap in &mut self.missing {
            gap.looks = gap.looks.saturating_add(1);
            if gap.looks.is_multiple_of(LOOKS) {
                due.push(gap.versions.clone());
            }
        }
        due
    }

    /// The engine says that nobody holds these, which were due. The second time it is believed: a version is taken a
    /// moment before its row is written and held.
    pub(super) fn nobody_holds(&mut self, versions: &RangeInclusive<i64>) {
        self.missing.retain(|gap| gap.looks < 2 * LOOKS || gap.versions != *versions);
    }
}

impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.highest)?;
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
        let highest = parts.next().and_then(|highest| highest.parse().ok()).ok_or(())?;
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
        if highest >= 0 { Ok(Self { highest, missing }) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn set(versions: impl IntoIterator<Item = i64>) -> BTreeSet<i64> {
        versions.into_iter().collect()
    }

    #[test]
    fn a_gap_closes_when_its_version_appears() {
        let mut gaps = Gaps::begin(5, [3..=4]);
        assert_eq!(gaps.to_string(), "5 3-4*0");
        gaps.seen(&set([4]));
        assert_eq!(gaps.missing(), [3..=3]);
        gaps.seen(&set([3, 6]));
        assert_eq!(gaps.to_string(), "6");
    }

    #[test]
    fn what_nobody_wrote_is_refused() {
        for text in ["0", "7", "9223372036854775807", "9 1-2*0", "9 1-2*0 3-3*0 5-8*4294967295"] {
            let mut gaps: Gaps = text.parse().expect(text);
            gaps.seen(&set([2, 9]));
            gaps.look();
        }
        for text in [
            "", "x", "-1", "9223372036854775808", "9 ", "9 1*0", "9 1-2", "9 5-3*0", "9 0-3*0", "9 -1-3*0", "9 1--3*0",
            "9 1-9*0", "9 1-10*0", "9 4-5*0 1-2*0", "9 1-4*0 4-5*0", "9 1-2*-1", "9 1-2*4294967296",
        ] {
            assert_eq!(text.parse::<Gaps>(), Err(()), "{text:?}");
        }
    }

    #[test]
    fn a_gap_is_forgotten_when_nobody_held_it_twice() {
        let mut gaps = Gaps::begin(2, [1..=1]);
        let asked: Vec<_> = (1..=2 * LOOKS)
            .filter(|_| {
                let due = gaps.look();
                due.iter().for_each(|gap| gaps.nobody_holds(gap));
                !due.is_empty()
            })
            .collect();
        assert_eq!(asked, [LOOKS, 2 * LOOKS]);
        assert_eq!(gaps.missing(), []);
    }

    #[test]
    fn a_gap_that_is_held_stays_for_as_long_as_it_takes() {
        let mut gaps = Gaps::begin(2, [1..=1]);
        for _ in 0..1000 {
            gaps.look();
        }
        assert_eq!(gaps.missing(), [1..=1]);
    }

    #[test]
    fn more_gaps_than_are_kept_become_few_wide_ones() {
        let gaps = Gaps::begin(29_997, (0..9_999).map(|n| n * 3 + 1..=n * 3 + 2));
        assert_eq!(gaps.missing(), [1..=29_996]);
    }

    #[test]
    fn one_gap_that_is_held_does_not_make_the_others_pile_up() {
        let mut gaps = Gaps::begin(2, [1..=1]); // 1 is held
        for version in (4..4000).step_by(2) {
            gaps.seen(&set([version]));
            for gap in gaps.look() {
                if !gap.contains(&1) {
                    gaps.nobody_holds(&gap);
                }
            }
            assert!(gaps.missing().len() <= MAX && gaps.missing()[0].contains(&1));
        }
    }

    proptest! {
        // However transactions of any length overlap, and whichever of them are rolled back, every version that is
        // ever committed is asked for once it is there.
        #[test]
        fn no_commit_is_skipped(
            transactions in vec((1..4_i64, 0..40_usize, 0..60_usize, any::<bool>()), 1..60),
            seen_before in 0..50_i64,
        ) {
            let mut next = seen_before;
            let mut opened: Vec<_> = transactions.iter().map(|(versions, begin, lasts, commits)| (*begin, begin + lasts, *versions, *commits)).collect();
            opened.sort_by_key(|transaction| transaction.0);
            let opened: Vec<_> = opened.into_iter().map(|(begin, end, versions, commits)| {
                let taken = next + 1..=next + versions;
                next += versions;
                (begin, end, taken, commits)
            }).collect();
            let mut gaps = Gaps::begin(seen_before, []);
            let mut delivered = BTreeSet::new();
            for now in 0..200 {
                gaps = gaps.to_string().parse().expect("its own text");
                let visible: BTreeSet<i64> = opened.iter().filter(|(_, end, _, commits)| *commits && *end <= now)
                    .flat_map(|(_, _, taken, _)| taken.clone()).collect();
                let missing = gaps.missing();
                let found: BTreeSet<_> = visible.iter().copied()
                    .filter(|version| *version > gaps.highest() || missing.iter().any(|gap| gap.contains(version))).collect();
                delivered.extend(found.iter().copied());
                gaps.seen(&found);
                let due = gaps.look();
                for gap in due {
                    let held = opened.iter().any(|(begin, end, taken, _)| *begin <= now && now < *end
                        && taken.clone().any(|version| gap.contains(&version)));
                    if !held {
                        gaps.nobody_holds(&gap);
                    }
                }
                prop_assert!(gaps.missing().len() <= MAX);
            }
            let committed: BTreeSet<i64> = opened.iter().filter(|transaction| transaction.3)
                .flat_map(|(_, _, taken, _)| taken.clone()).collect();
            prop_assert_eq!(delivered, committed);
            prop_assert_eq!(gaps.missing(), Vec::new());
        }
    }
}
