//! Whether a step may change the model: a pure function of its loss, its gradient and the losses before it, so that every
//! rank decides alike and a resumed run decides again as it did.

use serde::{Deserialize, Serialize};

use crate::plan::Guard;

/// Steps whose losses are gathered before one of them can be called a spike.
const STEPS_MIN: u64 = 20;
/// How much of the mean of losses is replaced by a new one: a memory of about 50 steps.
const SHARE: f64 = 0.02;
/// Deviations smaller than this share of the mean are noise, however quiet the last steps were.
const DEVIATION_MIN: f64 = 0.01;

/// What is remembered of the steps so far. Part of every checkpoint: numbers as bits, so that none changes on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Health {
    mean_bits: u64,
    variance_bits: u64,
    n_good: u64,
    /// Steps that changed nothing, in all and since the last good one.
    pub(crate) n_skipped: u64,
    pub(crate) n_skipped_in_a_row: u64,
}

/// Why a step changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wrong {
    LossNotANumber,
    GradientNotANumber,
    LossSpike,
}

impl Wrong {
    pub fn text(self) -> &'static str {
        match self {
            Wrong::LossNotANumber => "its loss is not a number",
            Wrong::GradientNotANumber => "its gradient is not a number",
            Wrong::LossSpike => "its loss is far above the last ones",
        }
    }
}

impl Health {
    /// Judges a step, and remembers it.
    pub(crate) fn judge(&mut self, loss: f64, grad_norm: f64, guard: Guard) -> Option<Wrong> {
        let wrong = match () {
            _ if !loss.is_finite() => Some(Wrong::LossNotANumber),
            _ if !grad_norm.is_finite() => Some(Wrong::GradientNotANumber),
            _ if self.is_spike(loss, guard) => Some(Wrong::LossSpike),
            _ => None,
        };
        if wrong.is_some() {
            self.n_skipped += 1;
            self.n_skipped_in_a_row += 1;
        } else {
            self.n_skipped_in_a_row = 0;
            self.remember(loss);
        }
        wrong
    }

    fn is_spike(&self, loss: f64, guard: Guard) -> bool {
        let Some(sigmas) = guard.spike_sigmas.filter(|_| self.n_good >= STEPS_MIN) else { return false };
        let mean = f64::from_bits(self.mean_bits);
        let deviation = f64::from_bits(self.variance_bits).sqrt().max(DEVIATION_MIN * mean.abs());
        loss > mean + f64::from(sigmas) * deviation
    }

    fn remember(&mut self, loss: f64) {
        // The first losses are averaged evenly, later ones by a fixed share.
        let share = (1.0 / (self.n_good + 1) as f64).max(SHARE);
        let (mean, variance) = (f64::from_bits(self.mean_bits), f64::from_bits(self.variance_bits));
        let from_mean = loss - mean;
        self.mean_bits = (mean + share * from_mean).to_bits();
        self.variance_bits = ((1.0 - share) * (variance + share * from_mean * from_mean)).to_bits();
        self.n_good += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUARD: Guard = Guard { skips_max: 3, spike_sigmas: Some(6.0) };

    fn after_good_steps(n: u64) -> Health {
        let mut health = Health::default();
        for i in 0..n {
            assert_eq!(health.judge(4.0 + 0.1 * (i % 3) as f64, 1.0, GUARD), None, "step {i}");
        }
        health
    }

    #[test]
    fn what_is_no_number_is_always_wrong() {
        for (loss, norm, expected) in [
            (f64::NAN, 1.0, Wrong::LossNotANumber),
            (f64::INFINITY, f64::NAN, Wrong::LossNotANumber),
            (4.0, f64::INFINITY, Wrong::GradientNotANumber),
        ] {
            let mut health = Health::default();
            assert_eq!(health.judge(loss, norm, Guard::default()), Some(expected));
            assert_eq!((health.n_skipped, health.n_skipped_in_a_row, health.n_good), (1, 1, 0));
        }
    }

    #[test]
    fn spikes_are_wrong_once_losses_are_known() {
        assert_eq!(after_good_steps(5).judge(40.0, 1.0, GUARD), None);
        let mut health = after_good_steps(30);
        assert_eq!(health.judge(9.0, 1.0, Guard { spike_sigmas: None, ..GUARD }), None);
        let mut health = after_good_steps(30);
        assert_eq!(health.judge(4.4, 1.0, GUARD), None);
        assert_eq!(health.judge(9.0, 1.0, GUARD), Some(Wrong::LossSpike));
        assert_eq!(health.judge(9.0, 1.0, GUARD), Some(Wrong::LossSpike), "a spike does not become the rule");
        assert_eq!((health.n_skipped, health.n_skipped_in_a_row), (2, 2));
        assert_eq!(health.judge(4.1, 1.0, GUARD), None);
        assert_eq!((health.n_skipped, health.n_skipped_in_a_row), (2, 0));
        // A loss that falls is never one.
        assert_eq!(health.judge(0.1, 1.0, GUARD), None);
    }

    #[test]
    fn it_reads_back_to_the_bit() {
        let health = after_good_steps(37);
        let json = serde_json::to_string(&health).unwrap();
        assert_eq!(serde_json::from_str::<Health>(&json).unwrap(), health);
        assert_eq!(serde_json::from_str::<Health>("{}").unwrap(), Health::default());
    }
}
