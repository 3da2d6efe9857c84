//! Against transformers and PEFT: `fixtures/golden/train.json`, made by `fixtures/torch/train_golden.py` in f64 from the models
//! of `fixtures/golden/models`.

use std::path::Path;

use serde_json::Value;
use tensor::Buf;
use tensor::adamw::{AdamW, AdamWState, adamw};
use tensor::cross_entropy::IGNORED;

use super::golden::{assert_near, hashed, number, size};
use super::*;
use crate::{Lora, hf};

fn golden() -> Value {
    let text = include_str!("../../../../fixtures/golden/train.json");
    serde_json::from_str(text).expect("the golden file is JSON")
}

fn weights(name: &str) -> crate::Weights {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/models");
    hf::read_dir(&models.join(name)).unwrap()
}

/// Uniform in ± scale, as in train_golden.py.
fn noise(name: &str, len: usize, scale: f32) -> impl Iterator<Item = f32> {
    let salt = name.bytes().map(u32::from).sum();
    hashed(salt, len).map(move |hash| ((hash >> 16) as f32 - 32768.0) / 32768.0 * scale)
}

/// The micro-batch of all cases.
struct Rows {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    starts: Vec<u32>,
}

impl Rows {
    fn new(golden: &Value, vocab: usize) -> Rows {
        let (b, t) = (size(&golden["rows"]), size(&golden["positions"]));
        let ids: Vec<u32> = hashed(1000, b * (t + 1)).map(|hash| hash % vocab as u32).collect();
        let tokens = ids.chunks(t + 1).flat_map(|row| row[..t].to_vec()).collect();
        let mut targets: Vec<u32> = ids.chunks(t + 1).flat_map(|row| row[1..].to_vec()).collect();
        targets.iter_mut().skip(6).step_by(7).for_each(|target| *target = IGNORED);
        let starts = golden["starts"].as_array().unwrap().iter().map(|start| size(start) as u32).collect();
        Rows { tokens, targets, starts }
    }

    fn batch(&self, packed: bool) -> MicroBatch<'_> {
        MicroBatch {
            starts_bt: packed.then_some(&self.starts[..]),
            ..MicroBatch::plain(&self.tokens, &self.targets)
        }
    }
}

/// One golden case, ready to run.
struct Case<'a> {
    name: String,
    golden: &'a Value,
    expected: &'a Value,
    objective: Objective,
    packed: bool,
    rows: Rows,
    model: TrainModel,
    params: Buf<f32>,
}

impl<'a> Case<'a> {
    /// Every case of some kinds.
    fn all(golden: &'a Value, kinds: &[&str], precision: Precision) -> Vec<Case<'a>> {
        let mut cases = Vec::new();
        for kind in kinds {
            for (name, expected) in golden[*kind].as_object().unwrap() {
                cases.push(Case::new(golden, (kind, name), expected, precision));
            }
        }
        cases
    }

    fn new(golden: &'a Value, (kind, name): (&str, &str), expected: &'a Value, precision: Precision) -> Self {
        let trainable = match expected.get("rank") {
            None => Trainable::from_weights(weights(name)).unwrap(),
            Some(rank) => {
                let targets = expected["targets"].as_array().unwrap().iter();
                let targets = targets.map(|target| target.as_str().unwrap().to_owned()).collect();
                let settings = Lora { rank: size(rank), alpha: number(&expected["alpha"]) as f32, targets };
                Trainable::lora(weights(name), &settings).unwrap()
            }
        };
        let mut params = trainable.init(0);
        for spec in trainable.specs() {
            let (x, n) = (params[spec.range.clone()].iter_mut(), spec.range.len());
            match expected.get("rank") {
                Some(_) => x.zip(noise(&spec.name, n, 0.125)).for_each(|(x, n)| *x = n),
                None if kind == "dpo" => {
                    x.zip(noise(&spec.name, n, 1.0 / 512.0)).for_each(|(x, n)| *x += n);
                }
                None => {}
            }
        }
        let (b, t) = (size(&golden["rows"]), size(&golden["positions"]));
        let dpo = Objective::Dpo { beta: number(&golden["beta"]) as f32 };
        Case {
            name: format!("{kind} {name}"),
            golden,
            expected,
            objective: if kind.starts_with("dpo") { dpo } else { Objective::CrossEntropy },
            packed: kind.ends_with("packed"),
            rows: Rows::new(golden, trainable.config().vocab),
            model: TrainModel::new(trainable, b, t, precision),
            params,
        }
    }

    /// Loss and gradients at the start, within a tolerance relative to the loss and to the gradient's norm.
    fn check_gradients(&mut self, [loss_tolerance, grad_tolerance]: [f64; 2]) {
        let pool = Pool::new(2);
        let mut dparams = vec![f32::NAN; self.params.len()];
        let of = (self.rows.batch(self.packed), self.objective);
        let loss = self.model.loss_and_grads(&pool, &self.params, of, &mut dparams);
        let expected = number(&self.expected["loss_sum"]);
        assert_near(&self.name, loss.nats, expected, loss_tolerance * expected);
        let margin = self.expected.get("margin").map_or(0.0, number);
        assert_near(&self.name, loss.margin, margin, loss_tolerance * margin.abs().max(1.0));
        let gradients = self.expected["gradients"].as_array().unwrap();
        assert_eq!(gradients.len(), self.model.trainable().specs().len(), "{}", self.name);
        for golden in gradients {
            let specs = self.model.trainable().specs();
            let spec = specs.iter().find(|spec| golden["name"] == spec.name).expect("a tensor of that name");
            let found = &dparams[spec.range.clone()];
            let norm = found.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let (name, expected) = (format!("{} {}", self.name, spec.name), number(&golden["norm"]));
            assert_near(&name, norm, expected, grad_tolerance * expected);
            let places = golden["at"].as_array().unwrap().iter().map(size);
            for (at, value) in places.zip(golden["values"].as_array().unwrap()) {
                assert_near(&name, f64::from(found[at]), number(value), grad_tolerance * expected);
            }
        }
    }

    /// Twenty steps of AdamW.
    fn check_losses(&mut self, tolerance: f64) {
        let pool = Pool::new(2);
        let decayed = self.model.trainable().decayed();
        let [mut dparams, mut m, mut v] = [(); 3].map(|()| vec![0.0; self.params.len()]);
        for (step, expected) in self.expected["losses"].as_array().unwrap().iter().enumerate() {
            let of = (self.rows.batch(self.packed), self.objective);
            let loss = self.model.loss_and_grads(&pool, &self.params, of, &mut dparams);
            let (mean, expected) = (loss.nats / loss.n_tokens as f64, number(expected));
            // A pair that is learned loses next to nothing.
            assert_near(
                &format!("{}, step {step}", self.name),
                mean,
                expected,
                tolerance * expected.max(0.1),
            );
            let settings = AdamW {
                lr: number(&self.golden["lr"]) as f32,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: number(&self.golden["weight_decay"]) as f32,
                step: step as u64 + 1,
                grad_scale: 1.0 / loss.n_tokens as f32,
            };
            let state = AdamWState { params: &mut self.params, m: &mut m, v: &mut v };
            adamw(&pool, state, &dparams, &decayed, &settings);
        }
    }
}

/// Tokens of every architecture, alone and several documents a row, trained in full and by LoRA.
const TOKENS: [&str; 4] = ["plain", "packed", "lora", "lora_packed"];
const PAIRS: [&str; 2] = ["dpo", "dpo_lora"];

#[test]
fn gradients_are_those_of_transformers_and_peft() {
    let golden = golden();
    for mut case in Case::all(&golden, &TOKENS, Precision::F32) {
        case.check_gradients([1e-6, 1e-5]);
    }
    for mut case in Case::all(&golden, &PAIRS, Precision::F32) {
        case.check_gradients([1e-5, 1e-5]);
    }
}

#[test]
fn twenty_steps_lose_what_transformers_and_peft_lose() {
    let golden = golden();
    for mut case in Case::all(&golden, &TOKENS, Precision::F32) {
        case.check_losses(1e-5);
    }
    for mut case in Case::all(&golden, &PAIRS, Precision::F32) {
        case.check_losses(1e-4);
    }
}

/// Operands of matrix products have 8 bits: each product is off by up to 2^-8, and sums of many by less.
#[test]
fn bf16_stays_within_its_bounds() {
    let golden = golden();
    for mut case in Case::all(&golden, &TOKENS, Precision::Bf16) {
        case.check_gradients([2e-3, 3e-2]);
        case.check_losses(3e-2);
    }
}
