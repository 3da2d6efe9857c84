//! The file: created whole, checked, migrated forward, and never left half-written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::clock::{Clock, UnixMs};
use crate::error::{Error, Result};
use crate::keys::KeyCache;

/// Every schema this program has ever written, oldest first; applying the first `v` gives schema version `v`.
/// An entry is never changed once released: a change is a new entry.
const MIGRATIONS: &[&str] = &[include_str!("migrations/0001.sql")];

/// Marks the file as ours in SQLite's header ("Loqt").
const APPLICATION_ID: i64 = 0x4c6f_7174;

/// How long a statement waits for another process's write. Writes take milliseconds; this is for a stalled disk.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of the cluster. Clones share one connection; calls are short and may come from any thread.
///
/// What a call has acknowledged is on the disk (`synchronous=FULL`).
#[derive(Clone)]
pub struct Control(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) path: PathBuf,
    connection: Mutex<Connection>,
    pub(crate) clock: Clock,
    pub(crate) keys: RwLock<Option<KeyCache>>,
    jobs_changed: (Mutex<u64>, Condvar),
}

/// Why a closure inside a transaction stopped: the statement failed, or we refused.
pub(crate) enum Stop {
    Statement(rusqlite::Error),
    Refused(Error),
}

impl From<rusqlite::Error> for Stop {
    fn from(source: rusqlite::Error) -> Self {
        Self::Statement(source)
    }
}

impl From<Error> for Stop {
    fn from(refused: Error) -> Self {
        Self::Refused(refused)
    }
}

impl Control {
    /// Opens the database at `path`, creating it (but not its directory) when it is not there, and brings its schema up to
    /// date. Any number of processes may do so at once.
    ///
    /// Errors name the path: a directory that is missing or read-only, a file that is empty, damaged, another program's, or
    /// from a newer version.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, Clock::system())
    }

    /// As [`Control::open`], with the time from `clock`.
    pub fn open_with(path: &Path, clock: Clock) -> Result<Self> {
        let failed = |source| Error::CreateDatabase { path: path.to_owned(), source };
        if !path.try_exists().map_err(failed)? {
            refuse_orphaned_wal(path)?;
            create(path)?;
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
        Ok(Self::of(path, connection, clock))
    }

    /// A database in RAM, for tests and simulations; it is gone with its last clone.
    pub fn in_memory(clock: Clock) -> Result<Self> {
        let path = Path::new(":memory:");
        let mut connection = Connection::open_in_memory().map_err(|source| opening_failed(path, source))?;
        migrate(path, &mut connection, MIGRATIONS)?;
        Ok(Self::of(path, connection, clock))
    }

    fn of(path: &Path, connection: Connection, clock: Clock) -> Self {
        connection.set_prepared_statement_cache_capacity(64);
        Self(Arc::new(Inner {
            path: path.to_owned(),
            connection: Mutex::new(connection),
            clock,
            keys: RwLock::new(None),
            jobs_changed: (Mutex::new(0), Condvar::new()),
        }))
    }

    /// The time this control plane goes by.
    pub fn now(&self) -> UnixMs {
        self.0.clock.now()
    }

    /// Where the database lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Runs `read` on one consistent snapshot.
    pub(crate) fn read<T>(
        &self,
        doing: &'static str,
        read: impl FnOnce(&Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        self.transaction(doing, TransactionBehavior::Deferred, read)
    }

    /// Runs `write` in one transaction that holds the write lock from its start, and commits it unless `write` fails.
    pub(crate) fn write<T>(
        &self,
        doing: &'static str,
        write: impl FnOnce(&Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        self.transaction(doing, TransactionBehavior::Immediate, write)
    }

    fn transaction<T>(
        &self,
        doing: &'static str,
        behavior: TransactionBehavior,
        work: impl FnOnce(&Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        let mut connection = self.lock();
        let outcome = (|| {
            let transaction = connection.transaction_with_behavior(behavior)?;
            let value = work(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })();
        outcome.map_err(|stop| match stop {
            Stop::Refused(error) => error,
            Stop::Statement(source) => Error::of_statement(&self.0.path, doing, source),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic inside a transaction rolled it back, so the connection is as good as before.
        self.0.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the reconciler of this process.
    pub(crate) fn notify_jobs_changed(&self) {
        let (count, changed) = &self.0.jobs_changed;
        *count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        changed.notify_all();
    }

    /// Waits until jobs were changed in this process after `seen`, or for `timeout`; returns what to pass next time.
    pub(crate) fn wait_jobs_changed(&self, seen: u64, timeout: Duration) -> u64 {
        let (count, changed) = &self.0.jobs_changed;
        let guard = count.lock().unwrap_or_else(PoisonError::into_inner);
        let (guard, _) = changed
            .wait_timeout_while(guard, timeout, |now| *now == seen)
            .unwrap_or_else(PoisonError::into_inner);
        *guard
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("path", &self.0.path).finish()
    }
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

/// Makes a complete, migrated database under another name and links it to `path`, so that no one ever sees half of one.
/// When another process was faster, its file stays and ours is dropped.
fn create(path: &Path) -> Result<()> {
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
    let made = fill(path, &draft).and_then(|()| match fs::hard_link(&draft, path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(failed(source)),
        _ => Ok(()),
    });
    let removed = fs::remove_file(&draft);
    made?;
    removed.map_err(failed)?;
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn fill(path: &Path, draft: &Path) -> Result<()> {
    let failed = |source| opening_failed(path, source);
    let mut connection = Connection::open(draft).map_err(failed)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    migrate(path, &mut connection, MIGRATIONS)?;
    connection.close().map_err(|(_, source)| failed(source))
}

fn opening_failed(path: &Path, source: rusqlite::Error) -> Error {
    match Error::of_statement(path, "open", source) {
        Error::Database { path, source, .. } => Error::OpenDatabase { path, source },
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
        return Err(Error::ForeignDatabase { path: path.to_owned() });
    }
    let found: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if found != "ok" {
        return Err(Error::DamagedDatabase { path: path.to_owned(), what: found.replace('\n', " ") });
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
fn migrate(path: &Path, connection: &mut Connection, migrations: &[&str]) -> Result<()> {
    let known = i64::try_from(migrations.len()).expect("a handful of migrations");
    loop {
        let to = schema_version(path, connection)? + 1;
        if to > known + 1 {
            return Err(Error::NewerSchema { path: path.to_owned(), found: to - 1, known });
        }
        if to == known + 1 {
            return Ok(());
        }
        apply(connection, to, migrations).map_err(|source| Error::Migrate {
            path: path.to_owned(),
            to,
            source,
        })?;
    }
}

fn schema_version(path: &Path, connection: &Connection) -> Result<i64> {
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

/// `N` random bytes from the system, in hexadecimal.
pub(crate) fn random_hex<const N: usize>() -> Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests;
