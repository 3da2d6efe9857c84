//! [`KvCache`]: keys and values of all layers, in blocks of 16 positions that belong to any sequence.

use super::element::Cached;
use super::staggered::Staggered;
use crate::Pool;
use crate::pool::Disjoint;
use crate::rope::{RopeDims, RopeTable, Turn, rotate};
use crate::split::piece;
use half::bf16;
use std::ops::Range;

/// Positions of one block.
pub const BLOCK_TOKENS: usize = 16;

/// Type of the cached numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// A quarter of the memory and a factor (4 B) for every vector; about 2 decimal digits.
    Int8,
    /// Half the memory; about 3 decimal digits.
    Bf16,
    /// Exact.
    F32,
}

/// Shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvDims {
    /// l
    pub n_layers: usize,
    /// h, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// g
    pub n_kv_heads: usize,
    /// d
    pub head_width: usize,
}

/// One sequence of a step: its last `n_tokens` positions are new.
#[derive(Clone, Copy, Debug)]
pub struct PagedRow<'a> {
    /// New tokens, at least 1.
    pub n_tokens: usize,
    /// Positions after the step.
    pub n_context: usize,
    /// Blocks in the order of positions.
    pub blocks: &'a [u32],
}

impl PagedRow<'_> {
    /// Position of new token `i`.
    pub(super) fn position(&self, i: usize) -> usize {
        self.n_context - self.n_tokens + i
    }
}

/// Keys and values in blocks of [`BLOCK_TOKENS`] positions.
///
/// One buffer a layer, `[block][g]`, and there the keys of 16 positions as a matrix `[d][16]`, so that a SIMD lane is a
/// position, and their values as `[16][d]`, so that a lane is a dimension: no kernel sums across lanes. d is rounded up
/// to 16; how a matrix lies in memory is its element type's affair ([`Cached`]).
pub struct KvCache {
    dims: KvDims,
    n_blocks: usize,
    layers: Layers,
    /// Of the append going on; kept for its memory.
    pieces: Vec<Piece>,
}

enum Layers {
    Int8(LayersOf<i8>),
    Bf16(LayersOf<bf16>),
    F32(LayersOf<f32>),
}

/// Runs `$body` with `$layers` the layers of whatever type.
macro_rules! with_layers {
    ($cache:expr, $layers:ident => $body:expr) => {
        match $cache {
            Layers::Int8($layers) => $body,
            Layers::Bf16($layers) => $body,
            Layers::F32($layers) => $body,
        }
    };
}

/// Keys and values of all layers.
struct LayersOf<E: Cached> {
    /// Of each layer `[block][g][keys, values]`.
    data: Staggered<E>,
    /// Of each layer `[block][g][keys, values][16]`, where the type has factors.
    scales: Staggered<f32>,
}

/// Factors of one block and head: a key's and a value's for each position.
const HEAD_SCALES: usize = 2 * BLOCK_TOKENS;

/// Keys and values of one layer and key/value head.
#[derive(Clone, Copy)]
pub(super) struct HeadKv<'a, E> {
    data: &'a [E],
    scales: &'a [f32],
    kv_head: usize,
    dims: KvDims,
}

/// A [`HeadKv`] of any type.
#[derive(Clone, Copy)]
pub(super) enum AnyHeadKv<'a> {
    Int8(HeadKv<'a, i8>),
    Bf16(HeadKv<'a, bf16>),
    F32(HeadKv<'a, f32>),
}

impl<'a, E: Cached> HeadKv<'a, E> {
    /// Keys `[d][16]` and values `[16][d]` of `block`.
    #[inline(always)]
    pub(super) fn block(&self, block: u32) -> (&'a [E], &'a [E]) {
        let half = half_elems(self.dims);
        let at = (block as usize * self.dims.n_kv_heads + self.kv_head) * 2 * half;
        self.data[at..at + 2 * half].split_at(half)
    }

    /// Factors of the keys and of the values of `block`.
    #[inline(always)]
    pub(super) fn block_scales(&self, block: u32) -> (&'a [f32], &'a [f32]) {
        let at = (block as usize * self.dims.n_kv_heads + self.kv_head) * HEAD_SCALES;
        self.scales[at..at + HEAD_SCALES].split_at(BLOCK_TOKENS)
    }
}

/// New tokens of a step that go into one block.
#[derive(Clone)]
struct Piece {
    block: u32,
    /// Slot of the first in the block, which is position `position`.
    slot: usize,
    position: usize,
    /// Tokens of the step.
    tokens: Range<usize>,
}

/// Pieces one task stores: up to 64 tokens of a prompt, or of 4 sequences.
const TASK_PIECES: usize = 4;

impl KvCache {
    /// A cache of `n_blocks` blocks.
    ///
    /// # Panics
    /// If the heads are no multiple of the key/value heads.
    pub fn new(dims: KvDims, kv_type: KvType, n_blocks: usize) -> Self {
        assert!(dims.n_kv_heads > 0 && dims.n_heads.is_multiple_of(dims.n_kv_heads), "{dims:?}");
        let layers = match kv_type {
            KvType::Int8 => Layers::Int8(LayersOf::new(dims, n_blocks)),
            KvType::Bf16 => Layers::Bf16(LayersOf::new(dims, n_blocks)),
            KvType::F32 => Layers::F32(LayersOf::new(dims, n_blocks)),
        };
        Self { dims, n_blocks, layers, pieces: Vec::new() }
    }

    /// Bytes of one block in all layers.
    pub fn block_bytes(dims: KvDims, kv_type: KvType) -> usize {
        let (elems, heads) = (dims.n_layers * block_elems(dims), dims.n_layers * dims.n_kv_heads);
        match kv_type {
            KvType::Int8 => elems + heads * HEAD_SCALES * size_of::<f32>(),
            KvType::Bf16 => 2 * elems,
            KvType::F32 => 4 * elems,
        }
    }

    /// Shape.
    pub fn dims(&self) -> KvDims {
        self.dims
    }

    /// Blocks; ids are `0..n_blocks`.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Rotates the queries and keys of new tokens in place by their positions (if the model has rotary positions), and
    /// stores keys and values. `qkv_no` holds for each token h queries, g keys and g values of d numbers.
    ///
    /// # Panics
    /// If a row names a block the cache does not have, or needs more positions than its blocks or `rope` have, or two
    /// rows write one block.
    pub fn append(
        &mut self,
        pool: &Pool,
        layer: usize,
        qkv_no: &mut [f32],
        rows: &[PagedRow<'_>],
        rope: Option<&RopeTable>,
    ) {
        rows.iter().for_each(|row| self.check(row));
        lay_out_pieces(&mut self.pieces, rows);
        let dims = self.dims;
        let width = (dims.n_heads + 2 * dims.n_kv_heads) * dims.head_width;
        let n: usize = rows.iter().map(|row| row.n_tokens).sum();
        assert_eq!(qkv_no.len(), n * width, "queries, keys and values of {n} tokens");
        let pieces = &self.pieces;
        let qkv = Disjoint::new(qkv_no);
        with_layers!(&mut self.layers, layers => {
            let store = layers.store(layer, dims);
            pool.run(pieces.len().div_ceil(TASK_PIECES), &|task| {
                for piece in &pieces[piece(task, TASK_PIECES, pieces.len())] {
                    let cells = piece.tokens.start * width..piece.tokens.end * width;
                    // SAFETY: every token is in one piece.
                    let qkv_no = unsafe { qkv.slice(cells) };
                    if let Some(table) = rope {
                        let turned = RopeDims {
                            n_positions: table.n_positions(),
                            n_heads: dims.n_heads + dims.n_kv_heads,
                            stride: width,
                        };
                        rotate(pool.level(), qkv_no, piece.position, turned, table, Turn::Forward);
                    }
                    // SAFETY: `lay_out_pieces` saw that no two pieces write one block.
                    unsafe { store.put(piece, qkv_no) };
                }
            });
        });
    }

    /// Makes the first `n_positions` of block `to` a copy of those of block `from`, in all layers: what a sequence does
    /// before it writes into a block that others read, too.
    ///
    /// # Panics
    /// If the cache does not have a block, or a block so many positions.
    pub fn copy_block(&mut self, from: u32, to: u32, n_positions: usize) {
        let known = (from.max(to) as usize) < self.n_blocks;
        assert!(known, "copying block {from} to {to} of {}", self.n_blocks);
        assert!(n_positions <= BLOCK_TOKENS, "copying {n_positions} positions of a block");
        let dims = self.dims;
        with_layers!(&mut self.layers, layers => {
            (0..dims.n_layers).for_each(|layer| layers.copy_block(layer, dims, [from, to], n_positions));
        });
    }

    /// # Panics
    /// If the row cannot be read from or written to this cache.
    pub(super) fn check(&self, row: &PagedRow<'_>) {
        let n_needed = row.n_context.div_ceil(BLOCK_TOKENS);
        assert!(
            row.n_tokens >= 1 && row.n_tokens <= row.n_context,
            "{} new of {} positions",
            row.n_tokens,
            row.n_context
        );
        assert!(row.blocks.len() >= n_needed, "{} blocks for {} positions", row.blocks.len(), row.n_context);
        let known = row.blocks[..n_needed].iter().all(|&block| (block as usize) < self.n_blocks);
        assert!(known, "a row names a block past the cache's {}", self.n_blocks);
    }

    pub(super) fn head(&self, layer: usize, kv_head: usize) -> AnyHeadKv<'_> {
        match &self.layers {
            Layers::Int8(layers) => AnyHeadKv::Int8(layers.head(layer, self.dims, kv_head)),
            Layers::Bf16(layers) => AnyHeadKv::Bf16(layers.head(layer, self.dims, kv_head)),
            Layers::F32(layers) => AnyHeadKv::F32(layers.head(layer, self.dims, kv_head)),
        }
    }
}

/// Width of a row of values: d rounded up to whole registers of every instruction set.
pub(super) fn padded(d: usize) -> usize {
    d.next_multiple_of(BLOCK_TOKENS)
}

/// Elements of the keys (or the values) of one block and head.
fn half_elems(dims: KvDims) -> usize {
    padded(dims.head_width) * BLOCK_TOKENS
}

/// Elements of one block of one layer.
fn block_elems(dims: KvDims) -> usize {
    dims.n_kv_heads * 2 * half_elems(dims)
}

/// Cuts the new tokens of `rows` where blocks begin.
///
/// # Panics
/// If a block would be written twice.
fn lay_out_pieces(pieces: &mut Vec<Piece>, rows: &[PagedRow<'_>]) {
    pieces.clear();
    let mut first_token = 0;
    for row in rows {
        let mut i = 0;
        while i < row.n_tokens {
            let position = row.position(i);
            let slot = position % BLOCK_TOKENS;
            let n = (BLOCK_TOKENS - slot).min(row.n_tokens - i);
            let tokens = first_token + i..first_token + i + n;
            pieces.push(Piece { block: row.blocks[position / BLOCK_TOKENS], slot, position, tokens });
            i += n;
        }
        first_token += row.n_tokens;
    }
    // Tasks write these blocks at the same time. What is next to each other in order is next to each other in work.
    pieces.sort_unstable_by_key(|piece| piece.block);
    if let Some(pair) = pieces.windows(2).find(|pair| pair[0].block == pair[1].block) {
        panic!("block {} is written twice", pair[0].block);
    }
}

impl<E: Cached> LayersOf<E> {
    fn new(dims: KvDims, n_blocks: usize) -> Self {
        let n_scales = if E::SCALED { n_blocks * dims.n_kv_heads * HEAD_SCALES } else { 0 };
        let data = Staggered::zeroed(n_blocks * block_elems(dims), dims.n_layers);
        Self { data, scales: Staggered::zeroed(n_scales, dims.n_layers) }
    }

    fn head(&self, layer: usize, dims: KvDims, kv_head: usize) -> HeadKv<'_, E> {
        HeadKv { data: self.data.layer(layer), scales: self.scales.layer(layer), kv_head, dims }
    }

    fn store(&mut self, layer: usize, dims: KvDims) -> Store<'_, E> {
        let (data, scales) = (self.data.layer_mut(layer), self.scales.layer_mut(layer));
        Store { data: Disjoint::new(data), scales: Disjoint::new(scales), dims }
    }

    fn copy_block(&mut self, layer: usize, dims: KvDims, [from, to]: [u32; 2], n_positions: usize) {
        let (data, scales) = (self.data.layer_mut(layer), self.scales.layer_mut(layer));
        let (half, width) = (half_elems(dims), padded(dims.head_width));
        for g in 0..dims.n_kv_heads {
            let [from, to] = [from, to].map(|block| block as usize * dims.n_kv_heads + g);
            for slot in 0..n_positions {
                for i in 0..dims.head_width {
                    let (k, v) = (E::at(i, slot, BLOCK_TOKENS), half + E::at(slot, i, width));
                    data[to * 2 * half + k] = data[from * 2 * half + k];
                    data[to * 2 * half + v] = data[from * 2 * half + v];
                }
                if E::SCALED {
                    for i in [slot, BLOCK_TOKENS + slot] {
                        scales[to * HEAD_SCALES + i] = scales[from * HEAD_SCALES + i];
                    }
                }
            }
        }
    }
}

/// A layer being written.
struct Store<'a, E: Cached> {
    data: Disjoint<'a, E>,
    scales: Disjoint<'a, f32>,
    dims: KvDims,
}

impl<E: Cached> Store<'_, E> {
    /// Stores the keys and values of `piece`, whose tokens are `qkv_no`.
    ///
    /// # Safety
    /// Nobody else reads or writes the piece's block now.
    unsafe fn put(&self, piece: &Piece, qkv_no: &[f32]) {
        let KvDims { n_heads, n_kv_heads, head_width: d, .. } = self.dims;
        let (half, width) = (half_elems(self.dims), padded(d));
        for g in 0..n_kv_heads {
            let head = piece.block as usize * n_kv_heads + g;
            // SAFETY: the caller's promise; other heads are other parts.
            let (keys, values) =
                unsafe { self.data.slice(head * 2 * half..(head + 1) * 2 * half) }.split_at_mut(half);
            for (i, token) in qkv_no.chunks_exact((n_heads + 2 * n_kv_heads) * d).enumerate() {
                let slot = piece.slot + i;
                let (k_d, v_d) = (&token[(n_heads + g) * d..], &token[(n_heads + n_kv_heads + g) * d..]);
                let k_scale = put(keys, &k_d[..d], |i| E::at(i, slot, BLOCK_TOKENS));
                let v_scale = put(values, &v_d[..d], |i| E::at(slot, i, width));
                if E::SCALED {
                    // SAFETY: as above.
                    let scales = unsafe { self.scales.slice(head * HEAD_SCALES..(head + 1) * HEAD_SCALES) };
                    (scales[slot], scales[BLOCK_TOKENS + slot]) = (k_scale, v_scale);
                }
            }
        }
    }
}

/// Stores element i of `x_d` at `place(i)`. Returns the vector's factor.
#[inline(always)]
fn put<E: Cached>(out: &mut [E], x_d: &[f32], place: impl Fn(usize) -> usize) -> f32 {
    let scale = E::scale(x_d);
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (i, &x) in x_d.iter().enumerate() {
        out[place(i)] = E::store(x, inverse);
    }
    scale
}
