//! [`Pending`]: an operation that goes on beside what the rank does meanwhile.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use crate::CommError;
use crate::post::{Job, Reply, Spare};
use crate::tree::Shards;

/// Operations that can go on beside others, see [`crate::Comm::begin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// From values of every rank to this rank's shard of their sum.
    ReduceScatter,
    /// From this rank's shard, without gaps, to the shards of all others.
    Gather,
    /// From values of every rank to their sum.
    AllReduce,
}

impl Beside {
    pub(crate) fn job(self, values: Arc<[f32]>, shards: Shards) -> Job {
        match self {
            Beside::ReduceScatter => Job::ReduceScatter(values, shards),
            Beside::Gather => Job::GatherShards(values, shards),
            Beside::AllReduce => Job::AllReduce(values, shards),
        }
    }
}

/// May be finished in any order. One that is dropped goes on all the same.
pub struct Pending(State);

enum State {
    /// There is only one rank: what it brought is the result.
    There(Beside, Arc<[f32]>, Shards),
    Coming(Receiver<Reply>, Spare),
}

impl Pending {
    pub(crate) fn there(beside: Beside, values: Arc<[f32]>, shards: Shards) -> Pending {
        Pending(State::There(beside, values, shards))
    }

    pub(crate) fn coming(replies: Receiver<Reply>, spare: Spare) -> Pending {
        Pending(State::Coming(replies, spare))
    }

    /// Waits for the result, and gives it to `take` in pieces, each with where it begins. Of a reduce-scatter that is this
    /// rank's shard, of a gather the others'. Returns for how many seconds the operation went on.
    pub fn finish(self, take: &mut dyn FnMut(usize, &[f32])) -> Result<f64, CommError> {
        let (replies, spare) = match self.0 {
            State::There(Beside::Gather, ..) => return Ok(0.0),
            State::There(_, values, shards) => {
                shards.of(0).iter().for_each(|range| take(range.start, &values[range.clone()]));
                return Ok(0.0);
            }
            State::Coming(replies, spare) => (replies, spare),
        };
        loop {
            match replies.recv().map_err(|_| CommError::ThreadStopped)? {
                Reply::Values(at, piece) => {
                    take(at, &piece);
                    spare.put(piece);
                }
                Reply::Bytes(_) | Reply::Left(..) | Reply::Parted => {}
                Reply::Done(done) => return done,
            }
        }
    }
}
