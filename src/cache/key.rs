//! What entries are stored under.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

/// What an entry is stored under: a kind of thing and its number. Written `product:680`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub(super) kind: &'static str,
    pub(super) id: i64,
}

impl Key {
    /// The key of one thing.
    pub const fn new(kind: &'static str, id: i64) -> Self {
        Self { kind, id }
    }

    /// The number alone.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Reads what `Display` writes, if the kind is one of `kinds`.
    pub(super) fn parse(text: &str, kinds: &[&'static str]) -> Option<Self> {
        let (kind, id) = text.split_once(':')?;
        Some(Self { kind: kinds.iter().find(|known| **known == kind)?, id: id.parse().ok()? })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Piece by piece: it is made for every look into Redis.
        f.write_str(self.kind)?;
        f.write_str(":")?;
        f.write_str(itoa::Buffer::new().format(self.id))
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Ids alone spread well; equality still compares the kind.
        state.write_i64(self.id);
    }
}
