//! [`MicroBatch`]: the rows that are computed at once.

/// b rows of t tokens, what each token should predict, and which of them belong together.
#[derive(Clone, Copy, Debug, Default)]
pub struct MicroBatch<'a> {
    /// `[b, t]`
    pub tokens_bt: &'a [u32],
    /// `[b, t]`; `u32::MAX` does not count.
    pub targets_bt: &'a [u32],
    /// `[b, t]`: where in its row (0..t) the first token of a token's document is. Tokens see their own document alone,
    /// and learned positions count from its start. `None`: every row is one document.
    pub starts_bt: Option<&'a [u32]>,
}

impl MicroBatch<'_> {
    /// Rows without borders between documents.
    pub fn plain<'a>(tokens_bt: &'a [u32], targets_bt: &'a [u32]) -> MicroBatch<'a> {
        MicroBatch { tokens_bt, targets_bt, starts_bt: None }
    }

    pub(super) fn check(&self, n: usize) {
        assert_eq!(self.tokens_bt.len(), n, "tokens");
        assert_eq!(self.targets_bt.len(), n, "targets");
        assert!(self.starts_bt.is_none_or(|starts| starts.len() == n), "starts");
    }

    /// Position of every token in its document.
    pub(super) fn positions(&self, t: usize, positions_bt: &mut [u32]) {
        for (i, position) in positions_bt.iter_mut().enumerate() {
            let start = self.starts_bt.map_or(0, |starts| starts[i]);
            *position = ((i % t) as u32).checked_sub(start).expect("a document begins before its tokens");
        }
    }
}
