//! How well a model does the tasks of a file: multiple choice by likelihood, continuations, questions with an answer.
//!
//! What it is: from a JSONL file to a table of scores with standard errors, by the arithmetic of lm-evaluation-harness.
//! A model runs here without an engine: contexts that several choices share are computed once, and what is computed
//! together does not change what comes out. So training can evaluate in its loop by the same code as `loquat eval`.
//!
//! What it is not: it loads no models, prints nothing, and knows no clock.
//!
//! Where to start: [`Task::open`] reads a file (`lines.rs`, then `item.rs`: the forms of items), [`run`] evaluates it.
//! `task.rs` lays out prompts, `reader.rs` computes likelihoods, `writer.rs` answers, `score.rs` counts.
#![forbid(unsafe_code)]

mod answer;
mod error;
mod item;
mod lines;
mod reader;
mod run;
mod score;
mod task;
mod writer;

pub use error::Error;
pub use item::Form;
pub use reader::{Reader, Score, Sequence};
pub use run::{Progress, Report, run};
pub use score::Metric;
pub use task::{Options, Task};
pub use writer::Writer;

pub(crate) type Result<T> = std::result::Result<T, Error>;
