//! `GET /api/GetProductById?productid=680`: one product, or an array for several ids.
//!
//! Owns the response and its headers; what is asked for is `request`'s, and what is sent comes ready from the cache.
//! Invariant (S4): `Cache-Status` tells which level answered, and whether the answer is fresh.

mod request;

use std::{fmt::Write, time::Duration};

use actix_web::{
    HttpResponse,
    dev::RequestHead,
    http::header::{self, HeaderName, HeaderValue},
};
use bytes::{Bytes, BytesMut};

use self::request::{Asked, Wanted, max_age};
use super::{App, error::Error};
use crate::{
    cache::{Answer, Entry, Failure, How, InMemory, InRedis, Key, Level, Stale, entry::etag},
    product::{self, ProductId},
};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");

/// The answer to GET and HEAD if it takes nothing but memory: one product that is there, or a mistake in the request.
pub(super) fn at_once(app: &App, head: &RequestHead) -> Option<Result<HttpResponse, Error>> {
    match Asked::parse(head.uri.query().unwrap_or_default()) {
        Err(detail) => Some(Err(Error::BadRequest(detail.to_owned()))),
        Ok(Asked::Many(_)) => None,
        Ok(Asked::One(id)) => {
            let answer = app.cache.get(&key(id), max_age(&head.headers), &app.load)?;
            app.counts.count(&answer);
            Some(one(app, head, id, &answer, "miss"))
        }
    }
}

/// Every other answer.
pub(super) async fn later(app: &App, head: &RequestHead) -> Result<HttpResponse, Error> {
    let asked = Asked::parse(head.uri.query().unwrap_or_default());
    let asked = asked.map_err(|detail| Error::BadRequest(detail.to_owned()))?;
    let max_age = max_age(&head.headers);
    match asked {
        Asked::One(id) => {
            let forward = forward(app, &[key(id)], max_age);
            let answer = load(app, &[key(id)], max_age).await.remove(0)?;
            app.counts.count(&answer);
            one(app, head, id, &answer, forward)
        }
        Asked::Many(ids) => {
            let keys: Vec<_> = ids.iter().copied().map(key).collect();
            let forward = forward(app, &keys, max_age);
            let answers = load(app, &keys, max_age).await.into_iter().collect::<Result<Vec<_>, _>>()?;
            answers.iter().for_each(|answer| app.counts.count(answer));
            many(app, head, &answers, forward)
        }
    }
}

/// Why memory does not answer by itself, if it does not (RFC 9211, section 2.2): the request would not have what it
/// holds, or it holds nothing usable.
fn forward(app: &App, keys: &[Key], max_age: Option<Duration>) -> &'static str {
    let held = keys.iter().map(|key| app.cache.held(key, max_age));
    match held.filter(|held| *held != InMemory::Usable).max() {
        Some(InMemory::TooOld) => "request",
        Some(InMemory::Stale) => "stale",
        _ => "miss",
    }
}

fn key(id: ProductId) -> Key {
    Key::new(product::KIND, i64::from(id.number()))
}

/// Loads within the request's deadline; what is late is answered with its last known entry.
async fn load(app: &App, keys: &[Key], max_age: Option<Duration>) -> Vec<Result<Answer, Failure>> {
    let load = app.cache.get_or_load(keys, max_age, &app.load);
    match tokio::time::timeout(app.config.http.request_timeout, load).await {
        Ok(answers) => answers,
        Err(_) => {
            if let Some(unsaid) = app.late.next() {
                tracing::error!(keys = keys.len(), unsaid, "a request reached its deadline");
            }
            let late = || Failure::Unavailable("deadline".to_owned());
            let known = |key| app.cache.get(key, max_age, &app.load).or_else(|| app.cache.get_stale(key));
            keys.iter().map(|key| known(key).ok_or_else(late)).collect()
        }
    }
}

fn one(app: &App, head: &RequestHead, id: ProductId, answer: &Answer, forward: &str) -> Result<HttpResponse, Error> {
    let (entry, age_s) = (answer.entry(), answer.unverified_for().as_secs());
    let status = cache_status(answer, answer.ttl_s(), forward, "");
    let Entry::Found(body) = &entry else {
        let absent = Error::NotFound(format!("there is no product {}", id.number()));
        return Ok(with_status(absent.response(super::invocation_id(head)), status, age_s));
    };
    let mut response = match Wanted::of(&head.headers, body.etag()) {
        Wanted::Content => ok(body.share(body.bytes()), body.share(body.etag())),
        Wanted::NotAgain => not_modified(body.share(body.etag())),
        Wanted::Another => return Ok(with_status(another_version(head), status, age_s)),
    };
    if let Some(date) = body.last_modified() {
        response.headers_mut().insert(header::LAST_MODIFIED, shared_value(body.share(date)));
    }
    response.headers_mut().insert(header::CACHE_CONTROL, app.cache_control.clone());
    Ok(with_status(response, status, age_s))
}

fn many(app: &App, head: &RequestHead, answers: &[Answer], forward: &str) -> Result<HttpResponse, Error> {
    let entries: Vec<_> = answers.iter().map(Answer::entry).collect();
    let mut body = BytesMut::with_capacity(entries.iter().map(|entry| element(entry).len() + 1).sum::<usize>() + 1);
    let mut separator: &[u8] = b"[";
    for entry in &entries {
        body.extend_from_slice(separator);
        body.extend_from_slice(element(entry));
        separator = b",";
    }
    body.extend_from_slice(b"]");
    // As strong as the elements' own, which say all about their bytes, and a hundredth of the work.
    let etag = etag(entries.iter().map(|entry| match entry {
        Entry::Found(body) => body.etag(),
        Entry::Absent => b"null",
    }));

    // The whole is as fresh as its stalest part and came from as far as its farthest.
    let staleness = |stale: Option<Stale>| stale.map(|why| why == Stale::DatabaseFailed);
    let farthest = answers.iter().max_by_key(|answer| (staleness(answer.how().stale), answer.how().level));
    let ttl_s = answers.iter().map(Answer::ttl_s).min().unwrap_or(0);
    let age_s = answers.iter().map(|answer| answer.unverified_for().as_secs()).max().unwrap_or(0);
    let count = |level| answers.iter().filter(|answer| answer.how().level == level).count();
    let parts =
        format!("memory {}, redis {}, database {}", count(Level::Memory), count(Level::Redis), count(Level::Database));
    let status =
        farthest.map_or(HeaderValue::from_static("L1; hit"), |answer| cache_status(answer, ttl_s, forward, &parts));
    let mut response = match Wanted::of(&head.headers, &etag) {
        Wanted::Content => ok(body.freeze(), etag),
        Wanted::NotAgain => not_modified(etag),
        Wanted::Another => return Ok(with_status(another_version(head), status, age_s)),
    };
    response.headers_mut().insert(header::CACHE_CONTROL, app.cache_control.clone());
    Ok(with_status(response, status, age_s))
}

fn ok(body: Bytes, etag: Bytes) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, JSON))
        .insert_header((header::ETAG, shared_value(etag)))
        .body(body)
}

fn not_modified(etag: Bytes) -> HttpResponse {
    HttpResponse::NotModified().insert_header((header::ETAG, shared_value(etag))).finish()
}

fn another_version(head: &RequestHead) -> HttpResponse {
    Error::PreconditionFailed.response(super::invocation_id(head))
}

/// Adds who answered and, if it may have been for a second or more, since when the answer was not known to be right.
fn with_status(mut response: HttpResponse, cache_status: HeaderValue, age_s: u64) -> HttpResponse {
    let headers = response.headers_mut();
    if age_s > 0 {
        headers.insert(header::AGE, short_value(&[itoa::Buffer::new().format(age_s)]));
    }
    headers.insert(CACHE_STATUS, cache_status);
    response
}

/// Our own text from its parts, without the formatting machinery: it is made for every hit.
fn short_value(parts: &[&str]) -> HeaderValue {
    let (mut text, mut length) = ([0; 40], 0);
    for part in parts {
        text[length..length + part.len()].copy_from_slice(part.as_bytes());
        length += part.len();
    }
    HeaderValue::from_bytes(&text[..length]).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Our own text, made of visible ASCII.
fn shared_value(text: Bytes) -> HeaderValue {
    HeaderValue::from_maybe_shared(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// `Cache-Status` (RFC 9211): caches from the database's side to the client's, `L2` being Redis and `L1` memory.
fn cache_status(answer: &Answer, ttl_s: i64, forward: &str, parts: &str) -> HeaderValue {
    let how = answer.how();
    if how == How::MEMORY && parts.is_empty() {
        return short_value(&["L1; hit; ttl=", itoa::Buffer::new().format(ttl_s)]);
    }
    let mut status = String::with_capacity(80);
    let reason = match how.stale {
        None => "",
        Some(Stale::DatabaseFailed) => "database-failed",
        Some(Stale::DatabaseSlow) => "database-slow",
    };
    let _ = match (how.level, how.stale) {
        (Level::Memory, None) | (_, Some(_)) => write!(status, "L1; hit; ttl={ttl_s}"),
        (Level::Redis | Level::Database, None) => {
            status.push_str(match how.redis {
                InRedis::Unknown => "",
                InRedis::Fresh { .. } => "L2; hit",
                InRedis::TooOld => "L2; fwd=request, ",
                InRedis::Stale => "L2; fwd=stale, ",
                InRedis::Absent => "L2; fwd=miss, ",
            });
            if let InRedis::Fresh { ttl_s } = how.redis {
                let _ = write!(status, "; ttl={ttl_s}, ");
            }
            write!(status, "L1; fwd={forward}")
        }
    };
    if how.stored {
        status.push_str("; stored");
    }
    if how.collapsed {
        status.push_str("; collapsed");
    }
    let _ = match (reason, parts) {
        ("", "") => Ok(()),
        (reason, "") => write!(status, "; detail={reason}"),
        ("", parts) => write!(status, "; detail=\"{parts}\""),
        (reason, parts) => write!(status, "; detail=\"{reason}: {parts}\""),
    };
    HeaderValue::from_maybe_shared(Bytes::from(status)).unwrap_or_else(|_| HeaderValue::from_static("L1"))
}

/// What stands for an entry in an array.
fn element(entry: &Entry) -> &[u8] {
    match entry {
        Entry::Found(body) => body.bytes(),
        Entry::Absent => b"null",
    }
}
