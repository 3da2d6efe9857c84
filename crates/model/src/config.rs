//! A Llama's shape: Hugging Face's `config.json` (`LlamaForCausalLM`), checked.
//!
//! Every number is bounded before anything is allocated from it, and a setting that would change the mathematics
//! in a way this crate does not compute (biases, another activation, scaled RoPE) is refused by name.

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// The newest layout of model directories this build understands. Written into `config.json` beside the
/// Hugging Face keys; a directory without it is a plain Hugging Face directory.
pub const FORMAT_VERSION: u64 = 1;

const FORMAT_VERSION_KEY: &str = "loquat_format_version";
const N_LAYERS_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 16;
const N_HEADS_MAX: usize = 1 << 10;
const HEAD_WIDTH_MAX: usize = 1 << 10;
const FF_WIDTH_MAX: usize = 1 << 18;
const VOCAB_MAX: usize = 1 << 22;
const CONTEXT_MAX: usize = 1 << 24;
const N_PARAMS_MAX: usize = 1 << 41;
const N_EOS_MAX: usize = 64;

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
    #[error("config.json has format version {found}, this build reads up to {FORMAT_VERSION}")]
    Newer { found: u64 },
}

type Result<T> = std::result::Result<T, ConfigError>;

/// The shape and constants of one Llama-type model. A value that came from [`Config::from_json`] or passed
/// [`Config::check`] has every count in 1..=its limit, whole heads, and a parameter count that fits `usize`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub n_layers: usize,
    /// c, the width of the residual stream.
    pub width: usize,
    /// h, query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// g, key/value heads.
    pub n_kv_heads: usize,
    /// d, the width of one head; even. `n_heads * head_width` need not be `width`.
    pub head_width: usize,
    /// f, the inner width of SwiGLU.
    pub ff_width: usize,
    /// v, the number of token ids.
    pub vocab: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// Base of RoPE's frequencies (rotate-half order, Hugging Face's).
    pub rope_theta: f32,
    /// The output projection is the embedding matrix.
    pub tied_embeddings: bool,
    /// Positions the model was trained for.
    pub context_max: usize,
    pub bos: Option<u32>,
    /// Ids that end a text; the first is the one written when only one may be.
    pub eos: Vec<u32>,
}

/// The keys of `config.json` that are read. Others are ignored: they do not change what is computed.
#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    num_hidden_layers: Option<u64>,
    hidden_size: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: Option<u64>,
    vocab_size: Option<u64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    rope_interleaved: bool,
    tie_word_embeddings: Option<bool>,
    max_position_embeddings: Option<u64>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    quantization_config: Option<Value>,
    loquat_format_version: Option<u64>,
}

/// Newer transformers keep RoPE's base in here; older ones only its scaling.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Config {
    /// Reads and checks a Hugging Face `config.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Config> {
        let raw: RawConfig = serde_json::from_slice(bytes).map_err(ConfigError::Parse)?;
        raw.refuse_unsupported()?;
        raw.into_config()
    }

    /// The `config.json` from which transformers, vLLM and llama.cpp build the same model.
    /// `dtype` is the tensors' type in the safetensors file ("float32", "bfloat16").
    pub fn to_json(&self, dtype: &str) -> String {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.n_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.ff_width,
            "vocab_size": self.vocab,
            "rms_norm_eps": shortest_f64(self.norm_eps),
            "rope_theta": shortest_f64(self.rope_theta),
            "max_position_embeddings": self.context_max,
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "initializer_range": 0.02,
            "use_cache": true,
            "torch_dtype": dtype,
            FORMAT_VERSION_KEY: FORMAT_VERSION,
        });
        let map = config.as_object_mut().expect("built as an object");
        write_ids(map, "bos_token_id", self.bos.as_slice());
        write_ids(map, "eos_token_id", &self.eos);
        let mut text = serde_json::to_string_pretty(&config).expect("numbers and strings always serialize");
        text.push('\n');
        text
    }

    /// Checks the invariants named on [`Config`].
    pub fn check(&self) -> Result<()> {
        within("num_hidden_layers", self.n_layers, N_LAYERS_MAX)?;
        within("hidden_size", self.width, WIDTH_MAX)?;
        within("num_attention_heads", self.n_heads, N_HEADS_MAX)?;
        within("num_key_value_heads", self.n_kv_heads, self.n_heads)?;
        within("head_dim", self.head_width, HEAD_WIDTH_MAX)?;
        within("intermediate_size", self.ff_width, FF_WIDTH_MAX)?;
        within("vocab_size", self.vocab, VOCAB_MAX)?;
        within("max_position_embeddings", self.context_max, CONTEXT_MAX)?;
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(out_of_range(
                "num_key_value_heads",
                self.n_kv_heads,
                format!("a divisor of {}", self.n_heads),
            ));
        }
        if !self.head_width.is_multiple_of(2) {
            return Err(out_of_range("head_dim", self.head_width, "an even number"));
        }
        within_open("rms_norm_eps", f64::from(self.norm_eps), 1.0)?;
        within_open("rope_theta", f64::from(self.rope_theta), 1e30)?;
        if self.eos.len() > N_EOS_MAX {
            return Err(out_of_range("eos_token_id", self.eos.len(), format!("up to {N_EOS_MAX} ids")));
        }
        for (field, id) in self
            .bos
            .iter()
            .map(|id| ("bos_token_id", id))
            .chain(self.eos.iter().map(|id| ("eos_token_id", id)))
        {
            if *id as usize >= self.vocab {
                return Err(out_of_range(field, id, format!("0..{}", self.vocab)));
            }
        }
        // The limits above keep every product below 2^60, so this cannot overflow.
        within("number of parameters", self.n_params(), N_PARAMS_MAX)?;
        Ok(())
    }

    /// Width of all query heads together, h·d.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_width
    }

    /// Width of all key (or value) heads together, g·d.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_width
    }

    /// Number of parameters; a tied embedding counts once.
    pub fn n_params(&self) -> usize {
        let embeddings = self.vocab * self.width * if self.tied_embeddings { 1 } else { 2 };
        embeddings + self.n_layers * (self.n_layer_matmul_params() + 2 * self.width) + self.width
    }

    /// Bytes of keys and values one token leaves in the cache, `elem_bytes` per number:
    /// 2 (k, v) · l · g · d · elem_bytes.
    pub fn kv_bytes_per_token(&self, elem_bytes: usize) -> usize {
        2 * self.n_layers * self.kv_width() * elem_bytes
    }

    /// Floating-point operations (multiply and add counted as two) that forward and backward of one token need on
    /// average in sequences of `t` tokens: 6 per matrix parameter, and 6·t·h·d per layer for causal attention
    /// (half of the t×t square: 2·2·(t/2) forward, twice that backward). The embedding look-up is free.
    pub fn flops_per_token_train(&self, t: usize) -> f64 {
        let matmul_params = self.n_layers * self.n_layer_matmul_params() + self.vocab * self.width;
        6.0 * matmul_params as f64 + 6.0 * (self.n_layers * self.q_width() * t) as f64
    }

    fn n_layer_matmul_params(&self) -> usize {
        self.width * (2 * self.q_width() + 2 * self.kv_width() + 3 * self.ff_width)
    }
}

impl RawConfig {
    /// Settings with another meaning than the one computed here must not be passed over in silence.
    fn refuse_unsupported(&self) -> Result<()> {
        if let Some(found) = self.loquat_format_version.filter(|found| *found > FORMAT_VERSION) {
            return Err(ConfigError::Newer { found });
        }
        let model_type = self.model_type.as_deref().ok_or(ConfigError::Missing { field: "model_type" })?;
        if model_type != "llama" {
            return Err(unsupported("model_type", model_type));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(unsupported("hidden_act", act));
        }
        for (field, on) in [
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("rope_interleaved", self.rope_interleaved),
        ] {
            if on {
                return Err(unsupported(field, "true"));
            }
        }
        if self.quantization_config.is_some() {
            return Err(unsupported("quantization_config", "{…}"));
        }
        for (field, rope) in
            [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)]
        {
            let scaled = rope.as_ref().and_then(|r| r.rope_type.as_deref()).filter(|kind| *kind != "default");
            if let Some(kind) = scaled {
                return Err(unsupported(field, kind));
            }
        }
        Ok(())
    }

    fn into_config(self) -> Result<Config> {
        let n_heads = required("num_attention_heads", self.num_attention_heads)?;
        within("num_attention_heads", n_heads, N_HEADS_MAX)?;
        let width = required("hidden_size", self.hidden_size)?;
        let head_width = match self.head_dim {
            Some(head_dim) => to_usize("head_dim", head_dim)?,
            None if width.is_multiple_of(n_heads) => width / n_heads,
            None => return Err(out_of_range("hidden_size", width, format!("a multiple of {n_heads} heads"))),
        };
        let rope_theta =
            self.rope_parameters.and_then(|r| r.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let config = Config {
            n_layers: required("num_hidden_layers", self.num_hidden_layers)?,
            width,
            n_heads,
            n_kv_heads: self
                .num_key_value_heads
                .map_or(Ok(n_heads), |n| to_usize("num_key_value_heads", n))?,
            head_width,
            ff_width: required("intermediate_size", self.intermediate_size)?,
            vocab: required("vocab_size", self.vocab_size)?,
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta: rope_theta as f32,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(false),
            context_max: self
                .max_position_embeddings
                .map_or(Ok(2048), |n| to_usize("max_position_embeddings", n))?,
            bos: self.bos_token_id,
            eos: match self.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        };
        config.check()?;
        Ok(config)
    }
}

fn required(field: &'static str, value: Option<u64>) -> Result<usize> {
    to_usize(field, value.ok_or(ConfigError::Missing { field })?)
}

fn to_usize(field: &'static str, value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| out_of_range(field, value, "a number of this machine's size"))
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

fn unsupported(field: &'static str, value: &str) -> ConfigError {
    ConfigError::Unsupported { field, value: value.chars().take(80).collect() }
}

fn write_ids(map: &mut Map<String, Value>, key: &str, ids: &[u32]) {
    let value = match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    map.insert(key.to_owned(), value);
}

/// The f64 whose shortest decimal form is the f32's, so that 1e-5 is written as 1e-5, not 0.000009999999747.
fn shortest_f64(value: f32) -> f64 {
    value.to_string().parse().expect("a printed f32 parses")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Small, yet with grouped heads and no two sizes equal.
    pub(crate) fn tiny() -> Config {
        Config {
            n_layers: 2,
            width: 24,
            n_heads: 4,
            n_kv_heads: 2,
            head_width: 8,
            ff_width: 40,
            vocab: 50,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tied_embeddings: true,
            context_max: 64,
            bos: None,
            eos: vec![0],
        }
    }

    fn smol() -> Value {
        // The keys and values SmolLM2-135M publishes.
        json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
            "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
            "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 49152
        })
    }

    fn parse(value: &Value) -> Result<Config> {
        Config::from_json(value.to_string().as_bytes())
    }

    #[test]
    fn reads_a_published_config() {
        let config = parse(&smol()).unwrap();
        assert_eq!(config.head_width, 64);
        assert_eq!(config.n_params(), 134_515_008); // the published count
        assert_eq!(config.kv_bytes_per_token(2), 2 * 30 * 3 * 64 * 2); // 23,040
        assert_eq!((config.bos, config.eos.as_slice()), (Some(1), &[2][..]));
    }

    #[test]
    fn writes_what_it_reads() {
        let mut config = parse(&smol()).unwrap();
        for (tied, eos) in [(true, vec![]), (false, vec![3]), (true, vec![2, 7])] {
            config.tied_embeddings = tied;
            config.eos = eos;
            let text = config.to_json("float32");
            assert!(
                text.contains("\"rms_norm_eps\": 1e-5") || text.contains("\"rms_norm_eps\": 0.00001"),
                "{text}"
            );
            assert_eq!(Config::from_json(text.as_bytes()).unwrap(), config);
        }
    }

    #[test]
    fn reads_the_newer_rope_parameters() {
        let mut value = smol();
        value.as_object_mut().unwrap().remove("rope_theta");
        value["rope_parameters"] = json!({"rope_theta": 5000.0, "rope_type": "default"});
        assert_eq!(parse(&value).unwrap().rope_theta, 5000.0);
    }

    #[test]
    fn hostile_configs_are_refused_by_name() {
        let check = |key: &str, bad: Value| {
            let mut value = smol();
            value[key] = bad.clone();
            let err = match parse(&value) {
                Ok(config) => panic!("{key} = {bad} was accepted as {config:?}"),
                Err(err) => err,
            };
            let text = match &err {
                ConfigError::Parse(source) => source.to_string(),
                other => other.to_string(),
            };
            assert!(!text.is_empty() && text.len() < 300, "{text}");
            if !matches!(err, ConfigError::Parse(_)) {
                let named = key == "hidden_size" || text.contains(key) || text.contains("format version");
                assert!(named, "{key}: {text}");
            }
        };
        for bad in
            [json!(0), json!(-1), json!(1e9), json!(1_000_000_000), json!(u64::MAX), json!("7"), json!([])]
        {
            for key in
                ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"]
            {
                check(key, bad.clone());
            }
        }
        check("num_key_value_heads", json!(2));
        check("num_key_value_heads", json!(0));
        check("head_dim", json!(63));
        check("hidden_size", json!(577));
        check("rms_norm_eps", json!(0));
        check("rms_norm_eps", json!(-1e-5));
        check("rope_theta", json!(0));
        check("eos_token_id", json!(49152));
        check("bos_token_id", json!(4_000_000_000_u32));
        check("eos_token_id", json!(vec![1; 65]));
        check("model_type", json!("gpt2"));
        check("hidden_act", json!("gelu"));
        check("attention_bias", json!(true));
        check("rope_interleaved", json!(true));
        check("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}));
        check("rope_scaling", json!({"type": "linear", "factor": 2.0}));
        check("quantization_config", json!({"bits": 4}));
        check("loquat_format_version", json!(2));
    }

    #[test]
    fn junk_is_an_error() {
        for bytes in [&b""[..], b"{", b"[]", b"null", b"{}", b"\xff\xfe", &[b'['; 100_000]] {
            assert!(Config::from_json(bytes).is_err());
        }
    }
}
