//! Low-rank adapters against PEFT: random ones of `fixtures/torch/adapters.py`.

use std::path::{Path, PathBuf};

use model::{Adapter, BLOCK_TOKENS, KvType, Lora, Scratch, StepInput, Trainable, Transformer, load};
use tensor::Pool;
use tensor::packed::WeightKind;

use super::architectures::{self, TOLERANCE, distance, expected_in};

/// Adapter and the model it was made for.
const ADAPTERS: [(&str, &str); 3] = [("llama_all", "llama"), ("llama_qv_rs", "llama"), ("gpt2", "gpt2")];

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/adapters").join(name)
}

fn base(name: &str, pool: &Pool) -> Transformer {
    Transformer::new(load(&architectures::dir(name)).unwrap().weights, pool).unwrap()
}

/// One text and the adapter it is computed with.
type Text<'a> = (&'a [u32], Option<&'a Adapter>);

/// Logits after every token of every text, computed in one step.
fn logits(pool: &Pool, model: &Transformer, texts: &[Text]) -> Vec<Vec<Vec<f32>>> {
    let mut step = StepInput::default();
    let mut next = 0;
    for (ids, adapter) in texts {
        let n_blocks = ids.len().div_ceil(BLOCK_TOKENS) as u32;
        let blocks: Vec<u32> = (next..next + n_blocks).collect();
        next += n_blocks;
        step.push_row(ids, 0, &blocks, ids.len());
        step.rows.last_mut().unwrap().adapter = adapter.cloned();
    }
    let mut kv = model.new_kv(next as usize, KvType::F32);
    let mut logits_rv = Vec::new();
    model.forward(pool, &step, &mut kv, &mut Scratch::default(), &mut logits_rv).unwrap();
    let mut rows = logits_rv.chunks(model.config().vocab).map(<[f32]>::to_vec);
    texts.iter().map(|(ids, _)| rows.by_ref().take(ids.len()).collect()).collect()
}

#[test]
fn logits_are_those_of_peft() {
    let pool = Pool::new(2);
    for (name, base_name) in ADAPTERS {
        let model = base(base_name, &pool);
        let adapter = Adapter::load(&dir(name), model.config(), &pool).unwrap();
        let expected = expected_in(&dir(name));
        let found = &logits(&pool, &model, &[(&expected.ids, Some(&adapter))])[0];
        for (position, expected) in expected.positions.iter().zip(&expected.logits) {
            let error = distance(&found[*position], expected);
            assert!(error < TOLERANCE, "{name}: {error} after position {position}");
        }
    }
}

/// Several adapters, and none, in one step: each text's logits are the same as alone, to the bit.
#[test]
fn adapters_share_a_step_and_do_not_touch_each_other() {
    let pool = Pool::new(2);
    let model = base("llama", &pool);
    let [all, qv] =
        ["llama_all", "llama_qv_rs"].map(|name| Adapter::load(&dir(name), model.config(), &pool).unwrap());
    let ids = expected_in(&dir("llama_all")).ids;
    let texts: [Text; 6] = [
        (&ids[..9], None),
        (&ids[..9], Some(&all)),
        (&ids[3..20], Some(&all)),
        (&ids[..9], Some(&qv)),
        (&ids[5..6], None),
        (&ids[..9], Some(&all)),
    ];
    let together = logits(&pool, &model, &texts);
    for (text, together) in texts.iter().zip(&together) {
        assert!(&logits(&pool, &model, &[*text])[0] == together, "{text:?}");
    }
    assert!(together[0] != together[1] && together[1] != together[3] && together[1] == together[5]);
}

/// What was trained is served alike, beside its base and merged into it.
#[test]
fn trained_changes_are_served_as_an_adapter_and_merged() {
    let pool = Pool::new(2);
    for (base_name, targets) in [
        ("llama", &["q_proj", "v_proj", "up_proj"][..]),
        ("gpt2", &["all-linear"]),
        ("qwen3", &["down_proj"]),
    ] {
        let weights = load(&architectures::dir(base_name)).unwrap().weights;
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        let trainable = Trainable::lora(weights, &Lora { rank: 4, alpha: 6.0, targets }).unwrap();
        let params: Vec<f32> =
            (0..trainable.n_params()).map(|i| (i * 37 % 101) as f32 / 500.0 - 0.1).collect();
        let served = tempfile::tempdir().unwrap();
        for (file, bytes) in trainable.adapter_files(&params, "the base").unwrap().unwrap() {
            std::fs::write(served.path().join(file), bytes).unwrap();
        }
        let model = base(base_name, &pool);
        let adapter = Adapter::load(served.path(), model.config(), &pool).unwrap();
        let merged = Transformer::new(trainable.to_weights(&pool, &params, WeightKind::F32), &pool).unwrap();
        let ids = expected_in(&architectures::dir(base_name)).ids;
        let [beside, merged, without] = [(&model, Some(&adapter)), (&merged, None), (&model, None)]
            .map(|(model, adapter)| logits(&pool, model, &[(&ids[..20], adapter)])[0].concat());
        let error = distance(&beside, &merged);
        assert!(error < TOLERANCE, "{base_name}: {error}");
        assert!(distance(&without, &merged) > 100.0 * TOLERANCE, "{base_name}: the changes do nothing");
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let pool = Pool::new(1);
    let llama = base("llama", &pool);
    let refused = |edit: &dyn Fn(&Path)| {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir("llama_qv_rs")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        edit(copy.path());
        Adapter::load(copy.path(), llama.config(), &pool).unwrap_err().to_string()
    };
    let setting = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join("adapter_config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            std::fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let tensors = "adapter_model.safetensors";
    for (edit, expected) in [
        (&setting("\"LORA\"", "\"IA3\"") as &dyn Fn(&Path), "peft_type = IA3"),
        (&setting("\"use_dora\": false", "\"use_dora\": true"), "use_dora"),
        (&setting("\"bias\": \"none\"", "\"bias\": \"all\""), "bias = all"),
        (&setting("\"alpha_pattern\": {}", "\"alpha_pattern\": {\"q_proj\": 3}"), "alpha_pattern"),
        (&setting("\"lora_alpha\": 5", "\"lora_alpha\": null"), "lora_alpha"),
        (&|dir: &Path| std::fs::remove_file(dir.join("adapter_config.json")).unwrap(), "adapter_config.json"),
        (&|dir: &Path| std::fs::write(dir.join(tensors), b"half").unwrap(), tensors),
    ] {
        let error = refused(edit);
        assert!(error.contains(expected), "{error}, not {expected}");
    }
    // Made for a model of another shape, or of other names.
    let error = Adapter::load(&dir("gpt2"), llama.config(), &pool).unwrap_err().to_string();
    assert!(error.contains("transformer.h.0"), "{error}");
    let adapter = Adapter::load(&dir("llama_all"), llama.config(), &pool).unwrap();
    let mut step = StepInput::default();
    step.push_row(&[1], 0, &[0], 1);
    step.rows[0].adapter = Some(adapter);
    let gpt2 = base("gpt2", &pool);
    let mut kv = gpt2.new_kv(1, KvType::F32);
    let done = gpt2.forward(&pool, &step, &mut kv, &mut Scratch::default(), &mut Vec::new());
    assert!(done.unwrap_err().to_string().contains("adapter of another model"));
}
