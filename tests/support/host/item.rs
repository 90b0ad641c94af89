//! The JSON of change-tracking rows: SQL values to `Item`, rows to the array string a trigger carries.
//!
//! It owns the type table of the SQL extension (value → Newtonsoft → `JObject`, so decimals are doubles and dates lose
//! trailing zeros) and Newtonsoft's escaping. It does not know the envelope. Column order is the order given.

use serde_json::{Map, Value, json};

/// One row's columns as JSON, in order.
pub type Item = Map<String, Value>;

/// The change as the SQL extension numbers it: 0, 1, 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Insert,
    Update,
    Delete,
}

/// A column value as SQL Server holds it. Numbers, dates and times are given as SQL text.
#[derive(Debug, Clone, PartialEq)]
pub enum Column<'a> {
    Null,
    /// int, smallint, bigint.
    Int(i64),
    Bit(bool),
    /// money, decimal, numeric, float: `1431.5000`.
    Decimal(&'a str),
    /// nvarchar. One that looks like an ISO date is left alone, though the host may reformat it.
    Text(&'a str),
    /// datetime, datetime2, date: `2008-03-11 10:01:36.827`, or only the date.
    DateTime(&'a str),
    /// time: `10:01:36.8270000`.
    Time(&'a str),
    /// uniqueidentifier, in any case.
    Guid(&'a str),
    /// varbinary, rowversion.
    Bytes(&'a [u8]),
}

/// The `Item` of a row.
///
/// # Panics
/// If a decimal is no number, or so large or small that .NET would write an exponent (≥ 1e15, < 1e-4).
pub fn item(columns: &[(&str, Column<'_>)]) -> Item {
    columns.iter().map(|(name, value)| ((*name).to_string(), column(value))).collect()
}

fn column(value: &Column<'_>) -> Value {
    match value {
        Column::Null => Value::Null,
        Column::Int(number) => json!(number),
        Column::Bit(bit) => json!(bit),
        Column::Decimal(text) => json!(double(text)),
        Column::Text(text) => json!(text),
        Column::DateTime(text) => json!(date_time(text)),
        Column::Time(text) => json!(time(text)),
        Column::Guid(text) => json!(text.to_lowercase()),
        Column::Bytes(bytes) => json!(base64(bytes)),
    }
}

fn double(text: &str) -> f64 {
    let number: f64 = text.parse().unwrap_or_else(|_| panic!("{text:?} is not a number"));
    let plain = number == 0.0 || (1e-4..1e15).contains(&number.abs());
    assert!(plain, "{text}: .NET would write this number with an exponent, which is not modelled");
    number
}

fn date_time(text: &str) -> String {
    let (date, time) = text.split_once([' ', 'T']).unwrap_or((text, "00:00:00"));
    let time = if time.contains('.') { time.trim_end_matches('0').trim_end_matches('.') } else { time };
    format!("{date}T{time}")
}

/// A `TimeSpan`: no fraction, or seven decimals.
fn time(text: &str) -> String {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.trim_end_matches('0').is_empty() { whole.into() } else { format!("{whole}.{fraction:0<7}") }
}

/// Standard alphabet, padded.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0u32, |bits, at| bits << 8 | u32::from(*group.get(at).unwrap_or(&0)));
        for at in 0..4 {
            let symbol = ALPHABET[(bits >> (18 - 6 * at) & 63) as usize] as char;
            text.push(if at <= group.len() { symbol } else { '=' });
        }
    }
    text
}

/// The array string of a SQL trigger: `[{"Operation":0,"Item":{…}},…]`, compact.
///
/// For a delete the caller passes the key columns only.
pub fn changes(changes: &[(Operation, Item)]) -> String {
    let list = changes.iter().map(|(operation, item)| json!({ "Operation": *operation as u8, "Item": item }));
    newtonsoft(&list.collect())
}

/// A row of a MySQL trigger: its columns and its lease as it was before this delivery, absent at the first.
#[derive(Debug, Clone, PartialEq)]
pub struct MySqlRow {
    pub columns: Item,
    /// `YYYY-MM-DD HH:MM:SS`.
    pub updated_at: String,
    pub attempt_count: Option<u32>,
    pub lease_expiration_time: Option<String>,
}

/// The array string of a MySQL trigger: the operation is always 0, there are no deletes, and the trigger's own columns
/// are in the Item.
pub fn mysql_changes(rows: &[MySqlRow]) -> String {
    let list = rows.iter().map(|row| {
        let mut item = row.columns.clone();
        item.insert("az_func_updated_at".into(), json!(row.updated_at));
        item.insert("_az_func_AttemptCount".into(), json!(row.attempt_count));
        item.insert("_az_func_LeaseExpirationTime".into(), json!(row.lease_expiration_time));
        json!({ "Operation": 0, "Item": item })
    });
    newtonsoft(&list.collect())
}

/// Compact JSON as Newtonsoft writes it: non-ASCII raw, except U+0085, U+2028 and U+2029.
pub(super) fn newtonsoft(value: &Value) -> String {
    let text = value.to_string();
    if !text.contains(['\u{85}', '\u{2028}', '\u{2029}']) {
        return text;
    }
    text.replace('\u{85}', "\\u0085").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}
