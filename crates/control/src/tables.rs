//! The whole database as plain data, for backups: read at one moment while others write, and put into an empty database of
//! either kind.
//!
//! Tables, columns and rows are found in the database itself, so a migration needs no change here. Rows go in under the
//! schema that they came from and are then brought up to date as those of an old database are.

use serde::{Deserialize, Serialize};

use crate::database::{Control, Stop};
use crate::error::{Error, Result};
use crate::sql::{Cell, Fault, Transaction, Value, values};

/// What a restore adds to the tokens of leases, so that none that was given out after the backup is ever given out again.
const TOKENS_PASSED: i64 = 1 << 32;

/// Flags that say where a job's home and its store are.
const PLACE_FLAGS: [&str; 2] = ["--home", "--store"];

/// All rows of a database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tables {
    pub schema_version: i64,
    tables: Vec<Table>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    name: String,
    columns: Vec<String>,
    /// Sorted: the same rows are the same bytes, whichever database they come from.
    rows: Vec<Vec<Cell>>,
    /// The highest number that was given to a row, where the database gives them: also rows that are gone keep theirs.
    last_id: Option<i64>,
}

impl Tables {
    /// Reads what [`Tables::to_json`] wrote. Errors: it is no such thing, or from a newer version of this program.
    pub fn from_json(bytes: &[u8]) -> Result<Tables> {
        #[derive(Deserialize)]
        struct Version {
            schema_version: i64,
        }
        let bad = |error: serde_json::Error| Error::Tables { why: error.to_string() };
        // The version first: newer tables may have a form that this program does not know.
        let Version { schema_version: found } = serde_json::from_slice(bytes).map_err(bad)?;
        let known = crate::database::schema_known();
        if found > known {
            return Err(Error::NewerSchema { database: "in the backup".to_owned(), found, known });
        }
        let tables: Tables = serde_json::from_slice(bytes).map_err(bad)?;
        tables.check()?;
        Ok(tables)
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("tables are plain data")
    }

    /// Two columns of a table that hold text, row by row.
    pub fn texts(&self, table: &str, columns: [&str; 2]) -> Vec<[&str; 2]> {
        let Some(table) = self.tables.iter().find(|found| found.name == table) else { return Vec::new() };
        let at = columns.map(|column| table.columns.iter().position(|found| found == column));
        let [Some(a), Some(b)] = at else { return Vec::new() };
        let texts = table.rows.iter().filter_map(|row| match (&row[a], &row[b]) {
            (Cell::Text(a), Cell::Text(b)) => Some([a.as_str(), b.as_str()]),
            _ => None,
        });
        texts.collect()
    }

    /// Jobs begin with the words that say where their home and their store are; `place` are those from now on.
    pub fn move_jobs(&mut self, place: &[String]) -> Result<()> {
        let bad = |error: serde_json::Error| Error::Tables { why: format!("what a job is: {error}") };
        for table in self.tables.iter_mut().filter(|table| table.name == "jobs") {
            let Some(at) = table.columns.iter().position(|column| column == "spec") else { continue };
            for row in &mut table.rows {
                let Cell::Text(text) = &mut row[at] else { continue };
                let mut spec: serde_json::Value = serde_json::from_str(text).map_err(bad)?;
                let args: Vec<String> = serde_json::from_value(spec["args"].take()).map_err(bad)?;
                let n_old = PLACE_FLAGS.len().min(args.chunks(2).take_while(|pair| is_place(pair)).count());
                spec["args"] = [place, &args[2 * n_old..]].concat().into();
                *text = spec.to_string();
            }
        }
        Ok(())
    }

    /// Names go into statements: they must be words. Every row must have its columns.
    fn check(&self) -> Result<()> {
        let is_word = |text: &str| {
            !text.is_empty()
                && text.len() < 64
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let bad = |why: String| Err(Error::Tables { why });
        if self.schema_version < 1 {
            return bad(format!("there was no schema version {}", self.schema_version));
        }
        for Table { name, columns, rows, .. } in &self.tables {
            if let Some(word) = [name].into_iter().chain(columns).find(|word| !is_word(word)) {
                return bad(format!("{:?} is no name", word.chars().take(100).collect::<String>()));
            }
            if rows.iter().any(|row| row.len() != columns.len()) {
                return bad(format!("a row of {name} does not have its columns"));
            }
        }
        Ok(())
    }
}

fn is_place(pair: &[String]) -> bool {
    matches!(pair, [flag, _] if PLACE_FLAGS.contains(&flag.as_str()))
}

impl Control {
    /// Everything, as it is at one moment; writers do not wait.
    pub fn tables(&self) -> Result<Tables> {
        self.read("read all tables", |transaction| Ok(read(transaction)?))
    }
}

pub(crate) fn read(transaction: &mut Transaction) -> Result<Tables, Fault> {
    let version = match transaction {
        Transaction::Sqlite(_) => "PRAGMA user_version",
        Transaction::Postgres(..) => "SELECT version FROM schema_version",
    };
    let schema_version = transaction.number(version, &[])?;
    let tables = names(transaction)?.iter().map(|name| table(transaction, name)).collect::<Result<_, _>>()?;
    Ok(Tables { schema_version, tables })
}

/// Of all tables that hold rows of ours.
fn names(transaction: &mut Transaction) -> Result<Vec<String>, Fault> {
    let sql = match transaction {
        Transaction::Sqlite(_) => {
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND substr(name, 1, 7) <> 'sqlite_'"
        }
        Transaction::Postgres(..) => {
            "SELECT tablename::text FROM pg_tables WHERE schemaname = 'loquat' AND tablename <> 'schema_version'"
        }
    };
    let rows = transaction.rows(sql, &[])?;
    let mut names = rows.iter().map(|row| Ok(row.text(0)?.to_owned())).collect::<Result<Vec<_>, Fault>>()?;
    names.sort();
    Ok(names)
}

fn table(transaction: &mut Transaction, name: &str) -> Result<Table, Fault> {
    let (columns, last_id) = match transaction {
        Transaction::Sqlite(_) => (
            "SELECT name FROM pragma_table_info(?1) ORDER BY cid",
            "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = ?1",
        ),
        Transaction::Postgres(..) => (
            "SELECT column_name::text FROM information_schema.columns
             WHERE table_schema = 'loquat' AND table_name = ?1::text ORDER BY ordinal_position",
            "SELECT coalesce(max(last_value), 0) FROM pg_sequences
             WHERE schemaname = 'loquat' AND sequencename = ?1::text || '_id_seq'",
        ),
    };
    let columns = transaction.rows(columns, values![name])?;
    let columns = columns.iter().map(|row| Ok(row.text(0)?.to_owned())).collect::<Result<Vec<_>, Fault>>()?;
    let all = transaction.rows(&format!("SELECT {} FROM {name}", columns.join(", ")), &[])?;
    let mut rows: Vec<Vec<Cell>> = all.into_iter().map(|row| row.into_cells()).collect();
    rows.sort();
    let last_id = match transaction.number(last_id, values![name])? {
        0 => None,
        id => Some(id),
    };
    Ok(Table { name: name.to_owned(), columns, rows, last_id })
}

/// Whether nothing was written yet but by migrations.
pub(crate) fn is_vacant(transaction: &mut Transaction) -> Result<bool, Fault> {
    for name in names(transaction)?.iter().filter(|name| *name != "cluster") {
        if transaction.number(&format!("SELECT count(*) FROM {name}"), &[])? > 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts the rows into a database of their own schema version that holds nothing else.
pub(crate) fn write(transaction: &mut Transaction, tables: &Tables) -> Result<(), Stop> {
    for table in &tables.tables {
        // What the migrations put there themselves.
        transaction.execute(&format!("DELETE FROM {}", table.name), &[])?;
        let places: Vec<String> = (1..=table.columns.len()).map(|i| format!("?{i}")).collect();
        let (name, columns, places) = (&table.name, table.columns.join(", "), places.join(", "));
        let sql = format!("INSERT INTO {name} ({columns}) VALUES ({places})");
        for row in &table.rows {
            let values: Vec<Value> = row.iter().map(Value::from).collect();
            transaction.execute(&sql, &values)?;
        }
        if let Some(id) = table.last_id {
            go_on_from(transaction, name, id)?;
        }
    }
    Ok(())
}

/// The next row of a table gets the number after `id`.
fn go_on_from(transaction: &mut Transaction, table: &str, id: i64) -> Result<(), Fault> {
    match transaction {
        Transaction::Sqlite(_) => {
            transaction.execute("DELETE FROM sqlite_sequence WHERE name = ?1", values![table])?;
            let sql = "INSERT INTO sqlite_sequence (name, seq) VALUES (?1, ?2)";
            transaction.execute(sql, values![table, id])?;
        }
        Transaction::Postgres(..) => {
            transaction.number(&format!("SELECT setval('loquat.{table}_id_seq', ?1)"), values![id])?;
        }
    }
    Ok(())
}

/// Ends what was under way when the backup was taken: the processes, leases and addresses in it are of a life that is over.
pub(crate) fn settle(transaction: &mut Transaction) -> Result<(), Stop> {
    transaction.execute("UPDATE leases SET expires_ms = 0, token = token + ?1", values![TOKENS_PASSED])?;
    transaction.execute(
        "UPDATE jobs
         SET state = CASE desired WHEN 'cancelled' THEN 'cancelled' ELSE 'interrupted' END,
             process = NULL, stop_ms = NULL, message = 'restored from a backup'
         WHERE state = 'running'",
        &[],
    )?;
    // Logs stay on the machines that wrote them.
    transaction.execute("UPDATE jobs SET log_path = NULL", &[])?;
    transaction.execute("DELETE FROM replicas WHERE own = 1", &[])?;
    // The names of machines are anybody's again.
    transaction.execute("UPDATE nodes SET machine = ''", &[])?;
    Ok(())
}
