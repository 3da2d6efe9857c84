//! Checkpoints written beside the steps: the state is copied, which training waits for, and a thread writes the copy.

use std::thread::JoinHandle;

use tensor::Pool;

use crate::checkpoint::{Checkpoints, chain};
use crate::state::{Snapshot, State};
use crate::{Event, Result};

/// Writes at most one checkpoint at a time.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    /// The newest so many stay.
    keep: usize,
    /// Called by the thread that writes, so that steps hardly notice it.
    yield_to_others: fn(),
    in_flight: Option<InFlight>,
    /// Memory for the next snapshot.
    spare: Snapshot,
}

struct InFlight {
    step: u64,
    /// When it began, and for how long training stood still.
    began: f64,
    stalled_seconds: f64,
    thread: JoinHandle<(Snapshot, Result<u64>)>,
}

impl Saver {
    pub(crate) fn new(checkpoints: Checkpoints, keep: usize, yield_to_others: fn()) -> Saver {
        Saver { checkpoints, keep, yield_to_others, in_flight: None, spare: Snapshot::default() }
    }

    /// Begins to write a checkpoint; `false` while one is being written.
    pub(crate) fn begin(&mut self, pool: &Pool, state: &State, seconds: &dyn Fn() -> f64) -> bool {
        if self.in_flight.is_some() {
            return false;
        }
        let began = seconds();
        let mut snapshot = std::mem::take(&mut self.spare);
        state.copy_to(pool, &mut snapshot);
        let (checkpoints, keep, yield_to_others) =
            (self.checkpoints.clone(), self.keep, self.yield_to_others);
        let thread = std::thread::spawn(move || {
            yield_to_others();
            let saved = checkpoints.save(&snapshot).and_then(|bytes| {
                checkpoints.prune(keep)?;
                Ok(bytes)
            });
            (snapshot, saved)
        });
        let stalled_seconds = seconds() - began;
        self.in_flight = Some(InFlight { step: state.step, began, stalled_seconds, thread });
        true
    }

    /// What became of the checkpoint that is being written, once that is known; with `wait` it is waited for.
    pub(crate) fn finished(&mut self, wait: bool, seconds: &dyn Fn() -> f64) -> Option<Event> {
        let in_flight = self.in_flight.take_if(|in_flight| wait || in_flight.thread.is_finished())?;
        let InFlight { step, began, mut stalled_seconds, thread } = in_flight;
        let waited = seconds();
        let done = thread.join();
        let now = seconds();
        if wait {
            stalled_seconds += now - waited;
        }
        Some(match done {
            Ok((snapshot, saved)) => {
                self.spare = snapshot;
                match saved {
                    Ok(bytes) => Event::Checkpoint {
                        step,
                        bytes,
                        seconds: stalled_seconds,
                        write_seconds: now - began,
                    },
                    Err(error) => Event::CheckpointFailed { step, why: chain(&error) },
                }
            }
            Err(_) => Event::CheckpointFailed { step, why: "the thread that wrote it panicked".into() },
        })
    }
}
