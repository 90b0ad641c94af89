//! What a request for products asks for: ids, how young an answer it takes, and under which conditions.
//!
//! Knows HTTP and no cache. Invariant: what cannot be read is refused; nothing is guessed.

use std::time::Duration;

use actix_web::http::header::{self, HeaderMap};

use crate::product::ProductId;

/// Ids in one request: a hundred products with photos are some 300 kB, and one query for them takes milliseconds.
const MOST_IDS: usize = 100;
const PARAMETER: &str = "productid";

/// What a query asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    One(ProductId),
    Many(Vec<ProductId>),
}

impl Asked {
    /// Reads `productid`, in whatever case; several ids are separated by commas, or the parameter is repeated (which a
    /// forwarding host turns into the former).
    pub(super) fn parse(query: &str) -> Result<Self, &'static str> {
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

/// The oldest answer the caller accepts: `no-cache` → none that exists already; `max-age=N` → younger than N seconds.
pub(super) fn max_age(headers: &HeaderMap) -> Option<Duration> {
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
pub(super) enum Wanted {
    Content,
    /// `If-None-Match` lists the tag or is `*`: the client has it.
    NotAgain,
    /// `If-Match` lists neither the tag nor `*`.
    Another,
}

impl Wanted {
    pub(super) fn of(headers: &HeaderMap, etag: &[u8]) -> Self {
        let (mut matches, mut has) = (None, false);
        for (name, value) in headers {
            let value = value.as_bytes().trim_ascii();
            match *name {
                // Strong comparison (section 13.1.1).
                header::IF_MATCH => {
                    let is_strong = |at: &usize| !value[..*at].ends_with(b"W/");
                    *matches.get_or_insert(false) |= value == b"*" || places(value, etag).any(|at| is_strong(&at));
                }
                // Weak comparison (section 13.1.2).
                header::IF_NONE_MATCH => has |= value == b"*" || places(value, etag).next().is_some(),
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

/// Where an entity tag of ours occurs in a list: 32 hex digits in quotes, so what occurs is an element.
fn places<'a>(list: &'a [u8], etag: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    list.windows(etag.len()).enumerate().filter(move |(_, part)| *part == etag).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;
    use crate::cache::entry::etag;

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
        for other in ["\"other\"", "", text.trim_matches('"'), "\"a,*,b\"", "*, \"a\"", "\"*\""] {
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
