//! Ranks that compute one model together, each with a part of it (tensor parallel, see [`model::Division`]).
//!
//! Teams are what ranks are without them: they share a step's micro-batches, and those with the same place in their teams divide
//! the state of their part. Checkpoints, samples and what is published are of the whole model: each rank brings what it owns.

use comm::Comm;
use model::{Objective, Stripes, Weights};
use tensor::packed::WeightKind;

use super::Rank;
use crate::layout::Zero;
use crate::plan::Method;
use crate::saver::Saver;
use crate::{Error, Plan, Result};

/// What a rank knows of its team.
pub(crate) struct Team {
    /// To those that have the other parts; this rank's number there is that of its part.
    pub(crate) comm: Box<dyn Comm>,
    /// To the ranks of all teams.
    pub(crate) all: Box<dyn Comm>,
}

impl Rank<'_> {
    /// The model as it is now, on the first rank. Where parameters are divided every rank brings what it stores of them, tensor
    /// by tensor.
    pub(crate) fn weights(&self) -> Result<Option<Weights>> {
        let (all, kind) = (self.all(), WeightKind::F32);
        if self.team.is_none() && self.pipe.is_none() && self.layout.zero < Zero::Parameters {
            let whole = || self.trainable.to_weights(&self.pool, &self.state.params, kind);
            return Ok((all.rank() == 0).then(whole));
        }
        let mut own = self.brought();
        if all.rank() == 0 {
            let bring = |range: std::ops::Range<usize>, values: &mut [f32]| -> Result<()> {
                for (rank, stored) in self.writers.iter().enumerate() {
                    let inside = stored.inside(&range);
                    let mut came = vec![0.0; inside.len()];
                    match rank {
                        0 => own(&mut came),
                        _ if came.is_empty() => {}
                        _ => all.receive(rank, &mut came)?,
                    }
                    let mut rest = &came[..];
                    for run in inside.runs() {
                        let (part, behind) = rest.split_at(run.len());
                        values[run.start - range.start..run.end - range.start].copy_from_slice(part);
                        rest = behind;
                    }
                }
                Ok(())
            };
            return self.trainable.bring_weights(kind, bring).map(Some);
        }
        let Some(stored) = self.writers.get(all.rank()) else { return Ok(None) };
        for spec in self.trainable.specs() {
            let mut values = vec![0.0; stored.inside(&spec.range).len()];
            own(&mut values);
            if !values.is_empty() {
                all.send(0, &values)?;
            }
        }
        Ok(None)
    }

    /// Gives the parameters that this rank stores, in their order, as many at a time as are asked for.
    fn brought(&self) -> impl FnMut(&mut [f32]) {
        let stored = self.part.stored(&self.layout.owned(self.layout.rank));
        let lies_at = |at: std::ops::Range<usize>| match self.layout.zero {
            Zero::Parameters => {
                let own = self.layout.own_at(at.start);
                own..own + at.len()
            }
            _ => at,
        };
        let kept = Stripes::of_ranges(&stored.into_iter().map(lies_at).collect::<Vec<_>>());
        let mut end = 0;
        move |values: &mut [f32]| {
            end += values.len();
            let next = end - values.len()..end;
            kept.cut(std::slice::from_ref(&next)).take(&self.state.params, values);
        }
    }

    /// To all ranks.
    pub(super) fn all(&self) -> &dyn Comm {
        let of_teams = || self.team.as_ref().map_or(&*self.comm, |team| &*team.all);
        self.pipe.as_ref().map_or_else(of_teams, |pipe| &*pipe.all)
    }

    /// To those that have other parts of the model: of its layers, and other layers.
    pub(super) fn parts(&self) -> impl Iterator<Item = &dyn Comm> {
        let (team, pipe) = (self.team.as_ref(), self.pipe.as_ref());
        team.map(|team| &*team.comm).into_iter().chain(pipe.map(|pipe| &*pipe.comm))
    }

    /// The sum of what each part of the model has.
    pub(super) fn sum_over_parts(&self, own: f64) -> Result<f64> {
        self.parts().try_fold(own, |sum, comm| Ok(comm.all_gather(&[sum])?.iter().sum()))
    }

    /// What every rank tells of its part of a checkpoint: those of one place first, and then their places.
    pub(super) fn gather_told(&self) -> Result<Vec<Vec<u8>>> {
        let alike = self.comm.all_gather_bytes(&self.saver.tell())?;
        self.parts().try_fold(alike, |told, comm| Ok(comm.all_gather_bytes(&Saver::told_by_all(&told))?))
    }
}

/// Refuses what teams cannot do.
pub(crate) fn check(plan: &Plan, n_team: usize) -> Result<()> {
    if n_team == 1 {
        return Ok(());
    }
    let refuse = |what| Err(Error::Team { n_team, what });
    match () {
        () if plan.muon.is_some() => refuse("Muon, which needs whole matrices"),
        () if plan.diloco.is_some() => refuse("workers that train by themselves (--diloco)"),
        () if !matches!(plan.method, Method::Full) => refuse("low-rank changes"),
        () if plan.objective != Objective::CrossEntropy => {
            refuse("objectives that compare with another model")
        }
        () => Ok(plan.config()?.part_of(n_team).map(drop)?),
    }
}
