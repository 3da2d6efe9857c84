//! Checkpoints written beside the steps. The state after a step does not change until the next update, which copies each
//! part of it just before it moves it: 12 bytes a parameter that are written to memory and read from caches. A thread
//! writes the copy. (Where ranks divide the state, rank 0 gathers it, and copies that at once.)

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use data::chain;
use tensor::Pool;

use crate::checkpoint::Checkpoints;
use crate::state::{Snapshot, State};
use crate::{Event, Result};

/// The writer sleeps between bits of some 0.2 ms of work, this long divided by the threads: it takes 0.6 % of the machine,
/// and where all threads wait for the one that it interrupts, 1.2 % of the time of two. 256 KiB in 16 ms, read twice: 8
/// MB/s with two threads, a quarter of an hour for 12 bytes each of 600 million parameters, 25 steps of which take longer. A
/// lower priority would do the same on a machine of our own, and starve where others want to run, too.
const PAUSE_OF_ONE_THREAD: Duration = Duration::from_millis(32);

/// Writes at most one checkpoint at a time.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    /// The newest so many stay.
    keep: usize,
    /// Counted, and to be copied by the next update.
    due: Option<Snapshot>,
    in_flight: Option<InFlight>,
    /// Memory for the next snapshot.
    spare: Snapshot,
    pause: Duration,
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
    /// For steps of so many threads.
    pub(crate) fn new(checkpoints: Checkpoints, keep: usize, n_threads: usize) -> Saver {
        let pause = PAUSE_OF_ONE_THREAD / n_threads.max(1) as u32;
        // Workers of DiLoCo store their own state.
        let n_copied = if checkpoints.n_workers > 0 { 0 } else { checkpoints.n_params };
        let spare = Snapshot::new(n_copied);
        Saver { checkpoints, keep, due: None, in_flight: None, spare, pause }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_none() && self.due.is_none()
    }

    /// A checkpoint of the state as it is now is to be written beside the next steps. There may be no other.
    pub(crate) fn prepare(&mut self, state: &State) {
        assert!(self.is_idle(), "two checkpoints at a time");
        let mut snapshot = std::mem::take(&mut self.spare);
        state.count_to(&mut snapshot);
        self.due = Some(snapshot);
    }

    /// What the next update copies the vectors to before it changes them, if a checkpoint is due.
    pub(crate) fn due(&mut self) -> Option<&mut Snapshot> {
        self.due.as_mut()
    }

    /// The due snapshot, if there is one, is whole: begins to write it.
    pub(crate) fn begin(&mut self, seconds: &dyn Fn() -> f64) {
        let Some(snapshot) = self.due.take() else { return };
        self.write(snapshot, (seconds(), 0.0));
    }

    /// Copies the state and begins to write it. There may be no other.
    pub(crate) fn begin_at_once(&mut self, pool: &Pool, state: &State, seconds: &dyn Fn() -> f64) {
        assert!(self.is_idle(), "two checkpoints at a time");
        let began = seconds();
        let mut snapshot = std::mem::take(&mut self.spare);
        state.count_to(&mut snapshot);
        state.copy_to(pool, &mut snapshot, 0..state.params.len());
        self.write(snapshot, (began, seconds() - began));
    }

    fn write(&mut self, snapshot: Snapshot, (began, stalled_seconds): (f64, f64)) {
        let (checkpoints, keep, step) = (self.checkpoints.clone(), self.keep, snapshot.step);
        let hurry = Arc::new(AtomicBool::new(false));
        let mut pace = pace(self.pause, hurry.clone());
        let thread = std::thread::spawn(move || {
            let saved = checkpoints.save(&snapshot, &mut pace).and_then(|bytes| {
                checkpoints.prune(keep)?;
                Ok(bytes)
            });
            (snapshot, saved)
        });
        self.in_flight = Some(InFlight { step, began, stalled_seconds, hurry, thread });
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
            Err(_) => {
                self.spare = Snapshot::new(self.checkpoints.n_params);
                Event::CheckpointFailed { step, why: "the thread that wrote it panicked".into() }
            }
        })
    }
}

fn pace(pause: Duration, hurry: Arc<AtomicBool>) -> impl FnMut() {
    move || {
        if !hurry.load(Ordering::Relaxed) {
            std::thread::sleep(pause);
        }
    }
}
