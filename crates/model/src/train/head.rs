//! From the last normed rows to losses, and back. Logits exist for a chunk of tokens at a time, and of tokens that count: in
//! chats what users say is not learned, and needs none.

use std::ops::Range;

use tensor::cross_entropy::{IGNORED, cross_entropy_forward, cross_entropy_forward_backward};
use tensor::distill::{Distill, distill_forward_backward};
use tensor::rows::scale_rows;
use tensor::{Accumulate, Buf, Mat, matmul};

use super::memory::Shape;
use super::{MicroBatch, Pass, Teacher};

/// How the losses of tokens come together.
pub(super) enum Sum<'a> {
    /// As they are.
    Plain,
    /// Each times its factor.
    Weighted(&'a [f32]),
    /// With what a teacher says, which has computed the same rows.
    Taught(&'a mut Teacher, Distill),
}

/// The rows that count, and what is known of a chunk of them. Kept between passes.
#[derive(Default)]
pub(super) struct Counted {
    rows: Vec<u32>,
    targets: Vec<u32>,
    factors: Vec<f32>,
    losses: Vec<f32>,
    /// Rows of a matrix, side by side where they are not neighbours, and their gradients.
    gathered: Buf<f32>,
    dgathered: Buf<f32>,
    /// The ids of a micro-batch in order, and where gradients of the embedding are still added to.
    ids: Vec<u32>,
    open: Vec<Range<usize>>,
}

impl Counted {
    fn find(&mut self, batch: &MicroBatch) -> Vec<u32> {
        let mut rows = std::mem::take(&mut self.rows);
        rows.clear();
        let counts = |row: &u32| batch.targets_bt[*row as usize] != IGNORED;
        rows.extend((0..batch.targets_bt.len() as u32).filter(counts));
        rows
    }

    fn begin(&mut self, rows: &[u32], batch: &MicroBatch) {
        self.targets.clear();
        self.targets.extend(rows.iter().map(|row| batch.targets_bt[*row as usize]));
        self.losses.clear();
        self.losses.resize(rows.len(), 0.0);
    }

    fn losses_to(&self, rows: &[u32], losses_n: &mut [f32]) {
        rows.iter().zip(&self.losses).for_each(|(row, loss)| losses_n[*row as usize] = *loss);
    }
}

/// Some rows of `[n, c]`: as they lie if they are neighbours, or else copied to `to`.
pub(super) fn gathered<'a>(x_nc: &'a [f32], c: usize, rows: &[u32], to: &'a mut Buf<f32>) -> &'a [f32] {
    if let Some(run) = run(rows) {
        return &x_nc[run.start * c..run.end * c];
    }
    to.reserve_scratch(rows.len() * c);
    for (to_c, row) in to.chunks_exact_mut(c).zip(rows) {
        to_c.copy_from_slice(&x_nc[*row as usize * c..][..c]);
    }
    &to[..rows.len() * c]
}

/// Rows in order that are neighbours.
fn run(rows: &[u32]) -> Option<Range<usize>> {
    let (first, last) = (*rows.first()? as usize, *rows.last()? as usize);
    (last - first + 1 == rows.len()).then_some(first..last + 1)
}

impl Pass<'_> {
    /// The loss of every token, in `scratch.losses_n`.
    pub(super) fn token_losses(&mut self, mut sum: Sum) {
        let head_unit = self.hold_head();
        let (pool, shape, values) = (self.pool, self.shape, &self.matrices.values);
        let head = Mat::new(values.of(&values.table.head), shape.v, shape.c);
        let scratch = &mut *self.scratch;
        scratch.losses_n.fill(0.0);
        let counted = &mut scratch.counted;
        let all = counted.find(&self.batch);
        for rows in all.chunks(shape.chunk()) {
            counted.begin(rows, &self.batch);
            let logits = &mut scratch.logits[..rows.len() * shape.v];
            let normed = gathered(&scratch.normed_nc, shape.c, rows, &mut counted.gathered);
            let normed = Mat::new(normed, rows.len(), shape.c);
            matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
            match &mut sum {
                Sum::Taught(teacher, distill) => {
                    let of_both = (logits, teacher.logits(pool, rows));
                    distill_forward_backward(pool, &mut counted.losses, of_both, &counted.targets, *distill);
                }
                _ => cross_entropy_forward(pool, &mut counted.losses, logits, &counted.targets),
            }
            counted.losses_to(rows, &mut scratch.losses_n);
        }
        counted.rows = all;
        self.release(head_unit);
        self.release(self.last_unit());
    }

    /// The loss of every token in `scratch.losses_n`, and the gradients of the head and of the last normed rows (in
    /// `scratch.delta_nc`) for their sum.
    pub(super) fn head_backward(&mut self, mut sum: Sum) {
        let head_unit = self.hold_head();
        let (shape, table) = (self.shape, self.matrices.values.table);
        self.scratch.losses_n.fill(0.0);
        let all = self.scratch.counted.find(&self.batch);
        if all.len() < shape.n {
            self.scratch.delta_nc.fill(0.0);
        }
        if all.is_empty() && self.grads.all {
            self.grads.keeper.grads(table.head.clone()).fill(0.0);
        }
        for (i, rows) in all.chunks(shape.chunk()).enumerate() {
            self.chunk_backward(rows, &mut sum, if i == 0 { Accumulate::Overwrite } else { Accumulate::Add });
        }
        self.scratch.counted.rows = all;
        if head_unit < self.last_unit() {
            self.release(head_unit);
            self.tell_settled();
        }
    }

    /// Of some rows that count; `accumulate` says what becomes of the head's gradient so far.
    fn chunk_backward(&mut self, rows: &[u32], sum: &mut Sum, accumulate: Accumulate) {
        let (pool, values) = (self.pool, &self.matrices.values);
        let (Shape { c, v, precision, .. }, n) = (self.shape, rows.len());
        let head = Mat::new(values.of(&values.table.head), v, c);
        let scratch = &mut *self.scratch;
        let counted = &mut scratch.counted;
        counted.begin(rows, &self.batch);
        let logits = &mut scratch.logits[..n * v];
        let normed = Mat::new(gathered(&scratch.normed_nc, c, rows, &mut counted.gathered), n, c);
        matmul(pool, logits, normed, head.t(), precision, Accumulate::Overwrite);
        let (losses, targets) = (&mut counted.losses, &counted.targets);
        match sum {
            Sum::Taught(teacher, distill) => {
                let of_both = (&mut *logits, teacher.logits(pool, rows));
                distill_forward_backward(pool, losses, of_both, targets, *distill);
            }
            _ => cross_entropy_forward_backward(pool, losses, logits, targets, self.z_loss),
        }
        if let Sum::Weighted(factors_n) = sum {
            counted.factors.clear();
            counted.factors.extend(rows.iter().map(|row| factors_n[*row as usize]));
            scale_rows(pool, logits, &counted.factors);
        }
        let dlogits = Mat::new(&*logits, n, v);
        match run(rows) {
            Some(run) => {
                let dnormed = &mut scratch.delta_nc[run.start * c..run.end * c];
                matmul(pool, dnormed, dlogits, head, precision, Accumulate::Overwrite);
            }
            None => {
                counted.dgathered.reserve_scratch(n * c);
                let dnormed = &mut counted.dgathered[..n * c];
                matmul(pool, dnormed, dlogits, head, precision, Accumulate::Overwrite);
                for (dnormed_c, row) in dnormed.chunks_exact(c).zip(rows) {
                    scratch.delta_nc[*row as usize * c..][..c].copy_from_slice(dnormed_c);
                }
            }
        }
        if self.grads.all {
            let dhead = self.grads.keeper.grads(values.table.head.clone());
            matmul(pool, dhead, dlogits.t(), normed, precision, accumulate);
        }
        counted.losses_to(rows, &mut scratch.losses_n);
    }

    /// The embedding's gradients are there as the head's; only rows of tokens, and positions, are still added to.
    fn tell_settled(&mut self) {
        let table = self.matrices.values.table;
        if !self.grads.all {
            return;
        }
        let Counted { ids, open, .. } = &mut self.scratch.counted;
        ids.clear();
        ids.extend_from_slice(self.batch.tokens_bt);
        ids.sort_unstable();
        ids.dedup();
        open.clear();
        let row = |id: u32| table.embedding.start + id as usize * self.shape.c;
        let rows = ids.iter().map(|id| row(*id)..row(id + 1));
        for range in rows.chain(table.positions.clone()) {
            match open.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => open.push(range),
            }
        }
        self.grads.keeper.settled(0, open);
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
