//! Tokens a second of a model behind the engine, for 1, 8 and 32 streams, and what the engine adds to each step.
//!
//! `cargo run --release -p engine --example bench_engine -- MODEL [THREADS] [PROMPT_TOKENS] [NEW_TOKENS]`
//!
//! Before anything is timed, it checks that a request gives the same tokens alone and beside 31 others.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Engine, EngineLimits, Event, ModelRunner, Request, Sampling, Stats, Stream};
use telemetry::Metrics;
use tensor::Pool;

const STREAMS: [usize; 3] = [1, 8, 32];
const ROUNDS: usize = 3;
/// Of each client in a closed loop.
const ANSWERS: usize = 2;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: bench_engine MODEL [THREADS] [PROMPT_TOKENS] [NEW_TOKENS]")?;
    let mut number = |default: usize| args.next().map_or(Ok(default), |arg| arg.parse());
    let (n_threads, n_prompt, n_new) = (number(2)?, number(128)?, number(128)?);
    let engine = start(Path::new(&path), n_threads, n_prompt + n_new)?;
    check(&engine, n_prompt)?;
    println!("{n_prompt} tokens in, {n_new} out, greedy | best of {ROUNDS} rounds");
    println!(
        "streams |  all tok/s | decode tok/s | TTFT p50 / max ms | gap p50 / p99 ms | us a step: plan  draw | loop tok/s"
    );
    for n_streams in STREAMS {
        let rounds = (0..ROUNDS).map(|round| Round::run(&engine, n_streams, n_prompt, n_new, round));
        let best = rounds.min_by_key(|round| round.wall).expect("at least one round");
        let in_loop = (0..ROUNDS).map(|round| closed_loop(&engine, n_streams, n_prompt, n_new, round));
        best.print(n_streams, in_loop.fold(0.0, f64::max));
    }
    Ok(())
}

fn start(path: &Path, n_threads: usize, n_context: usize) -> Result<Engine, Failure> {
    let loaded_at = Instant::now();
    let pool = Arc::new(Pool::new(n_threads));
    let loaded = model::load(path)?;
    let llama = model::Transformer::new(loaded.weights, &pool)?;
    println!(
        "{}: {:.0} MB of weights, ready after {:.2} s, {n_threads} threads, {}",
        path.display(),
        llama.weight_bytes() as f64 / 1e6,
        loaded_at.elapsed().as_secs_f64(),
        tensor::cpu::describe(),
    );
    let limits = EngineLimits { prefix_cache: false, ..EngineLimits::default() };
    let blocks_per_stream = n_context.div_ceil(model::BLOCK_TOKENS) + 2;
    let kv_bytes = blocks_per_stream * 32 * llama.kv_block_bytes(model::KvType::Bf16);
    let runner = ModelRunner::new(llama, pool, model::KvType::Bf16, kv_bytes, limits.max_running)?;
    Ok(Engine::start(Box::new(runner), limits, Metrics::new().engine("bench", n_context)))
}

/// The prompt of stream `i`: ids spread over the vocabulary.
fn request(engine: &Engine, i: usize, n_prompt: usize, n_new: usize) -> Request {
    let vocab = engine.vocab();
    let tokens = (0..n_prompt).map(|p| ((p * 7919 + i * 104_729 + 17) % vocab) as u32).collect();
    let mut request = Request::new(tokens, n_new, Sampling::greedy());
    request.ignore_eos = true;
    request
}

fn check(engine: &Engine, n_prompt: usize) -> Result<(), Failure> {
    let run = |n: usize| -> Result<Vec<u32>, Failure> {
        let submit = |i| engine.submit(request(engine, i, n_prompt, 16));
        let streams = (0..n).map(submit).collect::<Result<Vec<_>, _>>()?;
        let outcomes: Vec<_> =
            streams.into_iter().map(|stream| Timeline::read(stream, Instant::now())).collect();
        Ok(outcomes[0].ids.clone())
    };
    let (alone, beside) = (run(1)?, run(32)?);
    if alone != beside {
        return Err(format!("alone {alone:?}, beside 31 others {beside:?}").into());
    }
    Ok(())
}

/// When the tokens of one stream came, since the round's start.
struct Timeline {
    ids: Vec<u32>,
    at: Vec<Duration>,
}

impl Timeline {
    fn read(mut stream: Stream, start: Instant) -> Timeline {
        let mut timeline = Timeline { ids: Vec::new(), at: Vec::new() };
        while let Some(event) = stream.recv() {
            if let Event::Token { id, .. } = event {
                timeline.ids.push(id);
                timeline.at.push(start.elapsed());
            }
        }
        timeline
    }
}

/// Tokens/s where each stream is followed by another, as clients do in `bench serve`.
fn closed_loop(engine: &Engine, n_streams: usize, n_prompt: usize, n_new: usize, round: usize) -> f64 {
    let start = Instant::now();
    let client = |i: usize| {
        for n_before in 0..ANSWERS {
            let salt = 10_000 * (round + 1) + n_before * n_streams + i;
            let stream =
                engine.submit(request(engine, salt, n_prompt, n_new)).expect("the queue holds a round");
            assert_eq!(Timeline::read(stream, start).ids.len(), n_new);
        }
    };
    std::thread::scope(|scope| (0..n_streams).for_each(|i| drop(scope.spawn(move || client(i)))));
    (ANSWERS * n_streams * n_new) as f64 / start.elapsed().as_secs_f64()
}

struct Round {
    wall: Duration,
    timelines: Vec<Timeline>,
    before: Stats,
    after: Stats,
}

impl Round {
    fn run(engine: &Engine, n_streams: usize, n_prompt: usize, n_new: usize, round: usize) -> Round {
        let before = engine.stats();
        let start = Instant::now();
        let readers: Vec<_> = (0..n_streams)
            .map(|i| request(engine, 1000 * round + i, n_prompt, n_new))
            .map(|request| engine.submit(request).expect("the queue holds a round"))
            .map(|stream| std::thread::spawn(move || Timeline::read(stream, start)))
            .collect();
        let join = |reader: std::thread::JoinHandle<_>| reader.join().expect("a reader does not panic");
        let timelines = readers.into_iter().map(join).collect();
        let wall = start.elapsed();
        Round { wall, timelines, before, after: engine.stats() }
    }

    fn print(&self, n_streams: usize, loop_tokens_per_s: f64) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let n_tokens: usize = self.timelines.iter().map(|t| t.at.len()).sum();
        let mut first: Vec<_> = self.timelines.iter().map(|t| ms(t.at[0])).collect();
        let mut gaps: Vec<_> =
            self.timelines.iter().flat_map(|t| t.at.windows(2).map(|pair| ms(pair[1] - pair[0]))).collect();
        first.sort_by(f64::total_cmp);
        gaps.sort_by(f64::total_cmp);
        // Decoding alone: after the last stream's first token.
        let all_decode = self.timelines.iter().map(|t| t.at[0]).max().unwrap_or_default();
        let decoded = self.timelines.iter().flat_map(|t| &t.at).filter(|&&at| at > all_decode).count();
        let decode_seconds = (self.wall - all_decode).as_secs_f64();
        let n_steps = (self.after.n_steps - self.before.n_steps) as f64;
        let us_a_step = |time: Duration| time.as_secs_f64() * 1e6 / n_steps;
        println!(
            "{n_streams:7} | {:10.1} | {:12.1} | {:8.1} {:8.1} | {:7.2} {:8.2} | {:15.1} {:5.1} | {loop_tokens_per_s:10.1}",
            n_tokens as f64 / self.wall.as_secs_f64(),
            decoded as f64 / decode_seconds,
            first[first.len() / 2],
            first[first.len() - 1],
            gaps[gaps.len() / 2],
            gaps[gaps.len() * 99 / 100],
            us_a_step(self.after.schedule_time - self.before.schedule_time),
            us_a_step(self.after.sample_time - self.before.sample_time),
        );
    }
}
