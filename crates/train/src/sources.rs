//! The datasets of a plan: opened, checked to be those it was made with, mixed.

use std::sync::Arc;

use data::{Batches, Dataset, Mixture, Split};
use store::Store;

use crate::rank::Validation;
use crate::{Error, Plan, Result};

/// The validation rows are those of this seed in every run, so that runs compare.
const VALIDATION_SEED: u64 = 0;

/// What a run reads.
pub(crate) struct Sources {
    pub(crate) mixture: Mixture,
    /// Of every dataset that holds something out.
    pub(crate) validation: Arc<[Validation]>,
    /// Whose tokenizer and chat template the trained model is published with.
    pub(crate) voice: Dataset,
    /// Of the chats that are trained on: those that a row's end cuts off, and those left out, see
    /// [`Batches::n_cut_and_dropped`].
    pub(crate) n_cut: u64,
    pub(crate) n_dropped: u64,
}

impl Sources {
    /// # Errors
    /// If a dataset is not the one that was planned with, has more ids than the model, or another tokenizer than the
    /// others.
    pub(crate) fn open(store: &Arc<dyn Store>, plan: &Plan) -> Result<Sources> {
        let mut datasets = Vec::new();
        for part in &plan.data {
            let dataset = Dataset::open(store, &part.dataset)?;
            let found = dataset.info().plan_sha256.clone();
            if found != part.sha256 {
                let (name, planned) = (part.dataset.clone(), part.sha256.clone());
                return Err(Error::DatasetChanged { name, found, planned });
            }
            datasets.push(dataset);
        }
        check_tokenizers(plan, &datasets)?;
        let (mut parts, mut validation) = (Vec::new(), Vec::new());
        let (mut n_cut, mut n_dropped) = (0, 0);
        for (part, dataset) in plan.data.iter().zip(&datasets) {
            check_pairs(plan, dataset)?;
            if part.weight > 0.0 {
                let batches = Batches::new(dataset, Split::Train, plan.seed, plan.context)?;
                let (cut, dropped) = batches.n_cut_and_dropped();
                (n_cut, n_dropped) = (n_cut + cut, n_dropped + dropped);
                parts.push((batches.isolated(plan.isolated), part.weight));
            }
            if dataset.info().validation.n_documents > 0 {
                let batches = Batches::new(dataset, Split::Validation, VALIDATION_SEED, plan.context)?;
                let batches = batches.isolated(plan.isolated);
                validation.push(Validation { dataset: part.dataset.clone(), weight: part.weight, batches });
            }
        }
        let mixture = Mixture::new(parts, plan.seed).ok_or(Error::Mixture)?;
        let speaks = |dataset: &&Dataset| dataset.info().chats.is_some();
        let voice = datasets.iter().find(speaks).or(datasets.first()).cloned().ok_or(Error::Mixture)?;
        Ok(Sources { mixture, validation: weighted(validation).into(), voice, n_cut, n_dropped })
    }
}

/// Where only datasets of weight 0 hold something out, they count alike.
fn weighted(mut validation: Vec<Validation>) -> Vec<Validation> {
    if validation.iter().all(|part| part.weight == 0.0) {
        validation.iter_mut().for_each(|part| part.weight = 1.0);
    }
    validation
}

fn check_pairs(plan: &Plan, dataset: &Dataset) -> Result<()> {
    let is_pairs = dataset.info().chats.as_ref().is_some_and(|chats| chats.is_pairs);
    let name = dataset.info().name.clone();
    match (is_pairs, plan.objective.is_of_pairs()) {
        (true, false) => Err(Error::Pairs { name, found: "pairs", needed: "rows of their own" }),
        (false, true) => Err(Error::Pairs { name, found: "no pairs", needed: "pairs" }),
        _ => Ok(()),
    }
}

fn check_tokenizers(plan: &Plan, datasets: &[Dataset]) -> Result<()> {
    let model = plan.config()?.vocab;
    for dataset in datasets {
        let info = dataset.info();
        // Published models have ids that no tokenizer gives, to fill up a round number.
        let fits = if plan.start.is_some() { model >= info.vocab_size } else { model == info.vocab_size };
        if !fits {
            return Err(Error::Vocabulary { model, dataset: info.vocab_size });
        }
        let first = datasets[0].info();
        if info.tokenizer_fingerprint != first.tokenizer_fingerprint {
            return Err(Error::Tokenizers { a: first.name.clone(), b: info.name.clone() });
        }
    }
    Ok(())
}
