//! The part of SQL that both databases understand: statements with `?1`, four kinds of values, rows that outlive their query.
//!
//! Statements are written once, for SQLite; PostgreSQL gets the same text with `$1`. Numbers are 64 bits wide in both.

use std::collections::HashMap;
use std::error::Error as StdError;

use postgres::types::{IsNull, ToSql, Type, private::BytesMut};
use rusqlite::types::{ToSqlOutput, ValueRef};
use serde::{Deserialize, Serialize};

/// A value on its way into a statement.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    Null,
    Int(i64),
    Text(&'a str),
    Bytes(&'a [u8]),
}

impl From<i64> for Value<'_> {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u32> for Value<'_> {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(value: &'a str) -> Self {
        Self::Text(value)
    }
}

impl<'a> From<&'a String> for Value<'a> {
    fn from(value: &'a String) -> Self {
        Self::Text(value)
    }
}

impl<'a> From<&'a [u8; 32]> for Value<'a> {
    fn from(value: &'a [u8; 32]) -> Self {
        Self::Bytes(value)
    }
}

impl<'a, T> From<Option<T>> for Value<'a>
where
    Value<'a>: From<T>,
{
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Self::from)
    }
}

/// The values of a statement, each as [`Value`].
macro_rules! values {
    ($($value:expr),* $(,)?) => { &[$($crate::sql::Value::from($value)),*][..] };
}
pub(crate) use values;

impl rusqlite::ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match *self {
            Value::Null => ValueRef::Null,
            Value::Int(value) => ValueRef::Integer(value),
            Value::Text(value) => ValueRef::Text(value.as_bytes()),
            Value::Bytes(value) => ValueRef::Blob(value),
        }))
    }
}

impl ToSql for Value<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        match *self {
            Value::Null => Ok(IsNull::Yes),
            Value::Int(value) => value.to_sql_checked(ty, out),
            Value::Text(value) => value.to_sql_checked(ty, out),
            Value::Bytes(value) => value.to_sql_checked(ty, out),
        }
    }

    /// Which value goes with which type is found out value by value, above.
    fn accepts(_: &Type) -> bool {
        true
    }

    postgres::types::to_sql_checked!();
}

/// A value that came out of a query; in JSON null, a number, a text or `{"hex": "..."}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Cell {
    Null,
    Int(i64),
    Text(String),
    #[serde(with = "hexadecimal")]
    Bytes(Vec<u8>),
}

/// Bytes as an object with one text.
mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Hex {
        hex: String,
    }

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        Hex { hex: hex::encode(bytes) }.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(Hex::deserialize(from)?.hex).map_err(de::Error::custom)
    }
}

impl<'a> From<&'a Cell> for Value<'a> {
    fn from(cell: &'a Cell) -> Self {
        match cell {
            Cell::Null => Self::Null,
            Cell::Int(value) => Self::Int(*value),
            Cell::Text(value) => Self::Text(value),
            Cell::Bytes(value) => Self::Bytes(value),
        }
    }
}

/// One row of an answer.
#[derive(Debug)]
pub(crate) struct Row(Vec<Cell>);

impl Row {
    pub(crate) fn into_cells(self) -> Vec<Cell> {
        self.0
    }

    pub(crate) fn int(&self, column: usize) -> Result<i64, Fault> {
        self.int_or_null(column)?.ok_or_else(|| Fault::row(column, "NULL where a number must be"))
    }

    pub(crate) fn int_or_null(&self, column: usize) -> Result<Option<i64>, Fault> {
        match &self.0[column] {
            Cell::Null => Ok(None),
            Cell::Int(value) => Ok(Some(*value)),
            other => Err(Fault::row(column, format!("{other:?} where a number must be"))),
        }
    }

    pub(crate) fn u32(&self, column: usize) -> Result<u32, Fault> {
        let value = self.int(column)?;
        u32::try_from(value).map_err(|_| Fault::row(column, format!("{value} is no count")))
    }

    pub(crate) fn text(&self, column: usize) -> Result<&str, Fault> {
        self.text_or_null(column)?.ok_or_else(|| Fault::row(column, "NULL where a text must be"))
    }

    pub(crate) fn text_or_null(&self, column: usize) -> Result<Option<&str>, Fault> {
        match &self.0[column] {
            Cell::Null => Ok(None),
            Cell::Text(value) => Ok(Some(value)),
            other => Err(Fault::row(column, format!("{other:?} where a text must be"))),
        }
    }

    pub(crate) fn hash(&self, column: usize) -> Result<[u8; 32], Fault> {
        let hash = match &self.0[column] {
            Cell::Bytes(value) => value.as_slice().try_into().ok(),
            _ => None,
        };
        hash.ok_or_else(|| Fault::row(column, "no hash of 32 bytes"))
    }
}

/// What a database, or a row of it, did wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error("{}", postgres_text(.0))]
    Postgres(#[from] postgres::Error),
    #[error("column {column} of a row: {why}")]
    Row { column: usize, why: String },
    /// Nobody was asked: the last try failed a moment ago.
    #[error("the last try, a moment ago: {0}")]
    TriedJustNow(String),
}

/// The client's own text of a server's error is only "db error".
fn postgres_text(error: &postgres::Error) -> String {
    match (error.as_db_error(), StdError::source(error)) {
        (Some(server), _) => server.to_string(),
        (None, Some(cause)) => format!("{error}: {cause}"),
        (None, None) => error.to_string(),
    }
}

impl Fault {
    pub(crate) fn row(column: usize, why: impl Into<String>) -> Self {
        Self::Row { column, why: why.into() }
    }

    /// Whether the database itself said this.
    pub(crate) fn is_an_answer(&self) -> bool {
        match self {
            Self::Sqlite(_) | Self::Row { .. } => true,
            Self::Postgres(error) => error.code().is_some(),
            Self::TriedJustNow(_) => false,
        }
    }

    /// A stored word this version has no meaning for.
    pub(crate) fn unknown_word(column: usize, word: &str) -> Self {
        Self::row(column, format!("unknown word {word:?}"))
    }
}

/// PostgreSQL's statements by their text, prepared once for each connection.
pub(crate) type Prepared = HashMap<String, postgres::Statement>;

/// A transaction of either database.
pub(crate) enum Transaction<'a> {
    Sqlite(rusqlite::Transaction<'a>),
    Postgres(postgres::Transaction<'a>, &'a mut Prepared),
}

impl Transaction<'_> {
    /// Runs a statement; returns how many rows it changed.
    pub(crate) fn execute(&mut self, sql: &str, values: &[Value]) -> Result<usize, Fault> {
        match self {
            Self::Sqlite(transaction) => {
                Ok(transaction.prepare_cached(sql)?.execute(rusqlite::params_from_iter(values))?)
            }
            Self::Postgres(transaction, prepared) => {
                let statement = prepare(transaction, prepared, sql)?;
                let n_rows = transaction.execute(&statement, &references(values))?;
                Ok(usize::try_from(n_rows).unwrap_or(usize::MAX))
            }
        }
    }

    /// All rows of a query.
    pub(crate) fn rows(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Row>, Fault> {
        match self {
            Self::Sqlite(transaction) => {
                let mut statement = transaction.prepare_cached(sql)?;
                let n_columns = statement.column_count();
                let mut found = statement.query(rusqlite::params_from_iter(values))?;
                let mut rows = Vec::new();
                while let Some(row) = found.next()? {
                    rows.push(sqlite_row(row, n_columns)?);
                }
                Ok(rows)
            }
            Self::Postgres(transaction, prepared) => {
                let statement = prepare(transaction, prepared, sql)?;
                let found = transaction.query(&statement, &references(values))?;
                found.iter().map(postgres_row).collect()
            }
        }
    }

    /// The first row, if there is one.
    pub(crate) fn row(&mut self, sql: &str, values: &[Value]) -> Result<Option<Row>, Fault> {
        Ok(self.rows(sql, values)?.into_iter().next())
    }

    /// The one number that a query such as `SELECT count(*)` gives.
    pub(crate) fn number(&mut self, sql: &str, values: &[Value]) -> Result<i64, Fault> {
        self.row(sql, values)?.ok_or_else(|| Fault::row(0, "no row"))?.int(0)
    }

    /// Several statements without values.
    pub(crate) fn batch(&mut self, sql: &str) -> Result<(), Fault> {
        match self {
            Self::Sqlite(transaction) => Ok(transaction.execute_batch(sql)?),
            Self::Postgres(transaction, _) => Ok(transaction.batch_execute(sql)?),
        }
    }

    pub(crate) fn commit(self) -> Result<(), Fault> {
        match self {
            Self::Sqlite(transaction) => Ok(transaction.commit()?),
            Self::Postgres(transaction, _) => Ok(transaction.commit()?),
        }
    }
}

fn prepare(
    transaction: &mut postgres::Transaction,
    prepared: &mut Prepared,
    sql: &str,
) -> Result<postgres::Statement, Fault> {
    if let Some(statement) = prepared.get(sql) {
        return Ok(statement.clone());
    }
    // No statement of ours holds a question mark or a dollar otherwise.
    let statement = transaction.prepare(&sql.replace('?', "$"))?;
    prepared.insert(sql.to_owned(), statement.clone());
    Ok(statement)
}

fn references<'a>(values: &'a [Value<'a>]) -> Vec<&'a (dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}

fn sqlite_row(row: &rusqlite::Row, n_columns: usize) -> Result<Row, Fault> {
    let cell = |column| {
        Ok(match row.get_ref(column)? {
            ValueRef::Null => Cell::Null,
            ValueRef::Integer(value) => Cell::Int(value),
            ValueRef::Real(_) => return Err(Fault::row(column, "a fraction")),
            ValueRef::Text(value) => match str::from_utf8(value) {
                Ok(value) => Cell::Text(value.to_owned()),
                Err(error) => return Err(Fault::row(column, error.to_string())),
            },
            ValueRef::Blob(value) => Cell::Bytes(value.to_owned()),
        })
    };
    (0..n_columns).map(cell).collect::<Result<_, _>>().map(Row)
}

fn postgres_row(row: &postgres::Row) -> Result<Row, Fault> {
    let cell = |column: usize| {
        let ty = row.columns()[column].type_();
        Ok(if *ty == Type::INT8 {
            row.try_get::<_, Option<i64>>(column)?.map_or(Cell::Null, Cell::Int)
        } else if *ty == Type::BYTEA {
            row.try_get::<_, Option<Vec<u8>>>(column)?.map_or(Cell::Null, Cell::Bytes)
        } else {
            row.try_get::<_, Option<String>>(column)?.map_or(Cell::Null, Cell::Text)
        })
    };
    (0..row.len()).map(cell).collect::<Result<_, _>>().map(Row)
}
