//! [`Opened`]: what every rank needs of a run, read once.

use std::sync::Arc;

use model::{Stage, Stripes, Trainable};
use tensor::Buf;

use super::{Context, check_division};
use crate::checkpoint::{Checkpoints, Loaded, Reader};
use crate::layout::{Layout, Zero, between};
use crate::optimizer::of_muon;
use crate::part::{self, Part};
use crate::plans::stored_plan;
use crate::rank::{check_pipeline, team};
use crate::sources::Sources;
use crate::state::State;
use crate::{Error, Event, Plan, Result, start};

/// What every rank needs of a run.
pub(super) struct Opened {
    pub(super) plan: Plan,
    pub(super) sources: Sources,
    pub(super) trainable: Trainable,
    /// Whom it learns from, if anybody.
    pub(super) teacher: Option<Trainable>,
    /// Of a pipeline.
    pub(super) stages: Vec<Stage>,
    /// Of ranks that compute one model together, stage by stage and by their place in their team: what they compute.
    pub(super) parts: Vec<Part>,
    pub(super) checkpoints: Checkpoints,
}

impl Opened {
    pub(super) fn open(context: &Context) -> Result<Opened> {
        let run = &context.run;
        let (plan, plan_sha256) =
            stored_plan(&context.store, run)?.ok_or_else(|| Error::NoRun { run: run.clone() })?;
        plan.check_teams(context.n_ranks, [context.n_team, context.n_stages])?;
        team::check(&plan, context.n_team)?;
        check_pipeline(&plan, context.zero, context.n_stages)?;
        check_division(&plan, context.zero, context.n_ranks / context.n_team / context.n_stages)?;
        let sources = Sources::open(&context.store, &plan)?;
        let trainable = start::trainable(&context.store, run, &plan)?;
        let teacher = start::teacher(&context.store, run, &plan)?;
        let checkpoints = Checkpoints {
            store: context.store.clone(),
            run: run.clone(),
            plan_sha256,
            n_params: trainable.n_params(),
            n_workers: plan.diloco.map_or(0, |diloco| diloco.workers),
            squared: between(&of_muon(&plan, trainable.specs()), trainable.n_params()),
        };
        let stages = Stage::divide(trainable.config(), plan.context, context.n_stages)?;
        let parts = Part::all(&trainable, context.n_team, &stages)?;
        Ok(Opened { plan, sources, trainable, teacher, stages, parts, checkpoints })
    }

    /// What a rank computes.
    pub(super) fn part(&self, rank: usize) -> &Part {
        &self.parts[rank % self.parts.len()]
    }

    /// Of the state of its part, what a rank keeps.
    pub(super) fn layout(&self, context: &Context, rank: usize) -> Layout {
        let n_parts = self.parts.len();
        let alike = [rank / n_parts, context.n_ranks / n_parts];
        let Part { trainable, first, .. } = self.part(rank);
        let layout = Layout::behind(*first, trainable, (context.zero, alike), self.plan.micro_batches);
        layout.with_muon(&of_muon(&self.plan, trainable.specs()))
    }

    /// What every rank stores of the whole model's vectors.
    pub(super) fn writers(&self, context: &Context) -> Arc<[Stripes]> {
        let layouts: Vec<Layout> = (0..self.parts.len()).map(|place| self.layout(context, place)).collect();
        part::writers(&self.parts, &layouts).into()
    }

    /// What a rank with so many workers begins with.
    pub(super) fn initial(&self, reader: &Reader) -> Loaded {
        let (layout, n_workers) = (reader.layout, reader.workers.len());
        let mut state = State::initial(layout, (&self.trainable, reader.stripes), self.plan.seed);
        let workers = vec![state.clone(); n_workers];
        if self.plan.diloco.is_some() {
            // The outer step keeps one mean.
            state.adam_v = Buf::zeroed(0);
        }
        Loaded { state, workers }
    }

    /// What the ranks of this process go on from, where they are all; tells of checkpoints that cannot be read.
    pub(super) fn load_all(&self, context: &Context, refused: &mut Vec<Event>) -> Result<Vec<Loaded>> {
        let (layout, workers) = (self.layout(context, 0), 0..self.checkpoints.n_workers);
        let first = Reader { layout: &layout, stripes: &self.part(0).stripes, workers: workers.clone() };
        let mut report = |event| refused.push(event);
        let found = self.checkpoints.load_newest(&first, &mut report)?;
        let step = found.as_ref().map_or(0, |loaded| loaded.state.step);
        let mut found = found.unwrap_or_else(|| self.initial(&first));
        let per_rank = workers.len() / context.n_ranks;
        let mut of_rank = |rank: usize| -> Result<Loaded> {
            let workers: Vec<State> = found.workers.drain(..per_rank).collect();
            let is_alike = layout.zero == Zero::Nothing && rank.is_multiple_of(self.parts.len());
            if rank == 0 || is_alike {
                return Ok(Loaded { state: found.state.clone(), workers });
            }
            let layout = self.layout(context, rank);
            let reader = Reader { layout: &layout, stripes: &self.part(rank).stripes, workers: 0..0 };
            match step {
                0 => Ok(self.initial(&reader)),
                _ => self.checkpoints.load(step, &reader)?.ok_or(Error::CheckpointMissing { step }),
            }
        };
        (0..context.n_ranks).map(&mut of_rank).collect()
    }

    /// What only comparing with the start needs is forgotten where nothing is compared.
    pub(super) fn forget_start(&mut self) {
        if !self.plan.objective.is_of_pairs() {
            self.trainable.forget_start();
        }
    }
}
