//! From rows of blocks, as files store them, to tiles of 16 interleaved rows, as the kernels read them.
//!
//! A SIMD lane is an output row, so no kernel ever sums across lanes, and a tile is one contiguous stream:
//!
//! | kind | a tile, for each block of 32 inputs (each input for floats) | bytes |
//! |---|---|---|
//! | Q4_0 | 4 words × 16 rows × u32, then 16 × d | 288 |
//! | Q4_1 | 4 words × 16 rows × u32, then 16 × d, 16 × m | 320 |
//! | Q8_0 | 16 pairs × 16 rows × 2 i8, then 16 × d | 544 |
//! | F16, BF16 | 16 rows | 32 |
//! | F32 | 16 rows | 64 |
//!
//! Word w of a row holds weights 8w .. 8w + 8: nibble j of its low half is weight 8w + 2j, of its high half the next one.
//! Masking out nibble j therefore leaves the pair (8w + 2j, 8w + 2j + 1) as two int16, what `vpmaddwd` eats.

use super::kind::{BLOCK, WeightKind};
use half::f16;

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Bytes that the 4-bit (or 8-bit) integers of one tile block take; the scales follow.
pub(super) const Q4_BYTES: usize = TILE * BLOCK / 2;
/// As [`Q4_BYTES`].
pub(super) const Q8_BYTES: usize = TILE * BLOCK;

/// Whether the kind has tiles of its own.
pub(super) fn has_tiles(kind: WeightKind) -> bool {
    !kind.is_quantized() || matches!(kind, WeightKind::Q8_0 | WeightKind::Q4_0 | WeightKind::Q4_1)
}

/// Bytes of one tile of `n_in` inputs.
pub(super) fn tile_bytes(kind: WeightKind, n_in: usize) -> usize {
    n_in / kind.block_elems() * TILE * kind.block_bytes()
}

/// Interleaves up to 16 `rows` (missing ones become zeros) of `n_in` weights into `tile`.
pub(super) fn interleave(kind: WeightKind, rows: &[u8], n_in: usize, tile: &mut [u8]) {
    let block_bytes = kind.block_bytes();
    let row_bytes = n_in / kind.block_elems() * block_bytes;
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        let blocks = row.chunks_exact(block_bytes);
        for (block, out) in blocks.zip(tile.chunks_exact_mut(TILE * block_bytes)) {
            match kind {
                WeightKind::Q4_0 | WeightKind::Q4_1 => interleave_q4(block, r, out),
                WeightKind::Q8_0 => interleave_q8(block, r, out),
                _ => out[r * block_bytes..][..block_bytes].copy_from_slice(block),
            }
        }
    }
}

fn interleave_q4(block: &[u8], r: usize, out: &mut [u8]) {
    let header = block.len() - BLOCK / 2;
    for w in 0..4 {
        let word = (0..4).fold(0u32, |word, j| {
            let k = 8 * w + 2 * j;
            let pair =
                u32::from(nibble(&block[header..], k)) | u32::from(nibble(&block[header..], k + 1)) << 16;
            word | pair << (4 * j)
        });
        out[(w * TILE + r) * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
    for (i, half) in block[..header].chunks_exact(2).enumerate() {
        out[Q4_BYTES + (i * TILE + r) * 2..][..2].copy_from_slice(half);
    }
}

fn interleave_q8(block: &[u8], r: usize, out: &mut [u8]) {
    for (p, pair) in block[2..].chunks_exact(2).enumerate() {
        out[(p * TILE + r) * 2..][..2].copy_from_slice(pair);
    }
    out[Q8_BYTES + r * 2..][..2].copy_from_slice(&block[..2]);
}

/// Widens row `r` of a tile to f32, exactly as [`WeightKind::dequantize`] does.
pub(super) fn row_f32(kind: WeightKind, tile: &[u8], r: usize, row: &mut [f32]) {
    let elems = kind.block_elems();
    for (block, out) in tile.chunks_exact(TILE * kind.block_bytes()).zip(row.chunks_exact_mut(elems)) {
        match kind {
            WeightKind::Q4_0 | WeightKind::Q4_1 => {
                let mins = block.get(Q4_BYTES + 2 * TILE..).filter(|mins| !mins.is_empty());
                let d = half_at(&block[Q4_BYTES..], r);
                for (k, out) in out.iter_mut().enumerate() {
                    let word = &block[((k / 8) * TILE + r) * 4 + k % 2 * 2..][..2];
                    let q = u16::from_le_bytes([word[0], word[1]]) >> (4 * (k % 8 / 2)) & 15;
                    *out = match mins {
                        Some(mins) => d * f32::from(q) + half_at(mins, r),
                        None => d * (f32::from(q) - 8.0),
                    };
                }
            }
            WeightKind::Q8_0 => {
                let d = half_at(&block[Q8_BYTES..], r);
                for (k, out) in out.iter_mut().enumerate() {
                    *out = d * f32::from(block[(k / 2 * TILE + r) * 2 + k % 2] as i8);
                }
            }
            _ => kind.dequantize(&block[r * kind.block_bytes()..][..kind.block_bytes()], out),
        }
    }
}

/// Widens one quantized tile block to int16 pairs `[16 pairs][16 rows][2]`, with the zero point taken off.
#[inline(always)]
pub(super) fn unpack(kind: WeightKind, block: &[u8], pairs: &mut [i16; TILE * BLOCK]) {
    match kind {
        WeightKind::Q4_0 | WeightKind::Q4_1 => {
            let zero = if kind == WeightKind::Q4_0 { 8 } else { 0 };
            let words = block[..Q4_BYTES].chunks_exact(4 * TILE);
            for (word, out) in words.zip(pairs.chunks_exact_mut(4 * 2 * TILE)) {
                let mut lanes = [0u16; 2 * TILE];
                for (lane, bytes) in lanes.iter_mut().zip(word.chunks_exact(2)) {
                    *lane = u16::from_le_bytes([bytes[0], bytes[1]]);
                }
                for (j, out) in out.chunks_exact_mut(2 * TILE).enumerate() {
                    for (out, lane) in out.iter_mut().zip(&lanes) {
                        *out = ((lane >> (4 * j)) & 15) as i16 - zero;
                    }
                }
            }
        }
        WeightKind::Q8_0 => {
            pairs.iter_mut().zip(&block[..Q8_BYTES]).for_each(|(out, &q)| *out = i16::from(q as i8));
        }
        _ => unreachable!("floats have no blocks"),
    }
}

/// The 16 halves that start at `bytes`.
#[inline(always)]
pub(super) fn halves(bytes: &[u8]) -> [f16; TILE] {
    std::array::from_fn(|r| f16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]]))
}

/// Half `i` of a block's header.
fn half_at(block: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([block[2 * i], block[2 * i + 1]]).to_f32()
}

/// 4-bit value `k` of a block's 16 bytes.
fn nibble(bytes: &[u8], k: usize) -> u8 {
    (bytes[k % 16] >> (4 * (k / 16))) & 15
}
