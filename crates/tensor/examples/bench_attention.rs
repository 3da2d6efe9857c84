//! Paged attention against the bandwidth with which this machine reads memory and against its f32 peak: decoding waits
//! for the one, prompts for the other.
//! Usage: `bench_attention [THREADS [NEW CONTEXT]]`, the
//! latter for one case alone. Shapes are SmolLM2-135M's: 9 query heads, 3 key/value heads, 64 wide.
//!
//! Beside wall time (the median) stands processor time divided by threads (the mean; a call is shorter than the kernel's
//! clock of another thread's processor time): what wall time would be without neighbours, waiting for each other counted in.

use std::time::{Duration, Instant};

use tensor::paged_attention::{
    AttentionScratch, AttentionSpec, BLOCK_TOKENS, KvCache, KvDims, KvType, PagedRow, paged_attention,
};
use tensor::rope::RopeTable;
use tensor::{Pool, cpu, limits};

const MEASURE_FOR: Duration = Duration::from_millis(700);

/// Enough layers that one sequence's cache does not stay in L2: 30 · 2 · 3 · 64 · 8192 · 2 B = 189 MB.
const DIMS: KvDims = KvDims { n_layers: 30, n_heads: 9, n_kv_heads: 3, head_width: 64 };
const WIDTH: usize = (9 + 2 * 3) * 64;

fn main() {
    let n_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let n_threads = std::env::args().nth(1).map_or(n_cores, |x| x.parse().expect("a number of threads"));
    let pool = Pool::new(n_threads);
    let limits = limits::measure(&pool);
    println!(
        "cpu: {}, {n_threads} threads: memory {:.1} GB/s, f32 {:.1} GFLOP/s",
        cpu::describe(),
        limits.memory_bytes_per_s / 1e9,
        limits.f32_per_s / 1e9
    );
    let number = |i| std::env::args().nth(i).map(|x| x.parse().expect("a number"));
    if let (Some(n_tokens), Some(n_context)) = (number(2), number(3)) {
        return Case { kv_type: KvType::Bf16, n_sequences: 1, n_context, n_tokens }.run(&pool, &limits);
    }
    for kv_type in [KvType::Bf16, KvType::F32] {
        for (n_sequences, n_context) in [(1, 1024), (1, 8192), (8, 2048), (32, 1024)] {
            Case { kv_type, n_sequences, n_context, n_tokens: 1 }.run(&pool, &limits);
        }
        for (n_tokens, n_context) in
            [(4, 8192), (16, 8192), (64, 8192), (512, 512), (2048, 2048), (512, 8192)]
        {
            Case { kv_type, n_sequences: 1, n_context, n_tokens }.run(&pool, &limits);
        }
    }
}

/// A step of sequences of `n_context` positions, the last `n_tokens` of which are new.
struct Case {
    kv_type: KvType,
    n_sequences: usize,
    n_context: usize,
    n_tokens: usize,
}

impl Case {
    fn run(&self, pool: &Pool, limits: &limits::Limits) {
        let blocks_each = self.n_context.div_ceil(BLOCK_TOKENS);
        let mut cache = KvCache::new(DIMS, self.kv_type, self.n_sequences * blocks_each);
        // The blocks of a sequence lie apart, as after some hours of serving.
        let blocks: Vec<Vec<u32>> = (0..self.n_sequences)
            .map(|i| (0..blocks_each).map(|b| (b * self.n_sequences + i) as u32).collect())
            .collect();
        self.fill(pool, &mut cache, &blocks);
        let rows: Vec<PagedRow<'_>> = self.rows(&blocks, self.n_tokens);
        let n = self.n_sequences * self.n_tokens;
        let (qkv, mut out) = (values(n * WIDTH), vec![0.0; n * 9 * 64]);
        let (spec, mut scratch) = (AttentionSpec::plain(64), AttentionScratch::default());
        let mut times: Vec<Duration> = Vec::new();
        let (started, cpu_started) = (Instant::now(), process_cpu_time());
        while started.elapsed() < MEASURE_FOR {
            for layer in 0..DIMS.n_layers {
                let run_started = Instant::now();
                paged_attention(pool, &mut out, &qkv, (&cache, layer, spec), &rows, &mut scratch);
                times.push(run_started.elapsed());
            }
        }
        assert!(out.iter().all(|x| x.is_finite()), "attention of finite numbers is finite");
        let cpu = (process_cpu_time() - cpu_started) / (times.len() * pool.n_threads()) as u32;
        // The median: the best layer is one that still lay in the last-level cache.
        times.sort_unstable();
        self.print([times[times.len() / 2], cpu], limits);
    }

    fn rows<'a>(&self, blocks: &'a [Vec<u32>], n_tokens: usize) -> Vec<PagedRow<'a>> {
        blocks.iter().map(|blocks| PagedRow { n_tokens, n_context: self.n_context, blocks }).collect()
    }

    fn fill(&self, pool: &Pool, cache: &mut KvCache, blocks: &[Vec<u32>]) {
        let table = RopeTable::new(self.n_context, 64, 1e4);
        for row in self.rows(blocks, self.n_context) {
            for layer in 0..DIMS.n_layers {
                cache.append(pool, layer, &mut values(self.n_context * WIDTH), &[row], Some(&table));
            }
        }
    }

    fn print(&self, times: [Duration; 2], limits: &limits::Limits) {
        let Self { kv_type, n_sequences, n_context, n_tokens } = self;
        print!("  {kv_type:?} {n_sequences:2} x {n_tokens:4} new of {n_context:4}:");
        let layer_bytes = KvCache::block_bytes(DIMS, *kv_type) / DIMS.n_layers;
        let bytes = (n_sequences * n_context.div_ceil(BLOCK_TOKENS) * layer_bytes) as f64;
        // Pairs of a token and a position it sees, times two products of 64 multiply-adds for each query head.
        let pairs = n_tokens * (n_context - n_tokens) + n_tokens * (n_tokens + 1) / 2;
        let operations = (n_sequences * pairs * 9 * 64 * 2 * 2) as f64;
        let [wall, cpu] = times.map(|time| time.as_secs_f64());
        let reading = |time: f64| 100.0 * bytes / time / limits.memory_bytes_per_s;
        let computing = |time: f64| 100.0 * operations / time / limits.f32_per_s;
        println!(
            "{:9.1} us, {:5.1} % of memory, {:5.1} % of f32 peak (by processor time {:5.1} and {:5.1} %)",
            wall * 1e6,
            reading(wall),
            computing(wall),
            reading(cpu),
            computing(cpu)
        );
    }
}

/// Processor time of all threads of this process.
fn process_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the timespec it is given.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn values(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}
