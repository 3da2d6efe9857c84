//! `rope_scaling` and `rope_parameters` of `config.json`, both ways.

use serde::Deserialize;
use serde_json::{Value, json};

use super::json::{shortest_f64, to_usize, unsupported};
use super::{ConfigError, Result, RopeScaling, yarn_attention_factor};

/// Newer transformers keep RoPE's base in here; older ones only its scaling. Gemma 3 has one for each kind of layer.
#[derive(Clone, Default, Deserialize)]
pub(super) struct RopeParameters {
    pub(super) rope_theta: Option<f64>,
    #[serde(alias = "type")]
    pub(super) rope_type: Option<String>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<u64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f32>>,
    long_factor: Option<Vec<f32>>,
    pub(super) full_attention: Option<Box<RopeParameters>>,
    pub(super) sliding_attention: Option<Box<RopeParameters>>,
}

impl RopeParameters {
    pub(super) fn scaling(&self, field: &'static str, context_max: usize) -> Result<RopeScaling> {
        let needed = |name, value: Option<f64>| value.ok_or(ConfigError::Missing { field: name });
        let factor = || needed("rope_scaling factor", self.factor).map(|x| x as f32);
        let original = || {
            let n = self.original_max_position_embeddings;
            n.map_or(Ok(context_max), |n| to_usize("rope_scaling original_max_position_embeddings", n))
        };
        Ok(match self.rope_type.as_deref() {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: factor()? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: needed("rope_scaling low_freq_factor", self.low_freq_factor)? as f32,
                high_freq_factor: needed("rope_scaling high_freq_factor", self.high_freq_factor)? as f32,
                original_context: original()?,
            },
            Some("yarn") if self.mscale.is_none() && self.truncate != Some(false) => {
                let (factor, given) = (factor()?, self.attention_factor.map(|x| x as f32));
                RopeScaling::Yarn {
                    factor,
                    original_context: original()?,
                    beta_fast: self.beta_fast.unwrap_or(32.0) as f32,
                    beta_slow: self.beta_slow.unwrap_or(1.0) as f32,
                    attention_factor: given.unwrap_or_else(|| yarn_attention_factor(factor)),
                }
            }
            // What `to_json` writes for divisors from a GGUF file: one list, no change of the scores.
            Some("longrope")
                if self.short_factor == self.long_factor && self.attention_factor == Some(1.0) =>
            {
                RopeScaling::Divisors(self.long_factor.clone().unwrap_or_default())
            }
            Some(kind) => return Err(unsupported(field, kind)),
        })
    }
}

impl RopeScaling {
    pub(super) fn to_json(&self) -> Value {
        let f = |x: f32| json!(shortest_f64(x));
        match self {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": f(*factor)}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
                "rope_type": "llama3",
                "factor": f(*factor),
                "low_freq_factor": f(*low_freq_factor),
                "high_freq_factor": f(*high_freq_factor),
                "original_max_position_embeddings": original_context,
            }),
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => json!({
                "rope_type": "yarn",
                "factor": f(*factor),
                "original_max_position_embeddings": original_context,
                "beta_fast": f(*beta_fast),
                "beta_slow": f(*beta_slow),
                "attention_factor": f(*attention_factor),
            }),
            RopeScaling::Divisors(divisors) => json!({
                "rope_type": "longrope",
                "short_factor": divisors.iter().map(|x| shortest_f64(*x)).collect::<Vec<_>>(),
                "long_factor": divisors.iter().map(|x| shortest_f64(*x)).collect::<Vec<_>>(),
                "factor": 1.0,
                "attention_factor": 1.0,
            }),
        }
    }
}
