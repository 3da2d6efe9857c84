//! [`Ahead`]: memory that a thread asks for while it has nothing else to do.

use crate::cpu::LINE_BYTES;

/// A quarter of a second-level cache of 2 MiB, and as much as is read in some 20 us: longer gaps are not filled.
const AHEAD_MAX: usize = 512 << 10;

/// Lines asked for between two looks for work: about as many as may be on their way at once.
const LINES: usize = 8;

/// What is still to be asked for. Addresses only: nothing is read, and memory that is gone by then is asked for in vain.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead {
    next: usize,
    end: usize,
}

impl Ahead {
    pub(super) fn new(bytes: &[u8]) -> Self {
        let next = bytes.as_ptr().addr();
        Self { next, end: next + bytes.len().min(AHEAD_MAX) }
    }

    /// Asks for some lines; false when there are none left.
    pub(super) fn fetch_some(&mut self) -> bool {
        let stop = self.end.min(self.next + LINES * LINE_BYTES);
        (self.next..stop).step_by(LINE_BYTES).for_each(fetch);
        let any = self.next < stop;
        self.next = stop;
        any
    }
}

/// Asks for the line at `address`, into the second-level cache.
fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint that reads nothing and takes any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_asked_for_once_and_no_more_than_the_most() {
        for (len, n_expected) in
            [(0, 0), (1, 1), (LINES * LINE_BYTES + 1, 2), (2 * AHEAD_MAX, AHEAD_MAX / 512)]
        {
            let bytes = vec![0; len];
            let mut ahead = Ahead::new(&bytes);
            let n = std::iter::from_fn(|| ahead.fetch_some().then_some(())).count();
            assert_eq!(n, n_expected, "{len} bytes");
        }
    }
}
