//! [`Pool`]: threads that share the tasks of one operation.
//!
//! An operation is a closure and a number of tasks. Threads take task numbers from one counter until none is left, so
//! a thread that loses its core to another process costs the task it holds, not its share. The caller works too, and
//! waits only for threads that hold a task: one that has not even woken up yet is not waited for.
//!
//! An operation whose neighbouring tasks lie side by side in memory gives each thread a share of neighbours first
//! ([`Pool::run_shares`]); a thread that is done with its own helps with the others'.
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

mod ahead;
#[cfg(test)]
mod tests;

use crate::cpu::{self, Level};
use ahead::Ahead;

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
        let shared = Arc::new(Shared::new(n_threads, spin_pauses));
        let spawn = |i| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("tensor-{i}"));
            thread.spawn(move || shared.worker(i)).ok()
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
        self.run_job(n_tasks, n_tasks, task, &|_| &[]);
    }

    /// As [`Pool::run`], but each thread begins with neighbouring tasks, and helps the others when it is done with them: what
    /// a kernel asks memory for ahead of itself, its own thread uses. A thread that has nothing to do afterwards fetches what
    /// `ahead` names for it, by its number (0 is the caller, who can only while the others end), into its second-level
    /// cache: what it will read first in the next operation of this kind.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub fn run_shares<'a>(
        &self,
        n_tasks: usize,
        task: &(dyn Fn(usize) + Sync),
        ahead: &dyn Fn(usize) -> &'a [u8],
    ) {
        self.run_job(n_tasks, n_tasks.div_ceil(self.n_threads()), task, ahead);
    }

    fn run_job<'a>(
        &self,
        n_tasks: usize,
        share: usize,
        task: &(dyn Fn(usize) + Sync),
        ahead: &dyn Fn(usize) -> &'a [u8],
    ) {
        if n_tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            return (0..n_tasks).for_each(task);
        }
        let turn = lock(&self.turn);
        INSIDE.set(true);
        self.shared.run(n_tasks, share, task, ahead);
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
    /// Neighbouring tasks that one thread begins with; the last share may be smaller.
    share: usize,
}

impl Job {
    fn n_shares(&self) -> usize {
        self.n_tasks.div_ceil(self.share)
    }
}

/// What a thread begins a run with.
#[derive(Default)]
struct Share {
    /// Next of its tasks to hand out.
    cursor: AtomicUsize,
    /// For the time after the run. Written and read as the job is.
    ahead: Cell<Ahead>,
}

/// Side by side, because each trip of a cache line from core to core takes a tenth of a microsecond: who has seen the word
/// has the job.
struct Gate {
    word: AtomicU64,
    job: UnsafeCell<Job>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { word: AtomicU64::new(0), job: UnsafeCell::new(Job { task: &|_| (), n_tasks: 0, share: 1 }) }
    }
}

/// What caller and workers share.
///
/// `gate` is one word: the run's number, whether workers may still enter, and how many are inside. A worker enters by
/// adding one to an open gate, so it can never enter a run that the caller has already closed.
struct Shared {
    gate: Alone<Gate>,
    /// One for each thread; a run of one share uses the first.
    shares: Box<[Alone<Share>]>,
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

// SAFETY: `job` and each share's `ahead` are all that is not Sync. They are written by the one caller that holds the turn,
// while the gate is closed and empty, and read by workers between entering and leaving; the gate's operations order the two.
unsafe impl Sync for Shared {}
// SAFETY: as above; the closure a job points to is Sync.
unsafe impl Send for Shared {}

impl Shared {
    fn new(n_threads: usize, spin_pauses: u32) -> Self {
        Self {
            gate: Alone(Gate::default()),
            shares: std::iter::repeat_with(|| Alone(Share::default())).take(n_threads).collect(),
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
    fn run<'a>(
        &self,
        n_tasks: usize,
        share: usize,
        task: &(dyn Fn(usize) + Sync),
        ahead: &dyn Fn(usize) -> &'a [u8],
    ) {
        // SAFETY: only the lifetime is erased. Workers use the job only inside the gate, and this function does not
        // return (or unwind: `work` catches) before the gate is closed and empty.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, n_tasks, share };
        // SAFETY: the gate is closed and empty, and the turn keeps other callers out.
        unsafe { *self.gate.0.job.get() = job };
        // At 128 threads these are as many cache lines that others hold: some us.
        for (i, Alone(mine)) in self.shares[..job.n_shares()].iter().enumerate() {
            mine.cursor.store(i * share, Ordering::Relaxed);
            mine.ahead.set(Ahead::new(ahead(i)));
        }
        let run = (self.gate.0.word.load(Ordering::Relaxed) >> RUN_SHIFT).wrapping_add(1) << RUN_SHIFT;
        self.gate.0.word.store(run | OPEN, Ordering::SeqCst);
        self.wake_workers(n_tasks - 1);
        self.work(job, 0);
        self.gate.0.word.fetch_and(!OPEN, Ordering::SeqCst);
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
        let is_empty = || self.gate.0.word.load(Ordering::SeqCst) & INSIDE_MASK == 0;
        let mut ahead = self.shares[0].0.ahead.get();
        for _ in 0..self.spin_pauses {
            if is_empty() {
                return;
            }
            if !ahead.fetch_some() {
                std::hint::spin_loop();
            }
        }
        let mut guard = lock(&self.sleep);
        self.caller_asleep.store(true, Ordering::SeqCst);
        while !is_empty() {
            guard = self.all_out.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_asleep.store(false, Ordering::SeqCst);
    }

    /// Takes tasks until none is left: of the thread's own share, then of the others'. A panic is kept for the caller and ends
    /// the run early.
    fn work(&self, job: Job, thread: usize) {
        let shares = &self.shares[..job.n_shares()];
        let tasks = AssertUnwindSafe(|| {
            for i in (0..shares.len()).map(|i| (thread + i) % shares.len()) {
                let (cursor, end) = (&shares[i].0.cursor, job.n_tasks.min((i + 1) * job.share));
                // A look first: it leaves the line where others that are done look as well.
                while cursor.load(Ordering::Relaxed) < end {
                    let task = cursor.fetch_add(1, Ordering::Relaxed);
                    if task < end {
                        // SAFETY: the closure outlives the run, see `run`.
                        unsafe { (*job.task)(task) };
                    }
                }
            }
        });
        if let Err(payload) = catch_unwind(tasks) {
            shares.iter().for_each(|share| share.0.cursor.store(job.n_tasks, Ordering::Relaxed));
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// A worker's life.
    fn worker(&self, thread: usize) {
        INSIDE.set(true);
        let (mut last_run, mut ahead) = (0, Ahead::default());
        while let Some(run) = self.enter_next(last_run, &mut ahead) {
            last_run = run;
            // SAFETY: inside the gate the job is not written.
            let job = unsafe { *self.gate.0.job.get() };
            self.work(job, thread);
            if thread < job.n_shares() {
                ahead = self.shares[thread].0.ahead.get();
            }
            self.leave();
        }
    }

    /// Enters the next run (not `last_run` again) and returns its number; `None` when the pool is being dropped.
    fn enter_next(&self, last_run: u64, ahead: &mut Ahead) -> Option<u64> {
        loop {
            let mut n_looks = 0;
            while n_looks <= self.spin_pauses {
                let gate = self.gate.0.word.load(Ordering::Relaxed);
                if self.is_new(gate, last_run) {
                    let entered = self.gate.0.word.compare_exchange(
                        gate,
                        gate + 1,
                        Ordering::SeqCst,
                        Ordering::Relaxed,
                    );
                    if entered.is_ok() {
                        return Some(gate >> RUN_SHIFT);
                    }
                }
                if self.spin_pauses == 0 || !ahead.fetch_some() {
                    n_looks += 1;
                    std::hint::spin_loop();
                }
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
        while !self.is_new(self.gate.0.word.load(Ordering::SeqCst), last_run)
            && !self.stopping.load(Ordering::SeqCst)
        {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.n_asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn leave(&self) {
        let gate = self.gate.0.word.fetch_sub(1, Ordering::SeqCst);
        let is_last = gate & INSIDE_MASK == 1 && gate & OPEN == 0;
        if is_last && self.caller_asleep.load(Ordering::SeqCst) {
            drop(lock(&self.sleep));
            self.all_out.notify_one();
        }
    }
}
