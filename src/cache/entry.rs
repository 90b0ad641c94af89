//! What is stored: an [`Entry`], the bytes that are sent or "absent", and its form in Redis.
//!
//! Owns the ETag (made once, when the entry is made) and the envelope around stored bytes. Invariant: bytes that are
//! not exactly what `encode` wrote for this key, by this version, are a miss and never an answer.

use std::ops::{Range, RangeFrom};

use bytes::{BufMut, Bytes, BytesMut};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Key;

/// The answer for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// There is one.
    Found(Body),
    /// There is none.
    Absent,
}

/// The bytes that are sent, and what HTTP says about them: one piece of memory, shared with every response.
///
/// Length of the date (1 byte), the date, ETag (34), the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    packed: Bytes,
}

impl Body {
    /// The bytes with their ETag, and their `Last-Modified` as an IMF-fixdate (RFC 9110, section 5.6.7), if known: 29
    /// characters. A text too long for one is left out.
    pub fn new(bytes: &[u8], last_modified: Option<&str>) -> Self {
        let (date, length) =
            last_modified.and_then(|date| Some((date, u8::try_from(date.len()).ok()?))).unwrap_or_default();
        let mut packed = Vec::with_capacity(1 + date.len() + ETAG + bytes.len());
        packed.push(length);
        packed.extend_from_slice(date.as_bytes());
        packed.extend_from_slice(&etag([bytes]));
        packed.extend_from_slice(bytes);
        Self { packed: packed.into() }
    }

    /// A body in its packed form, if it can be one.
    fn unpack(packed: Bytes) -> Option<Self> {
        let date = usize::from(*packed.first()?);
        (packed.len() > date + ETAG).then_some(Self { packed })
    }

    /// The response body.
    pub fn bytes(&self) -> &[u8] {
        &self.packed[self.date_end() + ETAG..]
    }

    /// Strong entity tag with its quotes: 128 bits of the body's SHA-256, so the same on every instance.
    pub fn etag(&self) -> &[u8] {
        &self.packed[self.date_end()..][..ETAG]
    }

    /// `Last-Modified` as an HTTP date, if known.
    pub fn last_modified(&self) -> Option<&[u8]> {
        Some(&self.packed[1..self.date_end()]).filter(|date| !date.is_empty())
    }

    /// A part of this, to be sent without a copy.
    pub fn share(&self, part: &[u8]) -> Bytes {
        self.packed.slice_ref(part)
    }

    fn date_end(&self) -> usize {
        1 + usize::from(self.packed[0])
    }
}

impl Entry {
    /// What has these bytes, which [`Entry::packed`] gave.
    pub(super) fn from_packed(packed: Bytes) -> Self {
        if packed.is_empty() { Self::Absent } else { Self::Found(Body { packed }) }
    }

    /// Its bytes; none for what is absent.
    pub(super) fn packed(&self) -> &[u8] {
        match self {
            Self::Absent => &[],
            Self::Found(body) => &body.packed,
        }
    }
}

/// A strong entity tag of these parts, in this order.
pub fn etag<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let mut hash = Sha256::new();
    parts.into_iter().for_each(|part| hash.update(part));
    format!("\"{:.32x}\"", hash.finalize()).into()
}

/// First byte of an envelope. A later format takes another one, and each program treats the other's as a miss.
const VERSION: u8 = 3;
const CHECKSUM: Range<usize> = 1..9;
const PACKED: RangeFrom<usize> = CHECKSUM.end..;
const ETAG: usize = 34;

/// Envelope: version; checksum (XXH3-64, big endian, seeded by the key, over all that follows); the bytes as they are in
/// memory, none for what is absent. It finds damage, not forgery: whoever may write to Redis may write anything.
pub(super) fn encode(key: &Key, entry: &Entry) -> Bytes {
    let packed = entry.packed();
    let mut envelope = BytesMut::with_capacity(CHECKSUM.end + packed.len());
    envelope.put_u8(VERSION);
    envelope.put_u64(checksum(key, packed));
    envelope.put_slice(packed);
    envelope.freeze()
}

/// The entry in an envelope; `None` if it is of another version, of another key, or damaged.
pub(super) fn decode(key: &Key, envelope: Bytes) -> Option<Entry> {
    let packed = envelope.get(PACKED)?;
    if envelope[0] != VERSION || envelope[CHECKSUM] != checksum(key, packed).to_be_bytes() {
        return None;
    }
    if packed.is_empty() { Some(Entry::Absent) } else { Body::unpack(envelope.slice(PACKED)).map(Entry::Found) }
}

fn checksum(key: &Key, packed: &[u8]) -> u64 {
    let seed = xxh3_64_with_seed(key.kind.as_bytes(), key.id as u64);
    xxh3_64_with_seed(packed, seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key::new("product", 680);

    fn found() -> Entry {
        Entry::Found(Body::new(b"{\"productID\":680}", Some("Tue, 11 Mar 2008 10:01:36 GMT")))
    }

    #[test]
    fn an_envelope_gives_back_what_went_in() {
        let undated = Entry::Found(Body::new(b"", None));
        for entry in [found(), undated, Entry::Absent] {
            assert_eq!(decode(&KEY, encode(&KEY, &entry)), Some(entry));
        }
    }

    #[test]
    fn the_etag_is_of_the_body_alone_and_equal_everywhere() {
        let Entry::Found(body) = found() else { unreachable!() };
        assert_eq!(body.etag(), b"\"9be5298e1ab87d78c17fd6d885b117b9\""); // sha256sum of the bytes
    }

    #[test]
    fn every_flipped_byte_every_cut_and_every_other_key_is_a_miss() {
        for entry in [found(), Entry::Absent] {
            let envelope = encode(&KEY, &entry);
            for index in 0..envelope.len() {
                let mut damaged = envelope.to_vec();
                damaged[index] ^= 0x20;
                assert_eq!(decode(&KEY, damaged.into()), None, "byte {index}");
                assert_eq!(decode(&KEY, envelope.slice(..index)), None, "cut at {index}");
            }
            assert_eq!(decode(&Key::new("product", 681), envelope.clone()), None);
            assert_eq!(decode(&Key::new("order", 680), envelope), None);
        }
    }
}
