//! How many prompt tokens may join a step that also decodes. Pure: measured times come in as arguments.
//!
//! Prompt tokens lengthen the step, and every running stream waits for it. The pacer learns what a
//! prompt token costs beside decoding and lets in as many as double the step at most, or fill
//! `prefill_time_min`, whichever is more: streams so quick that nobody sees the difference need not
//! hold prompts up. Which tokens come out never depends on it.

use std::time::Duration;

/// Fewer tokens than this would read all weights for next to nothing.
const PREFILL_TOKENS_MIN: usize = 16;
/// The first guess, before anything was measured.
const PREFILL_TOKENS_GUESS: usize = 64;
/// Share of a new measurement in the estimate.
const SMOOTHING: f64 = 0.2;

#[derive(Debug)]
pub(crate) struct Pacer {
    prefill_tokens_max: usize,
    prefill_time_min: Duration,
    /// Of a step that only decodes.
    decode_seconds: Option<f64>,
    /// Added to a step by each prompt token.
    seconds_per_prefill_token: Option<f64>,
}

impl Pacer {
    pub(crate) fn new(prefill_tokens_max: usize, prefill_time_min: Duration) -> Pacer {
        assert!(prefill_tokens_max > 0, "prompts would wait for ever beside decodes");
        Pacer { prefill_tokens_max, prefill_time_min, decode_seconds: None, seconds_per_prefill_token: None }
    }

    /// Prompt tokens the next step may hold if it decodes as well. At least 1.
    pub(crate) fn max_prefill_beside_decode(&self) -> usize {
        let n_tokens = match self.seconds_per_prefill_token {
            Some(seconds_per_token) => {
                let decode_seconds = self.decode_seconds.unwrap_or(0.0);
                let seconds = decode_seconds.max(self.prefill_time_min.as_secs_f64());
                // A cast of a float saturates, so a cost of nearly 0 is harmless.
                (seconds / seconds_per_token.max(1e-9)) as usize
            }
            None => PREFILL_TOKENS_GUESS,
        };
        n_tokens.max(PREFILL_TOKENS_MIN).min(self.prefill_tokens_max)
    }

    /// A step of `n_decodes` sequences with one token each and `n_prefill` prompt tokens took `time`.
    pub(crate) fn observe(&mut self, n_decodes: usize, n_prefill: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        if n_prefill == 0 {
            smooth(&mut self.decode_seconds, seconds);
            return;
        }
        let shared = if n_decodes > 0 { self.decode_seconds.unwrap_or(0.0) } else { 0.0 };
        smooth(&mut self.seconds_per_prefill_token, (seconds - shared).max(0.0) / n_prefill as f64);
    }
}

fn smooth(estimate: &mut Option<f64>, measured: f64) {
    let old = estimate.unwrap_or(measured);
    *estimate = Some(old + (measured - old) * SMOOTHING);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// The pacer after many steps on a machine with these costs.
    fn settled(decode_ms: f64, prefill_token_ms: f64) -> Pacer {
        let mut pacer = Pacer::new(256, 20 * MS);
        for _ in 0..100 {
            pacer.observe(8, 0, MS.mul_f64(decode_ms));
            let n_prefill = pacer.max_prefill_beside_decode();
            pacer.observe(8, n_prefill, MS.mul_f64(decode_ms + prefill_token_ms * n_prefill as f64));
        }
        pacer
    }

    #[test]
    fn prompts_double_a_step_or_fill_the_time_nobody_sees() {
        let check = |decode_ms, prefill_token_ms, expected: usize| {
            let n_tokens = settled(decode_ms, prefill_token_ms).max_prefill_beside_decode();
            assert!(n_tokens.abs_diff(expected) <= 1, "{n_tokens} instead of {expected}");
        };
        check(50.0, 0.5, 100);
        check(2.0, 0.5, 40);
        check(2.0, 10.0, PREFILL_TOKENS_MIN);
        check(2.0, 0.001, 256);
    }

    #[test]
    fn the_first_steps_get_a_guess_within_the_limit() {
        assert_eq!(Pacer::new(256, MS).max_prefill_beside_decode(), PREFILL_TOKENS_GUESS);
        assert_eq!(Pacer::new(5, MS).max_prefill_beside_decode(), 5);
    }
}
