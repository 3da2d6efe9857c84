//! [`Matrices`]: products with the matrices of layers, as they are or with LoRA's changes, and their gradients.
//!
//! A changed matrix is W + s·B·A. It is computed before each product with it (2·o·i·r operations, where x·Aᵀ·Bᵀ would
//! take 2·n·r·(o + i): tokens are many more than columns), so that the layer is one product, forward and backward. Its
//! gradient is never formed: with `low = s·x·Aᵀ` and `dlow = s·dy·B` it comes down to `dB = dyᵀ·low` and `dA = dlowᵀ·x`. These
//! four are products of f32 whatever the precision: they wait for memory, not for multiplications.

use std::ops::Range;

use tensor::matmul::{narrow, narrow_sum};
use tensor::rows::{add_bias, bias_backward};
use tensor::{Accumulate, Buf, Mat, Pool, matmul};

use super::keeper::{Keeper, Kept};
use super::memory::Shape;
use crate::ParamTable;
use crate::lora::{LoraTable, LowRank, SiteChanges};
use crate::params::{LinearRange, NormRange};
use crate::transformer::Site;

/// The numbers a pass computes with.
pub(super) struct Values<'a> {
    pub(super) table: &'a ParamTable,
    pub(super) held: Held<'a>,
    /// What LoRA adds, and its numbers.
    pub(super) changes: Option<(&'a LoraTable, &'a [f32])>,
}

/// Which parameters are there.
pub(super) enum Held<'a> {
    All(&'a [f32]),
    /// Those of some units, at most three.
    Units(Vec<(usize, Kept)>),
}

/// Where gradients go.
pub(super) struct Grads<'a> {
    pub(super) keeper: &'a mut dyn Keeper,
    /// Everything is trained, not LoRA's changes alone.
    pub(super) all: bool,
}

/// See the module.
pub(super) struct Matrices<'a> {
    pub(super) pool: &'a Pool,
    pub(super) values: Values<'a>,
    pub(super) shape: Shape,
    pub(super) scratch: &'a mut MatrixScratch,
}

/// Memory for changed matrices, kept between passes.
#[derive(Default)]
pub(super) struct MatrixScratch {
    /// W + s·B·A
    changed: Buf<f32>,
    /// s·A
    scaled: Buf<f32>,
    /// `[n, R]`, R the ranks of all changes at a site: s·x·Aᵀ
    low_nr: Buf<f32>,
    /// Its gradient, s·dy·B.
    dlow_nr: Buf<f32>,
    /// Partial sums of the gradients of biases.
    sums: Buf<f32>,
}

/// A place in the model with its matrices.
pub(super) type Place = (usize, Site);

impl<'a> Values<'a> {
    /// # Panics
    /// If the unit of these parameters is not held.
    pub(super) fn of(&self, range: &Range<usize>) -> &[f32] {
        match &self.held {
            Held::All(values) => &values[range.clone()],
            Held::Units(units) => {
                let found = units.iter().find_map(|(_, window)| window.of(range));
                found.unwrap_or_else(|| panic!("the parameters {range:?} are not held"))
            }
        }
    }

    fn linear(&self, (l, site): Place) -> &'a LinearRange {
        &self.table.layers[l].linears[site as usize]
    }

    /// What changes the matrices of a place, if anything does.
    fn changes(&self, (l, site): Place) -> Option<(Changes<'a>, f32)> {
        let (lora, values) = self.changes?;
        let site = lora.at(l, site)?;
        Some((Changes { site, values }, lora.scale()))
    }
}

/// The changes of one place and their numbers.
#[derive(Clone, Copy)]
struct Changes<'a> {
    site: &'a SiteChanges,
    values: &'a [f32],
}

impl Grads<'_> {
    /// Gradients of a norm's scale and shift.
    pub(super) fn norm<'s>(&'s mut self, range: &NormRange, sink: &'s mut Buf<f32>) -> [&'s mut [f32]; 2] {
        let c = range.weight.len();
        let end = range.bias.as_ref().map_or(range.weight.end, |bias| bias.end);
        let (dw_c, db_c) = match self.all {
            true => self.keeper.grads(range.weight.start..end).split_at_mut(c),
            false => sink[..2 * c].split_at_mut(c),
        };
        [dw_c, db_c]
    }

    /// The gradient of a vector that all parts of the model have, to which each has added what comes through its own heads.
    pub(super) fn summed(&mut self, range: &Range<usize>, values: &mut [f32]) {
        if self.all {
            self.keeper.sum(values);
            self.keeper.grads(range.clone()).copy_from_slice(values);
        }
    }
}

impl Matrices<'_> {
    /// `y = x · Wᵀ + bias`
    pub(super) fn forward(&mut self, place: Place, y_no: &mut [f32], x_ni: &[f32]) {
        self.multiply(place, y_no, x_ni);
        self.add_bias(place, y_no);
    }

    /// `y = Σ x · Wᵀ + bias`, the sum over parts of the model.
    pub(super) fn forward_summed(&mut self, place: Place, grads: &mut Grads, y_no: &mut [f32], x_ni: &[f32]) {
        self.multiply(place, y_no, x_ni);
        grads.keeper.sum(y_no);
        self.add_bias(place, y_no);
    }

    fn multiply(&mut self, place: Place, y_no: &mut [f32], x_ni: &[f32]) {
        let (pool, precision) = (self.pool, self.shape.precision);
        let x = Mat::new(x_ni, self.shape.n, self.values.linear(place).n_in);
        matmul(pool, y_no, x, self.matrix(place).t(), precision, Accumulate::Overwrite);
    }

    fn add_bias(&self, place: Place, y_no: &mut [f32]) {
        if let Some(bias) = &self.values.linear(place).bias {
            add_bias(self.pool, y_no, self.values.of(bias));
        }
    }

    /// `dx = dy · W`
    pub(super) fn dx(&mut self, place: Place, dx_ni: &mut [f32], dy_no: &[f32]) {
        let (pool, precision) = (self.pool, self.shape.precision);
        let dy = Mat::new(dy_no, self.shape.n, self.values.linear(place).n_out);
        matmul(pool, dx_ni, dy, self.matrix(place), precision, Accumulate::Overwrite);
    }

    /// The gradients of what is trained of W and bias.
    pub(super) fn dw(&mut self, place: Place, grads: &mut Grads, dy_no: &[f32], x_ni: &[f32]) {
        let (pool, n, range) = (self.pool, self.shape.n, self.values.linear(place));
        let (dy, x) = (Mat::new(dy_no, n, range.n_out), Mat::new(x_ni, n, range.n_in));
        let Grads { keeper, all } = grads;
        if *all {
            let dw = keeper.grads(range.weight.clone());
            matmul(pool, dw, dy.t(), x, self.shape.precision, Accumulate::Overwrite);
            if let Some(bias) = &range.bias {
                bias_backward(pool, keeper.grads(bias.clone()), dy_no, &mut self.scratch.sums);
            }
        } else if let Some((changes, scale)) = self.values.changes(place) {
            self.changes_backward((changes, scale), &mut **keeper, dy_no, x);
        }
    }

    /// W, or W + s·B·A.
    fn matrix(&mut self, place: Place) -> Mat<'_> {
        let (pool, range) = (self.pool, self.values.linear(place));
        let weight = self.values.of(&range.weight);
        let (n_out, n_in) = (range.n_out, range.n_in);
        let Some((changes, s)) = self.values.changes(place) else {
            return Mat::new(weight, n_out, n_in);
        };
        let MatrixScratch { changed, scaled, .. } = &mut *self.scratch;
        changed.reserve_scratch(weight.len());
        let changed = &mut changed[..weight.len()];
        let mut end = 0;
        for change in &changes.site.changes {
            let rows = change.first * n_in..(change.first + change.n_out) * n_in;
            changed[end..rows.start].copy_from_slice(&weight[end..rows.start]);
            let of = (&mut changed[rows.clone()], &weight[rows.clone()]);
            change.change(pool, changes.values, of, (s, scaled));
            end = rows.end;
        }
        changed[end..].copy_from_slice(&weight[end..]);
        Mat::new(&*changed, n_out, n_in)
    }

    fn changes_backward(
        &mut self,
        (changes, s): (Changes, f32),
        keeper: &mut dyn Keeper,
        dy_no: &[f32],
        x: Mat,
    ) {
        let (pool, n, site) = (self.pool, self.shape.n, changes.site);
        let MatrixScratch { low_nr, dlow_nr, .. } = &mut *self.scratch;
        let (a, r) = (&changes.values[site.a.clone()], site.a.len() / x.cols);
        for buf in [&mut *low_nr, &mut *dlow_nr] {
            buf.reserve_scratch(n * r);
        }
        let (low_nr, dlow_nr) = (&mut low_nr[..n * r], &mut dlow_nr[..n * r]);
        narrow(pool, (low_nr, r), x, Mat::new(a, r, x.cols).t(), s);
        let width = dy_no.len() / n;
        for (i, change) in site.changes.iter().enumerate() {
            let LowRank { first, n_out, b, .. } = change;
            let rank = b.len() / n_out;
            let dy = Mat::with_stride(&dy_no[*first..], n, *n_out, width);
            let low = Mat::with_stride(&low_nr[i * rank..], n, rank, r);
            narrow_sum(pool, (keeper.grads(b.clone()), [1, rank]), low, dy);
            let b = Mat::new(&changes.values[b.clone()], *n_out, rank);
            narrow(pool, (&mut dlow_nr[i * rank..], r), dy, b, s);
        }
        narrow_sum(pool, (keeper.grads(site.a.clone()), [x.cols, 1]), Mat::new(&*dlow_nr, n, r), x);
    }
}
