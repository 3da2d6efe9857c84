//! Text to ids and back: byte-pair encoding, streaming decode, chat templates.
//!
//! What it is: our own byte-level and SentencePiece-style BPE, with loaders for Hugging Face `tokenizer.json`, GGUF
//! vocabularies and llama2.c's `tokenizer.bin`, BERT's WordPiece, a trainer, and the Jinja chat templates that models carry. Ids are equal
//! to those of Hugging Face `tokenizers`, which golden files and tests hold it to.
//!
//! What it is not: it knows no files, no stores, no models and no clock; bytes come in, ids go out.
//!
//! Where to start: [`Tokenizer`] (`tokenizer.rs`) walks a text through added tokens, normalization, splitting and
//! merging, one module each. `spec.rs` is the plain description that every loader produces and every writer reads.
#![forbid(unsafe_code)]

mod added;
mod alphabet;
mod bpe;
mod cache;
mod chat;
mod classes;
mod count;
mod error;
mod gguf;
mod gguf_write;
mod hf;
mod hf_rules;
mod index;
mod jinja;
mod lesson;
mod llama2c;
mod normalize;
mod scan;
mod sentencepiece;
mod spec;
mod split;
mod stream;
mod tokenizer;
mod train;
mod wordpiece;
mod write;

pub use chat::{ChatInput, ChatTemplate};
pub use error::{Error, Result};
pub use gguf::GgufVocab;
pub use lesson::Lesson;
pub use stream::StreamDecoder;
pub use tokenizer::{TokenId, Tokenizer};
pub use train::{BpeTrainer, TrainProgress};
pub use wordpiece::WordPiece;
