use serde_json::{Value, json};

use super::*;

/// Small, yet with grouped heads and no two sizes equal.
pub(crate) fn tiny() -> Config {
    Config {
        architecture: Architecture::Llama,
        n_layers: 2,
        width: 24,
        n_heads: 4,
        n_kv_heads: 2,
        head_width: 8,
        ff_width: 40,
        vocab: 50,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        query_scalar: None,
        window: None,
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
    assert_eq!(parse(&value).unwrap().rope.theta, 5000.0);
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
    for bad in [json!(0), json!(-1), json!(1e9), json!(1_000_000_000), json!(u64::MAX), json!("7"), json!([])]
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
    check("model_type", json!("mamba"));
    check("hidden_act", json!("gelu"));
    check("attention_bias", json!(true));
    check("rope_interleaved", json!(true));
    check("rope_scaling", json!({"rope_type": "dynamic", "factor": 8.0}));
    check("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}));
    check("rope_scaling", json!({"type": "linear"}));
    check("rope_scaling", json!({"type": "linear", "factor": 0}));
    check("rope_scaling", json!({"type": "linear", "factor": -2.0}));
    check("rope_scaling", json!({"type": "yarn", "factor": 2.0, "mscale": 1.0}));
    let llama3 = |low: f32, original: u64| {
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": 4.0,
               "original_max_position_embeddings": original})
    };
    check("rope_scaling", llama3(4.0, 8192));
    check("rope_scaling", llama3(1.0, 0));
    check(
        "rope_scaling",
        json!({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0],
                                 "attention_factor": 1.0}),
    );
    check("quantization_config", json!({"bits": 4}));
    check("loquat_format_version", json!(2));
}

#[test]
fn junk_is_an_error() {
    for bytes in [&b""[..], b"{", b"[]", b"null", b"{}", b"\xff\xfe", &[b'['; 100_000]] {
        assert!(Config::from_json(bytes).is_err());
    }
}
