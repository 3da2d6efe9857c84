use super::*;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

#[test]
fn every_task_runs_once() {
    for n_threads in [0, 1, 2, 3, 8] {
        let pool = Pool::new(n_threads);
        for n_tasks in [0, 1, 2, 3, 7, 100, 1000] {
            let counts: Vec<AtomicU32> = (0..n_tasks).map(|_| AtomicU32::new(0)).collect();
            for round in 1..=20 {
                pool.run(n_tasks, &|i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round));
            }
        }
    }
}

/// Also those of threads that are held up: the first task of a share waits until all others are done.
#[test]
fn shares_are_neighbours_and_done_by_others_in_need() {
    for n_threads in [1, 2, 3, 8] {
        let pool = Pool::new(n_threads);
        let ahead = vec![0; 1 << 16];
        for n_tasks in [0, 1, 2, 7, 100] {
            let counts: Vec<AtomicU32> = (0..n_tasks).map(|_| AtomicU32::new(0)).collect();
            for round in 1..=20 {
                let task = |i: usize| _ = counts[i].fetch_add(1, Ordering::Relaxed);
                pool.run_shares(n_tasks, &task, &|thread| &ahead[thread..]);
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round));
            }
        }
    }
    let pool = Pool::new(2);
    let n_done = AtomicU32::new(0);
    let held_up = AtomicBool::new(false);
    let task = |i: usize| {
        // The caller's share is the first half; its first task needs all others to be done.
        if i == 0 {
            held_up.store(true, Ordering::Relaxed);
            while n_done.load(Ordering::Relaxed) < 9 {
                std::thread::yield_now();
            }
        } else {
            n_done.fetch_add(1, Ordering::Relaxed);
        }
    };
    pool.run_shares(10, &task, &|_| &[]);
    assert!(held_up.into_inner());
}

#[test]
fn chunks_cover_the_slice() {
    let pool = Pool::new(3);
    let mut data = vec![0; 1001];
    pool.run_chunks(&mut data, 10, |i, chunk| chunk.iter_mut().for_each(|x| *x += i + 1));
    assert!(data.iter().enumerate().all(|(i, &x)| x == i / 10 + 1));
}

#[test]
fn nested_runs_go_inline() {
    let pool = Pool::new(4);
    let n = AtomicU32::new(0);
    pool.run(8, &|_| {
        let thread = std::thread::current().id();
        pool.run(8, &|_| {
            assert_eq!(std::thread::current().id(), thread);
            n.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(n.into_inner(), 64);
}

#[test]
fn panic_propagates_and_the_pool_lives_on() {
    let pool = Pool::new(4);
    for round in 0..50 {
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|i| assert!(i != 37 + round % 3, "task {i} fails"));
        }));
        let payload = result.expect_err("the panic of a task reaches the caller");
        let text = payload.downcast_ref::<String>().expect("a formatted message");
        assert!(text.contains("fails"));
        let sum = AtomicUsize::new(0);
        pool.run(100, &|i| _ = sum.fetch_add(i, Ordering::Relaxed));
        assert_eq!(sum.into_inner(), 4950);
    }
}

#[test]
fn runs_from_many_threads_take_turns() {
    let pool = Pool::new(3);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let sum = AtomicUsize::new(0);
                    pool.run(50, &|i| _ = sum.fetch_add(i, Ordering::Relaxed));
                    assert_eq!(sum.into_inner(), 1225);
                }
            });
        }
    });
}

/// Tasks that sleep need no core, so the gain shows even where other processes hold all of them.
#[test]
fn workers_take_part() {
    let pool = Pool::new(4);
    for _ in 0..3 {
        let started = Instant::now();
        pool.run(40, &|_| std::thread::sleep(Duration::from_millis(5)));
        let took = started.elapsed();
        assert!(took < Duration::from_millis(150), "200 ms of sleep took 4 threads {took:?}");
    }
}

/// Waking after a pause goes through the condition variable, unlike the tight loops above.
#[test]
fn wakes_after_sleep() {
    let pool = Pool::new(3);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        let n = AtomicU32::new(0);
        pool.run(10, &|_| _ = n.fetch_add(1, Ordering::Relaxed));
        assert_eq!(n.into_inner(), 10);
    }
}

/// Some 100 us of arithmetic that the compiler cannot shorten.
fn spin_work() {
    let mut x = 1u64;
    for i in 0..100_000u64 {
        x = std::hint::black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i));
    }
}

/// Barriers that wait for a thread without a core stall for a scheduler tick (4 ms and more) per run. Four times as
/// many threads as cores, busy neighbours on every core: the work must take about its fair share of the machine.
#[test]
fn keeps_its_speed_on_an_overcommitted_machine() {
    let n_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let stop = AtomicBool::new(false);
    let (n_runs, n_tasks) = (100, 4);
    std::thread::scope(|scope| {
        for _ in 0..n_cores {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    spin_work();
                }
            });
        }
        let started = Instant::now();
        (0..n_runs * n_tasks).for_each(|_| spin_work());
        let alone = started.elapsed();
        let pool = Pool::new(4 * n_cores);
        let started = Instant::now();
        (0..n_runs).for_each(|_| pool.run(n_tasks, &|_| spin_work()));
        let pooled = started.elapsed();
        stop.store(true, Ordering::Relaxed);
        eprintln!("overcommitted: {n_runs} runs of {n_tasks} tasks: {pooled:?}, one thread {alone:?}");
        // Even without any gain from the other cores it may not be much slower than one thread.
        let bound = 3 * alone + Duration::from_millis(200);
        assert!(pooled < bound, "{n_runs} runs took {pooled:?}, one thread needs {alone:?}");
    });
}
