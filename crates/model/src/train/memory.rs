//! Sizes, and the memory that passes work in.

use std::ops::{Index, IndexMut};

use tensor::attention::AttentionDims;
use tensor::rope::RopeDims;
use tensor::{Buf, Precision};

use super::head::Counted;
use crate::{Block, Config};

/// Logits in memory at a time where they are few: 8 MiB, a quarter of a common last-level cache.
const LOGITS_CACHED: usize = 2 << 20;
/// Rows a chunk should have all the same: every chunk reads the head's matrix twice, and reads and writes its gradient.
/// 4 chunks · 4 · 50,257 · 768 · 4 B = 2.5 GB for 2,048 tokens of GPT-2, a tenth of a second.
const CHUNK_ROWS: usize = 512;
/// Logits in memory at a time at most: 128 MiB.
const LOGITS_MAX: usize = 32 << 20;

/// Sizes used everywhere, derived once.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// b·t
    pub(super) n: usize,
    pub(super) t: usize,
    pub(super) c: usize,
    pub(super) f: usize,
    pub(super) v: usize,
    pub(super) block: Block,
    pub(super) attention: AttentionDims,
    /// Queries and keys.
    pub(super) rope: RopeDims,
    pub(super) norm_eps: f32,
    pub(super) precision: Precision,
}

/// One reading of the residual stream.
pub(super) struct Stream {
    pub(super) x_nc: Buf<f32>,
    /// Of RMSNorm alone: LayerNorm computes its own again.
    pub(super) rstd_n: Buf<f32>,
}

/// What the backward pass of a layer needs besides its two streams.
pub(super) struct LayerMemory {
    /// Queries and keys as attention sees them, and values.
    pub(super) qkv: Buf<f32>,
    /// Queries and keys before the norms of heads, `[n, (h + g)·d]`; empty without.
    pub(super) heads_nk: Buf<f32>,
    pub(super) out_nhd: Buf<f32>,
    pub(super) lse_bht: Buf<f32>,
    /// Gate and up side by side, or up alone.
    pub(super) up_no: Buf<f32>,
    /// What attention and feed-forward leave, in models that norm it.
    pub(super) post: Option<[Stream; 2]>,
}

/// The memory of every layer; where layers are computed again, one that all of them use in turn.
pub(super) struct Layers(Vec<LayerMemory>);

/// The residual stream before every norm: two per layer, and the last. Where layers are computed again, the second of
/// every layer is the same.
pub(super) struct Streams {
    memory: Vec<Stream>,
    recompute: bool,
}

/// Memory whose contents live within one sub-layer.
pub(super) struct Scratch {
    pub(super) normed_nc: Buf<f32>,
    /// What a sub-layer adds to the stream; in the backward pass the gradient of `normed_nc`.
    pub(super) delta_nc: Buf<f32>,
    pub(super) act_nf: Buf<f32>,
    pub(super) dqkv: Buf<f32>,
    pub(super) dout_nhd: Buf<f32>,
    /// Gradient of the stream.
    pub(super) dx_nc: Buf<f32>,
    /// Gradient of what comes before a norm after a sub-layer; empty without.
    pub(super) dpost_nc: Buf<f32>,
    pub(super) logits: Buf<f32>,
    pub(super) losses_n: Buf<f32>,
    pub(super) counted: Counted,
    /// Positions in the documents, where positions are learned.
    pub(super) positions_bt: Vec<u32>,
    /// Partial sums of the gradients of vectors.
    pub(super) sums: Buf<f32>,
    /// Where gradients go that nobody wants.
    pub(super) sink: Buf<f32>,
}

impl Shape {
    pub(super) fn new(config: &Config, [b, t]: [usize; 2], precision: Precision) -> Self {
        let attention = AttentionDims {
            n_rows: b,
            n_positions: t,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_width: config.head_width,
            scale: config.score_scale(),
        };
        let n_heads = config.n_heads + config.n_kv_heads;
        Self {
            n: b * t,
            t,
            c: config.width,
            f: config.ff_width,
            v: config.vocab,
            block: config.block(),
            attention,
            rope: RopeDims { n_positions: t, n_heads, stride: attention.qkv_width() },
            norm_eps: config.norm_eps,
            precision,
        }
    }

    /// A stage of a pipeline without the head has no logits.
    pub(super) fn with_head(self, has_head: bool) -> Self {
        Self { v: if has_head { self.v } else { 0 }, ..self }
    }

    /// Tokens whose logits exist at the same time.
    pub(super) fn chunk(&self) -> usize {
        let v = self.v.max(1);
        CHUNK_ROWS.min(LOGITS_MAX / v).max(16).max(LOGITS_CACHED / v).min(self.n)
    }
}

impl Stream {
    pub(super) fn new(shape: Shape) -> Self {
        let n_rstd = if shape.block.layer_norm { 0 } else { shape.n };
        Self { x_nc: Buf::zeroed(shape.n * shape.c), rstd_n: Buf::zeroed(n_rstd) }
    }
}

impl Layers {
    pub(super) fn new(shape: Shape, n_layers: usize, recompute: bool) -> Self {
        let n = if recompute { 1 } else { n_layers };
        Self((0..n).map(|_| LayerMemory::new(shape)).collect())
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &LayerMemory> {
        self.0.iter()
    }

    fn place(&self, l: usize) -> usize {
        l.min(self.0.len() - 1)
    }
}

impl Index<usize> for Layers {
    type Output = LayerMemory;

    fn index(&self, l: usize) -> &LayerMemory {
        &self.0[self.place(l)]
    }
}

impl IndexMut<usize> for Layers {
    fn index_mut(&mut self, l: usize) -> &mut LayerMemory {
        let place = self.place(l);
        &mut self.0[place]
    }
}

impl Streams {
    pub(super) fn new(shape: Shape, n_layers: usize, recompute: bool) -> Self {
        let n = if recompute { n_layers + 2 } else { 2 * n_layers + 1 };
        Self { memory: (0..n).map(|_| Stream::new(shape)).collect(), recompute }
    }

    /// A reading and the one after it.
    pub(super) fn before_and_after(&mut self, at: usize) -> (&Stream, &mut Stream) {
        let places = [self.place(at), self.place(at + 1)];
        let [before, after] = self.memory.get_disjoint_mut(places).expect("two readings");
        (before, after)
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Stream> {
        self.memory.iter()
    }

    fn place(&self, at: usize) -> usize {
        match (self.recompute, at % 2) {
            (false, _) => at,
            (true, 0) => at / 2,
            (true, _) => self.memory.len() - 1,
        }
    }
}

impl Index<usize> for Streams {
    type Output = Stream;

    fn index(&self, at: usize) -> &Stream {
        &self.memory[self.place(at)]
    }
}

impl IndexMut<usize> for Streams {
    fn index_mut(&mut self, at: usize) -> &mut Stream {
        let place = self.place(at);
        &mut self.memory[place]
    }
}

impl LayerMemory {
    pub(super) fn new(shape: Shape) -> Self {
        let (n, dims, block) = (shape.n, shape.attention, shape.block);
        let when = |there: bool, len: usize| if there { len } else { 0 };
        let up_width = shape.f * if block.activation.is_gated() { 2 } else { 1 };
        Self {
            qkv: Buf::zeroed(n * dims.qkv_width()),
            heads_nk: Buf::zeroed(when(block.head_norms, n * shape.rope.n_heads * dims.head_width)),
            out_nhd: Buf::zeroed(n * dims.out_width()),
            lse_bht: Buf::zeroed(n * dims.n_heads),
            up_no: Buf::zeroed(n * up_width),
            post: block.post_norms.then(|| [Stream::new(shape), Stream::new(shape)]),
        }
    }
}

impl Scratch {
    pub(super) fn new(shape: Shape) -> Self {
        let Shape { n, c, f, v, attention, block, .. } = shape;
        Self {
            normed_nc: Buf::zeroed(n * c),
            delta_nc: Buf::zeroed(n * c),
            act_nf: Buf::zeroed(n * f),
            dqkv: Buf::zeroed(n * attention.qkv_width()),
            dout_nhd: Buf::zeroed(n * attention.out_width()),
            dx_nc: Buf::zeroed(n * c),
            dpost_nc: Buf::zeroed(if block.post_norms { n * c } else { 0 }),
            logits: Buf::zeroed(shape.chunk() * v),
            losses_n: Buf::zeroed(n),
            counted: Counted::default(),
            positions_bt: vec![0; if block.rotary { 0 } else { n }],
            sums: Buf::default(),
            sink: Buf::zeroed(2 * c.max(attention.head_width)),
        }
    }
}
