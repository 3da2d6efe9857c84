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

fn gemma() -> Value {
    // The keys that decide, as Gemma 3 270M publishes them.
    json!({
        "model_type": "gemma3_text", "attention_bias": false, "attn_logit_softcapping": null, "bos_token_id": 2,
        "eos_token_id": 1, "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640, "intermediate_size": 2048, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0, "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": 512,
        "_sliding_window_pattern": 6, "vocab_size": 262144
    })
}

#[test]
fn gemma_says_its_windows_in_many_ways() {
    let config = parse(&gemma()).unwrap();
    assert_eq!(config.n_params(), 268_098_176); // the published count
    assert!(config.tied_embeddings);
    let local: Vec<usize> = (0..18).filter(|l| config.window_of(*l).is_none()).collect();
    assert_eq!(local, [5, 11, 17]);
    assert_eq!((config.window_of(0), config.score_scale()), (Some(512), 1.0 / 16.0));
    let mut newer = gemma();
    let types: Vec<&str> =
        (1..=18).map(|l| if l % 6 == 0 { "full_attention" } else { "sliding_attention" }).collect();
    newer["layer_types"] = json!(types);
    newer["rope_parameters"] = json!({
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    let mut seeing = gemma();
    seeing.as_object_mut().unwrap().retain(|key, _| !key.ends_with("_token_id"));
    let seeing = json!({"model_type": "gemma3", "text_config": seeing, "vision_config": {}, "bos_token_id": 2,
                        "eos_token_id": [1, 106]});
    assert_eq!(parse(&newer).unwrap(), config);
    assert_eq!(parse(&seeing).unwrap(), Config { eos: vec![1, 106], ..config });
}

#[test]
fn what_other_architectures_do_not_do_here_is_refused_by_name() {
    let check = |mut value: Value, key: &str, bad: Value| {
        value[key] = bad.clone();
        let error = parse(&value).expect_err(&format!("{key} = {bad}")).to_string();
        assert!(error.contains(key), "{key}: {error}");
    };
    check(gemma(), "attn_logit_softcapping", json!(50.0));
    check(gemma(), "final_logit_softcapping", json!(30.0));
    check(gemma(), "use_bidirectional_attention", json!(true));
    check(gemma(), "query_pre_attn_scalar", json!(0));
    check(gemma(), "rope_local_base_freq", json!(-1.0));
    check(gemma(), "sliding_window", json!(0));
    check(gemma(), "layer_types", json!(["chunked_attention"]));
    check(gemma(), "layer_types", json!(["sliding_attention"]));
    check(gemma(), "sliding_window_pattern", json!(0));
    check(gemma(), "rope_parameters", json!({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}));
    let gpt2 = json!({"model_type": "gpt2", "n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 100});
    assert_eq!(parse(&gpt2).unwrap().ff_width, 192);
    check(gpt2.clone(), "scale_attn_by_inverse_layer_idx", json!(true));
    check(gpt2.clone(), "scale_attn_weights", json!(false));
    check(gpt2.clone(), "add_cross_attention", json!(true));
    let bert = json!({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4,
                      "intermediate_size": 96, "vocab_size": 100});
    assert!(!parse(&bert).unwrap().block().causal);
    check(bert.clone(), "position_embedding_type", json!("relative_key"));
    check(bert.clone(), "type_vocab_size", json!(1));
    check(bert.clone(), "is_decoder", json!(true));
    let error = parse(&bert).unwrap().check_trainable().unwrap_err().to_string();
    assert!(error.contains("cannot be trained"), "{error}");
    for value in [gemma(), gpt2, smol()] {
        assert!(parse(&value).unwrap().check_trainable().is_ok());
    }
}
