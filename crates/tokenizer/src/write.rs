//! Writing `tokenizer.json` and `tokenizer_config.json`, as Hugging Face `tokenizers` and `transformers` read them.

use serde_json::{Map, Value, json};

use crate::normalize::NormalizeStep;
use crate::spec::{SPACE_MARK, Spec, Symbols};
use crate::split::{Behavior, PrependMark, SplitStep};
use crate::tokenizer::TokenId;

pub(crate) fn tokenizer_json(spec: &Spec) -> String {
    let name = |id: TokenId| spec.file_spelling(id);
    let vocab: Map<String, Value> = (0..spec.tokens.len() as TokenId)
        .filter(|&id| spec.tokens.get(id).in_model)
        .map(|id| (name(id), json!(id)))
        .collect();
    let merges: Vec<Value> = spec.merges.iter().map(|m| json!([name(m.left), name(m.right)])).collect();
    let mut file = json!({ "version": "1.0", "truncation": null, "padding": null });
    let rules = rules(spec);
    for part in ["added_tokens", "normalizer", "pre_tokenizer"] {
        file[part] = rules[part].clone();
    }
    file["post_processor"] = post_processor(spec);
    file["decoder"] = decoder(spec);
    file["model"] = rules["model"].clone();
    file["model"]["vocab"] = Value::Object(vocab);
    file["model"]["merges"] = Value::Array(merges);
    file.to_string()
}

pub(crate) fn config_json(spec: &Spec, chat_template: Option<&str>) -> String {
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": spec.add_bos,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 1_000_000_000,
    });
    for (field, id) in [("bos_token", spec.bos), ("eos_token", spec.eos), ("unk_token", spec.unk)] {
        if let Some(id) = id {
            config[field] = json!(content(spec, id));
        }
    }
    if let Some(template) = chat_template {
        config["chat_template"] = json!(template);
    }
    config.to_string()
}

/// All that determines ids beside the tokens and merges themselves.
pub(crate) fn rules_json(spec: &Spec) -> String {
    rules(spec).to_string()
}

fn rules(spec: &Spec) -> Value {
    let added: Vec<Value> = (spec.added.iter())
        .map(|token| {
            json!({
                "id": token.id, "content": token.content, "single_word": token.single_word,
                "lstrip": token.lstrip, "rstrip": token.rstrip,
                "normalized": token.normalized, "special": token.special,
            })
        })
        .collect();
    json!({
        "added_tokens": added,
        "normalizer": sequence("normalizers", spec.normalize.iter().map(normalizer).collect()),
        "pre_tokenizer": sequence("pretokenizers", spec.split.iter().map(pre_tokenizer).collect()),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": spec.unk.map(|id| spec.file_spelling(id)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": spec.fuse_unk,
            "byte_fallback": spec.symbols == Symbols::Chars { byte_fallback: true },
            "ignore_merges": spec.ignore_merges,
        },
    })
}

fn sequence(list: &str, mut steps: Vec<Value>) -> Value {
    match steps.len() {
        0 => Value::Null,
        1 => steps.remove(0),
        _ => json!({ "type": "Sequence", list: steps }),
    }
}

fn normalizer(step: &NormalizeStep) -> Value {
    match step {
        NormalizeStep::Nfc => json!({ "type": "NFC" }),
        NormalizeStep::Prepend(prefix) => json!({ "type": "Prepend", "prepend": prefix }),
        NormalizeStep::Replace { from, to } => {
            json!({ "type": "Replace", "pattern": { "String": from }, "content": to })
        }
    }
}

fn pre_tokenizer(step: &SplitStep) -> Value {
    match step {
        SplitStep::ByteLevel { add_prefix_space, use_regex } => byte_level(*add_prefix_space, *use_regex),
        SplitStep::Digits { individual } => json!({ "type": "Digits", "individual_digits": individual }),
        SplitStep::Pattern { pattern, literal, behavior, invert } => {
            let kind = if *literal { "String" } else { "Regex" };
            let behavior = match behavior {
                Behavior::Removed => "Removed",
                Behavior::Isolated => "Isolated",
                Behavior::MergedWithPrevious => "MergedWithPrevious",
                Behavior::MergedWithNext => "MergedWithNext",
                Behavior::Contiguous => "Contiguous",
            };
            json!({ "type": "Split", "pattern": { kind: pattern }, "behavior": behavior, "invert": invert })
        }
        SplitStep::Metaspace { prepend, split } => {
            let scheme = match prepend {
                PrependMark::First => "first",
                PrependMark::Always => "always",
                PrependMark::Never => "never",
            };
            json!({ "type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": scheme, "split": split })
        }
    }
}

fn post_processor(spec: &Spec) -> Value {
    let Some(bos) = spec.bos.filter(|_| spec.add_bos) else { return Value::Null };
    let name = content(spec, bos);
    let first = json!({ "SpecialToken": { "id": name, "type_id": 0 } });
    let text = |part: &str, type_id: u32| json!({ "Sequence": { "id": part, "type_id": type_id } });
    json!({
        "type": "TemplateProcessing",
        "single": [first, text("A", 0)],
        "pair": [first, text("A", 0), text("B", 1)],
        "special_tokens": { name.clone(): { "id": name, "ids": [bos], "tokens": [name] } },
    })
}

fn decoder(spec: &Spec) -> Value {
    if spec.symbols == Symbols::Bytes {
        return byte_level(true, true);
    }
    let mut steps = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE_MARK }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if spec.strip_leading_space {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    sequence("decoders", steps)
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex,
    })
}

fn content(spec: &Spec, id: TokenId) -> String {
    let added = spec.added.iter().find(|token| token.id == id);
    added.map_or_else(|| spec.file_spelling(id), |token| token.content.clone())
}
