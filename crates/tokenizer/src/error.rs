//! What can go wrong between a file somebody handed us and ids.

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A step that failed, naming the field, file part or template line at fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("tokenizer.json is not the JSON it should be")]
    ParseJson(#[source] serde_json::Error),
    /// A field holds something that cannot be right: a bad file.
    #[error("tokenizer field {field}: {problem}")]
    Field { field: String, problem: String },
    /// A field holds something that may be right but that we do not implement.
    #[error("tokenizer field {field}: {what} is not supported")]
    Unsupported { field: String, what: String },
    #[error("tokenizer field {field}: cannot compile the split pattern")]
    Pattern {
        field: String,
        #[source]
        source: Box<fancy_regex::Error>,
    },
    #[error("llama2.c tokenizer: {0}")]
    Llama2c(String),
    #[error("cannot train a tokenizer: {0}")]
    Train(String),
    #[error("cannot parse the chat template")]
    ParseTemplate(#[source] minijinja::Error),
    #[error("cannot apply the chat template to these messages")]
    RenderTemplate(#[source] minijinja::Error),
    #[error("chat template: {0}")]
    Template(String),
}

impl Error {
    pub(crate) fn field(field: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Field { field: field.into(), problem: problem.into() }
    }

    pub(crate) fn unsupported(field: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Unsupported { field: field.into(), what: what.into() }
    }
}
