//! The state of one machine: a file that is created whole, checked, migrated forward, and never left half-written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use super::{RESTORING, Stop, random_hex};
use crate::error::{Error, Result};
use crate::sql::{Fault, Transaction};
use crate::tables::{self, Tables};

/// Every schema this program has ever written, oldest first; applying the first `v` gives schema version `v`.
/// An entry is never changed once released: a change is a new entry.
pub(super) const MIGRATIONS: &[&str] = &[
    include_str!("../migrations/sqlite/0001.sql"),
    include_str!("../migrations/sqlite/0002.sql"),
    include_str!("../migrations/sqlite/0003.sql"),
    include_str!("../migrations/sqlite/0004.sql"),
    include_str!("../migrations/sqlite/0005.sql"),
    include_str!("../migrations/sqlite/0006.sql"),
];

/// Marks the file as ours in SQLite's header ("Loqt").
const APPLICATION_ID: i64 = 0x4c6f_7174;

/// How long a statement waits for another process's write. Writes take milliseconds; this is for a stalled disk.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the file, creating it where it is not there, and brings its schema up to date.
pub(super) fn open(path: &Path) -> Result<Connection> {
    let failed = |source| Error::CreateDatabase { path: path.to_owned(), source };
    if !path.try_exists().map_err(failed)? {
        refuse_orphaned_wal(path)?;
        // When another process was faster, its file stays and ours is dropped.
        create(path, |connection| migrate(path, connection, MIGRATIONS))?;
    }
    if fs::metadata(path).map_err(failed)?.len() == 0 {
        // We create the file whole, so an empty one has lost what it held.
        return Err(Error::EmptyDatabase { path: path.to_owned() });
    }
    let failed = |source| opening_failed(path, source);
    let mut connection = Connection::open(path).map_err(failed)?;
    check(path, &connection)?;
    configure(&connection).map_err(failed)?;
    migrate(path, &mut connection, MIGRATIONS)?;
    Ok(connection)
}

/// A database that lives as long as its connection.
pub(super) fn in_memory() -> Result<Connection> {
    let path = Path::new(":memory:");
    let mut connection = Connection::open_in_memory().map_err(|source| opening_failed(path, source))?;
    migrate(path, &mut connection, MIGRATIONS)?;
    Ok(connection)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// SQLite would replay a log that is left of a removed database into the new one.
fn refuse_orphaned_wal(path: &Path) -> Result<()> {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    let wal = PathBuf::from(wal);
    let left = fs::metadata(&wal).is_ok_and(|found| found.len() > 0);
    // Looked at again: another process may just have created the database, and its log with it.
    if left && !path.exists() {
        return Err(Error::MissingDatabase { path: path.to_owned(), wal });
    }
    Ok(())
}

/// Makes a database that holds these rows and is brought up to date.
pub(super) fn restore(path: &Path, tables: &Tables) -> Result<()> {
    refuse_orphaned_wal(path)?;
    let ours = create(path, |connection| {
        let version = usize::try_from(tables.schema_version).unwrap_or(usize::MAX).min(MIGRATIONS.len());
        migrate(path, connection, &MIGRATIONS[..version])?;
        write(path, connection, |transaction| tables::write(transaction, tables))?;
        migrate(path, connection, MIGRATIONS)?;
        write(path, connection, tables::settle)
    })?;
    if ours { Ok(()) } else { Err(Error::NotVacant { database: text(path) }) }
}

fn write(
    path: &Path,
    connection: &mut Connection,
    work: impl FnOnce(&mut Transaction) -> Result<(), Stop>,
) -> Result<()> {
    let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    let written = begun.map_err(|source| Stop::from(Fault::from(source))).and_then(|transaction| {
        let mut transaction = Transaction::Sqlite(transaction);
        work(&mut transaction)?;
        Ok(transaction.commit()?)
    });
    written.map_err(|stop| stop.into_error(&text(path), RESTORING))
}

/// Makes a complete database under another name and links it to `path`, so that no one ever sees half of one. `false` when
/// another was there, which stays.
fn create(path: &Path, fill: impl FnOnce(&mut Connection) -> Result<()>) -> Result<bool> {
    let failed = |source| Error::CreateDatabase { path: path.to_owned(), source };
    let name = path
        .file_name()
        .ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file")))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut draft_name = std::ffi::OsString::from(".");
    draft_name.push(name);
    draft_name.push(format!(".new-{}", random_hex::<8>()?));
    let draft = directory.join(draft_name);
    // Asks for the file itself first, for an error that says why: SQLite only says "unable to open".
    fs::File::create_new(&draft).map_err(failed)?;
    let made = make(path, &draft, fill).and_then(|()| match fs::hard_link(&draft, path) {
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        linked => linked.map(|()| true).map_err(failed),
    });
    let removed = fs::remove_file(&draft);
    let made = made?;
    removed.map_err(failed)?;
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
    Ok(made)
}

fn make(path: &Path, draft: &Path, fill: impl FnOnce(&mut Connection) -> Result<()>) -> Result<()> {
    let failed = |source| opening_failed(path, source);
    let mut connection = Connection::open(draft).map_err(failed)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    fill(&mut connection)?;
    connection.close().map_err(|(_, source)| failed(source))
}

fn opening_failed(path: &Path, source: rusqlite::Error) -> Error {
    match Error::of_statement(&text(path), "open", Fault::Sqlite(source)) {
        Error::Database { source, .. } => Error::OpenDatabase { database: text(path), source },
        sorted => sorted,
    }
}

/// Refuses a file that is not ours, or damaged. Reads every page: the file holds rows, not data, and stays small.
fn check(path: &Path, connection: &Connection) -> Result<()> {
    let failed = |source| opening_failed(path, source);
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    let application: i64 =
        connection.query_row("PRAGMA application_id", [], |row| row.get(0)).map_err(failed)?;
    if application != APPLICATION_ID {
        return Err(Error::ForeignDatabase { database: text(path) });
    }
    let found: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if found != "ok" {
        return Err(Error::DamagedDatabase { database: text(path), what: found.replace('\n', " ") });
    }
    Ok(())
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    // WAL: readers never wait for the writer. FULL: a commit is on the disk when it returns.
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    // The file may come from elsewhere: its schema must not be able to call functions.
    connection.pragma_update(None, "trusted_schema", "OFF")
}

/// Applies what is missing of `migrations`, each in its own transaction; two processes may try at once.
pub(super) fn migrate(path: &Path, connection: &mut Connection, migrations: &[&str]) -> Result<()> {
    let known = i64::try_from(migrations.len()).expect("a handful of migrations");
    loop {
        let to = schema_version(path, connection)? + 1;
        if to > known + 1 {
            return Err(Error::NewerSchema { database: text(path), found: to - 1, known });
        }
        if to == known + 1 {
            return Ok(());
        }
        apply(connection, to, migrations).map_err(|source| Error::Migrate {
            database: text(path),
            to,
            source: source.into(),
        })?;
    }
}

pub(super) fn schema_version(path: &Path, connection: &Connection) -> Result<i64> {
    connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(|source| opening_failed(path, source))
}

fn apply(connection: &mut Connection, to: i64, migrations: &[&str]) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found + 1 == to {
        let index = usize::try_from(to - 1).expect("versions start at 1");
        transaction.execute_batch(migrations[index])?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", to)?;
    }
    transaction.commit()
}
