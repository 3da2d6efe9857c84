//! [`Block`]: the one description of a transformer block that all architectures are instances of.
//!
//! ```text
//! x += post_norm(attention(rope(head_norm(norm(x) · Wqkvᵀ + b))) · Woᵀ + b)
//! x += post_norm(activation(norm(x) · Wupᵀ + b) · Wdownᵀ + b)
//! ```
//! What a model lacks (`post_norm`, `head_norm`, `b`) is the identity or nothing; in BERT the norms follow the sums. The forward pass, the loader and the
//! sizes read this description; none of them knows an architecture's name.

/// Families of models that differ in their blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM2; Mistral when it has a window.
    #[default]
    Llama,
    /// Biases of q, k and v.
    Qwen2,
    /// Norms of the heads of q and k.
    Qwen3,
    /// Norms before and after each sub-layer, a window in most layers.
    Gemma3,
    /// LayerNorm, learned positions, biases everywhere.
    Gpt2,
    /// As GPT-2, but it reads both ways and only embeds; norms come after the additions.
    Bert,
}

/// Between the two matrices of the feed-forward sub-layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) · up`
    SwiGlu,
    /// `gelu(gate) · up`, tanh form.
    GeGlu,
    /// `gelu(up)`, tanh form; there is no gate.
    Gelu,
    /// `gelu(up)`, exact.
    GeluErf,
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// LayerNorm with a bias instead of RMSNorm.
    pub layer_norm: bool,
    /// What a sub-layer gives is normed again before it is added.
    pub post_norms: bool,
    /// Biases of q, k and v.
    pub qkv_bias: bool,
    /// Biases of the other matrices.
    pub bias: bool,
    /// RMSNorm of every head of q and k, before positions are turned in.
    pub head_norms: bool,
    /// q, k and v are stored as one matrix.
    pub fused_qkv: bool,
    /// Feed-forward.
    pub activation: Activation,
    /// Positions are turned in (RoPE); otherwise a learned vector is added to the embedding.
    pub rotary: bool,
    /// Embeddings are multiplied by √c.
    pub scaled_embedding: bool,
    /// A token sees what is before it, and the model predicts the next. Otherwise it sees the whole text, and there is no
    /// output projection.
    pub causal: bool,
    /// The stream goes on from the normed sum: norms come after the additions. The first norm is then the embedding's,
    /// and the last layer's last one stands where other models have their final norm.
    pub normed_stream: bool,
}

const LLAMA: Block = Block {
    layer_norm: false,
    post_norms: false,
    qkv_bias: false,
    bias: false,
    head_norms: false,
    fused_qkv: false,
    activation: Activation::SwiGlu,
    rotary: true,
    scaled_embedding: false,
    causal: true,
    normed_stream: false,
};

const GPT2: Block = Block {
    layer_norm: true,
    qkv_bias: true,
    bias: true,
    fused_qkv: true,
    activation: Activation::Gelu,
    rotary: false,
    ..LLAMA
};

impl Architecture {
    /// Every architecture.
    pub const ALL: [Architecture; 6] =
        [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3, Self::Gpt2, Self::Bert];

    /// What its blocks are made of.
    pub fn block(self) -> Block {
        match self {
            Self::Llama => LLAMA,
            Self::Qwen2 => Block { qkv_bias: true, ..LLAMA },
            Self::Qwen3 => Block { head_norms: true, ..LLAMA },
            Self::Gemma3 => Block {
                post_norms: true,
                head_norms: true,
                activation: Activation::GeGlu,
                scaled_embedding: true,
                ..LLAMA
            },
            Self::Gpt2 => GPT2,
            Self::Bert => Block {
                fused_qkv: false,
                activation: Activation::GeluErf,
                causal: false,
                normed_stream: true,
                ..GPT2
            },
        }
    }

    /// The name GGUF files give it (`general.architecture`).
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
            Self::Gpt2 => "gpt2",
            Self::Bert => "bert",
        }
    }
}

impl Activation {
    /// Whether there is a gate beside the up-projection.
    pub fn is_gated(self) -> bool {
        matches!(self, Self::SwiGlu | Self::GeGlu)
    }
}
