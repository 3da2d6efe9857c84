//! Texts to vectors: the mean of what a model makes of each token, of length one.

use tensor::Pool;
use tensor::paged_attention::{BLOCK_TOKENS, KvCache, KvDims, KvType};

use crate::forward::{Keep, Pass, Scratch};
use crate::transformer::Transformer;
use crate::{Error, Result, StepInput};

/// Tokens computed at once: enough to fill every core, little memory.
const STEP_TOKENS: usize = 4096;
/// Texts of one call.
const N_TEXTS_MAX: usize = 1 << 16;

impl Transformer {
    /// One vector of c numbers a text: the mean over its tokens after the final norm, divided by its length. Encoders see
    /// the whole text at every token, other models what is before it.
    ///
    /// # Errors
    /// If there are too many texts, or one is empty, too long for the model or has a token it does not know.
    pub fn embed(&self, pool: &Pool, texts: &[Vec<u32>], scratch: &mut Scratch) -> Result<Vec<Vec<f32>>> {
        if texts.len() > N_TEXTS_MAX {
            return Err(Error::Step(format!("{} texts, allowed are {N_TEXTS_MAX}", texts.len())));
        }
        for (i, text) in texts.iter().enumerate() {
            self.check_text(i, text)?;
        }
        let mut vectors = Vec::with_capacity(texts.len());
        while vectors.len() < texts.len() {
            let step = first_step(&texts[vectors.len()..]);
            let n_blocks = step.rows.iter().map(|row| row.blocks.len()).sum();
            let dims = KvDims { n_layers: 1, ..self.config.kv_dims() };
            let mut kv = KvCache::new(dims, KvType::F32, n_blocks);
            let mut pass = Pass::new(self, pool, &step, scratch);
            pass.layers(&step, &mut kv, Keep::Nothing);
            let mut hidden_nc = pass.hidden();
            for row in &step.rows {
                let (mine, rest) = hidden_nc.split_at(row.n_tokens * self.config.width);
                vectors.push(mean_direction(mine, self.config.width));
                hidden_nc = rest;
            }
        }
        Ok(vectors)
    }

    fn check_text(&self, i: usize, text: &[u32]) -> Result<()> {
        if text.is_empty() || text.len() > self.context_max() {
            let problem = format!("text {i} has {} tokens, not 1 to {}", text.len(), self.context_max());
            return Err(Error::Step(problem));
        }
        match text.iter().find(|&&token| token as usize >= self.config.vocab) {
            Some(token) => Err(Error::Step(format!("token {token} is not below {}", self.config.vocab))),
            None => Ok(()),
        }
    }
}

/// As many of the first texts as are computed at once, at least one.
fn first_step(texts: &[Vec<u32>]) -> StepInput {
    let mut step = StepInput::default();
    let mut n_blocks = 0;
    for text in texts {
        if !step.tokens_n.is_empty() && step.tokens_n.len() + text.len() > STEP_TOKENS {
            break;
        }
        let next = n_blocks + text.len().div_ceil(BLOCK_TOKENS) as u32;
        step.push_row(text, 0, &(n_blocks..next).collect::<Vec<u32>>(), 0);
        n_blocks = next;
    }
    step
}

/// The mean of rows of `c`, scaled to length one (or zeros).
fn mean_direction(hidden_nc: &[f32], c: usize) -> Vec<f32> {
    let mut sum_c = vec![0.0; c];
    for hidden_c in hidden_nc.chunks_exact(c) {
        sum_c.iter_mut().zip(hidden_c).for_each(|(sum, x)| *sum += x);
    }
    // The mean's factor 1/n falls out when the length becomes one.
    let length = sum_c.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
    sum_c.iter().map(|x| (f64::from(*x) * scale) as f32).collect()
}
