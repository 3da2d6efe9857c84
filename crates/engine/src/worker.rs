//! The engine's thread: take submissions, plan, run the model, draw tokens, send them, again.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::StepInput;
use telemetry::EngineMetrics;
use tensor::Pool;

use crate::clock;
use crate::draft::DraftModel;
use crate::engine::{EngineLimits, Phase, Shared, Stats, Submission};
use crate::live::{Live, Progress};
use crate::pacer::Pacer;
use crate::request::FinishReason;
use crate::runner::{Models, Runner, RunnerShape, panic_text};
use crate::sampler::Sampler;
use crate::scheduler::{Limits, Plan, PlanRow, Scheduler};
use crate::sequence::{Sequence, SequenceId};
use crate::speculation::{Speculator, Wish};
use crate::step_cost::StepWork;

/// Rows of logits that scored prompts get in one step: 128 * 49,152 ids * 4 B = 24 MiB.
const PROMPT_LOGITS_PER_STEP: usize = 128;

pub(crate) struct Worker {
    shared: Arc<Shared>,
    limits: EngineLimits,
    metrics: EngineMetrics,
    runner: Box<dyn Runner>,
    scheduler: Scheduler,
    pacer: Pacer,
    speculator: Speculator,
    /// Where tokens are drawn; the model's own threads when it has some.
    pool: Arc<Pool>,
    /// Scratch space not in use; grows to one per thread.
    samplers: Mutex<Vec<Sampler>>,
    vocab: usize,
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
        models: Models,
        limits: EngineLimits,
        shared: Arc<Shared>,
        metrics: EngineMetrics,
    ) -> Worker {
        let Models { target: runner, draft } = models;
        let RunnerShape { vocab, n_blocks, block_tokens, .. } = runner.shape();
        let scheduler = Scheduler::new(Limits {
            n_blocks,
            block_tokens,
            max_running: limits.max_running,
            max_batch_tokens: limits.max_batch_tokens,
            max_prompt_logits: PROMPT_LOGITS_PER_STEP,
            max_draft_tokens: limits.max_draft_tokens,
            prefix_cache: limits.prefix_cache,
        });
        metrics.set_cache_config(block_tokens, n_blocks, limits.prefix_cache);
        let pacer = Pacer::new(limits.max_prefill_beside_decode);
        let speculator = Speculator::new(limits.speculation, draft.map(DraftModel::new));
        let pool = runner.pool().unwrap_or_else(|| Arc::new(Pool::new(1)));
        let stats = Stats { n_blocks, ..Stats::default() };
        Worker {
            shared,
            limits,
            metrics,
            vocab,
            runner,
            scheduler,
            pacer,
            speculator,
            pool,
            samplers: Mutex::default(),
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
        let mut sequence = Sequence::new(request.tokens.clone(), &request.tenant);
        sequence.prompt_logits = request.prompt_logprobs.is_some();
        sequence.priority = request.priority;
        sequence.set_adapter(request.adapter.clone());
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
        self.make_drafts(start);
        let pacer = &self.pacer;
        let plan = self.scheduler.plan(&|crowd| pacer.pace(crowd));
        let input = self.scheduler.input(&plan);
        self.note_plan(&plan, start);
        let planned = clock::now();
        self.publish(Some(planned));
        let outcome = self.compute(&plan, &input, planned);
        match outcome {
            Ok(()) => {
                self.n_failed_in_a_row = 0;
                self.pacer.observe(&StepWork::of(&plan), clock::now() - planned);
            }
            Err(why) => self.fail_running(why)?,
        }
        self.stats.schedule_time += planned - start;
        self.note_step(input.tokens_n.len(), clock::now() - start);
        Ok(())
    }

    /// Guesses ahead for every sequence that decodes in the next step.
    fn make_drafts(&mut self, start: Instant) {
        if !self.speculator.is_on() {
            return;
        }
        let live = &self.live;
        let wish = |(id, tokens)| {
            // The step itself brings one token; a guess at more than may come is of no use.
            let n_max = live.get(&id).map_or(0, |live: &Live| live.n_left().saturating_sub(1));
            Wish { id, tokens, n_max }
        };
        let mut wishes: Vec<_> = self.scheduler.decoding().map(wish).collect();
        let costs = self.pacer.guess_costs(wishes.len());
        let mut sampler =
            self.samplers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let mut draw = |id, n_ahead, logits_v: &[f32]| live.get(&id)?.guess(&mut sampler, logits_v, n_ahead);
        let drafts = self.speculator.propose(&mut wishes, costs, &mut draw);
        let ids: Vec<_> = wishes.iter().map(|wish| wish.id).collect();
        self.samplers.lock().unwrap_or_else(PoisonError::into_inner).push(sampler);
        let drafts = drafts.unwrap_or_else(|error| {
            self.stats.draft_failure = Some(error.to_string());
            Vec::new()
        });
        let n_guesses = drafts.iter().map(Vec::len).sum();
        ids.into_iter().zip(drafts).for_each(|(id, draft)| self.scheduler.set_draft(id, draft));
        let time = clock::now() - start;
        let cost = self.speculator.cost(n_guesses, time);
        self.pacer.observe_guesses(cost.n_guesses, cost.time);
        self.stats.draft_time += time;
    }

    /// Of a row's draft as many guesses were right as it has further tokens.
    fn note_draft(&mut self, row: &PlanRow, n_tokens: usize) {
        if row.draft.is_empty() {
            return;
        }
        let n_accepted = n_tokens.saturating_sub(1);
        self.speculator.learn(row.id, row.draft.len(), n_accepted);
        self.metrics.drafted(row.draft.len(), n_accepted);
        self.stats.draft_tokens += row.draft.len() as u64;
        self.stats.accepted_tokens += n_accepted as u64;
    }

    /// Runs the model, then draws and sends every caught-up sequence's next token.
    fn compute(&mut self, plan: &Plan, input: &StepInput, planned: Instant) -> Result<(), String> {
        let runner = &mut self.runner;
        let step = catch_unwind(AssertUnwindSafe(move || {
            let runner = runner; // Moved in, so that the logits may leave the closure.
            runner.step(input)
        }));
        let step = step.map_err(|panic| format!("the model panicked: {}", panic_text(&*panic)))?;
        let logits_rv = step.map_err(|error| error.to_string())?;
        let (found, expected) = (logits_rv.len(), input.n_logits() * self.vocab);
        if found != expected {
            return Err(format!("the model gave {found} logits instead of {expected}"));
        }
        let computed = clock::now();
        self.scheduler.commit(plan);
        let mut turns = deal(&mut self.live, plan, logits_rv, self.vocab);
        let samplers = &self.samplers;
        self.pool.run_chunks(&mut turns, 1, |_, turn| {
            turn.iter_mut().for_each(|turn| turn.take(samplers));
        });
        let mut outcomes = Vec::with_capacity(turns.len());
        for Turn { live, row, progress, .. } in turns {
            live.note_progress(row, &self.metrics, &mut self.stats, computed);
            outcomes.push(progress);
        }
        for (row, progress) in plan.rows.iter().zip(&outcomes) {
            if !progress.tokens.is_empty() {
                self.scheduler.accept(row.id, &progress.tokens);
            }
            self.note_draft(row, progress.tokens.len());
        }
        let now = clock::now();
        self.stats.model_time += computed - planned;
        self.stats.sample_time += now - computed;
        for (row, progress) in plan.rows.iter().zip(outcomes) {
            progress.end.into_iter().for_each(|reason| self.finish(row.id, reason, now));
        }
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
        self.speculator.forget(id);
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
        self.stats.n_deferred = plan.n_deferred;
        for &id in &plan.preempted {
            self.metrics.preempted();
            self.speculator.forget(id);
        }
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
        // Those who were deferred when the last step was planned may have gone since.
        stats.n_deferred = stats.n_deferred.min(stats.n_waiting);
        self.metrics.set_waiting(stats.n_waiting - stats.n_deferred, stats.n_deferred);
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

/// One sequence's part of a step's outcome: independent of the others, so any thread may take it.
struct Turn<'a> {
    live: &'a mut Live,
    row: &'a PlanRow,
    logits_rv: &'a [f32],
    progress: Progress,
}

impl Turn<'_> {
    fn take(&mut self, samplers: &Mutex<Vec<Sampler>>) {
        let free = || samplers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sampler = free().pop().unwrap_or_default();
        self.progress = self.live.advance(&mut sampler, self.row, self.logits_rv);
        free().push(sampler);
    }
}

/// Hands each planned row its sequence and its logits.
fn deal<'a>(
    live: &'a mut HashMap<SequenceId, Live>,
    plan: &'a Plan,
    logits_rv: &'a [f32],
    vocab: usize,
) -> Vec<Turn<'a>> {
    let mut live: HashMap<SequenceId, &mut Live> = live.iter_mut().map(|(&id, live)| (id, live)).collect();
    let mut rest = logits_rv;
    let turn = |row: &'a PlanRow| {
        let logits_rv = rest.split_off(..row.n_logits * vocab).expect("the number of logits was checked");
        let live = live.remove(&row.id).expect("a planned sequence is live");
        Turn { live, row, logits_rv, progress: Progress::default() }
    };
    plan.rows.iter().map(turn).collect()
}
