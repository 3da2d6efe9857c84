//! What the model writes as it learns: a continuation of the plan's prompt, through the same cached forward that
//! serves it later.

use model::{KvType, Scratch, StepInput, Transformer, Weights};
use tensor::Pool;
use tokenizer::Tokenizer;

use crate::{Plan, Result};

/// Plain sampling is enough to see what has been learned: temperature 0.8 over all ids.
const TEMPERATURE: f32 = 0.8;

pub(crate) struct Sampler {
    prompt: Vec<u32>,
    n_tokens: usize,
    seed: u64,
    tokenizer: Tokenizer,
    context_max: usize,
}

impl Sampler {
    pub(crate) fn new(plan: &Plan, tokenizer: Tokenizer) -> Result<Sampler> {
        let mut prompt = tokenizer.encode(&plan.sample.prompt);
        if prompt.is_empty() {
            prompt.extend(tokenizer.eos());
        }
        prompt.truncate(plan.context);
        let n_tokens = plan.sample.n_tokens;
        Ok(Sampler { prompt, n_tokens, seed: plan.seed, tokenizer, context_max: plan.context })
    }

    /// The prompt and what the model adds to it. A pure function of the weights and the step.
    pub(crate) fn continue_prompt(&self, pool: &Pool, weights: Weights, step: u64) -> Result<String> {
        let transformer = Transformer::new(weights, pool)?;
        let n_blocks = self.context_max.div_ceil(model::BLOCK_TOKENS);
        let mut kv = transformer.new_kv(n_blocks, KvType::F32);
        let blocks: Vec<u32> = (0..n_blocks as u32).collect();
        let (mut scratch, mut logits_rv, mut input) = (Scratch::default(), Vec::new(), StepInput::default());
        let mut random = Random(self.seed ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut ids = self.prompt.clone();
        let mut n_cached = 0;
        while ids.len() < (self.prompt.len() + self.n_tokens).min(self.context_max) {
            input.clear();
            input.push_row(&ids[n_cached..], n_cached, &blocks, 1);
            transformer.forward(pool, &input, &mut kv, &mut scratch, &mut logits_rv)?;
            n_cached = ids.len();
            let id = draw(&logits_rv, random.next());
            if Some(id) == self.tokenizer.eos() {
                break;
            }
            ids.push(id);
        }
        Ok(self.tokenizer.decode(&ids))
    }
}

/// The id at `uniform` (in [0, 1)) of the cumulative distribution of the tempered logits.
fn draw(logits_v: &[f32], uniform: f64) -> u32 {
    let top = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| f64::from(((logit - top) / TEMPERATURE).exp());
    let mut left = uniform * logits_v.iter().map(weight).sum::<f64>();
    for (id, logit) in logits_v.iter().enumerate() {
        left -= weight(logit);
        if left < 0.0 {
            return id as u32;
        }
    }
    logits_v.len().saturating_sub(1) as u32
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0, TEMPERATURE * 3f32.ln(), f32::NEG_INFINITY];
        let mut random = Random(7);
        let ones = (0..4000).filter(|_| draw(&logits, random.next()) == 1).count();
        assert!((2850..3150).contains(&ones), "{ones} of 4000, expected about 3000");
        assert_eq!(draw(&logits, 0.999_999), 1);
    }
}
