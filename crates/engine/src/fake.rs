//! A model for tests of the engine and of what stands above it: no weights, exact answers.
//!
//! Its KV cells hold the token that was computed there, and the next logits are a function of the
//! tokens *read back through the block table*. A wrong table, a block given to two sequences, or a
//! block that was evicted while in use therefore shows as a wrong token, or as an error.

use model::{BlockCopy, StepInput, StepRow};

use crate::request::TokenId;
use crate::runner::{Runner, RunnerError, RunnerShape};

type LogitsOf = dyn Fn(&[TokenId], &mut [f32]) + Send;

/// See the module. Everything it computes is `logits_of(context)`.
pub struct FakeRunner {
    block_tokens: usize,
    vocab: usize,
    /// One per position of every block: what was computed there.
    cells: Vec<Option<Cell>>,
    logits_of: Box<LogitsOf>,
    logits_rv: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    token: TokenId,
    position: usize,
}

impl FakeRunner {
    /// A model whose logits are pseudo-random in the whole context: every token matters.
    pub fn new(vocab: usize, n_blocks: usize, block_tokens: usize) -> FakeRunner {
        FakeRunner::with_logits(vocab, n_blocks, block_tokens, hashed_logits)
    }

    /// A model that always continues with `next(context)`.
    pub fn with_next(
        vocab: usize,
        n_blocks: usize,
        block_tokens: usize,
        next: impl Fn(&[TokenId]) -> TokenId + Send + 'static,
    ) -> FakeRunner {
        FakeRunner::with_logits(vocab, n_blocks, block_tokens, move |context, logits_v| {
            logits_v.fill(-20.0);
            logits_v[next(context) as usize] = 20.0;
        })
    }

    /// A model that fills its logits by `logits_of(context, logits_v)`.
    pub fn with_logits(
        vocab: usize,
        n_blocks: usize,
        block_tokens: usize,
        logits_of: impl Fn(&[TokenId], &mut [f32]) + Send + 'static,
    ) -> FakeRunner {
        FakeRunner {
            block_tokens,
            vocab,
            cells: vec![None; n_blocks * block_tokens],
            logits_of: Box::new(logits_of),
            logits_rv: Vec::new(),
        }
    }

    /// Carries out a copy, and forgets what lay behind the copied positions.
    fn copy(&mut self, copy: &BlockCopy) -> Result<(), RunnerError> {
        let (from, to) = (copy.from as usize * self.block_tokens, copy.to as usize * self.block_tokens);
        let is_inside =
            from.max(to) < self.cells.len() && (1..=self.block_tokens).contains(&copy.n_positions);
        if !is_inside {
            return Err(RunnerError(format!("no model can do {copy:?}")));
        }
        self.cells.copy_within(from..from + copy.n_positions, to);
        self.cells[to + copy.n_positions..to + self.block_tokens].fill(None);
        Ok(())
    }

    /// Where the row keeps `position`.
    fn cell_idx(&self, row: &StepRow, position: usize) -> Result<usize, RunnerError> {
        let block = row.blocks.get(position / self.block_tokens);
        let block = block.ok_or_else(|| RunnerError(format!("position {position} has no block")))?;
        let cell_idx = *block as usize * self.block_tokens + position % self.block_tokens;
        if cell_idx >= self.cells.len() {
            return Err(RunnerError(format!("block {block} does not exist")));
        }
        Ok(cell_idx)
    }

    fn read_context(&self, row: &StepRow) -> Result<Vec<TokenId>, RunnerError> {
        let read = |position| {
            let cell = self.cells[self.cell_idx(row, position)?];
            match cell {
                Some(cell) if cell.position == position => Ok(cell.token),
                other => Err(RunnerError(format!("position {position} reads {other:?}"))),
            }
        };
        (0..row.n_context).map(read).collect()
    }
}

impl Runner for FakeRunner {
    fn shape(&self) -> RunnerShape {
        RunnerShape {
            vocab: self.vocab,
            n_blocks: self.cells.len() / self.block_tokens,
            block_tokens: self.block_tokens,
            context_max: self.cells.len(),
        }
    }

    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        input.copies.iter().try_for_each(|copy| self.copy(copy))?;
        let mut packed_idx = 0;
        for row in &input.rows {
            if row.n_tokens == 0 || row.n_tokens > row.n_context || row.n_logits > row.n_tokens {
                return Err(RunnerError(format!("no model can compute {row:?}")));
            }
            for position in row.n_context - row.n_tokens..row.n_context {
                if input.positions_n[packed_idx] as usize != position {
                    return Err(RunnerError(format!("token {packed_idx} is not at position {position}")));
                }
                let cell_idx = self.cell_idx(row, position)?;
                self.cells[cell_idx] = Some(Cell { token: input.tokens_n[packed_idx], position });
                packed_idx += 1;
            }
        }
        // Read only after everything is written: a block that two rows write betrays itself.
        self.logits_rv.clear();
        for row in &input.rows {
            let context = self.read_context(row)?;
            for n_seen in row.n_context - row.n_logits + 1..=row.n_context {
                let start = self.logits_rv.len();
                self.logits_rv.resize(start + self.vocab, 0.0);
                (self.logits_of)(&context[..n_seen], &mut self.logits_rv[start..]);
            }
        }
        Ok(&self.logits_rv)
    }
}

/// Logits between 0 and 8 from a hash (FNV-1a) of the context.
pub(crate) fn hashed_logits(context: &[TokenId], logits_v: &mut [f32]) {
    let fold = |hash: u64, id: u32| (hash ^ u64::from(id)).wrapping_mul(0x100_0000_01b3);
    let hash = context.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &id| fold(hash, id + 1));
    for (i, logit) in logits_v.iter_mut().enumerate() {
        let mixed = fold(fold(hash ^ (hash >> 29), i as u32), 0x5bd1);
        *logit = (mixed >> 40) as f32 * (8.0 / (1u32 << 24) as f32);
    }
}
