//! How likely a model finds texts.
//!
//! Sequences come in groups whose members begin alike, as the choices of one question do: what all of a group share is
//! computed once. Many groups are computed at a time, in steps of a few hundred tokens.

use model::{BLOCK_TOKENS, KvCache, KvType, Scratch, StepInput, Transformer};
use tensor::Pool;

use crate::{Error, Result};

/// Tokens of one step.
const STEP_TOKENS: usize = 512;
/// Memory for the logits of one step.
const LOGITS_BYTES: usize = 64 << 20;

/// Ids of a context and a continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    /// At least 1, and less than there are ids.
    pub n_context: usize,
}

/// What a model thinks of a continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Sum over its tokens, in nats.
    pub logprob: f64,
    /// Each of its tokens is the likeliest there.
    pub is_greedy: bool,
}

/// A model and room for keys and values.
pub struct Reader<'a> {
    pub(crate) model: &'a Transformer,
    pub(crate) pool: &'a Pool,
    pub(crate) kv: KvCache,
    scratch: Scratch,
    logits_nv: Vec<f32>,
}

/// A part of a sequence on its way through the model.
struct Row<'g> {
    sequence: &'g Sequence,
    /// Positions `at..end` are to be computed.
    at: usize,
    end: usize,
    /// From here on, what the model foretells counts.
    scored: usize,
    blocks: Vec<u32>,
    /// Of its score.
    index: usize,
}

impl<'a> Reader<'a> {
    /// Keys and values for `n_positions`, of all sequences computed at a time together.
    pub fn new(model: &'a Transformer, pool: &'a Pool, kv_type: KvType, n_positions: usize) -> Reader<'a> {
        let kv = model.new_kv(n_positions.div_ceil(BLOCK_TOKENS), kv_type);
        Reader { model, pool, kv, scratch: Scratch::default(), logits_nv: Vec::new() }
    }

    /// Scores of all sequences, group by group.
    ///
    /// # Errors
    /// If a group is larger than the room for it, or the model fails.
    pub fn score(&mut self, groups: &[Vec<Sequence>]) -> Result<Vec<Vec<Score>>> {
        let mut scores: Vec<Vec<Score>> = Vec::with_capacity(groups.len());
        while scores.len() < groups.len() {
            let rest = &groups[scores.len()..];
            let n = self.fitting(rest)?;
            scores.extend(self.score_together(&rest[..n])?);
        }
        Ok(scores)
    }

    /// How many of the first groups there is room for at a time.
    fn fitting(&self, groups: &[Vec<Sequence>]) -> Result<usize> {
        let mut n_blocks = 0;
        for (n, group) in groups.iter().enumerate() {
            n_blocks += blocks_of(group);
            if n_blocks > self.kv.n_blocks() {
                if n == 0 {
                    let room = self.kv.n_blocks() * BLOCK_TOKENS;
                    return Err(Error::Room { need: n_blocks * BLOCK_TOKENS, room });
                }
                return Ok(n);
            }
        }
        Ok(groups.len())
    }

    fn score_together(&mut self, groups: &[Vec<Sequence>]) -> Result<Vec<Vec<Score>>> {
        let n_sequences = groups.iter().map(Vec::len).sum();
        let mut scores = vec![Score { logprob: 0.0, is_greedy: true }; n_sequences];
        let mut next_block = 0;
        let mut take = |n: usize| {
            next_block += n as u32;
            (next_block - n as u32..next_block).collect::<Vec<u32>>()
        };
        let (mut shared, mut own, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        let mut index = 0;
        for group in groups {
            let n_shared = shared_len(group);
            let first = take(n_shared.div_ceil(BLOCK_TOKENS));
            if let Some(sequence) = group.first().filter(|_| n_shared > 0) {
                shared.push(Row {
                    sequence,
                    at: 0,
                    end: n_shared,
                    scored: n_shared,
                    blocks: first.clone(),
                    index,
                });
            }
            for sequence in group {
                // Whole blocks are shared; of the last, each has its own copy to go on in.
                let mut blocks = first[..n_shared / BLOCK_TOKENS].to_vec();
                let end = sequence.ids.len() - 1;
                blocks.extend(take(end.div_ceil(BLOCK_TOKENS) - blocks.len()));
                if !n_shared.is_multiple_of(BLOCK_TOKENS) {
                    let at = n_shared / BLOCK_TOKENS;
                    copies.push((first[at], blocks[at], n_shared % BLOCK_TOKENS));
                }
                own.push(Row { sequence, at: n_shared, end, scored: sequence.n_context - 1, blocks, index });
                index += 1;
            }
        }
        self.compute(&mut shared, &mut scores)?;
        copies.into_iter().for_each(|(from, to, n_positions)| self.kv.copy_block(from, to, n_positions));
        self.compute(&mut own, &mut scores)?;
        let mut scores = scores.into_iter();
        Ok(groups.iter().map(|group| scores.by_ref().take(group.len()).collect()).collect())
    }

    /// Computes all rows, as many at a time as a step takes, and adds to the scores.
    fn compute(&mut self, rows: &mut [Row], scores: &mut [Score]) -> Result<()> {
        let vocab = self.model.config().vocab;
        let logits_max = (LOGITS_BYTES / 4 / vocab).max(1);
        let mut next = 0;
        while next < rows.len() {
            let mut step = StepInput::default();
            // Whose token is foretold by each row of logits: the score's index and the token.
            let mut foretold: Vec<(usize, u32)> = Vec::new();
            while let Some(row) = rows.get_mut(next) {
                let n = row.piece(STEP_TOKENS - step.tokens_n.len(), logits_max - foretold.len());
                if n == 0 {
                    break;
                }
                let (at, end) = (row.at, row.at + n);
                let n_logits = end - row.scored.clamp(at, end);
                let ids = &row.sequence.ids;
                step.push_row(&ids[at..end], at, &row.blocks, n_logits);
                foretold.extend((end - n_logits..end).map(|position| (row.index, ids[position + 1])));
                row.at = end;
                if end < row.end {
                    break;
                }
                next += 1;
            }
            self.forward(&step)?;
            self.add(&foretold, scores);
        }
        Ok(())
    }

    pub(crate) fn forward(&mut self, step: &StepInput) -> Result<&[f32]> {
        let Reader { model, pool, kv, scratch, logits_nv } = self;
        model.forward(pool, step, kv, scratch, logits_nv)?;
        Ok(logits_nv)
    }

    fn add(&self, foretold: &[(usize, u32)], scores: &mut [Score]) {
        let vocab = self.model.config().vocab;
        let mut found = vec![(0.0, false); foretold.len()];
        self.pool.run_chunks(&mut found, 1, |i, found| {
            found[0] = foretell(&self.logits_nv[i * vocab..(i + 1) * vocab], foretold[i].1);
        });
        for ((index, _), (logprob, is_best)) in foretold.iter().zip(found) {
            scores[*index].logprob += logprob;
            scores[*index].is_greedy &= is_best;
        }
    }
}

impl Row<'_> {
    /// Tokens of it that fit into what a step has left.
    fn piece(&self, n_tokens: usize, n_logits: usize) -> usize {
        // Tokens before `scored` need no logits; from there on each does.
        let n_free = self.scored.saturating_sub(self.at);
        (self.end - self.at).min(n_tokens).min(n_free + n_logits)
    }
}

/// The log-probability of `id`, and whether it is the likeliest.
fn foretell(logits_v: &[f32], id: u32) -> (f64, bool) {
    let logit = logits_v[id as usize];
    let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits_v.iter().map(|x| f64::from((x - max).exp())).sum();
    (f64::from(logit - max) - sum.ln(), logit == max)
}

/// Positions at the beginning that all of a group share, and that are followed by no token that is foretold.
fn shared_len(group: &[Sequence]) -> usize {
    let [first, others @ ..] = group else { return 0 };
    if others.is_empty() {
        return 0;
    }
    let alike = |other: &Sequence| first.ids.iter().zip(&other.ids).take_while(|(a, b)| a == b).count();
    let before_scored = group.iter().map(|sequence| sequence.n_context - 1).min().unwrap_or(0);
    others.iter().map(alike).min().unwrap_or(0).min(before_scored)
}

fn blocks_of(group: &[Sequence]) -> usize {
    let n_shared = shared_len(group);
    let own = |sequence: &Sequence| (sequence.ids.len() - 1).div_ceil(BLOCK_TOKENS) - n_shared / BLOCK_TOKENS;
    n_shared.div_ceil(BLOCK_TOKENS) + group.iter().map(own).sum::<usize>()
}
