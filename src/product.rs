//! A product: which ids there are, which columns are read, and the JSON that clients get.
//!
//! Owns the shape of `SalesLT.Product` as this service shows it. Must not know the cache: `functions` joins the two.
//! Invariant: the same row gives the same bytes on every instance and from every engine.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use chrono::NaiveDateTime;
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::database::{self, Database, Kind, Table, Value};

/// Name of the entity in cache keys.
pub const KIND: &str = "product";

/// `SalesLT.Product` as it is read: 17 columns, in the order of the JSON.
#[rustfmt::skip] // a table reads as a table
pub static TABLE: Table = Table {
    name: "product",
    sql_server_name: "SalesLT.Product",
    key: "ProductID",
    columns: &[
        ("ProductID", Kind::Integer),
        ("Name", Kind::Text),
        ("ProductNumber", Kind::Text),
        ("Color", Kind::Text),
        ("StandardCost", Kind::Decimal(4)), // money
        ("ListPrice", Kind::Decimal(4)),    // money
        ("Size", Kind::Text),
        ("Weight", Kind::Decimal(2)),       // decimal(8,2)
        ("ProductCategoryID", Kind::Integer),
        ("ProductModelID", Kind::Integer),
        ("SellStartDate", Kind::DateTime),
        ("SellEndDate", Kind::DateTime),
        ("DiscontinuedDate", Kind::DateTime),
        ("ThumbNailPhoto", Kind::Binary),
        ("ThumbnailPhotoFileName", Kind::Text),
        ("rowguid", Kind::Guid),
        (MODIFIED, Kind::DateTime),
    ],
};
const MODIFIED: &str = "ModifiedDate";

/// A product's id: 1 to 2,147,483,647 (SQL `int`, positive).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProductId(i32);

impl ProductId {
    /// Reads the one spelling of an id: decimal digits without sign, blanks or leading zeros. `None` for all else, so
    /// that one product has one URL and one cache key.
    pub fn parse(text: &str) -> Option<Self> {
        let canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
        // An empty text fails to parse; more than i32 holds, too.
        text.parse().ok().filter(|_| canonical).map(Self)
    }

    /// The id as a number.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// A product as it is sent: the JSON object, made once.
pub struct Product {
    /// Its id.
    pub id: i64,
    /// UTF-8 JSON.
    pub json: Bytes,
    /// Column `ModifiedDate`, taken as UTC.
    pub modified: Option<NaiveDateTime>,
}

/// Reads the products with these ids in one query; ids without a product are left out.
pub async fn load(database: &Database, ids: &[i64]) -> Result<Vec<Result<Product, database::BadRow>>, database::Error> {
    let rows = database.rows(&TABLE, ids).await?;
    Ok(rows.into_iter().map(|row| row.map(|row| Product::from_row(&row))).collect())
}

impl Product {
    fn from_row(row: &database::Row) -> Self {
        let json = serde_json::to_vec(&Json(row)).unwrap_or_else(|error| unreachable!("values only: {error}"));
        let modified = match row.values.last() {
            Some(Some(Value::DateTime(modified))) => Some(*modified),
            _ => None,
        };
        Self { id: row.key, json: json.into(), modified }
    }
}

/// A row as a JSON object: column names with the first letter in lower case, NULL as `null`.
struct Json<'a>(&'a database::Row);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_map(Some(TABLE.columns.len()))?;
        for ((column, _), value) in TABLE.columns.iter().zip(&self.0.values) {
            let (first, rest) = column.split_at(1);
            object.serialize_entry(&format!("{}{rest}", first.to_ascii_lowercase()), &value.as_ref().map(JsonValue))?;
        }
        object.end()
    }
}

struct JsonValue<'a>(&'a Value);

impl Serialize for JsonValue<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Integer(number) => number.serialize(serializer),
            Value::Text(text) | Value::Guid(text) => text.serialize(serializer),
            // Digit by digit as stored; a float would lose trailing zeros and, above 15 digits, the value.
            Value::Decimal(decimal) => serde_json::value::RawValue::from_string(decimal.to_string())
                .map_err(serde::ser::Error::custom)?
                .serialize(serializer),
            Value::DateTime(moment) => date_time(moment).serialize(serializer),
            Value::Binary(bytes) => STANDARD.encode(bytes).serialize(serializer),
        }
    }
}

/// `2002-06-01T00:00:00`, with as many digits of the second as are not trailing zeros.
fn date_time(moment: &NaiveDateTime) -> String {
    let text = moment.format("%Y-%m-%dT%H:%M:%S%.9f").to_string();
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_spelling_of_an_id_is_an_id() {
        for (text, id) in [("1", 1), ("680", 680), ("2147483647", i32::MAX)] {
            assert_eq!(ProductId::parse(text).map(ProductId::number), Some(id), "{text:?}");
        }
        for text in
            ["", "0", "007", "-1", "+1", " 680", "680 ", "1.5", "1e3", "abc", "2147483648", "٦٨٠", "6_80", "0x1"]
        {
            assert_eq!(ProductId::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn fractions_of_a_second_lose_their_trailing_zeros_and_nothing_else() {
        let moment = |nanos| {
            let day =
                chrono::NaiveDate::from_ymd_opt(2008, 3, 10).and_then(|day| day.and_hms_nano_opt(10, 0, 0, nanos));
            date_time(&day.expect("a moment"))
        };
        assert_eq!(moment(0), "2008-03-10T10:00:00");
        assert_eq!(moment(510_000_000), "2008-03-10T10:00:00.51");
        assert_eq!(moment(827_000_000), "2008-03-10T10:00:00.827");
        assert_eq!(moment(7_000_000), "2008-03-10T10:00:00.007");
        assert_eq!(moment(123_456_700), "2008-03-10T10:00:00.1234567");
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_id_is_written_as_it_was_read(text in "\\PC{0,12}|[0-9]{0,11}") {
            if let Some(id) = ProductId::parse(&text) {
                assert_eq!(id.number().to_string(), text);
            }
        }
    }
}
