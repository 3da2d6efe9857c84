//! Cost of handing out an operation: empty runs back to back, and after the threads have gone to sleep.

use std::time::{Duration, Instant};
use tensor::Pool;

fn main() {
    let n_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    for n_threads in [1, 2, 4, n_cores] {
        let pool = Pool::new(n_threads);
        let mut hot: Vec<Duration> = (0..20_000).map(|_| time_run(&pool)).collect();
        let mut cold: Vec<Duration> = (0..200)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(1));
                time_run(&pool)
            })
            .collect();
        hot.sort();
        cold.sort();
        println!(
            "{n_threads} threads on {n_cores} cores: run of {} empty tasks: median {:?}, after 1 ms of sleep {:?}",
            4 * n_threads,
            hot[hot.len() / 2],
            cold[cold.len() / 2],
        );
    }
}

fn time_run(pool: &Pool) -> Duration {
    let started = Instant::now();
    pool.run(4 * pool.n_threads(), &|i| _ = std::hint::black_box(i));
    started.elapsed()
}
