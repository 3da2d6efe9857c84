//! [`Staggered`]: memory of layers that fill alike, laid out so that they do not need new pages alike.

use crate::Buf;
use crate::buf::{HUGE_PAGE_BYTES, Plain};
use std::ops::{Deref, DerefMut};

/// Small pages, which hold the heads of a block: where a layer begins, it begins with one.
const PAGE_BYTES: usize = 4096;

/// Zeros, that begin somewhere in their first huge page.
///
/// The system clears a huge page when it is first touched: a quarter of a millisecond, and 5 ms where it has to make room
/// first because memory is full of files. A token writes to all layers at the same block, so if these began alike a step
/// would now and then pay for as many pages as there are layers: 30 of them took 240 ms. Shifted against each other by their
/// share of a page they need one after another.
pub(super) struct Staggered<T: Plain> {
    buf: Buf<T>,
    first: usize,
}

impl<T: Plain> Staggered<T> {
    /// `len` zeros of part `i` of `n_parts`.
    pub(super) fn zeroed(len: usize, [i, n_parts]: [usize; 2]) -> Self {
        let is_large = len * size_of::<T>() >= HUGE_PAGE_BYTES;
        let shift_bytes = if is_large { i * HUGE_PAGE_BYTES / n_parts / PAGE_BYTES * PAGE_BYTES } else { 0 };
        let first = shift_bytes / size_of::<T>();
        Self { buf: Buf::zeroed(first + len), first }
    }
}

impl<T: Plain> Deref for Staggered<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.buf[self.first..]
    }
}

impl<T: Plain> DerefMut for Staggered<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.buf[self.first..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_need_new_pages_one_after_another() {
        const N_LAYERS: usize = 30;
        // 12 KiB a block, as SmolLM2-135M has; untouched, so this is address space and no memory.
        const BLOCK: usize = 6 << 10;
        let layers: Vec<_> =
            (0..N_LAYERS).map(|i| Staggered::<half::bf16>::zeroed(1000 * BLOCK, [i, N_LAYERS])).collect();
        let page =
            |layer: &[half::bf16], block: usize| layer[block * BLOCK..].as_ptr().addr() / HUGE_PAGE_BYTES;
        let mut n_pages = 0;
        for block in 1..1000 {
            let n_new = layers.iter().filter(|layer| page(layer, block) != page(layer, block - 1)).count();
            assert!(n_new <= 1, "{n_new} layers need a page at block {block}");
            n_pages += n_new;
        }
        assert!(n_pages > 5 * N_LAYERS, "{n_pages}");
        assert!(layers.iter().all(|layer| layer.len() == 1000 * BLOCK && layer[17] == half::bf16::ZERO));
    }
}
