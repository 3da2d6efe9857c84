//! [`Teacher`]: a model whose probabilities another one learns (see [`crate::Objective::Distill`]). It computes its logits for the
//! same rows, a chunk of tokens at a time, and nothing of it is trained.

use tensor::{Accumulate, Buf, Mat, Pool, Precision, matmul};

use super::head::gathered;
use super::keeper::Flat;
use super::{MicroBatch, Params, TrainModel};
use crate::train::budget::ActivationBytes;
use crate::{Config, Trainable};

/// See the module. Clones of what it is made of share its weights.
pub struct Teacher {
    model: TrainModel,
    /// Rows that are no neighbours, side by side.
    gathered: Buf<f32>,
}

impl Teacher {
    /// For micro-batches of `b` rows of `t` tokens.
    ///
    /// # Panics
    /// If `trainable` does not start from a model's weights, and as [`TrainModel::new`].
    pub fn new(trainable: Trainable, [b, t]: [usize; 2], precision: Precision) -> Teacher {
        assert!(trainable.start().is_some(), "a teacher has weights");
        // No layer's memory is read again.
        let model = TrainModel::new(trainable, b, t, precision).with_recompute(true);
        Teacher { model, gathered: Buf::default() }
    }

    /// Bytes that [`Teacher::new`] allocates.
    pub fn activation_bytes(config: &Config, rows: [usize; 2]) -> ActivationBytes {
        TrainModel::activation_bytes(config, rows, true)
    }

    /// Its shape and that of its rows.
    pub(super) fn fits(&self, student: &TrainModel) -> bool {
        let [own, other] = [&self.model, student].map(|model| (model.shape.v, model.shape.n, model.shape.t));
        own == other
    }

    pub(super) fn forward(&mut self, pool: &Pool, batch: MicroBatch) {
        self.model.pass(pool, Params::Start, batch, &mut Flat(&mut [])).forward();
    }

    /// The logits of some rows of the last forward pass, at most as many as a chunk has.
    pub(super) fn logits(&mut self, pool: &Pool, rows: &[u32]) -> &[f32] {
        let TrainModel { trainable, shape, scratch, .. } = &mut self.model;
        let values = trainable.values(Params::Start);
        let head = Mat::new(values.of(&values.table.head), shape.v, shape.c);
        let logits = &mut scratch.logits[..rows.len() * shape.v];
        let normed = gathered(&scratch.normed_nc, shape.c, rows, &mut self.gathered);
        let normed = Mat::new(normed, rows.len(), shape.c);
        matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
        logits
    }
}
