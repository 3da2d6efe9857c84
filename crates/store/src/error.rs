use crate::ObjectName;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the object and the store it went wrong in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("object name {name:?} refused: {reason}")]
    Name { name: String, reason: &'static str },
    #[error("store address {url:?} refused: {reason}")]
    Address { url: String, reason: String },
    #[error("cannot open store {store}")]
    Open {
        store: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(
        "store {store} ignores put-if-absent: it took a second write to an object that was there, so two writers \
         could both believe that they published; use a bucket that honours `If-None-Match: *`"
    )]
    NoPutIfAbsent { store: String },
    #[error("no object {name} in {store}")]
    NotFound { name: ObjectName, store: String },
    #[error("cannot put {name} in {store}: {existing} is an object there, and an object holds no others")]
    Nested { name: ObjectName, existing: String, store: String },
    #[error("bytes {start}..{end} of {name} in {store} were asked for; it has {bytes}")]
    OutOfRange { name: ObjectName, store: String, start: u64, end: u64, bytes: u64 },
    #[error("{name} has {bytes} bytes; put-if-absent takes at most {bytes_max}")]
    TooLarge { name: ObjectName, bytes: u64, bytes_max: u64 },
    #[error("cannot {operation} {name} in {store}: the disk is full")]
    DiskFull { operation: &'static str, name: ObjectName, store: String },
    #[error("cannot {operation} {name} in {store}")]
    Object {
        operation: &'static str,
        name: ObjectName,
        store: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{name} was to have {expected} bytes, its source gave {got}")]
    SourceLength { name: ObjectName, expected: u64, got: u64 },
    #[error("cannot list {prefix:?} in {store}")]
    List {
        prefix: String,
        store: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{prefix:?} in {store} holds more than {max} objects")]
    ListTooLong { prefix: String, store: String, max: usize },
    #[error("cannot read {path} for {name}")]
    SourceFile {
        path: String,
        name: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write {path}")]
    Download {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{name} in {store} is damaged: {reason}")]
    Damaged { name: ObjectName, store: String, reason: String },
    #[error("bundle {bundle} in {store} has format version {version}; this program knows up to {known}")]
    NewerFormat { bundle: String, store: String, version: u32, known: u32 },
    #[error("bundle {bundle} in {store} has no file {file:?}")]
    NoFile { bundle: String, store: String, file: String },
    #[error("file name {file:?} for bundle {bundle} refused: {reason}")]
    FileName { bundle: String, file: String, reason: &'static str },
    #[error("{store} is no backup: {why}")]
    NotBackup { store: String, why: String },
    #[error("{store} is a backup of another cluster ({of}) and not of this one ({own}); take another place")]
    OtherBackup { store: String, of: String, own: String },
    #[error("the backup {backup} and the store {store} lie one in the other")]
    BackupInside { backup: String, store: String },
    #[error("{store} changes faster than it is copied")]
    Unsettled { store: String },
    #[error("there is a snapshot {name} in {store} already")]
    SnapshotTaken { name: ObjectName, store: String },
    #[error("{store} has no snapshot {id:?}")]
    NoSnapshot { id: String, store: String },
    #[error("the store {store} is not empty: it holds {name}, which is not of this snapshot")]
    NotEmpty { store: String, name: ObjectName },
    #[error("{name} cannot be restored from {backup}: {why}")]
    BrokenBackup { name: ObjectName, backup: String, why: String },
}
