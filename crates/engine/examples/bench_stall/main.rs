//! What running streams notice of a long prompt: gaps between their tokens without it and beside it.
//!
//! `cargo run --release -p engine --example bench_stall -- MODEL [THREADS] [STREAMS] [PROMPT_TOKENS] [ROUNDS] [KV_TYPE] [CSV]`
//!
//! Then the same streams write the same tokens without the prompt: they grow meanwhile, and that alone makes gaps longer.
//! Keys and values are bf16 or int8. Each step is written to the file CSV, if there is one to be: see `steps.rs`.
//! Ends with an error if the 99th percentile beside the prompt reaches three times the median without it.

mod steps;

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::{Engine, EngineLimits, Event, ModelRunner, Request, Sampling, Stream};
use telemetry::Metrics;
use tensor::Pool;

use steps::Recorded;

/// Tokens of each stream before the long prompt comes.
const N_QUIET: usize = 100;
const WAIT_MAX: Duration = Duration::from_secs(300);
const STREAM_PROMPT: usize = 64;
/// Enough to outlast the long prompt.
const STREAM_NEW: usize = 2400;
const RATIO_MAX: f64 = 3.0;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: bench_stall MODEL [THREADS] [STREAMS] [PROMPT_TOKENS]")?;
    let mut number = |default: usize| args.next().map_or(Ok(default), |arg| arg.parse());
    let (n_threads, n_streams, n_prompt, n_rounds) = (number(2)?, number(8)?, number(8000)?, number(3)?);
    let kv_type = match args.next().as_deref() {
        None | Some("bf16") => model::KvType::Bf16,
        Some("int8") => model::KvType::Int8,
        Some(other) => return Err(format!("keys and values of {other}: bf16 or int8").into()),
    };
    let began = Instant::now();
    let (runner, steps) =
        Recorded::new(load(Path::new(&path), kv_type, [n_threads, n_streams, n_prompt])?, began);
    let limits = EngineLimits { prefix_cache: false, ..EngineLimits::default() };
    let engine = Engine::start(Box::new(runner), limits, Metrics::new().engine("bench", n_prompt));
    println!("{n_streams} streams, then a prompt of {n_prompt} tokens | {n_rounds} rounds");
    println!(
        "gap before: p50    p99 ms | beside: p50    p99    max ms | same tokens alone: p50    p99 ms | p99 / p50 before, alone | prompt read in s"
    );
    let mut best = f64::INFINITY;
    for round in 0..n_rounds {
        best = best.min(run(&engine, n_streams, n_prompt, round)?);
    }
    if let Some(path) = args.next() {
        std::fs::write(path, steps::csv(&steps))?;
    }
    if best >= RATIO_MAX {
        return Err(format!("{best:.2} times the usual gap, the bar is {RATIO_MAX}").into());
    }
    Ok(())
}

fn load(
    path: &Path,
    kv_type: model::KvType,
    [n_threads, n_streams, n_prompt]: [usize; 3],
) -> Result<ModelRunner, Failure> {
    let pool = Arc::new(Pool::new(n_threads));
    let llama = model::Transformer::new(model::load(path)?.weights, &pool)?;
    println!("{}, {n_threads} threads, {}", path.display(), tensor::cpu::describe());
    let n_tokens =
        (n_prompt + 1).next_multiple_of(model::BLOCK_TOKENS) + n_streams * (STREAM_PROMPT + STREAM_NEW);
    let kv_bytes = n_tokens / model::BLOCK_TOKENS * llama.kv_block_bytes(kv_type);
    Ok(ModelRunner::new(llama, pool, kv_type, kv_bytes, EngineLimits::default().max_running)?)
}

fn submit(engine: &Engine, seed: usize, n_prompt: usize, n_new: usize) -> Result<Stream, Failure> {
    let vocab = engine.vocab();
    let tokens = (0..n_prompt).map(|p| ((p * 7919 + seed * 104_729 + 17) % vocab) as u32).collect();
    let mut request = Request::new(tokens, n_new, Sampling::greedy());
    request.ignore_eos = true;
    Ok(engine.submit(request)?)
}

/// One round; returns the 99th percentile beside the prompt over the median without it.
fn run(engine: &Engine, n_streams: usize, n_prompt: usize, round: usize) -> Result<f64, Failure> {
    let streams = Streams::start(engine, n_streams, round)?;
    streams.until(engine, n_streams * N_QUIET)?;
    let arrival = streams.start.elapsed();
    let mut long = submit(engine, 77 + round, n_prompt, 1)?;
    let first = long.recv();
    let read_at = streams.start.elapsed();
    if !matches!(first, Some(Event::Token { .. })) {
        return Err(format!("the long prompt gave {first:?}").into());
    }
    let times = streams.stop();
    let quiet = gaps(times.iter().map(|at| within(at, arrival / 2, arrival)));
    let beside = gaps(times.iter().map(|at| within(at, arrival, read_at)));
    // The same streams once more, greedy as they are, and without the prompt: what the same tokens take alone.
    let streams = Streams::start(engine, n_streams, round)?;
    streams.until(engine, times.iter().map(Vec::len).sum())?;
    let alone = streams.stop();
    let alone = gaps(times.iter().zip(&alone).map(|(beside, alone)| {
        let [first, end] = [arrival, read_at].map(|t| beside.partition_point(|&at| at <= t).min(alone.len()));
        &alone[first.saturating_sub(1)..end]
    }));
    let [usual, same] = [&quiet, &alone].map(|gaps| gaps[gaps.len() / 2]);
    let p99 = beside[beside.len() * 99 / 100];
    println!(
        "{:15.2} {:6.2}    | {:11.2} {:6.2} {:6.2}    | {:16.2} {:6.2}    | {:16.2}, {:5.2} | {:7.2}",
        usual,
        // On a busy machine this is large without any prompt.
        quiet[quiet.len() * 99 / 100],
        beside[beside.len() / 2],
        p99,
        beside[beside.len() - 1],
        same,
        alone[alone.len() * 99 / 100],
        p99 / usual,
        p99 / same,
        (read_at - arrival).as_secs_f64()
    );
    Ok(p99 / usual)
}

/// Running streams, each read by a thread.
struct Streams {
    start: Instant,
    n_before: u64,
    /// Dropped when they are to end.
    stop: Sender<()>,
    readers: Vec<JoinHandle<Vec<Duration>>>,
}

impl Streams {
    fn start(engine: &Engine, n_streams: usize, round: usize) -> Result<Self, Failure> {
        let (start, n_before) = (Instant::now(), engine.stats().generation_tokens);
        let streams = (0..n_streams).map(|i| submit(engine, 1000 * round + i, STREAM_PROMPT, STREAM_NEW));
        let streams = streams.collect::<Result<Vec<_>, _>>()?;
        let (stop, stopped) = channel();
        let stopped = Arc::new(Mutex::new(stopped));
        let reader = |stream| {
            let stopped = stopped.clone();
            std::thread::spawn(move || read(stream, start, &stopped))
        };
        Ok(Self { start, n_before, stop, readers: streams.into_iter().map(reader).collect() })
    }

    /// Waits until all together have written so many tokens.
    fn until(&self, engine: &Engine, n_tokens: usize) -> Result<(), Failure> {
        while engine.stats().generation_tokens < self.n_before + n_tokens as u64 {
            if self.start.elapsed() > WAIT_MAX {
                return Err("the streams ended too early".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// When each stream's tokens came.
    fn stop(self) -> Vec<Vec<Duration>> {
        drop(self.stop);
        self.readers.into_iter().map(|reader| reader.join().expect("a reader does not panic")).collect()
    }
}

/// When tokens came, until the streams are stopped; then the stream is dropped.
fn read(mut stream: Stream, start: Instant, stopped: &Mutex<Receiver<()>>) -> Vec<Duration> {
    let mut at = Vec::new();
    while let Some(Event::Token { .. }) = stream.recv() {
        at.push(start.elapsed());
        let stopped = stopped.lock().map(|stopped| stopped.try_recv());
        if matches!(stopped, Ok(Err(TryRecvError::Disconnected))) {
            break;
        }
    }
    at
}

/// The times in a span, and the one before them.
fn within(at: &[Duration], from: Duration, to: Duration) -> &[Duration] {
    let [first, end] = [from, to].map(|t| at.partition_point(|&at| at <= t));
    &at[first.saturating_sub(1)..end]
}

/// Gaps in ms between times that follow each other, in order of size.
fn gaps<'a>(times: impl Iterator<Item = &'a [Duration]>) -> Vec<f64> {
    let pairs = times.flat_map(|at| at.windows(2));
    let mut gaps: Vec<_> = pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
    gaps.sort_by(f64::total_cmp);
    gaps
}
