//! Every architecture against transformers: tiny random models of `fixtures/torch/tiny_models.py`.

use std::path::{Path, PathBuf};

use model::{BLOCK_TOKENS, KvType, Scratch, StepInput, Transformer, gguf, load};
use tensor::Pool;

const MODELS: [&str; 9] =
    ["llama", "llama_linear", "llama_llama3", "llama_yarn", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"];

/// Of the largest expected logit.
pub(crate) const TOLERANCE: f32 = 1e-4;

/// One text of a model and what transformers computes from it.
pub(crate) struct Expected {
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<usize>,
    pub(crate) logits: Vec<Vec<f32>>,
}

pub(crate) fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/models").join(name)
}

fn expected(name: &str) -> Expected {
    expected_in(&dir(name))
}

pub(crate) fn expected_in(dir: &Path) -> Expected {
    let json = std::fs::read(dir.join("expected.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let floats = |row: &serde_json::Value| -> Vec<f32> {
        row.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    };
    Expected {
        ids: super::ids(&json["ids"]),
        positions: super::ids(&json["positions"]).iter().map(|&p| p as usize).collect(),
        logits: json["logits"].as_array().unwrap().iter().map(floats).collect(),
    }
}

/// Logits after every token of `ids`, which come in chunks of these lengths (the last one again and again).
fn logits(pool: &Pool, decoder: &Transformer, ids: &[u32], chunks: &[usize]) -> Vec<Vec<f32>> {
    let n_blocks = ids.len().div_ceil(BLOCK_TOKENS);
    let mut kv = decoder.new_kv(n_blocks, KvType::F32);
    let blocks: Vec<u32> = (0..n_blocks as u32).rev().collect();
    let (mut scratch, mut logits_rv, mut all) = (Scratch::default(), Vec::new(), Vec::new());
    let mut lengths = chunks.iter().chain(std::iter::repeat(chunks.last().unwrap()));
    while all.len() < ids.len() {
        let n = (*lengths.next().unwrap()).min(ids.len() - all.len());
        let mut step = StepInput::default();
        step.push_row(&ids[all.len()..all.len() + n], all.len(), &blocks, n);
        decoder.forward(pool, &step, &mut kv, &mut scratch, &mut logits_rv).unwrap();
        all.extend(logits_rv.chunks(decoder.config().vocab).map(<[f32]>::to_vec));
    }
    all
}

pub(crate) fn distance(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let worst = found.iter().zip(expected).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
    worst / largest
}

#[test]
fn logits_are_those_of_transformers() {
    let pool = Pool::new(2);
    for name in MODELS {
        let expected = expected(name);
        let decoder = Transformer::new(load(&dir(name)).unwrap().weights, &pool).unwrap();
        let whole = logits(&pool, &decoder, &expected.ids, &[90]);
        let mut worst = 0.0f32;
        for (position, expected) in expected.positions.iter().zip(&expected.logits) {
            let error = distance(&whole[*position], expected);
            assert!(error < TOLERANCE, "{name}: {error} after position {position}");
            worst = worst.max(error);
        }
        eprintln!("{name}: logits are within {worst:.1e} of transformers'");
        for chunks in [&[7, 1, 25, 16, 30][..], &[1]] {
            let chunked = logits(&pool, &decoder, &expected.ids, chunks);
            assert!(chunked == whole, "{name} in chunks of {chunks:?} gives other logits");
        }
    }
}

/// What is written is the same model: the same configuration, and logits equal to the bit.
#[test]
fn written_directories_are_read_again() {
    let pool = Pool::new(2);
    for name in MODELS {
        let ids = expected(name).ids;
        let out = tempfile::tempdir().unwrap();
        model::hf::write_dir(&load(&dir(name)).unwrap().weights, out.path()).unwrap();
        let [first, second] = [dir(name), out.path().to_owned()].map(|dir| load(&dir).unwrap().weights);
        assert_eq!(first.config, second.config, "{name}");
        assert_eq!(first.config.n_params(), n_params(&first), "{name}");
        let [first, second] = [first, second]
            .map(|weights| logits(&pool, &Transformer::new(weights, &pool).unwrap(), &ids, &[90]));
        assert!(first == second, "{name}: other logits");
    }
}

/// The same for GGUF, as far as the file says it goes: it cannot say that a Mistral or a Qwen looks back through a window, so
/// it ends where the window does.
#[test]
fn written_gguf_files_are_read_again() {
    let pool = Pool::new(2);
    for name in MODELS {
        let out = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
        let first = load(&dir(name)).unwrap().weights;
        gguf::write(&mut out.as_file(), &first, gguf::Extras::default()).unwrap();
        let second = load(out.path()).unwrap().weights;
        let reach = second.config.context_max;
        let window = first.config.window.as_ref().filter(|_| name != "gemma3");
        assert_eq!(reach, window.map_or(first.config.context_max, |window| window.n_positions), "{name}");
        let ids = expected(name).ids;
        let ids = &ids[..ids.len().min(reach)];
        let [first, second] = [first, second]
            .map(|weights| logits(&pool, &Transformer::new(weights, &pool).unwrap(), ids, &[90]));
        // Llama 3's scaling comes back from divisors in f32, Gemma's divisor of scores through the scales of its queries.
        let worst = first.iter().zip(&second).map(|(a, b)| distance(a, b)).fold(0.0, f32::max);
        let is_rounded = ["llama_llama3", "gemma3"].contains(&name);
        assert!(worst < if is_rounded { 1e-5 } else { f32::MIN_POSITIVE }, "{name}: {worst}");
    }
}

fn n_params(weights: &model::Weights) -> usize {
    weights.tensors.values().map(|tensor| tensor.dims.iter().product::<usize>()).sum()
}

/// A model with a tensor too few or too many is refused by the tensor's name, whatever its architecture.
#[test]
fn missing_and_foreign_tensors_are_named() {
    let pool = Pool::new(1);
    for name in MODELS {
        let names: Vec<String> = load(&dir(name)).unwrap().weights.tensors.into_keys().collect();
        for missing in names {
            let mut weights = load(&dir(name)).unwrap().weights;
            let tensor = weights.tensors.remove(&missing).unwrap();
            weights.tensors.insert("foreign.weight".into(), tensor);
            let error = Transformer::new(weights, &pool).err().expect(name).to_string();
            assert!(error.contains(&missing), "{name} without {missing}: {error}");
        }
        let mut weights = load(&dir(name)).unwrap().weights;
        let tensor = weights.tensors.values().next().unwrap().clone();
        weights.tensors.insert("foreign.weight".into(), tensor);
        let error = Transformer::new(weights, &pool).err().expect(name).to_string();
        assert!(error.contains("foreign.weight"), "{name}: {error}");
    }
}
