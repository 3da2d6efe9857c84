use std::path::PathBuf;

use sha2::{Digest, Sha256};
use store::ObjectName;
use tokenizer::{ChatTemplate, Tokenizer};

use crate::info::{InputInfo, TEXT_VERSION};
use crate::{BadRows, Content, DATASET_VERSION, Error, Form, ReadOptions, Result};

/// Beyond this a BPE trainer learns nothing new for a vocabulary of any usual size.
const SAMPLE_BYTES: usize = 64 << 20;
/// 2^20 tokens * 2 B = 2 MiB: small enough to be read whole and checked, large enough for one request.
const SHARD_TOKENS: usize = 1 << 20;
/// Text between two records of progress: what a killed ingest does again at most, and what is in memory.
const PART_BYTES: usize = 8 << 20;

/// What to make a dataset from.
#[derive(Clone, Debug)]
pub struct IngestPlan {
    /// One part of an object name; the dataset is the bundle `datasets/<name>`.
    pub name: String,
    /// Files and directories, in the order in which they are read.
    pub inputs: Vec<PathBuf>,
    pub read: ReadOptions,
    /// The share of documents held out, by hash of their text; 0 holds out none. Of two or more different documents at
    /// least one is held out; a single one is an error, as a document is never cut in two.
    pub validation_fraction: f64,
    pub shard_tokens: usize,
    pub tokenizer: TokenizerSource,
    /// How chats become text: that of the model which learns from them. Only with [`Content::Chats`], and always then.
    pub chat_template: Option<ChatTemplate>,
    /// A tokenizer is trained on the training documents with the largest hashes that fit in this.
    pub sample_bytes: usize,
    /// Does not change the result.
    pub part_bytes: usize,
    /// Does not change the result.
    pub n_threads: usize,
}

#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// Byte-level BPE from the inputs.
    Train {
        vocab_size: usize,
    },
    Given(Tokenizer),
}

/// How far an ingest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IngestProgress {
    pub stage: IngestStage,
    /// Work of this stage that is done, of `total`: bytes of input files (checksums), of text (scan, where compressed
    /// inputs make the total an estimate, and tokens), or merges (tokenizer).
    pub done: u64,
    pub total: u64,
    pub n_documents: u64,
    pub n_tokens: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IngestStage {
    Checksums,
    Scan,
    Tokenizer,
    Tokens,
    Publish,
}

impl IngestPlan {
    pub fn new(name: &str, inputs: Vec<PathBuf>, tokenizer: TokenizerSource) -> IngestPlan {
        IngestPlan {
            name: name.to_string(),
            inputs,
            read: ReadOptions::default(),
            validation_fraction: 0.05,
            shard_tokens: SHARD_TOKENS,
            tokenizer,
            chat_template: None,
            sample_bytes: SAMPLE_BYTES,
            part_bytes: PART_BYTES,
            n_threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.name.contains('/') || ObjectName::parse(&self.name).is_err() {
            return Err(Error::Name { name: self.name.chars().take(100).collect() });
        }
        let refuse = |reason: &str| Err(Error::Plan { name: self.name.clone(), reason: reason.to_string() });
        if self.inputs.is_empty() {
            return refuse("no inputs");
        }
        if !(0.0..=0.5).contains(&self.validation_fraction) {
            return refuse("the validation fraction must be between 0 and 0.5");
        }
        if self.shard_tokens == 0 || self.sample_bytes == 0 || self.read.document_bytes_max == 0 {
            return refuse("shard_tokens, sample_bytes and document_bytes_max must not be 0");
        }
        match (self.read.content, &self.chat_template, &self.tokenizer) {
            (Content::Text, None, _) | (Content::Chats(_), Some(_), TokenizerSource::Given(_)) => Ok(()),
            _ => refuse("chats need the tokenizer and the chat template of the model that learns from them"),
        }
    }

    /// The oldest that can hold what is made.
    pub(crate) fn format_version(&self) -> u32 {
        if self.chat_template.is_some() { DATASET_VERSION } else { TEXT_VERSION }
    }

    /// SHA-256 over all that the resulting bytes depend on.
    pub(crate) fn sha256(&self, inputs: &[InputInfo]) -> String {
        let tokenizer = match &self.tokenizer {
            TokenizerSource::Train { vocab_size } => format!("train {vocab_size} {}", self.sample_bytes),
            TokenizerSource::Given(tokenizer) => format!("given {}", tokenizer.fingerprint()),
        };
        let ReadOptions { content, text_field, separator, bad_rows, document_bytes_max } = &self.read;
        let mut settings = serde_json::json!({
            "format_version": self.format_version(),
            "inputs": inputs,
            "text_field": text_field,
            "separator": separator,
            "skips_bad_rows": *bad_rows == BadRows::Skip,
            "document_bytes_max": document_bytes_max,
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
            "tokenizer": tokenizer,
        });
        if let (Content::Chats(form), Some(template)) = (content, &self.chat_template) {
            settings["chats"] = serde_json::json!({
                "form": form.map(Form::name),
                "chat_template": template.source(),
            });
        }
        hex::encode(Sha256::digest(settings.to_string()))
    }
}
