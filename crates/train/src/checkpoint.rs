//! Checkpoints: everything a step depends on, published as one bundle, so that a run killed at any instant goes on
//! bit for bit where its newest checkpoint stands.
//!
//! Files are flat vectors in little-endian f32, parameters in the order of the model's table. Where ranks divide the state or
//! compute a part of the model each writes what it owns, into files of its own, and nobody ever has all of it; the manifest
//! says which stripes of the whole model's vectors lie where. (What Muon updates has no mean of squares: builds before this wrote
//! zeros for it, which are read over.) Whoever reads takes what it needs, from the files that have
//! some of it, so any number of ranks can, whatever they divide. (A file is read whole: its checksum is.)

use std::ops::Range;
use std::sync::Arc;

use data::chain;
use model::{Stripe, Stripes};
use serde::{Deserialize, Serialize};
use store::{Bundle, BundleWriter, FileEntry, Store};
use tensor::Buf;

use crate::guard::Health;
use crate::layout::Layout;
use crate::state::{Snapshot, State};
use crate::{Error, Event, Result};

mod rounds;

const KIND: &str = "checkpoint";
/// Of [`Snapshot::vectors`].
const VECTORS: [&str; 3] = ["params", "adam_m", "adam_v"];
/// Ranks that have written a checkpoint.
const WRITERS_MAX: usize = 1 << 16;

/// What a checkpoint says of itself.
#[derive(Serialize, Deserialize)]
struct Meta {
    run: String,
    plan_sha256: String,
    step: u64,
    tokens: u64,
    elapsed_seconds: f64,
    n_params: usize,
    /// Absent in checkpoints of builds that skipped no steps.
    #[serde(default)]
    health: Health,
    /// Of every rank that wrote, its stripes of the vectors, in the order in which they lie in its files; empty where one
    /// has written all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parts: Vec<Stripes>,
    /// Of every worker of DiLoCo.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    workers: Vec<Health>,
}

/// Which run's checkpoints are meant, and of which plan.
#[derive(Clone)]
pub(crate) struct Checkpoints {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) run: String,
    pub(crate) plan_sha256: String,
    pub(crate) n_params: usize,
    /// Of DiLoCo; 0 without it.
    pub(crate) n_workers: usize,
    /// What of the whole model's vector has means of squares.
    pub(crate) squared: Vec<Range<usize>>,
}

/// Who reads a checkpoint.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    pub(crate) layout: &'a Layout,
    /// Where its flat vector lies in the whole model's.
    pub(crate) stripes: &'a Stripes,
    /// Of DiLoCo, those that it runs.
    pub(crate) workers: Range<usize>,
}

/// Which numbers of the whole's vectors are sought, in the order of the whole, and where they go.
struct Sought(Vec<(Range<usize>, usize)>);

/// What one rank goes on from.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub(crate) state: State,
    /// The state of its workers, where workers have one each.
    pub(crate) workers: Vec<State>,
}

/// The name of a rank's file of a vector.
fn file_name(vector: &str, writer: usize, n_writers: usize) -> String {
    if n_writers == 1 { format!("{vector}.f32") } else { format!("{vector}.{writer:05}.f32") }
}

impl Checkpoints {
    fn prefix(&self, step: u64) -> String {
        format!("runs/{}/checkpoints/{step:08}", self.run)
    }

    /// Stores one rank's files, calling `pace` now and then. They are part of nothing yet.
    pub(crate) fn write(
        &self,
        snapshot: &Snapshot,
        [writer, n_writers]: [usize; 2],
        pace: &mut dyn FnMut(),
    ) -> Result<Vec<FileEntry>> {
        let mut bundle = BundleWriter::new(&self.store, &self.prefix(snapshot.step))?;
        let files = VECTORS.iter().zip(&snapshot.vectors);
        let write = |(vector, bytes): (&&str, &Vec<u8>)| {
            Ok(bundle.add_paced(&file_name(vector, writer, n_writers), bytes, pace)?)
        };
        files.map(write).collect()
    }

    /// Publishes what the ranks have stored; when this returns it survives any crash. Returns its size in bytes.
    pub(crate) fn publish(&self, counts: &Snapshot, files: &[FileEntry], parts: &[Stripes]) -> Result<u64> {
        let prefix = self.prefix(counts.step);
        let mut bundle = BundleWriter::new(&self.store, &prefix)?;
        for file in files {
            if !bundle.add_stored(file)? {
                let what = format!("{} is not in this rank's store", file.name);
                return Err(Error::Checkpoint { prefix, what });
            }
        }
        let meta = Meta {
            run: self.run.clone(),
            plan_sha256: self.plan_sha256.clone(),
            step: counts.step,
            tokens: counts.tokens,
            elapsed_seconds: counts.elapsed_seconds,
            n_params: self.n_params,
            health: counts.health,
            parts: if parts.len() > 1 { parts.to_vec() } else { Vec::new() },
            workers: Vec::new(),
        };
        let meta = serde_json::to_value(meta).map_err(Error::PlanJson)?;
        let manifest = bundle.publish(KIND, meta)?;
        Ok(manifest.files.iter().map(|f| f.bytes).sum())
    }

    /// The newest checkpoint that can be read and belongs to this plan, as far as the reader needs it. One that cannot is reported and the one before it is tried; when there are some and none can be read, that is
    /// an error: a run never starts over in silence.
    pub(crate) fn load_newest(
        &self,
        reader: &Reader,
        report: &mut dyn FnMut(Event),
    ) -> Result<Option<Loaded>> {
        let mut refused = None;
        for step in self.steps()?.into_iter().rev() {
            match self.load(step, reader) {
                Ok(Some(loaded)) => return Ok(Some(loaded)),
                Ok(None) => {}
                Err(error) => {
                    report(Event::CheckpointRefused { step, why: chain(&error) });
                    refused = Some(error);
                }
            }
        }
        match refused {
            Some(last) => Err(Error::NoCheckpoint { run: self.run.clone(), last: Box::new(last) }),
            None => Ok(None),
        }
    }

    /// `None` when it was never published whole.
    pub(crate) fn load(&self, step: u64, reader: &Reader) -> Result<Option<Loaded>> {
        let Some(bundle) = Bundle::open(&self.store, &self.prefix(step))? else {
            return Ok(None);
        };
        let meta = self.meta(step, &bundle)?;
        if self.n_workers > 0 {
            return self.load_round((step, &bundle), &meta, reader).map(Some);
        }
        let mut state = State::empty(reader.layout);
        let squared = state.squared.iter().map(|place| place.at.clone()).collect();
        let [kept, owned, squared] = [state.params_kept(), state.owned(), squared]
            .map(|ranges| Sought::new(&reader.stripes.cut(&ranges)));
        let vectors = [&mut state.params, &mut state.adam_m, &mut state.adam_v];
        for ((vector, sought), values) in VECTORS.iter().zip([&kept, &owned, &squared]).zip(vectors) {
            for (writer, written) in meta.parts.iter().enumerate() {
                let file = file_name(vector, writer, meta.parts.len());
                let written = self.written((&bundle, &file), vector, written);
                self.read((step, &bundle, &file), &written, (sought, values))?;
            }
        }
        (state.step, state.tokens, state.elapsed_seconds) = (step, meta.tokens, meta.elapsed_seconds);
        state.health = meta.health;
        Ok(Some(Loaded { state, workers: Vec::new() }))
    }

    /// What the checkpoint says of itself, if it can be one of this run; `parts` covers the vectors.
    fn meta(&self, step: u64, bundle: &Bundle) -> Result<Meta> {
        let refuse = |what: String| self.refused(step, what);
        let mut meta: Meta = serde_json::from_value(bundle.manifest().meta.clone())
            .map_err(|e| refuse(format!("its manifest lacks what a checkpoint has: {e}")))?;
        if meta.plan_sha256 != self.plan_sha256 {
            return Err(refuse(format!("it belongs to another plan (sha256 {})", meta.plan_sha256)));
        }
        if (meta.step, meta.n_params) != (step, self.n_params) {
            let (found, n) = (meta.step, meta.n_params);
            return Err(refuse(format!(
                "it says step {found} and {n} parameters; {} expected",
                self.n_params
            )));
        }
        if meta.workers.len() != self.n_workers {
            let found = meta.workers.len();
            return Err(refuse(format!("it has {found} workers; {} expected", self.n_workers)));
        }
        if meta.parts.is_empty() {
            meta.parts = vec![Stripes::whole(self.n_params)];
        }
        if !are_whole(&meta.parts, self.n_params) {
            return Err(refuse("the parts of its ranks are not the whole".to_owned()));
        }
        Ok(meta)
    }

    pub(crate) fn refused(&self, step: u64, what: String) -> Error {
        Error::Checkpoint { prefix: self.prefix(step), what }
    }

    /// What lies in a file of a vector of a rank that stores these stripes.
    fn written(&self, (bundle, file): (&Bundle, &str), vector: &str, stored: &Stripes) -> Stripes {
        let size = bundle.manifest().files.iter().find(|entry| entry.name == file).map(|entry| entry.bytes);
        if vector != VECTORS[2] || size == Some(4 * stored.len() as u64) {
            return stored.clone();
        }
        let mut squared = Stripes::default();
        for range in &self.squared {
            stored
                .inside(range)
                .runs()
                .for_each(|run| squared.push(Stripe::new(run.start, run.len(), [1, 0])));
        }
        squared
    }

    /// Puts what is sought of a rank's file where it belongs.
    fn read(
        &self,
        (step, bundle, file): (u64, &Bundle, &str),
        written: &Stripes,
        (sought, values): (&Sought, &mut Buf<f32>),
    ) -> Result<()> {
        let n = written.len();
        let found = bundle.manifest().files.iter().find(|entry| entry.name == file).map(|entry| entry.bytes);
        if let Some(bytes) = found.filter(|bytes| *bytes != 4 * n as u64) {
            let what = format!("{file} has {bytes} bytes for {n} numbers");
            return Err(Error::Checkpoint { prefix: self.prefix(step), what });
        }
        if !written.runs().any(|run| sought.has_some_of(&run)) {
            return Ok(());
        }
        let (mut runs, mut run) = (written.runs(), 0..0);
        bundle.read_each(file, &mut |chunk| {
            let mut numbers = chunk.as_chunks::<4>().0;
            while !numbers.is_empty() {
                if run.is_empty() {
                    // A file is as long as all runs are.
                    run = runs.next().unwrap_or(n..usize::MAX);
                }
                let (now, behind) = numbers.split_at(run.len().min(numbers.len()));
                sought.put(run.start, now, values);
                run.start += now.len();
                numbers = behind;
            }
        })?;
        Ok(())
    }

    /// Removes all but the newest `keep`. The manifest goes first, so that a checkpoint half removed is not there.
    pub(crate) fn prune(&self, keep: usize) -> Result<()> {
        let steps = self.steps()?;
        for step in &steps[..steps.len().saturating_sub(keep)] {
            let mut objects = self.store.list(&self.prefix(*step))?;
            objects.sort_by_key(|o| o.name.file_name() != "manifest.json");
            for object in objects {
                self.store.delete(&object.name)?;
            }
        }
        Ok(())
    }

    /// Steps of which anything is there, in order.
    pub(crate) fn steps(&self) -> Result<Vec<u64>> {
        let prefix = format!("runs/{}/checkpoints", self.run);
        let objects = self.store.list(&prefix)?;
        let step = |name: &str| name.strip_prefix(&prefix)?.split('/').nth(1)?.parse::<u64>().ok();
        let mut steps: Vec<u64> = objects.iter().filter_map(|o| step(o.name.as_str())).collect();
        steps.sort_unstable();
        steps.dedup();
        Ok(steps)
    }
}

/// Whether each of `n` numbers is in one part.
fn are_whole(parts: &[Stripes], n: usize) -> bool {
    let lens = parts.iter().take(WRITERS_MAX).map(Stripes::checked_len);
    // Then there are no more runs than numbers.
    if lens.sum::<Option<usize>>() != Some(n) {
        return false;
    }
    let mut all: Vec<Range<usize>> = parts.iter().flat_map(Stripes::runs).collect();
    all.sort_unstable_by_key(|range| (range.start, range.end));
    all.iter().try_fold(0, |end, range| (range.start == end).then_some(range.end)) == Some(n)
}

impl Sought {
    /// What goes into a vector in the order of these stripes.
    fn new(stripes: &Stripes) -> Sought {
        let mut end = 0;
        let place = |run: Range<usize>| {
            end += run.len();
            (run.clone(), end - run.len())
        };
        let mut sought: Vec<_> = stripes.runs().map(place).collect();
        sought.sort_unstable_by_key(|(run, _)| run.start);
        Sought(sought)
    }

    fn behind(&self, at: usize) -> &[(Range<usize>, usize)] {
        &self.0[self.0.partition_point(|(run, _)| run.end <= at)..]
    }

    fn has_some_of(&self, run: &Range<usize>) -> bool {
        self.behind(run.start).first().is_some_and(|(sought, _)| sought.start < run.end)
    }

    /// Puts numbers that lie in the whole from `at` on where they go.
    fn put(&self, at: usize, numbers: &[[u8; 4]], values: &mut [f32]) {
        let end = at + numbers.len();
        for (run, to) in self.behind(at).iter().take_while(|(run, _)| run.start < end) {
            let both = run.start.max(at)..run.end.min(end);
            let target = &mut values[to + (both.start - run.start)..][..both.len()];
            for (value, four) in target.iter_mut().zip(&numbers[both.start - at..]) {
                *value = f32::from_le_bytes(*four);
            }
        }
    }
}
