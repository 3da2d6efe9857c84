//! [`Pool`]: threads that share the tasks of one operation.
//!
//! An operation is a closure and a number of tasks. Threads take task numbers from one counter until none is left, so
//! a thread that loses its core to another process costs the task it holds, not its share. The caller works too, and
//! waits only for threads that hold a task: one that has not even woken up yet is not waited for.
//!
//! Idle threads look for work for some tens of microseconds (the gap between two ops of a step), then sleep until woken.
//! They never spin longer, because the machine belongs to others as well.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::cpu::{self, Level};

/// Most threads of one pool: far above any machine, low enough to catch a wrong unit.
const THREADS_MAX: usize = 1024;

/// Looks for work before sleeping. A `pause` takes 40 to 140 cycles, so this is 15 to 60 us.
const SPIN_PAUSES: u32 = 1000;

/// Threads that work on one operation at a time.
///
/// Results of the ops in this crate do not depend on the number of threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    level: Level,
    /// Held during a run: runs from several threads take turns.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads` in all, the caller of [`Pool::run`] included; 0 counts as 1. Should the system refuse a
    /// thread, the pool has fewer ([`Pool::n_threads`] tells): that costs speed, never results.
    pub fn new(n_threads: usize) -> Self {
        Self::with_level(n_threads, cpu::features().level)
    }

    /// As [`Pool::new`], with ops at `level` (or the best this machine has). For tests and benches.
    pub fn with_level(n_threads: usize, level: Level) -> Self {
        let n_threads = n_threads.clamp(1, THREADS_MAX);
        let n_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        // With more threads than cores a spinning thread keeps a working one from its core.
        let spin_pauses = if n_threads <= n_cores { SPIN_PAUSES } else { 0 };
        let shared = Arc::new(Shared::new(spin_pauses));
        let spawn = |i| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("tensor-{i}"));
            thread.spawn(move || shared.worker()).ok()
        };
        let workers = (1..n_threads).map_while(spawn).collect();
        Self { shared, workers, level: level.available(), turn: Mutex::new(()) }
    }

    /// Threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Instruction set the ops given this pool run on.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Calls `task(i)` once for every i in `0..n_tasks`, on all threads, in no particular order, and returns when all
    /// are done. What the tasks wrote is visible afterwards.
    ///
    /// A call from inside a task runs its tasks on the calling thread. Tasks should be of similar size and some times
    /// more than threads; a task of 10 us or more hides the cost of handing it out.
    ///
    /// # Panics
    /// If a task panics, the remaining tasks are dropped and the (first) panic continues here.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if n_tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            return (0..n_tasks).for_each(task);
        }
        let turn = lock(&self.turn);
        INSIDE.set(true);
        self.shared.run(n_tasks, task);
        INSIDE.set(false);
        let panic = lock(&self.shared.panic).take();
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Splits `data` into chunks of `chunk_len` (the last may be shorter) and calls `task(chunk_idx, chunk)` for each.
    ///
    /// # Panics
    /// As [`Pool::run`], and if `chunk_len` is 0.
    pub fn run_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let parts = Disjoint::new(data);
        self.run(len.div_ceil(chunk_len), &|i| {
            let range = i * chunk_len..len.min((i + 1) * chunk_len);
            // SAFETY: every i is called once, and ranges of different i do not overlap.
            task(i, unsafe { parts.slice(range) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            worker.join().expect("a worker catches its tasks' panics and has none of its own");
        }
    }
}

/// A mutable slice of which tasks take parts that do not overlap.
pub struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: hands out parts of a `&mut [T]` to other threads, which is sending T; overlap is excluded by `slice`'s callers.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Takes the slice for the lifetime of the tasks.
    pub fn new(data: &'a mut [T]) -> Self {
        Self { ptr: data.as_mut_ptr(), len: data.len(), borrowed: PhantomData }
    }

    /// The part `range`; bounds are checked.
    ///
    /// # Safety
    /// No element of it is in another part that is in use at the same time.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "that is its purpose; the caller promises disjoint parts")]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        // SAFETY: inside the slice this was made of, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// The first element, for kernels that write tiles. Dereferencing is subject to the promise of [`Disjoint::slice`].
    #[inline]
    pub fn as_ptr(&self) -> *mut T {
        self.ptr
    }
}

thread_local! {
    /// This thread is working on a run, so another run goes inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Locks; a panic elsewhere does not matter, since no lock here guards data that a panic could leave half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value alone on its cache lines (two: neighbours are fetched in pairs), so writers do not slow each other.
#[repr(align(128))]
struct Alone<T>(T);

/// The operation being run. Written only while the gate is closed and nobody is inside.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

/// What caller and workers share.
///
/// `gate` is one word: the run's number, whether workers may still enter, and how many are inside. A worker enters by
/// adding one to an open gate, so it can never enter a run that the caller has already closed.
struct Shared {
    gate: Alone<AtomicU64>,
    /// Next task to hand out.
    cursor: Alone<AtomicUsize>,
    job: UnsafeCell<Job>,
    /// First panic of the run.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Idle workers sleep on `wake`; `n_asleep` lets a caller skip the lock when nobody does.
    sleep: Mutex<()>,
    wake: Condvar,
    n_asleep: AtomicUsize,
    /// The caller sleeps on `all_out` while workers finish their last task.
    caller_asleep: AtomicBool,
    all_out: Condvar,
    stopping: AtomicBool,
    spin_pauses: u32,
}

const OPEN: u64 = 1 << 31;
const INSIDE_MASK: u64 = OPEN - 1;
const RUN_SHIFT: u32 = 32;

// SAFETY: `job` is the only field that is not Sync. It is written by the one caller that holds the turn, while the gate
// is closed and empty, and read by workers between entering and leaving; the gate's operations order the two.
unsafe impl Sync for Shared {}
// SAFETY: as above; the closure a job points to is Sync.
unsafe impl Send for Shared {}

impl Shared {
    fn new(spin_pauses: u32) -> Self {
        Self {
            gate: Alone(AtomicU64::new(0)),
            cursor: Alone(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { task: &|_| (), n_tasks: 0 }),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            n_asleep: AtomicUsize::new(0),
            caller_asleep: AtomicBool::new(false),
            all_out: Condvar::new(),
            stopping: AtomicBool::new(false),
            spin_pauses,
        }
    }

    /// The caller's side: publish, wake, take part, close, wait for those inside.
    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is erased. Workers use the job only inside the gate, and this function does not
        // return (or unwind: `work` catches) before the gate is closed and empty.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, n_tasks };
        // SAFETY: the gate is closed and empty, and the turn keeps other callers out.
        unsafe { *self.job.get() = job };
        self.cursor.0.store(0, Ordering::Relaxed);
        let run = (self.gate.0.load(Ordering::Relaxed) >> RUN_SHIFT).wrapping_add(1) << RUN_SHIFT;
        self.gate.0.store(run | OPEN, Ordering::SeqCst);
        self.wake_workers(n_tasks - 1);
        self.work(job);
        self.gate.0.fetch_and(!OPEN, Ordering::SeqCst);
        self.wait_until_all_out();
    }

    fn wake_workers(&self, n_wanted: usize) {
        // Sequential consistency pairs this with `sleep_until_open`: either the sleeper is counted here, or it sees
        // the gate open.
        let n_asleep = self.n_asleep.load(Ordering::SeqCst);
        if n_asleep == 0 {
            return;
        }
        drop(lock(&self.sleep));
        if n_wanted < n_asleep {
            (0..n_wanted).for_each(|_| self.wake.notify_one());
        } else {
            // One system call. With hundreds of threads a tree (each woken thread wakes two) would spread the kernel's
            // work; at 128 the call takes some tens of us and is paid only when a gap of SPIN_PAUSES went before.
            self.wake.notify_all();
        }
    }

    fn wait_until_all_out(&self) {
        let is_empty = || self.gate.0.load(Ordering::SeqCst) & INSIDE_MASK == 0;
        for _ in 0..self.spin_pauses {
            if is_empty() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.sleep);
        self.caller_asleep.store(true, Ordering::SeqCst);
        while !is_empty() {
            guard = self.all_out.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_asleep.store(false, Ordering::SeqCst);
    }

    /// Takes tasks until none is left. A panic is kept for the caller and ends the run early.
    fn work(&self, job: Job) {
        let tasks = AssertUnwindSafe(|| {
            loop {
                let i = self.cursor.0.fetch_add(1, Ordering::Relaxed);
                if i >= job.n_tasks {
                    break;
                }
                // SAFETY: the closure outlives the run, see `run`.
                unsafe { (*job.task)(i) };
            }
        });
        if let Err(payload) = catch_unwind(tasks) {
            self.cursor.0.store(job.n_tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// A worker's life.
    fn worker(&self) {
        INSIDE.set(true);
        let mut last_run = 0;
        while let Some(run) = self.enter_next(last_run) {
            last_run = run;
            // SAFETY: inside the gate the job is not written.
            let job = unsafe { *self.job.get() };
            self.work(job);
            self.leave();
        }
    }

    /// Enters the next run (not `last_run` again) and returns its number; `None` when the pool is being dropped.
    fn enter_next(&self, last_run: u64) -> Option<u64> {
        loop {
            for _ in 0..=self.spin_pauses {
                let gate = self.gate.0.load(Ordering::Relaxed);
                if self.is_new(gate, last_run) {
                    let entered =
                        self.gate.0.compare_exchange(gate, gate + 1, Ordering::SeqCst, Ordering::Relaxed);
                    if entered.is_ok() {
                        return Some(gate >> RUN_SHIFT);
                    }
                }
                std::hint::spin_loop();
            }
            self.sleep_until_open(last_run);
            if self.stopping.load(Ordering::SeqCst) {
                return None;
            }
        }
    }

    fn is_new(&self, gate: u64, last_run: u64) -> bool {
        gate & OPEN != 0 && gate >> RUN_SHIFT != last_run
    }

    fn sleep_until_open(&self, last_run: u64) {
        let mut guard = lock(&self.sleep);
        self.n_asleep.fetch_add(1, Ordering::SeqCst);
        while !self.is_new(self.gate.0.load(Ordering::SeqCst), last_run)
            && !self.stopping.load(Ordering::SeqCst)
        {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.n_asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn leave(&self) {
        let gate = self.gate.0.fetch_sub(1, Ordering::SeqCst);
        let is_last = gate & INSIDE_MASK == 1 && gate & OPEN == 0;
        if is_last && self.caller_asleep.load(Ordering::SeqCst) {
            drop(lock(&self.sleep));
            self.all_out.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
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
}
