//! What running streams notice of a long prompt: gaps between their tokens without it and beside it.
//!
//! `cargo run --release -p engine --example bench_stall -- MODEL [THREADS] [STREAMS] [PROMPT_TOKENS] [ROUNDS] [KV_TYPE] [CSV]`
//!
//! Keys and values are bf16 or int8. Each step is written to the file CSV, if there is one to be: see `steps.rs`.
//! Ends with an error if the 99th percentile beside the prompt reaches three times the median without it.

mod steps;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Engine, EngineLimits, Event, ModelRunner, Request, Sampling, Stream};
use telemetry::Metrics;
use tensor::Pool;

use steps::Recorded;

/// Tokens of each stream before the long prompt comes, and after it: what is usual for streams that have grown meanwhile.
const N_QUIET: usize = 100;
const QUIET_MAX: Duration = Duration::from_secs(60);
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
        "gap before: p50    p99 ms | beside: p50    p99    max ms | after: p50 ms | p99 / p50 before, after | prompt read in s"
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
    let start = Instant::now();
    let streams = (0..n_streams).map(|i| submit(engine, 1000 * round + i, STREAM_PROMPT, STREAM_NEW));
    let streams = streams.collect::<Result<Vec<_>, _>>()?;
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let stopped = Arc::new(std::sync::Mutex::new(stopped));
    let readers: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            let stopped = stopped.clone();
            std::thread::spawn(move || read(stream, start, &stopped))
        })
        .collect();
    let wait = || {
        let (began, n_before) = (Instant::now(), engine.stats().generation_tokens);
        while engine.stats().generation_tokens < n_before + (n_streams * N_QUIET) as u64 {
            if began.elapsed() > QUIET_MAX {
                return Err("the streams ended too early");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    wait()?;
    let arrival = start.elapsed();
    let mut long = submit(engine, 77 + round, n_prompt, 1)?;
    let first = long.recv();
    let read_at = start.elapsed();
    if !matches!(first, Some(Event::Token { .. })) {
        return Err(format!("the long prompt gave {first:?}").into());
    }
    wait()?;
    drop(stop);
    let times: Vec<_> = readers.into_iter().map(|r| r.join().expect("a reader does not panic")).collect();
    let quiet = gaps(&times, arrival / 2, arrival);
    let beside = gaps(&times, arrival, read_at);
    let after = gaps(&times, read_at, Duration::MAX);
    let [usual, grown] = [&quiet, &after].map(|gaps| gaps[gaps.len() / 2]);
    let p99 = beside[beside.len() * 99 / 100];
    println!(
        "{:15.2} {:6.2}    | {:11.2} {:6.2} {:6.2}    | {:13.2} | {:16.2}, {:5.2} | {:7.2}",
        usual,
        // On a busy machine this is large without any prompt.
        quiet[quiet.len() * 99 / 100],
        beside[beside.len() / 2],
        p99,
        beside[beside.len() - 1],
        grown,
        p99 / usual,
        p99 / grown,
        (read_at - arrival).as_secs_f64()
    );
    Ok(p99 / usual)
}

/// When tokens came, until the round is over; then the stream is dropped.
fn read(
    mut stream: Stream,
    start: Instant,
    stopped: &std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
) -> Vec<Duration> {
    let mut at = Vec::new();
    while let Some(Event::Token { .. }) = stream.recv() {
        at.push(start.elapsed());
        let stopped = stopped.lock().map(|stopped| stopped.try_recv());
        if matches!(stopped, Ok(Err(std::sync::mpsc::TryRecvError::Disconnected))) {
            break;
        }
    }
    at
}

/// Gaps in ms whose end lies in the span, in order of size.
fn gaps(times: &[Vec<Duration>], from: Duration, to: Duration) -> Vec<f64> {
    let pairs = times.iter().flat_map(|at| at.windows(2)).filter(|pair| pair[1] > from && pair[1] <= to);
    let mut gaps: Vec<_> = pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
    gaps.sort_by(f64::total_cmp);
    gaps
}
