//! What the engines over sqlx have in common: rows in its form → ours, its errors → the pool's.

use sqlx::{ColumnIndex, Decode, Type, error::DatabaseError};

use super::{BadRow, Error, Kind, Row, Table, Value, pool::Failure};

/// Asks for a table's key and its columns; `WHERE` follows.
pub(super) fn select(table: &Table) -> String {
    let columns: Vec<_> = table.columns.iter().map(|(name, _)| *name).collect();
    format!("SELECT {}, {} FROM {}", table.key, columns.join(", "), table.name)
}

/// A row that [`select`] asked for. `value` reads one column.
pub(super) fn row<'r, R>(
    table: &'static Table,
    row: &'r R,
    value: impl Fn(&'r R, usize, Kind) -> Result<Option<Value>, String>,
) -> Result<Result<Row, BadRow>, Error> {
    let problem = match value(row, 0, Kind::Integer) {
        Ok(Some(Value::Integer(key))) => {
            let values = table.columns.iter().enumerate().map(|(index, (column, kind))| {
                value(row, index + 1, *kind).map_err(|problem| BadRow { key, column, problem })
            });
            return Ok(values.collect::<Result<_, _>>().map(|values| Row { key, values }));
        }
        Ok(_) => "is null".to_owned(),
        Err(problem) => problem,
    };
    Err(super::unknown_key(table, &problem))
}

/// A column whose type was looked at, or can be anything.
pub(super) fn get<'r, R, T>(row: &'r R, index: usize) -> Result<T, String>
where
    R: sqlx::Row,
    usize: ColumnIndex<R>,
    T: Decode<'r, R::Database> + Type<R::Database>,
{
    row.try_get_unchecked(index).map_err(|_| "cannot be decoded".to_owned())
}

/// What a failure means for the connection; `passing` says which of the server's errors another one may not have.
pub(super) fn failure(error: sqlx::Error, passing: impl Fn(&dyn DatabaseError) -> bool) -> Failure {
    let lost = match &error {
        sqlx::Error::Database(error) => passing(&**error),
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::Tls(_) => true,
        _ => false,
    };
    let problem = problem(&error);
    if lost { Failure::Lost(problem) } else { Failure::Refused(problem) }
}

/// What went wrong, in the server's own words where it said something.
fn problem(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => error.message().to_owned(),
        error => error.to_string(),
    }
}
