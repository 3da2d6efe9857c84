//! What this machine can do at most: the denominators of every other benchmark.

use tensor::{Pool, cpu, limits};

fn main() {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let limits = limits::measure(&Pool::new(n_threads));
    println!("cpu: {}, {n_threads} threads", cpu::describe());
    println!("f32    {:>7.1} GFLOP/s", limits.f32_per_s / 1e9);
    println!("bf16   {:>7.1} GFLOP/s", limits.bf16_per_s / 1e9);
    println!("int16  {:>7.1} Gop/s", limits.int16_per_s / 1e9);
    println!("int8   {:>7.1} Gop/s", limits.int8_per_s / 1e9);
    println!("cache  {:>7.1} GB/s read (24 MiB)", limits.cache_bytes_per_s / 1e9);
    println!("memory {:>7.1} GB/s read (128 MiB)", limits.memory_bytes_per_s / 1e9);
}
