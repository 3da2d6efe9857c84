//! A model and its cache without an engine: what benches and evaluations drive step by step.

use std::path::Path;

use anyhow::{Context, Result, bail};
use model::{BLOCK_TOKENS, KvCache, KvType, Loaded, Scratch, StepInput, Transformer};
use tensor::Pool;

use crate::machine::{bytes_text, memory_available};

/// A model's files, and the model packed from them.
pub(crate) fn load(path: &Path, pool: &Pool) -> Result<(Transformer, Loaded)> {
    let failed = || format!("cannot load the model {}", path.display());
    let loaded = model::load(path).with_context(failed)?;
    // Tensors are still in their files: the copy takes no memory to speak of.
    let model = Transformer::new(loaded.weights.clone(), pool).with_context(failed)?;
    if !model.config().block().causal {
        bail!("{}: the model embeds texts and predicts none", path.display());
    }
    Ok((model, loaded))
}

/// A number of sequences, each with blocks of its own for the same number of positions.
pub(crate) struct Session<'a> {
    pub(crate) model: &'a Transformer,
    pool: &'a Pool,
    kv: KvCache,
    scratch: Scratch,
    logits_rv: Vec<f32>,
    blocks_per_stream: usize,
}

/// New tokens of one stream.
pub(crate) struct Row<'a> {
    pub(crate) stream: usize,
    pub(crate) tokens: &'a [u32],
    pub(crate) n_cached: usize,
    pub(crate) n_logits: usize,
}

impl<'a> Session<'a> {
    /// A cache for `n_streams` of `n_positions`; refused where the memory is not there.
    pub(crate) fn new(
        model: &'a Transformer,
        pool: &'a Pool,
        kv_type: KvType,
        n_streams: usize,
        n_positions: usize,
    ) -> Result<Session<'a>> {
        if n_positions > model.context_max() {
            bail!("{n_positions} positions, but the model has {}", model.context_max());
        }
        let blocks_per_stream = n_positions.div_ceil(BLOCK_TOKENS);
        let bytes = (blocks_per_stream * n_streams) as u64 * model.kv_block_bytes(kv_type) as u64;
        if let Some(left) = memory_available().filter(|left| bytes > *left) {
            let (need, left) = (bytes_text(bytes), bytes_text(left));
            bail!(
                "{n_streams} streams of {n_positions} positions need {need} of keys and values, {left} are free"
            );
        }
        let kv = model.new_kv(blocks_per_stream * n_streams, kv_type);
        let (scratch, logits_rv) = (Scratch::default(), Vec::new());
        Ok(Session { model, pool, kv, scratch, logits_rv, blocks_per_stream })
    }

    /// Computes the rows; returns a row of v logits for each token that wants them.
    pub(crate) fn step(&mut self, rows: &[Row<'_>]) -> Result<&[f32]> {
        let mut step = StepInput::default();
        for row in rows {
            let first = row.stream * self.blocks_per_stream;
            let blocks: Vec<u32> = (first..first + self.blocks_per_stream).map(|b| b as u32).collect();
            step.push_row(row.tokens, row.n_cached, &blocks, row.n_logits);
        }
        self.model.forward(self.pool, &step, &mut self.kv, &mut self.scratch, &mut self.logits_rv)?;
        Ok(&self.logits_rv)
    }
}
