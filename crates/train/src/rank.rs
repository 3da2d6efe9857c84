//! One rank of a run: the step loop. N ranks and one rank are the same code; collectives over one rank are no-ops.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use comm::{Comm, tree};
use data::Batches;
use model::{MicroBatch, Objective, TrainModel, Trainable};
use tensor::cross_entropy::IGNORED;
use tensor::{Buf, Pool};

use crate::checkpoint::{Rate, State};
use crate::{Error, Event, Plan, Result, Step};

/// What a rank needs beyond the plan.
pub(crate) struct Rank<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) comm: Box<dyn Comm>,
    pub(crate) pool: Pool,
    pub(crate) model: TrainModel,
    pub(crate) trainable: Trainable,
    pub(crate) train: Batches,
    pub(crate) validation: Batches,
    /// Bytes of text that each token id stands for.
    pub(crate) token_bytes: Arc<[u32]>,
    pub(crate) state: State,
    /// The parameters that have weight decay.
    pub(crate) decayed: Vec<Range<usize>>,
    /// Gradient of the sum of the step's token losses.
    pub(crate) grads: Buf<f32>,
    /// One buffer a level of the gradient tree.
    pub(crate) spare: Vec<Vec<f32>>,
    /// Partial sums of the gradient's norm.
    pub(crate) squares: Vec<f64>,
    pub(crate) seconds: &'a (dyn Fn() -> f64 + Sync),
}

/// The part of the work that only rank 0 does: telling, saving, sampling.
pub(crate) trait Lead {
    fn event(&mut self, event: Event);
    /// Returns whether the checkpoint is there; why not has been told as an event.
    fn save(&mut self, state: &State) -> bool;
    fn sample(&mut self, pool: &Pool, trainable: &Trainable, state: &State) -> Result<()>;
}

impl Rank<'_> {
    /// Runs steps until the plan is done or `stop` is set; returns whether it is done.
    /// `lead` is `Some` on rank 0 and `None` elsewhere.
    pub(crate) fn run(&mut self, mut lead: Option<&mut dyn Lead>, stop: &AtomicBool) -> Result<bool> {
        if self.state.step == 0 {
            self.look(&mut lead, true)?;
        }
        while self.state.step < self.plan.steps {
            // Rank 0 decides for all, so that every rank stops before the same step.
            let wants_stop = self.comm.rank() == 0 && stop.load(Ordering::Relaxed);
            if self.comm.all_gather(&[f64::from(u8::from(wants_stop))])?[0] != 0.0 {
                if let Some(lead) = &mut lead
                    && lead.save(&self.state)
                {
                    lead.event(Event::Interrupted { step: self.state.step });
                }
                return Ok(false);
            }
            let step = self.step()?;
            if let Some(lead) = &mut lead {
                lead.event(Event::Step(step));
            }
            let last = self.state.step == self.plan.steps;
            self.look(&mut lead, last)?;
            if let Some(lead) = &mut lead
                && (last || self.state.step.is_multiple_of(self.plan.checkpoint.every_steps))
            {
                lead.save(&self.state);
            }
        }
        Ok(true)
    }

    /// Evaluates and samples where the plan says so, or where it must.
    fn look(&mut self, lead: &mut Option<&mut dyn Lead>, must: bool) -> Result<()> {
        let step = self.state.step;
        if must || step.is_multiple_of(self.plan.evaluate.every_steps) {
            let (nats_per_token, bits_per_byte) = self.evaluate()?;
            if let Some(lead) = lead {
                lead.event(Event::Eval { step, nats_per_token, bits_per_byte });
            }
        }
        if let Some(lead) = lead
            && (must || step.is_multiple_of(self.plan.sample.every_steps))
        {
            lead.sample(&self.pool, &self.trainable, &self.state)?;
        }
        Ok(())
    }

    /// One optimizer step over the micro-batches of all ranks.
    fn step(&mut self) -> Result<Step> {
        let start = (self.seconds)();
        let plan = self.plan;
        let n_tokens = plan.tokens_per_step() as f64;
        let (nats, data_seconds) = self.gradients()?;
        self.comm.all_reduce_tree(&mut self.grads)?;
        let nats = self.comm.all_gather(&nats)?;
        if let Some(micro_batch) = nats.iter().position(|n| !n.is_finite()) {
            let first = self.first_row(micro_batch);
            let rows = first..first + plan.rows as u64;
            return Err(Error::NotANumber { step: self.state.step + 1, micro_batch, rows });
        }
        let squares = tensor::adamw::sum_squares(&self.pool, &self.grads, &mut self.squares);
        let grad_norm = squares.sqrt() / n_tokens;
        let lr = plan.schedule.lr(self.state.step, plan.steps);
        let clip = (f64::from(plan.clip_norm) / grad_norm).min(1.0);
        let rate = Rate { lr, grad_scale: (clip / n_tokens) as f32 };
        self.state.update(&self.pool, &self.grads, &self.decayed, plan.adamw, rate);
        let seconds = (self.seconds)() - start;
        self.state.tokens += n_tokens as u64;
        self.state.elapsed_seconds += seconds;
        Ok(Step {
            step: self.state.step,
            loss: nats.iter().sum::<f64>() / n_tokens,
            lr,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: n_tokens / seconds.max(1e-9),
            data_seconds,
            elapsed_seconds: self.state.elapsed_seconds,
        })
    }

    /// Sums the gradients of this rank's micro-batches in tree order. Returns the summed loss of each micro-batch and
    /// the seconds spent on data.
    fn gradients(&mut self) -> Result<(Vec<f64>, f64)> {
        let mine = tree::share(self.plan.micro_batches, self.comm.rank(), self.comm.n_ranks());
        let mut nats = Vec::with_capacity(mine.len());
        let mut data_seconds = 0.0;
        let rows = self.plan.rows as u64;
        let first_row = self.first_row(0);
        let Rank { pool, model, train, state, grads, spare, seconds, .. } = self;
        let mut leaf = |micro_batch: usize, dparams: &mut [f32]| -> Result<()> {
            let start = seconds();
            let first = first_row + micro_batch as u64 * rows;
            let (tokens_bt, targets_bt) = windows(train, first..first + rows)?;
            data_seconds += seconds() - start;
            let of = (MicroBatch::plain(&tokens_bt, &targets_bt), Objective::CrossEntropy);
            let sum = model.loss_and_grads(pool, &state.params, of, dparams);
            nats.push(sum.nats);
            Ok(())
        };
        tree::reduce(mine, grads, spare, &mut leaf)?;
        Ok((nats, data_seconds))
    }

    /// Index of the first row of a micro-batch of the current step in the data's order.
    fn first_row(&self, micro_batch: usize) -> u64 {
        let (rows, micro_batches) = (self.plan.rows as u64, self.plan.micro_batches as u64);
        (self.state.step * micro_batches + micro_batch as u64) * rows
    }

    /// Mean nats a token and bits a byte over the first validation rows, shared among ranks, summed in row order.
    fn evaluate(&mut self) -> Result<(f64, f64)> {
        let n_rows = (self.plan.evaluate.rows_max as u64).min(self.validation.n_windows());
        let rows = self.plan.rows as u64;
        let n_batches = n_rows.div_ceil(rows);
        let (rank, n_ranks) = (self.comm.rank() as u64, self.comm.n_ranks() as u64);
        let mut sums = Vec::new();
        for batch in n_batches * rank / n_ranks..n_batches * (rank + 1) / n_ranks {
            let present = batch * rows..((batch + 1) * rows).min(n_rows);
            let (mut tokens_bt, mut targets_bt) = windows(&mut self.validation, present)?;
            let full = self.plan.rows * self.plan.context;
            tokens_bt.resize(full, 0);
            targets_bt.resize(full, IGNORED);
            let of = (MicroBatch::plain(&tokens_bt, &targets_bt), Objective::CrossEntropy);
            let sum = self.model.loss(&self.pool, &self.state.params, of);
            let real = targets_bt.iter().filter(|t| **t != IGNORED);
            let bytes: u64 = real.map(|t| u64::from(self.token_bytes[*t as usize])).sum();
            sums.extend([sum.nats, sum.n_tokens as f64, bytes as f64]);
        }
        let sums = self.comm.all_gather(&sums)?;
        let total = |at: usize| sums.iter().skip(at).step_by(3).sum::<f64>();
        let (nats, n_tokens, bytes) = (total(0), total(1), total(2));
        Ok((nats / n_tokens, nats / std::f64::consts::LN_2 / bytes))
    }
}

/// Rows `range` of the data's order as inputs and the targets one position later, row by row.
fn windows(batches: &mut Batches, range: Range<u64>) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut tokens_bt, mut targets_bt) = (Vec::new(), Vec::new());
    for index in range {
        let window = batches.window(index)?;
        tokens_bt.extend_from_slice(&window[..window.len() - 1]);
        targets_bt.extend_from_slice(&window[1..]);
    }
    Ok((tokens_bt, targets_bt))
}
