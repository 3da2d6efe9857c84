//! Checks matmul against the plain version, then prints GFLOP/s and the share of the measured peak for square and
//! training shapes. Usage: `bench_matmul [--quick | --models] [THREADS..]` (default: 1 and all cores). `--quick` runs pieces
//! of the training shapes that take about a millisecond, which a scheduler with other work often leaves in one piece;
//! `--models` runs all products of a step of GPT-2 124M and of SmolLM2-135M, in f32 and bf16.
//!
//! Where other processes hold the cores, wall time says little; beside it stands the processor time this process used,
//! divided by its threads: what the wall time would be without neighbours, and how well the kernel does its work.

use std::time::{Duration, Instant};

use tensor::matmul::reference;
use tensor::{Accumulate, Mat, Pool, Precision, bf16, cpu, limits, matmul};

/// Each product repeats for this long; the best time counts, since neighbours only ever slow it down.
const MEASURE_FOR: Duration = Duration::from_millis(500);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (of, threads) = match args.split_first() {
        Some((first, threads)) if first.starts_with("--") => (first.as_str(), threads),
        _ => ("", &args[..]),
    };
    let cases: fn() -> Vec<Case> = match of {
        "--quick" => quick_cases,
        "--models" => model_cases,
        "" => cases,
        other => panic!("{other} is neither --quick nor --models"),
    };
    let mut threads: Vec<usize> = threads.iter().map(|x| x.parse().expect("a number of threads")).collect();
    if threads.is_empty() {
        threads = vec![1, std::thread::available_parallelism().map_or(1, |n| n.get())];
    }
    println!("cpu: {}", cpu::describe());
    for n_threads in threads {
        let pool = Pool::new(n_threads);
        validate(&pool);
        let limits = limits::measure(&pool);
        println!(
            "{n_threads} threads: peak f32 {:.1} bf16 {:.1} int16 {:.1} Gop/s, cache {:.1} memory {:.1} GB/s",
            limits.f32_per_s / 1e9,
            limits.bf16_per_s / 1e9,
            limits.int16_per_s / 1e9,
            limits.cache_bytes_per_s / 1e9,
            limits.memory_bytes_per_s / 1e9,
        );
        for case in cases() {
            case.run(&pool, &limits);
        }
    }
}

/// c_mn = a_mk · b_kn as one of the three products of a linear map.
#[derive(Clone, Copy)]
enum Kind {
    /// y = x · Wᵀ
    Forward,
    /// dx = dy · W
    BackwardInput,
    /// dW = dyᵀ · x
    BackwardWeight,
}

#[derive(Clone, Copy)]
struct Case {
    kind: Kind,
    m: usize,
    n: usize,
    k: usize,
    bf16: bool,
}

fn cases() -> Vec<Case> {
    use Kind::*;
    let case = |kind, m, n, k| Case { kind, m, n, k, bf16: false };
    let mut cases = vec![case(BackwardInput, 1024, 1024, 1024), case(Forward, 1024, 1024, 1024)];
    cases.push(Case { bf16: true, ..cases[1] });
    for kind in [Forward, BackwardInput, BackwardWeight] {
        cases.push(Case { kind, m: 2048, n: 768, k: 3072, bf16: true });
        cases.push(Case { kind, m: 4096, n: 384, k: 1536, bf16: true });
    }
    let n_tokens = 4096;
    // Attention, feed-forward and output maps of models of width 192 and 384.
    for (i, o) in
        [(192, 192), (192, 512), (512, 192), (192, 4096), (384, 384), (384, 1536), (1536, 384), (384, 4096)]
    {
        cases.push(case(Forward, n_tokens, o, i));
        cases.push(case(BackwardInput, n_tokens, i, o));
        cases.push(case(BackwardWeight, o, i, n_tokens));
    }
    for m in [1, 2, 4, 8, 16] {
        cases.push(case(Forward, m, 1536, 576));
    }
    cases
}

/// The maps of a layer and the head, the latter of as many tokens as have logits at a time.
fn model_cases() -> Vec<Case> {
    use Kind::*;
    let gpt2 =
        [[2048, 768, 2304], [2048, 768, 768], [2048, 768, 3072], [2048, 3072, 768], [512, 768, 50_257]];
    let smol = [[2048, 576, 960], [2048, 576, 576], [2048, 576, 3072], [2048, 1536, 576], [512, 576, 49_152]];
    let kinds =
        |[n, i, o]: [usize; 3]| [(Forward, n, o, i), (BackwardInput, n, i, o), (BackwardWeight, o, i, n)];
    let cases = |bf16| {
        let products = gpt2.into_iter().chain(smol).flat_map(kinds);
        products.map(move |(kind, m, n, k)| Case { kind, m, n, k, bf16 })
    };
    cases(false).chain(cases(true)).collect()
}

fn quick_cases() -> Vec<Case> {
    use Kind::*;
    let case = |(kind, m, n, k)| Case { kind, m, n, k, bf16: false };
    let mut cases: Vec<Case> = [
        (Forward, 576, 192, 192),
        (Forward, 288, 512, 192),
        (Forward, 288, 1536, 192),
        (Forward, 288, 192, 512),
        (Forward, 288, 256, 1024),
        (BackwardInput, 288, 512, 384),
        (BackwardInput, 288, 192, 1536),
        (BackwardWeight, 192, 192, 1024),
        (BackwardWeight, 288, 384, 512),
    ]
    .map(case)
    .to_vec();
    cases.push(Case { bf16: true, ..cases[4] });
    cases
}

impl Case {
    fn run(self, pool: &Pool, limits: &limits::Limits) {
        let Case { m, n, k, .. } = self;
        let (a, b) = (values(m * k, 1), values(k * n, 2));
        let mut c_mn = vec![0.0; m * n];
        let (a16, b16): (Vec<bf16>, Vec<bf16>) =
            (a.iter().map(|&x| bf16::from_f32(x)).collect(), b.iter().map(|&x| bf16::from_f32(x)).collect());
        let (a, b) = if self.bf16 {
            ((&a16[..]).into(), (&b16[..]).into())
        } else {
            (tensor::Elems::from(&a[..]), tensor::Elems::from(&b[..]))
        };
        let (a, b) = match self.kind {
            Kind::Forward => (Mat::new(a, m, k), Mat::new(b, n, k).t()),
            Kind::BackwardInput => (Mat::new(a, m, k), Mat::new(b, k, n)),
            Kind::BackwardWeight => (Mat::new(a, k, m).t(), Mat::new(b, k, n)),
        };
        let precision = if self.bf16 { Precision::Bf16 } else { Precision::F32 };
        let (mut best, mut best_cpu) = (Duration::MAX, Duration::MAX);
        let started = Instant::now();
        while started.elapsed() < MEASURE_FOR {
            let (run_started, cpu_started) = (Instant::now(), process_cpu_time());
            matmul(pool, &mut c_mn, a, b, precision, Accumulate::Overwrite);
            best = best.min(run_started.elapsed());
            best_cpu = best_cpu.min((process_cpu_time() - cpu_started) / pool.n_threads() as u32);
        }
        let operations = 2.0 * (m * n * k) as f64;
        let per_s = operations / best.as_secs_f64();
        let peak = if self.bf16 { limits.bf16_per_s } else { limits.f32_per_s };
        let kind = match self.kind {
            Kind::Forward => "x·Wᵀ",
            Kind::BackwardInput => "dy·W",
            Kind::BackwardWeight => "dyᵀ·x",
        };
        println!(
            "  {} {kind:6} {m:5} x {n:4} x {k:4}: {:9.1} us {:7.1} GFLOP/s, {:5.1} % of peak ({:5.1} % by processor time), weights at {:5.1} GB/s",
            if self.bf16 { "bf16" } else { "f32 " },
            best.as_secs_f64() * 1e6,
            per_s / 1e9,
            100.0 * per_s / peak,
            100.0 * operations / best_cpu.as_secs_f64() / peak,
            (n * k * if self.bf16 { 2 } else { 4 }) as f64 / best.as_secs_f64() / 1e9,
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

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

/// A wrong result has no speed.
fn validate(pool: &Pool) {
    let (m, n, k) = (301, 130, 523);
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    let (a, b) = (Mat::new(&a[..], m, k), Mat::new(&b[..], n, k).t());
    for precision in [Precision::F32, Precision::Bf16] {
        let (mut got, mut expected) = (vec![0.0; m * n], vec![0.0; m * n]);
        matmul(pool, &mut got, a, b, precision, Accumulate::Overwrite);
        reference(&mut expected, a, b, precision, Accumulate::Overwrite, true);
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-3, "{precision:?}: {got} instead of {expected}");
        }
    }
}
