//! One rank of a run: the step loop. N ranks and one rank are the same code; collectives over one rank are no-ops.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use comm::{Comm, tree};
use data::{Batches, Mixture, NO_TARGET};
use model::{LossSum, Objective, TrainModel, Trainable};
use tensor::{Buf, Pool};

use crate::guard::Wrong;
use crate::loader::{Loader, Order, Rows};
use crate::optimizer::{Optimizer, Rate};
use crate::state::{Snapshot, State};
use crate::{BadBatch, Error, EvalPart, Event, Plan, Result, Step};

/// What a rank needs beyond the plan.
pub(crate) struct Rank<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) comm: Box<dyn Comm>,
    pub(crate) pool: Pool,
    pub(crate) model: TrainModel,
    pub(crate) trainable: Trainable,
    pub(crate) mixture: Mixture,
    /// Of every dataset that holds something out.
    pub(crate) validation: Arc<[Validation]>,
    /// Bytes of text that each token id stands for.
    pub(crate) token_bytes: Arc<[u32]>,
    pub(crate) state: State,
    pub(crate) optimizer: Optimizer,
    /// Gradient of the sum of the step's token losses.
    pub(crate) grads: Buf<f32>,
    /// One buffer a level of the gradient tree.
    pub(crate) spare: Vec<Vec<f32>>,
    /// Partial sums of the gradient's norm.
    pub(crate) squares: Vec<f64>,
    pub(crate) seconds: &'a (dyn Fn() -> f64 + Sync),
}

/// A dataset's held-out rows, and its weight in the mean over datasets.
pub(crate) struct Validation {
    pub(crate) dataset: String,
    pub(crate) weight: f64,
    pub(crate) batches: Batches,
}

/// The part of the work that only rank 0 does: telling, saving, sampling.
pub(crate) trait Lead {
    fn event(&mut self, event: Event);
    /// Tells of a checkpoint that has been written meanwhile, and prepares one to be written beside the next steps if one
    /// is due and none is being written. Returns whether one is still due.
    fn go_on_saving(&mut self, is_due: bool, state: &State) -> bool;
    /// Where the vectors of a prepared checkpoint are to be copied before they change.
    fn due_snapshot(&mut self) -> Option<&mut Snapshot>;
    /// They are copied.
    fn begin_saving(&mut self);
    /// Returns once the checkpoint is there or has failed, and whether it is there; why not has been told as an event.
    fn save(&mut self, pool: &Pool, state: &State) -> bool;
    fn sample(&mut self, pool: &Pool, trainable: &Trainable, state: &State) -> Result<()>;
    /// Asks the plan's tasks.
    fn ask(&mut self, trainable: &Trainable, state: &State);
}

/// What micro-batches lost, three numbers each, in their order: nats, what counts (tokens with a target, or pairs),
/// margins of pairs.
#[derive(Default)]
struct Sums(Vec<f64>);

impl Sums {
    fn push(&mut self, loss: LossSum) {
        self.0.extend([loss.nats, loss.n_tokens as f64, loss.margin]);
    }

    fn nats(&self) -> f64 {
        self.0.iter().step_by(3).sum()
    }

    /// At least 1: a step in which nothing counts changes nothing.
    fn n_counted(&self) -> f64 {
        self.0.iter().skip(1).step_by(3).sum::<f64>().max(1.0)
    }

    fn margin(&self) -> f64 {
        self.0.iter().skip(2).step_by(3).sum()
    }

    /// The micro-batch that lost most of what counts in it, or is no number.
    fn worst(&self) -> usize {
        let loss = |nats: f64, n: f64| if nats.is_finite() { nats / n.max(1.0) } else { f64::INFINITY };
        let losses = self.0.as_chunks::<3>().0.iter().map(|[nats, n, _]| loss(*nats, *n)).enumerate();
        losses.max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i)
    }
}

impl Rank<'_> {
    /// Runs steps until the plan is done or `stop` is set; returns whether it is done.
    /// `lead` is `Some` on rank 0 and `None` elsewhere.
    pub(crate) fn run(&mut self, mut lead: Option<&mut dyn Lead>, stop: &AtomicBool) -> Result<bool> {
        let loader = Loader::start(self.mixture.clone(), self.order());
        if self.state.step == 0 {
            self.look(&mut lead, true)?;
        }
        let (mut is_save_due, first) = (false, self.state.step);
        while self.state.step < self.plan.steps {
            // Rank 0 decides for all, so that every rank stops before the same step.
            let wants_stop = self.comm.rank() == 0 && stop.load(Ordering::Relaxed);
            if self.comm.all_gather(&[f64::from(u8::from(wants_stop))])?[0] != 0.0 {
                if let Some(lead) = &mut lead
                    && lead.save(&self.pool, &self.state)
                {
                    lead.event(Event::Interrupted { step: self.state.step });
                }
                return Ok(false);
            }
            let event = self.step(&loader, &mut lead)?;
            if let Some(lead) = &mut lead {
                lead.event(event);
            }
            self.look(&mut lead, self.state.step == self.plan.steps)?;
            if let Some(lead) = &mut lead
                && self.state.step < self.plan.steps
            {
                is_save_due |= self.state.step.is_multiple_of(self.plan.checkpoint.every_steps);
                is_save_due = lead.go_on_saving(is_save_due, &self.state);
            }
        }
        if let Some(lead) = &mut lead
            && self.state.step > first
        {
            lead.save(&self.pool, &self.state);
        }
        Ok(true)
    }

    /// The rows of the steps that are left.
    fn order(&self) -> Order {
        Order {
            steps: self.state.step..self.plan.steps,
            micro_batches: self.plan.micro_batches as u64,
            share: tree::share(self.plan.micro_batches, self.comm.rank(), self.comm.n_ranks()),
            rows: self.plan.rows as u64,
        }
    }

    /// Evaluates, samples and asks where the plan says so, or where it must.
    fn look(&mut self, lead: &mut Option<&mut dyn Lead>, must: bool) -> Result<()> {
        let step = self.state.step;
        if (must || step.is_multiple_of(self.plan.evaluate.every_steps))
            && let Some(event) = self.evaluate()?
            && let Some(lead) = lead
        {
            lead.event(event);
        }
        if let Some(lead) = lead
            && (must || step.is_multiple_of(self.plan.sample.every_steps))
        {
            lead.sample(&self.pool, &self.trainable, &self.state)?;
        }
        let tasks = self.plan.tasks.as_ref();
        if let Some(lead) = lead
            && tasks.is_some_and(|tasks| must || step.is_multiple_of(tasks.every_steps))
        {
            lead.ask(&self.trainable, &self.state);
        }
        Ok(())
    }

    /// One optimizer step over the micro-batches of all ranks.
    fn step(&mut self, loader: &Loader, lead: &mut Option<&mut dyn Lead>) -> Result<Event> {
        let start = (self.seconds)();
        let plan = self.plan;
        let (sums, data_seconds) = self.gradients(loader)?;
        self.comm.all_reduce_tree(&mut self.grads)?;
        let sums = Sums(self.comm.all_gather(&sums.0)?);
        let n_counted = sums.n_counted();
        let loss = sums.nats() / n_counted;
        let squares = tensor::adamw::sum_squares(&self.pool, &self.grads, &mut self.squares);
        let grad_norm = squares.sqrt() / n_counted;
        // From numbers that all ranks have alike, so that all decide alike.
        let wrong = self.state.health.judge(loss, grad_norm, plan.guard);
        let lr_share = plan.schedule.share(self.state.step, plan.steps);
        if let Some(wrong) = wrong {
            let bad = self.bad_batch(sums.worst());
            // There may be no update for long.
            if let Some(snapshot) = lead.as_mut().and_then(|lead| lead.due_snapshot()) {
                self.state.copy_to(&self.pool, snapshot, 0..self.state.params.len());
            }
            begin_saving(lead);
            return self.skip(wrong, [loss, grad_norm], bad);
        }
        let clip = (f64::from(plan.clip_norm) / grad_norm).min(1.0);
        let rate = Rate { lr_share, grad_scale: (clip / n_counted) as f32 };
        let before = lead.as_mut().and_then(|lead| lead.due_snapshot());
        self.optimizer.update(&self.pool, &mut self.state, (&self.grads, rate), before);
        begin_saving(lead);
        self.finish_step((self.seconds)() - start);
        let n_tokens = plan.tokens_per_step() as f64;
        let seconds = (self.seconds)() - start;
        Ok(Event::Step(Step {
            step: self.state.step,
            loss,
            lr: plan.schedule.lr_peak * lr_share as f32,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: n_tokens / seconds.max(1e-9),
            data_seconds,
            elapsed_seconds: self.state.elapsed_seconds,
            margin: plan.objective.is_of_pairs().then(|| sums.margin() / n_counted),
        }))
    }

    fn finish_step(&mut self, seconds: f64) {
        self.state.step += 1;
        self.state.tokens += self.plan.tokens_per_step() as u64;
        self.state.elapsed_seconds += seconds;
    }

    /// Goes on with the next rows; ends the run when that has happened too often in a row.
    fn skip(&mut self, wrong: Wrong, [loss, grad_norm]: [f64; 2], bad: BadBatch) -> Result<Event> {
        self.finish_step(0.0);
        let (step, n) = (self.state.step, self.state.health.n_skipped_in_a_row);
        if n > self.plan.guard.skips_max {
            return Err(Error::StepsWentWrong { n, step, what: wrong.text(), bad });
        }
        let number = |x: f64| x.is_finite().then_some(x);
        Ok(Event::Skipped {
            step,
            wrong,
            loss: number(loss),
            grad_norm: number(grad_norm),
            bad,
            n_skipped: self.state.health.n_skipped,
        })
    }

    /// Where the rows of a micro-batch are from.
    fn bad_batch(&self, micro_batch: usize) -> BadBatch {
        let rows = self.order().rows_of(self.state.step, micro_batch);
        let place = |index: u64| {
            let (part, row) = self.mixture.place(index);
            let dataset = self.plan.data.iter().filter(|part| part.weight > 0.0).nth(part);
            (dataset.map_or(String::new(), |part| part.dataset.clone()), row)
        };
        BadBatch { micro_batch, from: rows.clone().map(place).collect(), first_row: rows.start }
    }

    /// Sums the gradients of this rank's micro-batches in tree order. Returns what each micro-batch lost, and the seconds
    /// waited for data.
    fn gradients(&mut self, loader: &Loader) -> Result<(Sums, f64)> {
        let mine = tree::share(self.plan.micro_batches, self.comm.rank(), self.comm.n_ranks());
        let (mut sums, mut data_seconds) = (Sums::default(), 0.0);
        let Rank { plan, pool, model, state, grads, spare, seconds, .. } = self;
        let mut leaf = |_: usize, dparams: &mut [f32]| -> Result<()> {
            let start = seconds();
            let rows = loader.next()?;
            data_seconds += seconds() - start;
            sums.push(model.loss_and_grads(pool, &state.params, (rows.batch(), plan.objective), dparams));
            Ok(())
        };
        tree::reduce(mine, grads, spare, &mut leaf)?;
        Ok((sums, data_seconds))
    }

    /// The mean of the objective, and bits a byte, over the first validation rows of every dataset, shared among ranks, summed in
    /// row order. `None` where nothing is held out.
    fn evaluate(&mut self) -> Result<Option<Event>> {
        let validation = self.validation.clone();
        let mut parts = Vec::new();
        for part in validation.iter() {
            let sums = self.held_out_sums(&part.batches)?;
            let sums = self.comm.all_gather(&sums)?;
            let total = |at: usize| sums.iter().skip(at).step_by(4).sum::<f64>();
            parts.push(EvalPart {
                dataset: part.dataset.clone(),
                nats_per_token: total(0) / total(1).max(1.0),
                bits_per_byte: total(2) / std::f64::consts::LN_2 / total(3).max(1.0),
            });
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let weights: f64 = validation.iter().map(|part| part.weight).sum();
        let mean = |of: &dyn Fn(&EvalPart) -> f64| -> f64 {
            parts.iter().zip(validation.iter()).map(|(part, v)| of(part) * v.weight / weights).sum()
        };
        let (nats_per_token, bits_per_byte) =
            (mean(&|part| part.nats_per_token), mean(&|part| part.bits_per_byte));
        if parts.len() == 1 {
            parts.clear();
        }
        Ok(Some(Event::Eval { step: self.state.step, nats_per_token, bits_per_byte, parts }))
    }

    /// Of each of this rank's batches of held-out rows: the objective's sum, what counts in it, nats of tokens, bytes.
    fn held_out_sums(&mut self, held_out: &Batches) -> Result<Vec<f64>> {
        let n_rows = (self.plan.evaluate.rows_max as u64).min(held_out.n_rows());
        // A pair is judged whole.
        let n_rows = if held_out.is_pairs() { n_rows.next_multiple_of(2) } else { n_rows };
        let rows = self.plan.rows as u64;
        let mut sums = Vec::new();
        for batch in share(n_rows.div_ceil(rows), self.comm.rank(), self.comm.n_ranks()) {
            let mut batch_rows = Rows::default();
            for index in batch * rows..((batch + 1) * rows).min(n_rows) {
                batch_rows.push(held_out.row(index)?);
            }
            batch_rows.pad(self.plan.rows * self.plan.context);
            let mut loss =
                |objective| self.model.loss(&self.pool, &self.state.params, (batch_rows.batch(), objective));
            let tokens = loss(Objective::CrossEntropy);
            let sum = if self.plan.objective.is_of_pairs() { loss(self.plan.objective) } else { tokens };
            let real = batch_rows.targets_bt.iter().filter(|target| **target != NO_TARGET);
            let bytes: u64 = real.map(|target| u64::from(self.token_bytes[*target as usize])).sum();
            sums.extend([sum.nats, sum.n_tokens as f64, tokens.nats, bytes as f64]);
        }
        Ok(sums)
    }
}

fn begin_saving(lead: &mut Option<&mut dyn Lead>) {
    if let Some(lead) = lead {
        lead.begin_saving();
    }
}

/// A rank's share of `n` things, in order.
fn share(n: u64, rank: usize, n_ranks: usize) -> Range<u64> {
    let (rank, n_ranks) = (rank as u64, n_ranks as u64);
    n * rank / n_ranks..n * (rank + 1) / n_ranks
}
