//! One rank of a run: the step loop. N ranks and one rank are the same code; collectives over one rank are no-ops.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use comm::{Comm, tree};
use data::{Batches, NO_TARGET, Row};
use model::{LossSum, MicroBatch, Objective, TrainModel, Trainable};
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
        let (sums, data_seconds) = self.gradients()?;
        self.comm.all_reduce_tree(&mut self.grads)?;
        let sums = Sums(self.comm.all_gather(&sums.0)?);
        if let Some(micro_batch) = sums.nats().position(|n| !n.is_finite()) {
            let first = self.first_row(micro_batch);
            let rows = first..first + plan.rows as u64;
            return Err(Error::NotANumber { step: self.state.step + 1, micro_batch, rows });
        }
        let n_counted = sums.n_counted();
        let squares = tensor::adamw::sum_squares(&self.pool, &self.grads, &mut self.squares);
        let grad_norm = squares.sqrt() / n_counted;
        let lr = plan.schedule.lr(self.state.step, plan.steps);
        let clip = (f64::from(plan.clip_norm) / grad_norm).min(1.0);
        let rate = Rate { lr, grad_scale: (clip / n_counted) as f32 };
        self.state.update(&self.pool, &self.grads, &self.decayed, plan.adamw, rate);
        let seconds = (self.seconds)() - start;
        let n_tokens = plan.tokens_per_step();
        self.state.tokens += n_tokens as u64;
        self.state.elapsed_seconds += seconds;
        Ok(Step {
            step: self.state.step,
            loss: sums.nats().sum::<f64>() / n_counted,
            lr,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: n_tokens as f64 / seconds.max(1e-9),
            data_seconds,
            elapsed_seconds: self.state.elapsed_seconds,
            margin: plan.objective.is_of_pairs().then(|| sums.margin() / n_counted),
        })
    }

    /// Sums the gradients of this rank's micro-batches in tree order. Returns what each micro-batch lost, and the seconds
    /// spent on data.
    fn gradients(&mut self) -> Result<(Sums, f64)> {
        let mine = tree::share(self.plan.micro_batches, self.comm.rank(), self.comm.n_ranks());
        let mut sums = Sums::default();
        let mut data_seconds = 0.0;
        let rows = self.plan.rows as u64;
        let first_row = self.first_row(0);
        let Rank { plan, pool, model, train, state, grads, spare, seconds, .. } = self;
        let mut leaf = |micro_batch: usize, dparams: &mut [f32]| -> Result<()> {
            let start = seconds();
            let first = first_row + micro_batch as u64 * rows;
            let rows = Rows::read(train, first..first + rows)?;
            data_seconds += seconds() - start;
            let of = (rows.batch(), plan.objective);
            sums.push(model.loss_and_grads(pool, &state.params, of, dparams));
            Ok(())
        };
        tree::reduce(mine, grads, spare, &mut leaf)?;
        Ok((sums, data_seconds))
    }

    /// Index of the first row of a micro-batch of the current step in the data's order.
    fn first_row(&self, micro_batch: usize) -> u64 {
        let (rows, micro_batches) = (self.plan.rows as u64, self.plan.micro_batches as u64);
        (self.state.step * micro_batches + micro_batch as u64) * rows
    }

    /// The mean of the objective, and bits a byte, over the first validation rows, shared among ranks, summed in row order.
    fn evaluate(&mut self) -> Result<(f64, f64)> {
        let n_rows = (self.plan.evaluate.rows_max as u64).min(self.validation.n_rows());
        let rows = self.plan.rows as u64;
        let n_batches = n_rows.div_ceil(rows);
        let (rank, n_ranks) = (self.comm.rank() as u64, self.comm.n_ranks() as u64);
        let mut sums = Vec::new();
        for batch in n_batches * rank / n_ranks..n_batches * (rank + 1) / n_ranks {
            let present = batch * rows..((batch + 1) * rows).min(n_rows);
            let mut rows = Rows::read(&self.validation, present)?;
            rows.pad(self.plan.rows * self.plan.context);
            let mut loss =
                |objective| self.model.loss(&self.pool, &self.state.params, (rows.batch(), objective));
            let tokens = loss(Objective::CrossEntropy);
            let sum = if self.plan.objective.is_of_pairs() { loss(self.plan.objective) } else { tokens };
            let real = rows.targets_bt.iter().filter(|t| **t != NO_TARGET);
            let bytes: u64 = real.map(|t| u64::from(self.token_bytes[*t as usize])).sum();
            sums.extend([sum.nats, sum.n_tokens as f64, tokens.nats, bytes as f64]);
        }
        let sums = self.comm.all_gather(&sums)?;
        let total = |at: usize| sums.iter().skip(at).step_by(4).sum::<f64>();
        Ok((total(0) / total(1), total(2) / std::f64::consts::LN_2 / total(3)))
    }
}

/// What micro-batches lost, three numbers each, in their order: nats, what counts, margins.
#[derive(Default)]
struct Sums(Vec<f64>);

impl Sums {
    fn push(&mut self, loss: LossSum) {
        self.0.extend([loss.nats, loss.n_tokens as f64, loss.margin]);
    }

    fn nats(&self) -> impl Iterator<Item = f64> {
        self.0.iter().step_by(3).copied()
    }

    /// At least 1: a step in which nothing counts changes nothing.
    fn n_counted(&self) -> f64 {
        self.0.iter().skip(1).step_by(3).sum::<f64>().max(1.0)
    }

    fn margin(&self) -> f64 {
        self.0.iter().skip(2).step_by(3).sum()
    }
}

/// Rows of the data's order, one after the other.
#[derive(Default)]
struct Rows {
    tokens_bt: Vec<u32>,
    targets_bt: Vec<u32>,
    starts_bt: Vec<u32>,
}

impl Rows {
    fn read(batches: &Batches, range: Range<u64>) -> Result<Rows> {
        let mut rows = Rows::default();
        for index in range {
            let Row { tokens, targets, starts } = batches.row(index)?;
            rows.tokens_bt.extend(tokens);
            rows.targets_bt.extend(targets);
            rows.starts_bt.extend(starts);
        }
        Ok(rows)
    }

    /// Fills up with rows of nothing that counts.
    fn pad(&mut self, n_tokens: usize) {
        self.tokens_bt.resize(n_tokens, 0);
        self.targets_bt.resize(n_tokens, NO_TARGET);
        self.starts_bt.resize(n_tokens, 0);
    }

    fn batch(&self) -> MicroBatch<'_> {
        let starts_bt = Some(&self.starts_bt[..]);
        MicroBatch { tokens_bt: &self.tokens_bt, targets_bt: &self.targets_bt, starts_bt }
    }
}
