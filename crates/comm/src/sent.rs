//! [`Sent`]: how many bytes a rank has sent, by whom they were for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared between a rank and what sends for it.
#[derive(Clone)]
pub(crate) struct Sent(Arc<[AtomicU64]>);

impl Sent {
    pub(crate) fn new(n_ranks: usize) -> Sent {
        Sent((0..n_ranks).map(|_| AtomicU64::default()).collect())
    }

    pub(crate) fn add(&self, to: usize, n_bytes: usize) {
        if let Some(sent) = self.0.get(to) {
            sent.fetch_add(n_bytes as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn by_rank(&self) -> Vec<u64> {
        self.0.iter().map(|sent| sent.load(Ordering::Relaxed)).collect()
    }
}
