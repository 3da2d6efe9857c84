//! From rows, as files store them, to tiles of 16 interleaved rows, as the kernels read them.
//!
//! A SIMD lane is an output row, so no kernel ever sums across lanes, and a tile is one contiguous stream. Floats:
//!
//! | kind | for each | 16 rows of | bytes |
//! |---|---|---|---|
//! | F32, F16 | input | one weight | 64, 32 |
//! | BF16 | two inputs (a missing one is 0) | u32: the first weight in the low half | 64 |
//!
//! Quantized kinds have all their integers first, then all their scales, each part a whole number of cache lines. For
//! each group of 32 inputs:
//!
//! | bits of q | words of 16 rows × u32 | scales |
//! |---|---|---|
//! | 8 | 8: word w has inputs 4w .. 4w + 4, a byte each | 16 × d |
//! | 4 | 4: word w has inputs 8w .. 8w + 4 in the low nibbles of its bytes, the next four in the high ones | 16 × d, 16 × m |
//! | 5 | the 4-bit words; 1 word: bit w of byte i is the fifth bit of input 4w + i | the same |
//! | 6 | the 4-bit words; 2 words: bits 2w, 2w + 1 of byte i of word p are the upper bits of input 16p + 4w + i | see below |
//!
//! Kinds with 256-weight blocks have 16 × d and 16 × e for every eight groups, then for each group 16 × (s, t) as two
//! bytes. Q6_K has no e, and two s plus 128 instead of s and t.

use super::blocks::Group;
use super::kind::{BLOCK, SUPER, WeightKind};
use half::f16;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Bytes of 16 rows of u32: one AVX-512 register, one cache line.
pub(super) const WORD_BYTES: usize = 4 * TILE;

/// Bytes of 16 rows of f16, or of two bytes.
pub(super) const HALF_BYTES: usize = 2 * TILE;

/// How the groups of a quantized kind look in a tile.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Of an integer.
    pub(super) bits: usize,
    /// Whether b is stored.
    pub(super) min: bool,
    /// Whether scales are stored in two steps, for blocks of 256.
    pub(super) k: bool,
}

impl Form {
    /// `None` for floats.
    pub(super) fn of(kind: WeightKind) -> Option<Self> {
        let form = |bits, min, k| Some(Self { bits, min, k });
        match kind {
            WeightKind::Q8_0 => form(8, false, false),
            WeightKind::Q4_0 => form(4, false, false),
            WeightKind::Q4_1 => form(4, true, false),
            WeightKind::Q5_0 => form(5, false, false),
            WeightKind::Q5_1 => form(5, true, false),
            WeightKind::Q4_K => form(4, true, true),
            WeightKind::Q5_K => form(5, true, true),
            WeightKind::Q6_K => form(6, false, true),
            WeightKind::F32 | WeightKind::Bf16 | WeightKind::F16 => None,
        }
    }

    /// The integer that means 0, if b is not stored.
    pub(super) const fn zero(self) -> i32 {
        if self.min { 0 } else { 1 << (self.bits - 1) }
    }

    /// Parts of a group that have scales of their own.
    pub(super) const fn parts(self) -> usize {
        if self.bits == 6 { 2 } else { 1 }
    }

    /// Words that hold the low four bits, or all eight.
    const fn low_words(self) -> usize {
        if self.bits == 8 { 8 } else { 4 }
    }

    /// Bytes of a group's integers.
    pub(super) const fn group_bytes(self) -> usize {
        let upper_words = if self.bits == 8 { 0 } else { self.bits - 4 };
        (self.low_words() + upper_words) * WORD_BYTES
    }

    /// Where the scales of group `g` lie among the scales: (d and m or e, s and t).
    #[inline(always)]
    pub(super) const fn scales_at(self, g: usize) -> (usize, usize) {
        let units = HALF_BYTES * (1 + self.min as usize);
        if self.k {
            const GROUPS: usize = SUPER / BLOCK;
            let at = g / GROUPS * (units + GROUPS * HALF_BYTES);
            (at, at + units + g % GROUPS * HALF_BYTES)
        } else {
            (g * units, g * units)
        }
    }

    /// Bytes of a tile's integers.
    pub(super) const fn ints_bytes(self, n_in: usize) -> usize {
        n_in / BLOCK * self.group_bytes()
    }

    const fn scales_bytes(self, n_in: usize) -> usize {
        self.scales_at(n_in / BLOCK).0.next_multiple_of(WORD_BYTES)
    }
}

/// Bytes of one tile of `n_in` inputs.
pub(super) fn tile_bytes(kind: WeightKind, n_in: usize) -> usize {
    match (Form::of(kind), kind) {
        (Some(form), _) => form.ints_bytes(n_in) + form.scales_bytes(n_in),
        (None, WeightKind::Bf16) => n_in.div_ceil(2) * WORD_BYTES,
        (None, _) => n_in * TILE * kind.block_bytes(),
    }
}

/// Interleaves up to 16 `rows` (missing ones stay zeros) of `n_in` weights into `tile`.
pub(super) fn interleave(kind: WeightKind, rows: &[u8], n_in: usize, tile: &mut [u8]) {
    let row_bytes = kind.bytes(n_in).expect("whole blocks");
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        match (Form::of(kind), kind) {
            (Some(form), _) => {
                let (ints, scales) = tile.split_at_mut(form.ints_bytes(n_in));
                let groups_per_block = kind.block_elems() / BLOCK;
                for g in 0..n_in / BLOCK {
                    let block = &row[g / groups_per_block * kind.block_bytes()..][..kind.block_bytes()];
                    let group = Group::of(kind, block, g % groups_per_block);
                    put_ints(form, &group.q, r, &mut ints[g * form.group_bytes()..][..form.group_bytes()]);
                    put_scales(form, &group, r, g, scales);
                }
            }
            (None, WeightKind::Bf16) => {
                for (pair, out) in row.chunks(4).zip(tile.chunks_exact_mut(WORD_BYTES)) {
                    out[4 * r..][..pair.len()].copy_from_slice(pair);
                }
            }
            (None, _) => {
                let bytes = kind.block_bytes();
                for (weight, out) in row.chunks_exact(bytes).zip(tile.chunks_exact_mut(TILE * bytes)) {
                    out[r * bytes..][..bytes].copy_from_slice(weight);
                }
            }
        }
    }
}

/// Where row `r` of word `w` lies.
fn word_at(w: usize, r: usize) -> std::ops::Range<usize> {
    w * WORD_BYTES + 4 * r..w * WORD_BYTES + 4 * r + 4
}

/// Low nibbles, fifth bits and fifth and sixth bits of four bytes.
const NIBBLES: u32 = 0x0f0f_0f0f;
const ONES: u32 = 0x0101_0101;
const TWOS: u32 = 0x0303_0303;

fn put_ints(form: Form, q: &[u8; BLOCK], r: usize, out: &mut [u8]) {
    // Step w: inputs 4w .. 4w + 4, a byte each.
    let steps: [u32; 8] =
        std::array::from_fn(|w| u32::from_le_bytes([q[4 * w], q[4 * w + 1], q[4 * w + 2], q[4 * w + 3]]));
    let mut put = |w: usize, word: u32| out[word_at(w, r)].copy_from_slice(&word.to_le_bytes());
    if form.bits == 8 {
        return steps.into_iter().enumerate().for_each(|(w, word)| put(w, word));
    }
    for w in 0..4 {
        put(w, steps[2 * w] & NIBBLES | (steps[2 * w + 1] & NIBBLES) << 4);
    }
    if form.bits == 5 {
        put(4, (0..8).fold(0, |word, w| word | (steps[w] >> 4 & ONES) << w));
    }
    if form.bits == 6 {
        for p in 0..2 {
            put(4 + p, (0..4).fold(0, |word, w| word | (steps[4 * p + w] >> 4 & TWOS) << (2 * w)));
        }
    }
}

fn ints(form: Form, group: &[u8], r: usize) -> [u8; BLOCK] {
    let word = |w: usize| u32::from_le_bytes(group[word_at(w, r)].try_into().expect("four bytes"));
    let mut q = [0; BLOCK];
    for (w, q) in q.chunks_exact_mut(4).enumerate() {
        let low = || word(w / 2) >> (4 * (w % 2)) & NIBBLES;
        let step = match form.bits {
            8 => word(w),
            5 => low() | (word(4) >> w & ONES) << 4,
            6 => low() | (word(4 + w / 4) >> (2 * (w % 4)) & TWOS) << 4,
            _ => low(),
        };
        q.copy_from_slice(&step.to_le_bytes());
    }
    q
}

fn put_scales(form: Form, group: &Group, r: usize, g: usize, scales: &mut [u8]) {
    let (units, steps) = form.scales_at(g);
    let mut put = |at: usize, bytes: [u8; 2]| scales[at + 2 * r..][..2].copy_from_slice(&bytes);
    put(units, group.d.to_le_bytes());
    if form.min {
        put(units + HALF_BYTES, group.m.to_le_bytes());
    }
    if form.k && form.min {
        put(steps, [group.s[0] as u8, group.t]);
    } else if form.k {
        put(steps, group.s.map(|s| s as u8 ^ 0x80));
    }
}

/// Row `r` of group `g`, as it was before it was interleaved.
fn group_of(kind: WeightKind, form: Form, tile: &[u8], [n_in, r, g]: [usize; 3]) -> Group {
    let (ints_part, scales) = tile.split_at(form.ints_bytes(n_in));
    let (units, steps) = form.scales_at(g);
    let pair = |at: usize| [scales[at + 2 * r], scales[at + 2 * r + 1]];
    let (s, t) = match (form.k, form.min) {
        (false, _) => ([1; 2], 0),
        (true, true) => ([pair(steps)[0] as i8; 2], pair(steps)[1]),
        (true, false) => (pair(steps).map(|s| (s ^ 0x80) as i8), 0),
    };
    Group {
        kind,
        q: ints(form, &ints_part[g * form.group_bytes()..][..form.group_bytes()], r),
        d: f16::from_le_bytes(pair(units)),
        m: if form.min { f16::from_le_bytes(pair(units + HALF_BYTES)) } else { f16::ZERO },
        s,
        t,
    }
}

/// Widens row `r` of a tile to f32, exactly as [`WeightKind::dequantize`] does.
pub(super) fn row_f32(kind: WeightKind, tile: &[u8], r: usize, row: &mut [f32]) {
    match (Form::of(kind), kind) {
        (Some(form), _) => {
            let n_in = row.len();
            for (g, out) in row.chunks_exact_mut(BLOCK).enumerate() {
                group_of(kind, form, tile, [n_in, r, g]).widen(out);
            }
        }
        (None, WeightKind::Bf16) => {
            for (word, out) in tile.chunks_exact(WORD_BYTES).zip(row.chunks_mut(2)) {
                kind.dequantize(&word[4 * r..][..2 * out.len()], out);
            }
        }
        (None, _) => {
            let bytes = kind.block_bytes();
            for (weights, out) in tile.chunks_exact(TILE * bytes).zip(row.chunks_exact_mut(1)) {
                kind.dequantize(&weights[r * bytes..][..bytes], out);
            }
        }
    }
}
