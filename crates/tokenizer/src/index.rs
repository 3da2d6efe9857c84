//! Tokens of the model by their bytes.

use crate::spec::Spec;
use crate::tokenizer::TokenId;

/// Ids in the order of their tokens' bytes, without a copy of these: a search costs some twenty comparisons, and is only
/// done where a word was not seen before.
pub(crate) struct Index(Box<[TokenId]>);

impl Index {
    /// Of the ids that `is_listed`. Where two tokens have the same bytes the lower id stands for both.
    pub(crate) fn new(spec: &Spec, is_listed: impl Fn(usize) -> bool) -> Index {
        let bytes = |id: &TokenId| spec.tokens.bytes(*id);
        let ids = (0..spec.tokens.len()).filter(|&id| is_listed(id));
        let mut ids: Vec<TokenId> = ids.map(|id| id as TokenId).collect();
        ids.sort_unstable_by(|a, b| bytes(a).cmp(bytes(b)).then(a.cmp(b)));
        ids.dedup_by(|later, first| bytes(later) == bytes(first));
        Index(ids.into())
    }

    /// `spec` is what the index was made of.
    pub(crate) fn get(&self, spec: &Spec, bytes: &[u8]) -> Option<TokenId> {
        let found = self.0.binary_search_by(|&id| spec.tokens.bytes(id).cmp(bytes));
        found.ok().map(|i| self.0[i])
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = TokenId> {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Token;

    #[test]
    fn finds_listed_tokens_and_the_lower_of_two_ids() {
        let token = |text: &str| Token { bytes: text.as_bytes().into(), literal: false, in_model: true };
        let tokens = ["b", "a", "ab", "a", "hidden", ""].map(token).into_iter().collect();
        let spec = Spec { tokens, ..Spec::default() };
        let index = Index::new(&spec, |id| id != 4);
        let found = ["a", "ab", "b", "", "hidden", "c"].map(|text| index.get(&spec, text.as_bytes()));
        assert_eq!(found, [Some(1), Some(2), Some(0), Some(5), None, None]);
        assert_eq!(index.ids().collect::<Vec<_>>(), [5, 1, 2, 0]);
    }
}
