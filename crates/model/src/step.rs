//! [`StepInput`]: what one forward step computes, as plain data. Schedulers make it, [`crate::Transformer`] runs it.

use crate::Adapter;

/// Tokens of any number of sequences, computed together.
///
/// A row is one sequence with one or more new tokens: a decode step has one, a chunk of a prompt has many, and both kinds
/// may stand in the same step. The tokens of row 0 come first in `tokens_n`, then those of row 1, and so on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepInput {
    /// Token ids of all rows, packed.
    pub tokens_n: Vec<u32>,
    /// Position of every token in its sequence: row by row `n_context - n_tokens .. n_context`.
    pub positions_n: Vec<u32>,
    /// The sequences, in the order of their tokens.
    pub rows: Vec<StepRow>,
    /// Keys and values to be copied from block to block, in this order, before anything is computed.
    pub copies: Vec<BlockCopy>,
}

/// The first `n_positions` of block `from` begin block `to` as well. The two may be one: nothing is to be done then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: u32,
    pub to: u32,
    pub n_positions: usize,
}

/// One sequence of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepRow {
    /// New tokens of this row. At least 1.
    pub n_tokens: usize,
    /// Positions in the cache after this step, the new ones included. At least `n_tokens`.
    pub n_context: usize,
    /// Cache blocks of the sequence, in the order of positions: block `p / BLOCK_TOKENS` holds position `p`. Longer than
    /// needed is fine. Blocks shared between rows are only ever read.
    pub blocks: Vec<u32>,
    /// Logits are wanted for the last `n_logits` tokens of the row; 0 in the middle of a prompt.
    pub n_logits: usize,
    /// Changes to the model for this row alone.
    pub adapter: Option<Adapter>,
}

impl StepInput {
    /// Adds a row whose `tokens` follow `n_cached` positions that are in the cache already.
    pub fn push_row(&mut self, tokens: &[u32], n_cached: usize, blocks: &[u32], n_logits: usize) {
        let n_context = n_cached + tokens.len();
        self.tokens_n.extend_from_slice(tokens);
        self.positions_n.extend((n_cached..n_context).map(|p| p as u32));
        let blocks = blocks.to_vec();
        self.rows.push(StepRow { n_tokens: tokens.len(), n_context, blocks, n_logits, adapter: None });
    }

    /// Rows of logits this step produces.
    pub fn n_logits(&self) -> usize {
        self.rows.iter().map(|row| row.n_logits).sum()
    }

    /// Empties the step, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens_n.clear();
        self.positions_n.clear();
        self.rows.clear();
        self.copies.clear();
    }
}
