//! What a caller may hang on a request to decide, token by token, which ids can come next.
//!
//! The engine knows nothing of grammars or text: it asks for bits, draws among them, and says what it drew.

use std::fmt;

use crate::request::TokenId;

/// Whether a constrained output can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuation {
    Open,
    /// The output is complete and nothing may follow: the sequence ends with [`crate::FinishReason::Stop`].
    Complete,
}

/// The state of one constrained output. Drawing threads own it in turn, so it need not be shared.
pub trait Constraint: Send + fmt::Debug {
    /// The ids that may come next: bit `id % 32` of word `id / 32`; missing words are zeros. Ready when asked, because
    /// [`Constraint::commit`] computed it: drawing never waits for a grammar.
    fn allowed(&self) -> &[u32];

    /// Takes an allowed id and computes what may follow it. An error ends the sequence with this text.
    fn commit(&mut self, id: TokenId) -> Result<Continuation, String>;

    /// A copy that goes its own way from here.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Box<dyn Constraint> {
        self.fork()
    }
}

/// Whether `bits` allow any id besides `ids`.
pub(crate) fn allows_others(bits: &[u32], ids: &[TokenId]) -> bool {
    let n_allowed: u32 = bits.iter().map(|word| word.count_ones()).sum();
    let is_set = |&&id: &&TokenId| bits.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
    n_allowed as usize > ids.iter().filter(is_set).count()
}
