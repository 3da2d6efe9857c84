//! From the last normed rows to losses, and back. Logits exist for a chunk of tokens at a time.

use std::ops::Range;

use tensor::cross_entropy::{cross_entropy_forward, cross_entropy_z_forward_backward};
use tensor::rows::scale_rows;
use tensor::{Accumulate, Mat, matmul};

use super::Pass;

impl Pass<'_> {
    /// The loss of every token, in `scratch.losses_n`.
    pub(super) fn token_losses(&mut self) {
        let head_unit = self.hold_head();
        let (pool, shape, values) = (self.pool, self.shape, &self.matrices.values);
        let head = Mat::new(values.of(&values.table.head), shape.v, shape.c);
        for rows in shape.chunks() {
            let logits = &mut self.scratch.logits[..rows.len() * shape.v];
            let normed = shape.rows(&self.scratch.normed_nc, rows.clone());
            matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
            let losses = &mut self.scratch.losses_n[rows.clone()];
            cross_entropy_forward(pool, losses, logits, &self.batch.targets_bt[rows]);
        }
        self.release(head_unit);
        self.release(self.last_unit());
    }

    /// The loss of every token in `scratch.losses_n`, and the gradients of the head and of the last normed rows (in
    /// `scratch.delta_nc`) for the sum of losses, each times its factor in `factors_n`.
    pub(super) fn head_backward(&mut self, factors_n: Option<&[f32]>) {
        let head_unit = self.hold_head();
        let (pool, shape, values) = (self.pool, self.shape, &self.matrices.values);
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
            if self.grads.all {
                let accumulate = if rows.start == 0 { Accumulate::Overwrite } else { Accumulate::Add };
                let dhead = self.grads.keeper.grads(table.head.clone());
                matmul(pool, dhead, dlogits.t(), normed, shape.precision, accumulate);
            }
        }
        if head_unit < self.last_unit() {
            self.release(head_unit);
            self.tell_settled();
        }
    }

    /// The embedding's gradients are there as the head's; only rows of tokens, and positions, are still added to.
    fn tell_settled(&mut self) {
        let table = self.matrices.values.table;
        if !self.grads.all {
            return;
        }
        let mut tokens = self.batch.tokens_bt.to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        let row = |token: u32| table.embedding.start + token as usize * self.shape.c;
        let mut open: Vec<Range<usize>> = Vec::new();
        let rows = tokens.into_iter().map(|token| row(token)..row(token + 1));
        for range in rows.chain(table.positions.clone()) {
            match open.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => open.push(range),
            }
        }
        self.grads.keeper.settled(0, &open);
    }

    /// Needs what comes after the layers, and the head: the unit it lies in.
    fn hold_head(&mut self) -> usize {
        let table = self.matrices.values.table;
        let unit = if table.head == table.embedding { 0 } else { self.last_unit() };
        self.hold(self.last_unit());
        self.hold(unit);
        unit
    }

    /// Starts the gradient of the stream.
    pub(super) fn final_norm_backward(&mut self) {
        self.scratch.dx_nc.fill(0.0);
        let table = self.matrices.values.table;
        self.norm_backward(2 * table.layers.len(), &table.final_norm);
        self.release(self.last_unit());
        self.complete(self.last_unit());
    }
}
