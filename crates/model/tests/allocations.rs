//! What training steps allocate. A binary of its own with one test, so that nobody else allocates meanwhile.

use std::alloc::System;

use model::{Architecture, Config, Lora, MicroBatch, Objective, Rope, TrainModel, Trainable};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tensor::adamw::{AdamW, AdamWState, adamw, sum_squares};
use tensor::packed::WeightKind;
use tensor::{Buf, Pool, Precision};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const ROWS: usize = 2;
const POSITIONS: usize = 48;
const VOCAB: usize = 300;
const STEPS_MAX: usize = 30;

fn config(architecture: Architecture) -> Config {
    Config {
        architecture,
        n_layers: 2,
        width: 64,
        n_heads: 4,
        n_kv_heads: if architecture == Architecture::Gpt2 { 4 } else { 2 },
        head_width: 16,
        ff_width: 96,
        vocab: VOCAB,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        query_scalar: None,
        window: None,
        tied_embeddings: true,
        context_max: POSITIONS,
        bos: None,
        eos: Vec::new(),
    }
}

fn with_lora(config: &Config, pool: &Pool) -> Trainable {
    let random = Trainable::new(config);
    let weights = random.to_weights(pool, &random.init(1), WeightKind::Bf16);
    let lora = Lora { rank: 4, alpha: 8.0, targets: vec!["all-linear".to_owned()] };
    Trainable::lora(weights, &lora).unwrap()
}

/// Forward, backward, clipping and AdamW.
struct Steps {
    model: TrainModel,
    params: Buf<f32>,
    dparams: Buf<f32>,
    m: Buf<f32>,
    v: Buf<f32>,
    scratch: Vec<f64>,
    decayed: Vec<std::ops::Range<usize>>,
}

impl Steps {
    fn new(model: TrainModel) -> Self {
        let (params, decayed) = (model.trainable().init(1), model.trainable().decayed());
        let [dparams, m, v] = [(); 3].map(|()| Buf::zeroed(params.len()));
        Steps { model, params, dparams, m, v, scratch: Vec::new(), decayed }
    }

    fn step(&mut self, pool: &Pool, batch: MicroBatch<'_>, step: u64) -> f64 {
        let loss = self.model.loss_and_grads(
            pool,
            &self.params,
            (batch, Objective::CrossEntropy),
            &mut self.dparams,
        );
        let norm = sum_squares(pool, &self.dparams, &mut self.scratch).sqrt();
        let settings = AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            grad_scale: (1.0 / norm) as f32,
        };
        let state = AdamWState { params: &mut self.params, m: &mut self.m, v: &mut self.v };
        adamw(pool, state, &self.dparams, &self.decayed, &settings);
        loss.nats
    }
}

/// A thread allocates when it first gets a task of some kind, which may be in a later step.
#[test]
fn steps_allocate_nothing_after_the_first() {
    let pool = Pool::new(2);
    let ids =
        |salt: usize| (0..ROWS * POSITIONS).map(|i| ((i + salt) * 7919 % VOCAB) as u32).collect::<Vec<_>>();
    let (tokens, targets) = (ids(0), ids(1));
    // Two documents a row.
    let starts: Vec<u32> = (0..ROWS * POSITIONS).map(|i| if i % POSITIONS < 20 { 0 } else { 20 }).collect();
    let batch = || MicroBatch { tokens_bt: &tokens, targets_bt: &targets, starts_bt: Some(&starts) };
    for architecture in [Architecture::Llama, Architecture::Qwen3, Architecture::Gpt2] {
        let config = config(architecture);
        for (kind, precision) in [
            ("whole", Precision::F32),
            ("whole", Precision::Bf16),
            ("recomputed", Precision::F32),
            ("lora", Precision::F32),
        ] {
            let trainable = if kind == "lora" { with_lora(&config, &pool) } else { Trainable::new(&config) };
            let model = TrainModel::new(trainable, ROWS, POSITIONS, precision).with_z_loss(1e-4);
            let mut steps = Steps::new(model.with_recompute(kind == "recomputed"));
            let (mut losses, mut allocated, mut n_quiet) = (Vec::with_capacity(STEPS_MAX), Vec::new(), 0);
            while n_quiet < 3 && losses.len() < STEPS_MAX {
                let region = Region::new(ALLOCATOR);
                losses.push(steps.step(&pool, batch(), losses.len() as u64 + 1));
                let change = region.change();
                let n = change.allocations + change.reallocations;
                n_quiet = if n == 0 { n_quiet + 1 } else { 0 };
                allocated.push(n);
            }
            assert_eq!(
                n_quiet, 3,
                "{architecture:?} {kind} {precision:?}: allocations of each step {allocated:?}"
            );
            assert!(losses.last() < losses.first(), "it learns: {losses:?}");
        }
    }
}
