//! Which of this instance's notices have been acknowledged, heard, both, or neither.
//!
//! Asks nobody. Invariant: a notice that was acknowledged is heard, looked for, or known to be lost, in whatever order
//! acknowledgement and log come.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::Position;

/// Notices that are looked out for, while the log cannot be heard.
const MOST: usize = 10_000;

/// Notices that this instance appended: one that the log has passed without it was lost by a Redis that acknowledged it.
#[derive(Default)]
pub(super) struct Own {
    /// Acknowledged and not heard yet.
    pub(super) unheard: BTreeSet<Position>,
    /// Heard before the acknowledgement came.
    early: BTreeSet<Position>,
    /// Acknowledged when the log was behind them already, and not heard: to be looked for.
    pub(super) doubtful: BTreeSet<Position>,
    /// How far the log was read.
    heard: Position,
    /// When one was, last.
    pub(super) acknowledged_at: Option<Instant>,
}

impl Own {
    pub(super) fn appended(&mut self, notice: Position) {
        self.acknowledged_at = Some(Instant::now());
        if self.early.remove(&notice) {
            return;
        }
        let notices = if notice > self.heard { &mut self.unheard } else { &mut self.doubtful };
        bounded_insert(notices, notice);
    }

    /// Takes note that a notice was heard; `false` if one of ours should have come before it, or in its place.
    pub(super) fn hear(&mut self, position: Position, is_ours: bool) -> bool {
        if is_ours && !self.unheard.remove(&position) {
            bounded_insert(&mut self.early, position);
        }
        self.heard = position;
        self.unheard.first().is_none_or(|unheard| *unheard > position)
    }

    /// What is lost up to here is made up for.
    pub(super) fn forget(&mut self, upto: Position) {
        self.unheard.retain(|notice| *notice > upto);
    }

    /// What was acknowledged and is not known to be in the log.
    pub(super) fn unsettled(&self) -> BTreeSet<Position> {
        &self.unheard | &self.doubtful
    }

    /// The log goes on after `tail`, without having been heard up to there; these have been looked for.
    pub(super) fn jump(&mut self, tail: Position, looked_for: &BTreeSet<Position>) {
        let (passed, ahead) = (&self.unsettled() - looked_for).into_iter().partition(|notice| *notice <= tail);
        (self.doubtful, self.unheard, self.heard) = (passed, ahead, tail);
    }
}

fn bounded_insert(notices: &mut BTreeSet<Position>, notice: Position) {
    notices.insert(notice);
    if notices.len() > MOST {
        notices.pop_first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Position {
        Position { ms, number: 0 }
    }

    #[test]
    fn a_notice_of_ours_that_the_log_has_passed_was_lost() {
        let mut own = Own { unheard: [at(2), at(4)].into(), ..Own::default() };
        assert!((1..=5).all(|ms| own.hear(at(ms), ms % 2 == 0)));
        own.unheard.insert(at(6));
        assert!(!own.hear(at(7), false));
        own.unheard = [at(8)].into();
        assert!(!own.hear(at(8), false), "another one stands in its place");
    }

    #[test]
    fn a_notice_of_ours_acknowledged_when_the_log_has_passed_it_is_looked_for_unless_it_was_heard() {
        let mut own = Own::default();
        assert!(own.hear(at(1), true) && own.hear(at(3), false));
        own.appended(at(1));
        assert!(own.unsettled().is_empty(), "heard before its acknowledgement came");
        own.appended(at(2));
        own.appended(at(4));
        assert_eq!((&own.doubtful, &own.unheard), (&[at(2)].into(), &[at(4)].into()));
        own.jump(at(5), &[at(2)].into());
        assert_eq!(
            (&own.doubtful, own.unsettled()),
            (&[at(4)].into(), [at(4)].into()),
            "2 was looked for, 4 is passed"
        );
        own.jump(at(5), &own.unsettled());
        own.appended(at(6));
        assert_eq!(own.unheard, [at(6)].into());
    }
}
