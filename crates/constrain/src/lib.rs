//! Output that fits a JSON schema, a regular expression, a choice or a grammar.
//!
//! What it is: the one place that knows both grammars and tokens. [`Grammars`] belongs to a model: it compiles a
//! [`Source`] against the model's vocabulary, keeps the last few, and hands out [`engine::Constraint`]s, which say after
//! every token which ones may come next. The automata are llguidance's; the limits around them are ours.
//!
//! What it is not: it draws no tokens, and it does not know how a client spells what it wants (`api` does).
//!
//! Where to start: [`Grammars::compile`] in `grammars.rs`; `vocabulary.rs` is the tokenizer as a tree of bytes, `state.rs`
//! one output's way through a grammar, `source.rs` what can be asked for and how much of it, `gbnf/` llama.cpp's grammars in
//! llguidance's words.
#![forbid(unsafe_code)]

mod cache;
mod gbnf;
mod grammars;
mod source;
mod state;
mod vocabulary;

pub use grammars::{CompileError, Grammars};
pub use source::Source;
