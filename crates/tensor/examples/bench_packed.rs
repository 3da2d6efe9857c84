//! The weight products of inference at SmolLM2-135M's shapes, every kind of weight, against this machine's limits.
//!
//! `cargo run --release -p tensor --example bench_packed -- [KIND..]`
//!
//! Each kind is checked against f64 sums first. Decoding is counted in bytes of weights read a second, prefill (512
//! tokens) and 32 streams in useful operations a second: two for each weight and token.

use std::time::{Duration, Instant};

use tensor::limits::{Limits, measure, read_bytes_per_s};
use tensor::packed::{Packed, PackedScratch, WeightKind, project};
use tensor::{Pool, cpu};

const N_LAYERS: usize = 30;
const VOCAB: usize = 49152;
/// Rows that are made and quantized for the head; the rest repeats them.
const HEAD_ROWS: usize = 2048;

fn main() {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(n_threads);
    // A processor may show a last-level cache larger than what `measure` reads.
    let limits = Limits { memory_bytes_per_s: read_bytes_per_s(&pool, 512 << 20), ..measure(&pool) };
    println!("cpu: {}, {n_threads} threads", cpu::describe());
    println!(
        "f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, int8 {:.0} GOP/s, read {:.1} GB/s (24 MiB), {:.1} GB/s (512 MiB)",
        limits.f32_per_s / 1e9,
        limits.bf16_per_s / 1e9,
        limits.int8_per_s / 1e9,
        limits.cache_bytes_per_s / 1e9,
        limits.memory_bytes_per_s / 1e9
    );
    println!("kind | 1 token: ms, GB/s, of read | 32 tokens: ms, GOP/s | 512 tokens: ms, GOP/s, of peak");
    for kind in WeightKind::ALL {
        if names.is_empty() || names.iter().any(|name| name == kind.name()) {
            Model::new(&pool, kind).bench(&pool, &limits);
        }
    }
}

/// The matrices of a model.
struct Model {
    kind: WeightKind,
    width: usize,
    ff: usize,
    layers: Vec<[Packed; 7]>,
    head: Packed,
}

/// Numbers in -1..1 that differ.
fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / (1u32 << 31) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

impl Model {
    fn new(pool: &Pool, kind: WeightKind) -> Self {
        // 576, or what whole blocks of 256 come nearest to.
        let width = 576 / kind.block_elems() * kind.block_elems();
        let (kv, ff) = (width / 3, 1536);
        let shapes =
            [[width, width], [kv, width], [kv, width], [width, width], [ff, width], [ff, width], [width, ff]];
        let layer = shapes.map(|dims| (kind.quantize(&numbers(7, dims[0] * dims[1])), dims));
        for (bytes, dims) in &layer[..2] {
            check(pool, kind, bytes, *dims);
        }
        let pack = |(bytes, dims): &(Vec<u8>, [usize; 2])| Packed::from_bytes(pool, kind, bytes, *dims);
        let layers = (0..N_LAYERS).map(|_| layer.each_ref().map(pack)).collect();
        let head = kind.quantize(&numbers(9, HEAD_ROWS * width)).repeat(VOCAB / HEAD_ROWS);
        let head = Packed::from_bytes(pool, kind, &head, [VOCAB, width]);
        Self { kind, width, ff, layers, head }
    }

    /// All products of `n` tokens, `n_logits` of which want logits.
    fn forward(&self, pool: &Pool, n: usize, n_logits: usize, memory: &mut Memory) {
        let Memory { x, y, scratch } = memory;
        let (x_nc, x_nf) = (&x[..n * self.width], &x[..n * self.ff]);
        for [q, k, v, o, gate, up, down] in &self.layers {
            project(pool, &mut y[..n * out(&[q, k, v])], &[q, k, v], x_nc, scratch);
            project(pool, &mut y[..n * out(&[o])], &[o], x_nc, scratch);
            project(pool, &mut y[..n * out(&[gate, up])], &[gate, up], x_nc, scratch);
            project(pool, &mut y[..n * out(&[down])], &[down], x_nf, scratch);
        }
        project(pool, &mut y[..n_logits * VOCAB], &[&self.head], &x[..n_logits * self.width], scratch);
    }

    fn n_weights(&self) -> usize {
        let layers = self.layers.iter().flatten();
        layers.map(|w| w.dims()[0] * w.dims()[1]).sum()
    }

    fn bench(&self, pool: &Pool, limits: &Limits) {
        let mut memory = Memory {
            x: numbers(3, 512 * self.ff),
            y: vec![0.0; (512 * 2 * self.ff).max(32 * VOCAB)],
            scratch: PackedScratch::default(),
        };
        let bytes = self.layers.iter().flatten().map(Packed::bytes).sum::<usize>() + self.head.bytes();
        let head = VOCAB * self.width;
        let mut best = |n: usize, n_logits: usize| best_s(|| self.forward(pool, n, n_logits, &mut memory));
        let (one, many, prefill) = (best(1, 1), best(32, 32), best(512, 1));
        let (name, peak) = match self.kind {
            WeightKind::F32 | WeightKind::F16 => ("f32", limits.f32_per_s),
            WeightKind::Bf16 => ("bf16", limits.bf16_per_s),
            _ => ("int8", limits.int8_per_s),
        };
        let bytes_per_s = bytes as f64 / one;
        let many_per_s = 2.0 * (32 * (self.n_weights() + head)) as f64 / many;
        let prefill_per_s = 2.0 * (512 * self.n_weights() + head) as f64 / prefill;
        println!(
            "{:5}| {:6.2} {:6.1} {:4.0} % | {:7.1} {:6.0} | {:7.1} {:6.0} {:4.0} % of {name}",
            self.kind.name(),
            one * 1e3,
            bytes_per_s / 1e9,
            100.0 * bytes_per_s / limits.memory_bytes_per_s,
            many * 1e3,
            many_per_s / 1e9,
            prefill * 1e3,
            prefill_per_s / 1e9,
            100.0 * prefill_per_s / peak
        );
    }
}

struct Memory {
    x: Vec<f32>,
    y: Vec<f32>,
    scratch: PackedScratch,
}

fn out(stack: &[&Packed]) -> usize {
    stack.iter().map(|w| w.dims()[0]).sum()
}

/// Seconds of the best of some seconds' worth of rounds: others on the machine can only slow a round down.
fn best_s(mut round: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = Duration::MAX;
    while started.elapsed() < Duration::from_millis(1500) {
        let round_started = Instant::now();
        round();
        best = best.min(round_started.elapsed());
    }
    best.as_secs_f64()
}

/// The products are those of the widened weights, to what the rounding of the inputs allows.
fn check(pool: &Pool, kind: WeightKind, bytes: &[u8], dims: [usize; 2]) {
    let [n_out, n_in] = dims;
    let mut w_oi = vec![0.0; n_out * n_in];
    kind.dequantize(bytes, &mut w_oi);
    let packed = Packed::from_bytes(pool, kind, bytes, dims);
    for n in [1, 5] {
        let x_ni = numbers(5, n * n_in);
        let mut y_no = vec![0.0; n * n_out];
        project(pool, &mut y_no, &[&packed], &x_ni, &mut PackedScratch::default());
        for (y_o, x_i) in y_no.chunks(n_out).zip(x_ni.chunks(n_in)) {
            for (y, w_i) in y_o.iter().zip(w_oi.chunks(n_in)) {
                let products = || w_i.iter().zip(x_i).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let (exact, magnitude) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                // bf16 keeps 8 bits, of quantized weights' inputs 16 bits of a block's largest are kept.
                let tolerance = if kind == WeightKind::Bf16 { 4e-3 } else { 5e-5 };
                let error = (f64::from(*y) - exact).abs();
                assert!(error <= tolerance * magnitude, "{kind:?}: {y} is not {exact}");
            }
        }
    }
}
