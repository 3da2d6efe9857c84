use std::io;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with the file and the row, or the dataset, it went wrong in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read {path}: {reason}")]
    Read {
        path: PathBuf,
        reason: String,
        #[source]
        source: io::Error,
    },
    #[error("{path} is {what}")]
    NotReadable { path: PathBuf, what: &'static str },
    #[error(
        "cannot tell what {path} holds: known are .txt .md .jsonl .json (also .gz or .zst of these) and .parquet"
    )]
    UnknownFormat { path: PathBuf },
    #[error("{path} holds no text")]
    Empty { path: PathBuf },
    #[error("{path}, {row}: {reason}")]
    Row { path: PathBuf, row: Place, reason: String },
    #[error("cannot read {path} as Parquet: {reason}")]
    Parquet { path: PathBuf, reason: String },
    #[error("no text in the inputs: {inputs}")]
    NoDocuments { inputs: String },
    #[error(
        "the inputs hold one document ({name}), so none can be held out for validation: add documents, name the \
         line between documents (--separator), or set the validation fraction to 0"
    )]
    OneDocument { name: String },
    #[error("dataset name {name:?} refused: it must be one part of an object name")]
    Name { name: String },
    #[error("ingest of {name}: {reason}")]
    Plan { name: String, reason: String },
    #[error("the inputs of dataset {name} changed while they were ingested; start again")]
    InputsChanged { name: String },
    #[error("tokenizer has no end-of-text token: neither an end-of-sequence token nor <|endoftext|>")]
    NoEndOfText,
    #[error("cannot train a tokenizer for dataset {name}")]
    TrainTokenizer {
        name: String,
        #[source]
        source: tokenizer::Error,
    },
    #[error("cannot read the tokenizer of dataset {name}")]
    Tokenizer {
        name: String,
        #[source]
        source: tokenizer::Error,
    },
    #[error("no dataset {name} in {store}")]
    NoDataset { name: String, store: String },
    #[error("dataset {name} has format version {version}; this program knows up to {known}")]
    NewerFormat { name: String, version: u32, known: u32 },
    #[error("dataset {name} is damaged: {reason}")]
    Damaged { name: String, reason: String },
    #[error(
        "dataset {name}: its {split} split has {n_tokens} tokens, fewer than one window of {window_tokens}"
    )]
    TooSmall { name: String, split: &'static str, n_tokens: u64, window_tokens: u64 },
    #[error(
        "dataset {name}: nothing in its {split} split is to be learned{}",
        window_tokens.map_or(String::new(), |t| format!(" within the first {t} tokens of its documents"))
    )]
    NothingToLearn { name: String, split: &'static str, window_tokens: Option<u64> },
    #[error(
        "dataset {name} was made with another tokenizer than {model} has (sha256 {found}, {expected} expected): ingest \
         it again with that model's"
    )]
    OtherTokenizer { name: String, model: String, found: String, expected: String },
    #[error("dataset {name}: tokens {start}..{end} of its {split} split were asked for; it has {n_tokens}")]
    OutOfRange { name: String, split: &'static str, start: u64, end: u64, n_tokens: u64 },
    #[error("dataset {name}")]
    Store {
        name: String,
        #[source]
        source: store::Error,
    },
}

/// Where in a file: text and JSONL have lines, JSON arrays and Parquet have rows; both count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Line(u64),
    Row(u64),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Line(line) => write!(f, "line {line}"),
            Place::Row(row) => write!(f, "row {row}"),
        }
    }
}

impl Error {
    pub(crate) fn open(path: &Path, source: io::Error) -> Error {
        Error::Open { path: path.to_path_buf(), source }
    }

    pub(crate) fn read(path: &Path, source: io::Error) -> Error {
        let reason = match source.kind() {
            io::ErrorKind::UnexpectedEof => "it is truncated".to_string(),
            _ => source.to_string(),
        };
        Error::Read { path: path.to_path_buf(), reason, source }
    }

    pub(crate) fn row(path: &Path, row: Place, reason: impl Into<String>) -> Error {
        Error::Row { path: path.to_path_buf(), row, reason: reason.into() }
    }

    /// Turns a store's error into one that names the dataset.
    pub(crate) fn store(name: &str) -> impl Fn(store::Error) -> Error + '_ {
        move |source| Error::Store { name: name.to_string(), source }
    }
}

/// An error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
