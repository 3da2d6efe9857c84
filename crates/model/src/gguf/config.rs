//! The shape of a model, from a GGUF file's metadata and the presence of tensors.

use super::metadata::Metadata;
use super::reader::bad;
use super::tensors::TensorInfo;
use crate::config::yarn_attention_factor;
use crate::{Architecture, Config, Error, Result, Rope, RopeScaling, Window};

/// Control tokens that end an answer, in files that name only the token that ends a text.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"];
const CONTROL: i64 = 3;
/// Gemma 3's last layer of each group of six sees everything.
pub(super) const GEMMA3_GROUP: usize = 6;
/// Layers of Gemma 3 27B, the one whose scores are scaled by another number than its head width; files do not say so.
const GEMMA3_27B_LAYERS: usize = 62;

/// Metadata under the architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: Architecture,
}

pub(super) fn read(metadata: &Metadata, infos: &[TensorInfo]) -> Result<Config> {
    let keys = Keys { metadata, architecture: architecture(metadata)? };
    keys.refuse_unsupported()?;
    let embedding = infos.iter().find(|info| info.name == "token_embd.weight");
    let embedding = embedding.ok_or_else(|| Error::MissingTensor("token_embd.weight".into()))?;
    let n_heads = keys.required_count("attention.head_count")?;
    let width = keys.required_count("embedding_length")?;
    let n_layers = keys.required_count("block_count")?;
    let head_width = keys.head_width(width, n_heads)?;
    let context_max = keys.required_count("context_length")?;
    let config = Config {
        architecture: keys.architecture,
        n_layers,
        width,
        n_heads,
        n_kv_heads: keys.count("attention.head_count_kv")?.unwrap_or(n_heads),
        head_width,
        ff_width: keys.required_count("feed_forward_length")?,
        vocab: embedding.dims[0],
        norm_eps: keys.norm_eps()?,
        rope: keys.rope(context_max)?,
        query_scalar: keys.query_scalar(n_layers, width, n_heads, head_width),
        window: keys.window(n_layers)?,
        tied_embeddings: !infos.iter().any(|info| info.name == "output.weight"),
        context_max,
        bos: metadata.id("tokenizer.ggml.bos_token_id")?,
        eos: eos(metadata)?,
    };
    config.check()?;
    Ok(config)
}

fn architecture(metadata: &Metadata) -> Result<Architecture> {
    const KEY: &str = "general.architecture";
    let name = metadata.text(KEY)?.ok_or_else(|| bad(KEY, "is missing"))?;
    // Encoders' files have conventions of their own, which are not read.
    let all = || Architecture::ALL.into_iter().filter(|architecture| architecture.block().causal);
    let known = all().find(|architecture| architecture.gguf_name() == name);
    known.ok_or_else(|| {
        let names = all().map(Architecture::gguf_name).collect::<Vec<_>>().join(", ");
        bad(
            KEY,
            format!("{:?} is not supported, only {names} are", name.chars().take(40).collect::<String>()),
        )
    })
}

/// Ids that end a text or an answer.
fn eos(metadata: &Metadata) -> Result<Vec<u32>> {
    let mut eos = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(metadata.id(key)?);
    }
    let (tokens, types) =
        (metadata.texts("tokenizer.ggml.tokens")?, metadata.ints("tokenizer.ggml.token_type")?);
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        if *kind == CONTROL && END_OF_TURN.contains(&token.as_str()) {
            eos.push(id as u32);
        }
    }
    let mut seen = Vec::new();
    eos.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    Ok(eos)
}

impl Keys<'_> {
    fn key(&self, rest: &str) -> String {
        format!("{}.{rest}", self.architecture.gguf_name())
    }

    fn count(&self, rest: &str) -> Result<Option<usize>> {
        self.metadata.count(&self.key(rest))
    }

    fn required_count(&self, rest: &str) -> Result<usize> {
        self.metadata.required_count(&self.key(rest))
    }

    fn float(&self, rest: &str) -> Result<Option<f32>> {
        self.metadata.float(&self.key(rest))
    }

    fn bad(&self, rest: &str, problem: impl Into<String>) -> Error {
        bad(&self.key(rest), problem)
    }

    fn refuse_unsupported(&self) -> Result<()> {
        if self.count("expert_count")?.is_some_and(|n| n > 0) {
            return Err(self.bad("expert_count", "mixtures of experts are not supported"));
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if self.float(key)?.is_some_and(|cap| cap != 0.0) {
                return Err(self.bad(key, "capped scores are not supported"));
            }
        }
        Ok(())
    }

    fn head_width(&self, width: usize, n_heads: usize) -> Result<usize> {
        let rope_width = self.count("rope.dimension_count")?;
        let head_width = match self.count("attention.key_length")?.or(rope_width) {
            Some(d) => d,
            None if n_heads > 0 && width.is_multiple_of(n_heads) => width / n_heads,
            None => {
                let problem = format!("{width} is no multiple of {n_heads} heads");
                return Err(self.bad("embedding_length", problem));
            }
        };
        for key in ["rope.dimension_count", "attention.value_length"] {
            if self.count(key)?.is_some_and(|d| d != head_width) {
                let problem = format!("differs from the head width {head_width}, which is not supported");
                return Err(self.bad(key, problem));
            }
        }
        Ok(head_width)
    }

    fn norm_eps(&self) -> Result<f32> {
        let key = match self.architecture.block().layer_norm {
            true => "attention.layer_norm_epsilon",
            false => "attention.layer_norm_rms_epsilon",
        };
        self.float(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }

    /// Scaling but for the tensor `rope_freqs`, which is read with the other tensors.
    fn rope(&self, context_max: usize) -> Result<Rope> {
        let gemma = self.architecture == Architecture::Gemma3;
        let theta = self.float("rope.freq_base")?.unwrap_or(if gemma { 1e6 } else { 10_000.0 });
        let factor = || {
            let factor = self.float("rope.scaling.factor")?;
            factor.ok_or_else(|| self.bad("rope.scaling.factor", "is missing"))
        };
        let kind_key = self.key("rope.scaling.type");
        let scaling = match self.metadata.text(&kind_key)? {
            None | Some("none") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: factor()? },
            Some("yarn") => {
                let factor = factor()?;
                RopeScaling::Yarn {
                    factor,
                    original_context: self
                        .count("rope.scaling.original_context_length")?
                        .unwrap_or(context_max),
                    beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    attention_factor: self.float("rope.scaling.attn_factor")?.unwrap_or(1.0)
                        * yarn_attention_factor(factor),
                }
            }
            Some(kind) => return Err(bad(&kind_key, format!("{kind:?} is not supported"))),
        };
        Ok(Rope { theta, scaling })
    }

    fn query_scalar(&self, n_layers: usize, width: usize, n_heads: usize, head_width: usize) -> Option<f32> {
        let is_gemma = self.architecture == Architecture::Gemma3;
        is_gemma.then(|| gemma3_query_scalar(n_layers, width, n_heads, head_width))
    }

    fn window(&self, n_layers: usize) -> Result<Option<Window>> {
        let Some(n_positions) = self.count("attention.sliding_window")?.filter(|n| *n > 0) else {
            return Ok(None);
        };
        if self.architecture != Architecture::Gemma3 {
            let problem = format!("{n_positions}, which is supported for gemma3 only");
            return Err(self.bad("attention.sliding_window", problem));
        }
        let group = self.count("attention.sliding_window_pattern")?.unwrap_or(GEMMA3_GROUP);
        if group == 0 || n_layers > crate::config::N_LAYERS_MAX {
            return Err(
                self.bad("attention.sliding_window_pattern", format!("{group} for {n_layers} layers"))
            );
        }
        let layers = Window::full_every(group, n_layers);
        let rope_theta = Some(self.float("rope.freq_base_swa")?.unwrap_or(10_000.0));
        Ok(layers.contains(&true).then_some(Window { n_positions, rope_theta, layers }))
    }
}

/// What Gemma 3's scores are divided by the root of, as everybody who reads these files takes it to be.
pub(super) fn gemma3_query_scalar(n_layers: usize, width: usize, n_heads: usize, head_width: usize) -> f32 {
    let of_27b = n_layers == GEMMA3_27B_LAYERS && n_heads > 0;
    (if of_27b { width / n_heads } else { head_width }) as f32
}

/// Llama 3's scaling where the divisors are its, which other formats can say; otherwise the divisors.
pub(super) fn scaling_of(divisors: Vec<f32>, rope: &Rope) -> RopeScaling {
    let d = 2 * divisors.len();
    let llama3 = RopeScaling::Llama3 {
        factor: divisors.last().copied().unwrap_or(1.0),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let plain = Rope::plain(rope.theta).frequencies(d);
    let scaled = Rope { theta: rope.theta, scaling: llama3.clone() }.frequencies(d);
    let same = |((plain, scaled), divisor): ((&f64, &f64), &f32)| {
        (plain / scaled / f64::from(*divisor) - 1.0).abs() < 1e-4
    };
    if plain.iter().zip(&scaled).zip(&divisors).all(same) { llama3 } else { RopeScaling::Divisors(divisors) }
}
