//! The learning rate as a pure function of the step.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine from the peak to the floor (Loshchilov and Hutter 2016, SGDR, without restarts).
    Cosine,
    /// Warm-up, stable, decay: constant, then linear to the floor over the last fifth of the steps
    /// (Hu et al. 2024, MiniCPM).
    Wsd,
    /// Straight from the peak to the floor.
    Linear,
    /// Constant at the peak.
    Constant,
}

/// Share of the steps that the WSD schedule spends falling.
const WSD_DECAY_SHARE: f64 = 0.2;

/// The learning-rate schedule of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub decay: Decay,
    pub lr_peak: f32,
    /// The floor, as a share of the peak.
    pub lr_final_share: f32,
    pub warmup_steps: u64,
}

impl Schedule {
    /// Learning rate of step `step` (the first is 0) out of `n_steps`.
    pub fn lr(&self, step: u64, n_steps: u64) -> f32 {
        (f64::from(self.lr_peak) * self.share(step, n_steps)) as f32
    }

    /// The same as a share of the peak.
    pub fn share(&self, step: u64, n_steps: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let falling_steps = n_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / falling_steps).min(1.0);
        let height = match self.decay {
            Decay::Cosine => 0.5 + 0.5 * (std::f64::consts::PI * progress).cos(),
            Decay::Wsd => ((1.0 - progress) / WSD_DECAY_SHARE).min(1.0),
            Decay::Linear => 1.0 - progress,
            Decay::Constant => 1.0,
        };
        let floor_share = f64::from(self.lr_final_share);
        floor_share + (1.0 - floor_share) * height
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(decay: Decay, step: u64, expected: f32) {
        let schedule = Schedule { decay, lr_peak: 1.0, lr_final_share: 0.1, warmup_steps: 10 };
        let lr = schedule.lr(step, 110);
        assert!((lr - expected).abs() < 1e-6, "{decay:?} step {step}: {lr}, expected {expected}");
    }

    #[test]
    fn warms_up_then_falls() {
        for decay in [Decay::Cosine, Decay::Wsd, Decay::Linear, Decay::Constant] {
            check(decay, 0, 0.1);
            check(decay, 9, 1.0);
            check(decay, 10, 1.0);
        }
        check(Decay::Cosine, 60, 0.55);
        check(Decay::Cosine, 110, 0.1);
        check(Decay::Wsd, 60, 1.0);
        check(Decay::Wsd, 100, 0.55);
        check(Decay::Wsd, 110, 0.1);
        check(Decay::Linear, 60, 0.55);
        check(Decay::Linear, 85, 0.325);
        check(Decay::Linear, 110, 0.1);
        check(Decay::Constant, 110, 1.0);
    }

    #[test]
    fn no_warm_up_and_one_step_are_fine() {
        let schedule = Schedule { decay: Decay::Cosine, lr_peak: 2.0, lr_final_share: 0.0, warmup_steps: 0 };
        assert_eq!(schedule.lr(0, 1), 2.0);
        assert_eq!(schedule.lr(5, 0), 0.0);
    }
}
