//! Guessing tokens ahead, so that one step verifies several. Exact: a guess counts only when it is the
//! token that the sequence's own logits and its own random number for that position give, so the output
//! is the same, token for token, at every temperature.

use std::collections::HashMap;
use std::time::Duration;

use crate::draft::{Cost, DraftModel};
use crate::request::TokenId;
use crate::runner::RunnerError;
use crate::sequence::SequenceId;

/// Guesses a sequence may have in one step.
pub const DRAFT_TOKENS_MAX: usize = 32;

/// How tokens are guessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    #[default]
    Off,
    /// What followed the last tokens where they stood before: for answers that quote their prompt.
    PromptLookup {
        /// Guesses in a step and sequence at most.
        k_max: usize,
    },
    /// A smaller model with the same vocabulary, given to [`crate::Engine::start_with_draft`].
    Draft { k_max: usize },
}

impl Speculation {
    pub(crate) fn k_max(self) -> usize {
        match self {
            Speculation::Off => 0,
            Speculation::PromptLookup { k_max } | Speculation::Draft { k_max } => k_max.min(DRAFT_TOKENS_MAX),
        }
    }
}

/// What guesses cost, in units of what a sequence's next token costs without any.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct GuessCosts {
    /// Of a step that verifies any: several columns take another kernel than one.
    pub(crate) once: f64,
    /// Of making and verifying one.
    pub(crate) each: f64,
}

/// A sequence that could use a draft of up to `n_max` tokens.
pub(crate) struct Wish<'a> {
    pub(crate) id: SequenceId,
    pub(crate) tokens: &'a [TokenId],
    pub(crate) n_max: usize,
}

/// Draws what a sequence would choose from a draft's logits, so many tokens after its known ones.
pub(crate) type Draw<'a> = dyn FnMut(SequenceId, usize, &[f32]) -> Option<TokenId> + 'a;

/// Makes drafts, and learns for each sequence how long they are worth making.
pub(crate) struct Speculator {
    k_max: usize,
    model: Option<DraftModel>,
    acceptance: HashMap<SequenceId, Acceptance>,
}

impl Speculator {
    pub(crate) fn new(speculation: Speculation, model: Option<DraftModel>) -> Speculator {
        let needs_model = matches!(speculation, Speculation::Draft { .. });
        assert_eq!(needs_model, model.is_some(), "a draft model is given exactly when it is to be used");
        Speculator { k_max: speculation.k_max(), model, acceptance: HashMap::new() }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.k_max > 0
    }

    /// A draft, maybe empty, for each wish: as long as it pays.
    ///
    /// # Errors
    /// If the draft model fails. From then on nothing is guessed.
    pub(crate) fn propose(
        &mut self,
        wishes: &mut [Wish],
        costs: GuessCosts,
        draw: &mut Draw,
    ) -> Result<Vec<Vec<TokenId>>, RunnerError> {
        for wish in &mut *wishes {
            let acceptance = self.acceptance.entry(wish.id).or_default();
            wish.n_max = acceptance.draft_len(costs, wish.n_max.min(self.k_max), self.model.is_some());
        }
        let Some(model) = &mut self.model else {
            return Ok(wishes.iter().map(|wish| look_up(wish.tokens, wish.n_max)).collect());
        };
        let drafts = model.propose(wishes, draw);
        if drafts.is_err() {
            self.k_max = 0;
        }
        drafts
    }

    /// What guesses took in the last call of `propose`, which made `n_guesses` in `time`.
    pub(crate) fn cost(&self, n_guesses: usize, time: Duration) -> Cost {
        self.model.as_ref().map_or(Cost { n_guesses, time }, DraftModel::cost)
    }

    /// Of a draft's `n_draft` tokens the first `n_accepted` were right.
    pub(crate) fn learn(&mut self, id: SequenceId, n_draft: usize, n_accepted: usize) {
        if let Some(acceptance) = self.acceptance.get_mut(&id) {
            acceptance.learn(n_draft, n_accepted);
        }
    }

    /// The sequence ended or lost its blocks.
    pub(crate) fn forget(&mut self, id: SequenceId) {
        self.acceptance.remove(&id);
        self.model.iter_mut().for_each(|model| model.forget(id));
    }
}

/// How often the guesses at a sequence's tokens are right.
#[derive(Clone, Copy, Debug)]
struct Acceptance {
    /// Smoothed share of verified guesses that were right.
    rate: f64,
    /// Decoding steps so far.
    n_steps: u32,
    /// Guesses that only tried, since drafts were worth it.
    n_probes: u32,
}

/// Steps after which one guess tries whether drafts have become worth it.
const PROBE_EVERY: u32 = 16;
/// Such guesses in vain, after which they become rare. A draft model is asked no more then: it falls behind, and to read what
/// it missed takes longer than the guess.
const PROBES_SOON: u32 = 2;
/// Share of the time that the rare ones may take,
const PROBE_SHARE: f64 = 0.02;
/// and steps after which one is made in any case.
const PROBE_EVERY_MAX: f64 = 64.0;
/// A guess less likely than this costs more than the estimates can tell.
const RATE_MIN: f64 = 0.25;
const SMOOTHING: f64 = 0.1;

impl Default for Acceptance {
    fn default() -> Acceptance {
        Acceptance { rate: 0.7, n_steps: 0, n_probes: 0 }
    }
}

impl Acceptance {
    /// Up to `n_max` guesses. The i-th is right with probability rate^i, so n of them bring Σ rate^i tokens beside the one
    /// that comes anyway: as many are made as bring most tokens in the time.
    fn draft_len(&mut self, costs: GuessCosts, n_max: usize, is_model: bool) -> usize {
        self.n_steps += 1;
        // The first step is plain: it shows what a step without a draft costs.
        if self.n_steps == 1 {
            return 0;
        }
        let (mut right, mut n_tokens, mut best) = (1.0, 1.0, (1.0, 0));
        for n in 1..=n_max {
            right *= self.rate;
            n_tokens += right;
            let speed = n_tokens / (1.0 + costs.once + n as f64 * costs.each);
            if right < RATE_MIN {
                break;
            }
            best = if speed > best.0 { (speed, n) } else { best };
        }
        if best.1 > 0 || n_max == 0 {
            self.n_probes = 0;
            return best.1;
        }
        let later = (costs.once + costs.each) / PROBE_SHARE;
        let probe_every = match self.n_probes {
            0..PROBES_SOON => PROBE_EVERY,
            _ if is_model => return 0,
            _ => later.clamp(f64::from(PROBE_EVERY), PROBE_EVERY_MAX) as u32,
        };
        let is_probe = self.n_steps.is_multiple_of(probe_every);
        self.n_probes += u32::from(is_probe);
        usize::from(is_probe)
    }

    fn learn(&mut self, n_draft: usize, n_accepted: usize) {
        let trials = (0..n_draft.min(n_accepted + 1)).map(|i| f64::from(u8::from(i < n_accepted)));
        trials.for_each(|right| self.rate += (right - self.rate) * SMOOTHING);
    }
}

/// The shortest and the longest ending that is searched for.
const ENDING_MIN: usize = 2;
const ENDING_MAX: usize = 5;
/// Known tokens that are searched: 2^15 comparisons are some 10 µs.
const SEARCHED_MAX: usize = 1 << 15;

/// What followed where the known tokens' ending stood before: of the longest such endings the latest.
fn look_up(tokens: &[TokenId], n_max: usize) -> Vec<TokenId> {
    let tokens = &tokens[tokens.len().saturating_sub(SEARCHED_MAX)..];
    let Some((&last, before)) = tokens.split_last() else { return Vec::new() };
    let mut best = (ENDING_MIN - 1, tokens.len());
    for i in (0..before.len()).rev().filter(|&i| before[i] == last) {
        let pairs = before[..i].iter().rev().zip(before.iter().rev());
        let n_ending = 1 + pairs.take(ENDING_MAX - 1).take_while(|(a, b)| a == b).count();
        if n_ending > best.0 {
            best = (n_ending, i + 1);
        }
        if n_ending == ENDING_MAX {
            break;
        }
    }
    // Past its end the text is taken to repeat itself.
    (best.1..tokens.len()).cycle().take(n_max).map(|i| tokens[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_and_latest_ending_is_continued() {
        let check = |tokens: &[TokenId], n_max, expected: &[TokenId]| {
            assert_eq!(look_up(tokens, n_max), expected, "{tokens:?}");
        };
        check(&[1, 2, 3, 9, 1, 2], 2, &[3, 9]);
        check(&[1, 2, 3, 9, 1, 2], 6, &[3, 9, 1, 2, 3, 9]);
        // One common token is a coincidence.
        check(&[5, 2, 3, 9, 1, 2], 2, &[]);
        // The longer ending wins over the later one, the later one among equals.
        check(&[7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, &[3]);
        check(&[7, 1, 2, 3, 7, 1, 2, 4, 7, 1, 2], 1, &[4]);
        check(&[4, 4, 4, 4, 4, 4, 4], 3, &[4, 4, 4]);
        check(&[1], 3, &[]);
        check(&[], 3, &[]);
    }

    #[test]
    fn drafts_are_as_long_as_they_are_worth() {
        let [free, dear, more] = [0.0, 0.6, 1.5].map(|each| GuessCosts { once: 0.0, each });
        let mut acceptance = Acceptance::default();
        let draft_len = |acceptance: &mut Acceptance, costs| acceptance.draft_len(costs, 64, false);
        assert_eq!(draft_len(&mut acceptance, free), 0, "the first step is plain");
        assert_eq!(draft_len(&mut acceptance, free), 3);
        assert_eq!(acceptance.draft_len(free, 2, false), 2);
        assert_eq!(draft_len(&mut acceptance, dear), 1);
        assert_eq!(draft_len(&mut acceptance, more), 0);
        (0..100).for_each(|_| acceptance.learn(3, 3));
        assert!(draft_len(&mut acceptance, free) > 50);
        (0..100).for_each(|_| acceptance.learn(3, 0));
        // Of 160 steps.
        let n_probes = |costs, is_model| {
            let mut acceptance = Acceptance { rate: 0.1, ..Acceptance::default() };
            (0..160).map(|_| acceptance.draft_len(costs, 8, is_model)).sum::<usize>()
        };
        assert_eq!([n_probes(free, false), n_probes(free, true)], [10, 2]);
        // After 16, 32, 60, 90, 120, 150; after 16, 32, 64, 128.
        assert_eq!([n_probes(dear, false), n_probes(more, false), n_probes(more, true)], [6, 4, 2]);
        (0..20).for_each(|_| acceptance.learn(1, 1));
        assert!(draft_len(&mut acceptance, free) > 3, "{acceptance:?}");
    }

    #[test]
    fn a_step_that_costs_more_once_wants_guesses_that_pay_for_it() {
        let n_guesses = |once| {
            let mut acceptance = Acceptance { rate: 0.8, n_steps: 1, n_probes: 0 };
            acceptance.draft_len(GuessCosts { once, each: 0.3 }, 8, true)
        };
        assert!(n_guesses(0.0) >= 1);
        // Six guesses: 3.95 / 4.8.
        assert_eq!(n_guesses(2.0), 0);
        // Three pay for what one would not: 2.95 / 2.7, 1.8 / 2.1.
        assert!(n_guesses(0.8) > 2);
    }
}
