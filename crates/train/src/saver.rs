//! Checkpoints written beside the steps. The state after a step does not change until the next update, which copies each
//! part of it just before it moves it: 12 bytes a parameter that are written to memory and read from caches. A thread
//! writes the copy. Where ranks divide the state each writes its own part so; once all have, the first publishes them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use data::chain;
use model::Stripes;
use serde::{Deserialize, Serialize};
use store::FileEntry;
use tensor::Pool;

use crate::checkpoint::Checkpoints;
use crate::layout::{Place, places};
use crate::state::{Snapshot, State};
use crate::{Event, Result};

/// The writer sleeps between bits of some 0.2 ms of work, this long divided by the threads: it takes 0.3 % of the machine,
/// and where all threads wait for the one that it interrupts and find their caches emptied, 2 % of the time of two. 256 KiB
/// in 32 ms, read twice: 4 MB/s with two threads, half an hour for 12 bytes each of 600 million parameters, 25 steps of
/// which take longer. A lower priority would do the same on a machine of our own, and starve where others want to run, too.
const PAUSE_OF_ONE_THREAD: Duration = Duration::from_millis(64);

/// Writes at most one checkpoint at a time: this rank's part of it.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    /// Of every rank that writes, its part.
    parts: Arc<[Stripes]>,
    /// Which of them is this one's; none where another rank writes all.
    writer: Option<usize>,
    /// Where that lies in the rank's flat vector, and what of it has means of squares.
    stored: [Vec<Place>; 2],
    /// The newest so many stay.
    keep: usize,
    /// Counted, and to be copied by the next update.
    due: Option<Snapshot>,
    writing: Option<Writing>,
    /// What became of the files, until all ranks know.
    written: Option<Written>,
    publishing: Option<Publishing>,
    /// Memory for the next snapshot.
    spare: Snapshot,
    pause: Duration,
}

struct Writing {
    times: Times,
    /// Somebody waits for it: no more pauses.
    hurry: Arc<AtomicBool>,
    thread: JoinHandle<(Snapshot, Result<Vec<FileEntry>>)>,
}

struct Written {
    times: Times,
    counts: Snapshot,
    told: Told,
}

struct Publishing {
    step: u64,
    times: Times,
    thread: JoinHandle<Result<u64>>,
}

/// When it began, and for how long training stood still.
#[derive(Clone, Copy, Default)]
struct Times {
    began: f64,
    stalled: f64,
}

/// What a rank tells the one that publishes.
#[derive(Serialize, Deserialize)]
enum Told {
    Files(Vec<FileEntry>),
    Failed(String),
}

impl Told {
    /// The files of all, or why one has failed.
    fn of_all(all: &[Vec<u8>]) -> Told {
        let mut files = Vec::new();
        for told in all {
            match serde_json::from_slice(told) {
                Ok(Told::Files(of_rank)) => files.extend(of_rank),
                Ok(failed) => return failed,
                Err(error) => return Told::Failed(error.to_string()),
            }
        }
        Told::Files(files)
    }
}

impl Saver {
    /// Of rank `rank`, whose part lies in these ranges of its flat vector, those with means of squares in the second ones; for
    /// steps of so many threads.
    pub(crate) fn new(
        checkpoints: Checkpoints,
        parts: Arc<[Stripes]>,
        (rank, stored): (usize, [&[Range<usize>]; 2]),
        (keep, n_threads): (usize, usize),
    ) -> Saver {
        let writer = Some(rank).filter(|rank| *rank < parts.len());
        // Workers of DiLoCo store their own state.
        let is_used = writer.is_some() && checkpoints.n_workers == 0;
        let stored = if is_used { stored.map(places) } else { Default::default() };
        Saver {
            checkpoints,
            parts,
            writer,
            keep,
            due: None,
            writing: None,
            written: None,
            publishing: None,
            spare: Snapshot::new(stored.clone()),
            stored,
            pause: PAUSE_OF_ONE_THREAD / n_threads.max(1) as u32,
        }
    }

    /// Frees what is only needed while steps go on.
    pub(crate) fn end(&mut self) {
        self.spare = Snapshot::default();
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.due.is_none() && self.writing.is_none() && self.written.is_none() && self.publishing.is_none()
    }

    /// This rank's part of a checkpoint is not stored yet.
    pub(crate) fn is_writing(&mut self) -> bool {
        if self.writing.as_ref().is_some_and(|writing| writing.thread.is_finished()) {
            self.wait(&|| 0.0);
        }
        self.due.is_some() || self.writing.is_some()
    }

    /// A checkpoint of the state as it is now is to be written beside the next steps. There may be no other.
    pub(crate) fn prepare(&mut self, state: &State) {
        assert!(self.is_idle(), "two checkpoints at a time");
        if self.writer.is_some() {
            let mut snapshot = std::mem::take(&mut self.spare);
            state.count_to(&mut snapshot);
            self.due = Some(snapshot);
        }
    }

    /// What the next update copies the vectors to before it changes them, if a checkpoint is due.
    pub(crate) fn due(&mut self) -> Option<&mut Snapshot> {
        self.due.as_mut()
    }

    /// The due snapshot, if there is one, is whole: begins to write it.
    pub(crate) fn begin(&mut self, seconds: &dyn Fn() -> f64) {
        let Some(snapshot) = self.due.take() else { return };
        self.write(snapshot, Times { began: seconds(), stalled: 0.0 });
    }

    /// Copies the state and begins to write it. There may be no other.
    pub(crate) fn begin_at_once(&mut self, pool: &Pool, state: &State, seconds: &dyn Fn() -> f64) {
        let began = seconds();
        self.prepare(state);
        let Some(mut snapshot) = self.due.take() else { return };
        state.copy_all_to(pool, &mut snapshot);
        self.write(snapshot, Times { began, stalled: seconds() - began });
    }

    fn write(&mut self, snapshot: Snapshot, times: Times) {
        let (checkpoints, place) =
            (self.checkpoints.clone(), [self.writer.unwrap_or_default(), self.parts.len()]);
        let hurry = Arc::new(AtomicBool::new(false));
        let mut pace = pace(self.pause, hurry.clone());
        let thread = std::thread::spawn(move || {
            let files = checkpoints.write(&snapshot, place, &mut pace);
            (snapshot, files)
        });
        self.writing = Some(Writing { times, hurry, thread });
    }

    /// Waits until this rank's part is stored.
    pub(crate) fn wait(&mut self, seconds: &dyn Fn() -> f64) {
        let Some(Writing { mut times, hurry, thread }) = self.writing.take() else { return };
        hurry.store(true, Ordering::Relaxed);
        let waited = seconds();
        let done = thread.join();
        times.stalled += seconds() - waited;
        let (snapshot, told) = match done {
            Ok((snapshot, Ok(files))) => (snapshot, Told::Files(files)),
            Ok((snapshot, Err(error))) => (snapshot, Told::Failed(chain(&error))),
            Err(_) => {
                let told = Told::Failed("the thread that wrote it panicked".into());
                (Snapshot::new(self.stored.clone()), told)
            }
        };
        let counts = Snapshot { places: Default::default(), vectors: Default::default(), ..snapshot };
        self.spare = Snapshot { places: snapshot.places, vectors: snapshot.vectors, ..Snapshot::default() };
        self.written = Some(Written { times, counts, told });
    }

    /// For the rank that publishes: what this one has stored.
    pub(crate) fn tell(&self) -> Vec<u8> {
        let nothing = Told::Files(Vec::new());
        let told = self.written.as_ref().map_or(&nothing, |written| &written.told);
        serde_json::to_vec(told).unwrap_or_else(|e| panic!("files are plain data: {e}"))
    }

    /// What some ranks have told, as if one had.
    pub(crate) fn told_by_all(all: &[Vec<u8>]) -> Vec<u8> {
        let told = Told::of_all(all);
        serde_json::to_vec(&told).unwrap_or_else(|e| panic!("files are plain data: {e}"))
    }

    /// All ranks have told. The first begins to publish; says what was wrong, where nothing can be.
    pub(crate) fn all_told(&mut self, all: &[Vec<u8>]) -> Option<Event> {
        let written = self.written.take().filter(|_| self.writer == Some(0));
        let Written { times, counts, .. } = written?;
        let step = counts.step;
        let files = match Told::of_all(all) {
            Told::Files(files) => files,
            Told::Failed(why) => return Some(Event::CheckpointFailed { step, why }),
        };
        let (checkpoints, parts, keep) = (self.checkpoints.clone(), self.parts.clone(), self.keep);
        let thread = std::thread::spawn(move || {
            let bytes = checkpoints.publish(&counts, &files, &parts)?;
            checkpoints.prune(keep)?;
            Ok(bytes)
        });
        self.publishing = Some(Publishing { step, times, thread });
        None
    }

    /// What became of the checkpoint that is being published, once that is known; with `wait` it is waited for.
    pub(crate) fn published(&mut self, wait: bool, seconds: &dyn Fn() -> f64) -> Option<Event> {
        let publishing = self.publishing.take_if(|publishing| wait || publishing.thread.is_finished())?;
        let Publishing { step, mut times, thread } = publishing;
        let waited = seconds();
        let done = thread.join();
        let now = seconds();
        if wait {
            times.stalled += now - waited;
        }
        let Times { began, stalled } = times;
        Some(match done {
            Ok(Ok(bytes)) => Event::Checkpoint { step, bytes, seconds: stalled, write_seconds: now - began },
            Ok(Err(error)) => Event::CheckpointFailed { step, why: chain(&error) },
            Err(_) => Event::CheckpointFailed { step, why: "the thread that published it panicked".into() },
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
