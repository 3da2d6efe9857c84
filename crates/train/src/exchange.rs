//! [`Exchange`]: what a rank gives to and takes from others while it computes gradients.
//!
//! The gradients of a unit travel as soon as they are complete, while those of the units before it are computed. Where they
//! are divided ([`Zero::Gradients`]) that is after every micro-batch, since only sums over ranks are kept; else after the
//! last one. Each number is summed over micro-batches and ranks in the one order of [`comm::tree`].
//!
//! Where parameters are divided they come unit by unit: while one is computed with, the next one travels.

mod keeper;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use comm::tree::{self, Shards};
use comm::{Beside, Comm, CommError, Pending};
use tensor::adamw::sum_squares;
use tensor::{Buf, Pool};

use crate::early::{Early, Rows};
use crate::layout::{Layout, Slot, Zero};
use crate::rank::Pipe;

/// Buckets under way at a time. Where gradients are divided each is memory that a rank would not have else.
pub(crate) const UNDER_WAY_MAX: usize = 4;
pub(crate) const UNDER_WAY_DIVIDED_MAX: usize = 2;
/// Values that one task adds.
const ADD_LEN: usize = 16 << 10;

/// What is kept between steps.
#[derive(Default)]
pub(crate) struct Memory {
    /// Partial sums of gradients that wait, the first of which becomes the sum: of all, or where gradients are divided of
    /// what the rank owns.
    pub(crate) sums: Vec<Buf<f32>>,
    /// Buffers, some of which are still being sent.
    spare: Vec<Arc<[f32]>>,
    /// In which order units are needed, of passes with gradients and without.
    orders: [Vec<usize>; 2],
    squares: Vec<f64>,
}

/// How long things took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent {
    /// For others, while nothing was computed.
    pub(crate) waited: f64,
    /// Values were under way.
    pub(crate) travelled: f64,
    /// The squared norm of this rank's own gradient: what is not a number is then known to be its.
    pub(crate) own_squares: f64,
}

/// Whether a pass wants gradients.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Gradients,
    Loss,
}

/// What does not change during a step.
#[derive(Clone, Copy)]
pub(crate) struct Fixed<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) comm: &'a dyn Comm,
    /// To those that compute the same micro-batches with other parts of the model.
    pub(crate) team: Option<&'a dyn Comm>,
    /// To those that compute the same micro-batches with other layers.
    pub(crate) pipe: Option<&'a Pipe>,
    pub(crate) layout: &'a Layout,
    /// This rank's shard of them, where they are divided.
    pub(crate) params: &'a [f32],
    pub(crate) seconds: &'a dyn Fn() -> f64,
}

/// Gradients on their way.
struct UnderWay {
    turn: usize,
    what: What,
    pending: Pending,
}

enum What {
    /// From where the unit begins on.
    Unit(usize),
    /// Those of a unit that were open when the others began to travel.
    Rows(Rows),
}

/// See the module.
pub(crate) struct Exchange<'a> {
    fixed: Fixed<'a>,
    memory: &'a mut Memory,
    turn: usize,
    under_way: VecDeque<UnderWay>,
    early: Option<Early>,
    /// Gradients of units that are not complete, where they are divided.
    open: Vec<(usize, Arc<[f32]>)>,
    /// The beginning of the unit that was completed last, of a part that it shares with the unit before.
    carry: Vec<f32>,
    /// Gradients of the copy of another stage's embedding, until they are sent.
    head: Option<Arc<[f32]>>,
    kind: Kind,
    n_needed: usize,
    held: Vec<(usize, Arc<[f32]>)>,
    coming: Option<(usize, Arc<[f32]>, Pending)>,
    spent: Spent,
    error: Option<CommError>,
}

impl Memory {
    /// Room for the sums of a step.
    pub(crate) fn reserve(&mut self, layout: &Layout) {
        let len = if layout.zero >= Zero::Gradients { layout.n_own() } else { layout.n };
        self.sums.resize_with(layout.n_sums(), || Buf::zeroed(len));
    }

    /// Of at least `len` values, which nobody else has.
    fn take(&mut self, len: usize) -> Arc<[f32]> {
        let mut free = Vec::new();
        for (i, arc) in self.spare.iter_mut().enumerate() {
            if Arc::get_mut(arc).is_some() {
                free.push((arc.len(), i));
            }
        }
        free.sort_unstable();
        if let Some((_, i)) = free.iter().find(|(found, _)| *found >= len) {
            return self.spare.swap_remove(*i);
        }
        // None is long enough: the longest makes room.
        if let Some((_, i)) = free.last() {
            self.spare.swap_remove(*i);
        }
        std::iter::repeat_n(0.0, len).collect()
    }

    fn put(&mut self, arc: Arc<[f32]>) {
        self.spare.push(arc);
    }

    /// A copy to be sent, at the beginning of memory that is used again once it is.
    pub(crate) fn filled(&mut self, values: &[f32]) -> Arc<[f32]> {
        let mut copy = self.take(values.len());
        unique(&mut copy)[..values.len()].copy_from_slice(values);
        self.put(copy.clone());
        copy
    }
}

impl<'a> Exchange<'a> {
    pub(crate) fn new(fixed: Fixed<'a>, memory: &'a mut Memory) -> Exchange<'a> {
        Exchange {
            fixed,
            memory,
            turn: 0,
            under_way: VecDeque::new(),
            early: None,
            open: Vec::new(),
            carry: Vec::new(),
            head: None,
            kind: Kind::Loss,
            n_needed: 0,
            held: Vec::new(),
            coming: None,
            spent: Spent::default(),
            error: None,
        }
    }

    /// A pass begins: over the rank's micro-batch `turn`, where gradients are wanted.
    pub(crate) fn begin(&mut self, kind: Kind, turn: usize) {
        (self.kind, self.turn, self.n_needed) = (kind, turn, 0);
    }

    /// The sums are there, as far as this rank needs them.
    pub(crate) fn finish(mut self) -> Result<Spent, CommError> {
        while !self.under_way.is_empty() {
            self.finish_oldest();
        }
        self.error.map_or(Ok(self.spent), Err)
    }

    /// Whether it is of no use to go on.
    pub(crate) fn has_failed(&self) -> bool {
        self.error.is_some()
    }

    fn is_divided(&self) -> bool {
        self.fixed.layout.zero >= Zero::Gradients
    }

    fn begin_beside(&mut self, beside: Beside, values: Arc<[f32]>, shards: Shards) -> Option<Pending> {
        match self.fixed.comm.begin(beside, values, shards) {
            Ok(pending) => Some(pending),
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// Begins to sum gradients over ranks.
    fn sum(&mut self, values: Arc<[f32]>, shards: Shards) -> Option<Pending> {
        let layout = self.fixed.layout;
        match layout.zero {
            Zero::Nothing => self.begin_beside(Beside::AllReduce, values, shards),
            Zero::Optimizer => self.begin_beside(Beside::ReduceScatter, values, shards),
            _ => {
                let shards = shards.with_nodes(&layout.ranks_of_nodes(self.turn));
                self.begin_beside(Beside::ReduceScatter, values, shards)
            }
        }
    }

    /// Sends the gradients in `values`, which begin where the unit does.
    fn send(&mut self, unit: usize, values: Arc<[f32]>) {
        let pending = self.sum(values, self.fixed.layout.units[unit].shards.clone());
        self.go_on(What::Unit(unit), pending);
    }

    fn go_on(&mut self, what: What, pending: Option<Pending>) {
        let turn = self.turn;
        self.under_way.extend(pending.map(|pending| UnderWay { turn, what, pending }));
        let most = if self.is_divided() { UNDER_WAY_DIVIDED_MAX } else { UNDER_WAY_MAX };
        while self.under_way.len() > most {
            self.finish_oldest();
        }
    }

    fn finish_oldest(&mut self) {
        let Some(UnderWay { turn, what, pending }) = self.under_way.pop_front() else { return };
        let Fixed { layout, seconds, .. } = self.fixed;
        let mut take = taker(self.fixed, turn, &mut self.memory.sums);
        let start = seconds();
        let finished = match &what {
            What::Unit(unit) => {
                let (first, end) = (layout.units[*unit].range.start, layout.units[*unit].shards.end());
                pending.finish(&mut |at, piece| take(at / end, first + at % end, piece))
            }
            What::Rows(rows) => pending.finish(&mut |at, piece| {
                let (node, at) = (at / rows.len(), at % rows.len());
                for (part, range) in rows.places(at, piece.len()) {
                    take(node, range.start, &piece[part]);
                }
            }),
        };
        drop(take);
        self.spent.waited += seconds() - start;
        self.travelled(finished);
    }

    /// The open blocks of all ranks travel; the others have come, or do so now.
    fn finish_early(&mut self, early: Early, values: impl Fn(&Memory, Range<usize>, &mut [f32])) {
        let Early { unit, mut open, values: settled, blocks, .. } = early;
        let Fixed { layout, seconds, .. } = self.fixed;
        // Of a model of few buckets the rows of the turn before may still be on their way: their sums come first.
        while self.under_way.front().is_some_and(|under_way| under_way.turn < self.turn) {
            self.finish_oldest();
        }
        let start = seconds();
        let finished = blocks.finish(&mut |at, numbers| open.join(at, numbers));
        self.spent.waited += seconds() - start;
        self.travelled(finished);
        let rows = Rows::new(&open);
        let mut mine = self.memory.take(rows.len());
        for (at, range) in rows.iter() {
            values(self.memory, range.clone(), &mut unique(&mut mine)[*at..at + range.len()]);
        }
        self.memory.put(mine.clone());
        let shards = rows.shards(&layout.units[unit], layout.n_ranks);
        let pending = if self.error.is_none() { self.sum(mine, shards) } else { None };
        let (first, closed) = (layout.units[unit].range.start, open.ranges(false));
        let len = layout.units[unit].shards.end();
        let mut take = taker(self.fixed, self.turn, &mut self.memory.sums);
        let start = seconds();
        let finished = settled.finish(&mut |at, piece| {
            let (node, at) = (at / len, first + at % len);
            let end = at + piece.len();
            let from = closed.partition_point(|range| range.end <= at);
            for range in closed[from..].iter().take_while(|range| range.start < end) {
                let range = range.start.max(at)..range.end.min(end);
                take(node, range.start, &piece[range.start - at..range.end - at]);
            }
        });
        drop(take);
        self.spent.waited += seconds() - start;
        self.travelled(finished);
        self.go_on(What::Rows(rows), pending);
    }

    fn travelled(&mut self, finished: Result<f64, CommError>) {
        match finished {
            Ok(seconds) => self.spent.travelled += seconds,
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: CommError) {
        // The first says why the others came.
        self.error.get_or_insert(error);
    }

    /// The gradients of a unit lie in the newest partial sum.
    fn complete_whole(&mut self, unit: usize) {
        let Fixed { pool, layout, .. } = self.fixed;
        let (turn, n_turns) = (self.turn, layout.n_turns);
        let of = &layout.units[unit];
        let place = (waiting_before(turn, n_turns), tree::merges(turn, n_turns));
        if let Some(early) = self.early.take_if(|early| early.unit == unit) {
            let open = early.open.ranges(true).into_iter();
            // What the unit behind has a part in is merged as far as it goes.
            let open = open.map(|range| range.start.min(of.range.end)..range.end.min(of.range.end));
            open.for_each(|range| merge(pool, &mut self.memory.sums, place, range));
            let sum = &self.memory.sums[0][of.bucket.clone()];
            self.spent.own_squares += sum_squares(pool, sum, &mut self.memory.squares);
            return self.finish_early(early, |memory, range, to| to.copy_from_slice(&memory.sums[0][range]));
        }
        merge(pool, &mut self.memory.sums, place, of.range.clone());
        let bucket = of.bucket.clone();
        if turn + 1 < n_turns || layout.n_ranks == 1 || bucket.is_empty() || self.error.is_some() {
            return;
        }
        let part = bucket.start - of.range.start..bucket.end - of.range.start;
        let mut values = self.memory.take(part.end);
        let sum = &self.memory.sums[0][bucket];
        pool.run_chunks(&mut unique(&mut values)[part], ADD_LEN, |i, to| {
            to.copy_from_slice(&sum[i * ADD_LEN..][..to.len()]);
        });
        self.spent.own_squares += sum_squares(pool, sum, &mut self.memory.squares);
        self.memory.put(values.clone());
        self.send(unit, values);
    }

    /// The gradients of a unit lie by themselves; the end of the bucket's last part came with the unit behind.
    fn complete_divided(&mut self, unit: usize) {
        let Fixed { pool, layout, .. } = self.fixed;
        let of = &layout.units[unit];
        let Some(at) = self.open.iter().position(|(open, _)| *open == unit) else { return };
        let (_, mut values) = self.open.swap_remove(at);
        let bucket = of.bucket.start - of.range.start..of.bucket.end - of.range.start;
        let all = unique(&mut values);
        all[of.range.len()..bucket.end].copy_from_slice(&self.carry);
        self.carry.clear();
        self.carry.extend(&all[..bucket.start]);
        self.spent.own_squares += sum_squares(pool, &all[bucket.clone()], &mut self.memory.squares);
        let first = of.range.start;
        if let Some(early) = self.early.take_if(|early| early.unit == unit) {
            self.finish_early(early, |_, range, to| {
                to.copy_from_slice(&values[range.start - first..range.end - first]);
            });
            return self.memory.put(values);
        }
        self.memory.put(values.clone());
        if !bucket.is_empty() && self.error.is_none() {
            self.send(unit, values);
        }
    }

    /// Begins to gather the parameters of a unit.
    fn gather(&mut self, unit: usize) -> Option<(Arc<[f32]>, Pending)> {
        let Fixed { layout, params, .. } = self.fixed;
        let of = &layout.units[unit];
        let mut window = self.memory.take(of.window.len());
        let mut mine = self.memory.take(of.window_shards.len_of(layout.rank));
        let mut end = 0;
        for range in of.window_shards.of(layout.rank) {
            let at = layout.own_at(of.window.start + range.start);
            let part = &params[at..at + range.len()];
            unique(&mut window)[range.clone()].copy_from_slice(part);
            unique(&mut mine)[end..end + range.len()].copy_from_slice(part);
            end += range.len();
        }
        self.memory.put(mine.clone());
        let pending = self.begin_beside(Beside::Gather, mine, of.window_shards.clone())?;
        Some((window, pending))
    }

    /// For passes to come.
    fn remember_needed(&mut self, unit: usize) {
        let order = &mut self.memory.orders[self.kind as usize];
        if order.get(self.n_needed) != Some(&unit) {
            order.truncate(self.n_needed);
            order.push(unit);
        }
        self.n_needed += 1;
    }

    /// Lets the unit come that earlier passes needed next, where at most one is there.
    fn look_ahead(&mut self) {
        if self.held.len() > 1 || self.coming.is_some() || self.error.is_some() {
            return;
        }
        let next = self.memory.orders[self.kind as usize].get(self.n_needed).copied();
        if let Some(next) = next
            && let Some((window, pending)) = self.gather(next)
        {
            self.coming = Some((next, window, pending));
        }
    }
}

/// What puts sums over ranks of a turn where they belong, each with which of the turn's nodes it is of and the place of its first
/// number in the flat vector.
fn taker<'b>(
    fixed: Fixed<'b>,
    turn: usize,
    sums: &'b mut [Buf<f32>],
) -> impl FnMut(usize, usize, &[f32]) + 'b {
    let Fixed { pool, layout, .. } = fixed;
    let slots = if layout.zero >= Zero::Gradients { layout.slots(turn) } else { Vec::new() };
    move |node, at, piece| {
        let Some(Slot { waiting, merges }) = slots.get(node).copied() else {
            sums[0][at..at + piece.len()].copy_from_slice(piece);
            return;
        };
        let own = layout.own_at(at);
        let range = own..own + piece.len();
        sums[waiting][range.clone()].copy_from_slice(piece);
        merge(pool, sums, (waiting, merges), range);
    }
}

/// Partial sums that wait when leaf `turn` comes: each leaf brings one, and takes away as many as it merges.
fn waiting_before(turn: usize, n_turns: usize) -> usize {
    (0..turn).fold(0, |waiting, turn| waiting + 1 - tree::merges(turn, n_turns))
}

/// Adds the partial sum number `top` to the one before it, and so on, `n` times, in `range`.
fn merge(pool: &Pool, sums: &mut [Buf<f32>], (top, n): (usize, usize), range: Range<usize>) {
    for right in (1..=top).rev().take(n) {
        let (left, right) = sums.split_at_mut(right);
        let (left, right) = (&mut left[left.len() - 1][range.clone()], &right[0][range.clone()]);
        pool.run_chunks(left, ADD_LEN, |i, left| {
            for (sum, other) in left.iter_mut().zip(&right[i * ADD_LEN..]) {
                *sum += other;
            }
        });
    }
}

fn unique(arc: &mut Arc<[f32]>) -> &mut [f32] {
    Arc::get_mut(arc).expect("nobody else has what is being filled")
}
