//! What this machine can do at most, measured: the yardstick of every bench and of the start-up message.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::cpu::{Level, features};
use crate::simd::{MAX_LANES, Simd, dispatch};
use crate::{Buf, Pool};

/// Measured peaks of all threads of a pool together. A multiply-add counts as two operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Threads that were used.
    pub n_threads: usize,
    /// f32 fused multiply-adds from registers, operations/s.
    pub f32_per_s: f64,
    /// Products of bf16 summed in f32, operations/s: `vdpbf16ps` or f32 FMAs, whichever is faster.
    pub bf16_per_s: f64,
    /// Products of int16 summed in int32 (`vpmaddwd`, `vpdpwssd`), operations/s.
    pub int16_per_s: f64,
    /// Products of int8 summed in int32, operations/s: `vpdpbusd`; where there is none, those of int16.
    pub int8_per_s: f64,
    /// Reading what fits in the last-level cache, bytes/s.
    pub cache_bytes_per_s: f64,
    /// Reading memory, bytes/s.
    pub memory_bytes_per_s: f64,
}

/// Each measurement repeats short rounds for this long and keeps the best one, since a busy neighbour can only slow a
/// round down. 6 measurements and some 100 ms to fill memory: about half a second.
const MEASURE_FOR: Duration = Duration::from_millis(80);

/// Multiply-adds in a row per task: 20,000 · 12 FMAs are 50 us and more.
const ROUNDS_PER_TASK: usize = 20_000;

/// Bytes read to measure memory: more than the last-level cache of most processors.
const MEMORY_BYTES: usize = 128 << 20;

/// Bytes read to measure the last-level cache: more than the L2 of some cores, less than a 32 MiB L3.
const CACHE_BYTES: usize = 24 << 20;

/// Bytes of one reading task.
const READ_BYTES: usize = 256 << 10;

/// Measures. Takes about half a second.
pub fn measure(pool: &Pool) -> Limits {
    let level = pool.level();
    let lanes = if matches!(level, Level::Avx2 | Level::Scalar) { 8 } else { 16 };
    // Two operations times 12 chains per round.
    let operations = (pool.n_threads() * ROUNDS_PER_TASK * 24 * lanes) as f64;
    let n_tasks = pool.n_threads();
    let f32_per_s = operations / best_s(|| pool.run(n_tasks, &|_| _ = black_box(chains_f32(level))));
    let bf16_per_s = match level {
        Level::Avx512 if features().bf16 => {
            let by_pairs = best_s(|| pool.run(n_tasks, &|_| _ = black_box(chains_bf16())));
            f32_per_s.max(2.0 * operations / by_pairs)
        }
        _ => f32_per_s,
    };
    let int16_per_s =
        2.0 * operations / best_s(|| pool.run(n_tasks, &|_| _ = black_box(chains_int16(level))));
    let int8_per_s = match level {
        Level::Avx512 => 4.0 * operations / best_s(|| pool.run(n_tasks, &|_| _ = black_box(chains_int8()))),
        _ => int16_per_s,
    };
    Limits {
        n_threads: pool.n_threads(),
        f32_per_s,
        bf16_per_s,
        int16_per_s,
        int8_per_s,
        cache_bytes_per_s: read_bytes_per_s(pool, CACHE_BYTES),
        memory_bytes_per_s: read_bytes_per_s(pool, MEMORY_BYTES),
    }
}

/// Reading `n_bytes` of memory in huge pages again and again, bytes/s.
pub fn read_bytes_per_s(pool: &Pool, n_bytes: usize) -> f64 {
    let mut data = Buf::<f32>::zeroed(n_bytes / size_of::<f32>());
    // Written first: untouched pages are all the same page of zeros.
    pool.run_chunks(&mut data, READ_BYTES / size_of::<f32>(), |_, chunk| chunk.fill(1.0));
    n_bytes as f64 / best_s(|| read(pool, &data))
}

/// Seconds of the fastest of the rounds that fit in [`MEASURE_FOR`].
fn best_s(mut round: impl FnMut()) -> f64 {
    round();
    let started = Instant::now();
    let mut best = Duration::MAX;
    while started.elapsed() < MEASURE_FOR {
        let round_started = Instant::now();
        round();
        best = best.min(round_started.elapsed());
    }
    best.as_secs_f64()
}

/// Chains of operations that need nothing but registers: 12 cover the latency of two units (4 to 5 cycles each).
#[inline(always)]
fn chains<T: Copy>(mut sums: [T; 12], step: impl Fn(T) -> T) -> [T; 12] {
    for _ in 0..ROUNDS_PER_TASK {
        for sum in &mut sums {
            *sum = step(*sum);
        }
    }
    sums
}

#[inline(always)]
fn total<S: Simd>(s: S, sums: &[S::F]) -> f32 {
    let mut all = 0.0;
    for &sum in sums {
        all += s.sum(sum);
    }
    all
}

#[inline(always)]
fn chains_f32_simd<S: Simd>(s: S) -> f32 {
    let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
    let sums = chains([s.splat(1.0); 12], |x| s.fma(a, x, b));
    total(s, &sums)
}
dispatch!(fn chains_f32() -> f32 = chains_f32_simd);

/// 4 × 2 products a round, as in a tile. Their sum does not depend on the chain, so the operands are read anew each
/// round (from L1): else the compiler would form the products once.
#[inline(always)]
fn chains_int16_simd<S: Simd>(s: S) -> f32 {
    let words = [3i16; 6 * 2 * MAX_LANES];
    let mut sums = [[s.splat_i(1); 2]; 4];
    for _ in 0..ROUNDS_PER_TASK {
        let words = black_box(words.as_ptr());
        // SAFETY: six registers of 2·LANES words, and LANES <= MAX_LANES.
        let operand = |i: usize| unsafe { s.load_h_ptr(words.add(i * 2 * S::LANES)) };
        let b = [operand(4), operand(5)];
        for (i, sums) in sums.iter_mut().enumerate() {
            let a = operand(i);
            *sums = [s.madd(sums[0], a, b[0]), s.madd(sums[1], a, b[1])];
        }
    }
    let mut all = 0.0;
    for sum in sums.into_iter().flatten() {
        all += s.sum(s.to_f(sum));
    }
    all
}
dispatch!(fn chains_int16() -> f32 = chains_int16_simd);

/// Only called where the processor has AVX512-BF16.
fn chains_bf16() -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
        fn avx512_bf16(s: crate::simd::Avx512) -> f32 {
            let (a, b) = (s.splat(black_box(1.5)), s.splat(black_box(0.001)));
            let sums = chains([s.splat(1.0); 12], |x| s.dot_bf16(a, b, x));
            total(s, &sums)
        }
        assert!(features().bf16);
        // SAFETY: the processor has it, and with it the level Avx512.
        unsafe { avx512_bf16(crate::simd::Avx512::new()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no such processor has AVX512-BF16")
}

/// As [`chains_int16`], 12 × 4 products of bytes a lane. Only called at the level Avx512.
fn chains_int8() -> i32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn avx512() -> i32 {
            let words = [3i32; 2 * MAX_LANES];
            let mut sums = [_mm512_setzero_si512(); 12];
            for _ in 0..ROUNDS_PER_TASK {
                let words = black_box(words.as_ptr());
                // SAFETY: two registers of words.
                let (a, b) = unsafe {
                    (_mm512_loadu_si512(words.cast()), _mm512_loadu_si512(words.add(MAX_LANES).cast()))
                };
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, a, b);
                }
            }
            sums.into_iter().fold(0, |all, sum| all ^ _mm512_reduce_add_epi32(sum))
        }
        assert_eq!(features().level, Level::Avx512);
        // SAFETY: the processor has the level, and with it VNNI.
        unsafe { avx512() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no such processor has VNNI")
}

/// Reads all of `data` once.
fn read(pool: &Pool, data: &[f32]) {
    let len = READ_BYTES / size_of::<f32>();
    pool.run(data.len().div_ceil(len), &|i| {
        _ = black_box(sum(pool.level(), &data[i * len..data.len().min((i + 1) * len)]));
    });
}

#[inline(always)]
fn sum_simd<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.zero(); 8];
    for x in x.chunks_exact(8 * S::LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.add(*sum, s.load(&x[i * S::LANES..]));
        }
    }
    total(s, &sums)
}
dispatch!(fn sum(x: &[f32]) -> f32 = sum_simd);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_plausible_and_quick() {
        let started = Instant::now();
        let limits = measure(&Pool::new(2));
        let took = started.elapsed();
        eprintln!("{limits:?} in {took:?}");
        // A core of the last fifteen years does 1 to 1000 GFLOP/s and reads 0.5 to 1000 GB/s, even a shared one.
        for value in [
            limits.f32_per_s,
            limits.bf16_per_s,
            limits.int16_per_s,
            limits.int8_per_s,
            limits.memory_bytes_per_s,
        ] {
            assert!((0.5e9..1e13).contains(&value), "{limits:?}");
        }
        assert!(limits.cache_bytes_per_s > 0.5 * limits.memory_bytes_per_s, "{limits:?}");
        assert!(took < Duration::from_secs(5), "took {took:?}");
    }
}
