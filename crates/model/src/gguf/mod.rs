//! Reads GGUF files, versions 2 and 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), of architecture
//! `llama` with weights of kind F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
//!
//! Nothing in a file is believed: counts, lengths and offsets are compared with the size of the file before anything is
//! allocated, tensors must not overlap, and what would change the mathematics and is not computed here (another
//! architecture, biases, scaled RoPE) is refused by name.

mod metadata;
mod reader;
mod tensors;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use metadata::Metadata;
use reader::{Reader, bad};
use tensors::{TensorInfo, read_infos};

use crate::{Config, Error, Result, Weights};

/// `GGUF` as a little-endian number.
const MAGIC: u32 = 0x4655_4747;

/// A model as a GGUF file holds it.
#[derive(Debug)]
pub struct Gguf {
    /// Shape and tensors.
    pub weights: Weights,
    /// The tokenizer's fields as they stand in the file; `None` if it has none.
    pub vocab: Option<Vocab>,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
}

/// Metadata `tokenizer.ggml.*`, which a tokenizer can be built of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocab {
    /// `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// Name of the rule that splits text into words.
    pub pre: Option<String>,
    /// By id.
    pub tokens: Vec<String>,
    /// One a token, or empty.
    pub scores: Vec<f32>,
    /// One a token, or empty.
    pub token_types: Vec<i32>,
    /// `"left right"`, in order of rank.
    pub merges: Vec<String>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Stands for what is not in the vocabulary.
    pub unk: Option<u32>,
    /// Whether `bos` is put before every text.
    pub add_bos: Option<bool>,
    /// Whether a space is put before every text.
    pub add_space_prefix: Option<bool>,
}

/// Reads the file at `path`.
pub fn read(path: &Path) -> Result<Gguf> {
    let file = File::open(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    read_from(BufReader::with_capacity(1 << 18, file))
}

/// Reads a file from any source.
pub fn read_from(source: impl Read + Seek) -> Result<Gguf> {
    let mut reader = Reader::new(source)?;
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
    let config = config(&metadata, &infos)?;
    let weights = tensors::read_tensors(&mut reader, infos, config)?;
    let chat_template = metadata.text("tokenizer.chat_template")?.map(str::to_owned);
    Ok(Gguf { vocab: vocab(&mut metadata, weights.config.vocab)?, weights, chat_template })
}

/// The shape, from metadata `llama.*` and the tensors' presence.
fn config(metadata: &Metadata, infos: &[TensorInfo]) -> Result<Config> {
    let architecture = metadata.text("general.architecture")?;
    match architecture {
        Some("llama") => {}
        Some(other) => {
            return Err(bad("general.architecture", format!("{other:?} is not supported, only llama is")));
        }
        None => return Err(bad("general.architecture", "is missing")),
    }
    if metadata.count("llama.expert_count")?.is_some_and(|n| n > 0) {
        return Err(bad("llama.expert_count", "mixtures of experts are not supported"));
    }
    if let Some(kind) = metadata.text("llama.rope.scaling.type")?.filter(|kind| *kind != "none") {
        return Err(bad("llama.rope.scaling.type", format!("{kind:?} is not supported")));
    }
    let embedding = infos.iter().find(|info| info.name == "token_embd.weight");
    let embedding = embedding.ok_or_else(|| Error::MissingTensor("token_embd.weight".into()))?;
    let n_heads = metadata.required_count("llama.attention.head_count")?;
    let width = metadata.required_count("llama.embedding_length")?;
    let rope_width = metadata.count("llama.rope.dimension_count")?;
    let head_width = match metadata.count("llama.attention.key_length")?.or(rope_width) {
        Some(d) => d,
        None if n_heads > 0 && width.is_multiple_of(n_heads) => width / n_heads,
        None => {
            return Err(bad("llama.embedding_length", format!("{width} is no multiple of {n_heads} heads")));
        }
    };
    for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
        if metadata.count(key)?.is_some_and(|d| d != head_width) {
            return Err(bad(
                key,
                format!("differs from the head width {head_width}, which is not supported"),
            ));
        }
    }
    let eps_key = "llama.attention.layer_norm_rms_epsilon";
    let config = Config {
        n_layers: metadata.required_count("llama.block_count")?,
        width,
        n_heads,
        n_kv_heads: metadata.count("llama.attention.head_count_kv")?.unwrap_or(n_heads),
        head_width,
        ff_width: metadata.required_count("llama.feed_forward_length")?,
        vocab: embedding.dims[0],
        norm_eps: metadata.float(eps_key)?.ok_or_else(|| bad(eps_key, "is missing"))?,
        rope_theta: metadata.float("llama.rope.freq_base")?.unwrap_or(10_000.0),
        tied_embeddings: !infos.iter().any(|info| info.name == "output.weight"),
        context_max: metadata.required_count("llama.context_length")?,
        bos: metadata.id("tokenizer.ggml.bos_token_id")?,
        eos: metadata.id("tokenizer.ggml.eos_token_id")?.into_iter().collect(),
    };
    config.check()?;
    Ok(config)
}

fn vocab(metadata: &mut Metadata, n_ids: usize) -> Result<Option<Vocab>> {
    let Some(model) = metadata.text("tokenizer.ggml.model")?.map(str::to_owned) else { return Ok(None) };
    let vocab = Vocab {
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
