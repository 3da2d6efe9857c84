//! What a step computes, and what that is reckoned to take: learned from measured steps.

use crate::scheduler::Plan;

/// What one step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepWork {
    /// Sequences that get their next token.
    pub n_decodes: usize,
    /// Tokens of prompts, and guesses.
    pub n_prompt_tokens: usize,
    /// Positions whose keys and values are read, of all sequences together.
    pub n_read: usize,
    /// Pairs of a token and a position that it sees.
    pub n_pairs: usize,
}

impl StepWork {
    pub(crate) fn of(plan: &Plan) -> StepWork {
        let mut work = StepWork { n_decodes: plan.n_decodes, ..StepWork::default() };
        let mut n_tokens = 0;
        for row in &plan.rows {
            n_tokens += row.n_tokens;
            work.n_read += row.start + row.n_tokens;
            work.n_pairs += row.n_tokens * row.start + row.n_tokens * (row.n_tokens + 1) / 2;
        }
        work.n_prompt_tokens = n_tokens - plan.n_decodes;
        work
    }
}

/// Seconds for what a step holds beside its decodes. A row of a prompt costs once what it takes to read the keys and
/// values before it, and for each token its way through the weights and all that it sees: the deeper a prompt, the fewer
/// tokens fit into a step, and the less it pays to come back for a single one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Costs {
    /// Of a step that holds any of it. What a prompt reads displaces weights in the caches, so decoding takes longer beside
    /// it; a third longer was measured. Put down to tokens, this made prompts get one a step where ten fit.
    pub(crate) once: f64,
    /// Of a token.
    pub(crate) token: f64,
    /// Of reading a position, once for all tokens of a row.
    pub(crate) read: f64,
    /// Of a token that sees a position.
    pub(crate) pair: f64,
}

/// What a step held beside decodes like those that were measured alone. Less is read where sequences are shorter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extra {
    pub(crate) tokens: f64,
    pub(crate) read: f64,
    pub(crate) pairs: f64,
}

/// Tokens that a step's own cost weighs like, and positions to read, and pairs, that weigh like a token, where a measurement
/// does not tell them apart. Of the size that they have in models of a hundred million parameters; what is learned does not
/// depend on them, only how soon.
const ONCE_TOKENS: f64 = 4.0;
const READ_PER_TOKEN: f64 = 2048.0;
const PAIRS_PER_TOKEN: f64 = 4096.0;

impl Extra {
    /// Everything in units that weigh like a token.
    fn in_tokens(&self) -> [f64; N_COSTS] {
        [ONCE_TOKENS, self.tokens, self.read / READ_PER_TOKEN, self.pairs / PAIRS_PER_TOKEN]
    }
}

impl Costs {
    pub(crate) fn of_tokens(token: f64) -> Costs {
        Costs { token, ..Costs::default() }
    }

    /// Of reading what is before position `start`.
    pub(crate) fn reading(&self, start: usize) -> f64 {
        self.read * start as f64
    }

    /// Of `n_tokens` from position `start` on, when what is before them is read anyway.
    pub(crate) fn tokens(&self, start: usize, n_tokens: usize) -> f64 {
        let n = n_tokens as f64;
        n * (self.token + self.pair * (start as f64 + n / 2.0))
    }

    /// How many tokens from `start` on take so many seconds: the inverse of [`Costs::tokens`].
    pub(crate) fn n_tokens(&self, start: usize, seconds: f64) -> usize {
        if seconds <= 0.0 {
            return 0;
        }
        let each = self.token + self.pair * start as f64;
        let root = (each * each + 2.0 * self.pair * seconds).sqrt();
        // A cast of a float saturates, so a cost of nearly 0 is harmless.
        (2.0 * seconds / (each + root).max(1e-12)) as usize
    }

    /// How much longer than decoding takes now steps must be that read a prompt's positions `start..end`, if all of them are
    /// to be as long and decoding takes `growth` seconds longer from each to the next: in any other way the longest is longer.
    ///
    /// Of T such steps the last is `growth · T` longer than now, reads all positions, and has room for a token. The others
    /// have as much for tokens as decodes will still grow by, and as is not yet there to be read. So
    /// `what the tokens cost = T · (growth · T / 2 + spare)`, which gives T.
    pub(crate) fn evenly(&self, [start, end]: [usize; 2], growth: f64) -> f64 {
        let n_seen = end as f64;
        // In the mean of all steps, of which most are near the end.
        let n_seen_mean = (start + 2 * end) as f64 / 3.0;
        let last = self.token + self.pair * n_seen;
        // Tokens are whole: of half a one the time remains.
        let unused = (self.token + self.pair * n_seen_mean) / 2.0;
        let spare = self.read * (n_seen - n_seen_mean) + last - unused;
        let tokens = self.tokens(start, end - start);
        let root = (spare * spare + 2.0 * growth * tokens).sqrt();
        let n_steps = 2.0 * tokens / (spare + root).max(1e-12);
        growth * n_steps + self.read * n_seen + last
    }

    #[cfg(test)]
    fn seconds(&self, extra: &Extra) -> f64 {
        dot(&self.in_tokens(), &extra.in_tokens())
    }

    /// Each for as much of it as weighs like a token.
    fn in_tokens(&self) -> [f64; N_COSTS] {
        [self.once / ONCE_TOKENS, self.token, self.read * READ_PER_TOKEN, self.pair * PAIRS_PER_TOKEN]
    }

    fn of([once, token, read, pair]: [f64; N_COSTS]) -> Costs {
        Costs { once: once * ONCE_TOKENS, token, read: read / READ_PER_TOKEN, pair: pair / PAIRS_PER_TOKEN }
    }
}

/// Costs that are learned while they change, by Kalman's filter (1960): a step tells their sum, and which of them was wrong
/// is told by how steps differed before. To correct all in the proportion in which they were used is simpler and was not
/// enough: while a prompt gets one token a step, what the step itself costs looks like the token's, and it never gets two.
#[derive(Clone, Debug)]
pub(crate) struct Learned {
    /// As [`Costs::in_tokens`]. One that is nearly nothing may be below 0 for a while: to keep it from that would push the
    /// others, step by step.
    estimate: [f64; N_COSTS],
    /// Covariance of what may be wrong with each of them, over that of one measurement.
    doubt: [[f64; N_COSTS]; N_COSTS],
}

const N_COSTS: usize = 4;
/// Doubt in costs before anything was learned, and how much of it each step adds.
const DOUBT_FIRST: f64 = 0.1;
const DOUBT_MORE: f64 = 3e-6;

impl Learned {
    pub(crate) fn new(costs: Costs) -> Learned {
        let mut learned = Learned { estimate: costs.in_tokens(), doubt: [[0.0; N_COSTS]; N_COSTS] };
        learned.doubt_more(DOUBT_FIRST);
        learned
    }

    pub(crate) fn costs(&self) -> Costs {
        Costs::of(self.estimate.map(|cost| cost.max(0.0)))
    }

    /// `extra` took so many seconds. What differs by more than `most` was held up by something else.
    pub(crate) fn learn(&mut self, extra: &Extra, seconds: f64, most: f64) {
        self.doubt_more(DOUBT_MORE);
        let used = extra.in_tokens();
        let doubt_of_sum = self.doubt.map(|row| dot(&row, &used));
        let share = 1.0 / (1.0 + dot(&doubt_of_sum, &used));
        let wrong = (seconds - dot(&self.estimate, &used)).clamp(-most, most);
        for i in 0..N_COSTS {
            self.estimate[i] += share * wrong * doubt_of_sum[i];
            for j in 0..N_COSTS {
                self.doubt[i][j] -= share * doubt_of_sum[i] * doubt_of_sum[j];
            }
        }
    }

    fn doubt_more(&mut self, more: f64) {
        (0..N_COSTS).for_each(|i| self.doubt[i][i] += more);
    }
}

fn dot(a: &[f64; N_COSTS], b: &[f64; N_COSTS]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    const TRUE: Costs = Costs { once: 3e-3, token: 0.8e-3, read: 0.4e-6, pair: 0.25e-6 };

    #[test]
    fn as_many_tokens_fit_as_the_time_pays_for() {
        for start in [0, 1, 500, 8000, 100_000] {
            for n_tokens in [1, 2, 17, 512] {
                let seconds = TRUE.tokens(start, n_tokens);
                assert_eq!(TRUE.n_tokens(start, seconds * 1.0001), n_tokens);
                assert_eq!(TRUE.n_tokens(start, seconds * 0.9999), n_tokens - 1);
            }
        }
        assert_eq!(TRUE.n_tokens(100, -1.0), 0);
        assert_eq!(Costs::default().n_tokens(100, f64::MAX), usize::MAX);
    }

    /// The longest step beside a prompt, in which each may be `most(start)` longer than decoding has become.
    fn longest(n_prompt: usize, growth: f64, most: &dyn Fn(usize, f64) -> f64) -> f64 {
        let (mut start, mut grown, mut longest) = (0, 0.0, 0.0f64);
        while start < n_prompt {
            let most = most(start, grown);
            let n = TRUE.n_tokens(start, most - TRUE.reading(start)).clamp(1, n_prompt - start);
            longest = longest.max(grown + TRUE.reading(start) + TRUE.tokens(start, n));
            (start, grown) = (start + n, grown + growth);
        }
        longest
    }

    #[test]
    fn even_steps_are_the_shortest() {
        for (n_prompt, n_streams) in [(4000, 1.0), (8000, 8.0), (8000, 32.0), (30_000, 8.0)] {
            let growth = n_streams * (TRUE.read + TRUE.pair);
            let even = TRUE.evenly([0, n_prompt], growth);
            let found = longest(n_prompt, growth, &|start, _| TRUE.evenly([start, n_prompt], growth));
            let constants = (80..120).map(|percent| 0.01 * percent as f64 * even);
            let best = constants.map(|length| longest(n_prompt, growth, &|_, grown| length - grown));
            let best = best.fold(f64::INFINITY, f64::min);
            assert!(found < 1.03 * best, "{found} s, {best} s if all are as long");
            assert!((even / best - 1.0).abs() < 0.05, "{even} s reckoned, {best} s needed");
        }
    }

    #[test]
    fn costs_are_learned_from_steps_of_every_kind() {
        for seed in 0..20 {
            let mut learned = Learned::new(Costs::of_tokens(2e-3));
            for i in 0..3000 {
                let [start, n] = [0, 1].map(|j| uniform(seed, 3 * i + j));
                let (start, tokens) = (start * 8000.0, (n * n * 64.0).ceil());
                let extra = Extra { tokens, read: start + tokens, pairs: tokens * start };
                let noise = 0.9 + 0.2 * uniform(seed, 3 * i + 2);
                learned.learn(&extra, TRUE.seconds(&extra) * noise, 0.012);
            }
            let costs = learned.costs();
            for (found, expected) in
                [costs.token, costs.read, costs.pair].iter().zip([TRUE.token, TRUE.read, TRUE.pair])
            {
                assert!((found / expected - 1.0).abs() < 0.35, "seed {seed}: {costs:?}");
            }
        }
    }

    /// As many tokens as seem to fit: from steps of one kind alone nobody learns which cost is which.
    #[test]
    fn a_prompt_that_gets_few_tokens_learns_that_more_fit() {
        let mut learned = Learned::new(Costs::of_tokens(4e-3));
        let (mut start, most) = (0, 0.02);
        for i in 0..2000 {
            let costs = learned.costs();
            let n = costs.n_tokens(start, most - costs.once - costs.reading(start)).clamp(1, 64);
            let (tokens, position) = (n as f64, start as f64);
            let extra = Extra { tokens, read: position + tokens, pairs: tokens * (position + tokens / 2.0) };
            let noise = 0.95 + 0.1 * uniform(1, i);
            learned.learn(&extra, TRUE.seconds(&extra) * noise, 0.012);
            start = (start + n).min(8000);
        }
        let [found, fit] = [learned.costs(), TRUE]
            .map(|costs| costs.n_tokens(8000, most - costs.once - costs.reading(8000)));
        assert!(fit >= 4 && found.abs_diff(fit) <= 1, "{found} tokens where {fit} fit: {learned:?}");
    }

    #[test]
    fn one_step_that_was_held_up_changes_little() {
        let mut learned = Learned::new(TRUE);
        let extra = Extra { tokens: 4.0, read: 8000.0, pairs: 32_000.0 };
        let usual = TRUE.seconds(&extra);
        (0..100).for_each(|_| learned.learn(&extra, usual, 0.012));
        learned.learn(&extra, 0.24, 0.012);
        assert!(learned.costs().seconds(&extra) < usual + 0.0025, "{learned:?}");
    }
}
