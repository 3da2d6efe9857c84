//! What the forward and backward passes ask of an [`Exchange`].

use std::ops::Range;
use std::sync::Arc;

use comm::{Beside, tree};
use model::{Keeper, Kept, Neighbor};

use super::{ADD_LEN, Exchange, Fixed, merge, unique, waiting_before};
use crate::early::{Blocks, Early};

impl Keeper for Exchange<'_> {
    fn need(&mut self, unit: usize) -> Kept {
        let coming = self.coming.take().filter(|(coming, ..)| *coming == unit);
        let begun = match coming {
            Some((_, window, pending)) => Some((window, pending)),
            None if self.error.is_none() => self.gather(unit),
            None => None,
        };
        let of = &self.fixed.layout.units[unit];
        let mut window = match begun {
            None => self.memory.take(of.window.len()),
            Some((mut window, pending)) => {
                let (to, start) = (unique(&mut window), (self.fixed.seconds)());
                let finished =
                    pending.finish(&mut |at, piece| to[at..at + piece.len()].copy_from_slice(piece));
                self.spent.waited += (self.fixed.seconds)() - start;
                self.travelled(finished);
                window
            }
        };
        if self.error.is_some() {
            // With these nothing else goes wrong until the pass is over.
            unique(&mut window).fill(0.0);
        }
        self.held.push((unit, window.clone()));
        self.remember_needed(unit);
        self.look_ahead();
        Kept { first: of.window.start, values: window }
    }

    fn release(&mut self, unit: usize) {
        if let Some(at) = self.held.iter().position(|(held, _)| *held == unit) {
            let (_, window) = self.held.swap_remove(at);
            self.memory.put(window);
        }
        self.look_ahead();
    }

    fn grads(&mut self, range: Range<usize>) -> &mut [f32] {
        let layout = self.fixed.layout;
        if range.start >= layout.n {
            let memory = &mut *self.memory;
            return &mut unique(self.head.get_or_insert_with(|| memory.take(range.len())))[..range.len()];
        }
        if !self.is_divided() {
            let top = waiting_before(self.turn, layout.n_turns);
            return &mut self.memory.sums[top][range];
        }
        let unit = layout.unit_of(&range);
        let of = &layout.units[unit];
        let at = match self.open.iter().position(|(open, _)| *open == unit) {
            Some(at) => at,
            None => {
                let values = self.memory.take(of.bucket.end - of.range.start);
                self.open.push((unit, values));
                self.open.len() - 1
            }
        };
        let first = of.range.start;
        &mut unique(&mut self.open[at].1)[range.start - first..range.end - first]
    }

    fn settled(&mut self, unit: usize, open: &[Range<usize>]) {
        let Fixed { pool, layout, .. } = self.fixed;
        let (turn, n_turns, divided) = (self.turn, layout.n_turns, self.is_divided());
        let of = &layout.units[unit];
        let is_wanted = divided || turn + 1 == n_turns;
        if layout.n_ranks == 1 || of.bucket.is_empty() || !is_wanted || self.error.is_some() {
            return;
        }
        let open = Blocks::touching(of, open);
        let (first, end) = (of.range.start, of.bucket.end);
        let mut values = self.memory.take(end - first);
        let source = match self.open.iter().find(|(open, _)| divided && *open == unit) {
            Some((_, gradients)) => &gradients[..end - first],
            None => {
                let place = (waiting_before(turn, n_turns), tree::merges(turn, n_turns));
                let closed = open.ranges(false).into_iter();
                closed.for_each(|range| merge(pool, &mut self.memory.sums, place, range));
                &self.memory.sums[0][first..end]
            }
        };
        pool.run_chunks(&mut unique(&mut values)[..end - first], ADD_LEN, |i, to| {
            to.copy_from_slice(&source[i * ADD_LEN..][..to.len()]);
        });
        self.memory.put(values.clone());
        let values = self.sum(values, of.shards.clone());
        let blocks = self.begin_beside(Beside::Gather, open.to_numbers(), open.shards(layout.n_ranks));
        if let (Some(values), Some(blocks)) = (values, blocks) {
            self.early = Some(Early { unit, open, values, blocks });
        }
    }

    fn complete(&mut self, unit: usize) {
        if self.is_divided() { self.complete_divided(unit) } else { self.complete_whole(unit) }
    }

    fn sum(&mut self, values: &mut [f32]) {
        let Some(team) = self.fixed.team.filter(|_| self.error.is_none()) else { return };
        let start = (self.fixed.seconds)();
        let summed = team.all_reduce_tree(values);
        let seconds = (self.fixed.seconds)() - start;
        self.spent.waited += seconds;
        self.travelled(summed.map(|()| seconds));
    }

    fn receive(&mut self, from: Neighbor, values: &mut [f32]) {
        let Some(pipe) = self.fixed.pipe else { return };
        self.receive_of(pipe.neighbor(from), values);
    }

    fn send(&mut self, to: Neighbor, values: &[f32]) {
        let Some(pipe) = self.fixed.pipe.filter(|_| self.error.is_none()) else { return };
        let letter = self.memory.filled(values);
        self.post(pipe.neighbor(to), letter, values.len());
        // Behind it: of two stages the first gets both from the last, in this order.
        if let Some(head) = self.head.take_if(|_| to == Neighbor::Before) {
            self.memory.put(head.clone());
            self.post(0, head, pipe.n_copied_here());
        }
    }

    fn begin_with_head(&mut self, embedding: Range<usize>) {
        let Some(pipe) = self.fixed.pipe else { return };
        // Out of the way of what else is remembered.
        let mut came = self.memory.take(embedding.len());
        let values = &mut unique(&mut came)[..embedding.len()];
        self.receive_of(pipe.last(), values);
        self.grads(embedding).copy_from_slice(values);
        self.memory.put(came);
    }
}

impl Exchange<'_> {
    fn receive_of(&mut self, stage: usize, values: &mut [f32]) {
        let Some(pipe) = self.fixed.pipe else { return };
        if self.error.is_some() {
            // With these nothing else goes wrong until the pass is over.
            return values.fill(0.0);
        }
        let start = (self.fixed.seconds)();
        let came = pipe.comm.receive(stage, values);
        self.spent.waited += (self.fixed.seconds)() - start;
        if let Err(error) = came {
            self.fail(error);
        }
    }

    fn post(&mut self, stage: usize, values: Arc<[f32]>, len: usize) {
        let Some(pipe) = self.fixed.pipe else { return };
        if let Err(error) = pipe.comm.post(stage, (values, len)) {
            self.fail(error);
        }
    }
}
