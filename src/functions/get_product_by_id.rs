//! `GET /api/GetProductById?productid=680`: one product, or an array for several ids.
//!
//! Owns the request (ids, freshness, conditions) and the response with its headers; what is sent comes ready from the
//! cache. Invariant (S4): `Cache-Status` tells which level answered, and whether the answer is fresh.

use std::{fmt::Write, time::Duration};

use actix_web::{
    HttpResponse,
    dev::RequestHead,
    http::header::{self, HeaderMap, HeaderName, HeaderValue},
};
use bytes::{Bytes, BytesMut};

use super::{App, error::Error};
use crate::{
    cache::{Answer, Entry, Failure, How, Key, Level, Stale, entry::etag},
    product::{self, ProductId},
};

/// Ids in one request: a hundred products with photos are some 300 kB, and one query for them takes milliseconds.
const MOST_IDS: usize = 100;
const PARAMETER: &str = "productid";
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
    let refused = max_age.is_some() && keys.iter().any(|key| app.cache.get(key, None, &app.load).is_some());
    if refused { "request" } else { "miss" }
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
            tracing::error!(keys = keys.len(), "a request reached its deadline");
            let late = || Failure::Unavailable("deadline".to_owned());
            let known = |key| app.cache.get(key, max_age, &app.load).or_else(|| app.cache.get_stale(key));
            keys.iter().map(|key| known(key).ok_or_else(late)).collect()
        }
    }
}

fn one(app: &App, head: &RequestHead, id: ProductId, answer: &Answer, forward: &str) -> Result<HttpResponse, Error> {
    let (ttl_s, age_s) = (answer.ttl_s(), answer.age().as_secs());
    let status = cache_status(app, answer, ttl_s, forward, "");
    let entry = answer.entry();
    let mut response = match &entry {
        Entry::Absent => {
            let mut response =
                Error::NotFound(format!("there is no product {}", id.number())).response(super::invocation(head));
            response.headers_mut().insert(header::AGE, HeaderValue::from(age_s));
            response.headers_mut().insert(CACHE_STATUS, status);
            return Ok(response);
        }
        Entry::Found(body) => match Wanted::of(&head.headers, body.etag()) {
            Wanted::Content => ok(body.share(body.bytes()), body.share(body.etag())),
            Wanted::NotAgain => not_modified(body.share(body.etag())),
            Wanted::Another => return Err(Error::PreconditionFailed),
        },
    };
    let headers = response.headers_mut();
    if let Entry::Found(body) = &entry
        && let Some(date) = body.last_modified()
    {
        headers.insert(header::LAST_MODIFIED, shared_value(body.share(date)));
    }
    Ok(finish(app, response, status, age_s))
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
    let farthest = answers.iter().max_by_key(|answer| (answer.how().stale.is_some(), answer.how().level));
    let ttl_s = answers.iter().map(Answer::ttl_s).min().unwrap_or(0);
    let age_s = answers.iter().map(|answer| answer.age().as_secs()).max().unwrap_or(0);
    let count = |level| answers.iter().filter(|answer| answer.how().level == level).count();
    let parts =
        format!("memory {}, redis {}, database {}", count(Level::Memory), count(Level::Redis), count(Level::Database));
    let status = farthest
        .map_or(HeaderValue::from_static("L1; hit"), |answer| cache_status(app, answer, ttl_s, forward, &parts));
    let response = match Wanted::of(&head.headers, &etag) {
        Wanted::Content => ok(body.freeze(), etag),
        Wanted::NotAgain => not_modified(etag),
        Wanted::Another => return Err(Error::PreconditionFailed),
    };
    Ok(finish(app, response, status, age_s))
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

fn finish(app: &App, mut response: HttpResponse, cache_status: HeaderValue, age_s: u64) -> HttpResponse {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, app.cache_control.clone());
    headers.insert(header::AGE, short_value(&[itoa::Buffer::new().format(age_s)]));
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
fn cache_status(app: &App, answer: &Answer, ttl_s: i64, forward: &str, parts: &str) -> HeaderValue {
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
        (Level::Redis, None) => write!(status, "L2; hit; ttl={ttl_s}, L1; fwd={forward}"),
        (Level::Database, None) if app.config.redis.is_some() => write!(status, "L2; fwd={forward}, L1; fwd={forward}"),
        (Level::Database, None) => write!(status, "L1; fwd={forward}"),
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

/// The oldest answer the caller accepts: `no-cache` → none that exists already; `max-age=N` → younger than N seconds.
fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let directives = headers.get_all(header::CACHE_CONTROL).filter_map(|value| value.to_str().ok());
    directives
        .flat_map(|value| value.split(','))
        .filter_map(|directive| {
            let (name, argument) = directive.split_once('=').unwrap_or((directive, ""));
            match name.trim() {
                name if name.eq_ignore_ascii_case("no-cache") => Some(0),
                name if name.eq_ignore_ascii_case("max-age") => argument.trim().trim_matches('"').parse().ok(),
                _ => None,
            }
        })
        .min()
        .map(Duration::from_secs)
}

/// What a request wants of content with a certain entity tag (RFC 9110, section 13.2.2).
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Content,
    /// `If-None-Match` lists the tag or is `*`: the client has it.
    NotAgain,
    /// `If-Match` lists neither the tag nor `*`.
    Another,
}

impl Wanted {
    fn of(headers: &HeaderMap, etag: &[u8]) -> Self {
        let (mut matches, mut has) = (None, false);
        for (name, value) in headers {
            let value = value.as_bytes().trim_ascii();
            match *name {
                // Strong comparison (section 13.1.1).
                header::IF_MATCH => {
                    let mut tags = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                    *matches.get_or_insert(false) |= tags.any(|tag| tag == b"*" || tag == etag);
                }
                // Weak comparison (section 13.1.2). Our tags are 32 hex digits in quotes, so one that occurs in the list
                // is an element of the list.
                header::IF_NONE_MATCH => has |= value == b"*" || value.windows(etag.len()).any(|part| part == etag),
                _ => {}
            }
        }
        match (matches, has) {
            (Some(false), _) => Self::Another,
            (_, true) => Self::NotAgain,
            (_, false) => Self::Content,
        }
    }
}

/// What a query asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    One(ProductId),
    Many(Vec<ProductId>),
}

impl Asked {
    /// Reads `productid`, in whatever case; several ids are separated by commas, or the parameter is repeated (which a
    /// forwarding host turns into the former).
    fn parse(query: &str) -> Result<Self, &'static str> {
        // As nearly all are written: nothing to decode.
        let plain = query.strip_prefix(PARAMETER).and_then(|rest| rest.strip_prefix('='));
        if let Some(id) = plain.and_then(ProductId::parse) {
            return Ok(Self::One(id));
        }
        let mut ids = Vec::new();
        match plain {
            Some(list) if list.bytes().all(|byte| byte.is_ascii_digit() || byte == b',') => add_ids(&mut ids, list)?,
            _ => {
                let pairs = url::form_urlencoded::parse(query.as_bytes());
                for (_, list) in pairs.filter(|(name, _)| name.eq_ignore_ascii_case(PARAMETER)) {
                    add_ids(&mut ids, &list)?;
                }
            }
        }
        match ids[..] {
            [] => Err("the query has no productid"),
            [id] => Ok(Self::One(id)),
            _ => Ok(Self::Many(ids)),
        }
    }
}

fn add_ids(ids: &mut Vec<ProductId>, list: &str) -> Result<(), &'static str> {
    for text in list.split(',') {
        if ids.len() == MOST_IDS {
            return Err("at most 100 ids may be asked for at once");
        }
        let id = ProductId::parse(text);
        ids.push(id.ok_or("productid must be a whole number from 1 to 2147483647, or several with commas")?);
    }
    Ok(())
}

/// What stands for an entry in an array.
fn element(entry: &Entry) -> &[u8] {
    match entry {
        Entry::Found(body) => body.bytes(),
        Entry::Absent => b"null",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(number: i32) -> ProductId {
        ProductId::parse(&number.to_string()).expect("positive")
    }

    #[test]
    fn one_id_is_one_product_and_several_are_a_batch_however_they_are_written() {
        for query in
            ["productid=680", "ProductID=680", "x=1&PRODUCTID=680&code=s", "%70roductid=68%30", "&&productid=680&"]
        {
            assert_eq!(Asked::parse(query), Ok(Asked::One(id(680))), "{query}");
        }
        for query in [
            "productid=680,706,680",
            "productid=680%2C706%2C680",
            "productid=680%2c706&ProductId=680",
            "productid=680&productid=706&productid=680",
        ] {
            assert_eq!(Asked::parse(query), Ok(Asked::Many(vec![id(680), id(706), id(680)])), "{query}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for query in [
            "",
            "productid",
            "productid=",
            "id=680",
            "productid=abc",
            "productid=1.5",
            "productid=%2B1",
            "productid=+1",
            "productid=%20680",
            "productid=680%20",
            "productid=007",
            "productid=0",
            "productid=-1",
            "productid=2147483648",
            "productid=680,",
            "productid=,680",
            "productid=680,,706",
            "productid=680&productid=",
            "productid=680;706",
            "productid=%D9%A6",
            "productid=%00",
            "productid=%FF",
            "productid=680%00",
        ] {
            assert!(Asked::parse(query).is_err(), "{query}");
        }
    }

    #[test]
    fn a_hundred_ids_are_a_batch_and_one_more_is_too_many() {
        let query =
            |count: i32| format!("productid={}", (1..=count).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
        assert!(matches!(Asked::parse(&query(100)), Ok(Asked::Many(ids)) if ids.len() == 100));
        assert!(Asked::parse(&query(101)).is_err());
    }

    #[test]
    fn request_cache_control_bounds_the_age() {
        let parse = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::CACHE_CONTROL, HeaderValue::from_static(value));
            }
            max_age(&headers).map(|age| age.as_secs())
        };
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&["no-store, only-if-cached"]), None);
        assert_eq!(parse(&["no-cache"]), Some(0));
        assert_eq!(parse(&["No-Cache"]), Some(0));
        assert_eq!(parse(&["max-age=30"]), Some(30));
        assert_eq!(parse(&["max-age = 30 , min-fresh=2"]), Some(30));
        assert_eq!(parse(&["max-age=\"30\""]), Some(30));
        assert_eq!(parse(&["max-age=30", "max-age=5"]), Some(5));
        assert_eq!(parse(&["max-age=30, no-cache"]), Some(0));
        assert_eq!(parse(&["max-age=-1"]), None);
        assert_eq!(parse(&["max-age=x"]), None);
    }

    #[test]
    fn conditions_are_compared_by_element_and_if_match_comes_first() {
        let etag = etag([&b"body"[..]]);
        let text = String::from_utf8_lossy(&etag).into_owned();
        let wanted = |conditions: &[(HeaderName, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in conditions {
                headers.append(name.clone(), HeaderValue::from_str(value).expect("a header value"));
            }
            Wanted::of(&headers, &etag)
        };
        let (weak, listed) = (format!("W/{text}"), format!("\"a\", {text} ,\"b\""));
        assert_eq!(wanted(&[]), Wanted::Content);
        for has in [&text, &weak, &listed, " * "] {
            assert_eq!(wanted(&[(header::IF_NONE_MATCH, has)]), Wanted::NotAgain, "{has}");
            for both in [["\"a\"", has], [has, "\"a\""], [has, has]] {
                assert_eq!(wanted(&both.map(|value| (header::IF_NONE_MATCH, value))), Wanted::NotAgain, "{both:?}");
            }
        }
        for other in ["\"other\"", "", text.trim_matches('"')] {
            assert_eq!(wanted(&[(header::IF_NONE_MATCH, other)]), Wanted::Content, "{other}");
            assert_eq!(wanted(&[(header::IF_MATCH, other)]), Wanted::Another, "{other}");
        }
        for same in [&text, &listed, " * "] {
            assert_eq!(wanted(&[(header::IF_MATCH, same)]), Wanted::Content, "{same}");
            for both in [["\"a\"", same], [same, "\"a\""], [same, same]] {
                assert_eq!(wanted(&both.map(|value| (header::IF_MATCH, value))), Wanted::Content, "{both:?}");
            }
            assert_eq!(wanted(&[(header::IF_MATCH, same), (header::IF_NONE_MATCH, same)]), Wanted::NotAgain);
        }
        assert_eq!(wanted(&[(header::IF_MATCH, &weak)]), Wanted::Another, "not the same byte by byte");
        assert_eq!(wanted(&[(header::IF_MATCH, "\"a\""), (header::IF_NONE_MATCH, "*")]), Wanted::Another);
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused_without_a_panic(query in "\\PC{0,200}") {
            let _ = Asked::parse(&query);
        }

        #[test]
        fn ids_come_out_as_they_went_in(numbers in prop::collection::vec(1..=i32::MAX, 1..=MOST_IDS), split in any::<bool>()) {
            let texts: Vec<_> = numbers.iter().map(i32::to_string).collect();
            let query = match split {
                true => texts.iter().map(|text| format!("ProductId={text}")).collect::<Vec<_>>().join("&"),
                false => format!("productid={}", texts.join("%2C")),
            };
            let ids = match Asked::parse(&query) {
                Ok(Asked::One(id)) => vec![id],
                Ok(Asked::Many(ids)) => ids,
                Err(problem) => panic!("{problem}"),
            };
            prop_assert_eq!(ids.into_iter().map(ProductId::number).collect::<Vec<_>>(), numbers);
        }
    }
}
