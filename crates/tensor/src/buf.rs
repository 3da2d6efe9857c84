//! [`Buf`]: aligned, zeroed memory for tensors.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Element types a [`Buf`] may hold: plain numbers for which all-zero bits are a value.
///
/// # Safety
/// Implementors have no padding, no destructor, and accept every bit pattern.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($t:ty),*) => {$(
        // SAFETY: a plain number.
        unsafe impl Plain for $t {}
    )*};
}
plain!(f32, f64, half::bf16, half::f16, u8, i8, u16, i16, u32, i32, u64, i64);

/// One cache line, and one AVX-512 register.
const ALIGN: usize = 64;

/// From this many bytes on a buffer is mapped on its own, on a huge-page boundary, with huge pages asked for: a page
/// table walk per 4 KiB is what limits packing and optimizer passes otherwise.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A fixed-length, 64-byte aligned array, zeroed when made.
///
/// Zeroing is the operating system's where possible: a large buffer that is never touched costs no memory.
pub struct Buf<T: Plain> {
    ptr: NonNull<T>,
    len: usize,
}

// SAFETY: a Buf owns its memory like a Vec does, and T is Send and Sync.
unsafe impl<T: Plain> Send for Buf<T> {}
// SAFETY: as above; shared access gives out only `&[T]`.
unsafe impl<T: Plain> Sync for Buf<T> {}

impl<T: Plain> Buf<T> {
    /// `len` zeros. Aborts like `Vec` when memory is exhausted.
    pub fn zeroed(len: usize) -> Self {
        let Some(layout) = Self::layout(len) else {
            return Self { ptr: NonNull::dangling(), len };
        };
        let ptr = if layout.size() >= HUGE_PAGE_BYTES {
            huge::map(layout)
        } else {
            // SAFETY: the layout's size is not zero.
            NonNull::new(unsafe { alloc_zeroed(layout) })
        };
        let Some(ptr) = ptr else { handle_alloc_error(layout) };
        Self { ptr: ptr.cast(), len }
    }

    /// A copy of `values`.
    pub fn from_slice(values: &[T]) -> Self {
        let mut buf = Self::zeroed(values.len());
        buf.copy_from_slice(values);
        buf
    }

    /// Grows to at least `len` elements, dropping the old contents if it has to move. For scratch that is kept between
    /// calls: after the largest call it never allocates again.
    pub fn reserve_scratch(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }

    /// Memory layout of `len` elements; `None` when there is nothing to allocate.
    fn layout(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(size_of::<T>()).expect("buffer length overflows usize");
        (bytes > 0).then(|| Layout::from_size_align(bytes, ALIGN).expect("buffer length overflows isize"))
    }
}

/// Large buffers, straight from the kernel: its pages come zeroed when they are first touched, where an aligned
/// allocation from `std` is cleared by hand (and so touched, as small pages).
#[cfg(target_os = "linux")]
mod huge {
    use super::{HUGE_PAGE_BYTES, Layout, NonNull};

    /// `layout.size()` zeroed bytes on a huge-page boundary; `None` when there is no memory.
    pub(super) fn map(layout: Layout) -> Option<NonNull<u8>> {
        let bytes = layout.size().next_multiple_of(HUGE_PAGE_BYTES);
        let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // One huge page more than needed, so that a boundary is inside; what lies before and after is given back.
        let mapped = bytes.checked_add(HUGE_PAGE_BYTES)?;
        // SAFETY: a fresh private mapping that touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, rights, kind, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let before = base.align_offset(HUGE_PAGE_BYTES);
        let after = HUGE_PAGE_BYTES - before;
        // SAFETY: all three ranges are inside the mapping just made. A kernel that refuses to unmap keeps address
        // space, one that refuses huge pages costs speed: neither matters to the caller.
        unsafe {
            let start = base.add(before);
            if before > 0 {
                libc::munmap(base.cast(), before);
            }
            libc::munmap(start.add(bytes).cast(), after);
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            NonNull::new(start)
        }
    }

    /// # Safety
    /// `ptr` came from [`map`] with this layout and is not used again.
    pub(super) unsafe fn unmap(ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the range `map` returned.
        unsafe { libc::munmap(ptr.as_ptr().cast(), layout.size().next_multiple_of(HUGE_PAGE_BYTES)) };
    }
}

#[cfg(not(target_os = "linux"))]
mod huge {
    use super::{Layout, NonNull, alloc_zeroed, dealloc};

    pub(super) fn map(layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: large layouts are not empty.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    /// # Safety
    /// `ptr` came from [`map`] with this layout and is not used again.
    pub(super) unsafe fn unmap(ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { dealloc(ptr.as_ptr(), layout) };
    }
}

impl<T: Plain> Drop for Buf<T> {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            let ptr = self.ptr.cast::<u8>();
            // SAFETY: made in `zeroed` with this very layout, by the same choice.
            unsafe {
                if layout.size() >= HUGE_PAGE_BYTES {
                    huge::unmap(ptr, layout)
                } else {
                    dealloc(ptr.as_ptr(), layout)
                }
            }
        }
    }
}

impl<T: Plain> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: ptr is valid for len initialized elements (or dangling and aligned when len is 0).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> Clone for Buf<T> {
    fn clone(&self) -> Self {
        Self::from_slice(self)
    }
}

impl<T: Plain> Default for Buf<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Plain + std::fmt::Debug> std::fmt::Debug for Buf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head: Vec<&T> = self.iter().take(4).collect();
        write!(f, "Buf[{}; {head:?}..]", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_writable() {
        for len in [0, 1, 63, 64, 1000, (2 << 20) / 4, (5 << 20) / 4 + 3] {
            let mut buf = Buf::<f32>::zeroed(len);
            assert_eq!(buf.len(), len);
            assert!(len == 0 || (buf.as_ptr() as usize).is_multiple_of(ALIGN));
            assert!(buf.iter().all(|&x| x == 0.0));
            buf.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let copy = buf.clone();
            assert_eq!(&*copy, &*buf);
        }
    }

    #[test]
    fn scratch_grows_and_never_shrinks() {
        let mut buf = Buf::<u8>::default();
        buf.reserve_scratch(100);
        let at = buf.as_ptr();
        buf.reserve_scratch(50);
        assert_eq!((buf.len(), buf.as_ptr()), (100, at));
    }
}
