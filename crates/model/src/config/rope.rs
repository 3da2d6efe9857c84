//! [`Rope`]: how fast every pair of a head turns from one position to the next.

use std::f64::consts::TAU;

use tensor::rope::RopeTable;

use super::{CONTEXT_MAX, Config, HEAD_WIDTH_MAX, Result, out_of_range, within, within_open};

/// Factors beyond this would make positions indistinguishable in f32.
const FACTOR_MAX: f64 = 65_536.0;

/// Rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair i turns by `theta^(-2i/d)` a position (rotate-half order, Hugging Face's).
    pub theta: f32,
    /// How the frequencies were changed for longer contexts.
    pub scaling: RopeScaling,
}

/// The variants that published models use, by their Hugging Face names.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    None,
    /// All divided by `factor`.
    Linear {
        /// By what the context is stretched.
        factor: f32,
    },
    /// Slow pairs divided by `factor`, fast ones kept, smoothly in between (Llama 3.1).
    Llama3 {
        /// By what the context is stretched.
        factor: f32,
        /// Pairs that turn less often than this within the original context are slow.
        low_freq_factor: f32,
        /// Pairs that turn more often than this are fast.
        high_freq_factor: f32,
        /// Positions of the first training.
        original_context: usize,
    },
    /// As Llama 3's, but linear in the pair's index, and with sharper scores (Peng et al. 2023).
    Yarn {
        /// By what the context is stretched.
        factor: f32,
        /// Positions of the first training.
        original_context: usize,
        /// Turns within the original context from which a pair is fast.
        beta_fast: f32,
        /// Turns up to which a pair is slow.
        beta_slow: f32,
        /// Factor of rotated queries and keys.
        attention_factor: f32,
    },
    /// A divisor for each pair ("longrope" with one list; the tensor `rope_freqs` of GGUF files).
    Divisors(Vec<f32>),
}

impl Config {
    /// Angles of layers without and with a window, for `n` positions; `None` where positions are learned, or windows have
    /// no frequencies of their own.
    pub(crate) fn rope_tables(&self, n: usize) -> [Option<RopeTable>; 2] {
        let table = |rope: &Rope| rope.table(n, self.head_width);
        let local = self.window.as_ref().and_then(|window| window.rope_theta).map(Rope::plain);
        [self.block().rotary.then(|| table(&self.rope)), local.as_ref().map(table)]
    }

    /// Which of them layer `l` uses.
    pub(crate) fn rope_idx(&self, l: usize) -> usize {
        let local = self.window.as_ref().is_some_and(|window| window.rope_theta.is_some());
        usize::from(local && self.window_of(l).is_some())
    }
}

impl Rope {
    /// Unscaled.
    pub fn plain(theta: f32) -> Self {
        Self { theta, scaling: RopeScaling::None }
    }

    /// Angles for positions `0..n_positions` of heads `d` wide.
    pub fn table(&self, n_positions: usize, d: usize) -> RopeTable {
        RopeTable::from_frequencies(n_positions, &self.frequencies(d), self.attention_factor())
    }

    /// Radians a position for each of the d/2 pairs.
    pub fn frequencies(&self, d: usize) -> Vec<f64> {
        let plain = |i: usize| f64::from(self.theta).powf(-2.0 * i as f64 / d as f64);
        (0..d / 2).map(|i| plain(i) * self.kept(plain(i), i, d)).collect()
    }

    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor.into(),
            _ => 1.0,
        }
    }

    /// The share of a pair's plain frequency that scaling leaves.
    fn kept(&self, frequency: f64, i: usize, d: usize) -> f64 {
        // `fast` is 1 for a pair that is kept, 0 for one that is divided.
        let mix = |factor: f32, fast: f64| fast + (1.0 - fast) / f64::from(factor);
        match &self.scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear { factor } => 1.0 / f64::from(*factor),
            RopeScaling::Divisors(divisors) => 1.0 / f64::from(divisors[i]),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let turns = original_context as f64 * frequency / TAU;
                let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
                mix(factor, ((turns - low) / (high - low)).clamp(0.0, 1.0))
            }
            &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
                // Index of the pair that turns so often within the original context.
                let index = |turns: f32| {
                    let ratio = original_context as f64 / (f64::from(turns) * TAU);
                    d as f64 * ratio.ln() / (2.0 * f64::from(self.theta).ln())
                };
                let low = index(beta_fast).floor().max(0.0);
                let high = index(beta_slow).ceil().min(d as f64 - 1.0);
                // Both ends on one index: the step is made steep instead of dividing by zero.
                let width = if high == low { 0.001 } else { high - low };
                mix(factor, 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0))
            }
        }
    }

    pub(super) fn check(&self, d: usize) -> Result<()> {
        within_open("rope_theta", self.theta.into(), 1e30)?;
        let factor_within = |factor: f32| within_open("rope_scaling factor", factor.into(), FACTOR_MAX);
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => factor_within(*factor),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                factor_within(factor)?;
                within("rope_scaling original_max_position_embeddings", original_context, CONTEXT_MAX)?;
                within_open("rope_scaling high_freq_factor", high_freq_factor.into(), FACTOR_MAX)?;
                within_open("rope_scaling low_freq_factor", low_freq_factor.into(), high_freq_factor.into())
            }
            &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
                factor_within(factor)?;
                within("rope_scaling original_max_position_embeddings", original_context, CONTEXT_MAX)?;
                within_open("rope_scaling beta_fast", beta_fast.into(), FACTOR_MAX)?;
                within_open("rope_scaling beta_slow", beta_slow.into(), FACTOR_MAX)?;
                within_open("rope_scaling attention_factor", attention_factor.into(), FACTOR_MAX)?;
                match self.theta > 1.0 {
                    true => Ok(()),
                    false => Err(out_of_range("rope_theta", self.theta, "above 1 for yarn")),
                }
            }
            RopeScaling::Divisors(divisors) => {
                if divisors.len() != d / 2 || d > HEAD_WIDTH_MAX {
                    let allowed = format!("{} numbers, half a head", d / 2);
                    return Err(out_of_range("rope_scaling factors", divisors.len(), allowed));
                }
                divisors.iter().try_for_each(|x| factor_within(*x))
            }
        }
    }
}

/// YaRN's factor of rotated queries and keys when a model does not name one.
pub(crate) fn yarn_attention_factor(factor: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}
