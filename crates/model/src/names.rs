//! What every tensor is called: by Hugging Face, whose names [`crate::Weights`] uses, and in GGUF files.

use crate::{Architecture, Config};

/// A tensor's role. Which of them a model has, its [`crate::Block`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// `[v, c]`
    Embedding,
    /// `[t, c]`, learned.
    Positions,
    /// `[2, c]`, added to all embeddings: first and second text of a pair.
    TokenTypes,
    /// `[c]`
    EmbeddingNorm,
    /// `[c]`
    FinalNorm,
    /// `[v, c]`, where it is not the embedding.
    Head,
    /// A part of a layer.
    Layer(LayerPart),
}

/// A tensor's role in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerPart {
    AttentionNorm,
    /// q, k and v as one matrix.
    Qkv,
    Q,
    K,
    V,
    QNorm,
    KNorm,
    Output,
    AttentionPostNorm,
    FfNorm,
    Gate,
    Up,
    Down,
    FfPostNorm,
}

/// Role, Hugging Face's name after `model.layers.3.`, GGUF's name after `blk.3.`.
type LayerName = (LayerPart, &'static str, &'static str);
/// Role, Hugging Face's name, GGUF's name.
type WholeName = (Part, &'static str, &'static str);

use LayerPart as L;

const WHOLE: &[WholeName] = &[
    (Part::Embedding, "model.embed_tokens", "token_embd"),
    (Part::FinalNorm, "model.norm", "output_norm"),
    (Part::Head, "lm_head", "output"),
];

const LLAMA: &[LayerName] = &[
    (L::AttentionNorm, "input_layernorm", "attn_norm"),
    (L::Q, "self_attn.q_proj", "attn_q"),
    (L::K, "self_attn.k_proj", "attn_k"),
    (L::V, "self_attn.v_proj", "attn_v"),
    (L::QNorm, "self_attn.q_norm", "attn_q_norm"),
    (L::KNorm, "self_attn.k_norm", "attn_k_norm"),
    (L::Output, "self_attn.o_proj", "attn_output"),
    (L::FfNorm, "post_attention_layernorm", "ffn_norm"),
    (L::Gate, "mlp.gate_proj", "ffn_gate"),
    (L::Up, "mlp.up_proj", "ffn_up"),
    (L::Down, "mlp.down_proj", "ffn_down"),
];

/// As Llama's, but for the norms: here `post_attention_layernorm` does come after the attention.
const GEMMA_NORMS: &[LayerName] = &[
    (L::AttentionPostNorm, "post_attention_layernorm", "post_attention_norm"),
    (L::FfNorm, "pre_feedforward_layernorm", "ffn_norm"),
    (L::FfPostNorm, "post_feedforward_layernorm", "post_ffw_norm"),
];

const GPT2_WHOLE: &[WholeName] = &[
    (Part::Embedding, "transformer.wte", "token_embd"),
    (Part::Positions, "transformer.wpe", "position_embd"),
    (Part::FinalNorm, "transformer.ln_f", "output_norm"),
    (Part::Head, "lm_head", "output"),
];

const GPT2: &[LayerName] = &[
    (L::AttentionNorm, "ln_1", "attn_norm"),
    (L::Qkv, "attn.c_attn", "attn_qkv"),
    (L::Output, "attn.c_proj", "attn_output"),
    (L::FfNorm, "ln_2", "ffn_norm"),
    (L::Up, "mlp.c_fc", "ffn_up"),
    (L::Down, "mlp.c_proj", "ffn_down"),
];

const BERT_WHOLE: &[WholeName] = &[
    (Part::Embedding, "embeddings.word_embeddings", "token_embd"),
    (Part::Positions, "embeddings.position_embeddings", "position_embd"),
    (Part::TokenTypes, "embeddings.token_type_embeddings", "token_types"),
    (Part::EmbeddingNorm, "embeddings.LayerNorm", "token_embd_norm"),
];

const BERT: &[LayerName] = &[
    (L::Q, "attention.self.query", "attn_q"),
    (L::K, "attention.self.key", "attn_k"),
    (L::V, "attention.self.value", "attn_v"),
    (L::Output, "attention.output.dense", "attn_output"),
    (L::AttentionPostNorm, "attention.output.LayerNorm", "attn_output_norm"),
    (L::Up, "intermediate.dense", "ffn_up"),
    (L::Down, "output.dense", "ffn_down"),
    (L::FfPostNorm, "output.LayerNorm", "layer_output_norm"),
];

impl Architecture {
    fn whole_names(self) -> &'static [WholeName] {
        match self {
            Self::Gpt2 => GPT2_WHOLE,
            Self::Bert => BERT_WHOLE,
            _ => WHOLE,
        }
    }

    /// The first name of a role (or of a file) is the one that counts.
    fn layer_names(self) -> impl Iterator<Item = &'static LayerName> {
        let (first, rest): (&[LayerName], &[LayerName]) = match self {
            Self::Gpt2 => (GPT2, &[]),
            Self::Bert => (BERT, &[]),
            Self::Gemma3 => (GEMMA_NORMS, LLAMA),
            _ => (LLAMA, &[]),
        };
        first.iter().chain(rest)
    }

    fn layer_prefix(self) -> &'static str {
        match self {
            Self::Gpt2 => "transformer.h.",
            Self::Bert => "encoder.layer.",
            _ => "model.layers.",
        }
    }

    /// Hugging Face's name of a tensor without `.weight` or `.bias`.
    ///
    /// # Panics
    /// If the architecture has no such part.
    pub(crate) fn hf_module(self, part: Part, layer: usize) -> String {
        let Part::Layer(wanted) = part else {
            let (_, name, _) =
                self.whole_names().iter().find(|(other, ..)| *other == part).expect("its block has the part");
            return (*name).to_owned();
        };
        let (_, name, _) =
            self.layer_names().find(|(other, ..)| *other == wanted).expect("its block has the part");
        format!("{}{layer}.{name}", self.layer_prefix())
    }

    /// The role of a tensor with this Hugging Face name (without `.weight` or `.bias`).
    pub(crate) fn part_of_hf(self, module: &str) -> Option<Part> {
        if let Some((part, ..)) = self.whole_names().iter().find(|(_, name, _)| *name == module) {
            return Some(*part);
        }
        let (_, rest) = module.strip_prefix(self.layer_prefix())?.split_once('.')?;
        self.layer_names().find(|(_, name, _)| *name == rest).map(|(part, ..)| Part::Layer(*part))
    }
}

/// Hugging Face's name of a tensor that a GGUF file calls `name`, and its role.
pub(crate) fn from_gguf(name: &str, config: &Config) -> Option<(String, Part)> {
    let architecture = config.architecture;
    let (module, suffix) = split_suffix(name)?;
    if let Some((part, hf, _)) = architecture.whole_names().iter().find(|(.., gguf)| *gguf == module) {
        return Some((format!("{hf}{suffix}"), *part));
    }
    let (layer, rest) = module.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok().filter(|&layer| layer < config.n_layers)?;
    let (part, ..) = architecture.layer_names().find(|(.., gguf)| *gguf == rest)?;
    let part = Part::Layer(*part);
    Some((format!("{}{suffix}", architecture.hf_module(part, layer)), part))
}

/// What a GGUF file calls the tensor with this Hugging Face name; `None` if the architecture has no such tensor.
pub fn to_gguf(name: &str, config: &Config) -> Option<String> {
    let architecture = config.architecture;
    let (module, suffix) = split_suffix(name)?;
    let part = architecture.part_of_hf(module)?;
    let Part::Layer(wanted) = part else {
        let (.., gguf) = architecture.whole_names().iter().find(|(other, ..)| *other == part)?;
        return Some(format!("{gguf}{suffix}"));
    };
    let (layer, _) = module.strip_prefix(architecture.layer_prefix())?.split_once('.')?;
    let (.., gguf) = architecture.layer_names().find(|(other, ..)| *other == wanted)?;
    Some(format!("blk.{layer}.{gguf}{suffix}"))
}

/// Module and `.weight` or `.bias`.
pub(crate) fn split_suffix(name: &str) -> Option<(&str, &str)> {
    let (module, _) = name.rsplit_once('.')?;
    let suffix = &name[module.len()..];
    matches!(suffix, ".weight" | ".bias").then_some((module, suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (architecture, hf, gguf) in [
            (Architecture::Llama, "model.embed_tokens.weight", "token_embd.weight"),
            (
                Architecture::Llama,
                "model.layers.11.post_attention_layernorm.weight",
                "blk.11.ffn_norm.weight",
            ),
            (Architecture::Qwen2, "model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
            (Architecture::Qwen3, "model.layers.3.self_attn.k_norm.weight", "blk.3.attn_k_norm.weight"),
            (
                Architecture::Gemma3,
                "model.layers.2.post_attention_layernorm.weight",
                "blk.2.post_attention_norm.weight",
            ),
            (
                Architecture::Gemma3,
                "model.layers.2.pre_feedforward_layernorm.weight",
                "blk.2.ffn_norm.weight",
            ),
            (Architecture::Gpt2, "transformer.h.7.attn.c_attn.bias", "blk.7.attn_qkv.bias"),
            (Architecture::Gpt2, "transformer.wpe.weight", "position_embd.weight"),
            (Architecture::Gpt2, "lm_head.weight", "output.weight"),
        ] {
            let config = Config { architecture, n_layers: 12, ..crate::config::tests::tiny() };
            assert_eq!(to_gguf(hf, &config).unwrap(), gguf);
            assert_eq!(from_gguf(gguf, &config).unwrap().0, hf);
        }
        let config = crate::config::tests::tiny();
        for bad in ["blk.2.attn_q.weight", "blk.0.attn_q", "blk.x.attn_q.weight", "rope_freqs.weight", ""] {
            assert_eq!(from_gguf(bad, &config), None, "{bad}");
        }
    }
}
