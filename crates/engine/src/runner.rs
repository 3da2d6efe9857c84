//! What the engine asks of a model: run one step over packed tokens and paged blocks.

use std::sync::Arc;

use model::StepInput;
use tensor::Pool;

/// A step that failed. The engine ends every running sequence with this text.
#[derive(Debug, thiserror::Error)]
#[error("the model failed: {0}")]
pub struct RunnerError(pub String);

/// What an engine's thread owns.
pub(crate) struct Models {
    pub(crate) target: Box<dyn Runner>,
    /// Guesses ahead of it.
    pub(crate) draft: Option<Box<dyn Runner>>,
}

/// What the engine must know of a model before its first step.
#[derive(Clone, Copy, Debug)]
pub struct RunnerShape {
    /// Size of the vocabulary: the width of a row of logits.
    pub vocab: usize,
    /// Blocks in the KV pool; ids are `0..n_blocks`.
    pub n_blocks: usize,
    /// Positions a block holds.
    pub block_tokens: usize,
    /// Positions the model was made for.
    pub context_max: usize,
}

/// A model with its KV blocks, as the engine sees it. The engine's thread owns it and is its only caller.
pub trait Runner: Send {
    /// The same at every call.
    fn shape(&self) -> RunnerShape;
    /// Copies blocks as the input says, writes keys and values of the new tokens into their blocks and returns `logits_rv`:
    /// a row of `vocab` numbers for each wanted position, rows in the order of the input.
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError>;

    /// The threads the model computes on, so that the engine draws tokens on them, too.
    /// Without them it draws on its own thread.
    fn pool(&self) -> Option<Arc<Pool>> {
        None
    }
}

/// The message of a panic, as far as it had one.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
