//! One layer, forward and backward.

use tensor::attention::{Attended, Mask, attention_backward, attention_forward};
use tensor::gelu::{geglu_backward, geglu_forward, gelu_backward, gelu_into};
use tensor::head_norm::{HeadNorm, head_norm_backward, head_norm_forward};
use tensor::rmsnorm::Residual;
use tensor::rope::{RopeTable, Turn, rope};
use tensor::swiglu::{swiglu_backward, swiglu_forward};

use super::Pass;
use super::matrices::Values;
use super::memory::{LayerMemory, Scratch, Shape, Stream};
use super::norm::Norm;
use crate::Activation;
use crate::params::{LayerRanges, NormRange};
use crate::transformer::Site;

/// Numbers that one task adds.
const ADD_LEN: usize = 1 << 14;

/// Which sub-layer's norm after it is meant.
const ATTENTION: usize = 0;
const FEED_FORWARD: usize = 1;

impl<'a> Pass<'a> {
    /// From the normed rows before the layer to the normed rows after it.
    pub(super) fn layer_forward(&mut self, l: usize) {
        let table = self.matrices.values.table;
        let ranges = &table.layers[l];
        self.attention_forward(l);
        self.add_and_norm(2 * l, &ranges.ff_norm);
        self.feed_forward_forward(l);
        // The norm after this layer is the next one's.
        match table.layers.get(l + 1) {
            None if !self.has_head() => self.add(2 * l + 1),
            next => {
                self.hold(l + 2);
                let norm = next.map_or(&table.final_norm, |next| &next.attention_norm);
                self.add_and_norm(2 * l + 1, norm);
            }
        }
        self.release(l + 1);
    }

    /// What the backward pass reads of a layer, from the layer's input.
    pub(super) fn layer_again(&mut self, l: usize) {
        let ranges = &self.matrices.values.table.layers[l];
        let norm = Norm::of(&self.matrices.values, &ranges.attention_norm, self.shape.norm_eps);
        norm.again(self.pool, &mut self.scratch.normed_nc, &self.streams[2 * l]);
        self.attention_forward(l);
        self.add_and_norm(2 * l, &ranges.ff_norm);
        match ranges.ff_post_norm {
            // Its backward pass reads what the sub-layer leaves.
            Some(_) => self.feed_forward_forward(l),
            None => self.up_forward(l),
        }
    }

    /// From `normed_nc` to `delta_nc`.
    fn attention_forward(&mut self, l: usize) {
        let (pool, shape, mask) = (self.pool, self.shape, self.mask(l));
        let ranges = &self.matrices.values.table.layers[l];
        let angles = self.rope_table(l);
        let memory = &mut self.layers[l];
        self.matrices.forward((l, Site::Qkv), &mut memory.qkv, &self.scratch.normed_nc);
        if let Some(parts) = head_norms(&self.matrices.values, ranges, &shape) {
            keep_heads(memory, &shape);
            head_norm_forward(pool, &mut memory.qkv, shape.rope.stride, &parts, shape.norm_eps);
        }
        if let Some(angles) = angles {
            rope(pool, &mut memory.qkv, shape.rope, angles, Turn::Forward);
        }
        let LayerMemory { qkv, out_nhd, lse_bht, .. } = memory;
        attention_forward(pool, (shape.attention, mask), out_nhd, lse_bht, qkv);
        let delta_nc = &mut self.scratch.delta_nc;
        self.matrices.forward_summed((l, Site::Output), &mut self.grads, delta_nc, out_nhd);
        self.post_norm((l, ATTENTION), ranges.attention_post_norm.as_ref());
    }

    /// From `normed_nc` to `delta_nc`.
    fn feed_forward_forward(&mut self, l: usize) {
        self.up_forward(l);
        let (pool, f) = (self.pool, self.shape.f);
        let up_no = &self.layers[l].up_no;
        let Scratch { act_nf, delta_nc, .. } = &mut *self.scratch;
        match self.shape.block.activation {
            Activation::SwiGlu => swiglu_forward(pool, act_nf, up_no, f),
            Activation::GeGlu => geglu_forward(pool, act_nf, up_no, f),
            Activation::Gelu => gelu_into(pool, act_nf, up_no),
            Activation::GeluErf => unreachable!("no model that predicts has it"),
        }
        self.matrices.forward_summed((l, Site::Down), &mut self.grads, delta_nc, act_nf);
        let post_norm = self.matrices.values.table.layers[l].ff_post_norm.as_ref();
        self.post_norm((l, FEED_FORWARD), post_norm);
    }

    fn up_forward(&mut self, l: usize) {
        self.matrices.forward((l, Site::Up), &mut self.layers[l].up_no, &self.scratch.normed_nc);
    }

    /// Norms what a sub-layer leaves, in models that do.
    fn post_norm(&mut self, (l, which): (usize, usize), range: Option<&NormRange>) {
        let Some((range, post)) = range.zip(self.layers[l].post.as_mut()) else { return };
        let norm = Norm::of(&self.matrices.values, range, self.shape.norm_eps);
        let (stream, delta_nc) = (&mut post[which], &mut self.scratch.delta_nc);
        std::mem::swap(&mut stream.x_nc, delta_nc);
        norm.forward(self.pool, delta_nc, stream);
    }

    /// The stream after `streams[at]`, with `scratch.delta_nc` added, and its norm.
    fn add_and_norm(&mut self, at: usize, range: &NormRange) {
        let norm = Norm::of(&self.matrices.values, range, self.shape.norm_eps);
        let (before, after) = self.streams.before_and_after(at);
        let input = Residual { x_nc: &before.x_nc, delta_nc: &self.scratch.delta_nc };
        norm.residual_forward(self.pool, &mut self.scratch.normed_nc, after, input);
    }

    /// The stream after `streams[at]`, with `scratch.delta_nc` added.
    fn add(&mut self, at: usize) {
        let (before, after) = self.streams.before_and_after(at);
        let delta_nc = &self.scratch.delta_nc;
        self.pool.run_chunks(&mut after.x_nc, ADD_LEN, |task, sum| {
            let from = task * ADD_LEN..task * ADD_LEN + sum.len();
            let terms = before.x_nc[from.clone()].iter().zip(&delta_nc[from]);
            sum.iter_mut().zip(terms).for_each(|(sum, (x, delta))| *sum = x + delta);
        });
    }

    /// Adds what came through the feed-forward sub-layer to the gradient of the stream.
    pub(super) fn feed_forward_backward(&mut self, l: usize) {
        let (pool, f) = (self.pool, self.shape.f);
        let ranges = &self.matrices.values.table.layers[l];
        self.post_norm_backward((l, FEED_FORWARD), ranges.ff_post_norm.as_ref());
        let (stream, up_no) = (&self.streams[2 * l + 1], &mut self.layers[l].up_no);
        let Scratch { normed_nc, act_nf, delta_nc, dx_nc, dpost_nc, .. } = &mut *self.scratch;
        let dy_nc = if ranges.ff_post_norm.is_some() { dpost_nc } else { dx_nc };
        self.matrices.dx((l, Site::Down), act_nf, dy_nc);
        match self.shape.block.activation {
            Activation::SwiGlu => swiglu_backward(pool, up_no, act_nf, f),
            Activation::GeGlu => geglu_backward(pool, up_no, act_nf, f),
            Activation::Gelu => gelu_backward(pool, up_no, act_nf),
            Activation::GeluErf => unreachable!("no model that predicts has it"),
        }
        self.matrices.dw((l, Site::Down), &mut self.grads, dy_nc, act_nf);
        Norm::of(&self.matrices.values, &ranges.ff_norm, self.shape.norm_eps).again(pool, normed_nc, stream);
        self.matrices.dw((l, Site::Up), &mut self.grads, up_no, normed_nc);
        self.matrices.dx((l, Site::Up), delta_nc, up_no);
        self.grads.keeper.sum(delta_nc);
        self.norm_backward(2 * l + 1, &ranges.ff_norm);
    }

    /// Adds what came through the attention sub-layer to the gradient of the stream.
    pub(super) fn attention_backward(&mut self, l: usize) {
        let (pool, shape, mask) = (self.pool, self.shape, self.mask(l));
        let ranges = &self.matrices.values.table.layers[l];
        self.post_norm_backward((l, ATTENTION), ranges.attention_post_norm.as_ref());
        let angles = self.rope_table(l);
        let (stream, memory) = (&self.streams[2 * l], &self.layers[l]);
        let Scratch { normed_nc, delta_nc, dqkv, dout_nhd, dx_nc, dpost_nc, sums, sink, .. } =
            &mut *self.scratch;
        let dy_nc = if ranges.attention_post_norm.is_some() { dpost_nc } else { dx_nc };
        self.matrices.dx((l, Site::Output), dout_nhd, dy_nc);
        self.matrices.dw((l, Site::Output), &mut self.grads, dy_nc, &memory.out_nhd);
        let attended = Attended { qkv: &memory.qkv, out_nhd: &memory.out_nhd, lse_bht: &memory.lse_bht };
        attention_backward(pool, (shape.attention, mask), dqkv, attended, dout_nhd);
        if let Some(angles) = angles {
            rope(pool, dqkv, shape.rope, angles, Turn::Backward);
        }
        let head_norms = head_norms(&self.matrices.values, ranges, &shape);
        if let Some((parts, range)) = head_norms.zip(ranges.head_norms.as_ref()) {
            let (dw, dheads) = (&mut sink[..range.len()], (&mut dqkv[..], shape.rope.stride));
            head_norm_backward(pool, dheads, dw, &memory.heads_nk, (&parts, shape.norm_eps), sums);
            self.grads.summed(range, dw);
        }
        let norm = Norm::of(&self.matrices.values, &ranges.attention_norm, shape.norm_eps);
        norm.again(pool, normed_nc, stream);
        self.matrices.dw((l, Site::Qkv), &mut self.grads, dqkv, normed_nc);
        // Below the first layer's matrices LoRA trains nothing.
        if l > 0 || self.grads.all {
            self.matrices.dx((l, Site::Qkv), delta_nc, dqkv);
            self.grads.keeper.sum(delta_nc);
            self.norm_backward(2 * l, &ranges.attention_norm);
        }
    }

    /// `dpost_nc` from the gradient of the stream, in models that norm what a sub-layer leaves.
    fn post_norm_backward(&mut self, (l, which): (usize, usize), range: Option<&NormRange>) {
        let Some((range, post)) = range.zip(self.layers[l].post.as_ref()) else { return };
        let norm = Norm::of(&self.matrices.values, range, self.shape.norm_eps);
        let Scratch { dx_nc, dpost_nc, sums, sink, .. } = &mut *self.scratch;
        dpost_nc.fill(0.0);
        norm.backward(self.pool, dpost_nc, self.grads.norm(range, sink), (dx_nc, &post[which]), sums);
    }

    /// Adds the gradient that came through a norm (`scratch.delta_nc`) to the stream's, and sets those of its numbers.
    pub(super) fn norm_backward(&mut self, at: usize, range: &NormRange) {
        let norm = Norm::of(&self.matrices.values, range, self.shape.norm_eps);
        let Scratch { dx_nc, delta_nc, sums, sink, .. } = &mut *self.scratch;
        let stream: &Stream = &self.streams[at];
        norm.backward(self.pool, dx_nc, self.grads.norm(range, sink), (delta_nc, stream), sums);
    }

    fn mask(&self, l: usize) -> Mask<'a> {
        Mask { starts_bt: self.batch.starts_bt, window: self.config.window_of(l) }
    }

    /// The angles of a layer; `None` where positions are learned.
    fn rope_table(&self, l: usize) -> Option<&'a RopeTable> {
        self.ropes[self.config.rope_idx(l)].as_ref()
    }
}

/// The norms of the heads of q and k, where a model has them.
fn head_norms<'a>(values: &'a Values, ranges: &LayerRanges, shape: &Shape) -> Option<[HeadNorm<'a>; 2]> {
    let range = ranges.head_norms.as_ref()?;
    let (q_d, k_d) = values.of(range).split_at(shape.attention.head_width);
    Some([
        HeadNorm { n_heads: shape.attention.n_heads, w_d: q_d },
        HeadNorm { n_heads: shape.attention.n_kv_heads, w_d: k_d },
    ])
}

/// Copies queries and keys before they are normed.
fn keep_heads(memory: &mut LayerMemory, shape: &Shape) {
    let width = shape.rope.n_heads * shape.attention.head_width;
    let rows = memory.heads_nk.chunks_exact_mut(width).zip(memory.qkv.chunks_exact(shape.rope.stride));
    for (heads_k, qkv_o) in rows {
        heads_k.copy_from_slice(&qkv_o[..width]);
    }
}
