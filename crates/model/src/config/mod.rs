//! A model's shape and constants, checked.
//!
//! Every number is bounded before anything is allocated from it, and a setting that would change the mathematics
//! in a way this crate does not compute is refused by name. [`block`](Block) says what the architectures differ in, `json`
//! reads and writes Hugging Face's `config.json`.

mod block;
mod json;
mod json_rope;
mod rope;
#[cfg(test)]
pub(crate) mod tests;

pub use block::{Activation, Architecture, Block};
pub(crate) use rope::yarn_attention_factor;
pub use rope::{Rope, RopeScaling};
use tensor::paged_attention::{KvCache, KvDims, KvType};

/// The newest layout of model directories this build understands. Written into `config.json` beside the
/// Hugging Face keys; a directory without it is a plain Hugging Face directory.
pub const FORMAT_VERSION: u64 = 1;

pub(crate) const N_LAYERS_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 16;
const N_HEADS_MAX: usize = 1 << 10;
const HEAD_WIDTH_MAX: usize = 1 << 10;
const FF_WIDTH_MAX: usize = 1 << 18;
const VOCAB_MAX: usize = 1 << 22;
const CONTEXT_MAX: usize = 1 << 24;
const N_PARAMS_MAX: usize = 1 << 41;
const N_EOS_MAX: usize = 64;
/// BERT's: first and second text of a pair. A text alone is the first.
pub(crate) const N_TOKEN_TYPES: usize = 2;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config.json is not valid JSON of the expected types")]
    Parse(#[source] serde_json::Error),
    #[error("config.json: {field} is missing")]
    Missing { field: &'static str },
    #[error("config.json: {field} is {value}, allowed is {allowed}")]
    OutOfRange { field: &'static str, value: String, allowed: String },
    #[error("config.json: {field} = {value} is not supported")]
    Unsupported { field: &'static str, value: String },
    #[error("the model cannot be divided into {n} parts: {why}")]
    Indivisible { n: usize, why: String },
    #[error("config.json has format version {found}, this build reads up to {FORMAT_VERSION}")]
    Newer { found: u64 },
    #[error("models of type {0} cannot be trained here, only those that predict the next token can")]
    NotTrainable(&'static str),
}

type Result<T> = std::result::Result<T, ConfigError>;

/// The shape and constants of one model. A value that came from [`Config::from_json`] or passed [`Config::check`] has
/// every count in 1..=its limit, whole heads, and a parameter count that fits `usize`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What its blocks are made of.
    pub architecture: Architecture,
    pub n_layers: usize,
    /// c, the width of the residual stream.
    pub width: usize,
    /// h, query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// g, key/value heads.
    pub n_kv_heads: usize,
    /// d, the width of one head; even. `n_heads * head_width` need not be `width`.
    pub head_width: usize,
    /// f, the inner width of the feed-forward sub-layer.
    pub ff_width: usize,
    /// v, the number of token ids.
    pub vocab: usize,
    /// Added to the mean square (or the variance) in norms.
    pub norm_eps: f32,
    /// Rotary positions; unused where positions are learned.
    pub rope: Rope,
    /// Scores are divided by its square root; `None`: by √d.
    pub query_scalar: Option<f32>,
    /// Layers that see only the last positions.
    pub window: Option<Window>,
    /// The output projection is the embedding matrix.
    pub tied_embeddings: bool,
    /// Positions the model was trained for.
    pub context_max: usize,
    pub bos: Option<u32>,
    /// Ids that end a text; the first is the one written when only one may be.
    pub eos: Vec<u32>,
}

/// Local attention in some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// Positions a token sees there, itself included.
    pub n_positions: usize,
    /// Base of unscaled rotary positions there; `None`: as in the other layers.
    pub rope_theta: Option<f32>,
    /// One a layer: whether it has the window.
    pub layers: Vec<bool>,
}

impl Window {
    /// Every layer local but each `n`-th (the last of each group of n).
    pub(crate) fn full_every(n: usize, n_layers: usize) -> Vec<bool> {
        (0..n_layers).map(|l| (l + 1) % n != 0).collect()
    }
}

impl Config {
    /// Checks the invariants named on [`Config`].
    pub fn check(&self) -> Result<()> {
        self.check_sizes()?;
        within_open("rms_norm_eps", f64::from(self.norm_eps), 1.0)?;
        self.rope.check(self.head_width)?;
        if let Some(scalar) = self.query_scalar {
            within_open("query_pre_attn_scalar", scalar.into(), 1e9)?;
        }
        if let Some(window) = &self.window {
            window.check(self.n_layers)?;
        }
        self.check_ids()?;
        // The limits above keep every product below 2^60, so this cannot overflow.
        within("number of parameters", self.n_params(), N_PARAMS_MAX)
    }

    fn check_sizes(&self) -> Result<()> {
        within("num_hidden_layers", self.n_layers, N_LAYERS_MAX)?;
        within("hidden_size", self.width, WIDTH_MAX)?;
        within("num_attention_heads", self.n_heads, N_HEADS_MAX)?;
        within("num_key_value_heads", self.n_kv_heads, self.n_heads)?;
        within("head_dim", self.head_width, HEAD_WIDTH_MAX)?;
        within("intermediate_size", self.ff_width, FF_WIDTH_MAX)?;
        within("vocab_size", self.vocab, VOCAB_MAX)?;
        within("max_position_embeddings", self.context_max, CONTEXT_MAX)?;
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let allowed = format!("a divisor of {}", self.n_heads);
            return Err(out_of_range("num_key_value_heads", self.n_kv_heads, allowed));
        }
        if !self.head_width.is_multiple_of(2) {
            return Err(out_of_range("head_dim", self.head_width, "an even number"));
        }
        Ok(())
    }

    fn check_ids(&self) -> Result<()> {
        if self.eos.len() > N_EOS_MAX {
            return Err(out_of_range("eos_token_id", self.eos.len(), format!("up to {N_EOS_MAX} ids")));
        }
        let bos = self.bos.iter().map(|id| ("bos_token_id", id));
        for (field, id) in bos.chain(self.eos.iter().map(|id| ("eos_token_id", id))) {
            if *id as usize >= self.vocab {
                return Err(out_of_range(field, id, format!("0..{}", self.vocab)));
            }
        }
        Ok(())
    }

    /// Refuses what `TrainModel` does not compute.
    ///
    /// # Errors
    /// If the model does not predict the next token.
    pub fn check_trainable(&self) -> Result<()> {
        match self.block().causal {
            true => Ok(()),
            false => Err(ConfigError::NotTrainable(self.architecture.gguf_name())),
        }
    }

    /// What the blocks are made of.
    pub fn block(&self) -> Block {
        self.architecture.block()
    }

    /// Width of all query heads together, h·d.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_width
    }

    /// Width of all key (or value) heads together, g·d.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_width
    }

    /// Factor of attention scores.
    pub fn score_scale(&self) -> f32 {
        1.0 / self.query_scalar.unwrap_or(self.head_width as f32).sqrt()
    }

    /// Positions a token sees in layer `l`, itself included; `None`: all before it.
    pub fn window_of(&self, l: usize) -> Option<usize> {
        self.window.as_ref().filter(|window| window.layers[l]).map(|window| window.n_positions)
    }

    /// Number of parameters; a tied embedding counts once.
    pub fn n_params(&self) -> usize {
        let (c, f, d, block) = (self.width, self.ff_width, self.head_width, self.block());
        let when = |there: bool, n: usize| if there { n } else { 0 };
        let norm = c * if block.layer_norm { 2 } else { 1 };
        let layer = self.n_layer_matmul_params()
            + norm * if block.post_norms { 4 } else { 2 }
            + when(block.head_norms, 2 * d)
            + when(block.qkv_bias, self.q_width() + 2 * self.kv_width())
            + when(block.bias, 2 * c + f * if block.activation.is_gated() { 2 } else { 1 });
        let embeddings = self.vocab * c * if self.tied_embeddings { 1 } else { 2 };
        let positions = when(!block.rotary, self.context_max * c) + when(!block.causal, N_TOKEN_TYPES * c);
        embeddings + positions + self.n_layers * layer + norm
    }

    /// Bytes of keys and values one token leaves in the cache, `elem_bytes` per number:
    /// 2 (k, v) · l · g · d · elem_bytes. Layers with a window count in full: the cache keeps their old positions too.
    pub fn kv_bytes_per_token(&self, elem_bytes: usize) -> usize {
        2 * self.n_layers * self.kv_width() * elem_bytes
    }

    /// Bytes that one block of the cache really takes (heads are padded to whole registers).
    pub fn kv_block_bytes(&self, kv_type: KvType) -> usize {
        KvCache::block_bytes(self.kv_dims(), kv_type)
    }

    pub(crate) fn kv_dims(&self) -> KvDims {
        let Config { n_layers, n_heads, n_kv_heads, head_width, .. } = *self;
        KvDims { n_layers, n_heads, n_kv_heads, head_width }
    }

    /// Floating-point operations (multiply and add counted as two) that forward and backward of one token need on
    /// average in sequences of `t` tokens: 6 per matrix parameter, and 6·t·h·d per layer for causal attention
    /// (half of the t×t square: 2·2·(t/2) forward, twice that backward). The embedding look-up is free.
    pub fn flops_per_token_train(&self, t: usize) -> f64 {
        self.flops_per_token(6.0, t)
    }

    /// As [`Config::flops_per_token_train`], where the matrices are frozen and have no gradient: 4 per parameter.
    pub fn flops_per_token_frozen(&self, t: usize) -> f64 {
        self.flops_per_token(4.0, t)
    }

    fn flops_per_token(&self, per_param: f64, t: usize) -> f64 {
        let matmul_params = self.n_layers * self.n_layer_matmul_params() + self.vocab * self.width;
        per_param * matmul_params as f64 + 6.0 * (self.n_layers * self.q_width() * t) as f64
    }

    /// What [`Config::flops_per_token_train`] is made of: one layer's share, and the head's.
    pub(crate) fn flops_of_layer_and_head(&self, t: usize) -> [f64; 2] {
        let layer = self.n_layer_matmul_params() + self.q_width() * t;
        [layer, self.vocab * self.width].map(|n| 6.0 * n as f64)
    }

    fn n_layer_matmul_params(&self) -> usize {
        let n_ff = if self.block().activation.is_gated() { 3 } else { 2 };
        self.width * (2 * self.q_width() + 2 * self.kv_width() + n_ff * self.ff_width)
    }
}

impl Window {
    fn check(&self, n_layers: usize) -> Result<()> {
        within("sliding_window", self.n_positions, CONTEXT_MAX)?;
        if self.layers.len() != n_layers {
            return Err(out_of_range("layer_types", self.layers.len(), format!("{n_layers} layers")));
        }
        self.rope_theta.map_or(Ok(()), |theta| within_open("rope_local_base_freq", theta.into(), 1e30))
    }
}

fn within(field: &'static str, value: usize, max: usize) -> Result<()> {
    if (1..=max).contains(&value) { Ok(()) } else { Err(out_of_range(field, value, format!("1..={max}"))) }
}

fn within_open(field: &'static str, value: f64, max: f64) -> Result<()> {
    // Written so that NaN fails.
    if value > 0.0 && value < max {
        Ok(())
    } else {
        Err(out_of_range(field, value, format!("above 0, below {max}")))
    }
}

fn out_of_range(field: &'static str, value: impl ToString, allowed: impl Into<String>) -> ConfigError {
    ConfigError::OutOfRange { field, value: value.to_string(), allowed: allowed.into() }
}
