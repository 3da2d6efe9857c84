//! Ranks and collectives: what the processes of one training run say to each other.
//!
//! What this is: the [`Comm`] interface, for threads of one process ([`threads`]) and for processes that MPI started
//! ([`MpiComm`]). What this is not: it knows nothing of tensors or models; it moves and sums flat slices.
//! Where to start: [`tree`] says in which order sums are taken, and why that order makes the bits of a run independent of
//! the number of ranks and of what carries them.
#![forbid(unsafe_code)]

mod group;
mod handshake;
mod mpi_comm;
mod pending;
mod post;
mod record;
mod sent;
mod threads;
pub mod tree;

use std::ops::Range;
use std::sync::Arc;

pub use group::teams;
pub use handshake::{Hello, Refused, handshake};
pub use mpi_comm::{MpiComm, MpiSettings};
pub use pending::{Beside, Pending};
pub use record::{Doing, Record};
pub use threads::{ThreadComm, threads};

/// One rank's end of a group of ranks that run the same program in step.
///
/// Every rank must call the same collectives in the same order with slices of the same length.
/// A collective over one rank is a no-op, so that callers never ask how many ranks there are.
pub trait Comm: Send {
    /// This rank's number, `0 .. n_ranks`.
    fn rank(&self) -> usize;

    /// How many ranks take part.
    fn n_ranks(&self) -> usize;

    /// Waits until every rank has arrived.
    fn barrier(&self) -> Result<(), CommError>;

    /// Replaces this rank's [`tree::shard`] of `values` by the sum over ranks, taken as the binary tree of [`tree`]. The
    /// rest of `values` is left as it is.
    fn reduce_scatter_tree(&self, values: &mut [f32]) -> Result<(), CommError>;

    /// Replaces every other rank's [`tree::shard`] of `values` by what that rank has there.
    fn all_gather_shards(&self, values: &mut [f32]) -> Result<(), CommError>;

    /// Replaces `values` on every rank by the sum over ranks, taken as the binary tree of [`tree`].
    fn all_reduce_tree(&self, values: &mut [f32]) -> Result<(), CommError> {
        self.reduce_scatter_tree(values)?;
        self.all_gather_shards(values)
    }

    /// Begins an operation on `values` that goes on beside what this rank does next; `shards` says whose part is which. The
    /// memory may be longer than what the shards cover. What goes on beside keeps its order, and may overtake the other
    /// operations.
    fn begin(&self, beside: Beside, values: Arc<[f32]>, shards: tree::Shards) -> Result<Pending, CommError>;

    /// Replaces every other rank's ranges of `values` by what that rank has there.
    fn all_gather_of(&self, values: &mut [f32], shards: &tree::Shards) -> Result<(), CommError> {
        let own = shards.own(self.rank(), values);
        let pending = self.begin(Beside::Gather, own, shards.clone())?;
        pending.finish(&mut |at, piece| values[at..at + piece.len()].copy_from_slice(piece)).map(drop)
    }

    /// Every rank's bytes, of any length up to [`BYTES_MAX`], in the order of ranks, on every rank.
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// Every rank's `values`, in the order of ranks, on every rank.
    fn all_gather(&self, values: &[f64]) -> Result<Vec<f64>, CommError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let all = self.all_gather_bytes(&bytes)?;
        let values = all.iter().flat_map(|part| part.as_chunks::<8>().0);
        Ok(values.map(|eight| f64::from_le_bytes(*eight)).collect())
    }

    /// Replaces `values` on every rank by rank 0's.
    fn broadcast(&self, values: &mut [f32]) -> Result<(), CommError>;

    /// Gives `values` to one other rank, which calls [`Comm::receive`] for as many.
    fn send(&self, to: usize, values: &[f32]) -> Result<(), CommError>;

    /// As [`Comm::send`], of the first `len` values, and does not wait until they have gone. What one rank gives another
    /// comes in the order in which it was given, either way.
    fn post(&self, to: usize, values: (Arc<[f32]>, usize)) -> Result<(), CommError>;

    fn receive(&self, from: usize, values: &mut [f32]) -> Result<(), CommError>;

    /// Bytes that this rank has sent to each so far.
    fn sent_to(&self) -> Vec<u64>;

    fn bytes_sent(&self) -> u64 {
        self.sent_to().iter().sum()
    }

    /// Ends in order, once every rank has come here. A rank that only drops its end has failed.
    fn leave(&self) -> Result<(), CommError>;
}

/// The most that one rank brings to [`Comm::all_gather_bytes`]: 1 M micro-batches' sums are 24 MB.
pub const BYTES_MAX: usize = 64 << 20;

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
    #[error("a group needs a rank")]
    NoRanks,
    #[error("{n_ranks} ranks are no whole number of teams of {n_team}")]
    NoTeams { n_ranks: usize, n_team: usize },
    #[error("{operation}: {n_bytes} bytes of rank {rank} are more than {BYTES_MAX}")]
    TooLong { operation: &'static str, rank: usize, n_bytes: u64 },
    #[error(
        "the launcher started {launched} ranks, the MPI library {library} sees {seen}: it is not the launcher's"
    )]
    OtherLibrary { launched: usize, seen: usize, library: String },
    #[error("the thread that speaks MPI stopped")]
    ThreadStopped,
    #[error("{operation}")]
    Mpi {
        operation: &'static str,
        #[source]
        source: mpi::Error,
    },
}

impl CommError {
    /// The ranks that were waited for in vain.
    pub fn missing(&self) -> &[usize] {
        match self {
            CommError::TimedOut { missing, .. } => missing,
            CommError::RankStopped { rank, .. } => std::slice::from_ref(rank),
            _ => &[],
        }
    }
}

/// `range` in pieces of at most `len`.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(len).map(move |start| start..(start + len).min(range.end))
}
