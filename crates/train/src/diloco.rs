//! DiLoCo: how often workers that train by themselves meet, and what they make of it.

use serde::{Deserialize, Serialize};

/// Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models". Every worker takes the
/// plan's steps over its share of their micro-batches, from its own parameters, with its own optimizer. Now and then all
/// meet: the mean of what each has moved is the gradient of one outer step, from whose result all go on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Diloco {
    /// How many: a part of the plan, as the result depends on it. On how many ranks they run is not.
    pub workers: usize,
    /// Steps between two meetings: so many times fewer bytes travel than without.
    pub every_steps: u64,
    /// Of the outer step, SGD with Nesterov's momentum. 1 without momentum is the plain mean.
    pub lr: f32,
    pub momentum: f32,
}

impl Diloco {
    /// What the authors found best for hundreds of meetings; they take 500 steps between two.
    pub const DEFAULT: Diloco = Diloco { workers: 2, every_steps: 100, lr: 0.7, momentum: 0.9 };

    /// The step before which the round of `step` ends.
    pub(crate) fn round_end(&self, step: u64, n_steps: u64) -> u64 {
        ((step / self.every_steps + 1) * self.every_steps).min(n_steps)
    }

    /// The outer step: `g = sums / workers`, `m = momentum · m + g`, `p = p - lr · (g + momentum · m)`, as PyTorch's SGD
    /// takes it. One thread is fast enough for what happens once in hundreds of steps.
    pub(crate) fn outer_step(&self, params: &mut [f32], means: &mut [f32], sums: &[f32]) {
        assert!([means.len(), sums.len()] == [params.len(); 2], "outer step: lengths differ");
        let share = 1.0 / self.workers as f32;
        for ((p, m), sum) in params.iter_mut().zip(means).zip(sums) {
            let g = sum * share;
            *m = self.momentum * *m + g;
            *p -= self.lr * (g + self.momentum * *m);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_step_is_nesterovs() {
        // Two steps of torch.optim.SGD([1.0, -2.0], lr=0.5, momentum=0.5, nesterov=True) with gradients [1, 0.5], [2, -1].
        let diloco = Diloco { workers: 2, every_steps: 3, lr: 0.5, momentum: 0.5 };
        let (mut params, mut means) = ([1.0, -2.0], [0.0; 2]);
        diloco.outer_step(&mut params, &mut means, &[2.0, 1.0]);
        assert_eq!((params, means), ([0.25, -2.375], [1.0, 0.5]));
        diloco.outer_step(&mut params, &mut means, &[4.0, -2.0]);
        assert_eq!((params, means), ([-1.375, -1.6875], [2.5, -0.75]));
    }

    #[test]
    fn rounds_end_with_the_run() {
        let diloco = Diloco { every_steps: 4, ..Diloco::DEFAULT };
        let ends: Vec<u64> = [0, 3, 4, 8, 9].iter().map(|step| diloco.round_end(*step, 10)).collect();
        assert_eq!(ends, [4, 4, 8, 10, 10]);
    }
}
