//! What can go wrong with a model: its files, its shapes, a step asked of it.

use std::path::PathBuf;

/// An error of this crate. Every variant names the thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// What should be written could not be.
    #[error("cannot write {what}")]
    WriteTo {
        /// What it was.
        what: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A safetensors file or its index says something that cannot be true.
    #[error("{file}: {problem}")]
    Safetensors {
        /// Which file of the model's directory.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The configuration is not one of a model that can be computed here.
    #[error(transparent)]
    Config(#[from] crate::ConfigError),
    /// A GGUF file says something that cannot be true, or that is not supported.
    #[error("gguf: {field}: {problem}")]
    Gguf {
        /// The header field, metadata key or tensor.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A llama2.c file says something that cannot be true.
    #[error("llama2.c checkpoint: {0}")]
    Llama2c(String),
    /// The path is neither a model directory nor a GGUF file.
    #[error("{} is not a model: expected a .gguf file or a directory with config.json", .0.display())]
    NotAModel(PathBuf),
    /// The weights lack a tensor the architecture needs.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor's shape disagrees with the configuration.
    #[error("tensor {name} has shape {found:?}, the configuration needs {expected:?}")]
    TensorShape {
        /// Hugging Face name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor's bytes do not fit its shape and kind, or its kind cannot be used there.
    #[error("tensor {name}: {problem}")]
    Tensor {
        /// Hugging Face name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A low-rank adapter that cannot be used.
    #[error("adapter: {0}")]
    Adapter(String),
    /// A forward step that cannot be run: the caller's plan is inconsistent with the model or the cache.
    #[error("step: {0}")]
    Step(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
