//! A draft model: a second runner that guesses ahead, with keys and values of its own.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use model::StepInput;

use crate::blocks::{BlockId, BlockPool};
use crate::clock;
use crate::request::TokenId;
use crate::runner::{Runner, RunnerError, panic_text};
use crate::sequence::SequenceId;
use crate::speculation::{DRAFT_TOKENS_MAX, Draw, Wish};

/// Known tokens of all sequences together that one call computes: a long prompt must not stall the
/// streams here either. A sequence has no draft until the model has caught up with it.
const CATCH_UP_TOKENS_MAX: usize = 128;

pub(crate) struct DraftModel {
    runner: Box<dyn Runner>,
    pool: BlockPool,
    sequences: HashMap<SequenceId, Drafting>,
    cost: Cost,
}

/// What guesses took. Steps that caught up with known tokens as well do not count: that is the price of not having guessed
/// before, and blamed on the guesses it would keep them from ever being made again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) n_guesses: usize,
    pub(crate) time: Duration,
}

/// Known tokens of a sequence in a step that only guesses: after a draft that was right, its last token and the one behind.
const FRESH_TOKENS_MAX: usize = 2;

/// How far the draft model is with a sequence.
#[derive(Debug, Default)]
struct Drafting {
    /// Of the sequence's known tokens.
    n_computed: usize,
    blocks: Vec<BlockId>,
}

/// A draft in the making.
struct Making<'a> {
    wish: &'a Wish<'a>,
    draft: Vec<TokenId>,
    is_over: bool,
}

impl DraftModel {
    pub(crate) fn new(runner: Box<dyn Runner>) -> DraftModel {
        DraftModel {
            pool: BlockPool::new(runner.shape().n_blocks),
            runner,
            sequences: HashMap::new(),
            cost: Cost::default(),
        }
    }

    /// Of the last call of `propose`.
    pub(crate) fn cost(&self) -> Cost {
        self.cost
    }

    /// A draft for each wish: as long as asked for, or empty where the model has not caught up yet or
    /// has no room.
    ///
    /// # Errors
    /// If the model fails or panics. What it holds cannot be trusted any more.
    pub(crate) fn propose(
        &mut self,
        wishes: &[Wish],
        draw: &mut Draw,
    ) -> Result<Vec<Vec<TokenId>>, RunnerError> {
        let making = |wish| Making { wish, draft: Vec::new(), is_over: false };
        let mut drafts: Vec<_> = wishes.iter().map(making).collect();
        self.cost = Cost::default();
        self.catch_up(&mut drafts)?;
        for n_drafted in 0..DRAFT_TOKENS_MAX {
            drafts.iter_mut().for_each(|making| making.is_over |= making.draft.len() >= making.wish.n_max);
            if drafts.iter().all(|making| making.is_over) {
                break;
            }
            self.extend(&mut drafts, n_drafted, draw)?;
        }
        Ok(drafts.into_iter().map(|making| making.draft).collect())
    }

    pub(crate) fn forget(&mut self, id: SequenceId) {
        let drafting = self.sequences.remove(&id).unwrap_or_default();
        drafting.blocks.into_iter().for_each(|block| self.pool.release(block));
    }

    /// Makes room, and computes what lies far behind. Ends every draft that cannot begin in this call.
    fn catch_up(&mut self, drafts: &mut [Making]) -> Result<(), RunnerError> {
        let mut n_left = CATCH_UP_TOKENS_MAX;
        let mut input = StepInput::default();
        for making in drafts.iter_mut().filter(|making| making.wish.n_max > 0) {
            let Wish { id, tokens, n_max } = *making.wish;
            let n_positions = tokens.len() + n_max;
            if n_positions > self.runner.shape().context_max || !self.reserve(id, n_positions) {
                making.is_over = true;
                continue;
            }
            let drafting = self.sequences.get_mut(&id).expect("room was made for it");
            let n_behind = tokens.len() - 1 - drafting.n_computed;
            // As few as an accepted draft leaves join the first guess.
            let n_tokens = if n_behind > DRAFT_TOKENS_MAX { n_behind.min(n_left) } else { 0 };
            making.is_over = n_behind - n_tokens > DRAFT_TOKENS_MAX;
            if n_tokens > 0 {
                let start = drafting.n_computed;
                drafting.n_computed += n_tokens;
                n_left -= n_tokens;
                input.push_row(&tokens[start..start + n_tokens], start, &drafting.blocks, 0);
            }
        }
        if !input.rows.is_empty() {
            step(&mut *self.runner, &input)?;
        }
        Ok(())
    }

    fn reserve(&mut self, id: SequenceId, n_positions: usize) -> bool {
        let drafting = self.sequences.entry(id).or_default();
        while drafting.blocks.len() * self.runner.shape().block_tokens < n_positions {
            let Some(block) = self.pool.take() else { return false };
            drafting.blocks.push(block);
        }
        true
    }

    /// One more token for every draft that is not over.
    fn extend(
        &mut self,
        drafts: &mut [Making],
        n_drafted: usize,
        draw: &mut Draw,
    ) -> Result<(), RunnerError> {
        let start_time = clock::now();
        let mut input = StepInput::default();
        let vocab = self.runner.shape().vocab;
        for making in drafts.iter().filter(|making| !making.is_over) {
            let tokens = making.wish.tokens;
            let drafting = self.sequences.get_mut(&making.wish.id).expect("room was made for it");
            if n_drafted == 0 {
                let start = drafting.n_computed;
                input.push_row(&tokens[start..], start, &drafting.blocks, 1);
                drafting.n_computed = tokens.len();
            } else {
                input.push_row(
                    &making.draft[n_drafted - 1..],
                    tokens.len() + n_drafted - 1,
                    &drafting.blocks,
                    1,
                );
            }
        }
        let logits_rv = step(&mut *self.runner, &input)?;
        let open = drafts.iter_mut().filter(|making| !making.is_over);
        for (making, logits_v) in open.zip(logits_rv.chunks_exact(vocab)) {
            match draw(making.wish.id, n_drafted, logits_v) {
                Some(token) => making.draft.push(token),
                None => making.is_over = true,
            }
        }
        if input.rows.iter().all(|row| row.n_tokens <= FRESH_TOKENS_MAX) {
            self.cost.n_guesses += input.rows.len();
            self.cost.time += clock::now() - start_time;
        }
        Ok(())
    }
}

/// One step whose panic is an error like any other, and whose logits are as many as were asked for.
fn step<'a>(runner: &'a mut dyn Runner, input: &StepInput) -> Result<&'a [f32], RunnerError> {
    let expected = input.n_logits() * runner.shape().vocab;
    let outcome = catch_unwind(AssertUnwindSafe(move || {
        let runner = runner; // Moved in, so that the logits may leave the closure.
        runner.step(input)
    }));
    let logits_rv = outcome.map_err(|panic| RunnerError(panic_text(&*panic).to_owned()))??;
    if logits_rv.len() != expected {
        return Err(RunnerError(format!("{} logits instead of {expected}", logits_rv.len())));
    }
    Ok(logits_rv)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeRunner;

    #[test]
    fn catching_up_is_not_blamed_on_guesses() {
        let mut model = DraftModel::new(Box::new(FakeRunner::new(9, 64, 4)));
        let mut n_costed = |tokens: &[TokenId], n_max| {
            let wish = Wish { id: SequenceId(1), tokens, n_max };
            let drafts = model.propose(&[wish], &mut |_, _, _| Some(3)).unwrap();
            assert_eq!(drafts, [vec![3; n_max]]);
            model.cost().n_guesses
        };
        let tokens = [5; 40];
        assert_eq!(n_costed(&tokens[..20], 3), 2, "the first guess read the prompt");
        assert_eq!(n_costed(&tokens[..22], 3), 3);
        assert_eq!(n_costed(&tokens[..40], 1), 0);
        assert_eq!(n_costed(&tokens[..40], 0), 0);
    }
}
