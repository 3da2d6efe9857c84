//! [`Objective`]: what is minimized. Each is a few lines over the losses of tokens.
//!
//! - Cross-entropy: the sum of the losses of all tokens that count.
//! - DPO (Rafailov et al. 2023, <https://arxiv.org/abs/2305.18290>): rows are pairs, the preferred answer and then the
//!   other. With log π the sum of a row's log-probabilities (of the tokens that count) and
//!   `m = (log π_w - log π_l) - (log ref_w - log ref_l)`: `loss = -ln σ(β·m)`. Its gradient is that of cross-entropy with the
//!   factor β·σ(-β·m) on the tokens of the preferred row and its negative on the other's.
//! - Distillation: the sum over all tokens that count of what [`tensor::distill`] makes of cross-entropy and a teacher's
//!   probabilities.

use serde::{Deserialize, Serialize};
use tensor::Pool;
use tensor::cross_entropy::IGNORED;
use tensor::distill::Distill;

use super::head::Sum;
use super::{Keeper, MicroBatch, Params, TrainModel};

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Of the next token.
    #[default]
    CrossEntropy,
    /// Rows 2i are preferred to rows 2i + 1.
    Dpo {
        /// How far the model may go from the one it started as: small is far.
        beta: f32,
    },
    /// Of the next token, and of a teacher's probabilities (see [`super::Teacher`]).
    Distill {
        /// The teacher's share, 0 to 1.
        weight: f32,
        /// Of both models' probabilities, where they are compared.
        temperature: f32,
    },
}

impl Objective {
    /// Whether rows are pairs, and what counts are pairs.
    pub fn is_of_pairs(self) -> bool {
        matches!(self, Self::Dpo { .. })
    }
}

/// What a micro-batch lost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Sum of the losses of all that counts, in nats.
    pub nats: f64,
    /// What counts: tokens with a target, or pairs.
    pub n_tokens: usize,
    /// Of pairs: the sum of the margins β·m.
    pub margin: f64,
}

pub(super) fn loss_and_grads(
    model: &mut TrainModel,
    pool: &Pool,
    params: Option<&[f32]>,
    (batch, objective): (MicroBatch, Objective),
    keeper: &mut dyn Keeper,
) -> LossSum {
    match objective {
        Objective::CrossEntropy => {
            let mut pass = model.pass(pool, Params::Trained(params), batch, keeper);
            pass.forward();
            pass.head_backward(Sum::Plain);
            let loss = sum_losses(&pass.scratch.losses_n, batch.targets_bt);
            pass.backward();
            loss
        }
        Objective::Dpo { beta } => {
            // The policy comes last: its activations are what the backward pass reads.
            let pairs = Pairs::new(model, pool, (params, keeper), batch, beta);
            let factors_n = pairs.factors(model.shape.t);
            let mut pass = model.pass(pool, Params::Trained(params), batch, keeper);
            pass.head_backward(Sum::Weighted(&factors_n));
            pass.backward();
            pairs.loss()
        }
        Objective::Distill { weight, temperature } => {
            let distill = Distill { weight, temperature, z_loss: model.z_loss };
            taught(model, pool, (batch, distill), |model, sum| {
                let mut pass = model.pass(pool, Params::Trained(params), batch, keeper);
                pass.forward();
                pass.head_backward(sum);
                pass.backward();
            })
        }
    }
}

/// The loss of rows that the teacher computes first; `learn` computes them with it.
fn taught(
    model: &mut TrainModel,
    pool: &Pool,
    (batch, distill): (MicroBatch, Distill),
    learn: impl FnOnce(&mut TrainModel, Sum),
) -> LossSum {
    let mut teacher = model.teacher.take().expect("distillation has a teacher");
    teacher.forward(pool, batch);
    learn(model, Sum::Taught(&mut teacher, distill));
    model.teacher = Some(teacher);
    sum_losses(&model.scratch.losses_n, batch.targets_bt)
}

pub(super) fn loss(
    model: &mut TrainModel,
    pool: &Pool,
    params: Option<&[f32]>,
    (batch, objective): (MicroBatch, Objective),
    keeper: &mut dyn Keeper,
) -> LossSum {
    match objective {
        Objective::CrossEntropy => {
            let mut pass = model.pass(pool, Params::Trained(params), batch, keeper);
            pass.forward();
            if !pass.has_head() {
                return LossSum::default();
            }
            pass.token_losses(Sum::Plain);
            sum_losses(&pass.scratch.losses_n, batch.targets_bt)
        }
        Objective::Dpo { beta } => Pairs::new(model, pool, (params, keeper), batch, beta).loss(),
        Objective::Distill { weight, temperature } => {
            let distill = Distill { weight, temperature, z_loss: 0.0 };
            taught(model, pool, (batch, distill), |model, sum| {
                let mut pass = model.pass(pool, Params::Trained(params), batch, keeper);
                pass.forward();
                pass.token_losses(sum);
            })
        }
    }
}

fn sum_losses(losses_n: &[f32], targets_n: &[u32]) -> LossSum {
    LossSum {
        nats: losses_n.iter().map(|x| f64::from(*x)).sum(),
        n_tokens: targets_n.iter().filter(|target| **target != IGNORED).count(),
        margin: 0.0,
    }
}

/// The pairs of a micro-batch: β·m of each. One without an answer that counts (padding) is `None`.
struct Pairs {
    margins: Vec<Option<f64>>,
    beta: f64,
}

impl Pairs {
    /// Leaves the model as after a forward pass with `params`.
    fn new(
        model: &mut TrainModel,
        pool: &Pool,
        (params, keeper): (Option<&[f32]>, &mut dyn Keeper),
        batch: MicroBatch,
        beta: f32,
    ) -> Self {
        let t = model.shape.t;
        assert!((model.shape.n / t).is_multiple_of(2), "pairs are two rows each");
        let reference = row_losses(model, pool, (Params::Start, keeper), batch);
        let policy = row_losses(model, pool, (Params::Trained(params), keeper), batch);
        let beta = f64::from(beta);
        let margin = |i: usize| {
            let counts = batch.targets_bt[2 * i * t..2 * (i + 1) * t].iter().any(|target| *target != IGNORED);
            // Losses are negative log-probabilities.
            let gain = |row: usize| reference[row] - policy[row];
            counts.then(|| beta * (gain(2 * i) - gain(2 * i + 1)))
        };
        Self { margins: (0..policy.len() / 2).map(margin).collect(), beta }
    }

    /// -ln σ(x) = ln(1 + e^-x), written so that nothing overflows.
    fn loss(&self) -> LossSum {
        let margins = self.margins.iter().flatten();
        LossSum {
            nats: margins.clone().map(|x| (-x).max(0.0) + (-x.abs()).exp().ln_1p()).sum(),
            n_tokens: margins.clone().count(),
            margin: margins.sum(),
        }
    }

    /// Of every token: by how much the sum of losses grows with its own.
    fn factors(&self, t: usize) -> Vec<f32> {
        let pair = |margin: &Option<f64>| {
            let factor = margin.map_or(0.0, |x| self.beta / (1.0 + x.exp())) as f32;
            [factor, -factor]
        };
        let rows = self.margins.iter().flat_map(pair);
        rows.flat_map(|factor| std::iter::repeat_n(factor, t)).collect()
    }
}

/// The sum of the losses of every row.
fn row_losses(
    model: &mut TrainModel,
    pool: &Pool,
    (params, keeper): (Params, &mut dyn Keeper),
    batch: MicroBatch,
) -> Vec<f64> {
    let mut pass = model.pass(pool, params, batch, keeper);
    pass.forward();
    pass.token_losses(Sum::Plain);
    let rows = pass.scratch.losses_n.chunks_exact(pass.shape.t);
    rows.map(|row| row.iter().map(|x| f64::from(*x)).sum()).collect()
}
