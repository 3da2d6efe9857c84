//! [`piece`]: how the ops cut their rows into tasks.

use std::ops::Range;

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
}
