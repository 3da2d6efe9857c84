//! What a run starts from: random weights, or a model whose files lie in the run, so that resuming needs nothing else. The
//! same of a teacher.

use std::sync::Arc;

use model::{Trainable, Weights, hf};
use sha2::{Digest, Sha256};
use store::{Bundle, BundleWriter, Store};
use tensor::Pool;
use tensor::packed::WeightKind;

use crate::plan::{Method, Start};
use crate::{Error, Plan, Result};

const KIND: &str = "model";

/// The files of a model to start from, and what the plan says of them. Weights keep their bits where training can begin
/// from them exactly; quantized ones become f32.
///
/// # Errors
/// If a weight is no number: every loss would be none.
pub fn start_files(pool: &Arc<Pool>, name: &str, mut weights: Weights) -> Result<(Start, model::Files)> {
    for tensor in weights.tensors.values_mut().filter(|tensor| tensor.kind.is_quantized()) {
        *tensor = tensor.clone().converted(WeightKind::F32, pool.clone());
    }
    for (tensor, weight) in &weights.tensors {
        let read = |source| Error::StartRead { model: name.to_owned(), tensor: tensor.clone(), source };
        if let Some(at) = weight.to_f32().map_err(read)?.iter().position(|x| !x.is_finite()) {
            return Err(Error::StartNotANumber { model: name.to_owned(), tensor: tensor.clone(), at });
        }
    }
    let files = hf::files(&weights)?;
    let tensors =
        files.iter().find(|(name, _)| *name == hf::TENSORS_FILE).map_or(&[][..], |(_, bytes)| bytes);
    let sha256 = hex::encode(Sha256::digest(tensors));
    Ok((Start { model: name.to_owned(), sha256 }, files))
}

/// Puts the files of the model to start from into the run.
pub(crate) fn keep(store: &Arc<dyn Store>, run: &str, files: &model::Files) -> Result<()> {
    keep_at(store, &prefix(run), files)
}

/// Puts the files of a teacher (see [`start_files`]) into a run, before its plan.
pub fn keep_teacher(store: &Arc<dyn Store>, run: &str, files: &model::Files) -> Result<()> {
    keep_at(store, &teacher_prefix(run), files)
}

fn keep_at(store: &Arc<dyn Store>, prefix: &str, files: &model::Files) -> Result<()> {
    let mut bundle = BundleWriter::new(store, prefix)?;
    for (file, bytes) in files {
        bundle.add(file, bytes)?;
    }
    bundle.publish(KIND, serde_json::Value::Null)?;
    Ok(())
}

/// What the plan's run trains, with the model it starts from.
pub(crate) fn trainable(store: &Arc<dyn Store>, run: &str, plan: &Plan) -> Result<Trainable> {
    let Some(start) = &plan.start else { return Ok(Trainable::new(&plan.config()?)) };
    let weights = kept(store, &prefix(run), &start.sha256)?;
    let weights = weights.ok_or_else(|| Error::StartChanged { run: run.to_owned() })?;
    Ok(match &plan.method {
        Method::Full => Trainable::from_weights(weights)?,
        Method::Lora { changes, .. } => Trainable::lora(weights, changes)?,
    })
}

/// Whom the plan's run learns from, if anybody.
pub(crate) fn teacher(store: &Arc<dyn Store>, run: &str, plan: &Plan) -> Result<Option<Trainable>> {
    let Some(teacher) = &plan.teacher else { return Ok(None) };
    let changed = || Error::TeacherChanged { run: run.to_owned() };
    let weights = kept(store, &teacher_prefix(run), &teacher.sha256)?.ok_or_else(changed)?;
    if weights.config != teacher.config()? {
        return Err(changed());
    }
    Ok(Some(Trainable::from_weights(weights)?))
}

/// A model that lies in a run, if it is there with these tensors.
fn kept(store: &Arc<dyn Store>, prefix: &str, sha256: &str) -> Result<Option<Weights>> {
    let Some(bundle) = Bundle::open(store, prefix)? else { return Ok(None) };
    let planned = |file: &store::FileEntry| file.name == hf::TENSORS_FILE && file.sha256 == sha256;
    if !bundle.manifest().files.iter().any(planned) {
        return Ok(None);
    }
    Ok(Some(hf::from_files(&bundle.read(hf::CONFIG_FILE)?, bundle.read(hf::TENSORS_FILE)?)?))
}

fn prefix(run: &str) -> String {
    format!("runs/{run}/start")
}

fn teacher_prefix(run: &str) -> String {
    format!("runs/{run}/teacher")
}
