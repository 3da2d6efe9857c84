//! What can be wrong with a file, or with a model for it.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {} after line {line}", .path.display())]
    Read {
        path: PathBuf,
        line: usize,
        #[source]
        source: std::io::Error,
    },
    #[error("{}, line {line}: {problem}", .path.display())]
    Line { path: PathBuf, line: usize, problem: String },
    #[error("{}, line {line}, field {field}: {problem}", .path.display())]
    Field { path: PathBuf, line: usize, field: String, problem: String },
    #[error("{}: {problem}", .path.display())]
    File { path: PathBuf, problem: String },
    #[error("the task needs {need} positions of keys and values at a time, there is room for {room}")]
    Room { need: usize, room: usize },
    #[error("the tokenizer makes nothing of {0:?}")]
    NoTokens(String),
    #[error("the model failed")]
    Model(#[from] model::Error),
}
