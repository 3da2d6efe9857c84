//! Packing: a block of an operand, rearranged so that the tile kernel reads it front to back.
//!
//! Both operands look alike from here: *lanes* (rows of a, columns of b) times *depth* (k). A block is a row of panels
//! of W lanes; a panel holds, for each depth, its W lanes side by side, zeros where the operand has no more lanes.

use std::ops::Range;

use half::bf16;

use super::{Elems, Mat};
use crate::simd::Simd;

/// What the words of a packed panel are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// f32 as it came.
    F32,
    /// f32 rounded to bf16.
    Rounded,
    /// Two bf16 of neighbouring depths: the even one in the high half, the odd one (0 past the end) in the low half.
    /// A panel occupies the same memory as in the other formats and leaves the second half of it unused, which keeps
    /// all offsets the same.
    Pairs,
}

impl Format {
    /// Words per lane that the kernel reads for `depth` elements.
    pub(super) fn n_words(self, depth: usize) -> usize {
        if self == Format::Pairs { depth.div_ceil(2) } else { depth }
    }
}

/// An operand as lanes × depth.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    elems: Elems<'a>,
    pub(super) n_lanes: usize,
    /// Elements from one lane to the next, and from one depth to the next; one of the two is 1.
    lane_stride: usize,
    depth_stride: usize,
}

impl<'a> Source<'a> {
    /// Lanes are the rows of `mat`.
    pub(super) fn rows_of(mat: Mat<'a>) -> Self {
        let (lane_stride, depth_stride) = if mat.transposed { (1, mat.stride) } else { (mat.stride, 1) };
        Self { elems: mat.data, n_lanes: mat.dims()[0], lane_stride, depth_stride }
    }

    /// Lanes are the columns of `mat`.
    pub(super) fn cols_of(mat: Mat<'a>) -> Self {
        Self::rows_of(mat.t())
    }

    fn is_bf16(&self) -> bool {
        matches!(self.elems, Elems::Bf16(_))
    }
}

/// Words of a block of panels of `w` lanes. The transposing stores write whole groups of 8 lanes, so where `w` is no
/// multiple of 8 they may write some words past the last panel.
pub(super) fn block_words(w: usize, n_lanes: usize, n_depth: usize) -> usize {
    let slack = if w.is_multiple_of(8) { 0 } else { 8 };
    n_lanes.div_ceil(w) * w * n_depth + slack
}

/// Packs `lanes` × `depths` of `source` into `dst`, panels of W lanes one after the other.
#[inline(always)]
pub(super) fn pack<S: Simd, const W: usize>(
    s: S,
    dst: &mut [f32],
    source: &Source,
    lanes: Range<usize>,
    depths: Range<usize>,
    format: Format,
) {
    assert!(dst.len() >= block_words(W, lanes.len(), depths.len()) && lanes.end <= source.n_lanes);
    match (source.elems, source.depth_stride) {
        (Elems::F32(x), 1) => pack_along_depth::<S, f32, W>(s, dst, x, source.lane_stride, &lanes, &depths),
        (Elems::Bf16(x), 1) => pack_along_depth::<S, bf16, W>(s, dst, x, source.lane_stride, &lanes, &depths),
        (Elems::F32(x), stride) => pack_along_lanes::<S, f32, W>(s, dst, x, stride, &lanes, &depths),
        (Elems::Bf16(x), stride) => pack_along_lanes::<S, bf16, W>(s, dst, x, stride, &lanes, &depths),
    }
    for panel in dst[..lanes.len().div_ceil(W) * W * depths.len()].chunks_exact_mut((W * depths.len()).max(1))
    {
        match format {
            Format::Rounded if !source.is_bf16() => round(s, panel),
            Format::F32 | Format::Rounded => {}
            Format::Pairs => pair::<S, W>(s, panel),
        }
    }
}

/// Element types operands are stored in.
trait Element: Copy {
    fn widen(self) -> f32;
    /// Asks for the line of each of `n_lanes` lanes.
    #[inline(always)]
    fn prefetch<S: Simd>(s: S, src: *const Self, stride: usize, n_lanes: usize) {
        for lane in 0..n_lanes {
            s.prefetch(src.wrapping_add(lane * stride).cast());
        }
    }
    /// [`Simd::transpose8_ptr`] for this type.
    unsafe fn transpose8<S: Simd>(
        s: S,
        src: *const Self,
        stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        w: usize,
    );
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn transpose8<S: Simd>(
        s: S,
        src: *const f32,
        stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        w: usize,
    ) {
        // SAFETY: the caller's promise, which is the callee's.
        unsafe { s.transpose8_ptr(src, stride, n_lanes, dst, w) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    unsafe fn transpose8<S: Simd>(
        s: S,
        src: *const bf16,
        stride: usize,
        n_lanes: usize,
        dst: *mut f32,
        w: usize,
    ) {
        // SAFETY: the caller's promise, which is the callee's.
        unsafe { s.transpose8_bf16_ptr(src, stride, n_lanes, dst, w) }
    }
}

/// The elements of a lane are neighbours in memory: transposes blocks of 8 lanes × 8 depths.
///
/// Where W is no multiple of 8 the last group of a panel spills zeros (or lanes of the next panel's place) over what
/// follows. Groups are written last to first within 8 depths, and depths and panels first to last, so everything spilt
/// on is written afterwards; what lies past the block is its slack.
#[inline(always)]
fn pack_along_depth<S: Simd, E: Element, const W: usize>(
    s: S,
    dst: &mut [f32],
    src: &[E],
    lane_stride: usize,
    lanes: &Range<usize>,
    depths: &Range<usize>,
) {
    let n_depth = depths.len();
    if lanes.is_empty() || n_depth == 0 {
        return;
    }
    assert!((lanes.end - 1) * lane_stride + depths.end <= src.len());
    for (panel_idx, first) in lanes.clone().step_by(W).enumerate() {
        let n_lanes = W.min(lanes.end - first);
        let panel = panel_idx * W * n_depth;
        let whole = n_depth / 8 * 8;
        for depth in (0..whole).step_by(8) {
            for group in (0..W.div_ceil(8)).rev() {
                let n_group = n_lanes.saturating_sub(group * 8).min(8).min(W - group * 8);
                // A group without lanes reads nothing, but its pointer must not leave the operand.
                let at =
                    if n_group == 0 { 0 } else { (first + group * 8) * lane_stride + depths.start + depth };
                // SAFETY: reads n_group lanes × 8 depths inside `lanes` × `depths`, in bounds by the assertion above.
                // Writes 8 rows of 8 words from `panel + depth·W + group·8`, of which the last ends at most
                // 8 words past the panel's end; `pack` asserted the room.
                unsafe {
                    E::prefetch(s, src.as_ptr().wrapping_add(at + W * lane_stride), lane_stride, n_group);
                    let dst = dst.as_mut_ptr().add(panel + depth * W + group * 8);
                    E::transpose8(s, src.as_ptr().add(at), lane_stride, n_group, dst, W);
                }
            }
        }
        for depth in whole..n_depth {
            let row = &mut dst[panel + depth * W..][..W];
            for (lane, x) in row.iter_mut().enumerate() {
                *x = if lane < n_lanes {
                    src[(first + lane) * lane_stride + depths.start + depth].widen()
                } else {
                    0.0
                };
            }
        }
    }
}

/// Neighbouring lanes are neighbours in memory: copies rows of W. Goes through the panels 8 depths at a time, so that
/// each cache line of the source is read for all the panels it belongs to while it is near.
#[inline(always)]
fn pack_along_lanes<S: Simd, E: Element, const W: usize>(
    s: S,
    dst: &mut [f32],
    src: &[E],
    depth_stride: usize,
    lanes: &Range<usize>,
    depths: &Range<usize>,
) {
    let n_depth = depths.len();
    let rows = dst.as_chunks_mut::<W>().0;
    for start in (0..n_depth).step_by(8) {
        let end = n_depth.min(start + 8);
        for (panel_idx, first) in lanes.clone().step_by(W).enumerate() {
            let n_lanes = W.min(lanes.end - first);
            for depth in start..end {
                s.prefetch(
                    src.as_ptr().wrapping_add((depths.start + depth + 8) * depth_stride + first).cast(),
                );
                let row = &mut rows[panel_idx * n_depth + depth];
                let src = &src[(depths.start + depth) * depth_stride + first..][..n_lanes];
                // A length known to the compiler makes the copy two or three instructions.
                if let Some(src) = src.first_chunk::<W>() {
                    *row = src.map(E::widen);
                } else {
                    *row = std::array::from_fn(|lane| if lane < n_lanes { src[lane].widen() } else { 0.0 });
                }
            }
        }
    }
}

/// Rounds a packed panel to bf16.
#[inline(always)]
fn round<S: Simd>(s: S, panel: &mut [f32]) {
    for words in panel.chunks_mut(S::LANES) {
        s.store(words, s.round_bf16(s.load(words)));
    }
}

/// Turns a packed panel into pairs, in place: row j becomes the pairs of rows 2j and 2j+1.
#[inline(always)]
fn pair<S: Simd, const W: usize>(s: S, panel: &mut [f32]) {
    let n_depth = panel.len() / W;
    for depth in (0..n_depth).step_by(2) {
        for lane in (0..W).step_by(S::LANES) {
            let n = S::LANES.min(W - lane);
            let even = s.load(&panel[depth * W + lane..][..n]);
            let odd =
                if depth + 1 < n_depth { s.load(&panel[(depth + 1) * W + lane..][..n]) } else { s.zero() };
            let words = s.pair_bf16(s.round_bf16(even), s.round_bf16(odd));
            s.store(&mut panel[depth / 2 * W + lane..][..n], words);
        }
    }
}
