//! From the last normed rows to losses, and back. Logits exist for a chunk of tokens at a time.

use tensor::cross_entropy::{cross_entropy_forward, cross_entropy_z_forward_backward};
use tensor::rows::scale_rows;
use tensor::{Accumulate, Mat, matmul};

use super::Pass;
use super::matrices::Grads;

impl Pass<'_> {
    /// The loss of every token, in `scratch.losses_n`.
    pub(super) fn token_losses(&mut self) {
        let (pool, shape, values) = (self.pool, self.shape, self.matrices.values);
        let head = Mat::new(values.of(&values.table.head), shape.v, shape.c);
        for rows in shape.chunks() {
            let logits = &mut self.scratch.logits[..rows.len() * shape.v];
            let normed = shape.rows(&self.scratch.normed_nc, rows.clone());
            matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
            let losses = &mut self.scratch.losses_n[rows.clone()];
            cross_entropy_forward(pool, losses, logits, &self.batch.targets_bt[rows]);
        }
    }

    /// The loss of every token in `scratch.losses_n`, and the gradients of the head and of the last normed rows (in
    /// `scratch.delta_nc`) for the sum of losses, each times its factor in `factors_n`.
    pub(super) fn head_backward(&mut self, grads: &mut Grads, factors_n: Option<&[f32]>) {
        let (pool, shape, values) = (self.pool, self.shape, self.matrices.values);
        let table = values.table;
        let head = Mat::new(values.of(&table.head), shape.v, shape.c);
        for rows in shape.chunks() {
            let logits = &mut self.scratch.logits[..rows.len() * shape.v];
            let normed = shape.rows(&self.scratch.normed_nc, rows.clone());
            matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
            let losses = &mut self.scratch.losses_n[rows.clone()];
            let targets = &self.batch.targets_bt[rows.clone()];
            cross_entropy_z_forward_backward(pool, losses, logits, targets, self.z_loss);
            if let Some(factors_n) = factors_n {
                scale_rows(pool, logits, &factors_n[rows.clone()]);
            }
            let dlogits = Mat::new(&*logits, rows.len(), shape.v);
            let dnormed = &mut self.scratch.delta_nc[rows.start * shape.c..rows.end * shape.c];
            matmul(pool, dnormed, dlogits, head, shape.precision, Accumulate::Overwrite);
            if let Grads::All(dparams) = grads {
                let accumulate = if rows.start == 0 { Accumulate::Overwrite } else { Accumulate::Add };
                let dhead = &mut dparams[table.head.clone()];
                matmul(pool, dhead, dlogits.t(), normed, shape.precision, accumulate);
            }
        }
    }

    /// Starts the gradient of the stream.
    pub(super) fn final_norm_backward(&mut self, grads: &mut Grads) {
        self.scratch.dx_nc.fill(0.0);
        let table = self.matrices.values.table;
        self.norm_backward(grads, 2 * table.layers.len(), &table.final_norm);
    }
}
