//! Against PyTorch: `fixtures/golden/llama_train.json`, made by `fixtures/torch/golden.py` in f64.

use serde_json::Value;
use tensor::adamw::{AdamW, AdamWState, adamw};
use tensor::{Accumulate, Buf, Mat, matmul};

use super::*;
use crate::{Architecture, Rope, Trainable};

fn golden() -> Value {
    let text = include_str!("../../../../fixtures/golden/llama_train.json");
    serde_json::from_str(text).expect("the golden file is JSON")
}

/// The finalizer of MurmurHash3 over a counter, as in golden.py.
pub(super) fn hashed(salt: u32, n: usize) -> impl Iterator<Item = u32> {
    (0..n as u32).map(move |i| {
        let x = i.wrapping_add(salt.wrapping_mul(0x9e37_79b9));
        let x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
        let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
        x ^ (x >> 16)
    })
}

pub(super) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

pub(super) fn size(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a size")) as usize
}

fn config(case: &Value) -> Config {
    let shape = &case["config"];
    Config {
        architecture: Architecture::Llama,
        n_layers: size(&shape["layers"]),
        width: size(&shape["width"]),
        n_heads: size(&shape["heads"]),
        n_kv_heads: size(&shape["kv_heads"]),
        head_width: size(&shape["head_width"]),
        ff_width: size(&shape["ff"]),
        vocab: size(&shape["vocab"]),
        norm_eps: number(&shape["eps"]) as f32,
        rope: Rope::plain(number(&shape["theta"]) as f32),
        query_scalar: None,
        window: None,
        tied_embeddings: shape["tied"] == true,
        context_max: size(&case["positions"]),
        bos: None,
        eos: Vec::new(),
    }
}

/// One golden case, ready to run.
struct Case {
    golden: Value,
    model: TrainModel,
    params: Buf<f32>,
    tokens: Vec<u32>,
    targets: Vec<u32>,
}

fn plain<'a>(tokens: &'a [u32], targets: &'a [u32]) -> (MicroBatch<'a>, Objective) {
    (MicroBatch::plain(tokens, targets), Objective::CrossEntropy)
}

impl Case {
    fn all() -> Vec<Case> {
        golden()["cases"].as_array().expect("cases").iter().map(Case::new).collect()
    }

    fn new(golden: &Value) -> Case {
        let config = config(golden);
        let (b, t) = (size(&golden["rows"]), size(&golden["positions"]));
        let model = TrainModel::new(Trainable::new(&config), b, t, Precision::F32);
        let mut params = Buf::zeroed(model.trainable().n_params());
        for (salt, spec) in model.trainable().specs().iter().enumerate() {
            let one = if spec.dims.len() == 1 { 1.0 } else { 0.0 };
            let hashes = hashed(salt as u32 + 1, spec.range.len());
            for (param, hash) in params[spec.range.clone()].iter_mut().zip(hashes) {
                *param = ((hash >> 16) as f32 - 32768.0) / 131072.0 + one;
            }
        }
        let ids: Vec<u32> = hashed(1000, b * (t + 1)).map(|hash| hash % config.vocab as u32).collect();
        let tokens = ids.chunks(t + 1).flat_map(|row| row[..t].to_vec()).collect();
        let targets = ids.chunks(t + 1).flat_map(|row| row[1..].to_vec()).collect();
        Case { golden: golden.clone(), model, params, tokens, targets }
    }
}

#[track_caller]
pub(super) fn assert_near(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "{what}: {found}, PyTorch says {expected}");
}

impl TrainModel {
    /// The logits of the first `n` tokens of the last forward pass, `[n, v]`.
    fn last_logits(&mut self, pool: &Pool, params: &[f32], n: usize) -> Buf<f32> {
        let Shape { c, v, precision, .. } = self.shape;
        let mut nothing = Flat(&mut []);
        let pass = self.pass(pool, Params::Trained(Some(params)), MicroBatch::default(), &mut nothing);
        let values = &pass.matrices.values;
        let norm = Norm::of(values, &values.table.final_norm, pass.shape.norm_eps);
        let last = 2 * values.table.layers.len();
        norm.again(pool, &mut pass.scratch.normed_nc, &pass.streams[last]);
        let mut logits = Buf::zeroed(n * v);
        let head = Mat::new(values.of(&values.table.head), v, c);
        let rows = Mat::new(&pass.scratch.normed_nc[..n * c], n, c);
        matmul(pool, &mut logits, rows, head.t(), precision, Accumulate::Overwrite);
        logits
    }
}

#[test]
fn loss_logits_and_gradients_are_pytorchs() {
    let pool = Pool::new(2);
    for mut case in Case::all() {
        let name = case.golden["name"].to_string();
        let mut dparams = vec![0.0; case.params.len()];
        let loss =
            case.model.loss_and_grads(&pool, &case.params, plain(&case.tokens, &case.targets), &mut dparams);
        let expected = number(&case.golden["loss_sum"]);
        assert_near(&name, loss.nats, expected, 1e-6 * expected);
        let alone = case.model.loss(&pool, &case.params, plain(&case.tokens, &case.targets));
        assert_near(&name, alone.nats, expected, 1e-6 * expected);

        let logits = case.model.last_logits(&pool, &case.params, size(&case.golden["positions"]));
        let v = case.model.shape.v;
        let golden = &case.golden["logits"];
        for (at, row) in
            golden["positions"].as_array().unwrap().iter().zip(golden["values"].as_array().unwrap())
        {
            let row = row.as_array().unwrap();
            assert_eq!(row.len(), v);
            for (found, expected) in logits[size(at) * v..].iter().zip(row) {
                assert_near(&name, f64::from(*found), number(expected), 1e-5);
            }
        }

        let gradients = case.golden["gradients"].as_array().unwrap();
        assert_eq!(gradients.len(), case.model.trainable().specs().len());
        for (spec, golden) in case.model.trainable().specs().iter().zip(gradients) {
            assert_eq!(golden["name"], spec.name);
            let found = &dparams[spec.range.clone()];
            let norm = found.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let expected_norm = number(&golden["norm"]);
            assert_near(&spec.name, norm, expected_norm, 1e-5 * expected_norm);
            for (at, value) in
                golden["at"].as_array().unwrap().iter().zip(golden["values"].as_array().unwrap())
            {
                let tolerance = 1e-5 * expected_norm.max(number(value).abs());
                assert_near(&spec.name, f64::from(found[size(at)]), number(value), tolerance);
            }
        }
    }
}

#[test]
fn twenty_steps_of_adamw_lose_what_pytorchs_lose() {
    let pool = Pool::new(2);
    for mut case in Case::all() {
        let golden = &case.golden["adamw"];
        let decayed = case.model.trainable().decayed();
        let n = case.params.len();
        let [mut dparams, mut m, mut v] = [(); 3].map(|()| vec![0.0; n]);
        for (step, expected) in golden["losses"].as_array().unwrap().iter().enumerate() {
            let loss = case.model.loss_and_grads(
                &pool,
                &case.params,
                plain(&case.tokens, &case.targets),
                &mut dparams,
            );
            let mean = loss.nats / loss.n_tokens as f64;
            assert_near(&format!("step {step}"), mean, number(expected), 2e-5 * number(expected));
            let settings = AdamW {
                lr: number(&golden["lr"]) as f32,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: number(&golden["weight_decay"]) as f32,
                step: step as u64 + 1,
                grad_scale: 1.0 / loss.n_tokens as f32,
            };
            let state = AdamWState { params: &mut case.params, m: &mut m, v: &mut v };
            adamw(&pool, state, &dparams, &decayed, &settings);
        }
    }
}
