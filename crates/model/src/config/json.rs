//! Hugging Face's `config.json`, both ways.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::json_rope::RopeParameters;
use super::*;

const FORMAT_VERSION_KEY: &str = "loquat_format_version";

/// The keys of `config.json` that are read. Others are ignored: they do not change what is computed.
#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    /// The language model of one that sees as well.
    text_config: Option<Value>,
    #[serde(alias = "n_layer")]
    num_hidden_layers: Option<u64>,
    #[serde(alias = "n_embd")]
    hidden_size: Option<u64>,
    #[serde(alias = "n_head")]
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    #[serde(alias = "n_inner")]
    intermediate_size: Option<u64>,
    vocab_size: Option<u64>,
    #[serde(alias = "layer_norm_epsilon", alias = "layer_norm_eps")]
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    rope_parameters: Option<RopeParameters>,
    rope_local_base_freq: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    sliding_window: Option<u64>,
    sliding_window_pattern: Option<u64>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<u64>,
    layer_types: Option<Vec<String>>,
    tie_word_embeddings: Option<bool>,
    #[serde(alias = "n_positions")]
    max_position_embeddings: Option<u64>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    #[serde(alias = "hidden_activation", alias = "activation_function")]
    hidden_act: Option<String>,
    #[serde(flatten)]
    switches: Switches,
    type_vocab_size: Option<u64>,
    loquat_format_version: Option<u64>,
}

/// Settings that must be off (or as said) for the model to be one that is computed here.
#[derive(Deserialize)]
struct Switches {
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    rope_interleaved: Option<bool>,
    scale_attn_by_inverse_layer_idx: Option<bool>,
    add_cross_attention: Option<bool>,
    use_bidirectional_attention: Option<bool>,
    is_decoder: Option<bool>,
    position_embedding_type: Option<String>,
    scale_attn_weights: Option<bool>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_ids(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// What transformers assumes where `config.json` is silent, and what it may say.
struct Family {
    architecture: Architecture,
    hidden_act: &'static str,
    tied_embeddings: bool,
    norm_eps: f64,
    context_max: u64,
    rope_theta: f64,
}

fn family(model_type: &str) -> Option<Family> {
    let llama = Family {
        architecture: Architecture::Llama,
        hidden_act: "silu",
        tied_embeddings: false,
        norm_eps: 1e-6,
        context_max: 2048,
        rope_theta: 10_000.0,
    };
    Some(match model_type {
        "llama" => llama,
        "mistral" => Family { context_max: 131_072, ..llama },
        "qwen2" => Family { architecture: Architecture::Qwen2, context_max: 32_768, ..llama },
        "qwen3" => Family { architecture: Architecture::Qwen3, context_max: 32_768, ..llama },
        "gemma3_text" => Family {
            architecture: Architecture::Gemma3,
            hidden_act: "gelu_pytorch_tanh",
            tied_embeddings: true,
            context_max: 131_072,
            rope_theta: 1e6,
            ..llama
        },
        "bert" => Family {
            architecture: Architecture::Bert,
            hidden_act: "gelu",
            tied_embeddings: true,
            norm_eps: 1e-12,
            context_max: 512,
            ..llama
        },
        "gpt2" => Family {
            architecture: Architecture::Gpt2,
            hidden_act: "gelu_new",
            tied_embeddings: true,
            norm_eps: 1e-5,
            context_max: 1024,
            ..llama
        },
        _ => return None,
    })
}

impl Config {
    /// Reads and checks a Hugging Face `config.json`.
    pub fn from_json(bytes: &[u8]) -> Result<Config> {
        let mut raw: RawConfig = serde_json::from_slice(bytes).map_err(ConfigError::Parse)?;
        if let Some(found) = raw.loquat_format_version.filter(|found| *found > FORMAT_VERSION) {
            return Err(ConfigError::Newer { found });
        }
        let mut model_type = raw.model_type.take().ok_or(ConfigError::Missing { field: "model_type" })?;
        if model_type == "gemma3" {
            raw = raw.text_model()?;
            "gemma3_text".clone_into(&mut model_type);
        }
        let family = family(&model_type).ok_or_else(|| unsupported("model_type", &model_type))?;
        raw.refuse_unsupported(&family)?;
        let config = raw.into_config(&family, &model_type)?;
        config.check()?;
        Ok(config)
    }

    /// Adds the ids that end an answer by a `generation_config.json`.
    pub(crate) fn add_eos(&mut self, generation: &[u8]) -> Result<()> {
        #[derive(Deserialize)]
        struct Generation {
            eos_token_id: Option<OneOrMany>,
        }
        let generation: Generation = serde_json::from_slice(generation).map_err(ConfigError::Parse)?;
        for id in generation.eos_token_id.map_or(Vec::new(), OneOrMany::into_ids) {
            if !self.eos.contains(&id) {
                self.eos.push(id);
            }
        }
        self.check_ids()
    }

    /// The `config.json` from which transformers, vLLM and llama.cpp build the same model.
    /// `dtype` is the tensors' type in the safetensors file ("float32", "bfloat16").
    pub fn to_json(&self, dtype: &str) -> String {
        let mut config = match self.architecture {
            Architecture::Gpt2 => self.gpt2_keys(),
            Architecture::Bert => self.bert_keys(),
            _ => self.rotary_keys(),
        };
        let (class, model_type) = self.class();
        for (key, value) in [
            ("architectures", json!([class])),
            ("model_type", json!(model_type)),
            ("vocab_size", json!(self.vocab)),
            ("tie_word_embeddings", json!(self.tied_embeddings)),
            ("initializer_range", json!(0.02)),
            ("use_cache", json!(true)),
            ("torch_dtype", json!(dtype)),
            ("bos_token_id", ids(self.bos.as_slice())),
            ("eos_token_id", ids(&self.eos)),
            (FORMAT_VERSION_KEY, json!(FORMAT_VERSION)),
        ] {
            config.insert(key.to_owned(), value);
        }
        let mut text = serde_json::to_string_pretty(&config).expect("numbers and strings always serialize");
        text.push('\n');
        text
    }

    fn class(&self) -> (&'static str, &'static str) {
        match (self.architecture, &self.window) {
            (Architecture::Llama, None) => ("LlamaForCausalLM", "llama"),
            (Architecture::Llama, Some(_)) => ("MistralForCausalLM", "mistral"),
            (Architecture::Qwen2, _) => ("Qwen2ForCausalLM", "qwen2"),
            (Architecture::Qwen3, _) => ("Qwen3ForCausalLM", "qwen3"),
            (Architecture::Gemma3, _) => ("Gemma3ForCausalLM", "gemma3_text"),
            (Architecture::Gpt2, _) => ("GPT2LMHeadModel", "gpt2"),
            (Architecture::Bert, _) => ("BertModel", "bert"),
        }
    }

    fn gpt2_keys(&self) -> Map<String, Value> {
        object(json!({
            "n_layer": self.n_layers,
            "n_embd": self.width,
            "n_head": self.n_heads,
            "n_inner": self.ff_width,
            "n_positions": self.context_max,
            "n_ctx": self.context_max,
            "layer_norm_epsilon": shortest_f64(self.norm_eps),
            "activation_function": "gelu_new",
        }))
    }

    fn bert_keys(&self) -> Map<String, Value> {
        object(json!({
            "num_hidden_layers": self.n_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.ff_width,
            "layer_norm_eps": shortest_f64(self.norm_eps),
            "max_position_embeddings": self.context_max,
            "type_vocab_size": N_TOKEN_TYPES,
            "hidden_act": "gelu",
        }))
    }

    fn rotary_keys(&self) -> Map<String, Value> {
        let mut keys = object(json!({
            "num_hidden_layers": self.n_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.ff_width,
            "rms_norm_eps": shortest_f64(self.norm_eps),
            "rope_theta": shortest_f64(self.rope.theta),
            "max_position_embeddings": self.context_max,
            "attention_bias": false,
            "mlp_bias": false,
        }));
        let mut set = |key: &str, value: Value| keys.insert(key.to_owned(), value);
        if self.rope.scaling != RopeScaling::None {
            set("rope_scaling", self.rope.scaling.to_json());
        }
        if self.architecture == Architecture::Gemma3 {
            set("hidden_activation", json!("gelu_pytorch_tanh"));
            let scalar = self.query_scalar.unwrap_or(self.head_width as f32);
            set("query_pre_attn_scalar", whole_or_float(scalar));
        } else {
            set("hidden_act", json!("silu"));
        }
        if let Some(window) = &self.window {
            let kind = |local: &bool| if *local { "sliding_attention" } else { "full_attention" };
            set("sliding_window", json!(window.n_positions));
            set("layer_types", window.layers.iter().map(kind).collect());
            set("use_sliding_window", json!(true));
            if let Some(theta) = window.rope_theta {
                set("rope_local_base_freq", json!(shortest_f64(theta)));
            }
        }
        keys
    }
}

impl RawConfig {
    /// The language model of a model that sees as well. Ids stand outside of it.
    fn text_model(self) -> Result<RawConfig> {
        let text = self.text_config.ok_or(ConfigError::Missing { field: "text_config" })?;
        let mut text: RawConfig = serde_json::from_value(text).map_err(ConfigError::Parse)?;
        text.bos_token_id = self.bos_token_id.or(text.bos_token_id);
        text.eos_token_id = self.eos_token_id.or(text.eos_token_id);
        text.switches.quantization_config =
            self.switches.quantization_config.or(text.switches.quantization_config);
        // Published files leave out what is as in Gemma 3 4B.
        text.num_attention_heads.get_or_insert(8);
        text.num_key_value_heads.get_or_insert(4);
        text.vocab_size.get_or_insert(262_208);
        Ok(text)
    }

    /// Settings with another meaning than the one computed here must not be passed over in silence.
    fn refuse_unsupported(&self, family: &Family) -> Result<()> {
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != family.hidden_act) {
            return Err(unsupported("hidden_act", act));
        }
        let s = &self.switches;
        for (field, on) in [
            ("attention_bias", s.attention_bias),
            ("mlp_bias", s.mlp_bias),
            ("rope_interleaved", s.rope_interleaved),
            ("scale_attn_by_inverse_layer_idx", s.scale_attn_by_inverse_layer_idx),
            ("add_cross_attention", s.add_cross_attention),
            ("use_bidirectional_attention", s.use_bidirectional_attention),
            ("is_decoder", s.is_decoder),
        ] {
            if on == Some(true) {
                return Err(unsupported(field, "true"));
            }
        }
        if let Some(kind) = s.position_embedding_type.as_deref().filter(|kind| *kind != "absolute") {
            return Err(unsupported("position_embedding_type", kind));
        }
        if let Some(n) = self.type_vocab_size.filter(|n| *n != N_TOKEN_TYPES as u64) {
            return Err(unsupported("type_vocab_size", &n.to_string()));
        }
        if s.scale_attn_weights == Some(false) {
            return Err(unsupported("scale_attn_weights", "false"));
        }
        for (field, cap) in [
            ("attn_logit_softcapping", s.attn_logit_softcapping),
            ("final_logit_softcapping", s.final_logit_softcapping),
        ] {
            if let Some(cap) = cap {
                return Err(unsupported(field, &cap.to_string()));
            }
        }
        match s.quantization_config {
            Some(_) => Err(unsupported("quantization_config", "{…}")),
            None => Ok(()),
        }
    }

    fn into_config(self, family: &Family, model_type: &str) -> Result<Config> {
        let gemma = family.architecture == Architecture::Gemma3;
        let n_heads = required("num_attention_heads", self.num_attention_heads)?;
        within("num_attention_heads", n_heads, N_HEADS_MAX)?;
        let width = required("hidden_size", self.hidden_size)?;
        within("hidden_size", width, WIDTH_MAX)?;
        let n_layers = required("num_hidden_layers", self.num_hidden_layers)?;
        within("num_hidden_layers", n_layers, N_LAYERS_MAX)?;
        let head_width = match self.head_dim {
            Some(head_dim) => to_usize("head_dim", head_dim)?,
            None if gemma => 256,
            None if width.is_multiple_of(n_heads) => width / n_heads,
            None => return Err(out_of_range("hidden_size", width, format!("a multiple of {n_heads} heads"))),
        };
        let ff_width = match self.intermediate_size {
            None if family.architecture == Architecture::Gpt2 => 4 * width,
            other => required("intermediate_size", other)?,
        };
        let context_max =
            to_usize("max_position_embeddings", self.max_position_embeddings.unwrap_or(family.context_max))?;
        Ok(Config {
            architecture: family.architecture,
            n_layers,
            width,
            n_heads,
            n_kv_heads: self
                .num_key_value_heads
                .map_or(Ok(n_heads), |n| to_usize("num_key_value_heads", n))?,
            head_width,
            ff_width,
            vocab: required("vocab_size", self.vocab_size)?,
            norm_eps: self.rms_norm_eps.unwrap_or(family.norm_eps) as f32,
            rope: self.rope(family, context_max)?,
            query_scalar: gemma.then(|| self.query_pre_attn_scalar.unwrap_or(256.0) as f32),
            window: self.window(model_type, n_layers)?,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(family.tied_embeddings),
            context_max,
            bos: self.bos_token_id,
            eos: self.eos_token_id.map_or(Vec::new(), OneOrMany::into_ids),
        })
    }

    /// Positions of the layers without a window (or of all).
    fn rope(&self, family: &Family, context_max: usize) -> Result<Rope> {
        let nested = self.rope_parameters.as_ref().and_then(|p| p.full_attention.as_deref());
        let newer = nested.or(self.rope_parameters.as_ref());
        let theta = newer.and_then(|p| p.rope_theta).or(self.rope_theta).unwrap_or(family.rope_theta);
        // Some files say both; the one that scales counts.
        let scalings = [("rope_parameters", newer), ("rope_scaling", self.rope_scaling.as_ref())];
        let mut rope = Rope::plain(theta as f32);
        for (field, parameters) in scalings {
            let Some(parameters) = parameters else { continue };
            let scaling = parameters.scaling(field, context_max)?;
            if rope.scaling != RopeScaling::None && scaling != RopeScaling::None && rope.scaling != scaling {
                return Err(unsupported(field, "another scaling than rope_parameters"));
            }
            if scaling != RopeScaling::None {
                rope.scaling = scaling;
            }
        }
        Ok(rope)
    }

    /// Which layers have a window. Each family has its own way to say so; `layer_types` is the newest.
    fn window(&self, model_type: &str, n_layers: usize) -> Result<Option<Window>> {
        let gemma = model_type == "gemma3_text";
        let used = match model_type {
            "gemma3_text" | "mistral" => true,
            _ => self.use_sliding_window == Some(true),
        };
        let Some(n_positions) = self.sliding_window.or(gemma.then_some(4096)).filter(|_| used) else {
            return Ok(None);
        };
        let layers = match &self.layer_types {
            Some(types) => types.iter().map(|kind| is_local(kind)).collect::<Result<Vec<bool>>>()?,
            None if gemma => {
                let n = to_usize("sliding_window_pattern", self.sliding_window_pattern.unwrap_or(6))?;
                within("sliding_window_pattern", n, N_LAYERS_MAX)?;
                Window::full_every(n, n_layers)
            }
            None if model_type == "mistral" => vec![true; n_layers],
            None => {
                let first = self.max_window_layers.map_or(Ok(28), |n| to_usize("max_window_layers", n))?;
                (0..n_layers).map(|l| l >= first).collect()
            }
        };
        if !layers.contains(&true) {
            return Ok(None);
        }
        let local = self.rope_parameters.as_ref().and_then(|p| p.sliding_attention.as_deref());
        if let Some(kind) = local.and_then(|p| p.rope_type.as_deref()).filter(|kind| *kind != "default") {
            return Err(unsupported("rope_parameters of sliding_attention", kind));
        }
        let theta = local.and_then(|p| p.rope_theta).or(self.rope_local_base_freq).unwrap_or(10_000.0);
        let rope_theta = gemma.then_some(theta as f32);
        Ok(Some(Window { n_positions: to_usize("sliding_window", n_positions)?, rope_theta, layers }))
    }
}

fn is_local(kind: &str) -> Result<bool> {
    match kind {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(unsupported("layer_types", other)),
    }
}

fn required(field: &'static str, value: Option<u64>) -> Result<usize> {
    to_usize(field, value.ok_or(ConfigError::Missing { field })?)
}

pub(super) fn to_usize(field: &'static str, value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| out_of_range(field, value, "a number of this machine's size"))
}

pub(super) fn unsupported(field: &'static str, value: &str) -> ConfigError {
    ConfigError::Unsupported { field, value: value.chars().take(80).collect() }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => unreachable!("{other} was written as an object"),
    }
}

fn ids(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// transformers wants this one as an integer where it is one.
fn whole_or_float(value: f32) -> Value {
    if value.fract() == 0.0 { json!(value as u64) } else { json!(shortest_f64(value)) }
}

/// The f64 whose shortest decimal form is the f32's, so that 1e-5 is written as 1e-5, not 0.000009999999747.
pub(super) fn shortest_f64(value: f32) -> f64 {
    value.to_string().parse().expect("a printed f32 parses")
}
