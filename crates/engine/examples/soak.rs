//! Random requests and random cancellations for some minutes: memory stays flat and no block is lost.
//!
//! `cargo run --release -p engine --example soak -- MODEL [MINUTES] [SEED]`
//!
//! Prints a line a minute. Ends with an error when a gauge is not 0 after a pause, or memory has grown by
//! more than a tenth since the first minutes.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Engine, EngineLimits, Event, ModelRunner, Request, Sampling, Speculation, Stream, SubmitError};
use telemetry::Metrics;
use tensor::Pool;

/// A pool so small that preemption is frequent.
const N_BLOCKS: usize = 192;
const N_OPEN: usize = 40;
const GROWTH_MAX: f64 = 1.1;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: soak MODEL [MINUTES] [SEED]")?;
    let mut number = |default: u64| args.next().map_or(Ok(default), |arg| arg.parse());
    let (n_minutes, seed) = (number(30)?, number(1)?);
    let engine = start(Path::new(&path))?;
    println!("{n_minutes} minutes with seed {seed}");
    println!("minute | requests finished cancelled refused | tokens/s | preempted cached accepted | RSS MiB");
    let mut soak = Soak { engine, dice: Dice(seed), open: Vec::new(), counts: Counts::default() };
    let mut first_rss = None;
    for minute in 1..=n_minutes {
        let before = soak.engine.stats();
        soak.run_for(Duration::from_secs(55));
        let seconds = 55.0;
        soak.settle()?;
        let (after, rss) = (soak.engine.stats(), rss_bytes()?);
        let Counts { n_requests, n_finished, n_cancelled, n_refused } = soak.counts;
        println!(
            "{minute:6} | {n_requests:8} {n_finished:8} {n_cancelled:9} {n_refused:7} | {:8.1} | {:9} {:6} {:8} | {:7.1}",
            (after.generation_tokens - before.generation_tokens) as f64 / seconds,
            after.n_preemptions,
            after.cached_tokens,
            after.accepted_tokens,
            rss / (1u64 << 20) as f64
        );
        // The first minutes fill caches and the allocator's pools.
        if minute >= 2 {
            let first = *first_rss.get_or_insert(rss);
            if rss > first * GROWTH_MAX {
                return Err(format!("memory grew from {first} to {rss} bytes").into());
            }
        }
    }
    Ok(())
}

fn start(path: &Path) -> Result<Engine, Failure> {
    let pool = Arc::new(Pool::new(2));
    let llama = model::Transformer::new(model::load(path)?.weights, &pool)?;
    let limits = EngineLimits {
        max_running: 16,
        queue_max_requests: 24,
        speculation: Speculation::PromptLookup { k_max: 8 },
        ..EngineLimits::default()
    };
    let kv_bytes = N_BLOCKS * llama.kv_block_bytes(model::KvType::Bf16);
    let runner = ModelRunner::new(llama, pool, model::KvType::Bf16, kv_bytes, limits.max_running)?;
    Ok(Engine::start(Box::new(runner), limits, Metrics::new().engine("soak", 2048)))
}

struct Soak {
    engine: Engine,
    dice: Dice,
    open: Vec<Open>,
    counts: Counts,
}

/// A request under way, and after how many tokens its client goes away.
struct Open {
    stream: Stream,
    n_patience: usize,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    n_requests: usize,
    n_finished: usize,
    n_cancelled: usize,
    n_refused: usize,
}

impl Soak {
    fn run_for(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            while self.open.len() < N_OPEN && self.submit() {}
            self.read_some();
        }
    }

    /// Submits a request; false when the queue is full.
    fn submit(&mut self) -> bool {
        let dice = &mut self.dice;
        // Few beginnings, so that prefixes are shared; endings of their own, some of which repeat.
        let (beginning, n_shared, n_own) = (dice.below(6), 16 + dice.below(100), 1 + dice.below(200));
        let own = dice.below(40_000);
        let shared = (0..n_shared).map(|i| i * 37 + beginning * 1000);
        let tokens = shared.chain((0..n_own).map(|i| own + i % 50)).map(|id| id as u32 % 49_152).collect();
        let sampling = Sampling {
            temperature: dice.below(3) as f32 * 0.5,
            top_p: 0.95,
            seed: own as u64,
            ..Sampling::default()
        };
        let mut request = Request::new(tokens, 1 + dice.below(200), sampling);
        request.tenant = dice.below(3).to_string();
        request.priority = dice.below(3) as i8 - 1;
        request.deadline = (dice.below(20) == 0).then(|| Duration::from_millis(dice.below(3000) as u64));
        request.ignore_eos = true;
        let n_patience = if dice.below(3) == 0 { dice.below(60) } else { usize::MAX };
        match self.engine.submit(request) {
            Ok(stream) => {
                self.counts.n_requests += 1;
                self.open.push(Open { stream, n_patience });
                true
            }
            Err(SubmitError::QueueFull { .. }) => {
                self.counts.n_refused += 1;
                false
            }
            Err(error) => panic!("the engine refuses: {error}"),
        }
    }

    /// One event of a random request, or its end by a client that has seen enough.
    fn read_some(&mut self) {
        let index = self.dice.below(self.open.len());
        let open = &mut self.open[index];
        if open.n_patience == 0 {
            self.counts.n_cancelled += 1;
            self.open.swap_remove(index);
            return;
        }
        open.n_patience -= 1;
        match open.stream.recv() {
            Some(Event::Finished { reason: engine::FinishReason::Error(why), .. }) => {
                panic!("a step failed: {why}")
            }
            Some(Event::Finished { .. }) => {
                self.counts.n_finished += 1;
                self.open.swap_remove(index);
            }
            _ => (),
        }
    }

    /// Half of what is open is dropped, the rest read to its end; then nothing may be left.
    fn settle(&mut self) -> Result<(), Failure> {
        let n_dropped = self.open.len() / 2;
        self.counts.n_cancelled += n_dropped;
        self.open.drain(..n_dropped);
        for mut open in self.open.drain(..) {
            while open.stream.recv().is_some() {}
            self.counts.n_finished += 1;
        }
        let start = Instant::now();
        loop {
            let stats = self.engine.stats();
            if (stats.n_running, stats.n_waiting, stats.n_blocks_used) == (0, 0, 0) {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(10) {
                return Err(format!("something is left: {stats:?}").into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Numbers from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    /// A number in `0..n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ mixed >> 31) % n.max(1) as u64) as usize
    }
}

/// Resident memory of this process.
fn rss_bytes() -> Result<f64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib * 1024.0)
}
