//! Cost of handing out an operation: empty runs back to back, and after the threads have gone to sleep. Then what is left
//! of the speed of a decoding step when another process keeps every core busy: a fair scheduler leaves half.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tensor::Pool;

/// Operations of a step of a 30-layer model, the tasks of each, and their length on an idle machine.
const STEP_RUNS: usize = 150;
const RUN_TASKS: usize = 8;
const TASK: Duration = Duration::from_micros(12);

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
    beside_busy_neighbours(&Pool::new(n_cores), n_cores);
}

fn time_run(pool: &Pool) -> Duration {
    let started = Instant::now();
    pool.run(4 * pool.n_threads(), &|i| _ = std::hint::black_box(i));
    started.elapsed()
}

/// Takes turns, quiet and busy, so that a drift of the machine shows in both.
fn beside_busy_neighbours(pool: &Pool, n_neighbours: usize) {
    let rounds_per_task = calibrate();
    let (mut quiet, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        quiet.extend((0..20).map(|_| step(pool, rounds_per_task)));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..n_neighbours {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        work(1000);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(20)); // their first moments are favoured
            busy.extend((0..20).map(|_| step(pool, rounds_per_task)));
            stop.store(true, Ordering::Relaxed);
        });
    }
    let mean = |times: &[Duration]| times.iter().sum::<Duration>() / times.len() as u32;
    let ideal = TASK * (STEP_RUNS * RUN_TASKS) as u32 / pool.n_threads() as u32;
    println!(
        "step of {STEP_RUNS} runs of {RUN_TASKS} tasks of {TASK:?}: {:?} ({:.0} % of ideal); beside {n_neighbours} busy threads {:?}: {:.0} % of that speed",
        mean(&quiet),
        100.0 * ideal.as_secs_f64() / mean(&quiet).as_secs_f64(),
        mean(&busy),
        100.0 * mean(&quiet).as_secs_f64() / mean(&busy).as_secs_f64(),
    );
}

fn step(pool: &Pool, rounds_per_task: u64) -> Duration {
    let started = Instant::now();
    for _ in 0..STEP_RUNS {
        pool.run(RUN_TASKS, &|_| work(rounds_per_task));
    }
    started.elapsed()
}

/// Arithmetic that the compiler cannot shorten.
fn work(n_rounds: u64) {
    let mut x = 1u64;
    for i in 0..n_rounds {
        x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i));
    }
}

/// Rounds that take [`TASK`] when nobody disturbs.
fn calibrate() -> u64 {
    let n_rounds = 100_000;
    let time = |_| {
        let started = Instant::now();
        work(n_rounds);
        started.elapsed()
    };
    let best = (0..50).map(time).min().expect("50 rounds");
    (n_rounds as f64 * TASK.as_secs_f64() / best.as_secs_f64()) as u64
}
