//! What is stored: an [`Entry`], the bytes that are sent or "absent", and its form in Redis.
//!
//! Owns the ETag (made once, when the entry is made) and the envelope around stored bytes. Invariant: bytes that are
//! not exactly what `encode` wrote for this key, by this version, are a miss and never an answer.

use bytes::{BufMut, Bytes, BytesMut};
use sha2::{Digest, Sha256};

use super::Key;

/// The answer for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// There is one.
    Found(Body),
    /// There is none.
    Absent,
}

/// The bytes that are sent, and what HTTP says about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// The response body.
    pub bytes: Bytes,
    /// Strong entity tag with its quotes: 128 bits of the body's SHA-256, so the same on every instance.
    pub etag: Bytes,
    /// `Last-Modified` as an HTTP date, if known.
    pub last_modified: Option<Bytes>,
}

impl Body {
    /// Hashes the bytes into an ETag.
    pub fn new(bytes: Bytes, last_modified: Option<Bytes>) -> Self {
        let etag = etag([&bytes[..]]);
        Self { bytes, etag, last_modified }
    }
}

impl Entry {
    /// Bytes it holds.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Absent => 0,
            Self::Found(body) => body.bytes.len() + ETAG + body.last_modified.as_ref().map_or(0, Bytes::len),
        }
    }
}

/// A strong entity tag of these parts, in this order.
pub fn etag<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let mut hash = Sha256::new();
    parts.into_iter().for_each(|part| hash.update(part));
    let mut etag = String::with_capacity(ETAG);
    etag.push('"');
    for byte in &hash.finalize()[..16] {
        etag.push_str(&format!("{byte:02x}"));
    }
    etag.push('"');
    etag.into()
}

/// First byte of an envelope. A later format takes another one, and each program treats the other's as a miss.
const VERSION: u8 = 1;
const FOUND: u8 = 1;
const ABSENT: u8 = 0;
const CHECKSUM: usize = 8;
const ETAG: usize = 34;

/// Envelope: version, found or absent, checksum (8 bytes of SHA-256 over the key and all that follows); if found, the
/// length of the date (1), the date, ETag (34), body.
pub(super) fn encode(key: &Key, entry: &Entry) -> Bytes {
    let mut envelope = BytesMut::new();
    match entry {
        Entry::Absent => envelope.put_slice(&[VERSION, ABSENT, 0, 0, 0, 0, 0, 0, 0, 0]),
        Entry::Found(body) => {
            let date = body.last_modified.as_deref().unwrap_or_default();
            envelope.reserve(2 + CHECKSUM + 1 + entry.len());
            envelope.put_slice(&[VERSION, FOUND, 0, 0, 0, 0, 0, 0, 0, 0]);
            envelope.put_u8(date.len() as u8); // an HTTP date has 29 characters
            envelope.put_slice(date);
            envelope.put_slice(&body.etag);
            envelope.put_slice(&body.bytes);
        }
    }
    let sum = checksum(key, envelope[1], &envelope[2 + CHECKSUM..]);
    envelope[2..2 + CHECKSUM].copy_from_slice(&sum);
    envelope.freeze()
}

/// The entry in an envelope; `None` if it is of another version, of another key, or damaged.
pub(super) fn decode(key: &Key, envelope: Bytes) -> Option<Entry> {
    let (head, rest) = envelope.split_at_checked(2 + CHECKSUM)?;
    if head[0] != VERSION || head[2..] != checksum(key, head[1], rest) {
        return None;
    }
    match head[1] {
        ABSENT => rest.is_empty().then_some(Entry::Absent),
        FOUND => {
            let (date_length, rest) = rest.split_first()?;
            let (date, rest) = rest.split_at_checked(usize::from(*date_length))?;
            let (etag, bytes) = rest.split_at_checked(ETAG)?;
            let part = |part: &[u8]| envelope.slice_ref(part);
            let last_modified = Some(part(date)).filter(|date| !date.is_empty());
            Some(Entry::Found(Body { bytes: part(bytes), etag: part(etag), last_modified }))
        }
        _ => None,
    }
}

fn checksum(key: &Key, tag: u8, rest: &[u8]) -> [u8; CHECKSUM] {
    let hash = Sha256::new().chain_update(key.to_string()).chain_update([tag]).chain_update(rest).finalize();
    let mut sum = [0; CHECKSUM];
    sum.copy_from_slice(&hash[..CHECKSUM]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key::new("product", 680);

    fn found() -> Entry {
        Entry::Found(Body::new(
            Bytes::from_static(b"{\"productID\":680}"),
            Some(Bytes::from_static(b"Tue, 11 Mar 2008 10:01:36 GMT")),
        ))
    }

    #[test]
    fn an_envelope_gives_back_what_went_in() {
        let undated = Entry::Found(Body::new(Bytes::new(), None));
        for entry in [found(), undated, Entry::Absent] {
            assert_eq!(decode(&KEY, encode(&KEY, &entry)), Some(entry));
        }
    }

    #[test]
    fn the_etag_is_of_the_body_alone_and_equal_everywhere() {
        let Entry::Found(body) = found() else { unreachable!() };
        assert_eq!(body.etag, "\"9be5298e1ab87d78c17fd6d885b117b9\""); // sha256sum of the bytes
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
