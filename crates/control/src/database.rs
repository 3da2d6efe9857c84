//! The cluster's state behind one set of calls, whichever database holds it.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use crate::clock::{Clock, UnixMs};
use crate::error::{Error, Result};
use crate::keys::{Asks, KeyCache};
use crate::sql::{Fault, Transaction};
use crate::tables::Tables;

mod postgres;
mod sqlite;
mod tls;

/// What errors say that a restore does.
const RESTORING: &str = "restore a backup";

/// The schema version that this program writes.
pub(crate) fn schema_known() -> i64 {
    i64::try_from(sqlite::MIGRATIONS.len()).expect("a handful of migrations")
}

/// The state of the cluster. Clones share one connection; calls are short and may come from any thread, but they block:
/// not from an async one.
///
/// What a call has acknowledged is on the disk.
#[derive(Clone)]
pub struct Control(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    /// What errors call the database: a path, or a URL without its password.
    name: String,
    link: Mutex<Link>,
    pub(crate) clock: Clock,
    pub(crate) keys: RwLock<Option<KeyCache>>,
    pub(crate) key_asks: Mutex<Asks>,
    jobs_changed: (Mutex<u64>, Condvar),
}

enum Link {
    Sqlite(Connection),
    Postgres(Box<postgres::Server>),
}

#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// One consistent snapshot.
    Read,
    /// Alone: no other write happens between its start and its end.
    Write,
}

/// Why a closure inside a transaction stopped: the statement failed, or we refused.
pub(crate) enum Stop {
    Statement(Fault),
    Refused(Error),
}

impl Stop {
    fn into_error(self, database: &str, doing: &'static str) -> Error {
        match self {
            Self::Refused(error) => error,
            Self::Statement(fault) => Error::of_statement(database, doing, fault),
        }
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Statement(fault)
    }
}

impl From<Error> for Stop {
    fn from(refused: Error) -> Self {
        Self::Refused(refused)
    }
}

/// Where a failed transaction was, for the error that names it.
enum Phase {
    Begin(Fault),
    Work(Stop),
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
        Ok(Self::of(path.display().to_string(), Link::Sqlite(sqlite::open(path)?), clock))
    }

    /// Opens the PostgreSQL database of a `postgres://` URL, where any number of machines meet. Its tables are in a schema
    /// of their own, `loquat`. A connection that is lost is made again when it is next needed.
    pub fn connect(url: &str) -> Result<Self> {
        Self::connect_with(url, Clock::system())
    }

    /// As [`Control::connect`], with the time from `clock`.
    pub fn connect_with(url: &str, clock: Clock) -> Result<Self> {
        let server = postgres::Server::open(url)?;
        Ok(Self::of(server.name.clone(), Link::Postgres(Box::new(server)), clock))
    }

    /// A database in RAM, for tests and simulations; it is gone with its last clone.
    pub fn in_memory(clock: Clock) -> Result<Self> {
        Ok(Self::of(":memory:".to_owned(), Link::Sqlite(sqlite::in_memory()?), clock))
    }

    fn of(name: String, link: Link, clock: Clock) -> Self {
        if let Link::Sqlite(connection) = &link {
            connection.set_prepared_statement_cache_capacity(64);
        }
        Self(Arc::new(Inner {
            name,
            link: Mutex::new(link),
            clock,
            keys: RwLock::new(None),
            key_asks: Mutex::default(),
            jobs_changed: (Mutex::new(0), Condvar::new()),
        }))
    }

    /// The time this control plane goes by.
    pub fn now(&self) -> UnixMs {
        self.0.clock.now()
    }

    /// The database as errors name it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What tells this cluster from every other; made with its database.
    pub fn cluster_id(&self) -> Result<String> {
        self.cluster_value("id")
    }

    /// The key with which gateways and replicas of this cluster know each other.
    pub fn replica_key(&self) -> Result<String> {
        self.cluster_value("replica_key")
    }

    /// What names the store that goes with this database, if one was claimed.
    pub fn store(&self) -> Result<Option<String>> {
        self.read("read which store is the cluster's", |transaction| Ok(store_of(transaction)?))
    }

    /// Makes `store` name the store that goes with this database, unless one does already; returns the one that does.
    pub fn claim_store(&self, store: &str) -> Result<String> {
        self.write("claim a store", |transaction| {
            if let Some(found) = store_of(transaction)? {
                return Ok(found);
            }
            let sql = "INSERT INTO cluster (name, value) VALUES ('store', ?1)";
            transaction.execute(sql, crate::sql::values![store])?;
            Ok(store.to_owned())
        })
    }

    fn cluster_value(&self, name: &str) -> Result<String> {
        self.read("read what is true of the cluster", |transaction| {
            let row =
                transaction.row("SELECT value FROM cluster WHERE name = ?1", crate::sql::values![name])?;
            let row = row.ok_or_else(|| Fault::row(0, "no such row"))?;
            Ok(row.text(0)?.to_owned())
        })
    }

    /// Runs `read` on one consistent snapshot.
    pub(crate) fn read<T>(
        &self,
        doing: &'static str,
        read: impl FnOnce(&mut Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        self.transaction(doing, Access::Read, read)
    }

    /// Runs `write` in one transaction that holds the write lock from its start, and commits it unless `write` fails.
    pub(crate) fn write<T>(
        &self,
        doing: &'static str,
        write: impl FnOnce(&mut Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        self.transaction(doing, Access::Write, write)
    }

    fn transaction<T>(
        &self,
        doing: &'static str,
        access: Access,
        work: impl FnOnce(&mut Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        let mut link = self.lock();
        let outcome = link.begin(access).map_err(Phase::Begin).and_then(|mut transaction| {
            let value = work(&mut transaction).map_err(Phase::Work)?;
            transaction.commit().map_err(|fault| Phase::Work(Stop::Statement(fault)))?;
            Ok(value)
        });
        outcome.map_err(|phase| match phase {
            Phase::Work(stop) => stop.into_error(&self.0.name, doing),
            // The server answered: it is there, but busy, or refuses us.
            Phase::Begin(fault) if fault.is_an_answer() => Error::of_statement(&self.0.name, doing, fault),
            Phase::Begin(source) => Error::Unreachable { database: self.0.name.clone(), doing, source },
        })
    }

    fn lock(&self) -> MutexGuard<'_, Link> {
        // A panic inside a transaction rolled it back, so the connection is as good as before.
        self.0.link.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A database that is not there yet, or holds nothing: what a backup is restored into.
pub struct Vacant(Place);

enum Place {
    Sqlite(std::path::PathBuf),
    Postgres(Box<postgres::Server>),
}

impl Vacant {
    /// The file at `path`, which must not be there.
    pub fn file(path: &Path) -> Result<Self> {
        match path.try_exists() {
            Ok(false) => Ok(Self(Place::Sqlite(path.to_owned()))),
            Ok(true) => Err(Error::NotVacant { database: path.display().to_string() }),
            Err(source) => Err(Error::CreateDatabase { path: path.to_owned(), source }),
        }
    }

    /// A database on a PostgreSQL server, where our schema must be empty or missing.
    pub fn server(url: &str) -> Result<Self> {
        let mut server = postgres::Server::reach(url)?;
        server.check_vacant()?;
        Ok(Self(Place::Postgres(Box::new(server))))
    }

    /// Makes it hold `tables`, whole or not at all, with everything ended that was under way when they were read.
    pub fn restore(mut self, tables: &Tables) -> Result<()> {
        match &mut self.0 {
            Place::Sqlite(path) => sqlite::restore(path, tables),
            Place::Postgres(server) => server.restore(tables),
        }
    }
}

fn store_of(transaction: &mut Transaction) -> Result<Option<String>, Fault> {
    let row = transaction.row("SELECT value FROM cluster WHERE name = 'store'", &[])?;
    row.map(|row| Ok(row.text(0)?.to_owned())).transpose()
}

impl Link {
    fn begin(&mut self, access: Access) -> Result<Transaction<'_>, Fault> {
        match self {
            Self::Sqlite(connection) => {
                let behavior = match access {
                    Access::Read => TransactionBehavior::Deferred,
                    Access::Write => TransactionBehavior::Immediate,
                };
                Ok(Transaction::Sqlite(connection.transaction_with_behavior(behavior)?))
            }
            Self::Postgres(server) => server.begin(access),
        }
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("name", &self.0.name).finish()
    }
}

/// `N` random bytes from the system, in hexadecimal.
pub(crate) fn random_hex<const N: usize>() -> Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
#[path = "../tests/support/postgres.rs"]
mod test_server;
#[cfg(test)]
mod tests;
