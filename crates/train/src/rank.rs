//! One rank of a run: the step loop. N ranks and one rank are the same code; collectives over one rank are no-ops.

mod rounds;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use comm::{Comm, Record, tree};
use data::{Batches, Mixture, NO_TARGET};
use model::{LossSum, Objective, TrainModel, Trainable};
use tensor::{Buf, Pool};

use crate::guard::Wrong;
use crate::loader::{Loader, Order, Rows};
use crate::optimizer::{Optimizer, Rate};
use crate::state::{Snapshot, State};
use crate::{BadBatch, Error, EvalPart, Event, Plan, Ranks, Result, Step};
pub(crate) use rounds::Rounds;

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
    /// Where workers train by themselves and meet now and then (DiLoCo).
    pub(crate) rounds: Option<Rounds>,
    pub(crate) optimizer: Optimizer,
    /// Gradient of the sum of the step's token losses.
    pub(crate) grads: Buf<f32>,
    /// One buffer a level of the gradient tree.
    pub(crate) spare: Vec<Vec<f32>>,
    /// Partial sums of the gradient's norm.
    pub(crate) squares: Vec<f64>,
    pub(crate) seconds: &'a (dyn Fn() -> f64 + Sync),
    /// Bytes sent to other ranks that a step has told of.
    pub(crate) bytes_told: u64,
    /// What this rank is doing, for those who ask.
    pub(crate) record: Record,
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
    /// Tells of a checkpoint that has been written meanwhile; whether none is being written now.
    fn can_save(&mut self) -> bool;
    /// Begins a checkpoint beside the next steps.
    fn begin_save(&mut self, pool: &Pool, state: &State);
    /// Prepares one whose vectors the next update copies.
    fn prepare_save(&mut self, state: &State);
    /// Where the vectors of a prepared checkpoint are to be copied before they change.
    fn due_snapshot(&mut self) -> Option<&mut Snapshot>;
    /// They are copied.
    fn begin_prepared(&mut self);
    /// Returns once the checkpoint is there or has failed, and whether it is there; why not has been told as an event.
    fn save(&mut self, pool: &Pool, state: &State) -> bool;
    fn sample(&mut self, pool: &Pool, trainable: &Trainable, state: &State) -> Result<()>;
    /// Asks the plan's tasks.
    fn ask(&mut self, pool: &Pool, trainable: &Trainable, state: &State);
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
    /// Runs steps until the plan is done or `stop` is set on any rank; returns whether it is done.
    /// `lead` is `Some` on rank 0 and `None` elsewhere.
    pub(crate) fn run(&mut self, mut lead: Option<&mut dyn Lead>, stop: &AtomicBool) -> Result<bool> {
        if let Some(rounds) = self.rounds.take() {
            return self.run_rounds(rounds, lead, stop);
        }
        let loader = Loader::start(self.mixture.clone(), self.order());
        if self.state.step == 0 {
            self.look(&mut lead, &|_| true)?;
        }
        let (mut is_save_due, first) = (false, self.state.step);
        while self.state.step < self.plan.steps {
            let can_save = lead.as_mut().is_some_and(|lead| lead.can_save());
            let wants = [stop.load(Ordering::Relaxed), is_save_due && can_save];
            // What one rank wants all do, before the same step.
            let [must_stop, must_save] = self.any(wants)?;
            if must_stop {
                if let Some(step) = self.save(&mut lead)?
                    && let Some(lead) = &mut lead
                {
                    lead.event(Event::Interrupted { step });
                }
                return Ok(false);
            }
            if must_save {
                is_save_due = false;
                let whole = self.whole_state()?;
                if let Some(lead) = &mut lead {
                    match &whole {
                        Some(whole) => lead.begin_save(&self.pool, whole),
                        None => lead.prepare_save(&self.state),
                    }
                }
            }
            let event = self.step(&loader, &mut lead)?;
            if let Some(lead) = &mut lead {
                lead.event(event);
            }
            let (step, is_done) = (self.state.step, self.state.step == self.plan.steps);
            self.look(&mut lead, &|every| is_done || step.is_multiple_of(every))?;
            is_save_due |= self.state.step.is_multiple_of(self.plan.checkpoint.every_steps);
        }
        if self.state.step > first {
            self.save(&mut lead)?;
        }
        Ok(true)
    }

    /// Of two things whether any rank says so.
    fn any(&self, wants: [bool; 2]) -> Result<[bool; 2]> {
        let all = self.comm.all_gather(&wants.map(|want| f64::from(u8::from(want))))?;
        Ok([0, 1].map(|at| all.iter().skip(at).step_by(2).any(|want| *want != 0.0)))
    }

    /// Writes a checkpoint and waits for it. Its step, where this rank has written it.
    fn save(&mut self, lead: &mut Option<&mut dyn Lead>) -> Result<Option<u64>> {
        self.record.work(self.state.step, "saving");
        let whole = self.whole_state()?;
        let Some(lead) = lead else { return Ok(None) };
        let is_saved = lead.save(&self.pool, whole.as_ref().unwrap_or(&self.state));
        Ok(is_saved.then_some(self.state.step))
    }

    /// On rank 0 the state with what the others own of it; `None` where it is whole as it is, and on other ranks.
    fn whole_state(&self) -> Result<Option<State>> {
        let (rank, n_ranks, n) = (self.comm.rank(), self.comm.n_ranks(), self.state.params.len());
        if !self.is_divided() {
            return Ok(None);
        }
        if rank > 0 {
            self.comm.send(0, &self.state.adam_m)?;
            self.comm.send(0, &self.state.adam_v)?;
            return Ok(None);
        }
        let mut whole =
            State { owned: 0..n, adam_m: Buf::zeroed(n), adam_v: Buf::zeroed(n), ..self.state.clone() };
        whole.adam_m[self.state.owned.clone()].copy_from_slice(&self.state.adam_m);
        whole.adam_v[self.state.owned.clone()].copy_from_slice(&self.state.adam_v);
        for other in 1..n_ranks {
            let shard = tree::shard(n, other, n_ranks);
            self.comm.receive(other, &mut whole.adam_m[shard.clone()])?;
            self.comm.receive(other, &mut whole.adam_v[shard])?;
        }
        Ok(Some(whole))
    }

    /// The optimizer's state is divided among the ranks (ZeRO 1).
    fn is_divided(&self) -> bool {
        self.state.owned.len() < self.state.params.len()
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

    /// Evaluates, samples and asks, each where what happens every so many steps is due.
    fn look(&mut self, lead: &mut Option<&mut dyn Lead>, is_due: &dyn Fn(u64) -> bool) -> Result<()> {
        let step = self.state.step;
        if is_due(self.plan.evaluate.every_steps)
            && let Some(event) = self.evaluate()?
            && let Some(lead) = lead
        {
            lead.event(event);
        }
        if let Some(lead) = lead
            && is_due(self.plan.sample.every_steps)
        {
            self.record.work(step, "sampling");
            lead.sample(&self.pool, &self.trainable, &self.state)?;
        }
        let tasks = self.plan.tasks.as_ref();
        if let Some(lead) = lead
            && tasks.is_some_and(|tasks| is_due(tasks.every_steps))
        {
            self.record.work(step, "asking tasks");
            lead.ask(&self.pool, &self.trainable, &self.state);
        }
        Ok(())
    }

    /// One optimizer step over the micro-batches of all ranks.
    fn step(&mut self, loader: &Loader, lead: &mut Option<&mut dyn Lead>) -> Result<Event> {
        let start = (self.seconds)();
        let plan = self.plan;
        self.record.work(self.state.step, "gradients");
        let mine = tree::share(plan.micro_batches, self.comm.rank(), self.comm.n_ranks());
        let (mut sums, data_seconds) = self.gradients(loader, mine)?;
        let computed = (self.seconds)();
        let own_squares = self.own_squares();
        self.record.work(self.state.step, "sums of gradients");
        let squares = self.sum_gradients()?;
        let exchanged = (self.seconds)() - computed;
        let sent = self.comm.bytes_sent() - self.bytes_told;
        self.bytes_told += sent;
        let times = [computed - start, exchanged, sent as f64, own_squares];
        sums.0.extend(times);
        let (sums, times) = self.gather_sums(sums)?;
        let n_counted = sums.n_counted();
        let loss = sums.nats() / n_counted;
        let grad_norm = squares.sqrt() / n_counted;
        // From numbers that all ranks have alike, so that all decide alike.
        let wrong = self.state.health.judge(loss, grad_norm, plan.guard);
        if let Some(wrong) = wrong {
            // There may be no update for long.
            if let Some(snapshot) = lead.as_mut().and_then(|lead| lead.due_snapshot()) {
                self.state.copy_to(&self.pool, snapshot, 0..self.state.params.len());
            }
            begin_prepared(lead);
            // Rows are named alike on any number of ranks.
            let micro_batch = sums.worst();
            let rank = wrong_rank(&times, micro_batch / (plan.micro_batches / times.len()));
            return self.skip(wrong, [loss, grad_norm], (self.bad_batch(micro_batch), rank));
        }
        let rate = self.rate(grad_norm, n_counted);
        let before = lead.as_mut().and_then(|lead| lead.due_snapshot());
        self.optimizer.update(&self.pool, &mut self.state, (&self.grads, rate), before);
        begin_prepared(lead);
        if self.is_divided() {
            self.comm.all_gather_shards(&mut self.state.params)?;
        }
        self.finish_step((self.seconds)() - start);
        let n_tokens = plan.tokens_per_step() as f64;
        let seconds = (self.seconds)() - start;
        Ok(Event::Step(Step {
            step: self.state.step,
            loss,
            lr: plan.schedule.lr_peak * rate.lr_share as f32,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: n_tokens / seconds.max(1e-9),
            data_seconds,
            elapsed_seconds: self.state.elapsed_seconds,
            margin: plan.objective.is_of_pairs().then(|| sums.margin() / n_counted),
            ranks: (times.len() > 1).then(|| Ranks::of(&times)),
        }))
    }

    /// What the update of this step is multiplied by.
    fn rate(&self, grad_norm: f64, n_counted: f64) -> Rate {
        let lr_share = self.plan.schedule.share(self.state.step, self.plan.steps);
        let clip = (f64::from(self.plan.clip_norm) / grad_norm).min(1.0);
        Rate { lr_share, grad_scale: (clip / n_counted) as f32 }
    }

    /// The squared norm of this rank's own gradient, while there is one: what is not a number is then known to be its. One
    /// pass over memory, where the sums over ranks take several.
    fn own_squares(&mut self) -> f64 {
        match self.comm.n_ranks() {
            1 => 0.0,
            _ => tensor::adamw::sum_squares(&self.pool, &self.grads, &mut self.squares),
        }
    }

    /// Sums the gradients over ranks, as far as this one needs them; returns the square of the norm of all.
    fn sum_gradients(&mut self) -> Result<f64> {
        if !self.is_divided() {
            self.comm.all_reduce_tree(&mut self.grads)?;
            return Ok(tensor::adamw::sum_squares(&self.pool, &self.grads, &mut self.squares));
        }
        self.comm.reduce_scatter_tree(&mut self.grads)?;
        let own = &self.grads[self.state.owned.clone()];
        tensor::adamw::sum_squares(&self.pool, own, &mut self.squares);
        // Shards are whole parts of that sum: the same numbers in the same order as on one rank.
        Ok(self.comm.all_gather(&self.squares)?.iter().sum())
    }

    /// The sums of all micro-batches, and the last four numbers of every rank, see [`Ranks`].
    fn gather_sums(&self, own: Sums) -> Result<(Sums, Vec<[f64; 4]>)> {
        let all = self.comm.all_gather(&own.0)?;
        let (mut sums, mut times) = (Sums::default(), Vec::new());
        for rank in all.chunks(own.0.len()) {
            if let Some((numbers, last)) = rank.split_last_chunk::<4>() {
                sums.0.extend(numbers);
                times.push(*last);
            }
        }
        Ok((sums, times))
    }

    fn finish_step(&mut self, seconds: f64) {
        self.state.step += 1;
        self.state.tokens += self.plan.tokens_per_step() as u64;
        self.state.elapsed_seconds += seconds;
    }

    /// Goes on with the next rows; ends the run when that has happened too often in a row.
    fn skip(
        &mut self,
        wrong: Wrong,
        [loss, grad_norm]: [f64; 2],
        (bad, rank): (BadBatch, Option<usize>),
    ) -> Result<Event> {
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
            rank,
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

    /// Sums the gradients of these micro-batches in tree order. Returns what each micro-batch lost, and the seconds
    /// waited for data.
    fn gradients(&mut self, loader: &Loader, mine: Range<usize>) -> Result<(Sums, f64)> {
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
        self.record.work(self.state.step, "evaluation");
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

/// Of several ranks the one whose gradient is not a number, or else the one that computed the worst micro-batch.
fn wrong_rank(times: &[[f64; 4]], of_worst: usize) -> Option<usize> {
    let found = times.iter().position(|rank| !rank[3].is_finite());
    (times.len() > 1).then(|| found.unwrap_or(of_worst))
}

fn begin_prepared(lead: &mut Option<&mut dyn Lead>) {
    if let Some(lead) = lead {
        lead.begin_prepared();
    }
}

/// A rank's share of `n` things, in order.
fn share(n: u64, rank: usize, n_ranks: usize) -> Range<u64> {
    let (rank, n_ranks) = (rank as u64, n_ranks as u64);
    n * rank / n_ranks..n * (rank + 1) / n_ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_whose_gradient_is_no_number_is_found() {
        let [good, bad] = [1.5, f64::NAN].map(|squares| [0.0, 0.0, 0.0, squares]);
        assert_eq!(wrong_rank(&[good, good, good], 1), Some(1), "all are numbers: who lost most");
        assert_eq!(wrong_rank(&[good, good, bad], 1), Some(2));
        assert_eq!(wrong_rank(&[bad], 0), None, "there is only one");
    }
}
