//! What a run takes of memory, by kind, before it takes any.

use anyhow::{Result, bail};
use model::{TrainModel, Trainable};
use train::{Method, Plan, Zero};

use super::launch::Launched;
use crate::args;
use crate::machine::bytes_text;

/// What the program itself takes: text, threads, the tokenizer, MPI's buffers.
const PROGRAM_BYTES: u64 = 48 << 20;

/// How many ranks share the step, and how many of them this machine's memory and one process'.
#[derive(Debug, Clone, Copy)]
pub(super) struct RanksHere {
    pub(super) all: usize,
    pub(super) of_machine: usize,
    pub(super) of_process: usize,
    pub(super) stage: u8,
    /// So many of them compute one model together.
    pub(super) team: usize,
}

/// Bytes by kind, in the order of the list that is shown.
pub(super) struct Needs {
    pub(super) kinds: Vec<(&'static str, u64)>,
    /// What activations take where layers are computed again.
    pub(super) recomputed: u64,
    /// Numbers that are trained, and those of a model that is kept as it was.
    pub(super) n_trained: usize,
    pub(super) n_frozen: usize,
    /// What the first rank takes, which takes most.
    pub(super) of_rank: u64,
    ranks: RanksHere,
    /// What would be taken with each stage, of the machine and of a process.
    stages: [[u64; 2]; 4],
}

impl RanksHere {
    /// As they were started, or as `args` would start them.
    pub(super) fn of(args: &args::Train, launched: Option<&Launched>) -> RanksHere {
        let (stage, team) = (args.distributed.zero, args.distributed.tp);
        match launched {
            Some(launched) => {
                RanksHere { all: launched.n_ranks, of_machine: launched.n_local, of_process: 1, stage, team }
            }
            None => {
                let (n, hosts) = (args.ranks, args.distributed.hosts.len().max(1));
                let of_process = if args.distributed.launch.is_some() { 1 } else { n };
                RanksHere { all: n, of_machine: n.div_ceil(hosts), of_process, stage, team }
            }
        }
    }
}

impl Needs {
    /// Of the ranks of this machine.
    pub(super) fn new(plan: &Plan, ranks: RanksHere, recompute: bool) -> Result<Needs> {
        let config = plan.config()?;
        // What one of a team has is as if the model were smaller.
        let part = config.part_of(ranks.team)?;
        let n_teams = (ranks.all / ranks.team).max(1);
        let changes = match &plan.method {
            Method::Full => None,
            Method::Lora { changes, .. } => Some(changes),
        };
        // A model that is trained in full is not kept as it was, unless preferences compare with it.
        let is_kept = plan.start.is_some() && (changes.is_some() || plan.objective.is_of_pairs());
        let n_frozen = if is_kept { config.n_params() } else { 0 };
        let activations = |recompute| {
            TrainModel::activation_bytes(&part, [plan.rows, plan.context], recompute).total() as u64
        };
        let (here, frozen) = (ranks.of_machine as u64, 4 * n_frozen as u64);
        let copy = plan.copy_bytes()?;
        // Threads share the model that they start from.
        let frozen_here = frozen * here / ranks.of_process.max(1) as u64;
        let of = |stage: u8, rank: usize| {
            plan.rank_bytes([rank, n_teams], ranks.team, Zero::of_stage(stage).unwrap_or_default())
        };
        let mut stages = [[0; 2]; 4];
        for (stage, most) in (0..=3).zip(&mut stages) {
            let first = of(stage, 0)?.most(activations(recompute), copy);
            let other = of(stage, n_teams - 1)?.most(activations(recompute), 0);
            let of = |n: u64| first + (n - 1) * other;
            *most = [
                of(here) + frozen_here + here * PROGRAM_BYTES,
                of(ranks.of_process as u64) + frozen + PROGRAM_BYTES,
            ];
        }
        let (first, other) = (of(ranks.stage, 0)?, of(ranks.stage, n_teams - 1)?);
        let steps = first.gradients + first.travelling + first.checkpoint + copy;
        Ok(Needs {
            kinds: vec![
                ("parameters", first.parameters + (here - 1) * other.parameters),
                ("the model it starts from", frozen_here),
                ("gradients", first.gradients + (here - 1) * other.gradients),
                ("on the way between ranks", first.travelling + (here - 1) * other.travelling),
                ("optimizer", first.optimizer + (here - 1) * other.optimizer),
                ("activations", here * activations(recompute)),
                ("checkpoint being written", first.checkpoint + (here - 1) * other.checkpoint),
                ("copies for samples and tasks", copy),
                ("more, for the finished model's file", first.publication.saturating_sub(steps)),
                ("the program", here * PROGRAM_BYTES),
            ],
            recomputed: here * activations(true),
            n_trained: Trainable::n_trained(&config, changes)?,
            n_frozen,
            of_rank: first.most(activations(recompute), copy) + frozen + PROGRAM_BYTES,
            ranks,
            stages,
        })
    }

    pub(super) fn total(&self) -> u64 {
        self.kinds.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Refuses what the machine has not left, or what a process may not have.
    pub(super) fn check(&self, machine: Option<u64>, process: Option<u64>) -> Result<()> {
        let stage = usize::from(self.ranks.stage);
        let left = [machine, process];
        let is_short = |needs: &[u64; 2], which: usize| left[which].is_some_and(|left| needs[which] > left);
        let Some(which) = [0, 1].into_iter().find(|which| is_short(&self.stages[stage], *which)) else {
            return Ok(());
        };
        let fits = |needs: &[u64; 2]| !is_short(needs, 0) && !is_short(needs, 1);
        let advice = match self.stages.iter().position(fits) {
            Some(stage) if self.ranks.all > 1 => format!("it would fit with --zero {stage}; or "),
            _ if self.ranks.all == 1 => "--zero 3 divides it among several --ranks; or ".to_owned(),
            _ => String::new(),
        };
        let (need, left) = (self.stages[stage][which], left[which].unwrap_or_default());
        let (need, left) = (bytes_text(need), bytes_text(left));
        let whose = if which == 0 { "are free" } else { "are allowed to a process" };
        bail!(
            "the run needs {need} of memory, {left} {whose} ({}; with --recompute activations {}): {advice}take fewer \
             --rows, a shorter --context, fewer --ranks, --lora-rank or a smaller model",
            self.text(),
            bytes_text(self.recomputed)
        );
    }

    /// The kinds that there are, on one line.
    pub(super) fn text(&self) -> String {
        let there = self.kinds.iter().filter(|(_, bytes)| *bytes > 0);
        there.map(|(kind, bytes)| format!("{kind} {}", bytes_text(*bytes))).collect::<Vec<_>>().join(", ")
    }
}
