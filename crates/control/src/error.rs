//! What can fail, by step.

use std::path::PathBuf;

use postgres::error::SqlState;
use rusqlite::ErrorCode;

use crate::job::JobId;
use crate::promotion::PromotionId;
use crate::sql::Fault;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot create database {path}")]
    CreateDatabase {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot open database {database}")]
    OpenDatabase {
        database: String,
        #[source]
        source: Fault,
    },
    #[error(
        "database {path} is empty: it was cut short; restore it from a backup, or remove it to start over"
    )]
    EmptyDatabase { path: PathBuf },
    #[error("database {database} is damaged ({what}); restore it from a backup, or remove it to start over")]
    DamagedDatabase { database: String, what: String },
    #[error(
        "database {path} is missing but its unfinished writes {wal} are there; put it back, or remove them too to start over"
    )]
    MissingDatabase { path: PathBuf, wal: PathBuf },
    #[error("{database} is a database of another program")]
    ForeignDatabase { database: String },
    #[error(
        "database {database} has schema version {found}, written by a newer version of loquat; this one knows up to {known}"
    )]
    NewerSchema { database: String, found: i64, known: i64 },
    #[error("the tables of the backup cannot be read: {why}")]
    Tables { why: String },
    #[error("database {database} is there already; a backup is restored into a new one")]
    NotVacant { database: String },
    #[error("cannot bring database {database} to schema version {to}")]
    Migrate {
        database: String,
        to: i64,
        #[source]
        source: Fault,
    },
    #[error("cannot {doing}: disk of database {database} is full")]
    DiskFull { database: String, doing: &'static str },
    #[error("cannot {doing}: database {database} can only be read")]
    ReadOnly { database: String, doing: &'static str },
    #[error("cannot {doing}: database {database} cannot be reached")]
    Unreachable {
        database: String,
        doing: &'static str,
        #[source]
        source: Fault,
    },
    #[error(
        "the database's URL cannot be read ({why}); it looks like postgres://user:password@host:5432/name"
    )]
    DatabaseUrl { why: String },
    #[error("cannot {doing}: database {database} is busy")]
    Busy { database: String, doing: &'static str },
    #[error("cannot {doing} in database {database}")]
    Database {
        database: String,
        doing: &'static str,
        #[source]
        source: Fault,
    },
    #[error("lease {name} was taken over: token {token} is stale")]
    StaleLease { name: String, token: i64 },
    #[error("{what} is not valid: {why}")]
    Invalid { what: &'static str, why: String },
    #[error("{what}: at most {max} are allowed")]
    TooMany { what: &'static str, max: usize },
    #[error("job {name} is not over yet and was submitted with another command line, as {id}")]
    JobConflict { name: String, id: JobId },
    #[error(
        "the job asks for more than there is: {field} {asked}, where {whose} has at most {at_most}; with {field} \
         {at_most} it would fit"
    )]
    Beyond { field: &'static str, asked: u64, at_most: u64, whose: String },
    #[error(
        "node name {name} is used by another machine; give this one another name with --node, or forget the other"
    )]
    NodeTaken { name: String },
    #[error("there is no node {name}")]
    NoNode { name: String },
    #[error("node {name} is alive: it was heard of just now; drain it, and stop its loquat")]
    NodeAlive { name: String },
    #[error("{id} is {state}; only what is over is run again")]
    JobNotOver { id: JobId, state: &'static str },
    #[error("{model} has nothing on trial")]
    NoTrial { model: String },
    #[error("{model} is not deployed")]
    NoDeployment { model: String },
    #[error("{id} of {model} is not over yet; cancel it first")]
    PromotionConflict { model: String, id: PromotionId },
    #[error("no {0}")]
    NoPromotion(PromotionId),
    #[error("no job {0}")]
    NoJob(JobId),
    #[error("job {0} is not over yet; cancel it first")]
    JobUnfinished(JobId),
    #[error("no random numbers from the system")]
    Random(#[source] getrandom::Error),
    #[error("cannot write job log {path}")]
    JobLog {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot hold jobs to what they ask for in the control groups {groups}")]
    Cgroups {
        groups: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot start {program}")]
    StartProcess {
        program: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("Slurm's {program} refuses: {why}")]
    Slurm { program: String, why: String },
    #[error("Slurm does not answer its {program}: {why}")]
    SlurmAway { program: String, why: String },
    #[error("Kubernetes refuses to {doing} {path}: {why}")]
    Kubernetes { doing: &'static str, path: String, why: String },
    #[error("Kubernetes cannot {doing} {path} now: {why}")]
    KubernetesBusy { doing: &'static str, path: String, why: String },
    #[error("Kubernetes cannot be reached at {server}")]
    KubernetesUnreachable {
        server: String,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("cannot observe process {pid}")]
    ObserveProcess {
        pid: u32,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot signal process {pid}")]
    SignalProcess {
        pid: u32,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot start the reconciler's thread")]
    StartThread(#[source] std::io::Error),
}

impl Error {
    /// Whether what starts processes is only not there at present: no job's fault, and not to be held against it.
    pub(crate) fn is_of_the_launcher(&self) -> bool {
        matches!(
            self,
            Self::SlurmAway { .. } | Self::KubernetesBusy { .. } | Self::KubernetesUnreachable { .. }
        )
    }

    /// The failure of a statement, sorted by what a person would do about it.
    pub(crate) fn of_statement(database: &str, doing: &'static str, source: Fault) -> Self {
        let database = database.to_owned();
        match kind(&source) {
            Kind::DiskFull => Self::DiskFull { database, doing },
            Kind::ReadOnly => Self::ReadOnly { database, doing },
            Kind::Busy => Self::Busy { database, doing },
            Kind::Damaged => Self::DamagedDatabase { database, what: source.to_string() },
            Kind::Gone => Self::Unreachable { database, doing, source },
            Kind::Other => Self::Database { database, doing, source },
        }
    }
}

enum Kind {
    DiskFull,
    ReadOnly,
    Busy,
    Damaged,
    Gone,
    Other,
}

fn kind(fault: &Fault) -> Kind {
    match fault {
        Fault::Sqlite(source) => match source.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Kind::DiskFull,
            Some(ErrorCode::ReadOnly) => Kind::ReadOnly,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Kind::Busy,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Kind::Damaged,
            _ => Kind::Other,
        },
        Fault::Postgres(source) => match source.code() {
            Some(&SqlState::DISK_FULL) => Kind::DiskFull,
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Kind::ReadOnly,
            Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED) => Kind::Busy,
            Some(&SqlState::DATA_CORRUPTED | &SqlState::INDEX_CORRUPTED) => Kind::Damaged,
            Some(
                &SqlState::ADMIN_SHUTDOWN
                | &SqlState::CRASH_SHUTDOWN
                | &SqlState::CANNOT_CONNECT_NOW
                | &SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
            ) => Kind::Gone,
            None if source.is_closed() => Kind::Gone,
            _ => Kind::Other,
        },
        Fault::Row { .. } => Kind::Other,
        Fault::TriedJustNow(_) => Kind::Gone,
    }
}
