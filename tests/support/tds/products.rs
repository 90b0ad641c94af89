//! What SQL Server would answer: a table of products, and change tracking on it, behind the TDS stand-in.
//!
//! Reads the statements that the product cache sends only as far as its meaning depends on them: which columns and how
//! they are cast, which keys, and in which order the functions of change tracking are called.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use super::{Answer, Cell, Column, Query, Table, Type};

/// A column's type in the table, and whether it can be NULL.
pub type Types = BTreeMap<&'static str, (Type, bool)>;

/// The types of SalesLT.Product.
#[rustfmt::skip] // a table reads as a table
pub fn product_types() -> Types {
    BTreeMap::from([
        ("ProductID", (Type::Int(4), false)),
        ("Name", (Type::NVarchar(50), false)),
        ("ProductNumber", (Type::NVarchar(25), false)),
        ("Color", (Type::NVarchar(15), true)),
        ("StandardCost", (Type::Money(8), false)),
        ("ListPrice", (Type::Money(8), false)),
        ("Size", (Type::NVarchar(5), true)),
        ("Weight", (Type::Decimal(8, 2), true)),
        ("ProductCategoryID", (Type::Int(4), true)),
        ("ProductModelID", (Type::Int(4), true)),
        ("SellStartDate", (Type::DateTime(8), false)),
        ("SellEndDate", (Type::DateTime(8), true)),
        ("DiscontinuedDate", (Type::DateTime(8), true)),
        ("ThumbNailPhoto", (Type::VarBinary(0), true)),
        ("ThumbnailPhotoFileName", (Type::NVarchar(50), true)),
        ("rowguid", (Type::Guid, false)),
        ("ModifiedDate", (Type::DateTime(8), false)),
    ])
}

/// A row: the cells that are not NULL.
pub type Row = BTreeMap<&'static str, Cell>;

/// A product as it is when nobody cares what it is.
pub fn product(id: i64) -> Row {
    Row::from([
        ("ProductID", Cell::Int(id)),
        ("Name", format!("Product {id}").as_str().into()),
        ("ProductNumber", "P".into()),
        ("StandardCost", Cell::Digits(10_000)),
        ("ListPrice", Cell::Digits(20_000)),
        ("SellStartDate", Cell::DateTime(37_406, 0)),
        ("rowguid", Cell::Guid("43dd68d6-14a4-461f-9069-55309d90ea7e")),
        ("ModifiedDate", Cell::DateTime(39_515, 0)),
    ])
}

/// The rows of `rows` whose keys a query names, with the columns that it names.
pub fn select(query: &Query, types: &Types, rows: &[Row]) -> Table {
    let list = query.sql.strip_prefix("SELECT ").and_then(|sql| sql.split_once(" FROM "));
    let (list, rest) = list.unwrap_or_else(|| panic!("a SELECT: {}", query.sql));
    let key = rest.split_once("WHERE [").and_then(|(_, rest)| rest.split_once(']')).expect("a key").0;
    let mut columns = Vec::new();
    for (start, _) in list.match_indices('[') {
        let (name, after) = list[start + 1..].split_once(']').expect("a name in brackets");
        let (native, nullable) = types[name];
        let scale = after.strip_prefix(" AS decimal(38, ").filter(|_| list[..start].ends_with("CAST("));
        let cast = scale.and_then(|scale| scale.split_once(')')?.0.parse().ok());
        let column = match cast {
            Some(scale) => Column { name: String::new(), kind: Type::Decimal(38, scale), nullable: true },
            None => Column { name: name.to_owned(), kind: native, nullable },
        };
        columns.push((name, native, column));
    }
    let asked = rows.iter().filter(|row| match row.get(key) {
        Some(Cell::Int(key)) => query.parameters.contains(key),
        Some(Cell::Digits(key)) => query.parameters.iter().any(|asked| i128::from(*asked) == *key),
        _ => panic!("a row without a key"),
    });
    let cells = asked.map(|row| {
        let cell = |(name, native, column): &(&str, Type, Column)| {
            cast(row.get(name).cloned().unwrap_or(Cell::Null), *native, column.kind)
        };
        columns.iter().map(cell).collect()
    });
    Table { rows: cells.collect(), columns: columns.into_iter().map(|(_, _, column)| column).collect() }
}

fn cast(cell: Cell, from: Type, to: Type) -> Cell {
    let scale = |kind| match kind {
        Type::Money(_) => 4,
        Type::Decimal(_, scale) => u32::from(scale),
        _ => 0,
    };
    match cell {
        Cell::Digits(digits) if scale(to) > scale(from) => Cell::Digits(digits * 10_i128.pow(scale(to) - scale(from))),
        Cell::Digits(digits) if scale(to) < scale(from) => {
            let divisor = 10_i128.pow(scale(from) - scale(to));
            Cell::Digits((digits + digits.signum() * divisor / 2) / divisor)
        }
        cell => cell,
    }
}

/// Answers with these products.
pub fn products(rows: Vec<Row>) -> impl Fn(&Query) -> Answer + Send + Sync + 'static {
    let types = product_types();
    move |query| Answer::Tables(vec![select(query, &types, &rows)])
}

/// Change tracking as it is now.
#[derive(Clone, Debug)]
pub struct Tracking {
    /// `None`: off.
    pub latest: Option<i64>,
    /// `None`: no permission.
    pub first_known: Option<i64>,
    pub created: &'static str,
    /// Version and key.
    pub changes: Vec<(i64, i64)>,
    /// What others do right before CHANGETABLE is read.
    pub meanwhile: Option<fn(&mut Tracking)>,
}

impl Default for Tracking {
    fn default() -> Self {
        let created = "2026-01-02T03:04:05.677";
        Self { latest: Some(10), first_known: Some(0), created, changes: Vec::new(), meanwhile: None }
    }
}

/// Change tracking, shared with the server that tells of it.
pub type Tracked = Arc<Mutex<Tracking>>;

/// Answers queries of the change feed.
pub fn tracking(tracked: &Tracked) -> impl Fn(&Query) -> Answer + Send + Sync + 'static {
    let tracked = tracked.clone();
    move |query| Answer::Tables(tracked.lock().unwrap().answer(query))
}

impl Tracking {
    /// Carries the functions out in the order in which the batch calls them.
    fn answer(&mut self, query: &Query) -> Vec<Table> {
        let calls = ["CHANGE_TRACKING_CURRENT_VERSION()", "CHANGETABLE(CHANGES", "CHANGE_TRACKING_MIN_VALID_VERSION("];
        let mut calls: Vec<_> =
            calls.iter().enumerate().filter_map(|(what, call)| Some((query.sql.find(call)?, what))).collect();
        calls.sort_unstable();
        let (mut latest, mut first_known) = (None, None);
        let mut tables = Vec::new();
        for (_, what) in calls {
            match what {
                0 => latest = self.latest,
                1 => {
                    if let Some(meanwhile) = self.meanwhile.take() {
                        meanwhile(self);
                    }
                    tables.push(self.changed(query));
                }
                _ => first_known = self.first_known,
            }
        }
        let cell = |number: Option<i64>| number.map_or(Cell::Null, Cell::Int);
        let row = vec![cell(latest), cell(first_known), self.created.into()];
        tables.push(table(&[Type::Int(8), Type::Int(8), Type::NVarchar(30)], vec![row]));
        tables
    }

    fn changed(&self, query: &Query) -> Table {
        let [since] = query.parameters[..] else { panic!("one parameter: {query:?}") };
        let top = query.sql.split_once("TOP (").and_then(|(_, rest)| rest.split_once(')')).expect("a bound").0;
        // One row per key, with its last version.
        let last: BTreeMap<_, _> = self.changes.iter().map(|(version, key)| (*key, *version)).collect();
        let mut changed: Vec<_> = last.into_iter().filter(|(_, version)| *version > since).collect();
        changed.sort_unstable_by_key(|(key, version)| (*version, *key));
        changed.truncate(top.parse().expect("a number"));
        let rows = changed.into_iter().map(|(key, version)| vec![Cell::Int(version), Cell::Int(key)]);
        table(&[Type::Int(8), Type::Int(4)], rows.collect())
    }
}

/// A table whose columns have no names and can be NULL.
pub fn table(kinds: &[Type], rows: Vec<Vec<Cell>>) -> Table {
    let column = |kind: &Type| Column { name: String::new(), kind: *kind, nullable: true };
    Table { columns: kinds.iter().map(column).collect(), rows }
}
