//! What a run takes of memory, by kind, before it takes any.

use anyhow::{Result, bail};
use model::{Config, Objective, Stage, Teacher, TrainModel, Trainable};
use train::{Method, Plan, RankBytes, Zero};

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
    /// They form pipelines of so many stages.
    pub(super) stages: usize,
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
    /// What would be taken with each stage of ZeRO, of the machine and of a process.
    stages: [[u64; 2]; 4],
    /// And in pipelines, where there could be some.
    pub(super) pipelines: Vec<Pipelines>,
    /// And in teams of other sizes, with each stage of ZeRO.
    pub(super) products: Vec<Product>,
}

/// What would be taken in teams of so many ranks, with a stage of ZeRO.
pub(super) struct Product {
    pub(super) team: usize,
    pub(super) zero: u8,
    /// By the rank that takes most.
    pub(super) of_rank: u64,
    /// By the machine and by a process.
    needs: [u64; 2],
}

/// What would be taken in pipelines.
pub(super) struct Pipelines {
    pub(super) stages: usize,
    /// By the rank that takes most.
    pub(super) of_rank: u64,
    /// By the machine and by a process.
    needs: [u64; 2],
}

impl RanksHere {
    /// As they were started, or as `args` would start them.
    pub(super) fn of(args: &args::Train, launched: Option<&Launched>) -> RanksHere {
        let (stage, team, stages) = (args.distributed.zero, args.distributed.tp, args.distributed.pp);
        match launched {
            Some(launched) => {
                let (all, of_machine) = (launched.n_ranks, launched.n_local);
                RanksHere { all, of_machine, of_process: 1, stage, team, stages }
            }
            None => {
                let (n, hosts) = (args.ranks, args.distributed.hosts.len().max(1));
                let of_process = if args.distributed.launch.is_some() { 1 } else { n };
                RanksHere { all: n, of_machine: n.div_ceil(hosts), of_process, stage, team, stages }
            }
        }
    }
}

/// What one rank takes.
struct OfRank {
    bytes: RankBytes,
    /// As they are, and where layers are computed again.
    activations: [u64; 2],
    /// Of the first of all, for samples.
    copy: u64,
    recompute: bool,
}

impl OfRank {
    fn activations(&self) -> u64 {
        self.activations[usize::from(self.recompute)]
    }

    fn most(&self) -> u64 {
        self.bytes.most(self.activations(), self.copy)
    }

    fn steps(&self) -> u64 {
        let RankBytes { gradients, travelling, checkpoint, .. } = self.bytes;
        gradients + travelling + checkpoint + self.copy
    }
}

/// A plan on ranks that divide it in some way.
struct Divided<'a> {
    plan: &'a Plan,
    /// What one of a team has, as if the model were smaller.
    part: Config,
    stages: Vec<Stage>,
    ranks: RanksHere,
    recompute: bool,
}

impl Divided<'_> {
    fn new(plan: &Plan, ranks: RanksHere, recompute: bool) -> Result<Divided<'_>> {
        let part = plan.config()?.part_of(ranks.team)?;
        let stages = Stage::divide(&part, plan.context, ranks.stages)?;
        Ok(Divided { plan, part, stages, ranks, recompute })
    }

    /// What the first `n` ranks take with a stage of ZeRO.
    fn of(&self, zero: u8, n: usize) -> Result<Vec<OfRank>> {
        (0..n).map(|rank| self.of_rank(zero, rank)).collect()
    }

    fn of_rank(&self, zero: u8, rank: usize) -> Result<OfRank> {
        let RanksHere { team, all, .. } = self.ranks;
        let (n_stages, part) = (self.stages.len(), &self.part);
        let (stage, data, n_data) =
            (rank / team % n_stages, rank / team / n_stages, (all / team / n_stages).max(1));
        let of = &self.stages[stage];
        let zero = Zero::of_stage(zero).unwrap_or_default();
        let n_flights = match of.is_last() {
            true => 1,
            false => train::in_flight([stage, n_stages], self.plan.micro_batches / n_data),
        };
        let rows = [self.plan.rows, self.plan.context];
        let activations = [false, true].map(|recompute| {
            TrainModel::activation_bytes_of((part, of), rows, (recompute, n_flights)).total() as u64
        });
        let is_first = rank == 0;
        Ok(OfRank {
            bytes: self.plan.rank_bytes(of, [data, n_data], team, zero)?,
            activations,
            copy: if is_first { self.plan.copy_bytes()? } else { 0 },
            recompute: self.recompute,
        })
    }
}

impl Needs {
    /// Of the ranks of this machine.
    pub(super) fn new(plan: &Plan, ranks: RanksHere, recompute: bool) -> Result<Needs> {
        let mut needs = Needs::of(plan, ranks, recompute)?;
        let is_plain =
            plan.method == Method::Full && plan.objective == Objective::CrossEntropy && plan.diloco.is_none();
        let is_one = ranks.team == 1 && ranks.stages == 1 && is_plain;
        let n_layers = plan.config()?.n_layers;
        let of_pipeline = |n: &usize| is_one && *n <= n_layers && ranks.all.is_multiple_of(*n);
        for stages in (1..usize::BITS).map(|i| 1 << i).take_while(|n| *n <= ranks.all).filter(of_pipeline) {
            let of = Needs::of(plan, RanksHere { stages, stage: 0, ..ranks }, recompute)?;
            needs.pipelines.push(Pipelines { stages, of_rank: of.of_rank, needs: of.stages[0] });
        }
        needs.products = match is_plain && plan.muon.is_none() && ranks.stages == 1 {
            true => Needs::products(plan, ranks, recompute)?,
            false => Vec::new(),
        };
        Ok(needs)
    }

    /// Of the same ranks, those first that send each other least: sums of every layer cost more than what ZeRO sends.
    fn products(plan: &Plan, ranks: RanksHere, recompute: bool) -> Result<Vec<Product>> {
        let config = plan.config()?;
        let is_team = |n: &usize| ranks.all.is_multiple_of(*n) && config.part_of(*n).is_ok();
        let mut products = Vec::new();
        for team in (0..usize::BITS).map(|i| 1 << i).take_while(|n| *n <= ranks.all).filter(is_team) {
            let n_zeros = if ranks.all > team { 4 } else { 1 };
            for zero in 0..n_zeros {
                let of = Needs::of(plan, RanksHere { team, stage: zero, ..ranks }, recompute)?;
                let needs = of.stages[usize::from(zero)];
                products.push(Product { team, zero, of_rank: of.of_rank, needs });
            }
        }
        Ok(products)
    }

    /// Of all products the one that sends least of those that fit.
    pub(super) fn choice(&self, left: [Option<u64>; 2]) -> Option<&Product> {
        self.products.iter().find(|product| fits(&product.needs, left))
    }

    fn of(plan: &Plan, ranks: RanksHere, recompute: bool) -> Result<Needs> {
        let config = plan.config()?;
        let divided = Divided::new(plan, ranks, recompute)?;
        let changes = match &plan.method {
            Method::Full => None,
            Method::Lora { changes, .. } => Some(changes),
        };
        // A model that is trained in full is not kept as it was, unless preferences compare with it.
        let is_kept = plan.start.is_some() && (changes.is_some() || plan.objective.is_of_pairs());
        let n_frozen = if is_kept { config.n_params() } else { 0 };
        let (n_taught, teacher_activations) = match &plan.teacher {
            None => (0, 0),
            Some(teacher) => {
                let (config, rows) = (teacher.config()?, [plan.rows, plan.context]);
                (config.n_params(), Teacher::activation_bytes(&config, rows).total() as u64)
            }
        };
        let (here, frozen) = (ranks.of_machine as u64, 4 * (n_frozen + n_taught) as u64);
        // Threads share the models that they start and learn from.
        let frozen_here = frozen * here / ranks.of_process.max(1) as u64;
        let mut stages = [[0; 2]; 4];
        for (stage, most) in (0..=3).zip(&mut stages) {
            if stage == 3 && ranks.stages > 1 {
                // Parameters of stages are not divided in another way: a run that asks for it is refused.
                *most = [u64::MAX; 2];
                continue;
            }
            let of_ranks = divided.of(stage, ranks.of_machine.max(ranks.of_process))?;
            let of = |n: usize| of_ranks.iter().take(n).map(OfRank::most).sum::<u64>();
            *most = [
                of(ranks.of_machine) + frozen_here + here * (teacher_activations + PROGRAM_BYTES),
                of(ranks.of_process) + frozen + ranks.of_process as u64 * teacher_activations + PROGRAM_BYTES,
            ];
        }
        let of_ranks = divided.of(ranks.stage, ranks.of_machine)?;
        let sum = |part: &dyn Fn(&OfRank) -> u64| of_ranks.iter().map(part).sum::<u64>();
        let most = of_ranks.iter().map(OfRank::most).max().unwrap_or(0);
        Ok(Needs {
            kinds: vec![
                ("parameters", sum(&|of| of.bytes.parameters)),
                ("the model it starts from", 4 * n_frozen as u64 * here / ranks.of_process.max(1) as u64),
                ("the teacher", 4 * n_taught as u64 * here / ranks.of_process.max(1) as u64),
                ("the teacher's activations", here * teacher_activations),
                ("gradients", sum(&|of| of.bytes.gradients)),
                ("on the way between ranks", sum(&|of| of.bytes.travelling)),
                ("optimizer", sum(&|of| of.bytes.optimizer)),
                ("activations", sum(&OfRank::activations)),
                ("checkpoint being written", sum(&|of| of.bytes.checkpoint)),
                ("copies for samples and tasks", sum(&|of| of.copy)),
                (
                    "more, for the finished model's file",
                    sum(&|of| of.bytes.publication.saturating_sub(of.steps())),
                ),
                ("the program", here * PROGRAM_BYTES),
            ],
            recomputed: sum(&|of| of.activations[1]),
            n_trained: Trainable::n_trained(&config, changes)?,
            n_frozen,
            of_rank: most + frozen + teacher_activations + PROGRAM_BYTES,
            ranks,
            stages,
            pipelines: Vec::new(),
            products: Vec::new(),
        })
    }

    pub(super) fn total(&self) -> u64 {
        self.kinds.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Refuses what the machine has not left, or what a process may not have.
    pub(super) fn check(&self, machine: Option<u64>, process: Option<u64>) -> Result<()> {
        let stage = usize::from(self.ranks.stage);
        let left = [machine, process];
        let is_short = |which: &usize| left[*which].is_some_and(|left| self.stages[stage][*which] > left);
        let Some(which) = [0, 1].into_iter().find(is_short) else { return Ok(()) };
        let fits = |needs: &[u64; 2]| fits(needs, left);
        let advice = match self.stages.iter().position(fits) {
            Some(stage) if self.ranks.all > 1 => format!("it would fit with --zero {stage}; or "),
            _ if self.ranks.all == 1 => "--zero 3 divides it among several --ranks; or ".to_owned(),
            _ => match (self.pipelines.iter().find(|pipelines| fits(&pipelines.needs)), self.choice(left)) {
                (Some(pipelines), _) => format!("it would fit with --pp {}; or ", pipelines.stages),
                (None, Some(product)) => format!("it would fit with {}; or ", product.flags()),
                (None, None) => String::new(),
            },
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

impl Product {
    pub(super) fn flags(&self) -> String {
        let Product { team, zero, .. } = *self;
        if team == 1 { format!("--zero {zero}") } else { format!("--tp {team} --zero {zero}") }
    }
}

/// Whether so much of the machine and of a process is left, where that is known.
fn fits(needs: &[u64; 2], left: [Option<u64>; 2]) -> bool {
    needs.iter().zip(left).all(|(need, left)| left.is_none_or(|left| *need <= left))
}
