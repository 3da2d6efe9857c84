//! `loquat model show`: what a model is, and what it would take to serve it here.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use model::{BLOCK_TOKENS, KvType, Loaded, TokenizerFiles, WeightTensor};
use serde_json::{Value, json};
use tensor::packed::Packed;

use crate::machine::{bytes_text, count_text, memory_available};
use crate::serving;

/// What serving a model takes, in bytes.
struct Need {
    /// Weights as they lie in memory, repacked for the kernels.
    weights: u64,
    kv_per_token: u64,
    /// Left for keys and values once the weights are in memory; `None` where it cannot be known.
    left: Option<u64>,
    context_max: usize,
}

impl Need {
    fn of(loaded: &Loaded) -> Need {
        let config = &loaded.weights.config;
        let packed = |t: &WeightTensor| match t.dims[..] {
            // A row that is no whole number of blocks is refused when the model is loaded.
            [n_out, n_in] => Packed::bytes_of(t.kind, [n_out, n_in]).unwrap_or(t.n_bytes()),
            // Vectors are widened.
            _ => 4 * t.n_elems(),
        };
        let weights = loaded.weights.tensors.values().map(packed).sum::<usize>() as u64;
        Need {
            weights,
            kv_per_token: (config.kv_block_bytes(KV_TYPE) / BLOCK_TOKENS) as u64,
            left: memory_available().map(|free| free.saturating_sub(weights)),
            context_max: config.context_max,
        }
    }

    /// Tokens that fit in the memory left, as many as the model can use.
    fn tokens_that_fit(&self) -> Option<u64> {
        self.left.map(|left| (left / self.kv_per_token.max(1)).min(self.context_max as u64))
    }
}

/// The cache that a server uses when nothing else is said.
const KV_TYPE: KvType = KvType::Bf16;

pub(super) fn show(path: &Path, as_json: bool) -> Result<()> {
    let loaded = model::load(path).with_context(|| format!("cannot read the model {}", path.display()))?;
    let need = Need::of(&loaded);
    match as_json {
        true => println!("{}", to_json(path, &loaded, &need)),
        false => print!("{}", to_text(path, &loaded, &need)),
    }
    Ok(())
}

/// Tensors and bytes of each kind, the largest first.
fn kinds(loaded: &Loaded) -> Vec<(&'static str, usize, u64)> {
    let mut kinds: BTreeMap<&'static str, (usize, u64)> = BTreeMap::new();
    for tensor in loaded.weights.tensors.values() {
        let (n, bytes) = kinds.entry(tensor.kind.name()).or_default();
        *n += 1;
        *bytes += tensor.n_bytes() as u64;
    }
    let mut kinds: Vec<_> = kinds.into_iter().map(|(kind, (n, bytes))| (kind, n, bytes)).collect();
    kinds.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
    kinds
}

fn tokenizer_text(files: &TokenizerFiles) -> String {
    if matches!(files, TokenizerFiles::None) {
        return "none: it cannot be served".to_owned();
    }
    match serving::tokenizer(files) {
        Ok(tokenizer) => {
            let name = |id: Option<u32>| id.map_or("none".to_owned(), |id| tokenizer.decode_special(&[id]));
            format!(
                "{} ids, text begins with {} and ends with {}",
                tokenizer.vocab_size(),
                name(tokenizer.bos()),
                name(tokenizer.eos())
            )
        }
        Err(error) => format!("cannot be used: {error:#}"),
    }
}

fn to_text(path: &Path, loaded: &Loaded, need: &Need) -> String {
    let config = &loaded.weights.config;
    let mut lines = vec![
        ("model", path.display().to_string()),
        ("architecture", format!("{}, {} layers", config.architecture.gguf_name(), config.n_layers)),
        (
            "width",
            format!("{}, {} heads ({} for keys and values)", config.width, config.n_heads, config.n_kv_heads),
        ),
        ("parameters", count_text(loaded.weights.n_params() as u64)),
        ("bytes", bytes_text(loaded.weights.n_bytes() as u64)),
    ];
    for (kind, n, bytes) in kinds(loaded) {
        lines.push(("", format!("{kind:<6} {n:>4} tensors  {}", bytes_text(bytes))));
    }
    lines.push(("tokenizer", tokenizer_text(&loaded.tokenizer)));
    let template = loaded.chat_template.as_ref().map_or("none".to_owned(), |t| format!("{} bytes", t.len()));
    lines.push(("chat template", template));
    lines.push(("context", format!("{} tokens", need.context_max)));
    let full = need.kv_per_token * need.context_max as u64;
    lines.push((
        "keys, values",
        format!("{} a token, {} at full context", bytes_text(need.kv_per_token), bytes_text(full)),
    ));
    lines.push((
        "in memory",
        format!("{} of weights as the kernels read them, beside keys and values", bytes_text(need.weights)),
    ));
    if let (Some(left), Some(fit)) = (need.left, need.tokens_that_fit()) {
        let text = match fit {
            0 => "does not fit: the weights alone are more than is free".to_owned(),
            fit => format!("{fit} tokens of context in the {} then left", bytes_text(left)),
        };
        lines.push(("fits here", text));
    }
    lines.iter().map(|(name, text)| format!("{name:<14}{text}\n")).collect()
}

fn to_json(path: &Path, loaded: &Loaded, need: &Need) -> Value {
    let config = &loaded.weights.config;
    let kinds: serde_json::Map<String, Value> = kinds(loaded)
        .into_iter()
        .map(|(kind, n, bytes)| (kind.to_owned(), json!({"tensors": n, "bytes": bytes})))
        .collect();
    json!({
        "path": path.display().to_string(),
        "architecture": config.architecture.gguf_name(),
        "parameters": loaded.weights.n_params(),
        "bytes": loaded.weights.n_bytes(),
        "kinds": kinds,
        "layers": config.n_layers,
        "width": config.width,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "vocab": config.vocab,
        "tokenizer": tokenizer_text(&loaded.tokenizer),
        "chat_template": loaded.chat_template,
        "context_max": need.context_max,
        "kv_type": format!("{:?}", KV_TYPE).to_lowercase(),
        "kv_bytes_per_token": need.kv_per_token,
        "memory_bytes": need.weights,
        "context_that_fits": need.tokens_that_fit(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_bounded_by_memory_and_model() {
        let need = |left| Need { weights: 100, kv_per_token: 10, left, context_max: 50 };
        assert_eq!(need(Some(200)).tokens_that_fit(), Some(20));
        assert_eq!(need(Some(20_000)).tokens_that_fit(), Some(50));
        assert_eq!(need(Some(9)).tokens_that_fit(), Some(0));
        assert_eq!(need(None).tokens_that_fit(), None);
    }
}
