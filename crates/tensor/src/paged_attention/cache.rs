//! [`KvCache`]: keys and values of all layers, in blocks of 16 positions that belong to any sequence.

use crate::pool::Disjoint;
use crate::rope::{RopeDims, RopeTable, Turn, rotate};
use crate::{Buf, Elems, Pool};
use half::bf16;

/// Positions of one block.
pub const BLOCK_TOKENS: usize = 16;

/// Type of the cached numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
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
/// One buffer a layer, `[block][g]`, and there the keys of 16 positions as `[d][16]`, so that a SIMD lane is a position,
/// and their values as `[16][d]`, so that a lane is a dimension: no kernel sums across lanes. d is rounded up to 16.
pub struct KvCache {
    dims: KvDims,
    n_blocks: usize,
    layers: Layers,
}

enum Layers {
    Bf16(Vec<Buf<bf16>>),
    F32(Vec<Buf<f32>>),
}

/// Keys and values of one layer and key/value head.
#[derive(Clone, Copy)]
pub(super) struct HeadKv<'a> {
    pub(super) data: Elems<'a>,
    /// Of the head's keys in block 0.
    pub(super) first: usize,
    /// From one block to the next.
    pub(super) stride: usize,
    /// Elements from a block's keys to its values.
    pub(super) values: usize,
    pub(super) d: usize,
}

impl KvCache {
    /// A cache of `n_blocks` blocks.
    ///
    /// # Panics
    /// If the heads are no multiple of the key/value heads.
    pub fn new(dims: KvDims, kv_type: KvType, n_blocks: usize) -> Self {
        assert!(dims.n_kv_heads > 0 && dims.n_heads.is_multiple_of(dims.n_kv_heads), "{dims:?}");
        let len = n_blocks * block_elems(dims);
        let layers = match kv_type {
            KvType::Bf16 => Layers::Bf16((0..dims.n_layers).map(|_| Buf::zeroed(len)).collect()),
            KvType::F32 => Layers::F32((0..dims.n_layers).map(|_| Buf::zeroed(len)).collect()),
        };
        Self { dims, n_blocks, layers }
    }

    /// Bytes of one block in all layers.
    pub fn block_bytes(dims: KvDims, kv_type: KvType) -> usize {
        dims.n_layers * block_elems(dims) * if kv_type == KvType::Bf16 { 2 } else { 4 }
    }

    /// Shape.
    pub fn dims(&self) -> KvDims {
        self.dims
    }

    /// Blocks; ids are `0..n_blocks`.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Makes the first `n_positions` of block `to` those of block `from`, in every layer.
    ///
    /// # Panics
    /// If there is no such block, or a block has fewer positions.
    pub fn copy_block(&mut self, from: u32, to: u32, n_positions: usize) {
        let (from, to) = (from as usize, to as usize);
        assert!(from < self.n_blocks && to < self.n_blocks, "block {from} to {to} of {}", self.n_blocks);
        assert!(n_positions <= BLOCK_TOKENS, "{n_positions} positions of a block");
        // All of it: what lies behind those positions is written before it is read.
        let len = block_elems(self.dims);
        let source = from * len..(from + 1) * len;
        match &mut self.layers {
            Layers::Bf16(layers) => layers.iter_mut().for_each(|l| l.copy_within(source.clone(), to * len)),
            Layers::F32(layers) => layers.iter_mut().for_each(|l| l.copy_within(source.clone(), to * len)),
        }
    }

    /// Rotates the queries and keys of new tokens in place by their positions, and stores keys and values.
    /// `qkv_no` holds for each token h queries, g keys and g values of d numbers.
    ///
    /// # Panics
    /// If a row names a block the cache does not have, or needs more positions than its blocks or `table` have.
    pub fn append(
        &mut self,
        pool: &Pool,
        layer: usize,
        qkv_no: &mut [f32],
        rows: &[PagedRow<'_>],
        table: &RopeTable,
    ) {
        rows.iter().for_each(|row| self.check(row));
        let dims = self.dims;
        let width = (dims.n_heads + 2 * dims.n_kv_heads) * dims.head_width;
        let n: usize = rows.iter().map(|row| row.n_tokens).sum();
        assert_eq!(qkv_no.len(), n * width, "queries, keys and values of {n} tokens");
        let qkv = Disjoint::new(qkv_no);
        let store = match &mut self.layers {
            Layers::Bf16(layers) => Store::Bf16(Disjoint::new(&mut layers[layer])),
            Layers::F32(layers) => Store::F32(Disjoint::new(&mut layers[layer])),
        };
        // A task is a run of 16 new tokens of one row. Two tasks may write other positions of one block, never the same.
        let mut first_token = 0;
        for row in rows {
            let first = first_token;
            pool.run(row.n_tokens.div_ceil(BLOCK_TOKENS), &|task| {
                for i in crate::split::piece(task, BLOCK_TOKENS, row.n_tokens) {
                    // SAFETY: every token is in one task.
                    let qkv = unsafe { qkv.slice((first + i) * width..(first + i + 1) * width) };
                    let position = row.position(i);
                    let turned = RopeDims {
                        n_positions: table.n_positions(),
                        n_heads: dims.n_heads + dims.n_kv_heads,
                        stride: width,
                    };
                    rotate(pool.level(), qkv, position, turned, table, Turn::Forward);
                    let place = (row.blocks[position / BLOCK_TOKENS] as usize, position % BLOCK_TOKENS);
                    // SAFETY: `check` saw that the blocks are distinct, so a place is one token's.
                    unsafe { store.put(dims, place, &qkv[dims.n_heads * dims.head_width..]) };
                }
            });
            first_token += row.n_tokens;
        }
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
        // Tasks write these blocks at the same time.
        let written = &row.blocks[(row.n_context - row.n_tokens) / BLOCK_TOKENS..n_needed];
        let distinct = (1..written.len()).all(|i| !written[..i].contains(&written[i]));
        assert!(distinct, "a row names a block twice: {written:?}");
    }

    pub(super) fn head(&self, layer: usize, kv_head: usize) -> HeadKv<'_> {
        let half = half_elems(self.dims);
        HeadKv {
            data: match &self.layers {
                Layers::Bf16(layers) => Elems::Bf16(&layers[layer]),
                Layers::F32(layers) => Elems::F32(&layers[layer]),
            },
            first: kv_head * 2 * half,
            stride: block_elems(self.dims),
            values: half,
            d: self.dims.head_width,
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

/// A layer being written.
enum Store<'a> {
    Bf16(Disjoint<'a, bf16>),
    F32(Disjoint<'a, f32>),
}

impl Store<'_> {
    /// Stores the g keys and g values in `kv` at `place` (block, position in it).
    ///
    /// # Safety
    /// No other call for the same place is going on.
    unsafe fn put(&self, dims: KvDims, place: (usize, usize), kv: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Store::Bf16(out) => put(out, dims, place, kv, bf16::from_f32),
                Store::F32(out) => put(out, dims, place, kv, |x| x),
            }
        }
    }
}

/// # Safety
/// As [`Store::put`].
unsafe fn put<E: Copy>(
    out: &Disjoint<'_, E>,
    dims: KvDims,
    (block, slot): (usize, usize),
    kv: &[f32],
    round: impl Fn(f32) -> E,
) {
    let (d, half) = (dims.head_width, half_elems(dims));
    let (k_gd, v_gd) = kv.split_at(dims.n_kv_heads * d);
    for (g, (k_d, v_d)) in k_gd.chunks_exact(d).zip(v_gd.chunks_exact(d)).enumerate() {
        let at = block * block_elems(dims) + g * 2 * half;
        // SAFETY: single elements of this place (bounds are checked), and no reference to a neighbour's is made.
        unsafe {
            for (i, &k) in k_d.iter().enumerate() {
                let i = at + i * BLOCK_TOKENS + slot;
                out.slice(i..i + 1)[0] = round(k);
            }
            let values = out.slice(at + half + slot * padded(d)..at + half + slot * padded(d) + d);
            values.iter_mut().zip(v_d).for_each(|(out, &v)| *out = round(v));
        }
    }
}
