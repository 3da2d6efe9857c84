//! What drawing a token costs: ns a row of logits, by sampling settings and size of the vocabulary.
//!
//! `cargo run --release -p engine --example bench_sampler`
//!
//! Measured through the engine over a model that computes nothing, so a row includes counting and sending its token.
//! The last column is the time to add up the same row once, at the speed of this machine's memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use engine::{Engine, EngineLimits, Event, Request, Runner, RunnerError, RunnerShape, Sampling, StepInput};
use telemetry::Metrics;

const STREAMS: usize = 32;
const ROUNDS: usize = 40;
const VOCABULARIES: [usize; 2] = [49_152, 262_144];

fn main() {
    for vocab in VOCABULARIES {
        let engine = start(vocab);
        let floor = read_once(vocab);
        println!("{vocab} ids, {STREAMS} rows a step | ns a row | reads of the row | one read {floor:.0} ns");
        for (name, request) in cases() {
            let ns = (0..ROUNDS).map(|_| round(&engine, &request)).fold(f64::MAX, f64::min);
            println!("{name:>24} | {ns:9.0} | {:6.2}", ns / floor);
        }
    }
}

fn cases() -> Vec<(&'static str, Request)> {
    let plain = || Sampling { seed: 3, ..Sampling::default() };
    let request = |sampling| Request::new(vec![1, 2, 3], 4, sampling);
    let scored = |sampling| Request { logprobs: Some(5), ..request(sampling) };
    vec![
        ("greedy", request(Sampling::greedy())),
        ("temperature", request(plain())),
        ("top_k 40", request(Sampling { top_k: 40, ..plain() })),
        ("top_p 0.95", request(Sampling { top_p: 0.95, ..plain() })),
        ("typical_p 0.9", request(Sampling { typical_p: 0.9, ..plain() })),
        ("min_p 0.05", request(Sampling { min_p: 0.05, ..plain() })),
        ("top_k, top_p, 0.7", request(Sampling { top_k: 40, top_p: 0.9, temperature: 0.7, ..plain() })),
        ("repetition 1.1", request(Sampling { repetition_penalty: 1.1, ..plain() })),
        ("greedy, 5 logprobs", scored(Sampling::greedy())),
    ]
}

fn start(vocab: usize) -> Engine {
    let limits = EngineLimits { prefix_cache: false, ..EngineLimits::default() };
    Engine::start(Box::new(Constant::new(vocab)), limits, Metrics::new().engine("bench", 512))
}

/// ns a row of one batch of equal requests: what the engine's own clock says about drawing.
fn round(engine: &Engine, request: &Request) -> f64 {
    let before = engine.stats();
    let streams: Vec<_> =
        (0..STREAMS).map(|_| engine.submit(request.clone()).expect("there is room")).collect();
    for mut stream in streams {
        while !matches!(stream.recv(), Some(Event::Finished { .. }) | None) {}
    }
    let after = engine.stats();
    let n_rows = after.generation_tokens - before.generation_tokens;
    (after.sample_time - before.sample_time).as_nanos() as f64 / n_rows as f64
}

/// ns to sum one of `STREAMS` rows, taken in turn, as the sampler meets them.
fn read_once(vocab: usize) -> f64 {
    let rows = Constant::new(vocab).logits_rv;
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for row in rows.chunks(vocab) {
            let mut sums = [0.0f32; 64];
            let lanes = row.as_chunks::<64>().0;
            lanes.iter().for_each(|chunk| (0..64).for_each(|lane| sums[lane] += chunk[lane]));
            black_box(sums);
        }
        best = best.min(start.elapsed());
    }
    best.as_nanos() as f64 / STREAMS as f64
}

/// The same rows at every step: a few peaks over a broad floor, like a model's.
struct Constant {
    vocab: usize,
    logits_rv: Vec<f32>,
}

impl Constant {
    fn new(vocab: usize) -> Constant {
        let noise = |i: usize| (i.wrapping_mul(0x9E37_79B9) >> 7 & 0xffff) as f32 / 65_536.0 + 1e-6;
        let logits_rv = (0..STREAMS * vocab).map(|i| -(-noise(i).ln()).ln() * 1.7).collect();
        Constant { vocab, logits_rv }
    }
}

impl Runner for Constant {
    fn shape(&self) -> RunnerShape {
        RunnerShape { vocab: self.vocab, n_blocks: 1024, block_tokens: 16, context_max: 1024 }
    }
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        Ok(&self.logits_rv[..input.n_logits() * self.vocab])
    }
}
