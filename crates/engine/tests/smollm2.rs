//! A real model behind the engine: the same tokens alone, in a batch of 32, in chunks, after preemption,
//! with a prefix hit and with guesses. Skipped, loudly, where the model file has not been fetched.

use std::path::PathBuf;
use std::sync::Arc;

use engine::{
    Engine, EngineLimits, Event, FinishReason, ModelRunner, Request, Runner, RunnerError, RunnerShape,
    Sampling, Speculation, StepInput, Stream, Usage,
};
use model::{BLOCK_TOKENS, KvType, Transformer};
use telemetry::Metrics;
use tensor::Pool;

/// The chat prompt "What is the capital of France?", with the default system message.
const FRANCE: [u32; 37] = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
    2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
];
/// "The capital of France is Paris." and the stop id, with their log-probabilities: llama.cpp's greedy
/// answer when it computes with the same weights in f32.
const PARIS: [(u32, f32); 8] = [
    (504, -1.882_597),
    (3575, -0.019_568),
    (282, -0.011_42),
    (4649, -0.010_842),
    (314, -0.038_746),
    (7042, -0.049_895),
    (30, -0.565_555),
    (2, -0.257_647),
];

fn model_file() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join("var/cache/smollm2-135m-instruct-q4_1.gguf");
    if path.is_file() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is missing; `./run` fetches it", path.display());
    None
}

fn runner(n_blocks: usize, kv_type: KvType) -> Option<ModelRunner> {
    let pool = Arc::new(Pool::new(2));
    let weights = model::gguf::read(&model_file()?).expect("the model file is good").weights;
    let llama = Transformer::new(weights, &pool).expect("the model is good");
    let kv_bytes = n_blocks * llama.kv_block_bytes(kv_type);
    Some(ModelRunner::new(llama, pool, kv_type, kv_bytes, 8).expect("blocks fit"))
}

const N_NEW: usize = 36;

/// Prompts of different lengths, some greedy; all but the first are invented. The second repeats itself,
/// so that what follows can be looked up.
fn request(i: u32) -> Request {
    let prompt = match i {
        0 => FRANCE.to_vec(),
        1 => FRANCE[20..].repeat(2),
        i => (0..10 + 23 * (i % 4)).map(|p| (p * 7919 + i * 131) % 49_152).collect(),
    };
    let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.7 };
    // Those that only make the batch large are short.
    let n_new = if i < 4 { N_NEW } else { 8 };
    Request::new(
        prompt,
        n_new,
        Sampling { temperature, top_p: 0.95, seed: u64::from(i), ..Sampling::default() },
    )
}

fn collect(mut stream: Stream) -> (Vec<u32>, Usage) {
    let mut ids = Vec::new();
    while let Some(event) = stream.recv() {
        match event {
            Event::Token { id, .. } => ids.push(id),
            Event::Finished { reason, usage } => {
                assert_eq!(reason, FinishReason::Length);
                return (ids, usage);
            }
            Event::PromptLogprobs(_) => (),
        }
    }
    panic!("the stream ended without an end");
}

fn start(runner: Box<dyn Runner>, limits: EngineLimits) -> Engine {
    Engine::start(runner, limits, Metrics::new().engine("smollm2", 2048))
}

#[test]
fn greedy_decoding_gives_the_reference_answer() {
    let Some(runner) = runner(16, KvType::F32) else { return };
    let engine = start(Box::new(runner), EngineLimits::default());
    let mut france = Request::new(FRANCE.to_vec(), 20, Sampling::greedy());
    // The last of them ends the answer, but here it is to be seen.
    france.stop_ids = vec![2];
    france.ignore_eos = true;
    france.max_tokens = PARIS.len();
    france.logprobs = Some(1);
    let mut stream = engine.submit(france).unwrap();
    for (id, logprob) in PARIS {
        let Some(Event::Token { id: found, logprobs: Some(logprobs) }) = stream.recv() else {
            panic!("a token with its log-probability");
        };
        assert_eq!((found, logprobs.top[0].0), (id, id));
        // Inputs of 16 bits move it in the third digit after the point; keys and values of bf16
        // would move it in the second.
        assert!((logprobs.logprob - logprob).abs() < 5e-3, "{} instead of {logprob}", logprobs.logprob);
    }
}

/// A draft model that is often wrong: its logits are turned by one id in every other step.
struct Careless {
    inner: ModelRunner,
    logits_rv: Vec<f32>,
    /// That had logits.
    n_steps: usize,
}

impl Runner for Careless {
    fn shape(&self) -> RunnerShape {
        self.inner.shape()
    }
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        self.logits_rv.clear();
        self.logits_rv.extend_from_slice(self.inner.step(input)?);
        if !self.logits_rv.is_empty() {
            self.n_steps += 1;
            self.logits_rv.rotate_right(self.n_steps % 2);
        }
        Ok(&self.logits_rv)
    }
}

/// Submits the first `n` requests at once and compares the first four with what they give alone.
fn check_together(engine: &Engine, n: u32, expected: &[Vec<u32>], how: &str) {
    let streams: Vec<_> = (0..n).map(|i| engine.submit(request(i)).unwrap()).collect();
    let ids: Vec<_> = streams.into_iter().map(|stream| collect(stream).0).collect();
    for (i, (ids, expected)) in ids.iter().zip(expected).enumerate() {
        assert_eq!(ids, expected, "request {i} {how}");
    }
}

#[test]
fn schedules_change_nothing_about_the_tokens() {
    let Some(alone) = runner(256, KvType::Bf16) else { return };
    let another = |n_blocks| Box::new(runner(n_blocks, KvType::Bf16).expect("it was there a moment ago"));
    let engine = start(Box::new(alone), EngineLimits { prefix_cache: false, ..EngineLimits::default() });
    let expected: Vec<_> = (0..4).map(|i| collect(engine.submit(request(i)).unwrap()).0).collect();
    check_together(&engine, 32, &expected, "in a batch of 32");
    drop(engine);

    // The longest needs 79 + 36 tokens; together they need twice the pool, so some are preempted.
    // At most 24 tokens a step cut the longer prompts into chunks.
    let limits = EngineLimits { max_running: 4, max_batch_tokens: 24, ..EngineLimits::default() };
    let engine = start(another(128 / BLOCK_TOKENS), limits);
    check_together(&engine, 4, &expected, "preempted");
    assert!(engine.stats().n_preemptions > 0, "nothing was preempted: {:?}", engine.stats());
    collect(engine.submit(request(3)).unwrap());
    let (ids, again) = collect(engine.submit(request(3)).unwrap());
    // All but the last token: the last block is filled in part, and copied.
    assert_eq!(again.cached, again.prompt - 1);
    assert_eq!(ids, expected[3], "after a prefix hit");
    drop(engine);

    let limits = |speculation| EngineLimits { speculation, ..EngineLimits::default() };
    let engine = start(another(64), limits(Speculation::PromptLookup { k_max: 8 }));
    check_together(&engine, 4, &expected, "with prompt look-up");
    assert!(engine.stats().draft_tokens > 0, "nothing was guessed: {:?}", engine.stats());
    drop(engine);

    let careless = Careless { inner: *another(64), logits_rv: Vec::new(), n_steps: 0 };
    let metrics = Metrics::new().engine("smollm2", 2048);
    let limits = limits(Speculation::Draft { k_max: 4 });
    let engine = Engine::start_with_draft(another(64), Box::new(careless), limits, metrics);
    check_together(&engine, 4, &expected, "with a draft model");
    let stats = engine.stats();
    assert!(stats.accepted_tokens > 0 && stats.accepted_tokens < stats.draft_tokens, "{stats:?}");
}
