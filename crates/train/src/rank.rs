//! One rank of a run: the step loop. N ranks and one rank are the same code; collectives over one rank are no-ops.

mod links;
mod pipe;
mod rounds;
pub(crate) mod team;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use comm::tree::SHARD_ALIGN;
use comm::{Comm, Record};
use data::{Batches, Mixture};
use model::{LossSum, Stripes, TrainModel, Trainable, Weights};
use tensor::Pool;
use tensor::adamw::sum_squares;

use crate::exchange::{Exchange, Fixed, Kind, Memory, Spent};
use crate::guard::Wrong;
use crate::layout::{Layout, Zero};
use crate::loader::{Loader, Order, Rows};
use crate::optimizer::{Optimizer, Rate};
use crate::part::Part;
use crate::pipeline::{Action, in_flight, schedule};
use crate::saver::Saver;
use crate::state::State;
use crate::{BadBatch, Error, Event, Plan, Ranks, Result, Step};
pub(crate) use links::Links;
pub(crate) use pipe::{Pipe, check as check_pipeline};
pub(crate) use rounds::Rounds;
use team::Team;

/// What a rank needs beyond the plan.
pub(crate) struct Rank<'a> {
    pub(crate) plan: &'a Plan,
    /// To those that share a step's micro-batches with this rank.
    pub(crate) comm: Box<dyn Comm>,
    /// To those that compute one model with it, if it has only a part.
    pub(crate) team: Option<Team>,
    /// To those that compute other layers of it, if it has only some.
    pub(crate) pipe: Option<Pipe>,
    pub(crate) pool: Pool,
    pub(crate) model: TrainModel,
    /// Of the whole model.
    pub(crate) trainable: Trainable,
    /// What of it is computed here.
    pub(crate) part: Part,
    /// What every rank stores of the whole's vectors.
    pub(crate) writers: Arc<[Stripes]>,
    pub(crate) mixture: Mixture,
    /// Of every dataset that holds something out.
    pub(crate) validation: Arc<[Validation]>,
    /// Bytes of text that each token id stands for.
    pub(crate) token_bytes: Arc<[u32]>,
    pub(crate) state: State,
    /// Where workers train by themselves and meet now and then (DiLoCo).
    pub(crate) rounds: Option<Rounds>,
    pub(crate) optimizer: Optimizer,
    /// Which part of its part's state is this rank's.
    pub(crate) layout: Layout,
    /// Gradients of the sum of the step's token losses, and what they travel in.
    pub(crate) memory: Memory,
    pub(crate) saver: Saver,
    /// A checkpoint is being written that not all ranks have told of.
    pub(crate) is_saving: bool,
    /// Partial sums of the gradient's norm.
    pub(crate) squares: Vec<f64>,
    pub(crate) seconds: &'a (dyn Fn() -> f64 + Sync),
    /// Bytes sent to other ranks that a step has told of.
    pub(crate) bytes_told: u64,
    pub(crate) links: Links,
    /// What this rank is doing, for those who ask.
    pub(crate) record: Record,
}

/// A dataset's held-out rows, and its weight in the mean over datasets.
pub(crate) struct Validation {
    pub(crate) dataset: String,
    pub(crate) weight: f64,
    pub(crate) batches: Batches,
}

/// The part of the work that only rank 0 does: telling, sampling, asking.
pub(crate) trait Lead {
    fn event(&mut self, event: Event);
    fn sample(&mut self, pool: &Pool, weights: Weights, step: u64) -> Result<()>;
    /// Asks the plan's tasks.
    fn ask(&mut self, pool: &Pool, weights: Weights, step: u64);
}

/// Of a rank in a step: seconds of computing and of waiting for others, bytes sent, the squared norm of its own gradient,
/// seconds in which values travelled.
pub(crate) type Times = [f64; 5];

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
            self.tell_published(&mut lead, false);
            let can_save = !self.is_saving && self.saver.is_idle();
            let wants = [
                stop.load(Ordering::Relaxed),
                lead.is_some() && is_save_due && can_save,
                self.saver.is_writing(),
            ];
            // What one rank wants all do, before the same step.
            let [must_stop, must_save, is_writing] = self.any(wants)?;
            if self.is_saving && !is_writing {
                self.all_told(&mut lead)?;
            }
            if must_stop {
                if let Some(step) = self.save(&mut lead)?
                    && let Some(lead) = &mut lead
                {
                    lead.event(Event::Interrupted { step });
                }
                return Ok(false);
            }
            if must_save {
                (is_save_due, self.is_saving) = (false, true);
                self.saver.prepare(&self.state);
            }
            let event = self.step(&loader)?;
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
        self.memory = Memory::default();
        self.saver.end();
        Ok(true)
    }

    /// Of three things whether any rank says so.
    fn any(&self, wants: [bool; 3]) -> Result<[bool; 3]> {
        let all = self.comm.all_gather(&wants.map(|want| f64::from(u8::from(want))))?;
        let any = |all: Vec<f64>| [0, 1, 2].map(|at| all.iter().skip(at).step_by(3).any(|want| *want != 0.0));
        let wants = any(all);
        self.parts().try_fold(wants, |wants, comm| {
            Ok(any(comm.all_gather(&wants.map(|want| f64::from(u8::from(want))))?))
        })
    }

    /// Writes a checkpoint and waits for it. Its step, where this rank has published it.
    fn save(&mut self, lead: &mut Option<&mut dyn Lead>) -> Result<Option<u64>> {
        self.record.work(self.state.step, "saving");
        let seconds = self.seconds;
        if self.is_saving {
            self.saver.wait(seconds);
            self.all_told(lead)?;
        }
        self.tell_published(lead, true);
        self.saver.begin_at_once(&self.pool, &self.state, seconds);
        self.saver.wait(seconds);
        self.all_told(lead)?;
        let is_there = self.tell_published(lead, true);
        Ok(is_there.then_some(self.state.step))
    }

    /// Every rank tells of its part of a checkpoint; the first begins to publish it.
    fn all_told(&mut self, lead: &mut Option<&mut dyn Lead>) -> Result<()> {
        self.is_saving = false;
        let all = self.gather_told()?;
        if let (Some(event), Some(lead)) = (self.saver.all_told(&all), lead) {
            lead.event(event);
        }
        Ok(())
    }

    /// Tells what became of the checkpoint being published, once that is known; whether it is there. One that cannot be
    /// written (a full disk) is reported; the run goes on and tries again at the next.
    fn tell_published(&mut self, lead: &mut Option<&mut dyn Lead>, wait: bool) -> bool {
        let event = self.saver.published(wait, self.seconds);
        let is_there = matches!(event, Some(Event::Checkpoint { .. }));
        if let (Some(event), Some(lead)) = (event, lead) {
            lead.event(event);
        }
        is_there
    }

    /// The rows of the steps that are left.
    fn order(&self) -> Order {
        Order {
            steps: self.state.step..self.plan.steps,
            micro_batches: self.plan.micro_batches as u64,
            mine: self.layout.micro_batches(self.comm.rank()),
            rows: self.plan.rows as u64,
        }
    }

    /// Evaluates, samples and asks, each where what happens every so many steps is due.
    fn look(&mut self, lead: &mut Option<&mut dyn Lead>, is_due: &dyn Fn(u64) -> bool) -> Result<()> {
        let step = self.state.step;
        if is_due(self.plan.evaluate.every_steps) {
            if let (Some(event), Some(lead)) = (self.evaluate()?, lead.as_mut()) {
                lead.event(event);
            }
            self.tell_links(lead)?;
        }
        if is_due(self.plan.sample.every_steps) {
            self.record.work(step, "sampling");
            if let (Some(weights), Some(lead)) = (self.weights()?, lead.as_mut()) {
                lead.sample(&self.pool, weights, step)?;
            }
        }
        if self.plan.tasks.as_ref().is_some_and(|tasks| is_due(tasks.every_steps)) {
            self.record.work(step, "asking tasks");
            if let (Some(weights), Some(lead)) = (self.weights()?, lead.as_mut()) {
                lead.ask(&self.pool, weights, step);
            }
        }
        Ok(())
    }

    /// One optimizer step over the micro-batches of all ranks.
    fn step(&mut self, loader: &Loader) -> Result<Event> {
        let start = (self.seconds)();
        let plan = self.plan;
        self.record.work(self.state.step, "gradients");
        let (mut sums, data_seconds, spent) = self.gradients(loader, None)?;
        let computed = (self.seconds)() - start - spent.waited;
        let squares = self.squares_of_sums()?;
        let sent = self.comm.bytes_sent() - self.bytes_told;
        self.bytes_told += sent;
        let times: Times = [computed, spent.waited, sent as f64, spent.own_squares, spent.travelled];
        sums.0.extend(times);
        let (sums, times) = self.gather_sums(sums)?;
        let n_counted = sums.n_counted();
        let loss = sums.nats() / n_counted;
        let grad_norm = squares.sqrt() / n_counted;
        // From numbers that all ranks have alike, so that all decide alike.
        let wrong = self.state.health.judge(loss, grad_norm, plan.guard);
        if let Some(wrong) = wrong {
            // There may be no update for long.
            if let Some(snapshot) = self.saver.due() {
                self.state.copy_all_to(&self.pool, snapshot);
            }
            self.saver.begin(self.seconds);
            // Rows are named alike on any number of ranks.
            let micro_batch = sums.worst();
            // What is lost the last stage knows.
            let [_, n_stages] = self.stage();
            let computes = |rank: &usize| self.layout.micro_batches(*rank / n_stages).contains(&micro_batch);
            let last = (0..times.len()).skip(n_stages - 1).step_by(n_stages);
            let rank = wrong_rank(&times, last.into_iter().find(computes).unwrap_or_default());
            return self.skip(wrong, [loss, grad_norm], (self.bad_batch(micro_batch), rank));
        }
        let rate = self.rate(grad_norm, n_counted);
        let grads = &self.memory.sums[0];
        self.optimizer.update(&self.pool, &mut self.state, (grads, rate), self.saver.due());
        self.saver.begin(self.seconds);
        if [Zero::Optimizer, Zero::Gradients].contains(&self.layout.zero) {
            self.comm.all_gather_of(&mut self.state.params, &self.layout.all)?;
        }
        self.renew_head()?;
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

    /// The square of the norm of the gradient, from the sums that each rank has of what it owns, in one order whoever owns
    /// what; what several parts of the model have alike is counted once.
    fn squares_of_sums(&mut self) -> Result<f64> {
        if let Some(squares) = self.squares_of_pipe()? {
            return Ok(squares);
        }
        let (layout, grads) = (&self.layout, &self.memory.sums[0]);
        let mut own = Vec::new();
        for piece in self.part.summed(&layout.owned(layout.rank)) {
            let first = if layout.zero >= Zero::Gradients { layout.own_at(piece.start) } else { piece.start };
            sum_squares(&self.pool, &grads[first..first + piece.len()], &mut self.squares);
            own.append(&mut self.squares);
        }
        let all = if layout.zero > Zero::Nothing { self.comm.all_gather(&own)? } else { own };
        let pieces = (0..layout.n_owners()).flat_map(|rank| self.part.summed(&layout.owned(rank)));
        let starts = pieces.flat_map(|piece| piece.step_by(SHARD_ALIGN));
        let mut squares: Vec<(usize, f64)> = starts.zip(all).collect();
        squares.sort_unstable_by_key(|(start, _)| *start);
        let of_part = squares.iter().map(|(_, sum)| sum).sum();
        self.sum_over_parts(of_part)
    }

    /// The sums of all micro-batches, in their order, and the times of every rank.
    fn gather_sums(&self, own: Sums) -> Result<(Sums, Vec<Times>)> {
        let stages = self.of_stages(self.comm.all_gather(&own.0)?)?;
        let mut sums = Sums(vec![0.0; 3 * self.plan.micro_batches]);
        let mut times = Vec::new();
        for rank in 0..self.comm.n_ranks() {
            for stage in &stages {
                let numbers = &stage[rank * own.0.len()..][..own.0.len()];
                let (lost, of_rank) = numbers.split_at(numbers.len() - size_of::<Times>() / size_of::<f64>());
                // The last stage, which comes last, is the one that knows.
                for (micro_batch, three) in self.layout.micro_batches(rank).into_iter().zip(lost.chunks(3)) {
                    sums.0[3 * micro_batch..][..3].copy_from_slice(three);
                }
                times.extend(Times::try_from(of_rank).ok());
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

    /// The sums of the gradients, as far as this rank needs them, in `memory`. Returns what each of its micro-batches lost,
    /// the seconds waited for data, and what the exchange took. `alone` is the layout of a worker that exchanges nothing.
    fn gradients(&mut self, loader: &Loader, alone: Option<&Layout>) -> Result<(Sums, f64, Spent)> {
        let (mut sums, mut data_seconds) = (Sums::default(), 0.0);
        let stage = self.stage();
        let Rank { plan, pool, model, state, memory, layout, comm, team, pipe, seconds, .. } = self;
        let (team, pipe) = (team.as_ref().map(|team| &*team.comm), pipe.as_ref());
        let layout = alone.unwrap_or(layout);
        memory.reserve(layout);
        let (pool, layout, seconds): (&Pool, &Layout, _) = (pool, layout, *seconds);
        let fixed = Fixed { pool, comm: &**comm, team, pipe, layout, params: &state.params, seconds };
        let params = (layout.zero < Zero::Parameters).then_some(&state.params[..]);
        let n_mine = layout.micro_batches(layout.rank).len();
        let mut exchange = Exchange::new(fixed, memory);
        let mut load = |turn: usize| {
            let start = seconds();
            // Who has none left in the last turn computes on nothing, which nobody adds to anything.
            let rows =
                if turn < n_mine { loader.next() } else { Ok(Rows::nothing(plan.rows * plan.context)) };
            data_seconds += seconds() - start;
            rows
        };
        // Rows of micro-batches whose backward pass is still to come.
        let mut flying: VecDeque<Rows> = VecDeque::new();
        let n_flights = in_flight(stage, layout.n_turns);
        for action in schedule(stage, layout.n_turns) {
            if exchange.has_failed() {
                break;
            }
            match action {
                Action::Both(turn) => {
                    let rows = load(turn)?;
                    exchange.begin(Kind::Gradients, turn);
                    let of = (rows.batch(), plan.objective);
                    sums.push(model.loss_and_grads_to(pool, params, of, &mut exchange));
                }
                Action::Forward(turn) => {
                    let rows = load(turn)?;
                    exchange.begin(Kind::Gradients, turn);
                    let of = (rows.batch(), turn % n_flights);
                    model.forward_to(pool, &state.params, of, &mut exchange);
                    flying.push_back(rows);
                }
                Action::Backward(turn) => {
                    let rows = flying.pop_front().unwrap_or_default();
                    exchange.begin(Kind::Gradients, turn);
                    let of = (rows.batch(), turn % n_flights);
                    model.backward_to(pool, &state.params, of, &mut exchange);
                    sums.push(LossSum::default());
                }
            }
        }
        Ok((sums, data_seconds, exchange.finish()?))
    }
}

/// Of several ranks the one whose gradient is not a number, or else the one that computed the worst micro-batch.
fn wrong_rank(times: &[Times], of_worst: usize) -> Option<usize> {
    let found = times.iter().position(|rank| !rank[3].is_finite());
    (times.len() > 1).then(|| found.unwrap_or(of_worst))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_whose_gradient_is_no_number_is_found() {
        let [good, bad] = [1.5, f64::NAN].map(|squares| [0.0, 0.0, 0.0, squares, 0.0]);
        assert_eq!(wrong_rank(&[good, good, good], 1), Some(1), "all are numbers: who lost most");
        assert_eq!(wrong_rank(&[good, good, bad], 1), Some(2));
        assert_eq!(wrong_rank(&[bad], 0), None, "there is only one");
    }
}
