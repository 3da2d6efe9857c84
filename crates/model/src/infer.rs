//! [`Llama`]: the cached forward pass of new tokens of any number of sequences.
//!
//! A token's logits depend on its sequence alone, to the bit: not on the other rows of the step, on how its prompt was
//! cut into steps, or on the number of threads. Every op keeps that promise; the test
//! `logits_do_not_depend_on_the_step` holds it for the whole.

use tensor::packed::{Packed, PackedScratch, project};
use tensor::paged_attention::{AttentionScratch, AttentionSpec, KvDims, PagedRow, paged_attention};
use tensor::rmsnorm::{Residual, residual_rmsnorm_forward, rmsnorm_forward};
use tensor::rope::RopeTable;
use tensor::swiglu::swiglu_forward;
use tensor::{Buf, Pool};

pub use tensor::paged_attention::{BLOCK_TOKENS, KvCache, KvType};

use crate::{Config, Error, Result, StepInput, WeightTensor, Weights};

/// Positions a model is served with at most, whatever its configuration says: the table of rotations is made for all of
/// them. 2^17 positions · 32 frequencies · 2 · 4 B = 32 MiB.
const CONTEXT_MAX: usize = 1 << 17;

/// A model packed for inference.
pub struct Llama {
    config: Config,
    embedding_vc: Packed,
    layers: Vec<Layer>,
    norm_c: Vec<f32>,
    /// `None` when the embedding serves as the output projection.
    head_vc: Option<Packed>,
    rope: RopeTable,
}

struct Layer {
    attention_norm_c: Vec<f32>,
    /// q, k, v: one stack.
    qkv: [Packed; 3],
    output: Packed,
    ff_norm_c: Vec<f32>,
    /// gate, up: one stack.
    gate_up: [Packed; 2],
    down: Packed,
}

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
}

impl Llama {
    /// Packs `weights`, tensor by tensor, so that little more than one copy is in memory at a time.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape than the configuration says, or is left over.
    pub fn new(mut weights: Weights, pool: &Pool) -> Result<Self> {
        let config = weights.config.clone();
        config.check()?;
        let (c, v) = (config.width, config.vocab);
        let pack = |weights: &mut Weights, name: &str, dims: [usize; 2]| -> Result<Packed> {
            let WeightTensor { kind, bytes, .. } = weights.take(name, &dims)?;
            Ok(Packed::from_bytes(pool, kind, &bytes, dims))
        };
        let vector = |weights: &mut Weights, name: &str| Ok::<_, Error>(weights.take(name, &[c])?.to_f32());
        let embedding_vc = pack(&mut weights, "model.embed_tokens.weight", [v, c])?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for l in 0..config.n_layers {
            let (q, kv, f) = (config.q_width(), config.kv_width(), config.ff_width);
            let mut matrix =
                |part: &str, dims| pack(&mut weights, &format!("model.layers.{l}.{part}.weight"), dims);
            let qkv = [
                matrix("self_attn.q_proj", [q, c])?,
                matrix("self_attn.k_proj", [kv, c])?,
                matrix("self_attn.v_proj", [kv, c])?,
            ];
            let output = matrix("self_attn.o_proj", [c, q])?;
            let gate_up = [matrix("mlp.gate_proj", [f, c])?, matrix("mlp.up_proj", [f, c])?];
            let down = matrix("mlp.down_proj", [c, f])?;
            let attention_norm_c = vector(&mut weights, &format!("model.layers.{l}.input_layernorm.weight"))?;
            let ff_norm_c =
                vector(&mut weights, &format!("model.layers.{l}.post_attention_layernorm.weight"))?;
            layers.push(Layer { attention_norm_c, qkv, output, ff_norm_c, gate_up, down });
        }
        let norm_c = vector(&mut weights, "model.norm.weight")?;
        let head_vc = match config.tied_embeddings {
            // Some files name the tied matrix twice; the second is the same.
            true => weights.tensors.remove("lm_head.weight").and(None),
            false => Some(pack(&mut weights, "lm_head.weight", [v, c])?),
        };
        if let Some(name) = weights.tensors.into_keys().next() {
            return Err(Error::Tensor { name, problem: "is not part of this architecture".into() });
        }
        let rope = RopeTable::new(config.context_max.min(CONTEXT_MAX), config.head_width, config.rope_theta);
        Ok(Self { config, embedding_vc, layers, norm_c, head_vc, rope })
    }

    /// Shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Positions a sequence may have.
    pub fn context_max(&self) -> usize {
        self.config.context_max.min(CONTEXT_MAX)
    }

    /// Bytes of all packed matrices in memory.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            layer.qkv.iter().chain(&layer.gate_up).chain([&layer.output, &layer.down]).map(Packed::bytes)
        });
        layers.sum::<usize>() + self.embedding_vc.bytes() + self.head_vc.as_ref().map_or(0, Packed::bytes)
    }

    /// Bytes of weights that computing one token reads: all but an embedding that is only looked up.
    pub fn bytes_per_token(&self) -> usize {
        self.weight_bytes() - self.head_vc.as_ref().map_or(0, |_| self.embedding_vc.bytes())
    }

    /// A cache of `n_blocks` blocks of [`BLOCK_TOKENS`] positions for this model.
    pub fn new_kv(&self, n_blocks: usize, kv_type: KvType) -> KvCache {
        KvCache::new(self.kv_dims(), kv_type, n_blocks)
    }

    /// Bytes of one block of the cache.
    pub fn kv_block_bytes(&self, kv_type: KvType) -> usize {
        KvCache::block_bytes(self.kv_dims(), kv_type)
    }

    fn kv_dims(&self) -> KvDims {
        let Config { n_layers, n_heads, n_kv_heads, head_width, .. } = self.config;
        KvDims { n_layers, n_heads, n_kv_heads, head_width }
    }

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
        let rows: Vec<PagedRow<'_>> = step
            .rows
            .iter()
            .map(|row| PagedRow { n_tokens: row.n_tokens, n_context: row.n_context, blocks: &row.blocks })
            .collect();
        let n = step.tokens_n.len();
        let mut pass = Pass { llama: self, pool, n, scratch };
        pass.reserve();
        pass.embed(&step.tokens_n);
        for (l, layer) in self.layers.iter().enumerate() {
            pass.attention(layer, l, kv, &rows);
            pass.feed_forward(layer);
        }
        pass.logits(step, logits_rv);
        Ok(())
    }

    fn check(&self, step: &StepInput, kv: &KvCache) -> Result<()> {
        let fail = |problem: String| Err(Error::Step(problem));
        let n: usize = step.rows.iter().map(|row| row.n_tokens).sum();
        if n == 0 || n != step.tokens_n.len() || n != step.positions_n.len() {
            return fail(format!(
                "{} tokens and {} positions for rows of {n} in all",
                step.tokens_n.len(),
                step.positions_n.len()
            ));
        }
        if kv.dims() != self.kv_dims() {
            return fail(format!("the cache was made for another model: {:?}", kv.dims()));
        }
        if let Some(token) = step.tokens_n.iter().find(|&&token| token as usize >= self.config.vocab) {
            return fail(format!("token {token} is not below {}", self.config.vocab));
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
struct Pass<'a> {
    llama: &'a Llama,
    pool: &'a Pool,
    n: usize,
    scratch: &'a mut Scratch,
}

impl Pass<'_> {
    fn reserve(&mut self) {
        let (n, s) = (self.n, &mut *self.scratch);
        let Config { width: c, ff_width: f, .. } = self.llama.config;
        let (q, kv) = (self.llama.config.q_width(), self.llama.config.kv_width());
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

    /// The stream becomes the tokens' embeddings.
    fn embed(&mut self, tokens_n: &[u32]) {
        let c = self.llama.config.width;
        let [x_nc, _] = &mut self.scratch.x_nc;
        for (x_c, &token) in x_nc.chunks_exact_mut(c).zip(tokens_n) {
            self.llama.embedding_vc.row_f32(token as usize, x_c);
        }
        self.scratch.delta_nc[..tokens_n.len() * c].fill(0.0);
    }

    /// Adds what the last sub-layer left to the stream; the normed sum is the next one's input.
    fn add_and_norm(&mut self, norm_c: &[f32]) {
        let cells = ..self.n * self.llama.config.width;
        let s = &mut *self.scratch;
        let [x_nc, sum_nc] = &mut s.x_nc;
        residual_rmsnorm_forward(
            self.pool,
            [&mut sum_nc[cells], &mut s.normed_nc[cells]],
            &mut s.rstd_n[..self.n],
            Residual { x_nc: &x_nc[cells], delta_nc: &s.delta_nc[cells] },
            norm_c,
            self.llama.config.norm_eps,
        );
        s.x_nc.swap(0, 1);
    }

    fn attention(&mut self, layer: &Layer, l: usize, kv: &mut KvCache, rows: &[PagedRow<'_>]) {
        self.add_and_norm(&layer.attention_norm_c);
        let config = &self.llama.config;
        let (pool, s) = (self.pool, &mut *self.scratch);
        let qkv_no = &mut s.qkv_no[..self.n * (config.q_width() + 2 * config.kv_width())];
        let heads_nhd = &mut s.heads_nhd[..self.n * config.q_width()];
        let cells = ..self.n * config.width;
        project(pool, qkv_no, &layer.qkv.each_ref(), &s.normed_nc[cells], &mut s.packed);
        kv.append(pool, l, qkv_no, rows, Some(&self.llama.rope));
        let spec = AttentionSpec::plain(config.head_width);
        paged_attention(pool, heads_nhd, qkv_no, (kv, l, spec), rows, &mut s.attention);
        project(pool, &mut s.delta_nc[cells], &[&layer.output], heads_nhd, &mut s.packed);
    }

    fn feed_forward(&mut self, layer: &Layer) {
        self.add_and_norm(&layer.ff_norm_c);
        let f = self.llama.config.ff_width;
        let (pool, s) = (self.pool, &mut *self.scratch);
        let cells = ..self.n * self.llama.config.width;
        let (gate_up_n2f, act_nf) = (&mut s.gate_up_n2f[..self.n * 2 * f], &mut s.act_nf[..self.n * f]);
        project(pool, gate_up_n2f, &layer.gate_up.each_ref(), &s.normed_nc[cells], &mut s.packed);
        swiglu_forward(pool, act_nf, gate_up_n2f, f);
        project(pool, &mut s.delta_nc[cells], &[&layer.down], act_nf, &mut s.packed);
    }

    /// Logits of the tokens that want them.
    fn logits(&mut self, step: &StepInput, logits_rv: &mut Vec<f32>) {
        let Config { width: c, vocab: v, norm_eps, .. } = self.llama.config;
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
        rmsnorm_forward(self.pool, normed_rc, &mut s.rstd_n[..r], x_rc, &self.llama.norm_c, norm_eps);
        logits_rv.resize(r * v, 0.0);
        let head_vc = self.llama.head_vc.as_ref().unwrap_or(&self.llama.embedding_vc);
        project(self.pool, logits_rv, &[head_vc], &s.normed_nc[cells], &mut s.packed);
    }
}
