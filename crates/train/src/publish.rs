//! The finished model, from its ranks into the store.

use data::Dataset;
use model::{Trainable, Weights};
use store::BundleWriter;
use tensor::packed::WeightKind;
use tensor::{Buf, Pool};

use crate::layout::Zero;
use crate::plan::Method;
use crate::rank::Rank;
use crate::{Context, Plan, Result};

/// What is to be published.
pub(crate) enum Trained {
    Params(Buf<f32>),
    /// Of ranks that had a part each.
    Weights(Weights),
}

impl Rank<'_> {
    /// What has come of a run that is finished, on the first rank; there the rank has it no more.
    pub(crate) fn trained(&mut self, finished: bool) -> Result<Option<Trained>> {
        Ok(match finished && self.plan.publish.is_some() {
            false => None,
            true if self.layout.zero == Zero::Parameters || self.team.is_some() || self.pipe.is_some() => {
                self.weights()?.map(Trained::Weights)
            }
            true if self.layout.rank > 0 => None,
            true => Some(Trained::Params(std::mem::take(&mut self.state.params))),
        })
    }
}

/// The finished model as a Hugging Face directory, `models/<name>`, or as an adapter, `adapters/<name>`; visible with its
/// manifest.
pub(crate) fn publish(
    context: &Context,
    (plan, name): (&Plan, &str),
    dataset: &Dataset,
    trainable: &Trainable,
    trained: Trained,
) -> Result<()> {
    let base = plan.start.as_ref().map_or("", |start| &start.model);
    let adapter = match (&plan.method, &trained) {
        (Method::Lora { merge: false, .. }, Trained::Params(params)) => {
            trainable.adapter_files(params, base).transpose()?
        }
        _ => None,
    };
    let kind = if adapter.is_some() { "adapter" } else { "model" };
    let mut bundle = BundleWriter::new(&context.store, &format!("{kind}s/{name}"))?;
    let files = match adapter {
        Some(files) => files,
        None => {
            let pool = Pool::new(context.n_threads);
            let weights = match trained {
                Trained::Weights(weights) => weights,
                Trained::Params(params) => trainable.to_weights(&pool, &params, WeightKind::F32),
            };
            let mut files = model::hf::files(&weights)?;
            files.extend(dataset.tokenizer_files()?);
            files
        }
    };
    for (file, bytes) in files {
        bundle.add(file, &bytes)?;
    }
    // What has learned no chats speaks as a base model does.
    let is_base = dataset.info().chats.is_none();
    let datasets: Vec<&str> = plan.data.iter().map(|part| part.dataset.as_str()).collect();
    let meta = serde_json::json!({
        "run": context.run, "dataset": datasets.join(" + "), "steps": plan.steps, "base": is_base,
    });
    bundle.publish(kind, meta)?;
    Ok(())
}
