//! The handle: a bounded submission queue in front of a thread that owns the model.
//!
//! Callers and the engine's thread meet in one mutex that is never held during inference, so
//! submitting, probing and reading statistics take microseconds whatever the model is doing.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use telemetry::EngineMetrics;

use crate::clock;
use crate::request::{self, Request, SubmitError};
use crate::runner::{Models, Runner, RunnerShape};
use crate::speculation::Speculation;
use crate::stream::{self, Sender, Stream};
use crate::worker::Worker;

/// Every bound of the engine, by name.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineLimits {
    /// Sequences that hold KV blocks at the same time.
    pub max_running: usize,
    /// Tokens of one step, decoding and prefill together. At least `max_running`.
    pub max_batch_tokens: usize,
    /// Prompt tokens of a step that also decodes, however cheap they are.
    pub max_prefill_beside_decode: usize,
    /// Requests waiting for their first step; one more is refused.
    pub queue_max_requests: usize,
    /// Prompt tokens of all waiting requests together.
    pub queue_max_tokens: usize,
    /// Keep the blocks of finished sequences for requests that begin alike.
    pub prefix_cache: bool,
    /// How tokens are guessed ahead. Changes when tokens come, never which.
    pub speculation: Speculation,
    /// Guesses of all sequences together that one step verifies.
    pub max_draft_tokens: usize,
    /// Steps that may fail in a row before the engine reports itself unhealthy and stops.
    pub max_failed_steps: usize,
    /// A step longer than this makes [`Engine::health`] report a stall.
    pub step_time_max: Duration,
}

impl Default for EngineLimits {
    fn default() -> EngineLimits {
        EngineLimits {
            max_running: 32,
            max_batch_tokens: 512,
            max_prefill_beside_decode: 512,
            queue_max_requests: 256,
            queue_max_tokens: 1 << 20,
            prefix_cache: true,
            speculation: Speculation::Off,
            max_draft_tokens: 64,
            max_failed_steps: 3,
            step_time_max: Duration::from_secs(120),
        }
    }
}

/// Whether the engine can take requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Ready,
    /// Running requests finish, new ones are refused.
    Draining,
    /// A step has been running for this long; the model may hang.
    Stalled(Duration),
    /// The thread has ended; the text says why.
    Failed(String),
}

/// Counters and gauges at one moment. Times are sums over the engine's life.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    pub n_running: usize,
    /// Requests not yet in their first step, plus preempted ones.
    pub n_waiting: usize,
    /// Of those, how many wait for another request to compute the prompt they share.
    pub n_deferred: usize,
    pub n_blocks: usize,
    /// Blocks held by running sequences; cached blocks that nobody holds count as free.
    pub n_blocks_used: usize,
    pub prompt_tokens: u64,
    /// Prompt tokens served from the prefix cache.
    pub cached_tokens: u64,
    pub generation_tokens: u64,
    pub n_preemptions: u64,
    /// Tokens guessed ahead and verified, and those of them that were right.
    pub draft_tokens: u64,
    pub accepted_tokens: u64,
    /// Why the draft model failed, if it did; since then nothing is guessed.
    pub draft_failure: Option<String>,
    pub n_steps: u64,
    pub n_failed_steps: u64,
    /// Wall time of whole steps, and of their parts.
    pub step_time: Duration,
    pub schedule_time: Duration,
    pub model_time: Duration,
    pub sample_time: Duration,
    /// Making drafts; a part of `schedule_time`.
    pub draft_time: Duration,
    /// Tokens (prompt and generated) a second, smoothed over recent steps.
    pub tokens_per_second: f64,
}

/// A running engine. Clones share it; the last one dropped stops it.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    limits: EngineLimits,
    vocab: usize,
    context_max: usize,
}

/// What the callers and the engine's thread share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something for the engine's thread to do.
    pub(crate) work: Condvar,
    /// The engine has no sequences left, or has ended.
    pub(crate) idle: Condvar,
}

pub(crate) struct State {
    pub(crate) submitted: VecDeque<Submission>,
    /// Requests (and their prompt tokens) that have not had a step yet, `submitted` included.
    pub(crate) n_queued: usize,
    pub(crate) n_queued_tokens: usize,
    /// Requests accepted and not finished.
    pub(crate) n_unfinished: usize,
    pub(crate) phase: Phase,
    pub(crate) step_started: Option<Instant>,
    pub(crate) stats: Stats,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Serving,
    Draining,
    /// Cancel everything and end the thread.
    Stopping,
    Failed(String),
}

pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) sender: Sender,
    pub(crate) at: Instant,
}

impl Engine {
    /// Moves the model to a thread of its own and starts serving.
    ///
    /// # Panics
    /// If the limits contradict each other or the operating system refuses a thread.
    pub fn start(runner: Box<dyn Runner>, limits: EngineLimits, metrics: EngineMetrics) -> Engine {
        Engine::start_with(Models { target: runner, draft: None }, limits, metrics)
    }

    /// The same, with a smaller `draft` model that guesses ahead of `runner`'s; the limits say
    /// [`Speculation::Draft`].
    ///
    /// # Panics
    /// If the two have different vocabularies.
    pub fn start_with_draft(
        runner: Box<dyn Runner>,
        draft: Box<dyn Runner>,
        limits: EngineLimits,
        metrics: EngineMetrics,
    ) -> Engine {
        assert_eq!(draft.shape().vocab, runner.shape().vocab, "a draft model needs the same vocabulary");
        Engine::start_with(Models { target: runner, draft: Some(draft) }, limits, metrics)
    }

    fn start_with(models: Models, limits: EngineLimits, metrics: EngineMetrics) -> Engine {
        let RunnerShape { vocab, n_blocks, block_tokens, context_max } = models.target.shape();
        assert!(limits.max_running > 0, "max_running is 0");
        assert!(limits.max_batch_tokens >= limits.max_running, "every running sequence must fit into a step");
        let context_max = context_max.min(n_blocks * block_tokens);
        let shared = Arc::new(Shared::new(n_blocks));
        let worker = Worker::new(models, limits.clone(), shared.clone(), metrics);
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || worker.run())
            .expect("the operating system gives a thread");
        let handle = Handle { shared, thread: Mutex::new(Some(thread)), limits, vocab, context_max };
        Engine { handle: Arc::new(handle) }
    }

    /// Queues a request, or says at once why not. Never waits for the model.
    pub fn submit(&self, request: Request) -> Result<Stream, SubmitError> {
        request::check(&request, self.handle.vocab, self.handle.context_max)?;
        let n_prompt = request.tokens.len();
        let mut state = self.handle.shared.lock();
        match &state.phase {
            Phase::Serving => (),
            Phase::Failed(why) => return Err(SubmitError::Unhealthy { why: why.clone() }),
            Phase::Draining | Phase::Stopping => return Err(SubmitError::Draining),
        }
        let limits = &self.handle.limits;
        let full = state.n_queued >= limits.queue_max_requests
            || state.n_queued_tokens + n_prompt > limits.queue_max_tokens;
        if full {
            let retry_after = retry_after(&state);
            return Err(SubmitError::QueueFull { retry_after });
        }
        let (sender, stream) = stream::channel();
        let at = clock::now();
        state.n_queued += 1;
        state.n_queued_tokens += n_prompt;
        state.n_unfinished += 1;
        state.submitted.push_back(Submission { request, sender, at });
        drop(state);
        self.handle.shared.work.notify_one();
        Ok(stream)
    }

    /// Prompt and new tokens together that a request may have: the model's context or the KV pool.
    pub fn context_max(&self) -> usize {
        self.handle.context_max
    }

    pub fn vocab(&self) -> usize {
        self.handle.vocab
    }

    pub fn limits(&self) -> &EngineLimits {
        &self.handle.limits
    }

    pub fn stats(&self) -> Stats {
        self.handle.shared.lock().stats.clone()
    }

    pub fn health(&self) -> Health {
        let state = self.handle.shared.lock();
        let step_time = state.step_started.map(|at| clock::now() - at);
        match &state.phase {
            Phase::Failed(why) => Health::Failed(why.clone()),
            _ if step_time > Some(self.handle.limits.step_time_max) => {
                Health::Stalled(step_time.unwrap_or_default())
            }
            Phase::Serving => Health::Ready,
            Phase::Draining | Phase::Stopping => Health::Draining,
        }
    }

    /// Refuses new requests from now on and waits until the accepted ones are done, `patience` at
    /// most. Returns whether all are done. Blocks: async callers use a blocking task.
    pub fn drain(&self, patience: Duration) -> bool {
        let shared = &self.handle.shared;
        let mut state = shared.lock();
        if state.phase == Phase::Serving {
            state.phase = Phase::Draining;
        }
        let waited = shared.idle.wait_timeout_while(state, patience, |s| s.n_unfinished > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.n_unfinished == 0
    }

    /// Ends every request with `Cancelled` at the next step, then ends the thread.
    pub fn stop(&self) {
        self.handle.stop();
    }
}

/// Time until the queue's tokens have been worked off at the recent speed, between 1 s and 60 s.
fn retry_after(state: &State) -> Duration {
    let tokens_per_second = state.stats.tokens_per_second.max(1.0);
    let seconds = state.n_queued_tokens as f64 / tokens_per_second;
    Duration::from_secs_f64(seconds.clamp(1.0, 60.0).ceil())
}

impl Handle {
    fn stop(&self) {
        let mut state = self.shared.lock();
        if !matches!(state.phase, Phase::Failed(_)) {
            state.phase = Phase::Stopping;
        }
        drop(state);
        self.shared.work.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread catches its panics and reports them as a failed phase.
            let _ended = thread.join();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn new(n_blocks: usize) -> Shared {
        let stats = Stats { n_blocks, ..Stats::default() };
        let state = State {
            submitted: VecDeque::new(),
            n_queued: 0,
            n_queued_tokens: 0,
            n_unfinished: 0,
            phase: Phase::Serving,
            step_started: None,
            stats,
        };
        Shared { state: Mutex::new(state), work: Condvar::new(), idle: Condvar::new() }
    }

    /// Every critical section leaves the state valid, so poison carries no news.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
