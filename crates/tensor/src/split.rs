//! [`Split`]: a mutable slice that the tasks of one op share, each writing its own part.

use std::marker::PhantomData;
use std::ops::Range;

/// Hands out disjoint mutable parts of one slice to tasks that run at the same time.
pub(crate) struct Split<'a, T> {
    ptr: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts go to different threads; `part`'s contract keeps them disjoint.
unsafe impl<T: Send> Send for Split<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Split<'_, T> {}

impl<'a, T> Split<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// The elements in `range`, which is checked against the slice.
    ///
    /// # Safety
    /// While the part is alive no other part that overlaps it may be.
    #[allow(clippy::mut_from_ref)] // that is the point; the contract above makes it sound
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        // SAFETY: in bounds as just checked, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

/// Part `task` of `len` elements cut into pieces of `size`; the last may be shorter.
pub(crate) fn piece(task: usize, size: usize, len: usize) -> Range<usize> {
    (task * size).min(len)..((task + 1) * size).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        for (size, len) in [(4, 0), (4, 3), (4, 4), (4_usize, 9_usize)] {
            let all: Vec<usize> = (0..len.div_ceil(size)).flat_map(|task| piece(task, size, len)).collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    #[should_panic(expected = "of 3 elements")]
    fn parts_are_bounds_checked() {
        let mut x = [1, 2, 3];
        // SAFETY: the only part.
        unsafe { Split::new(&mut x).part(2..4) };
    }
}
