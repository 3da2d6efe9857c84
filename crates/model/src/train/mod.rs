//! [`TrainModel`]: forward and backward of a whole Llama over rows of tokens, parameters and gradients flat.
//!
//! ```text
//! x₀ = embedding(tokens)
//! each layer:  x' = x + attention(rope(norm(x)·Wqkvᵀ))·Woᵀ      x = x' + swiglu(norm(x')·Wguᵀ)·Wdᵀ
//! loss = cross_entropy(norm(x)·Wheadᵀ, targets)
//! ```
//! The streams x and x' before every norm are kept, and what each sub-layer's backward needs; normed rows and
//! activations are computed again. Logits exist for a chunk of tokens at a time.

use std::ops::Range;

use tensor::attention::{Attended, AttentionDims, attention_backward, attention_forward};
use tensor::cross_entropy::{IGNORED, cross_entropy_forward, cross_entropy_forward_backward};
use tensor::embedding::{embedding_backward, embedding_forward};
use tensor::rmsnorm::{
    Normed, Residual, residual_rmsnorm_forward, rmsnorm_again, rmsnorm_backward, rmsnorm_forward,
};
use tensor::rope::{RopeDims, RopeTable, Turn, rope};
use tensor::swiglu::{swiglu_backward, swiglu_forward};
use tensor::{Accumulate, Buf, Mat, Pool, Precision, matmul};

use crate::params::LayerRanges;
use crate::{Config, ParamTable};

/// Logits in memory at a time: 8 MiB, a quarter of a common last-level cache.
const LOGITS_MAX: usize = 2 << 20;

/// What a micro-batch lost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Sum of the losses of all tokens that count, in nats.
    pub nats: f64,
    /// Tokens that count.
    pub n_tokens: usize,
}

/// A model with the memory one micro-batch of b rows of t tokens needs. No call allocates after the first.
///
/// Results are the same bits for every number of threads.
pub struct TrainModel {
    shape: Shape,
    table: ParamTable,
    rope: RopeTable,
    layers: Vec<LayerMemory>,
    /// The residual stream before every norm: two per layer, and the last.
    streams: Vec<Stream>,
    scratch: Scratch,
}

/// Sizes used everywhere, derived once.
#[derive(Clone, Copy)]
struct Shape {
    n: usize,
    c: usize,
    f: usize,
    v: usize,
    attention: AttentionDims,
    rope: RopeDims,
    norm_eps: f32,
    precision: Precision,
}

/// One reading of the residual stream.
struct Stream {
    x_nc: Buf<f32>,
    rstd_n: Buf<f32>,
}

/// What the backward pass of a layer needs besides its two streams.
struct LayerMemory {
    /// Queries and keys after RoPE, and values.
    qkv: Buf<f32>,
    out_nhd: Buf<f32>,
    lse_bht: Buf<f32>,
    gate_up_n2f: Buf<f32>,
}

/// Memory whose contents live within one sub-layer.
struct Scratch {
    normed_nc: Buf<f32>,
    /// What a sub-layer adds to the stream; in the backward pass the gradient of `normed_nc`.
    delta_nc: Buf<f32>,
    act_nf: Buf<f32>,
    dqkv: Buf<f32>,
    dout_nhd: Buf<f32>,
    /// Gradient of the stream.
    dx_nc: Buf<f32>,
    logits: Buf<f32>,
    losses_n: Buf<f32>,
    norm: Buf<f32>,
}

impl TrainModel {
    /// For micro-batches of `b` rows of `t` tokens. `precision` is that of the matrix products.
    ///
    /// # Panics
    /// If the configuration does not pass its checks, or b or t is 0.
    pub fn new(config: &Config, b: usize, t: usize, precision: Precision) -> Self {
        config
            .check()
            .and_then(|()| config.check_trainable())
            .expect("only checked configurations are trained");
        assert!(b > 0 && t > 0, "a micro-batch of {b} rows of {t} tokens");
        let attention = AttentionDims {
            n_rows: b,
            n_positions: t,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_width: config.head_width,
        };
        let rope = RopeDims {
            n_positions: t,
            n_heads: config.n_heads + config.n_kv_heads,
            stride: attention.qkv_width(),
        };
        let shape = Shape {
            n: b * t,
            c: config.width,
            f: config.ff_width,
            v: config.vocab,
            attention,
            rope,
            norm_eps: config.norm_eps,
            precision,
        };
        Self {
            shape,
            table: ParamTable::new(config),
            rope: config.rope.table(t, config.head_width),
            layers: (0..config.n_layers).map(|_| LayerMemory::new(shape)).collect(),
            streams: (0..2 * config.n_layers + 1).map(|_| Stream::new(shape)).collect(),
            scratch: Scratch::new(shape),
        }
    }

    /// The layout of `params` and `dparams`.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// The loss of `tokens_bt` predicting `targets_bt` (`u32::MAX`: does not count), and its gradient: that of the *sum*
    /// over tokens, in nats. `dparams` is overwritten.
    ///
    /// # Panics
    /// If a length differs from what [`TrainModel::new`] was told, or a token or target is not below the vocabulary.
    pub fn loss_and_grads(
        &mut self,
        pool: &Pool,
        params: &[f32],
        tokens_bt: &[u32],
        targets_bt: &[u32],
        dparams: &mut [f32],
    ) -> LossSum {
        assert_eq!(dparams.len(), self.table.n_params(), "gradients");
        self.forward(pool, params, tokens_bt);
        let loss = self.head_backward(pool, params, targets_bt, dparams);
        for layer in (0..self.layers.len()).rev() {
            self.feed_forward_backward(pool, params, dparams, layer);
            self.attention_backward(pool, params, dparams, layer);
        }
        let c = self.shape.c;
        let dembedding = &mut dparams[self.table.embedding.clone()];
        if self.table.head != self.table.embedding {
            dembedding.fill(0.0);
        }
        embedding_backward(pool, dembedding, &self.scratch.dx_nc, tokens_bt, c);
        loss
    }

    /// The loss alone.
    ///
    /// # Panics
    /// As [`TrainModel::loss_and_grads`].
    pub fn loss(&mut self, pool: &Pool, params: &[f32], tokens_bt: &[u32], targets_bt: &[u32]) -> LossSum {
        self.forward(pool, params, tokens_bt);
        let Self { shape, table, scratch, .. } = self;
        assert_eq!(targets_bt.len(), shape.n, "targets");
        let head = Mat::new(&params[table.head.clone()], shape.v, shape.c);
        for rows in shape.chunks() {
            let logits = &mut scratch.logits[..rows.len() * shape.v];
            let normed = shape.rows(&scratch.normed_nc, rows.clone());
            matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
            cross_entropy_forward(pool, &mut scratch.losses_n[rows.clone()], logits, &targets_bt[rows]);
        }
        sum_losses(&scratch.losses_n, targets_bt)
    }

    /// The logits of the first `n` tokens of the last forward pass, `[n, v]`. For comparisons with other programs.
    pub fn last_logits(&mut self, pool: &Pool, params: &[f32], n: usize) -> Buf<f32> {
        let Self { shape, table, scratch, streams, .. } = self;
        let normed = streams[streams.len() - 1].normed(&params[table.final_norm.clone()]);
        rmsnorm_again(pool, &mut scratch.normed_nc, normed);
        let mut logits = Buf::zeroed(n * shape.v);
        let head = Mat::new(&params[table.head.clone()], shape.v, shape.c);
        let rows = shape.rows(&scratch.normed_nc, 0..n);
        matmul(pool, &mut logits, rows, head.t(), shape.precision, Accumulate::Overwrite);
        logits
    }

    /// Fills the streams and the layers' memory; leaves the last normed rows in `scratch.normed_nc`.
    fn forward(&mut self, pool: &Pool, params: &[f32], tokens_bt: &[u32]) {
        let Self { shape, table, streams, scratch, .. } = self;
        assert_eq!(params.len(), table.n_params(), "parameters");
        assert_eq!(tokens_bt.len(), shape.n, "tokens");
        let first = &mut streams[0];
        embedding_forward(pool, &mut first.x_nc, tokens_bt, &params[table.embedding.clone()], shape.c);
        let w_c = &params[table.layers[0].attention_norm.clone()];
        rmsnorm_forward(pool, &mut scratch.normed_nc, &mut first.rstd_n, &first.x_nc, w_c, shape.norm_eps);
        for layer in 0..self.layers.len() {
            self.layer_forward(pool, params, layer);
        }
    }

    /// From the normed rows before the layer to the normed rows after it.
    fn layer_forward(&mut self, pool: &Pool, params: &[f32], layer: usize) {
        let Self { shape, table, rope: rope_table, layers, streams, scratch } = self;
        let ranges = &table.layers[layer];
        let memory = &mut layers[layer];
        let [qkv_w, output_w, gate_up_w, down_w] = shape.weights(params, ranges);
        let [next_attention_norm, ff_norm] = {
            let next = table.layers.get(layer + 1).map_or(&table.final_norm, |next| &next.attention_norm);
            [next, &ranges.ff_norm].map(|range| &params[range.clone()])
        };

        shape.linear(pool, &mut memory.qkv, &scratch.normed_nc, qkv_w);
        rope(pool, &mut memory.qkv, shape.rope, rope_table, Turn::Forward);
        attention_forward(pool, shape.attention, &mut memory.out_nhd, &mut memory.lse_bht, &memory.qkv);
        shape.linear(pool, &mut scratch.delta_nc, &memory.out_nhd, output_w);
        add_and_norm(pool, streams, 2 * layer, scratch, ff_norm, shape.norm_eps);

        shape.linear(pool, &mut memory.gate_up_n2f, &scratch.normed_nc, gate_up_w);
        swiglu_forward(pool, &mut scratch.act_nf, &memory.gate_up_n2f, shape.f);
        shape.linear(pool, &mut scratch.delta_nc, &scratch.act_nf, down_w);
        add_and_norm(pool, streams, 2 * layer + 1, scratch, next_attention_norm, shape.norm_eps);
    }

    /// Loss, gradients of the head and the last norm; starts the gradient of the stream.
    fn head_backward(
        &mut self,
        pool: &Pool,
        params: &[f32],
        targets_bt: &[u32],
        dparams: &mut [f32],
    ) -> LossSum {
        let Self { shape, table, streams, scratch, .. } = self;
        assert_eq!(targets_bt.len(), shape.n, "targets");
        let head = Mat::new(&params[table.head.clone()], shape.v, shape.c);
        for rows in shape.chunks() {
            let logits = &mut scratch.logits[..rows.len() * shape.v];
            let normed = shape.rows(&scratch.normed_nc, rows.clone());
            matmul(pool, logits, normed, head.t(), shape.precision, Accumulate::Overwrite);
            let losses = &mut scratch.losses_n[rows.clone()];
            cross_entropy_forward_backward(pool, losses, logits, &targets_bt[rows.clone()]);
            let dlogits = Mat::new(&*logits, rows.len(), shape.v);
            let dnormed = &mut scratch.delta_nc[rows.start * shape.c..rows.end * shape.c];
            matmul(pool, dnormed, dlogits, head, shape.precision, Accumulate::Overwrite);
            let accumulate = if rows.start == 0 { Accumulate::Overwrite } else { Accumulate::Add };
            matmul(pool, &mut dparams[table.head.clone()], dlogits.t(), normed, shape.precision, accumulate);
        }
        scratch.dx_nc.fill(0.0);
        let last = &streams[streams.len() - 1];
        norm_backward(pool, scratch, last, table.final_norm.clone(), params, dparams);
        sum_losses(&scratch.losses_n, targets_bt)
    }

    fn feed_forward_backward(&mut self, pool: &Pool, params: &[f32], dparams: &mut [f32], layer: usize) {
        let Self { shape, table, layers, streams, scratch, .. } = self;
        let (ranges, memory, stream) = (&table.layers[layer], &mut layers[layer], &streams[2 * layer + 1]);
        let [_, _, gate_up_w, down_w] = shape.weights(params, ranges);
        shape.linear_dx(pool, &mut scratch.act_nf, &scratch.dx_nc, down_w);
        swiglu_backward(pool, &mut memory.gate_up_n2f, &mut scratch.act_nf, shape.f);
        shape.linear_dw(pool, &mut dparams[ranges.down.clone()], &scratch.dx_nc, &scratch.act_nf);
        rmsnorm_again(pool, &mut scratch.normed_nc, stream.normed(&params[ranges.ff_norm.clone()]));
        shape.linear_dw(pool, &mut dparams[ranges.gate_up.clone()], &memory.gate_up_n2f, &scratch.normed_nc);
        shape.linear_dx(pool, &mut scratch.delta_nc, &memory.gate_up_n2f, gate_up_w);
        norm_backward(pool, scratch, stream, ranges.ff_norm.clone(), params, dparams);
    }

    fn attention_backward(&mut self, pool: &Pool, params: &[f32], dparams: &mut [f32], layer: usize) {
        let Self { shape, table, rope: rope_table, layers, streams, scratch } = self;
        let (ranges, memory, stream) = (&table.layers[layer], &layers[layer], &streams[2 * layer]);
        let [qkv_w, output_w, _, _] = shape.weights(params, ranges);
        shape.linear_dx(pool, &mut scratch.dout_nhd, &scratch.dx_nc, output_w);
        shape.linear_dw(pool, &mut dparams[ranges.output.clone()], &scratch.dx_nc, &memory.out_nhd);
        let attended = Attended { qkv: &memory.qkv, out_nhd: &memory.out_nhd, lse_bht: &memory.lse_bht };
        attention_backward(pool, shape.attention, &mut scratch.dqkv, attended, &scratch.dout_nhd);
        rope(pool, &mut scratch.dqkv, shape.rope, rope_table, Turn::Backward);
        rmsnorm_again(pool, &mut scratch.normed_nc, stream.normed(&params[ranges.attention_norm.clone()]));
        shape.linear_dw(pool, &mut dparams[ranges.qkv.clone()], &scratch.dqkv, &scratch.normed_nc);
        shape.linear_dx(pool, &mut scratch.delta_nc, &scratch.dqkv, qkv_w);
        norm_backward(pool, scratch, stream, ranges.attention_norm.clone(), params, dparams);
    }
}

/// The stream after `streams[at]`, with `scratch.delta_nc` added, and its norm.
fn add_and_norm(
    pool: &Pool,
    streams: &mut [Stream],
    at: usize,
    scratch: &mut Scratch,
    w_c: &[f32],
    eps: f32,
) {
    let (before, after) = streams.split_at_mut(at + 1);
    let (before, after) = (&before[at], &mut after[0]);
    let input = Residual { x_nc: &before.x_nc, delta_nc: &scratch.delta_nc };
    let outputs = [&mut after.x_nc[..], &mut scratch.normed_nc[..]];
    residual_rmsnorm_forward(pool, outputs, &mut after.rstd_n, input, w_c, eps);
}

/// Adds the gradient that came through a norm (`scratch.delta_nc`) to the stream's, and sets that of its weight.
fn norm_backward(
    pool: &Pool,
    scratch: &mut Scratch,
    stream: &Stream,
    weight: Range<usize>,
    params: &[f32],
    dparams: &mut [f32],
) {
    let normed = stream.normed(&params[weight.clone()]);
    let Scratch { dx_nc, delta_nc, norm, .. } = scratch;
    rmsnorm_backward(pool, dx_nc, &mut dparams[weight], delta_nc, normed, norm);
}

fn sum_losses(losses_n: &[f32], targets_n: &[u32]) -> LossSum {
    LossSum {
        nats: losses_n.iter().map(|x| f64::from(*x)).sum(),
        n_tokens: targets_n.iter().filter(|target| **target != IGNORED).count(),
    }
}

impl Shape {
    /// Qkv, output, gate-up and down, each `[outputs, inputs]`.
    fn weights<'a>(&self, params: &'a [f32], ranges: &LayerRanges) -> [Mat<'a>; 4] {
        let (c, f) = (self.c, self.f);
        let (qkv, out) = (self.attention.qkv_width(), self.attention.out_width());
        let mat = |range: &Range<usize>, rows, cols| Mat::new(&params[range.clone()], rows, cols);
        [
            mat(&ranges.qkv, qkv, c),
            mat(&ranges.output, c, out),
            mat(&ranges.gate_up, 2 * f, c),
            mat(&ranges.down, c, f),
        ]
    }

    /// `y = x · wᵀ`
    fn linear(&self, pool: &Pool, y: &mut [f32], x: &[f32], w: Mat) {
        let x = Mat::new(x, self.n, w.cols);
        matmul(pool, y, x, w.t(), self.precision, Accumulate::Overwrite);
    }

    /// `dx = dy · w`
    fn linear_dx(&self, pool: &Pool, dx: &mut [f32], dy: &[f32], w: Mat) {
        let dy = Mat::new(dy, self.n, w.rows);
        matmul(pool, dx, dy, w, self.precision, Accumulate::Overwrite);
    }

    /// `dw = dyᵀ · x`
    fn linear_dw(&self, pool: &Pool, dw: &mut [f32], dy: &[f32], x: &[f32]) {
        let [dy, x] = [dy, x].map(|rows| Mat::new(rows, self.n, rows.len() / self.n));
        matmul(pool, dw, dy.t(), x, self.precision, Accumulate::Overwrite);
    }

    /// Some rows of a `[n, c]` matrix.
    fn rows<'a>(&self, x_nc: &'a [f32], rows: Range<usize>) -> Mat<'a> {
        Mat::new(&x_nc[rows.start * self.c..rows.end * self.c], rows.len(), self.c)
    }

    /// Tokens whose logits exist at the same time.
    fn chunk(&self) -> usize {
        (LOGITS_MAX / self.v).max(16).min(self.n)
    }

    fn chunks(self) -> impl Iterator<Item = Range<usize>> {
        let chunk = self.chunk();
        (0..self.n).step_by(chunk).map(move |start| start..(start + chunk).min(self.n))
    }
}

impl Stream {
    fn new(shape: Shape) -> Self {
        Self { x_nc: Buf::zeroed(shape.n * shape.c), rstd_n: Buf::zeroed(shape.n) }
    }

    fn normed<'a>(&'a self, w_c: &'a [f32]) -> Normed<'a> {
        Normed { x_nc: &self.x_nc, rstd_n: &self.rstd_n, w_c }
    }
}

impl LayerMemory {
    fn new(shape: Shape) -> Self {
        let dims = shape.attention;
        Self {
            qkv: Buf::zeroed(shape.n * dims.qkv_width()),
            out_nhd: Buf::zeroed(shape.n * dims.out_width()),
            lse_bht: Buf::zeroed(shape.n * dims.n_heads),
            gate_up_n2f: Buf::zeroed(shape.n * 2 * shape.f),
        }
    }
}

impl Scratch {
    fn new(shape: Shape) -> Self {
        let Shape { n, c, f, v, attention, .. } = shape;
        Self {
            normed_nc: Buf::zeroed(n * c),
            delta_nc: Buf::zeroed(n * c),
            act_nf: Buf::zeroed(n * f),
            dqkv: Buf::zeroed(n * attention.qkv_width()),
            dout_nhd: Buf::zeroed(n * attention.out_width()),
            dx_nc: Buf::zeroed(n * c),
            logits: Buf::zeroed(shape.chunk() * v),
            losses_n: Buf::zeroed(n),
            norm: Buf::default(),
        }
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
