//! Checkpoints: everything a step depends on, published as one bundle, so that a run killed at any instant goes on
//! bit for bit where its newest checkpoint stands.
//!
//! Files are the flat vectors in little-endian f32, parameters in the order of the model's table. They know nothing of
//! ranks: any number of ranks can read them.

use std::ops::Range;
use std::sync::Arc;

use model::Trainable;
use serde::{Deserialize, Serialize};
use store::{Bundle, BundleWriter, Store};
use tensor::adamw::AdamWState;
use tensor::{Buf, Pool};

use crate::plan::AdamW;
use crate::{Error, Event, Result};

const KIND: &str = "checkpoint";
const PARAMS: &str = "params.f32";
const ADAM_M: &str = "adam_m.f32";
const ADAM_V: &str = "adam_v.f32";

/// What changes from step to step.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) params: Buf<f32>,
    /// Running mean of the gradient.
    pub(crate) adam_m: Buf<f32>,
    /// Running mean of the squared gradient.
    pub(crate) adam_v: Buf<f32>,
    /// Finished steps.
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    pub(crate) elapsed_seconds: f64,
}

/// What a checkpoint says of itself.
#[derive(Serialize, Deserialize)]
struct Meta {
    run: String,
    plan_sha256: String,
    step: u64,
    tokens: u64,
    elapsed_seconds: f64,
    n_params: usize,
}

/// Which run's checkpoints are meant, and of which plan.
#[derive(Clone)]
pub(crate) struct Checkpoints {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) run: String,
    pub(crate) plan_sha256: String,
    pub(crate) n_params: usize,
}

impl State {
    pub(crate) fn initial(trainable: &Trainable, seed: u64) -> State {
        let n = trainable.n_params();
        State {
            params: trainable.init(seed),
            adam_m: Buf::zeroed(n),
            adam_v: Buf::zeroed(n),
            step: 0,
            tokens: 0,
            elapsed_seconds: 0.0,
        }
    }

    /// AdamW with the mean, clipped gradient; finishes the step. `decayed` are the ranges that have weight decay.
    pub(crate) fn update(
        &mut self,
        pool: &Pool,
        grads: &[f32],
        decayed: &[Range<usize>],
        plan: AdamW,
        rate: Rate,
    ) {
        self.step += 1;
        let adamw = tensor::adamw::AdamW {
            lr: rate.lr,
            beta1: plan.beta1,
            beta2: plan.beta2,
            eps: plan.epsilon,
            weight_decay: plan.weight_decay,
            step: self.step,
            grad_scale: rate.grad_scale,
        };
        let state = AdamWState { params: &mut self.params, m: &mut self.adam_m, v: &mut self.adam_v };
        tensor::adamw::adamw(pool, state, grads, decayed, &adamw);
    }
}

/// What an update is multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct Rate {
    pub(crate) lr: f32,
    /// Applied to the gradient first: clipping and the mean over tokens.
    pub(crate) grad_scale: f32,
}

impl Checkpoints {
    fn prefix(&self, step: u64) -> String {
        format!("runs/{}/checkpoints/{step:08}", self.run)
    }

    /// Publishes `state`; when this returns it survives any crash. Returns its size in bytes.
    pub(crate) fn save(&self, state: &State) -> Result<u64> {
        let mut bundle = BundleWriter::new(&self.store, &self.prefix(state.step))?;
        bundle.add(PARAMS, &to_bytes(&state.params))?;
        bundle.add(ADAM_M, &to_bytes(&state.adam_m))?;
        bundle.add(ADAM_V, &to_bytes(&state.adam_v))?;
        let meta = Meta {
            run: self.run.clone(),
            plan_sha256: self.plan_sha256.clone(),
            step: state.step,
            tokens: state.tokens,
            elapsed_seconds: state.elapsed_seconds,
            n_params: self.n_params,
        };
        let meta = serde_json::to_value(meta).map_err(Error::PlanJson)?;
        let manifest = bundle.publish(KIND, meta)?;
        Ok(manifest.files.iter().map(|f| f.bytes).sum())
    }

    /// The newest checkpoint that can be read and belongs to this plan. One that cannot is reported and the one before
    /// it is tried; when there are some and none can be read, that is an error: a run never starts over in silence.
    pub(crate) fn load_newest(&self, report: &mut dyn FnMut(Event)) -> Result<Option<State>> {
        let mut refused = None;
        for step in self.steps()?.into_iter().rev() {
            match self.load(step) {
                Ok(Some(state)) => return Ok(Some(state)),
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
    fn load(&self, step: u64) -> Result<Option<State>> {
        let Some(bundle) = Bundle::open(&self.store, &self.prefix(step))? else {
            return Ok(None);
        };
        let refuse = |what: String| Error::Checkpoint { prefix: self.prefix(step), what };
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
        let vector = |file: &str| -> Result<Buf<f32>> {
            let bytes = bundle.read(file)?;
            if bytes.len() != self.n_params * size_of::<f32>() {
                return Err(refuse(format!(
                    "{file} has {} bytes for {} numbers",
                    bytes.len(),
                    self.n_params
                )));
            }
            Ok(from_bytes(&bytes))
        };
        Ok(Some(State {
            params: vector(PARAMS)?,
            adam_m: vector(ADAM_M)?,
            adam_v: vector(ADAM_V)?,
            step,
            tokens: meta.tokens,
            elapsed_seconds: meta.elapsed_seconds,
        }))
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
    fn steps(&self) -> Result<Vec<u64>> {
        let prefix = format!("runs/{}/checkpoints", self.run);
        let objects = self.store.list(&prefix)?;
        let step = |name: &str| name.strip_prefix(&prefix)?.split('/').nth(1)?.parse::<u64>().ok();
        let mut steps: Vec<u64> = objects.iter().filter_map(|o| step(o.name.as_str())).collect();
        steps.sort_unstable();
        steps.dedup();
        Ok(steps)
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8]) -> Buf<f32> {
    let mut values = Buf::zeroed(bytes.len() / 4);
    for (value, four) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*four);
    }
    values
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
