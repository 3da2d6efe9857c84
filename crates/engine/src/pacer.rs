//! How much may join a step beside decoding. Pure: measured times come in as arguments.
//!
//! Every token beside the decoding ones lengthens the step, and every running stream waits for it. The
//! pacer learns what a step of only decoding takes and what each further token adds. Prompt tokens may
//! lengthen a step by [`STRETCH`] of its own length: a long prompt then leaves running streams at less
//! than three times their usual gap and itself gets more than half of the machine. Prompts behind
//! another one get more: see [`PROMPT_WEIGHT`].
//! Which tokens come out never depends on it.

use std::time::Duration;

use crate::scheduler::Crowd;

/// Time for prompts beside decoding, in units of the decoding. Twice would be the limit of three
/// times the usual gap; the rest is for what the estimates miss.
const STRETCH: f64 = 1.25;
/// Running streams that a prompt behind another one counts for: they go on meanwhile, if more slowly, and it stands still.
const PROMPT_WEIGHT: f64 = 4.0;
/// However slow the machine, a prompt gets on.
const PREFILL_TOKENS_MIN: usize = 1;
/// The first guess, before anything was measured.
const PREFILL_TOKENS_GUESS: f64 = 64.0;
/// Share of a new measurement in the estimate.
const SMOOTHING: f64 = 0.2;
/// Decoding times are kept for 1, 2, 3-4, 5-8, … sequences.
const N_SIZES: usize = 16;

#[derive(Debug)]
pub(crate) struct Pacer {
    prefill_tokens_max: usize,
    /// Steps that only decode, by the size of their number of sequences.
    decodes: [Option<Decodes>; N_SIZES],
    /// Added by each further token to a step that decodes, and of each token where nothing decodes.
    seconds_beside: Option<f64>,
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
            seconds_beside: None,
            seconds_alone: None,
            seconds_per_guess: 0.0,
        }
    }

    /// Prompt tokens the next step may hold if it decodes as well. At least 1.
    pub(crate) fn max_prefill(&self, crowd: Crowd) -> usize {
        let n_behind = crowd.n_prompts.saturating_sub(1) as f64;
        let crowding = (PROMPT_WEIGHT * n_behind / crowd.n_decodes.max(1) as f64).max(1.0);
        let known = (self.decode_time(crowd.n_decodes), self.seconds_per_token());
        // A cast of a float saturates, so a cost of nearly 0 is harmless.
        let n_tokens = match known {
            (Some(decode), Some(per_token)) => (decode * STRETCH * crowding / per_token.max(1e-9)) as usize,
            _ => (PREFILL_TOKENS_GUESS * crowding) as usize,
        };
        n_tokens.max(PREFILL_TOKENS_MIN).min(self.prefill_tokens_max)
    }

    /// How likely a guess must be right so that verifying it gains time: its share of the step's time
    /// against its share of the step's tokens.
    pub(crate) fn acceptance_min(&self, n_decodes: usize) -> f64 {
        let (Some(decode), Some(seconds_per_token)) = (self.decode_time(n_decodes), self.seconds_per_token())
        else {
            return 0.0;
        };
        n_decodes as f64 * (seconds_per_token + self.seconds_per_guess) / decode.max(1e-9)
    }

    /// A step of `n_decodes` sequences with one token each and `n_more` other tokens took `time`.
    pub(crate) fn observe(&mut self, n_decodes: usize, n_more: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        if n_more == 0 {
            return self.observe_decodes(Decodes { n: n_decodes as f64, seconds });
        }
        if n_decodes == 0 {
            return smooth(&mut self.seconds_alone, seconds / n_more as f64);
        }
        if let Some(decode) = self.decode_time(n_decodes) {
            smooth(&mut self.seconds_beside, (seconds - decode).max(0.0) / n_more as f64);
        }
    }

    /// Guessing `n_tokens` took `time`.
    pub(crate) fn observe_guesses(&mut self, n_tokens: usize, time: Duration) {
        if n_tokens > 0 {
            let seconds = time.as_secs_f64() / n_tokens as f64;
            self.seconds_per_guess += (seconds - self.seconds_per_guess) * SMOOTHING;
        }
    }

    /// Before it was measured beside decoding, twice what a token of a large batch takes: small
    /// batches cost more, and the first long prompt must not stall anybody either.
    fn seconds_per_token(&self) -> Option<f64> {
        self.seconds_beside.or(self.seconds_alone.map(|seconds| 2.0 * seconds))
    }

    fn observe_decodes(&mut self, new: Decodes) {
        let old = self.decodes[size(new.n as usize)].get_or_insert(new);
        old.n += (new.n - old.n) * SMOOTHING;
        old.seconds += (new.seconds - old.seconds) * SMOOTHING;
    }

    /// Of a step that only decodes. A number that was not measured lies on the line through the two measured
    /// ones beside it or before it: under load most numbers only ever come together with prompts, and to take
    /// the time of a smaller one would blame the prompts for the difference.
    fn decode_time(&self, n_decodes: usize) -> Option<f64> {
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
    seconds: f64,
}

impl Decodes {
    /// At `n`, on the line through this and a larger number. It never falls.
    fn line_to(&self, larger: &Decodes, n: f64) -> f64 {
        let slope = (larger.seconds - self.seconds) / (larger.n - self.n).max(1.0);
        self.seconds + slope.max(0.0) * (n - self.n)
    }

    /// At `n`, if half of the time went into what each step does once.
    fn half_fixed(&self, n: f64) -> f64 {
        self.seconds * (1.0 + n / self.n) / 2.0
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
        Crowd { n_decodes, n_prompts }
    }

    /// The pacer after many steps on a machine with these costs.
    fn settled(decode_ms: f64, prefill_token_ms: f64) -> Pacer {
        let mut pacer = Pacer::new(256);
        for _ in 0..100 {
            pacer.observe(8, 0, MS.mul_f64(decode_ms));
            let n_prefill = pacer.max_prefill(crowd(8, 1));
            pacer.observe(8, n_prefill, MS.mul_f64(decode_ms + prefill_token_ms * n_prefill as f64));
        }
        pacer
    }

    #[test]
    fn prompts_stretch_a_step_by_a_fixed_share() {
        let check = |decode_ms, prefill_token_ms, expected: usize| {
            let n_tokens = settled(decode_ms, prefill_token_ms).max_prefill(crowd(8, 1));
            assert!(n_tokens.abs_diff(expected) <= 1, "{n_tokens} instead of {expected}");
        };
        check(50.0, 0.5, 125);
        check(20.0, 0.5, 50);
        check(2.0, 10.0, PREFILL_TOKENS_MIN);
        check(2.0, 0.001, 256);
    }

    #[test]
    fn many_prompts_beside_few_streams_get_more() {
        let pacer = settled(20.0, 0.5);
        assert!(pacer.max_prefill(crowd(8, 2)).abs_diff(50) <= 1);
        assert!(pacer.max_prefill(crowd(8, 7)).abs_diff(150) <= 1);
    }

    #[test]
    fn each_number_of_streams_has_its_own_time() {
        let mut pacer = Pacer::new(1000);
        pacer.observe(1, 0, 10 * MS);
        pacer.observe(32, 0, 100 * MS);
        pacer.observe(0, 100, 100 * MS);
        let n_tokens = [1, 8, 32, 64].map(|n| pacer.max_prefill(crowd(n, 1)));
        // Eight and 64 were never measured: they lie on the line through one (10 ms) and 32 (100 ms).
        assert_eq!(n_tokens, [6, 18, 62, 120]);
    }

    #[test]
    fn the_first_steps_get_a_guess_within_the_limit() {
        assert_eq!(Pacer::new(256).max_prefill(crowd(1, 1)), PREFILL_TOKENS_GUESS as usize);
        assert_eq!(Pacer::new(5).max_prefill(crowd(1, 1)), 5);
    }

    #[test]
    fn guesses_pay_where_tokens_are_cheap_beside_decoding() {
        let pacer = settled(20.0, 0.5);
        assert!((pacer.acceptance_min(8) - 0.2).abs() < 0.01);
        // 50 ms, if half of the 20 ms of eight are fixed.
        assert!((pacer.acceptance_min(32) - 0.32).abs() < 0.02);
        assert_eq!(Pacer::new(5).acceptance_min(8), 0.0);
    }
}
