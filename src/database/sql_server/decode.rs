//! Columns of SQL Server → [`Value`], and the list of columns that makes that exact.
//!
//! Knows what the driver gives for each type. Invariant: no value passes through a float.

use chrono::{Days, NaiveDate, NaiveDateTime, TimeDelta};
use rust_decimal::Decimal;
use tiberius::{ColumnData, numeric::Numeric};

use crate::database::{BadRow, Error, Kind, Row, Table, Value, rescaled, unknown_key};

/// The columns to ask for: the key, then those of the table.
pub(super) fn select_list(table: &Table) -> String {
    let columns = table.columns.iter().map(|(name, kind)| match kind {
        // The driver reads money as a float. 38 digits hold any money and round none.
        Kind::Decimal(scale) => format!("CAST([{name}] AS decimal(38, {scale}))"),
        _ => format!("[{name}]"),
    });
    std::iter::once(format!("[{}]", table.key)).chain(columns).collect::<Vec<_>>().join(", ")
}

/// A row that was asked for by [`select_list`].
pub(super) fn row(table: &'static Table, row: tiberius::Row) -> Result<Result<Row, BadRow>, Error> {
    let mut cells = row.into_iter();
    let key = cells.next().as_ref().and_then(integer);
    let key = key.ok_or_else(|| unknown_key(table, "is not an integer"))?;
    let values = table.columns.iter().zip(cells).map(|((column, kind), cell)| {
        value(*kind, cell).map_err(|problem| BadRow { key, column, problem: problem.to_owned() })
    });
    Ok(values.collect::<Result<_, _>>().map(|values| Row { key, values }))
}

fn value(kind: Kind, cell: ColumnData<'static>) -> Result<Option<Value>, &'static str> {
    if is_null(&cell) {
        return Ok(None);
    }
    match kind {
        Kind::Integer => integer(&cell).map(Value::Integer).ok_or("is not an integer"),
        Kind::Text => match cell {
            ColumnData::String(Some(text)) => Ok(Value::Text(text.into_owned())),
            _ => Err("is not text"),
        },
        Kind::Decimal(scale) => match cell {
            ColumnData::Numeric(Some(number)) => decimal(number).and_then(|number| rescaled(number, scale)),
            _ => Err("is not a decimal"),
        },
        Kind::DateTime => date_time(&cell).map(Value::DateTime).ok_or("is not a date and time without zone"),
        Kind::Guid => match cell {
            ColumnData::Guid(Some(guid)) => Ok(Value::Guid(guid.hyphenated().to_string())),
            _ => Err("is not a uniqueidentifier"),
        },
        Kind::Binary => match cell {
            ColumnData::Binary(Some(bytes)) => Ok(Value::Binary(bytes.into_owned())),
            _ => Err("is not binary"),
        },
    }
    .map(Some)
}

fn is_null(cell: &ColumnData<'_>) -> bool {
    use ColumnData::*;
    match cell {
        U8(value) => value.is_none(),
        I16(value) => value.is_none(),
        I32(value) => value.is_none(),
        I64(value) => value.is_none(),
        F32(value) => value.is_none(),
        F64(value) => value.is_none(),
        Bit(value) => value.is_none(),
        String(value) => value.is_none(),
        Guid(value) => value.is_none(),
        Binary(value) => value.is_none(),
        Numeric(value) => value.is_none(),
        Xml(value) => value.is_none(),
        DateTime(value) => value.is_none(),
        SmallDateTime(value) => value.is_none(),
        Time(value) => value.is_none(),
        Date(value) => value.is_none(),
        DateTime2(value) => value.is_none(),
        DateTimeOffset(value) => value.is_none(),
    }
}

/// A value of an integer type.
pub(super) fn integer(cell: &ColumnData<'_>) -> Option<i64> {
    match cell {
        ColumnData::U8(value) => value.map(i64::from),
        ColumnData::I16(value) => value.map(i64::from),
        ColumnData::I32(value) => value.map(i64::from),
        ColumnData::I64(value) => *value,
        _ => None,
    }
}

fn decimal(number: Numeric) -> Result<Decimal, &'static str> {
    // SQL Server has up to 38 digits, a `Decimal` 28.
    Decimal::try_from_i128_with_scale(number.value(), number.scale().into()).map_err(|_| "has more than 28 digits")
}

fn date_time(cell: &ColumnData<'_>) -> Option<NaiveDateTime> {
    match cell {
        ColumnData::DateTime(value) => {
            let value = (*value)?;
            // Kept in 300ths of a second, and shown, by SQL Server and .NET, rounded to milliseconds: .003, .007, .01.
            let millis = (i64::from(value.seconds_fragments()) * 10 + 1) / 3;
            moment(1900, value.days().into(), TimeDelta::milliseconds(millis))
        }
        ColumnData::SmallDateTime(value) => {
            let value = (*value)?;
            moment(1900, value.days().into(), TimeDelta::minutes(value.seconds_fragments().into()))
        }
        ColumnData::DateTime2(value) => {
            let value = (*value)?;
            let nanos =
                value.time().increments().checked_mul(10_u64.checked_pow(9 - u32::from(value.time().scale()))?)?;
            moment(1, value.date().days().into(), TimeDelta::nanoseconds(nanos.try_into().ok()?))
        }
        ColumnData::Date(value) => moment(1, (*value)?.days().into(), TimeDelta::zero()),
        _ => None,
    }
}

fn moment(year: i32, days: i64, time: TimeDelta) -> Option<NaiveDateTime> {
    let first = NaiveDate::from_ymd_opt(year, 1, 1)?;
    let shift = Days::new(days.unsigned_abs());
    let day = if days < 0 { first.checked_sub_days(shift) } else { first.checked_add_days(shift) };
    day?.and_hms_opt(0, 0, 0)?.checked_add_signed(time)
}
