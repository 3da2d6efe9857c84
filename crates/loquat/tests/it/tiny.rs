//! A Hugging Face directory of a few kilobytes: random weights, a real tokenizer.

use std::fs;
use std::path::{Path, PathBuf};

use model::{Config, ParamTable};
use serde_json::json;
use tensor::packed::WeightKind;
use tokenizer::Tokenizer;

use crate::support::root;

pub(crate) const TEMPLATE: &str =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

pub(crate) fn tokenizer_json() -> Vec<u8> {
    fs::read(root().join("fixtures/golden/tokenizer/smollm2.tokenizer.json")).unwrap()
}

/// Writes the directory as `dir/name`.
pub(crate) fn directory(dir: &Path, name: &str) -> PathBuf {
    shaped(dir, name, (2, 64))
}

/// As [`directory`], with so many layers of this width.
pub(crate) fn shaped(dir: &Path, name: &str, (n_layers, width): (usize, usize)) -> PathBuf {
    let tokenizer = Tokenizer::from_json(&tokenizer_json()).unwrap();
    let config = json!({
        "model_type": "llama", "num_hidden_layers": n_layers, "hidden_size": width, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": tokenizer.vocab_size() + 3,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
        "tie_word_embeddings": true, "hidden_act": "silu", "eos_token_id": 2,
    });
    let config = Config::from_json(config.to_string().as_bytes()).unwrap();
    let table = ParamTable::new(&config);
    let out = dir.join(name);
    model::hf::write_dir(&table.to_weights(&config, &table.init(7), WeightKind::Bf16), &out).unwrap();
    fs::write(out.join("tokenizer.json"), tokenizer_json()).unwrap();
    let config = json!({"eos_token": "<|im_end|>", "chat_template": TEMPLATE});
    fs::write(out.join("tokenizer_config.json"), config.to_string()).unwrap();
    out
}
