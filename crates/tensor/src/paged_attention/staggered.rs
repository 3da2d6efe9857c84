//! [`Staggered`]: memory of layers that fill alike, laid out so that they do not need new pages alike.

use crate::Buf;
use crate::buf::{HUGE_PAGE_BYTES, Plain};

/// Small pages, which hold the heads of a block: where a layer begins, it begins with one.
const PAGE_BYTES: usize = 4096;

/// Zeros for so many layers in one piece, which begin at different places of a huge page.
///
/// The system clears a huge page when it is first touched: a quarter of a millisecond, and 5 ms where it has to make room
/// first because memory is full of files. A token writes to all layers at the same block, so if these began alike a step
/// would now and then pay for as many pages as there are layers: 30 of them took 240 ms. Apart from each other they need
/// one after another. They share the pages in which one ends and the next begins: layers with pages of their own, shifted
/// against each other, took a quarter more memory than they hold.
pub(super) struct Staggered<T: Plain> {
    buf: Buf<T>,
    /// Elements of a layer, and from one to the next.
    len: usize,
    stride: usize,
}

impl<T: Plain> Staggered<T> {
    /// `len` zeros for each of `n_layers`.
    pub(super) fn zeroed(len: usize, n_layers: usize) -> Self {
        let bytes = len * size_of::<T>();
        let stride =
            if bytes < HUGE_PAGE_BYTES { len } else { stride_bytes(bytes, n_layers) / size_of::<T>() };
        Self { buf: Buf::zeroed(stride * n_layers), len, stride }
    }

    pub(super) fn layer(&self, i: usize) -> &[T] {
        &self.buf[i * self.stride..][..self.len]
    }

    pub(super) fn layer_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.buf[i * self.stride..][..self.len]
    }
}

/// The least distance of layers of so many bytes at which no two begin closer to each other, as seen from their huge pages,
/// than half of what is there for each.
fn stride_bytes(bytes: usize, n_layers: usize) -> usize {
    let n_places = HUGE_PAGE_BYTES / PAGE_BYTES;
    let apart = n_places / (2 * n_layers).max(1);
    let least = bytes.div_ceil(PAGE_BYTES);
    let is_spread = |stride: &usize| {
        let mut places: Vec<_> = (0..n_layers).map(|i| i * stride % n_places).collect();
        places.sort_unstable();
        let around = places.first().map(|first| first + n_places);
        places.iter().zip(places.iter().skip(1).copied().chain(around)).all(|(a, b)| b - a >= apart)
    };
    // Among as many as there are places all distances are seen: one of them divides the page evenly, or nearly so.
    (least..least + n_places).find(is_spread).unwrap_or(least) * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_need_new_pages_one_after_another() {
        const N_LAYERS: usize = 30;
        // 12 KiB a block, as SmolLM2-135M has; untouched, so this is address space and no memory.
        const BLOCK: usize = 6 << 10;
        let mut layers = Staggered::<half::bf16>::zeroed(1000 * BLOCK, N_LAYERS);
        let page =
            |layer: &[half::bf16], block: usize| layer[block * BLOCK..].as_ptr().addr() / HUGE_PAGE_BYTES;
        let mut n_pages = 0;
        for block in 1..1000 {
            let is_new = |i: &usize| page(layers.layer(*i), block) != page(layers.layer(*i), block - 1);
            let n_new = (0..N_LAYERS).filter(is_new).count();
            assert!(n_new <= 1, "{n_new} layers need a page at block {block}");
            n_pages += n_new;
        }
        assert!(n_pages > 5 * N_LAYERS, "{n_pages}");
        for i in 0..N_LAYERS {
            assert_eq!(layers.layer(i).len(), 1000 * BLOCK);
            assert!(layers.layer(i)[17] == half::bf16::ZERO, "layer {i} has something of another's");
            layers.layer_mut(i)[17] = half::bf16::ONE;
        }
    }

    #[test]
    fn layers_take_little_more_than_they_hold() {
        for n_layers in [1, 2, 7, 18, 26, 30, 32, 80, 126, 300] {
            for bytes in [HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES, 8_945_664, 11_111_111, 64 << 20] {
                let stride = stride_bytes(bytes, n_layers);
                assert!(stride >= bytes && stride.is_multiple_of(PAGE_BYTES));
                let spread = stride - bytes;
                assert!(
                    spread <= HUGE_PAGE_BYTES / n_layers + 65 * PAGE_BYTES,
                    "{n_layers} of {bytes}: {spread}"
                );
            }
        }
    }
}
