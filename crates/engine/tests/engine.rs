//! The engine through its public surface, over a model that betrays wrong block tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use engine::{
    Constraint, Continuation, Engine, EngineLimits, Event, FakeRunner, FinishReason, Health, Request, Runner,
    RunnerError, RunnerShape, Sampling, Speculation, StepInput, Stream, SubmitError, Usage,
};
use telemetry::Metrics;

const VOCAB: usize = 97;

fn start(runner: impl Runner + 'static, limits: EngineLimits) -> Engine {
    Engine::start(Box::new(runner), limits, Metrics::new().engine("test", 512))
}

fn fake() -> FakeRunner {
    FakeRunner::new(VOCAB, 64, 4)
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request::new(prompt.to_vec(), max_tokens, Sampling { seed: 7, ..Sampling::default() })
}

/// Reads a stream to its end.
fn collect(mut stream: Stream) -> (Vec<u32>, FinishReason, Usage) {
    let mut ids = Vec::new();
    while let Some(event) = stream.recv() {
        match event {
            Event::Token { id, .. } => ids.push(id),
            Event::Finished { reason, usage } => {
                assert_eq!(stream.recv(), None);
                return (ids, reason, usage);
            }
            Event::PromptLogprobs(_) => (),
        }
    }
    panic!("the stream ended without an end");
}

/// What the model gives alone, in steps of any size: the reference for every schedule.
fn alone(request: Request) -> (Vec<u32>, FinishReason, Usage) {
    let engine = start(fake(), EngineLimits::default());
    collect(engine.submit(request).unwrap())
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "never came true: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A model that waits for permission before each step.
struct Gated<R> {
    inner: R,
    permits: Receiver<()>,
}

fn gated<R: Runner>(inner: R) -> (SyncSender<()>, Gated<R>) {
    let (permit, permits) = sync_channel(1000);
    (permit, Gated { inner, permits })
}

impl<R: Runner> Runner for Gated<R> {
    fn shape(&self) -> RunnerShape {
        self.inner.shape()
    }
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        // Once the test is over nobody holds the gate any more.
        let _open = self.permits.recv();
        self.inner.step(input)
    }
}

#[test]
fn the_same_request_gives_the_same_tokens_whatever_runs_beside_it() {
    let make = |i: u32| {
        let prompt: Vec<u32> = (0..3 + i * 5).map(|p| (p * 31 + i) % VOCAB as u32).collect();
        let mut request = request(&prompt, 8 + i as usize);
        request.sampling.seed = u64::from(i);
        request.sampling.top_p = if i < 6 { 0.8 } else { 1.0 };
        request.sampling.repetition_penalty = 1.1;
        request
    };
    let expected: Vec<_> = (0..12).map(|i| alone(make(i)).0).collect();
    // 64 blocks of 4 tokens hold 256; the twelve need 500, so they are preempted; chunks of 5 tokens.
    for prefix_cache in [false, true] {
        let limits = EngineLimits {
            max_batch_tokens: 12,
            max_running: 12,
            max_prefill_beside_decode: 5,
            prefix_cache,
            ..EngineLimits::default()
        };
        let engine = start(fake(), limits);
        let streams: Vec<_> = (0..12).map(|i| engine.submit(make(i)).unwrap()).collect();
        for (stream, expected) in streams.into_iter().zip(&expected) {
            let (ids, reason, usage) = collect(stream);
            assert_eq!(&ids, expected);
            assert_eq!(reason, FinishReason::Length);
            assert_eq!(usage.completion, ids.len());
        }
        eventually("gauges return to 0", || {
            let stats = engine.stats();
            (stats.n_running, stats.n_waiting, stats.n_blocks_used) == (0, 0, 0)
        });
    }
}

#[test]
fn a_prefix_hit_is_reported_and_changes_nothing() {
    let engine = start(fake(), EngineLimits::default());
    let prompt: Vec<u32> = (0..22).collect();
    let (first, _, usage) = collect(engine.submit(request(&prompt, 6)).unwrap());
    assert_eq!(usage.cached, 0);
    let (second, _, usage) = collect(engine.submit(request(&prompt, 6)).unwrap());
    // All but the last token: five blocks of 4 are shared and one token of the sixth is copied.
    assert_eq!((usage.cached, usage.prompt), (21, 22));
    assert_eq!(first, second);
    let other_tenant = Request { tenant: "other".into(), ..request(&prompt, 6) };
    let (third, _, usage) = collect(engine.submit(other_tenant).unwrap());
    assert_eq!((usage.cached, third), (0, first));
}

#[test]
fn stop_ids_end_and_are_not_sent() {
    let counting = || FakeRunner::with_next(VOCAB, 8, 4, |context| context[context.len() - 1] + 1);
    let engine = start(counting(), EngineLimits::default());
    let mut stopping = request(&[10], 9);
    stopping.stop_ids = vec![14];
    let (ids, reason, usage) = collect(engine.submit(stopping.clone()).unwrap());
    assert_eq!((ids, reason, usage.completion), (vec![11, 12, 13], FinishReason::Stop, 4));

    stopping.ignore_eos = true;
    let (ids, reason, _) = collect(engine.submit(stopping.clone()).unwrap());
    assert_eq!((ids, reason), ((11..20).collect(), FinishReason::Length));

    stopping.ignore_eos = false;
    stopping.min_tokens = 6;
    let (ids, ..) = collect(engine.submit(stopping).unwrap());
    assert!(ids.len() >= 5 && ids[3] != 14, "{ids:?}");
}

#[test]
fn logprobs_of_prompt_and_output_come_with_the_tokens() {
    let uniform = FakeRunner::with_logits(4, 8, 4, |_, logits_v| logits_v.fill(1.5));
    let engine = start(uniform, EngineLimits { max_batch_tokens: 32, ..EngineLimits::default() });
    let mut scored = request(&[0, 1, 2, 3, 0, 1, 2, 3, 0], 2);
    scored.logprobs = Some(2);
    scored.prompt_logprobs = Some(1);
    let mut stream = engine.submit(scored.clone()).unwrap();
    let quarter = -(4f32.ln());
    let is_quarter = |x: f32| (x - quarter).abs() < 1e-6;
    let Some(Event::PromptLogprobs(prompt)) = stream.recv() else { panic!("the prompt comes first") };
    assert_eq!(prompt.len(), 9);
    assert!(prompt[0].is_none());
    assert!(prompt[1..].iter().all(|p| is_quarter(p.as_ref().unwrap().logprob)));
    let Some(Event::Token { logprobs: Some(logprobs), .. }) = stream.recv() else { panic!("a token") };
    assert!(is_quarter(logprobs.logprob));
    assert_eq!(logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);

    scored.max_tokens = 0;
    let mut stream = engine.submit(scored).unwrap();
    assert!(matches!(stream.recv(), Some(Event::PromptLogprobs(prompt)) if prompt.len() == 9));
    assert!(matches!(stream.recv(), Some(Event::Finished { reason: FinishReason::Length, .. })));
}

#[test]
fn dropping_the_stream_frees_the_slot_at_the_next_step() {
    let (permit, runner) = gated(fake());
    let engine = start(runner, EngineLimits { max_running: 1, ..EngineLimits::default() });
    let mut first = engine.submit(request(&[1, 2, 3], 100)).unwrap();
    let second = engine.submit(request(&[4], 1)).unwrap();
    permit.send(()).unwrap();
    assert!(matches!(first.recv(), Some(Event::Token { .. })));
    drop(first);
    // At most the step in flight belongs to the dropped one; the next is the second's.
    permit.send(()).unwrap();
    permit.send(()).unwrap();
    assert_eq!(collect(second).2.completion, 1);
    eventually("nothing is left", || engine.stats().n_blocks_used == 0);
}

#[test]
fn a_thousand_disconnects_leave_every_gauge_at_0() {
    let metrics = Metrics::new();
    let limits = EngineLimits { queue_max_requests: 2000, ..EngineLimits::default() };
    let engine = Engine::start(Box::new(fake()), limits, metrics.engine("test", 512));
    for i in 0..1000 {
        let mut stream = engine.submit(request(&[i % 90, 1, 2, 3, 4, 5], 50)).unwrap();
        if i % 3 == 0 {
            stream.recv();
        }
    }
    assert!(engine.drain(Duration::from_secs(10)));
    let stats = engine.stats();
    assert_eq!((stats.n_running, stats.n_waiting, stats.n_blocks_used), (0, 0, 0));
    let text = metrics.render();
    for gauge in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        let line = format!("vllm:{gauge}{{model_name=\"test\",engine=\"0\"}} 0");
        assert!(text.lines().any(|l| l.starts_with(&line)), "{gauge} is not 0:\n{text}");
    }
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let (permit, runner) = gated(fake());
    let limits = EngineLimits {
        max_running: 1,
        queue_max_requests: 2,
        queue_max_tokens: 20,
        ..EngineLimits::default()
    };
    let engine = start(runner, limits);
    let running = engine.submit(request(&[1], 1)).unwrap();
    eventually("the first one left the queue", || engine.stats().n_running == 1);
    // The probe answers although the model hangs in its step.
    assert_eq!(engine.health(), Health::Ready);
    let waiting = engine.submit(request(&[1; 15], 1)).unwrap();
    let is_full =
        |prompt: &[u32]| matches!(engine.submit(request(prompt, 1)), Err(SubmitError::QueueFull { .. }));
    assert!(is_full(&[1; 6]), "21 tokens would wait");
    let also_waiting = engine.submit(request(&[1; 5], 1)).unwrap();
    assert!(is_full(&[1]), "three would wait");
    (0..10).for_each(|_| permit.send(()).unwrap());
    assert_eq!(collect(running).1, FinishReason::Length);
    assert_eq!(collect(waiting).1, FinishReason::Length);
    assert_eq!(collect(also_waiting).1, FinishReason::Length);
    let Err(SubmitError::QueueFull { retry_after }) = engine.submit(request(&[0; 21], 1)) else {
        panic!("21 tokens do not fit");
    };
    assert!(retry_after >= Duration::from_secs(1));
    assert!(engine.submit(request(&[5; 20], 1)).is_ok());
}

#[test]
fn a_deadline_ends_a_request_that_waits_or_runs() {
    let (permit, runner) = gated(fake());
    let engine = start(runner, EngineLimits::default());
    let mut late = request(&[1, 2], 50);
    late.deadline = Some(Duration::from_millis(20));
    let stream = engine.submit(late).unwrap();
    std::thread::sleep(Duration::from_millis(40));
    (0..3).for_each(|_| permit.send(()).unwrap());
    let (ids, reason, _) = collect(stream);
    assert_eq!(reason, FinishReason::Deadline);
    assert!(ids.len() < 50);
}

#[test]
fn draining_finishes_what_runs_and_refuses_what_comes() {
    let (permit, runner) = gated(fake());
    let engine = start(runner, EngineLimits::default());
    let stream = engine.submit(request(&[1, 2], 5)).unwrap();
    assert!(!engine.drain(Duration::from_millis(10)));
    assert_eq!(engine.health(), Health::Draining);
    assert_eq!(engine.submit(request(&[1], 1)).err(), Some(SubmitError::Draining));
    (0..10).for_each(|_| permit.send(()).unwrap());
    assert!(engine.drain(Duration::from_secs(10)));
    assert_eq!(collect(stream).1, FinishReason::Length);
}

#[test]
fn a_step_that_does_not_return_shows_as_a_stall() {
    let (permit, runner) = gated(fake());
    let step_time_max = Duration::from_millis(20);
    let engine = start(runner, EngineLimits { step_time_max, ..EngineLimits::default() });
    let stream = engine.submit(request(&[1], 1)).unwrap();
    eventually("the stall is seen", || matches!(engine.health(), Health::Stalled(_)));
    permit.send(()).unwrap();
    collect(stream);
    eventually("it is over", || engine.health() == Health::Ready);
}

#[test]
fn stopping_cancels_what_runs() {
    let engine = start(fake(), EngineLimits::default());
    let streams: Vec<_> = (0..5).map(|i| engine.submit(request(&[i], 250)).unwrap()).collect();
    engine.stop();
    for stream in streams {
        assert!(matches!(collect(stream).1, FinishReason::Cancelled | FinishReason::Length));
    }
    assert_eq!(engine.submit(request(&[1], 1)).err(), Some(SubmitError::Draining));
}

/// A model that panics or fails while a switch is on.
struct Breaking {
    inner: FakeRunner,
    is_broken: Arc<AtomicBool>,
    panics: bool,
}

impl Runner for Breaking {
    fn shape(&self) -> RunnerShape {
        self.inner.shape()
    }
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        match self.is_broken.load(Ordering::SeqCst) {
            true if self.panics => panic!("the kernel tripped"),
            true => Err(RunnerError("the kernel tripped".into())),
            false => self.inner.step(input),
        }
    }
}

#[test]
fn a_broken_step_ends_its_sequences_and_the_next_request_works() {
    for panics in [false, true] {
        let is_broken = Arc::new(AtomicBool::new(false));
        let breaking = Breaking { inner: fake(), is_broken: is_broken.clone(), panics };
        let engine = start(breaking, EngineLimits::default());
        let nine = || request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 5);
        let (expected, ..) = collect(engine.submit(nine()).unwrap());
        is_broken.store(true, Ordering::SeqCst);
        let (ids, reason, _) = collect(engine.submit(nine()).unwrap());
        let FinishReason::Error(why) = reason else { panic!("it broke") };
        assert!(ids.is_empty() && why.contains("the kernel tripped"), "{why}");
        is_broken.store(false, Ordering::SeqCst);
        assert_eq!(engine.health(), Health::Ready);
        let (ids, _, usage) = collect(engine.submit(nine()).unwrap());
        // What was cached before the failure is no longer trusted.
        assert_eq!((ids, usage.cached), (expected, 0));

        is_broken.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            let stream = engine.submit(request(&[1], 1)).unwrap();
            assert!(matches!(collect(stream).1, FinishReason::Error(_)));
        }
        eventually("the engine gives up", || matches!(engine.health(), Health::Failed(_)));
        let refused = engine.submit(request(&[1], 1));
        assert!(matches!(refused, Err(SubmitError::Unhealthy { why }) if why.contains("3 steps in a row")));
    }
}

#[test]
fn a_logit_that_is_not_a_number_ends_only_its_own_sequence() {
    let sick = FakeRunner::with_logits(8, 64, 4, |context, logits_v| {
        logits_v.fill(0.0);
        logits_v[3] = if context[0] == 5 { f32::NAN } else { 9.0 };
    });
    let engine = start(sick, EngineLimits::default());
    let healthy = engine.submit(Request::new(vec![1], 20, Sampling::greedy())).unwrap();
    let sick = engine.submit(Request::new(vec![5], 20, Sampling::greedy())).unwrap();
    let FinishReason::Error(why) = collect(sick).1 else { panic!("NaN cannot be drawn from") };
    assert!(why.contains("not a number"), "{why}");
    assert_eq!(collect(healthy).0, [3; 20]);
}

#[test]
fn what_cannot_fit_is_refused_at_submission() {
    let engine = start(fake(), EngineLimits::default());
    assert_eq!(engine.context_max(), 256);
    let refused = engine.submit(request(&[1; 200], 57)).err();
    assert_eq!(refused, Some(SubmitError::TooLong { n_prompt: 200, max_tokens: 57, context_max: 256 }));
    let (ids, reason, _) = collect(engine.submit(request(&[1; 200], 56)).unwrap());
    assert_eq!((ids.len(), reason), (56, FinishReason::Length));
}

/// Allows `script[i]` as the output's token `i`, then nothing.
#[derive(Clone, Debug)]
struct Script {
    script: Vec<Vec<u32>>,
    at: usize,
    bits: Vec<u32>,
}

impl Script {
    fn new(script: &[&[u32]]) -> Box<Script> {
        let mut new = Script { script: script.iter().map(|ids| ids.to_vec()).collect(), at: 0, bits: vec![] };
        new.look();
        Box::new(new)
    }

    fn look(&mut self) {
        self.bits = vec![0; VOCAB.div_ceil(32)];
        let allowed = self.script.get(self.at).into_iter().flatten();
        allowed.for_each(|&id| self.bits[id as usize / 32] |= 1 << (id % 32));
    }
}

impl Constraint for Script {
    fn allowed(&self) -> &[u32] {
        &self.bits
    }
    fn commit(&mut self, id: u32) -> Result<Continuation, String> {
        if id == 66 {
            return Err("66 is too much".into());
        }
        assert!(self.script[self.at].contains(&id), "{id} is not allowed at {}", self.at);
        self.at += 1;
        self.look();
        Ok(if self.at == self.script.len() { Continuation::Complete } else { Continuation::Open })
    }
    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[test]
fn a_constraint_steers_and_ends_the_output() {
    let engine = start(fake(), EngineLimits::default());
    let constrained = |script: &[&[u32]]| Request {
        constraint: Some(Script::new(script)),
        stop_ids: vec![3],
        ..request(&[1, 2, 3], 10)
    };
    let run = |request: Request| collect(engine.submit(request).unwrap());
    let open: &[u32] = &[10, 40, 96];
    // Complete: it ends without a stop id.
    let (ids, reason, usage) = run(constrained(&[open, &[5], open]));
    assert_eq!((ids.len(), reason, usage.completion), (3, FinishReason::Stop, 3));
    assert!(open.contains(&ids[0]) && ids[1] == 5 && open.contains(&ids[2]));
    // A copy starts from the beginning, not from where another request left it.
    let again = constrained(&[open, &[5], open]);
    assert_eq!(run(again.clone()).0, run(again).0);
    // A stop id the grammar allows ends it as ever, and max_tokens does, too.
    assert_eq!(run(constrained(&[open, &[3], open])).1, FinishReason::Stop);
    assert_eq!(run(Request { max_tokens: 2, ..constrained(&[open, open, open]) }).1, FinishReason::Length);
    // min_tokens holds as long as anything else is allowed.
    let short = |script| Request { min_tokens: 4, ..constrained(script) };
    assert_eq!(run(short(&[&[3, 5], &[3, 6], &[3]])).0, [5, 6]);
    // A constraint that gives up ends its own sequence, nobody else's.
    let (ids, reason, _) = run(constrained(&[open, &[66], open]));
    assert_eq!((ids.len(), reason), (2, FinishReason::Constraint("66 is too much".into())));
    assert_eq!(run(constrained(&[open])).1, FinishReason::Stop);
}

#[test]
fn constrained_output_is_the_same_beside_others_and_after_preemption() {
    let many: Vec<u32> = (0..VOCAB as u32).filter(|id| id % 3 == 0).collect();
    let make = |i: u32| {
        let prompt: Vec<u32> = (0..3 + i * 5).map(|p| (p * 31 + i) % VOCAB as u32).collect();
        let script = vec![many.as_slice(); 8 + i as usize];
        let constraint: Option<Box<dyn Constraint>> = i.is_multiple_of(2).then(|| Script::new(&script) as _);
        Request { constraint, ..request(&prompt, 30) }
    };
    let expected: Vec<_> = (0..8).map(|i| alone(make(i)).0).collect();
    for speculation in [Speculation::Off, Speculation::PromptLookup { k_max: 4 }] {
        // 64 blocks of 4 tokens do not hold the eight at once.
        let limits =
            EngineLimits { max_batch_tokens: 12, max_running: 12, speculation, ..EngineLimits::default() };
        let engine = start(fake(), limits);
        let streams: Vec<_> = (0..8).map(|i| engine.submit(make(i)).unwrap()).collect();
        let outputs: Vec<_> = streams.into_iter().map(|stream| collect(stream).0).collect();
        assert_eq!(outputs, expected, "{speculation:?}");
        assert!(outputs.iter().step_by(2).flatten().all(|id| many.contains(id)));
    }
}
