//! The cached forward pass of new tokens of any number of sequences.
//!
//! A token's logits depend on its sequence alone, to the bit: not on the other rows of the step, on how its prompt was
//! cut into steps, or on the number of threads. Every op keeps that promise; the test
//! `logits_do_not_depend_on_the_step` holds it for the whole.

use tensor::gelu::{Gelu, geglu_forward, gelu_forward};
use tensor::head_norm::{HeadNorm, head_norm_forward};
use tensor::layernorm::{LayerNorm, layernorm_forward, residual_layernorm_forward};
use tensor::packed::{Packed, PackedScratch, project_before};
use tensor::paged_attention::{AttentionScratch, BLOCK_TOKENS, KvCache, PagedRow, paged_attention};
use tensor::rmsnorm::{Residual, residual_rmsnorm_forward, rmsnorm_forward};
use tensor::rows::{add_bias, scale};
use tensor::swiglu::swiglu_forward;
use tensor::{Buf, Pool};

use crate::adapter::{Adapted, AdapterScratch};
use crate::transformer::{Layer, Linear, Norm, Site, Transformer};
use crate::{Activation, Config, Error, Result, StepInput};

/// Memory of the forward pass, kept between steps: nothing of size is allocated after the largest step.
#[derive(Default)]
pub struct Scratch {
    /// The residual stream, and where the next one is made.
    x_nc: [Buf<f32>; 2],
    /// What the last sub-layer adds to it.
    delta_nc: Buf<f32>,
    normed_nc: Buf<f32>,
    rstd_n: Buf<f32>,
    qkv_no: Buf<f32>,
    heads_nhd: Buf<f32>,
    gate_up_n2f: Buf<f32>,
    act_nf: Buf<f32>,
    packed: PackedScratch,
    attention: AttentionScratch,
    adapter: AdapterScratch,
}

impl Transformer {
    /// Computes the new tokens of `step`: their keys and values go into `kv`, and `logits_rv` becomes one row of v logits
    /// for every token that wants them, in the order of the step.
    ///
    /// # Errors
    /// If the step does not fit the model or the cache; nothing has been computed then.
    pub fn forward(
        &self,
        pool: &Pool,
        step: &StepInput,
        kv: &mut KvCache,
        scratch: &mut Scratch,
        logits_rv: &mut Vec<f32>,
    ) -> Result<()> {
        self.check(step, kv)?;
        let mut pass = Pass::new(self, pool, step, scratch);
        pass.layers(step, kv, Keep::EveryLayer);
        pass.logits(step, logits_rv);
        Ok(())
    }

    fn check(&self, step: &StepInput, kv: &KvCache) -> Result<()> {
        let fail = |problem: String| Err(Error::Step(problem));
        if !self.config.block().causal {
            return fail("the model embeds texts and predicts none".into());
        }
        let n: usize = step.rows.iter().map(|row| row.n_tokens).sum();
        if n == 0 || n != step.tokens_n.len() || n != step.positions_n.len() {
            return fail(format!(
                "{} tokens and {} positions for rows of {n} in all",
                step.tokens_n.len(),
                step.positions_n.len()
            ));
        }
        if kv.dims() != self.config.kv_dims() {
            return fail(format!("the cache was made for another model: {:?}", kv.dims()));
        }
        if let Some(token) = step.tokens_n.iter().find(|&&token| token as usize >= self.config.vocab) {
            return fail(format!("token {token} is not below {}", self.config.vocab));
        }
        if !Adapted::new(step).fits(&self.config) {
            return fail("a row has an adapter of another model".into());
        }
        let mut positions = step.positions_n.iter();
        for (i, row) in step.rows.iter().enumerate() {
            let n_blocks = row.n_context.div_ceil(BLOCK_TOKENS);
            if row.n_tokens == 0 || row.n_tokens > row.n_context || row.n_logits > row.n_tokens {
                return fail(format!("row {i} has {row:?}"));
            }
            if row.n_context > self.context_max() {
                return fail(format!(
                    "row {i} has {} positions, the model {}",
                    row.n_context,
                    self.context_max()
                ));
            }
            if row.blocks.len() < n_blocks
                || row.blocks[..n_blocks].iter().any(|&b| b as usize >= kv.n_blocks())
            {
                return fail(format!(
                    "row {i} has blocks {:?} of {} for {} positions",
                    row.blocks,
                    kv.n_blocks(),
                    row.n_context
                ));
            }
            let expected = row.n_context - row.n_tokens..row.n_context;
            if !expected.clone().eq(positions.by_ref().take(row.n_tokens).map(|&p| p as usize)) {
                return fail(format!("row {i} has other positions than {expected:?}"));
            }
        }
        Ok(())
    }
}

/// One forward pass over `n` tokens.
pub(crate) struct Pass<'a> {
    pub(crate) model: &'a Transformer,
    pub(crate) pool: &'a Pool,
    pub(crate) n: usize,
    pub(crate) scratch: &'a mut Scratch,
    adapted: Adapted<'a>,
}

/// What stays in the cache after a pass.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Keys and values of every layer, for the next step.
    EveryLayer,
    /// Nothing: each layer writes over the one before, in a cache of one layer.
    Nothing,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(
        model: &'a Transformer,
        pool: &'a Pool,
        step: &'a StepInput,
        scratch: &'a mut Scratch,
    ) -> Self {
        Self { model, pool, n: step.tokens_n.len(), scratch, adapted: Adapted::new(step) }
    }

    /// From tokens to the stream after the last layer, which is not yet added to it.
    pub(crate) fn layers(&mut self, step: &StepInput, kv: &mut KvCache, keep: Keep) {
        let rows: Vec<PagedRow<'_>> = step
            .rows
            .iter()
            .map(|row| PagedRow { n_tokens: row.n_tokens, n_context: row.n_context, blocks: &row.blocks })
            .collect();
        self.reserve();
        self.embed(step);
        for (l, layer) in self.model.layers.iter().enumerate() {
            let slot = if keep == Keep::EveryLayer { l } else { 0 };
            self.attention(layer, (kv, slot), &rows);
            self.feed_forward(layer);
        }
    }

    /// The stream after the final norm, `[n, c]`.
    pub(crate) fn hidden(&mut self) -> &[f32] {
        self.add_and_norm(&self.model.norm);
        &self.scratch.normed_nc[..self.n * self.model.config.width]
    }

    fn reserve(&mut self) {
        let (n, s) = (self.n, &mut *self.scratch);
        let config = &self.model.config;
        let Config { width: c, ff_width: f, .. } = *config;
        let (q, kv) = (config.q_width(), config.kv_width());
        for (buf, width) in s.x_nc.iter_mut().map(|x| (x, c)).chain([
            (&mut s.delta_nc, c),
            (&mut s.normed_nc, c),
            (&mut s.rstd_n, 1),
            (&mut s.qkv_no, q + 2 * kv),
            (&mut s.heads_nhd, q),
            (&mut s.gate_up_n2f, 2 * f),
            (&mut s.act_nf, f),
        ]) {
            buf.reserve_scratch(n * width);
        }
    }

    /// The stream becomes the tokens' embeddings, and their positions' where those are learned.
    fn embed(&mut self, step: &StepInput) {
        let (model, n) = (self.model, self.n);
        let c = model.config.width;
        let x_nc = &mut self.scratch.x_nc[0][..n * c];
        for (x_c, &token) in x_nc.chunks_exact_mut(c).zip(&step.tokens_n) {
            model.embedding_vc.row_f32(token as usize, x_c);
        }
        if model.config.block().scaled_embedding {
            scale(self.pool, x_nc, (c as f32).sqrt());
        }
        if !model.positions_tc.is_empty() {
            for (x_c, &position) in x_nc.chunks_exact_mut(c).zip(&step.positions_n) {
                let position_c = &model.positions_tc[position as usize * c..][..c];
                x_c.iter_mut().zip(position_c).for_each(|(x, p)| *x += p);
            }
        }
        self.scratch.delta_nc[..n * c].fill(0.0);
    }

    /// Adds what the last sub-layer left to the stream; the normed sum is the next one's input.
    fn add_and_norm(&mut self, norm: &Norm) {
        let (pool, eps) = (self.pool, self.model.config.norm_eps);
        let cells = ..self.n * self.model.config.width;
        let s = &mut *self.scratch;
        let [x_nc, sum_nc] = &mut s.x_nc;
        let out = [&mut sum_nc[cells], &mut s.normed_nc[cells]];
        let input = Residual { x_nc: &x_nc[cells], delta_nc: &s.delta_nc[cells] };
        match norm.layer_norm(eps) {
            Some(norm) => residual_layernorm_forward(pool, out, input, norm),
            None => residual_rmsnorm_forward(pool, out, &mut s.rstd_n[..self.n], input, &norm.w_c, eps),
        }
        s.x_nc.swap(0, 1);
        if self.model.config.block().normed_stream {
            s.x_nc[0][cells].copy_from_slice(&s.normed_nc[cells]);
        }
    }

    /// Norms what a sub-layer leaves, in models that do.
    fn post_norm(&mut self, norm: Option<&Norm>) {
        let Some(norm) = norm else { return };
        let cells = ..self.n * self.model.config.width;
        let (eps, s) = (self.model.config.norm_eps, &mut *self.scratch);
        let (y_nc, x_nc) = (&mut s.normed_nc[cells], &s.delta_nc[cells]);
        norm.forward(self.pool, y_nc, x_nc, &mut s.rstd_n[..self.n], eps);
        std::mem::swap(&mut s.normed_nc, &mut s.delta_nc);
    }

    fn attention(&mut self, layer: &Layer, (kv, l): (&mut KvCache, usize), rows: &[PagedRow<'_>]) {
        self.add_and_norm(&layer.attention_norm);
        let config = &self.model.config;
        let (pool, s) = (self.pool, &mut *self.scratch);
        let width = config.q_width() + 2 * config.kv_width();
        let qkv_no = &mut s.qkv_no[..self.n * width];
        let heads_nhd = &mut s.heads_nhd[..self.n * config.q_width()];
        let cells = ..self.n * config.width;
        layer.qkv.forward((pool, &layer.output.stack), qkv_no, &s.normed_nc[cells], &mut s.packed);
        self.adapted.add(pool, (layer.l, Site::Qkv), qkv_no, &s.normed_nc[cells], &mut s.adapter);
        if let Some([q_d, k_d]) = &layer.head_norms_d {
            let q = HeadNorm { n_heads: config.n_heads, w_d: q_d };
            let k = HeadNorm { n_heads: config.n_kv_heads, w_d: k_d };
            head_norm_forward(pool, qkv_no, width, &[q, k], config.norm_eps);
        }
        kv.append(pool, l, qkv_no, rows, self.model.rope_of(layer));
        paged_attention(pool, heads_nhd, qkv_no, (kv, l, layer.attention), rows, &mut s.attention);
        layer.output.forward((pool, &layer.up.stack), &mut s.delta_nc[cells], heads_nhd, &mut s.packed);
        let delta_nc = &mut s.delta_nc[cells];
        self.adapted.add(pool, (layer.l, Site::Output), delta_nc, heads_nhd, &mut s.adapter);
        self.post_norm(layer.attention_post_norm.as_ref());
    }

    fn feed_forward(&mut self, layer: &Layer) {
        self.add_and_norm(&layer.ff_norm);
        let config = &self.model.config;
        let (f, activation) = (config.ff_width, config.block().activation);
        let (pool, s) = (self.pool, &mut *self.scratch);
        let cells = ..self.n * config.width;
        let act_nf = &mut s.act_nf[..self.n * f];
        if activation.is_gated() {
            let gate_up_n2f = &mut s.gate_up_n2f[..self.n * 2 * f];
            layer.up.forward((pool, &layer.down.stack), gate_up_n2f, &s.normed_nc[cells], &mut s.packed);
            self.adapted.add(pool, (layer.l, Site::Up), gate_up_n2f, &s.normed_nc[cells], &mut s.adapter);
            match activation {
                Activation::GeGlu => geglu_forward(pool, act_nf, gate_up_n2f, f),
                _ => swiglu_forward(pool, act_nf, gate_up_n2f, f),
            }
        } else {
            layer.up.forward((pool, &layer.down.stack), act_nf, &s.normed_nc[cells], &mut s.packed);
            self.adapted.add(pool, (layer.l, Site::Up), act_nf, &s.normed_nc[cells], &mut s.adapter);
            let form = if activation == Activation::GeluErf { Gelu::Erf } else { Gelu::Tanh };
            gelu_forward(pool, act_nf, form);
        }
        layer.down.forward((pool, self.model.after(layer)), &mut s.delta_nc[cells], act_nf, &mut s.packed);
        self.adapted.add(pool, (layer.l, Site::Down), &mut s.delta_nc[cells], act_nf, &mut s.adapter);
        self.post_norm(layer.ff_post_norm.as_ref());
    }

    /// Logits of the tokens that want them.
    fn logits(&mut self, step: &StepInput, logits_rv: &mut Vec<f32>) {
        let Config { width: c, vocab: v, norm_eps, .. } = self.model.config;
        let s = &mut *self.scratch;
        // The wanted rows of the stream, complete, move to the front.
        let (mut first, mut r) = (0, 0);
        for row in &step.rows {
            for i in first + row.n_tokens - row.n_logits..first + row.n_tokens {
                let delta_c = &s.delta_nc[i * c..(i + 1) * c];
                s.x_nc[0][i * c..(i + 1) * c].iter_mut().zip(delta_c).for_each(|(x, delta)| *x += delta);
                s.x_nc[0].copy_within(i * c..(i + 1) * c, r * c);
                r += 1;
            }
            first += row.n_tokens;
        }
        let cells = ..r * c;
        let (x_rc, normed_rc) = (&s.x_nc[0][cells], &mut s.normed_nc[cells]);
        self.model.norm.forward(self.pool, normed_rc, x_rc, &mut s.rstd_n[..r], norm_eps);
        logits_rv.resize(r * v, 0.0);
        let stacks = (&[self.model.head()][..], &self.model.layers[0].qkv.stack[..]);
        project_before(self.pool, logits_rv, stacks, &s.normed_nc[cells], &mut s.packed);
    }
}

impl Linear {
    /// `next` is what will be multiplied after it.
    fn forward(
        &self,
        (pool, next): (&Pool, &[Packed]),
        y_no: &mut [f32],
        x_ni: &[f32],
        scratch: &mut PackedScratch,
    ) {
        // On the stack: a step has hundreds of these.
        match &self.stack[..] {
            [a] => project_before(pool, y_no, (&[a], next), x_ni, scratch),
            [a, b] => project_before(pool, y_no, (&[a, b], next), x_ni, scratch),
            [a, b, c] => project_before(pool, y_no, (&[a, b, c], next), x_ni, scratch),
            other => unreachable!("a stack of {} matrices", other.len()),
        }
        if let Some(bias_o) = &self.bias_o {
            add_bias(pool, y_no, bias_o);
        }
    }
}

impl Norm {
    fn layer_norm(&self, eps: f32) -> Option<LayerNorm<'_>> {
        self.bias_c.as_ref().map(|b_c| LayerNorm { w_c: &self.w_c, b_c, eps })
    }

    fn forward(&self, pool: &Pool, y_nc: &mut [f32], x_nc: &[f32], rstd_n: &mut [f32], eps: f32) {
        match self.layer_norm(eps) {
            Some(norm) => layernorm_forward(pool, y_nc, x_nc, norm),
            None => rmsnorm_forward(pool, y_nc, rstd_n, x_nc, &self.w_c, eps),
        }
    }
}
