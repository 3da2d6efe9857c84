//! Reads GGUF files, versions 2 and 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), of every
//! [`crate::Architecture`].
//!
//! Nothing in a file is believed: counts, lengths and offsets are compared with the size of the file before anything is
//! allocated, tensors must not overlap, and what would change the mathematics and is not computed here (another
//! architecture, experts, capped scores) is refused by name.

mod config;
mod metadata;
mod reader;
mod tensors;
#[cfg(test)]
mod tests;
mod write;

use std::path::Path;

pub use crate::names::to_gguf as tensor_name;
use metadata::Metadata;
use reader::{Reader, bad};
use tensors::read_infos;
use tokenizer::GgufVocab;
pub use write::{Extras, write};

use crate::source::Source;
use crate::{Result, Weights};

/// `GGUF` as a little-endian number.
const MAGIC: u32 = 0x4655_4747;

/// A model as a GGUF file holds it.
#[derive(Debug)]
pub struct Gguf {
    /// Shape and tensors.
    pub weights: Weights,
    /// The tokenizer's fields as they stand in the file; `None` if it has none.
    pub vocab: Option<GgufVocab>,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
}

/// Reads the file at `path`, but for the tensors' numbers, which are read when they are wanted.
pub fn read(path: &Path) -> Result<Gguf> {
    read_from(&Source::open(path)?)
}

fn read_from(source: &Source) -> Result<Gguf> {
    let mut reader = Reader::new(source.reader())?;
    let magic = reader.u32("magic")?;
    if magic != MAGIC {
        return Err(bad("magic", format!("{magic:#010x} is not a GGUF file's")));
    }
    let version = reader.u32("version")?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        return Err(bad("version", "the file is big-endian, which is not supported"));
    }
    if !(2..=3).contains(&version) {
        return Err(bad("version", format!("{version}, only 2 and 3 are supported")));
    }
    let n_tensors = reader.u64("tensor count")?;
    let n_pairs = reader.u64("metadata count")?;
    let mut metadata = Metadata::read(&mut reader, n_pairs)?;
    let infos = read_infos(&mut reader, n_tensors, &metadata)?;
    let config = config::read(&metadata, &infos)?;
    let weights = tensors::tensors(source, infos, config)?;
    let chat_template = metadata.text("tokenizer.chat_template")?.map(str::to_owned);
    Ok(Gguf { vocab: vocab(&mut metadata, weights.config.vocab)?, weights, chat_template })
}

fn vocab(metadata: &mut Metadata, n_ids: usize) -> Result<Option<GgufVocab>> {
    let Some(model) = metadata.text("tokenizer.ggml.model")?.map(str::to_owned) else { return Ok(None) };
    let vocab = GgufVocab {
        model,
        pre: metadata.text("tokenizer.ggml.pre")?.map(str::to_owned),
        tokens: metadata.take_texts("tokenizer.ggml.tokens")?,
        scores: metadata.take_floats("tokenizer.ggml.scores")?,
        token_types: metadata.take_ints("tokenizer.ggml.token_type")?,
        merges: metadata.take_texts("tokenizer.ggml.merges")?,
        bos: metadata.id("tokenizer.ggml.bos_token_id")?,
        eos: metadata.id("tokenizer.ggml.eos_token_id")?,
        unk: metadata.id("tokenizer.ggml.unknown_token_id")?,
        add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
        add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
    };
    if vocab.tokens.len() != n_ids {
        let problem = format!("{} tokens, but the embedding has {n_ids} rows", vocab.tokens.len());
        return Err(bad("tokenizer.ggml.tokens", problem));
    }
    for (key, len) in [("scores", vocab.scores.len()), ("token_type", vocab.token_types.len())] {
        if len != 0 && len != n_ids {
            return Err(bad(&format!("tokenizer.ggml.{key}"), format!("{len} entries for {n_ids} tokens")));
        }
    }
    Ok(Some(vocab))
}
