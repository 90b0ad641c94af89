//! The Functions host's envelope around a trigger: which rows changed, and what the host wants to hear back.
//!
//! The rows arrive as JSON inside a JSON string inside a JSON string (the extension writes one, the host another); a
//! manual invocation adds one more. Only primary keys are read: rows are skipped over, photos and all. Invariant: no
//! input panics, and one unreadable row does not hide the readable ones.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Strings inside strings that are opened: two from the host, one more from a manual invocation, one to spare.
const MOST_LEVELS: usize = 4;

/// What a trigger's batch says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Primary keys of the changed rows, without duplicates.
    pub(super) keys: BTreeSet<i64>,
    /// Rows without a readable primary key.
    pub(super) unreadable: usize,
}

/// Reads the binding `binding` of a trigger invocation, whose rows have the primary key `column`.
///
/// Takes the rows of SQL and MySQL triggers alike: an array of `{"Operation": …, "Item": {…}}`, of which only the key
/// in `Item` counts (a deleted row has nothing else, and an inserted one ends a cached "absent").
pub(super) fn changes(body: &[u8], binding: &str, column: &str) -> Result<Changes, String> {
    #[derive(Deserialize)]
    struct Envelope<'a> {
        #[serde(borrow, rename = "Data")]
        data: Members<'a>,
    }
    let malformed = |what: &str, error: serde_json::Error| {
        // serde_json's own words may quote the payload; its place does not.
        format!("{what} is not what a trigger sends (line {}, column {})", error.line(), error.column())
    };
    let envelope: Envelope<'_> = serde_json::from_slice(body).map_err(|error| malformed("the body", error))?;
    let value = envelope.data.get(binding).ok_or_else(|| format!("Data.{binding} is missing"))?;
    let mut rows = Cow::Borrowed(value.get());
    for _ in 0..MOST_LEVELS {
        if !rows.starts_with('"') {
            break;
        }
        rows = Cow::Owned(serde_json::from_str(&rows).map_err(|error| malformed("a string in Data", error))?);
    }
    let rows: Vec<&RawValue> =
        serde_json::from_str(&rows).map_err(|error| malformed(&format!("Data.{binding}"), error))?;
    let mut changes = Changes::default();
    for row in rows {
        match member(row, "Item").and_then(|item| number(member(item, column)?)) {
            Some(key) => drop(changes.keys.insert(key)),
            None => changes.unreadable += 1,
        }
    }
    Ok(changes)
}

/// An object's members, unread.
type Members<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

/// The member of this name, in whatever case; `None` if there is no such member or no object.
fn member<'a>(object: &'a RawValue, name: &str) -> Option<&'a RawValue> {
    let members: Members<'a> = serde_json::from_str(object.get()).ok()?;
    members.into_iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// A whole number, as a number or as text.
fn number(value: &RawValue) -> Option<i64> {
    let number = serde_json::from_str(value.get()).ok();
    number.or_else(|| serde_json::from_str::<Cow<'_, str>>(value.get()).ok()?.parse().ok())
}

/// What the host takes for success: an object, never an empty body, which would hang the invocation.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Reply {
    outputs: serde_json::Map<String, serde_json::Value>,
    logs: Vec<String>,
    return_value: Option<()>,
}

impl Reply {
    /// A success that the host logs these lines for.
    pub(super) fn new(logs: Vec<String>) -> Self {
        Self { outputs: serde_json::Map::new(), logs, return_value: None }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// An invocation whose rows are wrapped in `levels` strings.
    fn body(rows: &Value, levels: usize) -> Vec<u8> {
        let changes = (0..levels).fold(rows.clone(), |value, _| Value::String(value.to_string()));
        json!({"Data": {"changes": changes}, "Metadata": {"sys": {"MethodName": "InvalidateCache"}}}).to_string().into()
    }

    fn read(body: &[u8]) -> Result<Changes, String> {
        changes(body, "changes", "ProductID")
    }

    fn keys(keys: &[i64]) -> Changes {
        Changes { keys: keys.iter().copied().collect(), unreadable: 0 }
    }

    #[test]
    fn zero_to_four_levels_of_string_are_opened_and_no_more() {
        let rows = json!([{"Operation": 0, "Item": {"ProductID": 680, "Name": "24\" \\ \u{2028} é"}}]);
        for levels in 0..=4 {
            assert_eq!(read(&body(&rows, levels)), Ok(keys(&[680])), "{levels} levels");
        }
        assert!(read(&body(&rows, 5)).is_err());
    }

    #[test]
    fn only_the_key_counts_whatever_the_operation_and_the_trigger() {
        let rows = json!([
            {"Operation": 0, "Item": {"ProductID": 1, "Name": "inserted", "ThumbNailPhoto": "R0lGODlh", "Extra": [{"ProductID": 9}]}},
            {"Operation": 1, "Item": {"Name": "updated", "ProductID": 2}},
            {"Operation": 2, "Item": {"ProductID": 3}},
            {"Operation": 7, "Item": {"productid": 4}},
            {"Operation": "Update", "Item": {"ProductID": "5"}},
            {"Item": {"ProductID": 6, "az_func_updated_at": "2026-01-01 00:00:00", "_az_func_AttemptCount": 1}},
            {"Operation": 1, "Item": {"ProductID": 1}, "More": null},
        ]);
        assert_eq!(read(&body(&rows, 2)), Ok(keys(&[1, 2, 3, 4, 5, 6])));
        assert_eq!(read(&body(&json!([]), 2)), Ok(keys(&[])));
    }

    #[test]
    fn unreadable_rows_are_counted_and_hide_no_others() {
        let rows = json!([
            {"Item": {"ProductID": 1}}, {"Item": {"Name": "no key"}}, {"Item": null}, {}, null, 5, -5, 1.5, "x", true, [1],
            {"Item": {"ProductID": null}}, {"Item": {"ProductID": 1.5}}, {"Item": {"ProductID": {"a": 1}}},
            {"Item": {"ProductID": 2}},
        ]);
        assert_eq!(read(&body(&rows, 2)), Ok(Changes { keys: [1, 2].into(), unreadable: 13 }));
        let deep = format!("{}{}", "[".repeat(5_000), "]".repeat(5_000));
        for key in ["1e999", "99999999999999999999", &deep] {
            let rows =
                format!("[{{\"Item\":{{\"ProductID\":{key}}}}},{{\"Item\":{{\"Deep\":{deep},\"ProductID\":2}}}}]");
            let body = json!({"Data": {"changes": rows}}).to_string();
            assert_eq!(read(body.as_bytes()), Ok(Changes { keys: [2].into(), unreadable: 1 }), "{:.30}", key);
        }
    }

    #[test]
    fn junk_is_an_error_that_quotes_nothing_of_it() {
        for junk in [
            &b""[..],
            b"{",
            b"null",
            b"[]",
            b"{}",
            br#"{"Data":null}"#,
            br#"{"Data":{}}"#,
            br#"{"Data":{"other":"[]"}}"#,
            br#"{"Data":{"changes":"secret"}}"#,
            br#"{"Data":{"changes":{"secret":1}}}"#,
            br#"{"Data":{"changes":"[1"}}"#,
            br#"{"Data":{"changes":"[] secret"}}"#,
            br#"{"Data":{"changes":null}}"#,
            b"\xff\xfe",
            b"{\"Data\":{\"changes\":\"\xff\"}}",
        ] {
            let error = read(junk).expect_err(&String::from_utf8_lossy(junk));
            assert!(!error.contains("secret"), "{error}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,20}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            let name = prop_oneof!["Item", "ProductID", "Operation", "\\PC{0,8}"];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(name, inner, 0..6).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
        }

        #[test]
        fn any_json_is_read_or_refused_without_a_panic(json in any_json(), levels in 0..6_usize) {
            let _ = read(json.to_string().as_bytes());
            let _ = read(&body(&json, levels));
        }

        #[test]
        fn every_key_is_found_once_in_rows_of_any_text(
            ids in prop::collection::vec(any::<i32>(), 0..50), text in "\\PC{0,40}", levels in 0..=4_usize,
        ) {
            let rows = ids.iter().map(|id| json!({"Operation": 1, "Item": {&text: &text, "Name": &text, "ProductID": id}}));
            let changes = read(&body(&rows.collect(), levels)).expect("a well-formed batch");
            prop_assert_eq!(changes.unreadable, 0);
            prop_assert_eq!(changes.keys, ids.into_iter().map(i64::from).collect());
        }
    }
}
