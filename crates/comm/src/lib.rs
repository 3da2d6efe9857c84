//! Ranks and collectives: what the processes of one training run say to each other.
//!
//! What this is: the [`Comm`] interface and its implementation for threads of one process
//! ([`threads`]). MPI between machines becomes a second implementation of the same trait.
//! What this is not: it knows nothing of tensors or models; it moves and sums flat slices.
//! Where to start: [`tree`] says in which order sums are taken, and why that order makes the bits of
//! a run independent of the number of ranks.
#![forbid(unsafe_code)]

mod threads;
pub mod tree;

pub use threads::{ThreadComm, threads};

/// One rank's end of a group of ranks that run the same program in step.
///
/// Every rank must call the same collectives in the same order with slices of the same length.
/// A collective over one rank is a no-op, so that callers never ask how many ranks there are.
pub trait Comm: Send {
    /// This rank's number, `0 .. n_ranks`.
    fn rank(&self) -> usize;

    /// How many ranks take part; a power of two (see [`tree`]).
    fn n_ranks(&self) -> usize;

    /// Waits until every rank has arrived.
    fn barrier(&self) -> Result<(), CommError>;

    /// Replaces `values` on every rank by the sum over ranks, taken as the binary tree of [`tree`].
    fn all_reduce_tree(&self, values: &mut [f32]) -> Result<(), CommError>;

    /// Every rank's `values`, in the order of ranks, on every rank.
    fn all_gather(&self, values: &[f64]) -> Result<Vec<f64>, CommError>;

    /// Replaces `values` on every rank by rank 0's.
    fn broadcast(&self, values: &mut [f32]) -> Result<(), CommError>;
}

/// Why a collective could not be completed. The group is of no use afterwards: the job restarts from
/// its checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    #[error("rank {rank} stopped while rank {waiting} waited for it in {operation}")]
    RankStopped { rank: usize, waiting: usize, operation: &'static str },
    #[error("rank {waiting} waited {seconds} s in {operation}; missing: {missing:?}")]
    TimedOut { waiting: usize, seconds: u64, operation: &'static str, missing: Vec<usize> },
    #[error("{operation}: rank {rank} brought {got} values where rank {waiting} brought {expected}")]
    LengthDiffers { operation: &'static str, rank: usize, waiting: usize, got: usize, expected: usize },
    #[error("{n_ranks} ranks: the fixed order of sums needs a power of two")]
    NotAPowerOfTwo { n_ranks: usize },
}
