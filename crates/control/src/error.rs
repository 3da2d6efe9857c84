//! What can fail, by step.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use crate::job::JobId;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot create database {path}")]
    CreateDatabase {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot open database {path}")]
    OpenDatabase {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    #[error(
        "database {path} is empty: it was cut short; restore it from a backup, or remove it to start over"
    )]
    EmptyDatabase { path: PathBuf },
    #[error("database {path} is damaged ({what}); restore it from a backup, or remove it to start over")]
    DamagedDatabase { path: PathBuf, what: String },
    #[error(
        "database {path} is missing but its unfinished writes {wal} are there; put it back, or remove them too to start over"
    )]
    MissingDatabase { path: PathBuf, wal: PathBuf },
    #[error("{path} is a database of another program")]
    ForeignDatabase { path: PathBuf },
    #[error(
        "database {path} has schema version {found}, written by a newer version of loquat; this one knows up to {known}"
    )]
    NewerSchema { path: PathBuf, found: i64, known: i64 },
    #[error("cannot bring database {path} to schema version {to}")]
    Migrate {
        path: PathBuf,
        to: i64,
        #[source]
        source: rusqlite::Error,
    },
    #[error("cannot {doing}: disk of database {path} is full")]
    DiskFull { path: PathBuf, doing: &'static str },
    #[error("cannot {doing}: database {path} can only be read")]
    ReadOnly { path: PathBuf, doing: &'static str },
    #[error("cannot {doing}: database {path} is busy")]
    Busy { path: PathBuf, doing: &'static str },
    #[error("cannot {doing} in database {path}")]
    Database {
        path: PathBuf,
        doing: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("lease {name} was taken over: token {token} is stale")]
    StaleLease { name: String, token: i64 },
    #[error("{what} is not valid: {why}")]
    Invalid { what: &'static str, why: String },
    #[error("{what}: at most {max} are allowed")]
    TooMany { what: &'static str, max: usize },
    #[error("job {name} is not over yet and was submitted with another command line, as {id}")]
    JobConflict { name: String, id: JobId },
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
    #[error("cannot start {program}")]
    StartProcess {
        program: PathBuf,
        #[source]
        source: std::io::Error,
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
    /// The failure of a statement, sorted by what a person would do about it.
    pub(crate) fn of_statement(path: &Path, doing: &'static str, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::DiskFull { path, doing },
            Some(ErrorCode::ReadOnly) => Self::ReadOnly { path, doing },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy { path, doing },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::DamagedDatabase { path, what: source.to_string() }
            }
            _ => Self::Database { path, doing, source },
        }
    }
}
