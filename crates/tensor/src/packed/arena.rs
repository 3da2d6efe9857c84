//! [`Piece`]: memory of one packed matrix, a part of a large mapping.
//!
//! A small model's matrices are of some hundred KiB each: alone they would lie in 4 KiB pages, and streaming them would
//! wait for page tables. Together in mappings of [`CHUNK_BYTES`] they lie in huge pages. A mapping lives until the last
//! piece of it is dropped.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::Buf;
use crate::pool::Disjoint;

/// Bytes of a mapping: pages of it that no piece has touched cost nothing.
const CHUNK_BYTES: usize = 32 << 20;

/// Smaller pieces are allocated alone: they are models in tests.
const SHARED_MIN: usize = 16 << 10;

/// Pieces begin on cache lines.
const ALIGN: usize = 64;

/// The mapping that is being handed out, and how much of it is.
static CURRENT: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

/// A mapping whose parts belong to pieces.
struct Chunk {
    bytes: Disjoint<'static, u8>,
    /// What `bytes` points into: never touched otherwise.
    _owner: Buf<u8>,
}

impl Chunk {
    fn new(n_bytes: usize) -> Self {
        let mut owner = Buf::<u8>::zeroed(n_bytes);
        // SAFETY: the memory stays where it is when the Buf moves, and the Buf is dropped with the only user of the slice.
        let bytes = unsafe { std::slice::from_raw_parts_mut(owner.as_mut_ptr(), n_bytes) };
        Self { bytes: Disjoint::new(bytes), _owner: owner }
    }
}

/// Zeroed bytes of its own, cache-line aligned.
pub(super) struct Piece {
    chunk: Arc<Chunk>,
    range: Range<usize>,
}

impl Piece {
    /// `n_bytes` zeros.
    pub(super) fn zeroed(n_bytes: usize) -> Self {
        if !(SHARED_MIN..CHUNK_BYTES).contains(&n_bytes) {
            return Self { chunk: Arc::new(Chunk::new(n_bytes)), range: 0..n_bytes };
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (weak, used) = &mut *current;
        let living = weak.upgrade().filter(|_| *used + n_bytes <= CHUNK_BYTES);
        let chunk = living.unwrap_or_else(|| {
            let chunk = Arc::new(Chunk::new(CHUNK_BYTES));
            (*weak, *used) = (Arc::downgrade(&chunk), 0);
            chunk
        });
        let range = *used..*used + n_bytes;
        *used = range.end.next_multiple_of(ALIGN);
        Self { chunk, range }
    }
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping; it belongs to this piece alone, which is written only through `&mut self`.
        unsafe {
            std::slice::from_raw_parts(self.chunk.bytes.as_ptr().add(self.range.start), self.range.len())
        }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: it belongs to this piece alone, and `&mut self` makes the access exclusive.
        unsafe { self.chunk.bytes.slice(self.range.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_zeroed_and_outlive_each_other() {
        let mut pieces: Vec<Piece> =
            [SHARED_MIN, 1, CHUNK_BYTES / 2 + 1, CHUNK_BYTES / 2, SHARED_MIN + 3, CHUNK_BYTES, 0]
                .map(Piece::zeroed)
                .into();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.is_empty() || (piece.as_ptr() as usize).is_multiple_of(ALIGN));
            assert!(piece.iter().all(|&byte| byte == 0));
            piece.fill(i as u8 + 1);
        }
        for i in (0..pieces.len()).rev() {
            let piece = pieces.swap_remove(i);
            let value = piece.first().copied();
            assert!(piece.iter().all(|&byte| Some(byte) == value));
        }
    }
}
