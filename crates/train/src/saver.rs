//! Checkpoints written beside the steps: the state is copied, which training waits for, and a thread writes the copy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use data::chain;
use tensor::Pool;

use crate::checkpoint::Checkpoints;
use crate::state::{Snapshot, State};
use crate::{Event, Result};

/// The writer sleeps this long between bits of some 0.2 ms of work, so that it takes 2 to 3 % of a core: steps go on as if
/// it were not there. 20 MB/s, 12 bytes a parameter: half a minute for 50 million. A lower priority would do the same on a
/// machine of our own, and starve where others want to run, too.
const PAUSE: Duration = Duration::from_millis(8);

/// Writes at most one checkpoint at a time.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    /// The newest so many stay.
    keep: usize,
    in_flight: Option<InFlight>,
    /// Memory for the next snapshot.
    spare: Snapshot,
}

struct InFlight {
    step: u64,
    /// When it began, and for how long training stood still.
    began: f64,
    stalled_seconds: f64,
    /// Somebody waits for it: no more pauses.
    hurry: Arc<AtomicBool>,
    thread: JoinHandle<(Snapshot, Result<u64>)>,
}

impl Saver {
    pub(crate) fn new(checkpoints: Checkpoints, keep: usize) -> Saver {
        Saver { checkpoints, keep, in_flight: None, spare: Snapshot::default() }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_none()
    }

    /// Begins to write a checkpoint; `false` while one is being written.
    pub(crate) fn begin(&mut self, pool: &Pool, state: &State, seconds: &dyn Fn() -> f64) -> bool {
        if self.in_flight.is_some() {
            return false;
        }
        let began = seconds();
        let mut snapshot = std::mem::take(&mut self.spare);
        state.copy_to(pool, &mut snapshot);
        let (checkpoints, keep) = (self.checkpoints.clone(), self.keep);
        let hurry = Arc::new(AtomicBool::new(false));
        let mut pace = pace(hurry.clone());
        let thread = std::thread::spawn(move || {
            let saved = checkpoints.save(&snapshot, &mut pace).and_then(|bytes| {
                checkpoints.prune(keep)?;
                Ok(bytes)
            });
            (snapshot, saved)
        });
        let stalled_seconds = seconds() - began;
        self.in_flight = Some(InFlight { step: state.step, began, stalled_seconds, hurry, thread });
        true
    }

    /// What became of the checkpoint that is being written, once that is known; with `wait` it is waited for.
    pub(crate) fn finished(&mut self, wait: bool, seconds: &dyn Fn() -> f64) -> Option<Event> {
        let in_flight = self.in_flight.take_if(|in_flight| wait || in_flight.thread.is_finished())?;
        let InFlight { step, began, mut stalled_seconds, hurry, thread } = in_flight;
        hurry.store(true, Ordering::Relaxed);
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

fn pace(hurry: Arc<AtomicBool>) -> impl FnMut() {
    move || {
        if !hurry.load(Ordering::Relaxed) {
            std::thread::sleep(PAUSE);
        }
    }
}
