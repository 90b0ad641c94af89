//! The stand-in's own proof: the bodies it delivers are the Functions host's, byte for byte.

use crate::support::host::{self, Column, Item, MySqlRow, Operation, changes, envelope, item};
use serde_json::{Value, json};

const UTC_NOW: &str = "2026-09-01T12:00:00.1234567Z";
const RAND_GUID: &str = "24ad4c06-24ad-4e5b-8294-3da9714877e9";
const INSERT: &str = r#"{"Data":{"changes":"\"[{\\\"Operation\\\":0,\\\"Item\\\":{\\\"ProductID\\\":1000,\\\"Name\\\":\\\"HL Road Frame - Black, 58\\\",\\\"ProductNumber\\\":\\\"FR-R92B-58\\\",\\\"Color\\\":\\\"Black\\\",\\\"StandardCost\\\":1059.31,\\\"ListPrice\\\":1431.5,\\\"Size\\\":\\\"58\\\",\\\"Weight\\\":1016.04,\\\"ProductCategoryID\\\":18,\\\"ProductModelID\\\":6,\\\"SellStartDate\\\":\\\"2002-06-01T00:00:00\\\",\\\"SellEndDate\\\":null,\\\"DiscontinuedDate\\\":null,\\\"ThumbNailPhoto\\\":\\\"R0lGODlh\\\",\\\"ThumbnailPhotoFileName\\\":\\\"no_image_available_small.gif\\\",\\\"rowguid\\\":\\\"43dd68d6-14a4-461f-9069-55309d90ea7e\\\",\\\"ModifiedDate\\\":\\\"2008-03-11T10:01:36.827\\\"}}]\""},"Metadata":{"sys":{"MethodName":"InvalidateCache","UtcNow":"2026-09-01T12:00:00.1234567Z","RandGuid":"24ad4c06-24ad-4e5b-8294-3da9714877e9"}}}"#;
const DELETE: &str = r#"{"Data":{"changes":"\"[{\\\"Operation\\\":2,\\\"Item\\\":{\\\"ProductID\\\":1000}}]\""},"Metadata":{"sys":{"MethodName":"InvalidateCache","UtcNow":"2026-09-01T12:00:00.1234567Z","RandGuid":"24ad4c06-24ad-4e5b-8294-3da9714877e9"}}}"#;

fn body(data: &str) -> String {
    envelope("InvalidateCache", "changes", data, UTC_NOW, RAND_GUID)
}

fn frame() -> Item {
    item(&[
        ("ProductID", Column::Int(1000)),
        ("Name", Column::Text("HL Road Frame - Black, 58")),
        ("ProductNumber", Column::Text("FR-R92B-58")),
        ("Color", Column::Text("Black")),
        ("StandardCost", Column::Decimal("1059.3100")),
        ("ListPrice", Column::Decimal("1431.5000")),
        ("Size", Column::Text("58")),
        ("Weight", Column::Decimal("1016.04")),
        ("ProductCategoryID", Column::Int(18)),
        ("ProductModelID", Column::Int(6)),
        ("SellStartDate", Column::DateTime("2002-06-01 00:00:00.000")),
        ("SellEndDate", Column::Null),
        ("DiscontinuedDate", Column::Null),
        ("ThumbNailPhoto", Column::Bytes(b"GIF89a")),
        ("ThumbnailPhotoFileName", Column::Text("no_image_available_small.gif")),
        ("rowguid", Column::Guid("43DD68D6-14A4-461F-9069-55309D90EA7E")),
        ("ModifiedDate", Column::DateTime("2008-03-11 10:01:36.827")),
    ])
}

/// Decodes text until it is no JSON text, and counts the parses.
fn decode(mut value: Value) -> (Value, usize) {
    let mut parses = 0;
    while let Some(inner) = value.as_str().and_then(|text| serde_json::from_str(text).ok()) {
        (value, parses) = (inner, parses + 1);
    }
    (value, parses)
}

#[test]
fn an_insert_is_the_golden_828_bytes() {
    let body = body(&changes(&[(Operation::Insert, frame())]));
    assert_eq!(body, INSERT);
    assert_eq!(body.len(), 828);
}

#[test]
fn an_update_differs_from_the_insert_only_by_its_number() {
    let body = body(&changes(&[(Operation::Update, frame())]));
    assert_eq!(body, INSERT.replace(r#"Operation\\\":0"#, r#"Operation\\\":1"#));
}

#[test]
fn a_delete_is_the_golden_230_bytes() {
    let body = body(&changes(&[(Operation::Delete, item(&[("ProductID", Column::Int(1000))]))]));
    assert_eq!(body, DELETE);
    assert_eq!(body.len(), 230);
}

#[test]
fn a_quote_in_a_value_arrives_behind_seven_backslashes() {
    let body = body(&changes(&[(Operation::Insert, item(&[("Name", Column::Text("24\" Frame"))]))]));
    assert!(body.contains(r#"24\\\\\\\" Frame"#), "{body}");
}

#[test]
fn only_the_three_line_separators_are_escaped_beyond_ascii() {
    let text = changes(&[(Operation::Insert, item(&[("Name", Column::Text("é 😀 \u{85}\u{2028}\u{2029}"))]))]);
    assert_eq!(text, "[{\"Operation\":0,\"Item\":{\"Name\":\"é 😀 \\u0085\\u2028\\u2029\"}}]");
    assert!(body(&text).contains(r"é 😀 \\\\u0085\\\\u2028\\\\u2029"));
}

#[test]
fn every_sql_type_has_its_text() {
    let cases = [
        (Column::Bit(true), "true"),
        (Column::Int(-1), "-1"),
        (Column::Decimal("120.0000"), "120.0"),
        (Column::Decimal("0.0000"), "0.0"),
        (Column::Decimal("-0.0100"), "-0.01"),
        (Column::DateTime("2008-03-11"), "\"2008-03-11T00:00:00\""),
        (Column::DateTime("2008-03-11 10:01:36.5000000"), "\"2008-03-11T10:01:36.5\""),
        (Column::DateTime("2008-03-11 10:20:30"), "\"2008-03-11T10:20:30\""),
        (Column::Time("10:01:36.5"), "\"10:01:36.5000000\""),
        (Column::Time("10:01:36.0000000"), "\"10:01:36\""),
        (Column::Bytes(b""), "\"\""),
        (Column::Bytes(b"a"), "\"YQ==\""),
        (Column::Bytes(b"ab"), "\"YWI=\""),
        (Column::Bytes(&[0xff, 0xfe, 0xfd]), "\"//79\""),
        (Column::Null, "null"),
    ];
    for (column, text) in cases {
        let row = item(&[("C", column.clone())]);
        assert_eq!(Value::from(row).to_string(), format!("{{\"C\":{text}}}"), "{column:?}");
    }
}

#[test]
fn a_batch_of_a_hundred_takes_three_parses() {
    let rows: Vec<_> = (0..100).map(|id| (Operation::Update, item(&[("ProductID", Column::Int(id))]))).collect();
    let body: Value = serde_json::from_str(&body(&changes(&rows))).unwrap();
    let (array, parses) = decode(body["Data"]["changes"].clone());
    assert_eq!((array.as_array().map(Vec::len), parses + 1), (Some(100), 3));
}

#[test]
fn an_admin_invocation_takes_one_parse_more_and_repeats_the_value() {
    let text = host::admin_envelope("InvalidateCache", "changes", "[]", UTC_NOW, RAND_GUID);
    let body: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(decode(body["Data"]["changes"].clone()), (json!([]), 3));
    assert_eq!(body["Metadata"]["changes"], body["Data"]["changes"]);
}

#[test]
fn a_mysql_row_is_always_operation_zero_with_the_triggers_own_columns() {
    let row = MySqlRow {
        columns: item(&[("ProductID", Column::Int(1))]),
        updated_at: "2026-09-01 12:00:00".into(),
        attempt_count: None,
        lease_expiration_time: None,
    };
    assert_eq!(
        host::mysql_changes(&[row]),
        "[{\"Operation\":0,\"Item\":{\"ProductID\":1,\"az_func_updated_at\":\"2026-09-01 12:00:00\",\
         \"_az_func_AttemptCount\":null,\"_az_func_LeaseExpirationTime\":null}}]"
    );
}

#[test]
fn a_guid_is_random_and_of_version_four() {
    let (one, other) = (host::new_guid(), host::new_guid());
    assert_ne!(one, other);
    assert_eq!(one.len(), 36);
    assert_eq!(&one[14..15], "4");
    assert!("89ab".contains(&one[19..20]), "{one}");
}

#[test]
fn the_time_has_the_shape_of_dotnet() {
    let now = host::utc_now();
    assert_eq!(now.len(), UTC_NOW.len(), "{now}");
    assert!(now.starts_with("20") && now.ends_with('Z'), "{now}");
}
