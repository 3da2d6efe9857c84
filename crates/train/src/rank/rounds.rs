//! Rounds of DiLoCo (see [`Diloco`]): between two meetings no rank waits for another.
//!
//! Workers, not ranks, are what the result depends on: a rank runs its workers one after another, and their differences
//! are summed in the tree of [`comm::tree`], so that any number of ranks that divides them gives the same bits.

use std::sync::atomic::{AtomicBool, Ordering};

use comm::tree;
use data::chain;
use serde::{Deserialize, Serialize};
use store::FileEntry;
use tensor::adamw::sum_squares;

use super::{Lead, Rank};
use crate::checkpoint::Checkpoints;
use crate::guard::{Health, Wrong};
use crate::layout::Layout;
use crate::loader::Loader;
use crate::state::State;
use crate::{BadBatch, Diloco, Error, Event, Ranks, Result, Round, Step};

/// Skipped steps that a rank tells of in a round; more are only counted.
const SKIPS_TOLD_MAX: usize = 64;

/// What a rank has stored, or why not.
type Stored<T> = std::result::Result<T, String>;

/// What a rank keeps of its workers. Meanwhile the rank's own state is the run's: parameters from which the round began,
/// and the outer step's momentum in place of the mean of gradients.
pub(crate) struct Rounds {
    pub(crate) diloco: Diloco,
    /// The number of the first worker here.
    pub(crate) first: usize,
    pub(crate) workers: Vec<State>,
    /// Of a worker, which shares nothing with others.
    pub(crate) alone: Layout,
    pub(crate) checkpoints: Checkpoints,
    /// The step of the newest checkpoint that this rank knows of.
    pub(crate) saved: u64,
}

/// What a rank brings to a meeting.
#[derive(Default, Serialize, Deserialize)]
struct Report {
    /// Steps finished: all of the round's, unless the rank was told to stop or gave up.
    step: u64,
    stops: bool,
    gave_up: Option<GaveUp>,
    seconds: f64,
    workers: Vec<Tally>,
    skips: Vec<Skip>,
}

/// Too many steps of a worker went wrong.
#[derive(Clone, Serialize, Deserialize)]
struct GaveUp {
    n: u64,
    step: u64,
    wrong: Wrong,
    bad: BadBatch,
}

/// A worker's round.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Tally {
    nats: f64,
    n_counted: f64,
    health: Health,
}

/// A step of a worker that changed nothing.
#[derive(Serialize, Deserialize)]
struct Skip {
    step: u64,
    wrong: Wrong,
    loss: Option<f64>,
    grad_norm: Option<f64>,
    bad: BadBatch,
    n_skipped: u64,
}

/// What came of one step of one worker.
struct Inner {
    loss: f64,
    grad_norm: f64,
    nats: f64,
    n_counted: f64,
    data_seconds: f64,
    skip: Option<Skip>,
}

impl Rank<'_> {
    /// Runs rounds until the plan is done or `stop` is set on any rank; returns whether it is done. Who is told to stop in
    /// the middle of a round goes back to the last checkpoint: workers that have moved apart are not kept.
    pub(super) fn run_rounds(
        &mut self,
        mut rounds: Rounds,
        mut lead: Option<&mut dyn Lead>,
        stop: &AtomicBool,
    ) -> Result<bool> {
        let loader = Loader::start(self.mixture.clone(), self.order());
        let n_steps = self.plan.steps;
        self.memory.reserve(&rounds.alone);
        if self.state.step == 0 {
            self.look(&mut lead, &|_| true)?;
        }
        while self.state.step < n_steps {
            let begun = self.state.step;
            let end = rounds.diloco.round_end(begun, n_steps);
            let mut report =
                Report { workers: vec![Tally::default(); rounds.workers.len()], ..Report::default() };
            while self.state.step < end && report.gave_up.is_none() && !stop.load(Ordering::Relaxed) {
                self.step_of_workers(&mut rounds, &loader, (&mut report, &mut lead))?;
            }
            report.stops = stop.load(Ordering::Relaxed);
            report.step = self.state.step;
            let arrived = (self.seconds)();
            let reports = self.gather_reports(&report, &mut lead)?;
            let is_done = end == n_steps;
            let is_whole = reports.iter().all(|report| report.step == end);
            let stops = reports.iter().any(|report| report.stops) && !(is_whole && is_done);
            if is_whole {
                self.meet(&mut rounds, (&reports, end - begun, arrived), &mut lead)?;
                let is_due = |every: u64| is_done || end / every > begun / every;
                if !stops {
                    self.look(&mut lead, &is_due)?;
                }
                if stops || is_due(self.plan.checkpoint.every_steps) {
                    self.save_round(&mut rounds, &reports, &mut lead)?;
                }
            }
            if stops {
                if let Some(lead) = &mut lead {
                    lead.event(Event::Interrupted { step: rounds.saved });
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// One step of each of this rank's workers.
    fn step_of_workers(
        &mut self,
        rounds: &mut Rounds,
        loader: &Loader,
        (report, lead): (&mut Report, &mut Option<&mut dyn Lead>),
    ) -> Result<()> {
        let start = (self.seconds)();
        self.record.work(self.state.step, "gradients");
        let lr_share = self.plan.schedule.share(self.state.step, self.plan.steps);
        let mut of_first = None;
        for (i, worker) in rounds.workers.iter_mut().enumerate() {
            let first = tree::share(self.plan.micro_batches, rounds.first + i, rounds.diloco.workers).start;
            std::mem::swap(&mut self.state, worker);
            let inner = self.inner_step(loader, (&rounds.alone, first));
            std::mem::swap(&mut self.state, worker);
            let mut inner = inner?;
            report.workers[i].health = worker.health;
            match inner.skip.take() {
                Some(skip) => report.skip(skip, worker.health, self.plan.guard.skips_max),
                None => {
                    report.workers[i].nats += inner.nats;
                    report.workers[i].n_counted += inner.n_counted;
                    of_first = of_first.or((i == 0).then_some(inner));
                }
            }
        }
        let seconds = (self.seconds)() - start;
        report.seconds += seconds;
        self.finish_step(seconds);
        // What the first worker sees is known without asking anybody, and does not depend on who runs it.
        if let (Some(lead), Some(inner)) = (lead, of_first) {
            lead.event(Event::Step(Step {
                step: self.state.step,
                loss: inner.loss,
                lr: self.plan.schedule.lr_peak * lr_share as f32,
                grad_norm: inner.grad_norm,
                tokens: self.state.tokens,
                tokens_per_second: self.plan.tokens_per_step() as f64 / seconds.max(1e-9),
                data_seconds: inner.data_seconds,
                elapsed_seconds: self.state.elapsed_seconds,
                margin: None,
                ranks: None,
            }));
        }
        Ok(())
    }

    /// A step of the worker whose state is this rank's at the moment.
    fn inner_step(&mut self, loader: &Loader, (alone, first): (&Layout, usize)) -> Result<Inner> {
        let (sums, data_seconds, _) = self.gradients(loader, Some(alone))?;
        let grads = &self.memory.sums[0];
        let squares = sum_squares(&self.pool, grads, &mut self.squares);
        let (nats, n_counted) = (sums.nats(), sums.n_counted());
        let (loss, grad_norm) = (nats / n_counted, squares.sqrt() / n_counted);
        let wrong = self.state.health.judge(loss, grad_norm, self.plan.guard);
        let bad = wrong.map(|wrong| (wrong, self.bad_batch(first + sums.worst())));
        if wrong.is_none() {
            let rate = self.rate(grad_norm, n_counted);
            self.optimizer.update(&self.pool, &mut self.state, (&self.memory.sums[0], rate), None);
        }
        self.finish_step(0.0);
        let number = |x: f64| x.is_finite().then_some(x);
        let skip = bad.map(|(wrong, bad)| Skip {
            step: self.state.step,
            wrong,
            loss: number(loss),
            grad_norm: number(grad_norm),
            bad,
            n_skipped: self.state.health.n_skipped,
        });
        Ok(Inner { loss, grad_norm, nats, n_counted, data_seconds, skip })
    }

    /// Every rank's report; tells of what was skipped. Where a worker has given up all ranks do.
    fn gather_reports(&mut self, own: &Report, lead: &mut Option<&mut dyn Lead>) -> Result<Vec<Report>> {
        self.record.work(self.state.step, "meeting");
        let mut reports: Vec<Report> = self.gather_json(own)?;
        for (rank, report) in reports.iter_mut().enumerate() {
            let rank = (self.comm.n_ranks() > 1).then_some(rank);
            for Skip { step, wrong, loss, grad_norm, bad, n_skipped } in report.skips.drain(..) {
                if let Some(lead) = lead {
                    lead.event(Event::Skipped { step, wrong, loss, grad_norm, bad, rank, n_skipped });
                }
            }
        }
        match reports.iter().find_map(|report| report.gave_up.clone()) {
            Some(GaveUp { n, step, wrong, bad }) => {
                Err(Error::StepsWentWrong { n, step, what: wrong.text(), bad })
            }
            None => Ok(reports),
        }
    }

    /// The outer step, from whose result all workers go on.
    fn meet(
        &mut self,
        rounds: &mut Rounds,
        (reports, n_steps, arrived): (&[Report], u64, f64),
        lead: &mut Option<&mut dyn Lead>,
    ) -> Result<()> {
        let Rank { state, memory, comm, pool, squares, .. } = self;
        let grads = &mut memory.sums[0];
        let (first, workers) = (rounds.first, &rounds.workers);
        let mut leaf = |worker: usize, moved: &mut [f32]| -> Result<()> {
            let ends = &workers[worker - first].params;
            moved.iter_mut().zip(state.params.iter()).zip(ends.iter()).for_each(|((m, a), b)| *m = a - b);
            Ok(())
        };
        tree::reduce(first..first + workers.len(), grads, &mut Vec::new(), &mut leaf)?;
        let summed = (self.seconds)();
        comm.all_reduce_tree(grads)?;
        let exchanged = (self.seconds)() - summed;
        let moved = sum_squares(pool, grads, squares).sqrt() / rounds.diloco.workers as f64;
        if !moved.is_finite() {
            return Err(Error::WorkersNotANumber { step: state.step });
        }
        rounds.diloco.outer_step(&mut state.params, &mut state.adam_m, grads);
        rounds.workers.iter_mut().for_each(|worker| worker.params.copy_from_slice(&state.params));
        let sent = self.comm.bytes_sent() - self.bytes_told;
        self.bytes_told += sent;
        let of_round = reports[self.comm.rank()].seconds;
        let times = self.comm.all_gather(&[of_round, exchanged, sent as f64, 0.0, exchanged])?;
        let times = times.as_chunks::<5>().0;
        let seconds = (self.seconds)() - arrived;
        self.state.elapsed_seconds += seconds;
        let tallies = || reports.iter().flat_map(|report| &report.workers);
        let n_counted: f64 = tallies().map(|tally| tally.n_counted).sum();
        if let Some(lead) = lead {
            lead.event(Event::Round(Round {
                step: self.state.step,
                n_steps,
                loss: tallies().map(|tally| tally.nats).sum::<f64>() / n_counted.max(1.0),
                moved,
                seconds,
                ranks: (times.len() > 1).then(|| Ranks::of(times)),
            }));
        }
        Ok(())
    }

    /// Every rank stores the state of its own workers, the first one also the run's, and then makes all of it visible.
    fn save_round(
        &mut self,
        rounds: &mut Rounds,
        reports: &[Report],
        lead: &mut Option<&mut dyn Lead>,
    ) -> Result<()> {
        self.record.work(self.state.step, "saving");
        let (start, step) = ((self.seconds)(), self.state.step);
        let run = lead.as_ref().map(|_| &self.state);
        let workers = (rounds.first..).zip(&rounds.workers);
        let stored = rounds.checkpoints.store_round(step, run, workers).map_err(|error| chain(&error));
        let parts: Vec<Stored<Vec<FileEntry>>> = self.gather_json(&stored)?;
        let Some(lead) = lead else { return Ok(()) };
        let files: Stored<Vec<Vec<FileEntry>>> = parts.into_iter().collect();
        let healths = reports.iter().flat_map(|report| &report.workers).map(|tally| tally.health);
        let publish = |files: Vec<Vec<FileEntry>>| {
            let bytes = rounds.checkpoints.publish_round(&self.state, files.concat(), healths.collect())?;
            rounds.checkpoints.prune(self.plan.checkpoint.keep)?;
            Ok(bytes)
        };
        let published = files.and_then(|files| publish(files).map_err(|error: Error| chain(&error)));
        let seconds = (self.seconds)() - start;
        match published {
            Ok(bytes) => {
                rounds.saved = step;
                lead.event(Event::Checkpoint { step, bytes, seconds, write_seconds: seconds });
            }
            Err(why) => lead.event(Event::CheckpointFailed { step, why }),
        }
        Ok(())
    }

    fn gather_json<T: Serialize + for<'a> Deserialize<'a>>(&self, own: &T) -> Result<Vec<T>> {
        let bytes = serde_json::to_vec(own).unwrap_or_else(|e| panic!("a report is plain data: {e}"));
        let all = self.comm.all_gather_bytes(&bytes)?;
        all.iter().map(|bytes| serde_json::from_slice(bytes).map_err(Error::Report)).collect()
    }
}

impl Report {
    fn skip(&mut self, skip: Skip, health: Health, skips_max: u64) {
        let n = health.n_skipped_in_a_row;
        if n > skips_max {
            self.gave_up = Some(GaveUp { n, step: skip.step, wrong: skip.wrong, bad: skip.bad });
        } else if self.skips.len() < SKIPS_TOLD_MAX {
            self.skips.push(skip);
        }
    }
}
