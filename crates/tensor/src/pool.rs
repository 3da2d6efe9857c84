//! [`Pool`]: threads that share the tasks of one operation.

use crate::cpu::{self, Level};

/// Threads that work on one operation at a time.
pub struct Pool {
    n_threads: usize,
    level: Level,
}

impl Pool {
    /// A pool of `n_threads` in all, the caller of [`Pool::run`] included.
    pub fn new(n_threads: usize) -> Self {
        Self::with_level(n_threads, cpu::features().level)
    }

    /// As [`Pool::new`], with ops at `level` (or the best this machine has). For tests and benches.
    pub fn with_level(n_threads: usize, level: Level) -> Self {
        Self { n_threads: n_threads.max(1), level: level.available() }
    }

    /// Threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Instruction set the ops given this pool run on.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Calls `task(i)` once for every i in `0..n_tasks`, on all threads, in no particular order, and returns when all
    /// are done.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..n_tasks).for_each(task);
    }
}
