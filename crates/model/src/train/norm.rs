//! [`Norm`]: RMSNorm or LayerNorm, whichever a model has.

use tensor::layernorm::{LayerNorm, layernorm_backward, layernorm_forward, residual_layernorm_forward};
use tensor::rmsnorm::{
    Normed, Residual, residual_rmsnorm_forward, rmsnorm_again, rmsnorm_backward, rmsnorm_forward,
};
use tensor::{Buf, Pool};

use super::matrices::Values;
use super::memory::Stream;
use crate::params::NormRange;

/// A norm's numbers.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    w_c: &'a [f32],
    /// LayerNorm has shifts.
    b_c: Option<&'a [f32]>,
    eps: f32,
}

impl<'a> Norm<'a> {
    pub(super) fn of(values: &'a Values, range: &NormRange, eps: f32) -> Self {
        Self { w_c: values.of(&range.weight), b_c: range.bias.as_ref().map(|bias| values.of(bias)), eps }
    }

    fn layer_norm(&self) -> Option<LayerNorm<'a>> {
        self.b_c.map(|b_c| LayerNorm { w_c: self.w_c, b_c, eps: self.eps })
    }

    /// `y = norm(x)`; the stream keeps what the backward pass needs.
    pub(super) fn forward(&self, pool: &Pool, y_nc: &mut [f32], stream: &mut Stream) {
        match self.layer_norm() {
            Some(norm) => layernorm_forward(pool, y_nc, &stream.x_nc, norm),
            None => rmsnorm_forward(pool, y_nc, &mut stream.rstd_n, &stream.x_nc, self.w_c, self.eps),
        }
    }

    /// The stream `after` becomes `input`'s sum, and y its norm.
    pub(super) fn residual_forward(
        &self,
        pool: &Pool,
        y_nc: &mut [f32],
        after: &mut Stream,
        input: Residual,
    ) {
        let outputs = [&mut after.x_nc[..], y_nc];
        match self.layer_norm() {
            Some(norm) => residual_layernorm_forward(pool, outputs, input, norm),
            None => residual_rmsnorm_forward(pool, outputs, &mut after.rstd_n, input, self.w_c, self.eps),
        }
    }

    /// y again: cheaper than keeping it for every layer.
    pub(super) fn again(&self, pool: &Pool, y_nc: &mut [f32], stream: &Stream) {
        match self.layer_norm() {
            Some(norm) => layernorm_forward(pool, y_nc, &stream.x_nc, norm),
            None => rmsnorm_again(pool, y_nc, self.normed(stream)),
        }
    }

    /// Adds the gradient of x to `dx_nc`; overwrites those of scale and shift.
    pub(super) fn backward(
        &self,
        pool: &Pool,
        dx_nc: &mut [f32],
        [dw_c, db_c]: [&mut [f32]; 2],
        (dy_nc, stream): (&[f32], &Stream),
        sums: &mut Buf<f32>,
    ) {
        match self.layer_norm() {
            Some(norm) => {
                layernorm_backward(pool, dx_nc, [dw_c, db_c], (dy_nc, &stream.x_nc), norm, sums);
            }
            None => rmsnorm_backward(pool, dx_nc, dw_c, dy_nc, self.normed(stream), sums),
        }
    }

    fn normed<'b>(&'b self, stream: &'b Stream) -> Normed<'b> {
        Normed { x_nc: &stream.x_nc, rstd_n: &stream.rstd_n, w_c: self.w_c }
    }
}
