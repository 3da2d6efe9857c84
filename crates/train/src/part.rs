//! [`Part`]: what of the whole model a rank computes, and which of it the rank stores.
//!
//! The state of a run is that of the whole model, whoever computes which part of it: every rank stores what it owns of its own
//! part, says where that lies in the whole's vectors, and reads from there what it needs, whatever wrote it.

use std::ops::Range;

use comm::tree::SHARD_ALIGN;
use model::{Division, Stage, Stripe, Stripes, Trainable};

use crate::Result;
use crate::layout::Layout;

/// What one rank of a team computes.
#[derive(Clone)]
pub(crate) struct Part {
    /// Its shape; first parameters are the whole's.
    pub(crate) trainable: Trainable,
    /// Where its vector lies in the whole's, in the same order; and the parameters that it has a copy of.
    pub(crate) stripes: Stripes,
    /// Where it begins there, if it is a range of it; else 0.
    pub(crate) first: usize,
    /// Ranges of its vector that a part before it has alike: who has that stores and counts them.
    pub(crate) elsewhere: Vec<Range<usize>>,
}

impl Part {
    /// The parts of all that compute one model together, stage by stage and by their place in their team.
    pub(crate) fn all(trainable: &Trainable, n_team: usize, stages: &[Stage]) -> Result<Vec<Part>> {
        if n_team * stages.len() == 1 {
            let (trainable, stripes) = (trainable.clone(), Stripes::whole(trainable.n_params()));
            return Ok(vec![Part { trainable, stripes, first: 0, elsewhere: Vec::new() }]);
        }
        let division = Division::new(trainable.config(), n_team)?;
        let of_team = Trainable::new(division.part());
        let part = |stage: &Stage, place: usize| {
            let range = stage.range(of_team.params());
            let trainable = Trainable::of_stage(division.part(), stage);
            let mut stripes = division.stripes(place).cut(std::slice::from_ref(&range));
            // Every part has all of the embedding, which comes first.
            stripes.push(Stripe::new(0, trainable.params().n_copied(), [1, 0]));
            let inside = |shared: Range<usize>| {
                let clip = |at: usize| at.clamp(range.start, range.end) - range.start;
                clip(shared.start)..clip(shared.end)
            };
            let shared = division.shared().into_iter().map(inside).filter(|shared| !shared.is_empty());
            let elsewhere = if place == 0 { Vec::new() } else { shared.collect() };
            let first = if n_team == 1 { range.start } else { 0 };
            Part { trainable, stripes, first, elsewhere }
        };
        let of_stage = |stage| (0..n_team).map(move |place| (stage, place));
        Ok(stages.iter().flat_map(of_stage).map(|(stage, place)| part(stage, place)).collect())
    }

    /// What of these ranges of its vector is stored from here.
    pub(crate) fn stored(&self, owned: &[Range<usize>]) -> Vec<Range<usize>> {
        let mut stored = Vec::new();
        for own in owned {
            let mut at = own.start;
            let first = self.elsewhere.partition_point(|range| range.end <= own.start);
            for other in self.elsewhere[first..].iter().take_while(|range| range.start < own.end) {
                stored.push(at..other.start.max(at));
                at = other.end.min(own.end);
            }
            stored.push(at..own.end);
        }
        stored.retain(|range| !range.is_empty());
        stored
    }

    /// As [`Part::stored`], cut where squares are summed by themselves, whoever owns what: at the first border of parts of
    /// [`SHARD_ALIGN`] values, from which on every such part is.
    pub(crate) fn summed(&self, owned: &[Range<usize>]) -> Vec<Range<usize>> {
        let pieces = self.stored(owned).into_iter().flat_map(|range| {
            let border = range.start.next_multiple_of(SHARD_ALIGN).min(range.end);
            [range.start..border, border..range.end]
        });
        pieces.filter(|piece| !piece.is_empty()).collect()
    }
}

/// What every rank stores, of the whole's vectors; those behind the last one listed store nothing. `layouts` are those of the
/// parts.
pub(crate) fn writers(parts: &[Part], layouts: &[Layout]) -> Vec<Stripes> {
    let of_team = |team: usize| {
        let of_part = move |(part, layout): (&Part, &Layout)| {
            let owned = layout.owned(team);
            part.stripes.cut(&part.stored(&owned))
        };
        parts.iter().zip(layouts).map(of_part).collect::<Vec<_>>()
    };
    (0..layouts[0].n_owners()).flat_map(of_team).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Zero;

    fn trainable() -> Trainable {
        let config = serde_json::json!({
            "model_type": "gpt2", "n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 301, "n_positions": 32,
        });
        Trainable::new(&model::Config::from_json(config.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn every_number_is_stored_once_whoever_owns_it() {
        let trainable = trainable();
        for (n_team, n_teams, n_stages) in
            [(1, 1, 1), (1, 3, 1), (2, 1, 2), (2, 2, 1), (4, 3, 1), (1, 3, 2), (2, 3, 2)]
        {
            for zero in [Zero::Nothing, Zero::Optimizer, Zero::Parameters] {
                let stages = Stage::divide(trainable.config(), 8, n_stages).unwrap();
                let parts = Part::all(&trainable, n_team, &stages).unwrap();
                let layout =
                    |part: &Part| Layout::behind(part.first, &part.trainable, (zero, [0, n_teams]), 12);
                let layouts: Vec<Layout> = parts.iter().map(layout).collect();
                let mut n_stored = vec![0; trainable.n_params()];
                for stripes in writers(&parts, &layouts) {
                    let runs: Vec<_> = stripes.runs().collect();
                    assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start), "in order");
                    runs.into_iter().flatten().for_each(|at| n_stored[at] += 1);
                }
                assert!(n_stored.iter().all(|n| *n == 1), "{n_teams} of {n_stages} of {n_team}, {zero:?}");
            }
        }
    }

    #[test]
    fn squares_are_summed_in_the_same_pieces_whoever_owns_them() {
        let whole = trainable();
        let mut part = Part::all(&whole, 2, &[Stage::whole(whole.config())]).unwrap().remove(1);
        let n = 5 * SHARD_ALIGN + 11;
        part.elsewhere = vec![3..9, SHARD_ALIGN - 5..2 * SHARD_ALIGN + 7, 4 * SHARD_ALIGN..n];
        let starts = |owned: &[Range<usize>]| -> Vec<usize> {
            part.summed(owned).into_iter().flat_map(|piece| piece.step_by(SHARD_ALIGN)).collect()
        };
        let whole = starts(std::slice::from_ref(&(0..n)));
        assert_eq!(whole, [0, 9, 2 * SHARD_ALIGN + 7, 3 * SHARD_ALIGN]);
        assert_eq!(starts(&[0..SHARD_ALIGN, SHARD_ALIGN..3 * SHARD_ALIGN, 3 * SHARD_ALIGN..n]), whole);
    }
}
