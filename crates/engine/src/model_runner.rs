//! A real model behind [`Runner`]: weights, KV cache and the threads they are computed on.

use std::sync::Arc;

use model::{BLOCK_TOKENS, KvCache, KvType, Scratch, StepInput, Transformer};
use tensor::Pool;

use crate::runner::{Runner, RunnerError, RunnerShape};

/// See the module.
pub struct ModelRunner {
    model: Arc<Transformer>,
    kv: KvCache,
    pool: Arc<Pool>,
    scratch: Scratch,
    logits_rv: Vec<f32>,
    context_max: usize,
}

impl ModelRunner {
    /// A runner whose KV cache takes `kv_bytes_max` at most, and never more than `max_running`
    /// sequences of full context could use.
    ///
    /// # Errors
    /// If not even one block fits.
    pub fn new(
        model: impl Into<Arc<Transformer>>,
        pool: Arc<Pool>,
        kv_type: KvType,
        kv_bytes_max: usize,
        max_running: usize,
    ) -> Result<ModelRunner, RunnerError> {
        let model = model.into();
        if !model.config().block().causal {
            return Err(RunnerError("the model embeds texts and predicts none".into()));
        }
        let block_bytes = model.kv_block_bytes(kv_type);
        let n_useful = model.context_max().div_ceil(BLOCK_TOKENS).saturating_mul(max_running);
        let n_blocks = (kv_bytes_max / block_bytes).min(n_useful);
        if n_blocks == 0 {
            let why = format!("{kv_bytes_max} bytes for the KV cache hold no block of {block_bytes} bytes");
            return Err(RunnerError(why));
        }
        let kv = model.new_kv(n_blocks, kv_type);
        let context_max = model.context_max();
        Ok(ModelRunner { model, kv, pool, scratch: Scratch::default(), logits_rv: Vec::new(), context_max })
    }

    /// Sequences may have `n` positions, if the model was made for more.
    #[must_use]
    pub fn with_context_max(self, n: usize) -> ModelRunner {
        ModelRunner { context_max: n.min(self.context_max), ..self }
    }
}

impl Runner for ModelRunner {
    fn shape(&self) -> RunnerShape {
        RunnerShape {
            vocab: self.model.config().vocab,
            n_blocks: self.kv.n_blocks(),
            block_tokens: BLOCK_TOKENS,
            context_max: self.context_max,
        }
    }

    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        let ModelRunner { model, kv, pool, scratch, logits_rv, .. } = self;
        for copy in input.copies.iter().filter(|copy| copy.from != copy.to) {
            kv.copy_block(copy.from, copy.to, copy.n_positions);
        }
        model.forward(pool, input, kv, scratch, logits_rv).map_err(|error| RunnerError(error.to_string()))?;
        Ok(logits_rv)
    }

    fn pool(&self) -> Option<Arc<Pool>> {
        Some(self.pool.clone())
    }
}
