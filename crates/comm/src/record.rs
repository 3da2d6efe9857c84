//! [`Record`]: what a rank is doing right now, for those who ask why nothing moves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Shared between the rank, what speaks for it, and whoever reports on it.
#[derive(Clone)]
pub struct Record(Arc<Mutex<Entry>>);

struct Entry {
    doing: Doing,
    since: Instant,
}

/// What a rank was doing when it was asked.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Doing {
    /// The step it is in, counted from 0.
    pub step: u64,
    /// Its own work: "gradients", "evaluation".
    pub work: String,
    /// The collective it is in, if it is.
    pub operation: Option<String>,
    /// Ranks that the operation still waits for.
    pub waits_for: Vec<usize>,
    /// Operations that it has begun so far: ranks that differ in it are not in the same one.
    pub n_operations: u64,
    /// For how long.
    pub seconds: f64,
}

impl Default for Record {
    fn default() -> Record {
        let work = "starting".to_owned();
        let doing =
            Doing { step: 0, work, operation: None, waits_for: Vec::new(), n_operations: 0, seconds: 0.0 };
        Record(Arc::new(Mutex::new(Entry { doing, since: Instant::now() })))
    }
}

impl Record {
    /// The rank begins with this part of a step.
    pub fn work(&self, step: u64, work: &str) {
        let mut entry = self.entry();
        entry.doing.step = step;
        entry.doing.work.clear();
        entry.doing.work.push_str(work);
        entry.since = Instant::now();
    }

    pub(crate) fn begin(&self, operation: &str) {
        let mut entry = self.entry();
        entry.doing.operation = Some(operation.to_owned());
        entry.doing.n_operations += 1;
        entry.since = Instant::now();
    }

    pub(crate) fn waits_for(&self, ranks: Vec<usize>) {
        self.entry().doing.waits_for = ranks;
    }

    pub(crate) fn end(&self) {
        let mut entry = self.entry();
        entry.doing.operation = None;
        entry.doing.waits_for.clear();
        entry.since = Instant::now();
    }

    pub fn doing(&self) -> Doing {
        let entry = self.entry();
        Doing { seconds: entry.since.elapsed().as_secs_f64(), ..entry.doing.clone() }
    }

    fn entry(&self) -> MutexGuard<'_, Entry> {
        // Plain data: whoever panicked with the lock has left it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Display for Doing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "step {}, {}", self.step, self.work)?;
        if let Some(operation) = &self.operation {
            write!(f, ", {operation} (operation {})", self.n_operations)?;
        }
        if !self.waits_for.is_empty() {
            write!(f, ", waiting for {:?}", self.waits_for)?;
        }
        write!(f, " for {:.1} s", self.seconds)
    }
}
