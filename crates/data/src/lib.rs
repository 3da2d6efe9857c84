//! Text to documents, token shards and batches.
//!
//! What this is: readers that turn files into [`Document`]s, [`ingest`] that turns documents into a dataset (token
//! shards, a tokenizer and a manifest in a store), and [`Dataset`] and [`Batches`] that read it back for training.
//! The same input gives the same bytes, an ingest that is killed goes on where it was, and the order of the batches is
//! a pure function of (seed, epoch, index).
//!
//! What this is not: it knows no models, and nothing here is tokenized while a model trains.
//!
//! Start reading in `ingest.rs`; `split.rs` and `permutation.rs` hold the two pure rules (which documents are held
//! out, which window comes when).

#![forbid(unsafe_code)]

mod batches;
mod chat;
mod dataset;
mod document;
mod encode;
mod error;
mod info;
mod ingest;
mod input;
mod mixture;
mod packing;
mod parts;
mod permutation;
mod plan;
mod prepare;
mod read;
mod split;
mod work;

pub use batches::{Batches, NO_TARGET, Row};
pub use chat::Form;
pub use dataset::Dataset;
pub use document::{BadRows, Content, Document, Documents, ReadOptions, Source, documents};
pub use error::{Error, Place, Result, chain};
pub use info::{ChatsInfo, DATASET_VERSION, DatasetInfo, InputInfo, Split, SplitInfo};
pub use ingest::ingest;
pub use mixture::Mixture;
pub use permutation::Permutation;
pub use plan::{IngestPlan, IngestProgress, IngestStage, TokenizerSource};
