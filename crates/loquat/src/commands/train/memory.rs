//! What a run takes of memory, by kind, before it takes any.

use anyhow::{Result, bail};
use model::{TrainModel, Trainable};
use train::{Method, Plan};

use crate::machine::bytes_text;

/// Bytes by kind, in the order of the list that is shown.
pub(super) struct Needs {
    pub(super) kinds: Vec<(&'static str, u64)>,
    /// What activations take where layers are computed again.
    pub(super) recomputed: u64,
    /// Numbers that are trained, and those of a model that is kept as it was.
    pub(super) n_trained: usize,
    pub(super) n_frozen: usize,
}

impl Needs {
    /// Of a run here: `n_ranks` threads that hold everything each, and one copy for the checkpoint that is being written.
    pub(super) fn new(plan: &Plan, n_ranks: usize, recompute: bool) -> Result<Needs> {
        let config = plan.config()?;
        let changes = match &plan.method {
            Method::Full => None,
            Method::Lora { changes, .. } => Some(changes),
        };
        let n_trained = Trainable::n_trained(&config, changes)?;
        // A model that is trained in full is not kept as it was, unless preferences compare with it.
        let is_kept = plan.start.is_some() && (changes.is_some() || plan.objective.is_of_pairs());
        let n_frozen = if is_kept { config.n_params() } else { 0 };
        let activations = |recompute: bool| {
            let of_rank = TrainModel::activation_bytes(&config, [plan.rows, plan.context], recompute);
            n_ranks as u64 * of_rank.total() as u64
        };
        let (ranks, vector) = (n_ranks as u64, 4 * n_trained as u64);
        // Gradients wait in a tree of micro-batches, one a level; ranks exchange them through one more.
        let levels = (plan.micro_batches / n_ranks).max(1).next_power_of_two().trailing_zeros() as u64;
        // Workers that train by themselves have all of their own, besides what their rank has of the run.
        let workers = plan.diloco.map_or(0, |diloco| diloco.workers as u64);
        let (params, means) =
            if workers > 0 { (ranks + workers, ranks + 2 * workers) } else { (ranks, 2 * ranks) };
        let saved = if workers > 0 { 1 } else { 3 };
        let exchanged = u64::from(n_ranks > 1);
        Ok(Needs {
            kinds: vec![
                ("parameters", params * vector),
                ("the model it starts from", 4 * n_frozen as u64),
                ("gradients", ranks * vector * (1 + levels + exchanged)),
                ("optimizer", means * vector),
                ("activations", activations(recompute)),
                ("checkpoint being written", saved * vector),
                ("a copy for samples and tasks", plan.copy_bytes()?),
            ],
            recomputed: activations(true),
            n_trained,
            n_frozen,
        })
    }

    pub(super) fn total(&self) -> u64 {
        self.kinds.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Refuses what the machine has not left.
    pub(super) fn check(&self, available: Option<u64>) -> Result<()> {
        let Some(left) = available.filter(|left| self.total() > *left) else { return Ok(()) };
        let (need, left) = (bytes_text(self.total()), bytes_text(left));
        bail!(
            "the run needs {need} of memory, {left} are free ({}; with --recompute activations {}): take fewer --rows, \
             a shorter --context, fewer --ranks, --lora-rank or a smaller model",
            self.text(),
            bytes_text(self.recomputed)
        );
    }

    /// The kinds that there are, on one line.
    pub(super) fn text(&self) -> String {
        let there = self.kinds.iter().filter(|(_, bytes)| *bytes > 0);
        there.map(|(kind, bytes)| format!("{kind} {}", bytes_text(*bytes))).collect::<Vec<_>>().join(", ")
    }
}
