//! Checkpoints: everything a step depends on, published as one bundle, so that a run killed at any instant goes on
//! bit for bit where its newest checkpoint stands.
//!
//! Files are the flat vectors in little-endian f32, parameters in the order of the model's table. They know nothing of
//! ranks: any number of ranks can read them.

use std::ops::Range;
use std::sync::Arc;

use data::chain;
use serde::{Deserialize, Serialize};
use store::{Bundle, BundleWriter, FileEntry, Store};
use tensor::Buf;

use crate::guard::Health;
use crate::state::{Snapshot, State, values};
use crate::{Error, Event, Result};

mod rounds;

const KIND: &str = "checkpoint";
/// Of [`Snapshot::vectors`].
const FILES: [&str; 3] = ["params.f32", "adam_m.f32", "adam_v.f32"];

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
    /// Of every worker of DiLoCo.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    workers: Vec<Health>,
}

impl Loaded {
    /// To so many ranks, which go on together: the run's state to each, to each its own workers.
    pub(crate) fn share_out(mut self, n_ranks: usize) -> Vec<Loaded> {
        let per_rank = self.workers.len() / n_ranks;
        let rank =
            |_| Loaded { state: self.state.clone(), workers: self.workers.drain(..per_rank).collect() };
        (0..n_ranks).map(rank).collect()
    }
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
}

/// What one rank goes on from.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub(crate) state: State,
    /// The state of its workers, where workers have one each.
    pub(crate) workers: Vec<State>,
}

impl Checkpoints {
    fn prefix(&self, step: u64) -> String {
        format!("runs/{}/checkpoints/{step:08}", self.run)
    }

    /// Publishes a snapshot, calling `pace` now and then; when this returns it survives any crash. Returns its size in bytes.
    pub(crate) fn save(&self, snapshot: &Snapshot, pace: &mut dyn FnMut()) -> Result<u64> {
        let mut bundle = BundleWriter::new(&self.store, &self.prefix(snapshot.step))?;
        for (file, bytes) in FILES.into_iter().zip(&snapshot.vectors) {
            bundle.add_paced(file, bytes, pace)?;
        }
        let meta = Meta {
            run: self.run.clone(),
            plan_sha256: self.plan_sha256.clone(),
            step: snapshot.step,
            tokens: snapshot.tokens,
            elapsed_seconds: snapshot.elapsed_seconds,
            n_params: self.n_params,
            health: snapshot.health,
            workers: Vec::new(),
        };
        let meta = serde_json::to_value(meta).map_err(Error::PlanJson)?;
        let manifest = bundle.publish(KIND, meta)?;
        Ok(manifest.files.iter().map(|f| f.bytes).sum())
    }

    /// The newest checkpoint that can be read and belongs to this plan, with all workers. One that cannot is reported and
    /// the one before it is tried; when there are some and none can be read, that is an error: a run never starts over in
    /// silence.
    pub(crate) fn load_newest(&self, report: &mut dyn FnMut(Event)) -> Result<Option<Loaded>> {
        let mut refused = None;
        for step in self.steps()?.into_iter().rev() {
            match self.load(step, 0..self.n_workers) {
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

    /// With these workers, if there are some. `None` when it was never published whole.
    pub(crate) fn load(&self, step: u64, workers: Range<usize>) -> Result<Option<Loaded>> {
        let Some((bundle, meta)) = self.open(step)? else { return Ok(None) };
        let loaded = if self.n_workers > 0 {
            self.load_round(&bundle, &meta, workers)
        } else {
            let vector = |file: &str| self.vector(&bundle, &meta, file);
            let [params, adam_m, adam_v] = FILES;
            let state = State::from_snapshot(&Snapshot {
                vectors: [vector(params)?, vector(adam_m)?, vector(adam_v)?],
                step,
                tokens: meta.tokens,
                elapsed_seconds: meta.elapsed_seconds,
                health: meta.health,
            });
            Ok(Loaded { state, workers: Vec::new() })
        };
        loaded.map(Some)
    }

    /// What a checkpoint says of itself, checked.
    fn open(&self, step: u64) -> Result<Option<(Bundle, Meta)>> {
        let Some(bundle) = Bundle::open(&self.store, &self.prefix(step))? else {
            return Ok(None);
        };
        let refuse = |what: String| self.refused(step, what);
        let meta: Meta = serde_json::from_value(bundle.manifest().meta.clone())
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
        Ok(Some((bundle, meta)))
    }

    /// One of its vectors, of the right length.
    fn vector(&self, bundle: &Bundle, meta: &Meta, file: &str) -> Result<Vec<u8>> {
        let bytes = bundle.read(file)?;
        if bytes.len() != self.n_params * size_of::<f32>() {
            let what = format!("{file} has {} bytes for {} numbers", bytes.len(), self.n_params);
            return Err(self.refused(meta.step, what));
        }
        Ok(bytes)
    }

    pub(crate) fn refused(&self, step: u64, what: String) -> Error {
        Error::Checkpoint { prefix: self.prefix(step), what }
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
