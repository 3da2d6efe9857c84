//! Shapes of models that people know by name.

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValuesParser;
use model::Config;
use serde_json::{Value, json};

/// What a preset's tokenizer would be where there is no dataset to say it: the model's own vocabulary.
pub(crate) struct Preset {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    /// A Hugging Face `config.json`, field by field.
    config: fn() -> Value,
}

pub(crate) const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        about: "a Llama of 2.4 million parameters in its layers: minutes on two cores",
        config: tiny,
    },
    Preset { name: "small", about: "a Llama of 22 million in its layers: hours on two cores", config: small },
    Preset { name: "gpt2-124m", about: "GPT-2", config: gpt2_124m },
    Preset { name: "gpt2-355m", about: "GPT-2 medium", config: gpt2_355m },
    Preset { name: "smollm2-135m", about: "SmolLM2", config: smollm2_135m },
    Preset { name: "qwen3-0.6b", about: "Qwen 3", config: qwen3_06b },
    Preset { name: "llama-1b", about: "Llama 3.2", config: llama_1b },
    Preset { name: "llama-8b", about: "Llama 3.1", config: llama_8b },
    Preset { name: "llama-70b", about: "Llama 3.1", config: llama_70b },
    Preset { name: "llama-405b", about: "Llama 3.1", config: llama_405b },
    Preset {
        name: "nanochat-d24",
        about: "nanochat's model of 24 layers, as a shape to plan with",
        config: nanochat_d24,
    },
    Preset { name: "gpt3-175b", about: "GPT-3, as a shape to plan with", config: gpt3_175b },
];

/// For the command line.
pub(crate) fn names() -> PossibleValuesParser {
    PRESETS
        .iter()
        .map(|preset| clap::builder::PossibleValue::new(preset.name).help(preset.about))
        .collect::<Vec<_>>()
        .into()
}

/// The shape with a dataset's vocabulary. A model without learned positions takes any context.
pub(crate) fn config(name: &str, vocab: usize, end_of_text: u32, context: usize) -> Result<Config> {
    let preset = PRESETS.iter().find(|preset| preset.name == name);
    let mut json = (preset.with_context(|| format!("no preset {name}"))?.config)();
    json["vocab_size"] = vocab.into();
    json["eos_token_id"] = end_of_text.into();
    json["bos_token_id"] = Value::Null;
    let positions = if json["model_type"] == "gpt2" { "n_positions" } else { "max_position_embeddings" };
    let most = json[positions].as_u64().unwrap_or_default() as usize;
    if context > most {
        if positions == "n_positions" {
            bail!("--context {context}: {name} has {most} learned positions");
        }
        json[positions] = context.into();
    }
    Ok(Config::from_json(json.to_string().as_bytes())?)
}

fn llama(
    [layers, width, heads, kv_heads, ff]: [usize; 5],
    theta: f64,
    positions: usize,
    tied: bool,
) -> Value {
    json!({
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ff, "rms_norm_eps": 1e-5, "rope_theta": theta,
        "tie_word_embeddings": tied, "max_position_embeddings": positions,
    })
}

fn gpt2([layers, width, heads]: [usize; 3]) -> Value {
    json!({
        "model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    })
}

fn tiny() -> Value {
    llama([6, 192, 6, 2, 512], 10_000.0, 256, true)
}

fn small() -> Value {
    llama([8, 512, 8, 4, 1408], 10_000.0, 1024, true)
}

fn gpt2_124m() -> Value {
    gpt2([12, 768, 12])
}

fn gpt2_355m() -> Value {
    gpt2([24, 1024, 16])
}

fn smollm2_135m() -> Value {
    llama([30, 576, 9, 3, 1536], 100_000.0, 8192, true)
}

fn qwen3_06b() -> Value {
    json!({
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": true, "max_position_embeddings": 40_960,
    })
}

fn llama_1b() -> Value {
    llama([16, 2048, 32, 8, 8192], 500_000.0, 131_072, true)
}

fn llama_8b() -> Value {
    llama([32, 4096, 32, 8, 14_336], 500_000.0, 131_072, false)
}

/// Two matrices of four widths are as large as three of eight thirds.
fn nanochat_d24() -> Value {
    llama([24, 1536, 12, 12, 4096], 10_000.0, 2048, false)
}

fn llama_70b() -> Value {
    llama([80, 8192, 64, 8, 28_672], 500_000.0, 131_072, false)
}

fn llama_405b() -> Value {
    llama([126, 16_384, 128, 8, 53_248], 500_000.0, 131_072, false)
}

fn gpt3_175b() -> Value {
    let mut json = gpt2([96, 12_288, 96]);
    json["n_positions"] = 2048.into();
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters as their makers count them, with their own vocabularies.
    #[test]
    fn presets_have_the_sizes_of_their_names() {
        for (name, vocab, expected) in [
            ("gpt2-124m", 50_257, 124_439_808),
            ("gpt2-355m", 50_257, 354_823_168),
            ("smollm2-135m", 49_152, 134_515_008),
            ("qwen3-0.6b", 151_936, 596_049_920),
            ("llama-1b", 128_256, 1_235_814_400),
            ("llama-8b", 128_256, 8_030_261_248),
            ("llama-70b", 128_256, 70_553_706_496),
        ] {
            assert_eq!(config(name, vocab, 0, 128).unwrap().n_params(), expected, "{name}");
        }
        for preset in PRESETS {
            config(preset.name, 5000, 0, 128).unwrap().check_trainable().unwrap();
        }
        assert!(config("gpt2-124m", 5000, 0, 2048).unwrap_err().to_string().contains("1024"));
        assert_eq!(config("tiny", 5000, 0, 2048).unwrap().context_max, 2048);
    }
}
