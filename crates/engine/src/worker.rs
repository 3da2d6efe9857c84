//! The engine's thread: take submissions, plan, run the model, draw tokens, send them, again.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use model::StepInput;
use telemetry::EngineMetrics;

use crate::clock;
use crate::engine::{EngineLimits, Phase, Shared, Stats, Submission};
use crate::live::Live;
use crate::request::FinishReason;
use crate::runner::Runner;
use crate::sampler::Sampler;
use crate::scheduler::{Limits, Plan, Scheduler};
use crate::sequence::{Sequence, SequenceId};

pub(crate) struct Worker {
    shared: Arc<Shared>,
    limits: EngineLimits,
    metrics: EngineMetrics,
    runner: Box<dyn Runner>,
    scheduler: Scheduler,
    sampler: Sampler,
    /// Every sequence the scheduler knows, with what the scheduler need not know.
    live: HashMap<SequenceId, Live>,
    next_id: u64,
    n_failed_in_a_row: usize,
    stats: Stats,
    /// What happened since the shared state was last brought up to date.
    news: News,
}

#[derive(Default)]
struct News {
    n_unqueued: usize,
    n_unqueued_tokens: usize,
    n_ended: usize,
}

/// Why the loop ended.
enum End {
    Stopped,
    Failed(String),
}

impl Worker {
    pub(crate) fn new(
        runner: Box<dyn Runner>,
        limits: EngineLimits,
        shared: Arc<Shared>,
        metrics: EngineMetrics,
    ) -> Worker {
        let scheduler = Scheduler::new(Limits {
            n_blocks: runner.n_blocks(),
            block_tokens: runner.block_tokens(),
            max_running: limits.max_running,
            max_batch_tokens: limits.max_batch_tokens,
            max_prefill_beside_decode: limits.max_prefill_beside_decode,
            prefix_cache: limits.prefix_cache,
        });
        metrics.set_cache_config(runner.block_tokens(), runner.n_blocks(), limits.prefix_cache);
        let stats = Stats { n_blocks: runner.n_blocks(), ..Stats::default() };
        Worker {
            shared,
            limits,
            metrics,
            runner,
            scheduler,
            sampler: Sampler::default(),
            live: HashMap::new(),
            next_id: 0,
            n_failed_in_a_row: 0,
            stats,
            news: News::default(),
        }
    }

    /// Serves until it is told to stop, or fails. Never panics: callers learn of a bug here from
    /// [`crate::Engine::health`], and every open stream ends with an error.
    pub(crate) fn run(mut self) {
        let shared = self.shared.clone();
        let end = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let end = end.unwrap_or_else(|panic| End::Failed(format!("engine bug: {}", panic_text(&*panic))));
        if let End::Failed(why) = &end {
            self.finish_all(&FinishReason::Error(why.clone()));
            self.publish(None);
        }
        let mut state = shared.lock();
        if let End::Failed(why) = end {
            state.phase = Phase::Failed(why);
        }
        // Streams that were submitted and never looked at learn of it from their senders' drop.
        state.submitted.clear();
        (state.n_queued, state.n_queued_tokens, state.n_unfinished) = (0, 0, 0);
        state.step_started = None;
        drop(state);
        shared.idle.notify_all();
    }

    fn serve(&mut self) -> End {
        loop {
            if self.take_submissions() == Phase::Stopping {
                self.finish_all(&FinishReason::Cancelled);
                self.publish(None);
                return End::Stopped;
            }
            self.drop_unwanted();
            if self.live.is_empty() {
                continue;
            }
            if let Err(why) = self.step() {
                return End::Failed(why);
            }
        }
    }

    /// Moves new requests to the scheduler. Sleeps while there is nothing to do.
    fn take_submissions(&mut self) -> Phase {
        self.publish(None);
        let shared = self.shared.clone();
        let mut state = shared.lock();
        while state.submitted.is_empty() && self.live.is_empty() && state.phase != Phase::Stopping {
            shared.idle.notify_all();
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let submitted = std::mem::take(&mut state.submitted);
        let phase = state.phase.clone();
        drop(state);
        submitted.into_iter().for_each(|submission| self.accept(submission));
        phase
    }

    fn accept(&mut self, submission: Submission) {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let request = &submission.request;
        let prompt_logits = request.prompt_logprobs.is_some();
        let sequence = Sequence::new(request.tokens.clone(), &request.tenant, prompt_logits);
        self.scheduler.add(id, sequence);
        self.live.insert(id, Live::new(submission));
    }

    /// Ends what nobody waits for any more, before the step that would have worked on it.
    fn drop_unwanted(&mut self) {
        let now = clock::now();
        let unwanted = self.live.iter().filter_map(|(&id, live)| {
            let reason = live.unwanted(now)?;
            Some((id, reason))
        });
        let unwanted: Vec<_> = unwanted.collect();
        unwanted.into_iter().for_each(|(id, reason)| self.finish(id, reason, now));
    }

    /// One step for every sequence the plan holds. An error ends the engine.
    fn step(&mut self) -> Result<(), String> {
        let start = clock::now();
        let plan = self.scheduler.plan();
        let input = self.scheduler.input(&plan);
        self.note_plan(&plan, start);
        let planned = clock::now();
        self.publish(Some(planned));
        let outcome = self.compute(&plan, &input, planned);
        match outcome {
            Ok(()) => self.n_failed_in_a_row = 0,
            Err(why) => self.fail_running(why)?,
        }
        self.stats.schedule_time += planned - start;
        self.note_step(input.tokens_n.len(), clock::now() - start);
        Ok(())
    }

    /// Runs the model and hands each row's logits to its sequence.
    fn compute(&mut self, plan: &Plan, input: &StepInput, planned: Instant) -> Result<(), String> {
        let runner = &mut self.runner;
        let step = catch_unwind(AssertUnwindSafe(move || {
            let runner = runner; // Moved in, so that the logits may leave the closure.
            runner.step(input)
        }));
        let step = step.map_err(|panic| format!("the model panicked: {}", panic_text(&*panic)))?;
        let logits_rv = step.map_err(|error| error.to_string())?;
        let computed = clock::now();
        let n_logits: usize = plan.rows.iter().map(|row| row.n_logits).sum();
        let vocab = logits_rv.len() / n_logits.max(1);
        if logits_rv.len() != n_logits * vocab || (n_logits > 0 && vocab == 0) {
            return Err(format!("the model gave {} numbers for {n_logits} rows of logits", logits_rv.len()));
        }
        self.scheduler.commit(plan);
        let mut rest = logits_rv;
        let mut ended = Vec::new();
        for row in &plan.rows {
            let (logits_rv, others) = rest.split_at(row.n_logits * vocab);
            rest = others;
            let live = self.live.get_mut(&row.id).expect("a planned sequence is live");
            let outcome = live.advance(&mut self.scheduler, &mut self.sampler, row, logits_rv);
            live.note_progress(&self.metrics, &mut self.stats, computed);
            ended.extend(outcome.map(|reason| (row.id, reason)));
        }
        let now = clock::now();
        self.stats.model_time += computed - planned;
        self.stats.sample_time += now - computed;
        ended.into_iter().for_each(|(id, reason)| self.finish(id, reason, now));
        Ok(())
    }

    /// Nobody knows what a failed step left in the blocks: everything that holds one ends.
    /// Waiting sequences hold none and go on, unless the model keeps failing.
    fn fail_running(&mut self, why: String) -> Result<(), String> {
        self.stats.n_failed_steps += 1;
        self.n_failed_in_a_row += 1;
        let now = clock::now();
        let running = self.scheduler.running().to_vec();
        running.into_iter().for_each(|id| self.finish(id, FinishReason::Error(why.clone()), now));
        self.scheduler.forget_prefixes();
        if self.n_failed_in_a_row < self.limits.max_failed_steps {
            return Ok(());
        }
        Err(format!("{} steps in a row failed, the last: {why}", self.n_failed_in_a_row))
    }

    fn finish_all(&mut self, reason: &FinishReason) {
        let now = clock::now();
        let all: Vec<_> = self.live.keys().copied().collect();
        all.into_iter().for_each(|id| self.finish(id, reason.clone(), now));
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason, now: Instant) {
        let live = self.live.remove(&id).expect("a sequence finishes once");
        self.scheduler.remove(id);
        if !live.was_admitted() {
            self.note_unqueued(live.n_prompt());
        }
        self.news.n_ended += 1;
        live.finish(reason, &self.metrics, now);
    }

    fn note_unqueued(&mut self, n_prompt: usize) {
        self.news.n_unqueued += 1;
        self.news.n_unqueued_tokens += n_prompt;
    }

    fn note_plan(&mut self, plan: &Plan, now: Instant) {
        for admission in &plan.admitted {
            let live = self.live.get_mut(&admission.id).expect("a planned sequence is live");
            live.admit(admission.n_cached, now);
            let n_prompt = live.n_prompt();
            self.note_unqueued(n_prompt);
            self.metrics.prefix_lookup(admission.n_looked_up, admission.n_cached);
            self.stats.cached_tokens += admission.n_cached as u64;
        }
        self.stats.n_preemptions += plan.preempted.len() as u64;
        plan.preempted.iter().for_each(|_| self.metrics.preempted());
    }

    fn note_step(&mut self, n_tokens: usize, step_time: Duration) {
        self.metrics.step(n_tokens);
        let stats = &mut self.stats;
        stats.n_steps += 1;
        stats.step_time += step_time;
        // Smoothed over about 16 steps; only queue estimates use it.
        let speed = n_tokens as f64 / step_time.as_secs_f64().max(1e-9);
        let weight = if stats.n_steps == 1 { 1.0 } else { 1.0 / 16.0 };
        stats.tokens_per_second += (speed - stats.tokens_per_second) * weight;
    }

    /// Brings the gauges and the shared state up to date, before a step and after it.
    fn publish(&mut self, step_started: Option<Instant>) {
        let stats = &mut self.stats;
        stats.n_running = self.scheduler.n_running();
        stats.n_waiting = self.scheduler.n_waiting();
        stats.n_blocks_used = self.scheduler.n_blocks_used();
        self.metrics.set_running(stats.n_running);
        self.metrics.set_waiting(stats.n_waiting, 0);
        self.metrics.set_kv_usage(stats.n_blocks_used as f64 / stats.n_blocks.max(1) as f64);
        let news = std::mem::take(&mut self.news);
        let mut state = self.shared.lock();
        state.n_queued -= news.n_unqueued;
        state.n_queued_tokens -= news.n_unqueued_tokens;
        state.n_unfinished -= news.n_ended;
        state.step_started = step_started;
        state.stats = self.stats.clone();
    }
}

/// The message of a panic, as far as it had one.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
