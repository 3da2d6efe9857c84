//! Scheduling through the engine's public surface: speculation, siblings, priorities, disconnects.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use engine::{
    Engine, EngineLimits, Event, FakeRunner, FinishReason, Request, Runner, RunnerError, RunnerShape,
    Sampling, Speculation, StepInput, Stream, Usage,
};
use telemetry::Metrics;

const VOCAB: usize = 23;

/// A model that looks at the last two tokens only, so that it soon repeats itself. `confusion` adds
/// some noise of its own: another model that mostly agrees.
fn repetitive(n_blocks: usize, confusion: u32) -> FakeRunner {
    FakeRunner::with_logits(VOCAB, n_blocks, 4, move |context, logits_v| {
        let last = context[context.len() - 1];
        let before = context[context.len().saturating_sub(2)];
        for (i, logit) in (0..).zip(logits_v) {
            let mix = |salt: u32| (last * 31 + before * 17 + i * 7 + salt).wrapping_mul(0x9E37_79B9) >> 8;
            *logit = mix(0) as f32 / (1 << 21) as f32 + (mix(99) % (confusion + 1)) as f32;
        }
    })
}

/// A model that does something before each step: waits for permission, or takes its time.
struct Before<F> {
    inner: FakeRunner,
    before: F,
}

fn gated(n_blocks: usize) -> (SyncSender<()>, Before<impl FnMut() + Send>) {
    let (permit, permits) = sync_channel(1000);
    // Once the test is over nobody holds the gate any more, and a test that failed must still end.
    let wait = move || {
        let _open = permits.recv_timeout(Duration::from_secs(20));
    };
    (permit, Before { inner: FakeRunner::new(VOCAB, n_blocks, 4), before: wait })
}

/// Each step takes a while, however many tokens it has: guesses cost next to nothing.
fn slow(inner: FakeRunner) -> Before<impl FnMut() + Send> {
    Before { inner, before: || std::thread::sleep(Duration::from_micros(500)) }
}

impl<F: FnMut() + Send> Runner for Before<F> {
    fn shape(&self) -> RunnerShape {
        self.inner.shape()
    }
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        (self.before)();
        self.inner.step(input)
    }
}

/// Greedy and warm, with and without penalties, some with log-probabilities, some that stop early.
fn request(i: u32) -> Request {
    let prompt = (0..5 + i * 3).map(|p| (p * p + i) % VOCAB as u32).collect();
    let mut request = Request::new(prompt, 30, Sampling { seed: i.into(), ..Sampling::default() });
    request.sampling.temperature = [0.0, 0.3, 1.0][i as usize % 3];
    request.sampling.frequency_penalty = if i % 4 == 3 { 0.5 } else { 0.0 };
    request.logprobs = i.is_multiple_of(5).then_some(2);
    request.stop_ids = if i.is_multiple_of(2) { vec![i % VOCAB as u32] } else { vec![] };
    request.min_tokens = 3;
    request
}

/// Every event of a stream.
fn events(mut stream: Stream) -> Vec<Event> {
    std::iter::from_fn(|| stream.recv()).collect()
}

fn usage_of(stream: Stream) -> Usage {
    match events(stream).pop() {
        Some(Event::Finished { usage, .. }) => usage,
        other => panic!("the end, not {other:?}"),
    }
}

fn start(runner: impl Runner + 'static, limits: EngineLimits) -> Engine {
    Engine::start(Box::new(runner), limits, Metrics::new().engine("test", 512))
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "never came true: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn guessing_ahead_changes_no_event() {
    let plain = start(repetitive(200, 0), EngineLimits::default());
    let expected: Vec<_> = (0..12).map(|i| events(plain.submit(request(i)).unwrap())).collect();
    // With few blocks preemption comes into it, too.
    for n_blocks in [200, 30] {
        let limits = |speculation| EngineLimits { speculation, ..EngineLimits::default() };
        let looking_up = start(slow(repetitive(n_blocks, 0)), limits(Speculation::PromptLookup { k_max: 8 }));
        let drafting = Engine::start_with_draft(
            Box::new(slow(repetitive(n_blocks, 0))),
            Box::new(repetitive(n_blocks, 2)),
            limits(Speculation::Draft { k_max: 8 }),
            Metrics::new().engine("test", 512),
        );
        for engine in [looking_up, drafting] {
            let streams: Vec<_> = (0..12).map(|i| engine.submit(request(i)).unwrap()).collect();
            for (stream, expected) in streams.into_iter().zip(&expected) {
                let mut events = events(stream);
                let end = events.pop();
                let cached = |usage: Usage| Usage { cached: 0, ..usage };
                match (end, &expected[expected.len() - 1]) {
                    (Some(Event::Finished { reason, usage }), Event::Finished { reason: r, usage: u }) => {
                        assert_eq!((&reason, cached(usage)), (r, cached(*u)));
                    }
                    other => panic!("two ends, not {other:?}"),
                }
                assert_eq!(events, expected[..expected.len() - 1]);
            }
            eventually("everything is given back", || engine.stats().n_blocks_used == 0);
            let stats = engine.stats();
            assert!(stats.accepted_tokens > 10, "{stats:?}");
            assert!(stats.draft_tokens > stats.accepted_tokens, "{stats:?}");
            assert_eq!(stats.n_preemptions > 0, n_blocks < 200, "{stats:?}");
        }
    }
}

#[test]
fn guesses_save_steps_and_are_counted() {
    let metrics = Metrics::new();
    let limits =
        EngineLimits { speculation: Speculation::PromptLookup { k_max: 8 }, ..EngineLimits::default() };
    let counting = FakeRunner::with_next(VOCAB, 64, 4, |context| (context[context.len() - 1] + 1) % 5);
    let engine = Engine::start(Box::new(slow(counting)), limits, metrics.engine("test", 512));
    let prompt = (0..20).map(|i| i % 5).collect();
    events(engine.submit(Request::new(prompt, 100, Sampling::greedy())).unwrap());
    eventually("it is idle", || engine.stats().n_running == 0);
    let stats = engine.stats();
    assert_eq!(stats.generation_tokens, 100);
    assert!(stats.n_steps < 40, "{} steps for 100 tokens", stats.n_steps);
    let text = metrics.render();
    let line = format!("accepted_tokens_total{{model_name=\"test\",engine=\"0\"}} {}", stats.accepted_tokens);
    assert!(text.contains(&line), "{text}");
}

#[test]
fn a_draft_model_that_fails_costs_only_the_guesses() {
    let expected = events(start(repetitive(64, 0), EngineLimits::default()).submit(request(1)).unwrap());
    let mut n_steps = 0;
    let failing = Before {
        inner: repetitive(64, 0),
        before: move || {
            n_steps += 1;
            assert!(n_steps < 4, "the draft tripped");
        },
    };
    let limits = EngineLimits { speculation: Speculation::Draft { k_max: 8 }, ..EngineLimits::default() };
    let metrics = Metrics::new().engine("test", 512);
    let engine =
        Engine::start_with_draft(Box::new(slow(repetitive(64, 0))), Box::new(failing), limits, metrics);
    assert_eq!(events(engine.submit(request(1)).unwrap()), expected);
    let why = engine.stats().draft_failure.expect("it failed");
    assert!(why.contains("the draft tripped"), "{why}");
}

#[test]
fn siblings_submitted_together_compute_their_prompt_once() {
    let metrics = Metrics::new();
    let (permit, runner) = gated(64);
    let engine = Engine::start(Box::new(runner), EngineLimits::default(), metrics.engine("test", 512));
    let first = Request::new(vec![1], 1, Sampling::greedy());
    let sibling = |seed| {
        let sampling = Sampling { seed, ..Sampling::default() };
        Request::new((0..18).collect(), 5, sampling)
    };
    let first = engine.submit(first).unwrap();
    eventually("the first one is at work", || engine.stats().n_running == 1);
    let siblings: Vec<_> = (0..4).map(|seed| engine.submit(sibling(seed)).unwrap()).collect();
    permit.send(()).unwrap();
    eventually("three wait for the fourth", || {
        let deferred = "waiting_by_reason{model_name=\"test\",engine=\"0\",reason=\"deferred\"} 3";
        metrics.render().contains(deferred)
    });
    drop(permit);
    let cached: Vec<_> = siblings.into_iter().map(|stream| usage_of(stream).cached).collect();
    assert_eq!(cached, [0, 17, 17, 17]);
    assert_eq!(usage_of(first).completion, 1);
}

#[test]
fn a_higher_priority_overtakes_the_queue() {
    let (permit, runner) = gated(64);
    let engine = start(runner, EngineLimits { max_running: 1, ..EngineLimits::default() });
    let request = |priority| {
        let mut request = Request::new(vec![1, 2], 2, Sampling::greedy());
        request.priority = priority;
        request
    };
    let low: Vec<_> = (0..3).map(|_| engine.submit(request(0)).unwrap()).collect();
    let high = engine.submit(request(1)).unwrap();
    // Enough for two requests: the one that may have begun before, and the high one.
    (0..4).for_each(|_| permit.send(()).unwrap());
    assert_eq!(usage_of(high).completion, 2);
    eventually("two of three are left", || {
        let stats = engine.stats();
        stats.n_steps == 4 && stats.n_running + stats.n_waiting == 2
    });
    drop(permit);
    low.into_iter().for_each(|stream| assert_eq!(usage_of(stream).completion, 2));
}

#[test]
fn a_deadline_passes_in_the_queue() {
    let (permit, runner) = gated(64);
    let engine = start(runner, EngineLimits { max_running: 1, ..EngineLimits::default() });
    let running = engine.submit(Request::new(vec![1], 50, Sampling::greedy())).unwrap();
    let mut late = Request::new(vec![1; 9], 50, Sampling::greedy());
    late.deadline = Some(Duration::from_millis(10));
    let late = engine.submit(late).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    (0..3).for_each(|_| permit.send(()).unwrap());
    let Some(Event::Finished { reason, usage }) = events(late).pop() else { panic!("an end") };
    assert_eq!((reason, usage.completion), (FinishReason::Deadline, 0));
    assert_eq!(engine.stats().n_running, 1);
    drop(permit);
    assert_eq!(usage_of(running).completion, 50);
}

#[test]
fn a_thousand_disconnects_at_any_stage_leave_nothing() {
    let metrics = Metrics::new();
    let limits = EngineLimits {
        max_running: 8,
        queue_max_requests: 2000,
        speculation: Speculation::PromptLookup { k_max: 4 },
        ..EngineLimits::default()
    };
    // Few blocks: some are disconnected while they are preempted.
    let engine = Engine::start(Box::new(repetitive(60, 0)), limits, metrics.engine("test", 512));
    let mut kept = Vec::new();
    for i in 0..1000u32 {
        let mut request = request(i % 12);
        request.tenant = ["a", "b", "c"][i as usize % 3].into();
        request.priority = (i % 5) as i8 - 2;
        request.deadline = (i % 7 == 0).then_some(Duration::from_millis(u64::from(i % 50)));
        request.prompt_logprobs = (i % 11 == 0).then_some(1);
        let mut stream = engine.submit(request).unwrap();
        // At once, after some tokens, or much later: in the queue or at work.
        (0..i * 7919 % 4).for_each(|_| drop(stream.recv()));
        if i % 3 == 0 {
            kept.push(stream);
        }
        if kept.len() > 20 {
            kept.remove((i % 20) as usize);
        }
    }
    drop(kept);
    assert!(engine.drain(Duration::from_secs(60)));
    let stats = engine.stats();
    assert_eq!((stats.n_running, stats.n_waiting, stats.n_deferred, stats.n_blocks_used), (0, 0, 0, 0));
    let text = metrics.render();
    for gauge in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        let line = format!("vllm:{gauge}{{model_name=\"test\",engine=\"0\"}} 0");
        assert!(text.lines().any(|l| l.starts_with(&line)), "{gauge} is not 0:\n{text}");
    }
}

/// Pearson's statistic of drawn ids against the probabilities that a model gives them.
fn chi_square(n_drawn: &[u32], p_v: &[f64]) -> f64 {
    let n = f64::from(n_drawn.iter().sum::<u32>());
    n_drawn.iter().zip(p_v).map(|(&drawn, p)| (f64::from(drawn) - n * p).powi(2) / (n * p)).sum()
}

fn id_of(event: &Event) -> Option<usize> {
    if let Event::Token { id, .. } = event { Some(*id as usize) } else { None }
}

/// Guesses of a model with another taste leave the probabilities of what is drawn as they are.
#[test]
fn drafts_do_not_change_the_distribution() {
    const IDS: usize = 6;
    const SEEDS: u64 = 400;
    const NEW_TOKENS: usize = 64;
    // At 5 degrees of freedom chance exceeds this once in 100,000 times, and the seeds are fixed.
    const CHI_SQUARE_MAX: f64 = 31.0;
    let flat = |i: usize, last: u32| (i as f32 * 0.4 + last as f32) % 1.5;
    let tilted = |i: usize, last: u32| (i as f32 * 0.4 + last as f32) % 1.5 + i as f32 * 0.15;
    let model = |logit_of: fn(usize, u32) -> f32| {
        FakeRunner::with_logits(IDS, 64, 4, move |context, logits_v| {
            let last = context[context.len() - 1];
            logits_v.iter_mut().enumerate().for_each(|(i, logit)| *logit = logit_of(i, last));
        })
    };
    let limits = EngineLimits { speculation: Speculation::Draft { k_max: 4 }, ..EngineLimits::default() };
    let metrics = Metrics::new().engine("test", 64);
    let engine =
        Engine::start_with_draft(Box::new(slow(model(flat))), Box::new(model(tilted)), limits, metrics);
    // How often an id followed each: the model looks at the last one only.
    let mut n_drawn = [[0; IDS]; IDS];
    for first in (0..SEEDS).step_by(8) {
        let request = |seed| Request::new(vec![1], NEW_TOKENS, Sampling { seed, ..Sampling::default() });
        let streams: Vec<_> = (first..first + 8).map(|seed| engine.submit(request(seed)).unwrap()).collect();
        for stream in streams {
            let ids: Vec<_> = events(stream).iter().filter_map(id_of).collect();
            assert_eq!(ids.len(), NEW_TOKENS);
            ids.windows(2).for_each(|pair| n_drawn[pair[0]][pair[1]] += 1);
        }
    }
    let stats = engine.stats();
    assert!(stats.accepted_tokens > 500 && stats.accepted_tokens < stats.draft_tokens, "{stats:?}");
    for (last, n_drawn) in (0..).zip(&n_drawn) {
        let weights: Vec<f64> = (0..IDS).map(|i| f64::from(flat(i, last)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let p_v: Vec<f64> = weights.iter().map(|w| w / sum).collect();
        let x = chi_square(n_drawn, &p_v);
        assert!(x < CHI_SQUARE_MAX, "after {last}: {n_drawn:?} against {p_v:?}: {x}");
        // The statistic would see the draft's own taste.
        let guesses: Vec<f64> = (0..IDS).map(|i| f64::from(tilted(i, last)).exp()).collect();
        let sum: f64 = guesses.iter().sum();
        assert!(chi_square(n_drawn, &guesses.iter().map(|w| w / sum).collect::<Vec<_>>()) > CHI_SQUARE_MAX);
    }
}
