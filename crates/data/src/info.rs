use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The newest dataset format this program writes and the newest it reads.
pub const DATASET_VERSION: u32 = 2;
/// The first format, which holds text only.
pub(crate) const TEXT_VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    Train,
    Validation,
}

impl Split {
    pub(crate) const BOTH: [Split; 2] = [Split::Train, Split::Validation];

    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
        }
    }

    /// The bundle's file for a shard.
    pub(crate) fn shard_file(self, shard_idx: usize) -> String {
        format!("{}-{shard_idx:05}.bin", self.name())
    }

    /// The bundle's file for the marks of a shard of chats.
    pub(crate) fn marks_file(self, shard_idx: usize) -> String {
        format!("marks-{}-{shard_idx:05}.bin", self.name())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitInfo {
    /// Ids in the shards, one end-of-text id a document among them.
    pub n_tokens: u64,
    pub n_documents: u64,
    /// Of text, UTF-8: what bits per byte are counted over.
    ///
    /// Of chats the rows as they were read.
    pub n_bytes: u64,
}

/// What a dataset of chats says of itself beyond that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatsInfo {
    /// Every two documents are a better answer and a worse one to the same messages.
    pub is_pairs: bool,
    pub chat_template_sha256: String,
    /// Tokens that are to be learned, of the training split and of the validation split.
    pub n_learned: [u64; 2],
}

/// An input file, as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputInfo {
    /// Relative to the folder that the named input lay in.
    pub path: String,
    pub bytes: u64,
    pub sha256: String,
}

/// What a dataset is: the `meta` of its bundle. The bundle's files are `tokenizer.json` and the shards
/// `train-00000.bin`, ..., `validation-00000.bin`, ...: token ids, little-endian, `token_bytes` each, all shards of a
/// split `shard_tokens` long but the last. A document of text is its tokens and the end-of-text id. Of chats (version 2)
/// every shard has a file of marks beside it, `marks-train-00000.bin`, a byte a token: 1 where a document begins, plus 2
/// where the token is to be learned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetInfo {
    pub format_version: u32,
    pub name: String,
    pub vocab_size: usize,
    pub tokenizer_fingerprint: String,
    pub end_of_text: u32,
    /// 2 for vocabularies up to 65,536, else 4.
    pub token_bytes: usize,
    pub shard_tokens: usize,
    pub train: SplitInfo,
    pub validation: SplitInfo,
    pub validation_fraction: f64,
    /// Rows left out because they could not be read.
    pub n_rows_skipped: u64,
    /// Files in input directories whose format is not known.
    pub n_files_ignored: u64,
    /// SHA-256 over the inputs and every setting that the bytes depend on.
    pub plan_sha256: String,
    pub inputs: Vec<InputInfo>,
    /// `None` of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chats: Option<ChatsInfo>,
}

impl DatasetInfo {
    pub fn split(&self, split: Split) -> &SplitInfo {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Reads a bundle's `meta`; the version first, as a newer one may have other fields.
    pub(crate) fn parse(name: &str, meta: &serde_json::Value) -> Result<DatasetInfo> {
        let damaged = |reason: String| Error::Damaged { name: name.to_string(), reason };
        let version = meta["format_version"].as_u64().and_then(|version| u32::try_from(version).ok());
        match version {
            None => return Err(damaged("its manifest has no format_version".to_string())),
            Some(version) if version > DATASET_VERSION => {
                return Err(Error::NewerFormat { name: name.to_string(), version, known: DATASET_VERSION });
            }
            Some(_) => {}
        }
        let info: DatasetInfo =
            serde_json::from_value(meta.clone()).map_err(|error| damaged(error.to_string()))?;
        let is_possible = info.shard_tokens > 0
            && info.token_bytes == token_bytes(info.vocab_size)
            && (info.end_of_text as usize) < info.vocab_size;
        if is_possible { Ok(info) } else { Err(damaged("its manifest contradicts itself".to_string())) }
    }
}

/// Bytes of a stored id.
pub(crate) fn token_bytes(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Ids as a shard holds them.
pub(crate) fn encode_tokens(tokens: &[u32], token_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tokens.len() * token_bytes);
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes()[..token_bytes]);
    }
    bytes
}

/// The ids in (a part of) a shard.
pub(crate) fn decode_tokens(bytes: &[u8], token_bytes: usize) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(token_bytes).map(|id| {
        let mut all = [0; 4];
        all[..id.len()].copy_from_slice(id);
        u32::from_le_bytes(all)
    })
}
