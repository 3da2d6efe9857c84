//! How much may join a step beside decoding. Pure: measured times come in as arguments.
//!
//! Every token beside the decoding ones lengthens the step, and every running stream waits for it. The
//! pacer learns what a step of only decoding takes and what else in a step costs ([`Costs`]). Prompts may
//! lengthen a step to [`LIMIT`] times the usual, which is what streams were used to when there was no prompt:
//! their 99th percentile gap is to stay below three times that (docs/decisions/0029), and a prompt gets more than half of the
//! machine. A long prompt needs more: streams grow while it is read, and the slower it is read the longer are the last gaps.
//! So its steps are as long from the start as the last will have to be ([`Costs::evenly`]). Prompts behind another one get
//! more, too: see [`PROMPT_WEIGHT`].
//! Which tokens come out never depends on it.

use std::time::Duration;

use crate::scheduler::{Crowd, Pace};
use crate::speculation::GuessCosts;
use crate::step_cost::{Costs, Extra, Learned, StepWork};

/// Steps beside a prompt, in units of steps without. Three is the limit for 99 of 100; the rest is for what the
/// estimates miss.
const LIMIT: f64 = 2.6;
/// What prompts get in any case, in units of what decoding takes by now: streams that have grown pay for that themselves.
const PROMPT_SHARE_MIN: f64 = 1.0 / 3.0;
/// Running streams that a prompt behind another one counts for: they go on meanwhile, if more slowly, and it stands still.
const PROMPT_WEIGHT: f64 = 4.0;
/// The first guess, before anything was measured.
const PREFILL_TOKENS_GUESS: f64 = 64.0;
/// Share of a new measurement in the estimate.
const SMOOTHING: f64 = 0.2;
/// Share by which the usual time grows with one step at most: a step that was held up is not what streams are used to.
const RISE_MAX: f64 = 0.02;
/// Decoding times are kept for 1, 2, 3-4, 5-8, … sequences.
const N_SIZES: usize = 16;

#[derive(Debug)]
pub(crate) struct Pacer {
    prefill_tokens_max: usize,
    /// Steps that only decode, by the size of their number of sequences.
    decodes: [Option<Decodes>; N_SIZES],
    /// Of what joins a step that decodes, and of each token where nothing decodes.
    beside: Option<Learned>,
    seconds_alone: Option<f64>,
    /// Of guessing one token.
    seconds_per_guess: f64,
}

impl Pacer {
    pub(crate) fn new(prefill_tokens_max: usize) -> Pacer {
        assert!(prefill_tokens_max > 0, "prompts would wait for ever beside decodes");
        Pacer {
            prefill_tokens_max,
            decodes: [None; N_SIZES],
            beside: None,
            seconds_alone: None,
            seconds_per_guess: 0.0,
        }
    }

    /// What prompts may have of the next step if it decodes as well.
    pub(crate) fn pace(&self, crowd: Crowd) -> Pace {
        let n_behind = crowd.n_prompts.saturating_sub(1) as f64;
        let crowding = (PROMPT_WEIGHT * n_behind / crowd.n_decodes.max(1) as f64).max(1.0);
        let known = (self.usual(crowd.n_decodes), self.costs());
        let (Some(usual), Some(costs)) = known else {
            let n_tokens = (PREFILL_TOKENS_GUESS * crowding) as usize;
            return Pace::tokens(n_tokens.min(self.prefill_tokens_max));
        };
        let position = costs.read + costs.pair;
        let now = usual.seconds + position * (crowd.n_read as f64 - usual.n_read).max(0.0);
        let least =
            (PROMPT_SHARE_MIN * now).max(costs.evenly(crowd.longest, position * crowd.n_decodes as f64));
        let seconds = (LIMIT * usual.seconds - now - costs.once).max(least) * crowding;
        Pace { n_tokens: self.prefill_tokens_max, seconds, costs }
    }

    /// What guesses cost beside `n_decodes` sequences; nothing before anything was measured. Before tokens were measured beside
    /// decoding they cost what they do alone: guesses that cost more are few, and show it.
    pub(crate) fn guess_costs(&self, n_decodes: usize) -> GuessCosts {
        let costs = self.beside.as_ref().map(Learned::costs).or(self.seconds_alone.map(Costs::of_tokens));
        let (Some(usual), Some(costs)) = (self.usual(n_decodes), costs) else {
            return GuessCosts::default();
        };
        let n_seen = usual.n_read / usual.n.max(1.0);
        let seconds_each = costs.token + costs.pair * n_seen + self.seconds_per_guess;
        let usual = usual.seconds.max(1e-9);
        GuessCosts { once: costs.once / usual, each: n_decodes as f64 * seconds_each / usual }
    }

    /// A step took `time`.
    pub(crate) fn observe(&mut self, work: &StepWork, time: Duration) {
        let seconds = time.as_secs_f64();
        let n_more = work.n_prompt_tokens as f64;
        if work.n_prompt_tokens == 0 {
            let new = Decodes { n: work.n_decodes as f64, n_read: work.n_read as f64, seconds };
            return self.observe_decodes(new);
        }
        if work.n_decodes == 0 {
            return smooth(&mut self.seconds_alone, seconds / n_more);
        }
        let Some(usual) = self.usual(work.n_decodes) else { return };
        let extra = Extra {
            tokens: n_more,
            read: work.n_read as f64 - usual.n_read,
            pairs: work.n_pairs as f64 - usual.n_read,
        };
        let more = (seconds - usual.seconds).max(0.0);
        match &mut self.beside {
            Some(learned) => learned.learn(&extra, more, usual.seconds),
            None => self.beside = Some(Learned::new(Costs::of_tokens(more / n_more))),
        }
    }

    /// Guessing `n_tokens` took `time`.
    pub(crate) fn observe_guesses(&mut self, n_tokens: usize, time: Duration) {
        if n_tokens > 0 {
            let seconds = time.as_secs_f64() / n_tokens as f64;
            self.seconds_per_guess += (seconds - self.seconds_per_guess) * SMOOTHING;
        }
    }

    /// Before it was measured beside decoding, a token costs twice what one of a large batch takes: small
    /// batches cost more, and the first long prompt must not stall anybody either.
    fn costs(&self) -> Option<Costs> {
        self.beside
            .as_ref()
            .map(Learned::costs)
            .or(self.seconds_alone.map(|seconds| Costs::of_tokens(2.0 * seconds)))
    }

    fn observe_decodes(&mut self, new: Decodes) {
        let old = self.decodes[size(new.n as usize)].get_or_insert(new);
        old.n += (new.n - old.n) * SMOOTHING;
        old.n_read += (new.n_read - old.n_read) * SMOOTHING;
        let change = (new.seconds - old.seconds) * SMOOTHING;
        old.seconds += change.min(RISE_MAX * old.seconds);
    }

    /// A step that only decodes. A number that was not measured lies on the line through the two measured
    /// ones beside it or before it: under load most numbers only ever come together with prompts, and to take
    /// the time of a smaller one would blame the prompts for the difference.
    fn usual(&self, n_decodes: usize) -> Option<Decodes> {
        let n = n_decodes as f64;
        let known = || self.decodes.iter().flatten();
        let below = known().rev().find(|decodes| decodes.n <= n);
        let above = known().find(|decodes| decodes.n >= n);
        match (below, above) {
            (Some(below), Some(above)) => Some(below.line_to(above, n)),
            (None, Some(one)) => Some(one.half_fixed(n)),
            (Some(last), None) => {
                let before = known().rev().nth(1);
                Some(before.map_or_else(|| last.half_fixed(n), |before| before.line_to(last, n)))
            }
            (None, None) => None,
        }
    }
}

/// Steps of about the same number of sequences: means, newer ones weigh more.
#[derive(Clone, Copy, Debug)]
struct Decodes {
    n: f64,
    /// Positions they read, all together.
    n_read: f64,
    seconds: f64,
}

impl Decodes {
    /// At `n`, on the line through this and a larger number. It never falls.
    fn line_to(&self, larger: &Decodes, n: f64) -> Decodes {
        let far = (n - self.n) / (larger.n - self.n).max(1.0);
        let at = |small: f64, large: f64| small + (large - small).max(0.0) * far;
        Decodes { n, n_read: at(self.n_read, larger.n_read), seconds: at(self.seconds, larger.seconds) }
    }

    /// At `n`, if half of the time went into what each step does once.
    fn half_fixed(&self, n: f64) -> Decodes {
        let far = n / self.n;
        Decodes { n, n_read: self.n_read * far, seconds: self.seconds * (1.0 + far) / 2.0 }
    }
}

fn size(n_decodes: usize) -> usize {
    (n_decodes.max(1).next_power_of_two().ilog2() as usize).min(N_SIZES - 1)
}

fn smooth(estimate: &mut Option<f64>, measured: f64) {
    let old = estimate.unwrap_or(measured);
    *estimate = Some(old + (measured - old) * SMOOTHING);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn crowd(n_decodes: usize, n_prompts: usize) -> Crowd {
        Crowd { n_decodes, n_prompts, n_read: 0, longest: [0, 1] }
    }

    /// Tokens of the shortest prompts that the pace allows, at their beginning.
    fn n_tokens(pacer: &Pacer, crowd: Crowd) -> usize {
        let pace = pacer.pace(crowd);
        pace.costs.n_tokens(0, pace.seconds).min(pace.n_tokens)
    }

    fn observe(pacer: &mut Pacer, n_decodes: usize, n_prompt_tokens: usize, time: Duration) {
        pacer.observe(&StepWork { n_decodes, n_prompt_tokens, ..StepWork::default() }, time);
    }

    /// The pacer after many steps on a machine with these costs.
    fn settled(decode_ms: f64, prefill_token_ms: f64) -> Pacer {
        let mut pacer = Pacer::new(256);
        for _ in 0..100 {
            observe(&mut pacer, 8, 0, MS.mul_f64(decode_ms));
            let n_prefill = n_tokens(&pacer, crowd(8, 1)).max(1);
            let time = MS.mul_f64(decode_ms + prefill_token_ms * n_prefill as f64);
            observe(&mut pacer, 8, n_prefill, time);
        }
        pacer
    }

    #[test]
    fn prompts_stretch_a_step_by_a_share() {
        let check = |decode_ms, prefill_token_ms, expected: usize| {
            let n_tokens = n_tokens(&settled(decode_ms, prefill_token_ms), crowd(8, 1));
            assert!(n_tokens.abs_diff(expected) <= 1, "{n_tokens} instead of {expected}");
        };
        check(50.0, 0.5, 160);
        check(20.0, 0.5, 64);
        check(2.0, 10.0, 0);
        check(2.0, 0.001, 256);
    }

    #[test]
    fn many_prompts_beside_few_streams_get_more() {
        let pacer = settled(20.0, 0.5);
        assert!(n_tokens(&pacer, crowd(8, 2)).abs_diff(64) <= 1);
        assert!(n_tokens(&pacer, crowd(8, 7)).abs_diff(192) <= 1);
    }

    #[test]
    fn each_number_of_streams_has_its_own_time() {
        let mut pacer = Pacer::new(1000);
        observe(&mut pacer, 1, 0, 10 * MS);
        observe(&mut pacer, 32, 0, 100 * MS);
        observe(&mut pacer, 0, 100, 100 * MS);
        let n_tokens = [1, 8, 32, 64].map(|n| n_tokens(&pacer, crowd(n, 1)));
        // Eight and 64 were never measured: they lie on the line through one (10 ms) and 32 (100 ms).
        assert_eq!(n_tokens, [8, 24, 80, 154]);
    }

    #[test]
    fn streams_that_grow_leave_less_to_prompts_but_a_share() {
        let mut pacer = settled(20.0, 0.5);
        let costs = Costs { read: 1e-6, pair: 1e-6, ..Costs::of_tokens(0.5e-3) };
        pacer.beside = Some(Learned::new(costs));
        let check = |n_read, expected: f64| {
            let seconds = pacer.pace(Crowd { n_read, ..crowd(8, 1) }).seconds;
            assert!((seconds - expected).abs() < 0.1e-3, "{seconds} instead of {expected}");
        };
        check(0, 32e-3);
        check(3000, 26e-3);
        // 220 ms by now.
        check(100_000, 220e-3 / 3.0);
    }

    #[test]
    fn a_long_prompt_gets_from_the_start_what_its_end_needs() {
        let mut pacer = settled(20.0, 0.5);
        let costs = Costs { read: 1e-6, pair: 1e-6, ..Costs::of_tokens(0.5e-3) };
        pacer.beside = Some(Learned::new(costs));
        let seconds = |end| pacer.pace(Crowd { longest: [0, end], ..crowd(8, 1) }).seconds;
        assert!((seconds(4000) - 32e-3).abs() < 0.1e-3, "{}", seconds(4000));
        assert_eq!(seconds(20_000), costs.evenly([0, 20_000], 16e-6));
        assert!(seconds(20_000) > 60e-3, "{}", seconds(20_000));
    }

    #[test]
    fn a_step_that_was_held_up_is_not_usual() {
        let mut pacer = settled(20.0, 0.5);
        let before = n_tokens(&pacer, crowd(8, 1));
        observe(&mut pacer, 8, 0, 300 * MS);
        assert!(n_tokens(&pacer, crowd(8, 1)).abs_diff(before) <= 2);
    }

    #[test]
    fn the_first_steps_get_a_guess_within_the_limit() {
        assert_eq!(n_tokens(&Pacer::new(256), crowd(1, 1)), PREFILL_TOKENS_GUESS as usize);
        assert_eq!(n_tokens(&Pacer::new(5), crowd(1, 1)), 5);
    }

    #[test]
    fn guesses_pay_where_tokens_are_cheap_beside_decoding() {
        let pacer = settled(20.0, 0.5);
        assert!((pacer.guess_costs(8).each - 0.2).abs() < 0.01);
        // 50 ms, if half of the 20 ms of eight are fixed.
        assert!((pacer.guess_costs(32).each - 0.32).abs() < 0.02);
        assert_eq!(Pacer::new(5).guess_costs(8), GuessCosts::default());
    }
}
