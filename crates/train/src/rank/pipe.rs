//! Ranks that form a pipeline, each with some neighbouring layers of the model (see [`model::Stage`] and `pipeline.rs`).
//!
//! What stages train are ranges of the whole model's flat vector, one behind the other: each writes its own of a checkpoint, and
//! the sums of squares of the whole are put together from theirs. An embedding that is the head as well is the first stage's;
//! the last one has a copy of it, sends the gradients that the head leaves with those of the rows, and gets the new one after
//! every update.

use std::ops::Range;
use std::sync::Arc;

use comm::Comm;
use comm::tree::SHARD_ALIGN;
use model::{Config, Neighbor, Objective, Stage, Trainable};
use tensor::Pool;
use tensor::adamw::sum_squares;

use super::Rank;
use crate::layout::Zero;
use crate::plan::Method;
use crate::{Error, Plan, Result};

/// Passes without gradients that the first stage may be ahead of the last, for each stage: what it sends lies there.
const AHEAD_MAX: usize = 4;

/// What a rank knows of its pipeline.
pub(crate) struct Pipe {
    /// To the other stages; this rank's number there is that of its stage.
    pub(crate) comm: Box<dyn Comm>,
    /// To all ranks.
    pub(crate) all: Box<dyn Comm>,
    /// What every stage trains of the whole model's flat vector.
    ranges: Vec<Range<usize>>,
    /// How long the embedding is, where the last stage has a copy of it; else 0.
    n_copied: usize,
}

impl Pipe {
    pub(crate) fn new(comm: Box<dyn Comm>, all: Box<dyn Comm>, whole: &Trainable, stages: &[Stage]) -> Pipe {
        let Config { vocab, width, tied_embeddings, .. } = *whole.config();
        let ranges = stages.iter().map(|stage| stage.range(whole.params())).collect();
        Pipe { comm, all, ranges, n_copied: if tied_embeddings { vocab * width } else { 0 } }
    }

    /// This stage, of how many.
    pub(crate) fn place(&self) -> [usize; 2] {
        [self.comm.rank(), self.comm.n_ranks()]
    }

    fn is_first(&self) -> bool {
        self.comm.rank() == 0
    }

    pub(crate) fn last(&self) -> usize {
        self.comm.n_ranks() - 1
    }

    fn is_last(&self) -> bool {
        self.comm.rank() == self.last()
    }

    pub(crate) fn neighbor(&self, neighbor: Neighbor) -> usize {
        match neighbor {
            Neighbor::Before => self.comm.rank() - 1,
            Neighbor::Behind => self.comm.rank() + 1,
        }
    }

    /// How many numbers of a copy lie behind this stage's flat vector.
    pub(crate) fn n_copied_here(&self) -> usize {
        if self.is_last() { self.n_copied } else { 0 }
    }

    fn n_whole(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.end)
    }

    /// The square of the norm of the whole gradient, summed in the parts and the order of one rank, from what each stage tells of
    /// its range: numbers of a part that others have some of, and sums of squares of whole parts between.
    fn squares(&self, pool: &Pool, told: &[f64], scratch: &mut Vec<f64>) -> Result<f64> {
        let mut all = self.comm.all_gather(told)?.into_iter();
        // Sums of whole parts, and the numbers of one that is not complete.
        let (mut sums, mut open): (Vec<f64>, Vec<f32>) = (Vec::new(), Vec::new());
        let mut close = |open: &mut Vec<f32>| {
            let sum = (!open.is_empty()).then(|| sum_squares(pool, open, scratch));
            open.clear();
            sum
        };
        for [before, inside, after] in self.ranges.iter().map(in_parts) {
            open.extend(all.by_ref().take(before.len()).map(|x| x as f32));
            if before.end.is_multiple_of(SHARD_ALIGN) || before.end == self.n_whole() {
                sums.extend(close(&mut open));
            }
            sums.extend(all.by_ref().take(inside.len() / SHARD_ALIGN));
            open.extend(all.by_ref().take(after.len()).map(|x| x as f32));
        }
        sums.extend(close(&mut open));
        Ok(sums.iter().sum())
    }
}

/// Which of [`in_parts`] are told as sums of squares.
const SUMMED: [bool; 3] = [false, true, false];

/// A range: what is before its first whole part, its whole parts, and what is behind them.
fn in_parts(range: &Range<usize>) -> [Range<usize>; 3] {
    let first = range.start.next_multiple_of(SHARD_ALIGN).min(range.end);
    let last = (range.end / SHARD_ALIGN * SHARD_ALIGN).max(first);
    [range.start..first, first..last, last..range.end]
}

impl Rank<'_> {
    /// As [`Pipe::squares`], where there is a pipeline of stages that no team divides.
    pub(super) fn squares_of_pipe(&mut self) -> Result<Option<f64>> {
        let Some(pipe) = self.pipe.as_ref().filter(|_| self.team.is_none()) else { return Ok(None) };
        let (layout, grads, first) = (&self.layout, &self.memory.sums[0], self.part.first);
        let pieces = |rank: usize| {
            let owned = layout.owned(rank).into_iter();
            owned.flat_map(|own| in_parts(&(own.start + first..own.end + first)).into_iter().zip(SUMMED))
        };
        let mut own = Vec::new();
        for (piece, is_summed) in pieces(layout.rank).filter(|(piece, _)| !piece.is_empty()) {
            let at = piece.start - first;
            let at = if layout.zero >= Zero::Gradients { layout.own_at(at) } else { at };
            let values = &grads[at..at + piece.len()];
            match is_summed {
                true => {
                    sum_squares(&self.pool, values, &mut self.squares);
                    own.append(&mut self.squares);
                }
                false => own.extend(values.iter().map(|x| f64::from(*x))),
            }
        }
        let all = if layout.zero > Zero::Nothing { self.comm.all_gather(&own)? } else { own };
        let mut rest = all.into_iter();
        let numbers = |(piece, is_summed): (Range<usize>, bool)| {
            let n = if is_summed { piece.len() / SHARD_ALIGN } else { piece.len() };
            (piece.start, rest.by_ref().take(n).collect::<Vec<f64>>())
        };
        let mut told: Vec<_> = (0..layout.n_owners()).flat_map(pieces).map(numbers).collect();
        told.sort_by_key(|(start, _)| *start);
        let told: Vec<f64> = told.into_iter().flat_map(|(_, numbers)| numbers).collect();
        pipe.squares(&self.pool, &told, &mut self.squares).map(Some)
    }

    /// This rank's stage, of how many.
    pub(crate) fn stage(&self) -> [usize; 2] {
        self.pipe.as_ref().map_or([0, 1], Pipe::place)
    }

    /// What the ranks of every stage have, of as many numbers each, stage by stage.
    pub(crate) fn of_stages(&self, own: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        let Some(pipe) = &self.pipe else { return Ok(vec![own]) };
        let all = pipe.comm.all_gather(&own)?;
        Ok(all.chunks(own.len().max(1)).map(<[f64]>::to_vec).collect())
    }

    /// The last stage gets the embedding as it is now, where that is its head.
    pub(super) fn renew_head(&mut self) -> Result<()> {
        let Some(pipe) = self.pipe.as_ref().filter(|pipe| pipe.n_copied > 0) else { return Ok(()) };
        if pipe.is_first() {
            let embedding: Arc<[f32]> = self.memory.filled(&self.state.params[..pipe.n_copied]);
            pipe.comm.post(pipe.last(), (embedding, pipe.n_copied))?;
        } else if pipe.is_last() {
            pipe.comm.receive(0, &mut self.state.params[self.layout.n..])?;
        }
        Ok(())
    }

    /// After every so many passes without gradients the stages wait for each other.
    pub(crate) fn keep_together(&self, n_passes: usize) -> Result<()> {
        match &self.pipe {
            Some(pipe) if n_passes.is_multiple_of(AHEAD_MAX * pipe.comm.n_ranks()) => {
                Ok(pipe.comm.barrier()?)
            }
            _ => Ok(()),
        }
    }
}

/// Refuses what pipelines cannot do.
pub(crate) fn check(plan: &Plan, zero: Zero, n_stages: usize) -> Result<()> {
    if n_stages == 1 {
        return Ok(());
    }
    let refuse = |what| Err(Error::Pipeline { n_stages, what });
    match () {
        () if zero == Zero::Parameters => refuse("parameters that are divided in another way (--zero 3)"),
        () if plan.diloco.is_some() => refuse("workers that train by themselves (--diloco)"),
        () if !matches!(plan.method, Method::Full) => refuse("low-rank changes"),
        () if plan.objective != Objective::CrossEntropy => {
            refuse("objectives that compare with another model")
        }
        () => Ok(Stage::divide(&plan.config()?, plan.context, n_stages).map(drop)?),
    }
}
