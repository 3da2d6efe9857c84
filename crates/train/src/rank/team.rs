//! Ranks that compute one model together, each with a part of it (tensor parallel, see [`model::Division`]).
//!
//! Teams are what ranks are without them: they share a step's micro-batches. Checkpoints, samples and what is published are of
//! the whole model, which the first rank of the first team puts together; any other layout goes on from them. On many nodes
//! nobody should have all of it: parts would be written, and read, as ranges of the vectors.

use comm::Comm;
use model::{Division, Objective, Trainable};
use tensor::Buf;
use tensor::adamw::sum_squares;

use super::Rank;
use crate::layout::{Layout, Zero};
use crate::plan::Method;
use crate::state::State;
use crate::{Error, Plan, Result};

/// What a rank knows of its team.
pub(crate) struct Team {
    /// To those that have the other parts; this rank's number there is that of its part.
    pub(crate) comm: Box<dyn Comm>,
    pub(crate) division: Division,
    /// The layout of the whole model.
    pub(crate) whole: Layout,
}

impl Team {
    /// This rank's part of a state.
    pub(crate) fn take(&self, whole: &State, layout: &Layout) -> State {
        let stripes = self.division.stripes(self.comm.rank());
        let part = |vector: &[f32]| {
            let mut values = Buf::zeroed(stripes.len());
            stripes.take(vector, &mut values);
            values
        };
        State {
            params: part(&whole.params),
            adam_m: part(&whole.adam_m),
            adam_v: part(&whole.adam_v),
            step: whole.step,
            tokens: whole.tokens,
            elapsed_seconds: whole.elapsed_seconds,
            health: whole.health,
            ..State::empty(layout)
        }
    }

    /// All of a vector, on the first of the team.
    pub(crate) fn whole(&self, part: &[f32]) -> Result<Option<Buf<f32>>> {
        if self.comm.rank() > 0 {
            self.comm.send(0, part)?;
            return Ok(None);
        }
        let mut whole = Buf::zeroed(self.whole.n);
        self.division.stripes(0).put(part, &mut whole);
        let mut came = vec![0.0; part.len()];
        for other in 1..self.comm.n_ranks() {
            self.comm.receive(other, &mut came)?;
            self.division.stripes(other).put(&came, &mut whole);
        }
        Ok(Some(whole))
    }

    /// The state of the whole model, on the first of the team.
    fn whole_state(&self, part: &State) -> Result<Option<State>> {
        let vectors = [&part.params, &part.adam_m, &part.adam_v].map(|vector| self.whole(vector));
        let [params, adam_m, adam_v] = vectors;
        let (Some(params), Some(adam_m), Some(adam_v)) = (params?, adam_m?, adam_v?) else { return Ok(None) };
        Ok(Some(State {
            params,
            adam_m,
            adam_v,
            step: part.step,
            tokens: part.tokens,
            elapsed_seconds: part.elapsed_seconds,
            health: part.health,
            ..State::empty(&self.whole)
        }))
    }
}

impl Rank<'_> {
    /// Begins a checkpoint of the state as it is now: beside the next step where nobody else has some of it.
    pub(super) fn prepare_save(&mut self) -> Result<()> {
        if self.team.is_some() {
            return self.begin_save();
        }
        self.saver.prepare(&self.state);
        Ok(())
    }

    /// Copies what is to be written at once.
    pub(super) fn begin_save(&mut self) -> Result<()> {
        let Some(team) = &self.team else {
            self.saver.begin_at_once(&self.pool, &self.state, self.seconds);
            return Ok(());
        };
        // Other teams have the same.
        if self.layout.rank == 0
            && let Some(whole) = team.whole_state(&self.state)?
        {
            self.saver.begin_at_once(&self.pool, &whole, self.seconds);
        }
        Ok(())
    }

    /// The square of the norm of a gradient of which each of the team has a part: what all have is counted once.
    pub(super) fn squares_of_team(&mut self) -> Result<Option<f64>> {
        let Some(team) = &self.team else { return Ok(None) };
        let grads = &self.memory.sums[0];
        let mut squares = |values: &[f32]| sum_squares(&self.pool, values, &mut self.squares);
        let shared: f64 = team.division.shared().into_iter().map(|range| squares(&grads[range])).sum();
        let own = squares(grads) - shared;
        Ok(Some(team.comm.all_gather(&[own])?.iter().sum::<f64>() + shared))
    }
}

/// Refuses what teams cannot do.
pub(crate) fn check(plan: &Plan, zero: Zero, n_team: usize) -> Result<()> {
    if n_team == 1 {
        return Ok(());
    }
    let refuse = |what| Err(Error::Team { n_team, what });
    match () {
        () if zero > Zero::Nothing => refuse("state that is divided in another way (--zero)"),
        () if plan.muon.is_some() => refuse("Muon, which needs whole matrices"),
        () if plan.diloco.is_some() => refuse("workers that train by themselves (--diloco)"),
        () if !matches!(plan.method, Method::Full) => refuse("low-rank changes"),
        () if plan.objective != Objective::CrossEntropy => refuse("objectives that compare with the start"),
        () => Ok(plan.config()?.part_of(n_team).map(drop)?),
    }
}

/// What the ranks of a team compute with: a part of the model, whose parameters they are given.
pub(crate) fn part(division: &Division) -> Trainable {
    Trainable::new(division.part())
}
