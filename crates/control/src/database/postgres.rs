//! The state of many machines: PostgreSQL, reached again whenever it comes back.

use std::time::{Duration, Instant};

use postgres::{Client, Config};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls::Asked;
use super::{Access, RESTORING, Stop};
use crate::error::{Error, Result};
use crate::sql::{Fault, Prepared, Transaction};
use crate::tables::{self, Tables};

/// As [`super::sqlite::MIGRATIONS`], in PostgreSQL's words; version for version the same tables.
pub(super) const MIGRATIONS: &[&str] = &[
    include_str!("../migrations/postgres/0001.sql"),
    include_str!("../migrations/postgres/0002.sql"),
    include_str!("../migrations/postgres/0003.sql"),
    include_str!("../migrations/postgres/0004.sql"),
    include_str!("../migrations/postgres/0005.sql"),
    include_str!("../migrations/postgres/0006.sql"),
];

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// After a connection failed nobody tries again for so long, or for five times as long as the try took: callers get
/// their answer at once instead of one after the other waiting for it.
const REST: Duration = Duration::from_secs(1);

/// A server that does not acknowledge for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Server-side bounds: of a statement, of waiting for another's write, and of a writer that fell silent while it held all
/// others up.
const BOUNDS: &str = "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=5s \
                      -c search_path=loquat";

/// The lock that makes writers take turns, as SQLite's do: a check and the write that depends on it see no other's.
/// Writes are few and take milliseconds, so turns cost nothing that retries would not cost, too.
const ONE_WRITER: &str = "SELECT pg_advisory_xact_lock(1282371956)";

/// A database on a server, and the connection to it while there is one.
pub(super) struct Server {
    pub(super) name: String,
    config: Config,
    tls: MakeRustlsConnect,
    live: Option<Live>,
    /// Until when nobody tries again, and why.
    failed: Option<(Instant, String)>,
}

struct Live {
    client: Client,
    prepared: Prepared,
}

impl Server {
    /// Connects, and brings the schema up to date.
    pub(super) fn open(url: &str) -> Result<Self> {
        Self::open_at(url, MIGRATIONS)
    }

    pub(super) fn open_at(url: &str, migrations: &[&str]) -> Result<Self> {
        let mut server = Self::reach(url)?;
        server.migrate(migrations)?;
        Ok(server)
    }

    /// Connects, and looks at nothing.
    pub(super) fn reach(url: &str) -> Result<Self> {
        let (url, tls) = Asked::of_url(url)?;
        let mut config: Config = url.parse().map_err(|source: postgres::Error| Error::DatabaseUrl {
            // Whatever it is, it may hold a password.
            why: Fault::from(source).to_string(),
        })?;
        let options = format!("{} {BOUNDS}", config.get_options().unwrap_or_default());
        config.options(options.trim()).connect_timeout(CONNECT_TIMEOUT).tcp_user_timeout(SILENCE_MAX);
        config.keepalives_idle(SILENCE_MAX).application_name("loquat");
        config.ssl_mode(tls.mode());
        let tls = tls.connector()?;
        let mut server = Self { name: name(&config), config, tls, live: None, failed: None };
        let database = server.name.clone();
        server.ensure().map_err(|source| Error::OpenDatabase { database, source })?;
        Ok(server)
    }

    /// Refuses a database that holds anything but what migrations put there.
    pub(super) fn check_vacant(&mut self) -> Result<()> {
        let database = self.name.clone();
        let vacant = self.begin(Access::Read).and_then(|mut transaction| tables::is_vacant(&mut transaction));
        match vacant.map_err(|fault| Error::of_statement(&database, RESTORING, fault))? {
            true => Ok(()),
            false => Err(Error::NotVacant { database }),
        }
    }

    /// Puts these rows into a schema of their own version and brings it up to date: all in one transaction.
    pub(super) fn restore(&mut self, tables: &Tables) -> Result<()> {
        let database = self.name.clone();
        let restored = self.begin(Access::Write).map_err(Stop::from).and_then(|mut transaction| {
            if !tables::is_vacant(&mut transaction)? {
                return Err(Error::NotVacant { database: database.clone() }.into());
            }
            // What is there is of this program's version and not of the rows'.
            transaction.batch("DROP SCHEMA IF EXISTS loquat CASCADE; CREATE SCHEMA loquat")?;
            let version = usize::try_from(tables.schema_version).unwrap_or(usize::MAX).min(MIGRATIONS.len());
            let (before, after) = MIGRATIONS.split_at(version);
            transaction.batch(&before.concat())?;
            tables::write(&mut transaction, tables)?;
            transaction.batch(&after.concat())?;
            tables::settle(&mut transaction)?;
            let version =
                format!("CREATE TABLE schema_version AS SELECT {}::bigint AS version", MIGRATIONS.len());
            transaction.batch(&version)?;
            Ok(transaction.commit()?)
        });
        restored.map_err(|stop| stop.into_error(&database, RESTORING))
    }

    /// A transaction on a connection that was seen to work. What fails here has changed nothing.
    pub(super) fn begin(&mut self, access: Access) -> Result<Transaction<'_>, Fault> {
        self.ensure()?;
        let Some(live) = &mut self.live else {
            return Err(Fault::TriedJustNow("no connection".to_owned()));
        };
        let builder = live.client.build_transaction();
        let transaction = match access {
            // Repeatable: all statements see what the first one saw.
            Access::Read => {
                let isolation = postgres::IsolationLevel::RepeatableRead;
                builder.isolation_level(isolation).read_only(true).start()?
            }
            // Committed: once the turn has come, all that earlier writers did is seen.
            Access::Write => {
                let mut transaction = builder.start()?;
                transaction.batch_execute(ONE_WRITER)?;
                transaction
            }
        };
        Ok(Transaction::Postgres(transaction, &mut live.prepared))
    }

    /// Makes `live` hold a connection that answered just now: a server that was restarted is found here, where trying
    /// again is safe.
    fn ensure(&mut self) -> Result<(), Fault> {
        if let Some(live) = &mut self.live
            && live.client.batch_execute("").is_ok()
        {
            return Ok(());
        }
        self.live = None;
        let started = monotonic_now();
        if let Some((until, why)) = &self.failed
            && started < *until
        {
            return Err(Fault::TriedJustNow(why.clone()));
        }
        match self.config.connect(self.tls.clone()) {
            Ok(client) => {
                self.failed = None;
                self.live = Some(Live { client, prepared: Prepared::new() });
                Ok(())
            }
            Err(error) => {
                let fault = Fault::from(error);
                let rest = REST.max(5 * started.elapsed());
                self.failed = Some((monotonic_now() + rest, fault.to_string()));
                Err(fault)
            }
        }
    }

    /// Applies what is missing of `migrations`, all in one transaction; many processes may try at once.
    fn migrate(&mut self, migrations: &[&str]) -> Result<()> {
        let known = i64::try_from(migrations.len()).expect("a handful of migrations");
        let database = self.name.clone();
        let failed = |source: Fault| Error::Migrate { database: database.clone(), to: known, source };
        let Some(live) = &mut self.live else { return Ok(()) };
        let mut transaction = live.client.transaction().map_err(|e| failed(e.into()))?;
        let found = version(&mut transaction).map_err(|e| failed(e.into()))?;
        let Some(found) = found else {
            return Err(Error::ForeignDatabase { database });
        };
        if found > known {
            return Err(Error::NewerSchema { database, found, known });
        }
        let missing = migrations.iter().skip(usize::try_from(found).unwrap_or(0));
        for migration in missing {
            transaction.batch_execute(migration).map_err(|e| failed(e.into()))?;
        }
        let written = transaction.execute("UPDATE schema_version SET version = $1", &[&known]);
        written.and_then(|_| transaction.commit()).map_err(|e| failed(e.into()))
    }
}

/// The schema's version, 0 where there is none yet; `None` where a schema of our name holds something else.
fn version(transaction: &mut postgres::Transaction) -> Result<Option<i64>, postgres::Error> {
    transaction.batch_execute(ONE_WRITER)?;
    transaction.batch_execute("CREATE SCHEMA IF NOT EXISTS loquat")?;
    let tables = "SELECT count(*), count(*) FILTER (WHERE tablename = 'schema_version') FROM pg_tables \
                  WHERE schemaname = 'loquat'";
    let row = transaction.query_one(tables, &[])?;
    let (n_tables, n_version): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    if n_version == 0 && n_tables > 0 {
        return Ok(None);
    }
    if n_version == 0 {
        let first =
            "CREATE TABLE schema_version (version BIGINT NOT NULL); INSERT INTO schema_version VALUES (0)";
        transaction.batch_execute(first)?;
    }
    transaction.query_one("SELECT version FROM schema_version", &[])?.try_get(0).map(Some)
}

/// Where the database is, without the password.
fn name(config: &Config) -> String {
    let host = match config.get_hosts().first() {
        Some(postgres::config::Host::Tcp(host)) => host.clone(),
        Some(postgres::config::Host::Unix(path)) => path.display().to_string(),
        None => String::new(),
    };
    let port = config.get_ports().first().map_or(String::new(), |port| format!(":{port}"));
    let user = config.get_user().map_or(String::new(), |user| format!("{user}@"));
    format!("postgres://{user}{host}{port}/{}", config.get_dbname().unwrap_or_default())
}

/// For pauses within this process.
fn monotonic_now() -> Instant {
    #[allow(clippy::disallowed_methods)]
    Instant::now()
}
