//! What a rank takes of memory, without allocating it.

use model::{Stage, Trainable};

use crate::exchange::{UNDER_WAY_DIVIDED_MAX, UNDER_WAY_MAX};
use crate::layout::{Layout, Zero};
use crate::optimizer::of_muon;
use crate::{Method, Plan, Result};

/// Bytes of one rank besides activations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RankBytes {
    /// Those that it keeps.
    pub parameters: u64,
    /// Sums of gradients, and partial sums that wait.
    pub gradients: u64,
    pub optimizer: u64,
    /// Parameters and gradients on their way to and from other ranks.
    pub travelling: u64,
    /// The copy of what it writes of a checkpoint.
    pub checkpoint: u64,
    /// Of the first rank: the finished model and its file.
    pub publication: u64,
}

impl RankBytes {
    /// While steps go on, or at the end, whichever is more. `activations` are there all the time, `copy` is what samples
    /// take between steps.
    pub fn most(&self, activations: u64, copy: u64) -> u64 {
        let RankBytes { parameters, gradients, optimizer, travelling, checkpoint, publication } = *self;
        let steps = gradients + travelling + checkpoint + copy;
        parameters + optimizer + activations + steps.max(publication)
    }
}

impl Plan {
    /// What a rank takes of those that have the same part of the same stage, number `data` of `n_data`; a part is that of one
    /// of `n_team` ranks. None of them takes more than the first.
    ///
    /// # Errors
    /// If the plan has no model, or one that so many cannot compute together.
    pub fn rank_bytes(
        &self,
        stage: &Stage,
        [data, n_data]: [usize; 2],
        n_team: usize,
        zero: Zero,
    ) -> Result<RankBytes> {
        let config = self.config()?;
        let of_stage = Trainable::of_stage(&config.part_of(n_team)?, stage);
        let (units, n) = match &self.method {
            Method::Full => (of_stage.units(), of_stage.n_params()),
            Method::Lora { changes, .. } => {
                let n = Trainable::n_trained(&config, Some(changes))?;
                (std::iter::once(0..n).collect(), n)
            }
        };
        // All low-rank changes are matrices.
        let matrices = match &self.method {
            Method::Full => of_muon(self, of_stage.specs()),
            Method::Lora { .. } if self.muon.is_some() => std::iter::once(0..n).collect(),
            Method::Lora { .. } => Vec::new(),
        };
        let layout =
            Layout::of_units(units, n, (zero, [data, n_data]), self.micro_batches).with_muon(&matrices);
        let squared = 4 * layout.n_squared() as u64;
        let is_published = self.publish.is_some() && stage.is_first();
        let bytes = layout.bytes(4 * config.n_params(), is_published).with_neighbors(&of_stage, self, stage);
        Ok(match self.diloco {
            Some(diloco) => {
                bytes.with_workers([4 * n as u64, squared], diloco.workers.div_ceil(n_data) as u64)
            }
            None => bytes,
        })
    }
}

impl RankBytes {
    /// With what a stage sends its neighbours, and the copy of an embedding that is its head.
    fn with_neighbors(self, of_stage: &Trainable, plan: &Plan, stage: &Stage) -> RankBytes {
        if stage.is_first() && stage.is_last() {
            return self;
        }
        let copy = 4 * of_stage.params().n_copied() as u64;
        let rows = 4 * (plan.rows * plan.context * of_stage.config().width) as u64;
        // One each way, and what has come; the copy, its gradient and one that is being sent.
        RankBytes {
            parameters: self.parameters + copy,
            travelling: self.travelling + 4 * rows + 2 * copy,
            ..self
        }
    }

    /// With workers that have parameters and means of their own, besides the run's parameters and its outer momentum. A
    /// vector at a time is written of a checkpoint; all gradients travel at once, where they meet.
    fn with_workers(self, [vector, squared]: [u64; 2], workers: u64) -> RankBytes {
        RankBytes {
            parameters: (1 + workers) * vector,
            optimizer: (1 + workers) * vector + workers * squared,
            travelling: 2 * vector,
            checkpoint: vector,
            ..self
        }
    }
}

impl Layout {
    fn bytes(&self, model_bytes: usize, is_published: bool) -> RankBytes {
        let (n, n_own, zero) = (self.n, self.n_own(), self.zero);
        let n_params = if zero == Zero::Parameters { n_own } else { n };
        let n_grads = if zero >= Zero::Gradients { n_own } else { n };
        let n_squared = self.n_squared();
        let n_written = if zero == Zero::Nothing && self.rank > 0 { 0 } else { 2 * n_own + n_squared };
        // The model as tensors, and as a file; where it is not divided what was trained is there as well.
        let published = if self.rank == 0 && is_published { 2 * model_bytes } else { 0 };
        let bytes = |n: usize| 4 * n as u64;
        RankBytes {
            parameters: bytes(n_params),
            gradients: bytes(self.n_sums() * n_grads),
            optimizer: bytes(n_own + n_squared),
            travelling: bytes(self.n_travelling()),
            checkpoint: bytes(n_written),
            publication: published as u64,
        }
    }

    /// Numbers in buffers: of gradients those that are filled, sent and received; of parameters those of two units, and what
    /// is sent for them. As if all were of the longest at once.
    fn n_travelling(&self) -> usize {
        if self.n_ranks == 1 {
            return 0;
        }
        let longest = |count: usize, of: &dyn Fn(usize) -> usize| {
            let mut lens: Vec<usize> = (0..self.units.len()).map(of).collect();
            lens.sort_unstable_by(|a, b| b.cmp(a));
            lens.into_iter().take(count).sum::<usize>()
        };
        let bucket = |unit: usize| self.units[unit].bucket.end - self.units[unit].range.start;
        let layers = |unit: usize| if unit == 0 { 0 } else { bucket(unit) };
        let gradients = match self.zero >= Zero::Gradients {
            // The first unit's gradients are there all the time where it is the head as well.
            true => bucket(0) + longest(UNDER_WAY_DIVIDED_MAX + 1, &layers),
            false => longest(UNDER_WAY_MAX + 1, &bucket),
        };
        // What has come and was not taken yet; between threads what lies open for the others.
        let coming = longest(2, &bucket);
        let windows = match self.zero {
            Zero::Parameters => {
                let window = |unit: usize| self.units[unit].window.len();
                let most = longest(2, &window);
                most + most / self.n_ranks
            }
            // All parameters are gathered at once after an update.
            Zero::Optimizer | Zero::Gradients => self.n_own(),
            Zero::Nothing => 0,
        };
        // The first unit's travel before they are complete, see early.rs; its open rows are few.
        let early = 2 * bucket(0);
        gradients + coming + windows + early
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(zero: Zero, n_ranks: usize) -> RankBytes {
        let json = r#"{"model_type": "llama", "num_hidden_layers": 12, "hidden_size": 256, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 768, "vocab_size": 512, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true, "max_position_embeddings": 32}"#;
        let trainable = Trainable::new(&model::Config::from_json(json.as_bytes()).unwrap());
        let n = trainable.n_params();
        Layout::of_units(trainable.units(), n, (zero, [0, n_ranks]), 4 * n_ranks).bytes(4 * n, true)
    }

    #[test]
    fn matrices_of_muon_have_no_mean_of_squares() {
        let (n, matrices) = (1000, [10..300, 400..900]);
        let of = |matrices: &[std::ops::Range<usize>]| {
            let units = vec![0..500, 500..n];
            Layout::of_units(units, n, (Zero::Nothing, [0, 1]), 4).with_muon(matrices).bytes(4 * n, false)
        };
        let (plain, muon) = (of(&[]), of(&matrices));
        assert_eq!((plain.optimizer, muon.optimizer), (8000, 4000 + 4 * 210));
        assert_eq!((plain.checkpoint, muon.checkpoint), (12_000, 8000 + 4 * 210));
    }

    #[test]
    fn each_stage_divides_one_thing_more() {
        let whole = bytes(Zero::Parameters, 1);
        assert_eq!(whole, bytes(Zero::Nothing, 1));
        assert_eq!((whole.gradients, whole.optimizer), (3 * whole.parameters, 2 * whole.parameters));
        let [nothing, optimizer, gradients, parameters] =
            [Zero::Nothing, Zero::Optimizer, Zero::Gradients, Zero::Parameters].map(|zero| bytes(zero, 4));
        let quarter = |part: u64, whole: u64| (part as f64 / whole as f64 - 0.25).abs() < 0.05;
        assert_eq!(nothing.optimizer, whole.optimizer);
        assert!(quarter(optimizer.optimizer, whole.optimizer) && optimizer.gradients == whole.gradients);
        assert!(quarter(optimizer.checkpoint, whole.checkpoint));
        assert!(quarter(gradients.gradients, whole.gradients) && gradients.parameters == whole.parameters);
        assert!(quarter(parameters.parameters, whole.parameters));
        let total = |of: RankBytes| of.most(0, 0);
        let totals = [nothing, optimizer, gradients, parameters].map(total);
        assert!(totals.is_sorted_by(|a, b| a > b), "{totals:?}");
    }
}
