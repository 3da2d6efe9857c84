//! The plan of a run: everything that determines its result, written into the run before the first step.
//!
//! Two runs of the same plan on the same data give the same weights, bit for bit, whatever the number of ranks and
//! threads and however often they were killed. What may differ between two starts of one run (threads, ranks, the
//! place of the store) is therefore not part of the plan.

use std::ops::Range;

use comm::tree;
use model::{Config, Lora, Objective};
use serde::{Deserialize, Serialize};

use crate::{Diloco, Error, Result, Schedule};

/// The newest layout of `plan.json` that this build understands.
///
/// 1 had one dataset, as `dataset` and `dataset_sha256`.
pub const PLAN_VERSION: u64 = 2;

/// The most tokens one micro-batch may hold. 2^20 tokens * 1 KiB of activations and more a token: GiBs.
const MICRO_BATCH_TOKENS_MAX: usize = 1 << 20;
const MICRO_BATCHES_MAX: usize = 1 << 16;
const TASKS_MAX: usize = 64;

/// What is trained, on what, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub version: u64,
    /// What is trained on, mixed by weight, and validated on, each by itself.
    pub data: Vec<DataPart>,
    /// Documents of text do not see each other, as those of chats never do.
    #[serde(default, skip_serializing_if = "is_default")]
    pub isolated: bool,
    /// Name to publish the finished model under.
    pub publish: Option<String>,
    /// The model's shape: a Hugging Face `config.json`.
    pub model: serde_json::Value,
    /// The model that training starts from; without one, weights are random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// What of it is trained. (Fields that old plans lack are left out where they say what old plans mean.)
    #[serde(default, skip_serializing_if = "Method::is_full")]
    pub method: Method,
    /// What is minimized.
    #[serde(default, skip_serializing_if = "is_cross_entropy")]
    pub objective: Objective,
    /// Whom the model learns from besides the data, where the objective is that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Teacher>,
    /// t, tokens in a row.
    pub context: usize,
    /// b, rows in a micro-batch: what one rank computes at once.
    pub rows: usize,
    /// Micro-batches in a step; their gradients are summed in a fixed tree.
    pub micro_batches: usize,
    pub steps: u64,
    pub schedule: Schedule,
    pub adamw: AdamW,
    /// What trains the matrices of the layers, instead of AdamW.
    #[serde(default, skip_serializing_if = "is_default")]
    pub muon: Option<Muon>,
    /// Workers that take the steps by themselves and meet now and then, instead of all ranks taking each together.
    #[serde(default, skip_serializing_if = "is_default")]
    pub diloco: Option<Diloco>,
    /// Weight of the square of the logits' logarithmic sum in the gradient.
    #[serde(default, skip_serializing_if = "is_default")]
    pub z_loss: f32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub guard: Guard,
    /// The mean gradient is scaled down to this norm.
    pub clip_norm: f32,
    pub seed: u64,
    /// Round the operands of matrix products to bf16 (sums stay f32). Only worth it where the CPU has such products.
    pub bf16: bool,
    pub evaluate: Evaluate,
    pub checkpoint: CheckpointPolicy,
    pub sample: Sample,
    /// What the model is asked as it learns, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tasks: Option<Tasks>,
}

/// A dataset and its share of the rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPart {
    /// Name of the dataset in the store.
    pub dataset: String,
    /// The dataset's identity: the sha256 of all that its bytes depend on. A run never goes on with other data.
    pub sha256: String,
    /// Its share, against the sum of all; 0: it is only validated on.
    pub weight: f64,
}

/// What happens to a step that went wrong: it changes nothing, and the run goes on with the next rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// The run ends when more steps than this go wrong in a row.
    pub skips_max: u64,
    /// A loss goes wrong that lies so many standard deviations above the mean of the last ones; one that is not a
    /// number always does.
    pub spike_sigmas: Option<f32>,
}

/// Jordan et al. 2024. Embeddings, the head, norms and biases stay with AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Muon {
    /// Falls as the schedule's does.
    pub lr_peak: f32,
    pub momentum: f32,
    pub weight_decay: f32,
}

impl Default for Muon {
    /// What nanochat trains with.
    fn default() -> Muon {
        Muon { lr_peak: 0.02, momentum: 0.95, weight_decay: 0.0 }
    }
}

/// A model to start from. Its files are kept in the run, see [`crate::create`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// What it is called, for those who use an adapter of it.
    pub model: String,
    /// The sha256 of its tensors' file.
    pub sha256: String,
}

/// A model whose probabilities are learned. Its files are kept in the run, see [`crate::keep_teacher`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Teacher {
    /// What it is called.
    pub model: String,
    /// The sha256 of its tensors' file.
    pub sha256: String,
    /// Its shape: a Hugging Face `config.json`.
    pub config: serde_json::Value,
}

impl Teacher {
    /// Its shape, checked.
    pub fn config(&self) -> Result<Config> {
        let config = Config::from_json(self.config.to_string().as_bytes())?;
        config.check_trainable()?;
        Ok(config)
    }
}

/// What of a model is trained.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Method {
    /// All parameters.
    #[default]
    Full,
    /// Low-rank changes.
    Lora {
        changes: Lora,
        /// Publish the whole model, changes merged, instead of an adapter.
        merge: bool,
    },
}

impl Method {
    pub(crate) fn is_full(&self) -> bool {
        *self == Method::Full
    }
}

fn is_cross_entropy(objective: &Objective) -> bool {
    *objective == Objective::CrossEntropy
}

/// Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    /// Applied to matrices, not to norms.
    pub weight_decay: f32,
}

/// When held-out documents are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {
    pub every_steps: u64,
    /// How many rows of validation text; the whole split when it has fewer.
    pub rows_max: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPolicy {
    pub every_steps: u64,
    /// The newest so many are kept.
    pub keep: usize,
}

/// What the model is asked to continue as it learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    pub every_steps: u64,
    pub prompt: String,
    pub n_tokens: usize,
}

/// Tasks whose files are kept in the run, see [`crate::keep_tasks`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tasks {
    pub every_steps: u64,
    /// Worked examples before each item.
    pub shots: usize,
    /// The first so many items of each are asked.
    pub items_max: usize,
    pub files: Vec<TaskFile>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskFile {
    pub name: String,
    pub sha256: String,
}

impl Plan {
    /// Reads a plan as it stands in a run.
    pub fn from_json(bytes: &[u8]) -> Result<Plan> {
        let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(Error::PlanJson)?;
        let version = value["version"].as_u64().unwrap_or_default();
        if version > PLAN_VERSION {
            return Err(Error::PlanVersion { found: version });
        }
        if version < 2 {
            from_version_1(&mut value);
        }
        let plan: Plan = serde_json::from_value(value).map_err(Error::PlanJson)?;
        plan.check()?;
        Ok(plan)
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_else(|e| panic!("a plan is plain data: {e}"))
    }

    /// The model's shape, checked: one that can be trained.
    pub fn config(&self) -> Result<Config> {
        let config = Config::from_json(self.model.to_string().as_bytes())?;
        config.check_trainable()?;
        Ok(config)
    }

    pub fn tokens_per_step(&self) -> usize {
        self.context * self.rows * self.micro_batches
    }

    /// Refuses a plan that cannot be run, naming the field.
    pub fn check(&self) -> Result<()> {
        let config = self.config()?;
        let finite = |x: f32| x.is_finite() && x >= 0.0;
        check(self.context >= 1, "context", "must be at least 1")?;
        check(
            self.context <= config.context_max,
            "context",
            "must not exceed the model's max_position_embeddings",
        )?;
        let tokens = self.context.checked_mul(self.rows);
        let fits = self.rows >= 1 && tokens.is_some_and(|n| n <= MICRO_BATCH_TOKENS_MAX);
        check(fits, "rows", "must be at least 1, and rows * context at most 2^20")?;
        let micro_batches = 1..=MICRO_BATCHES_MAX;
        check(micro_batches.contains(&self.micro_batches), "micro_batches", "must be 1 to 65536")?;
        check(self.steps >= 1, "steps", "must be at least 1")?;
        self.check_method()?;
        self.check_data()?;
        self.check_optimizer()?;
        self.check_diloco()?;
        check(finite(self.schedule.lr_peak), "schedule.lr_peak", "must be a number, 0 or more")?;
        let share = self.schedule.lr_final_share;
        check(finite(share) && share <= 1.0, "schedule.lr_final_share", "must be 0 to 1")?;
        check((0.0..1.0).contains(&self.adamw.beta1), "adamw.beta1", "must be in [0, 1)")?;
        check((0.0..1.0).contains(&self.adamw.beta2), "adamw.beta2", "must be in [0, 1)")?;
        check(
            finite(self.adamw.epsilon) && self.adamw.epsilon > 0.0,
            "adamw.epsilon",
            "must be more than 0",
        )?;
        check(finite(self.adamw.weight_decay), "adamw.weight_decay", "must be a number, 0 or more")?;
        check(finite(self.clip_norm) && self.clip_norm > 0.0, "clip_norm", "must be more than 0")?;
        check(self.evaluate.every_steps >= 1, "evaluate.every_steps", "must be at least 1")?;
        check(self.evaluate.rows_max >= 1, "evaluate.rows_max", "must be at least 1")?;
        check(self.checkpoint.every_steps >= 1, "checkpoint.every_steps", "must be at least 1")?;
        check(self.checkpoint.keep >= 1, "checkpoint.keep", "must be at least 1")?;
        check(self.sample.every_steps >= 1, "sample.every_steps", "must be at least 1")?;
        let Some(tasks) = &self.tasks else { return Ok(()) };
        check(tasks.every_steps >= 1, "tasks.every_steps", "must be at least 1")?;
        check(tasks.items_max >= 1, "tasks.items_max", "must be at least 1")?;
        check((1..=TASKS_MAX).contains(&tasks.files.len()), "tasks.files", "must be 1 to 64")
    }

    fn check_data(&self) -> Result<()> {
        check(!self.data.is_empty(), "data", "must name a dataset")?;
        let weights = || self.data.iter().map(|part| part.weight);
        check(weights().all(|w| w.is_finite() && w >= 0.0), "data.weight", "must be a number, 0 or more")?;
        check(weights().sum::<f64>() > 0.0, "data.weight", "must be more than 0 for one dataset at least")?;
        let mut names: Vec<&str> = self.data.iter().map(|part| part.dataset.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        check(names.len() == self.data.len(), "data.dataset", "must not be named twice")
    }

    fn check_optimizer(&self) -> Result<()> {
        let finite = |x: f32| x.is_finite() && x >= 0.0;
        check(finite(self.z_loss), "z_loss", "must be a number, 0 or more")?;
        let sigmas = self.guard.spike_sigmas;
        check(sigmas.is_none_or(|s| finite(s) && s > 0.0), "guard.spike_sigmas", "must be more than 0")?;
        let Some(muon) = &self.muon else { return Ok(()) };
        check(finite(muon.lr_peak), "muon.lr_peak", "must be a number, 0 or more")?;
        check((0.0..1.0).contains(&muon.momentum), "muon.momentum", "must be in [0, 1)")?;
        check(finite(muon.weight_decay), "muon.weight_decay", "must be a number, 0 or more")
    }

    fn check_diloco(&self) -> Result<()> {
        let Some(diloco) = &self.diloco else { return Ok(()) };
        let is_even = diloco.workers >= 1 && self.micro_batches.is_multiple_of(diloco.workers);
        check(is_even, "diloco.workers", "must be at least 1 and divide the micro-batches of a step")?;
        check(diloco.every_steps >= 1, "diloco.every_steps", "must be at least 1")?;
        let is_rate = |x: f32| x.is_finite() && x > 0.0;
        check(is_rate(diloco.lr), "diloco.lr", "must be more than 0")?;
        check((0.0..1.0).contains(&diloco.momentum), "diloco.momentum", "must be in [0, 1)")
    }

    fn check_method(&self) -> Result<()> {
        let has_start = self.start.is_some();
        check(has_start || self.method.is_full(), "method", "changes a model: name one to start from")?;
        let is_taught = matches!(self.objective, Objective::Distill { .. });
        check(
            self.teacher.is_some() == is_taught,
            "teacher",
            "must be named for distillation, and only then",
        )?;
        match self.objective {
            Objective::CrossEntropy => Ok(()),
            Objective::Dpo { beta } => {
                check(has_start, "objective", "compares with a model: name one to start from")?;
                let is_beta = beta > 0.0 && beta <= 100.0;
                check(is_beta, "objective.dpo.beta", "must be more than 0 and at most 100")?;
                check(self.rows.is_multiple_of(2), "rows", "must be even: preferences are pairs of rows")
            }
            Objective::Distill { weight, temperature } => {
                let is_share = weight > 0.0 && weight <= 1.0;
                check(is_share, "objective.distill.weight", "must be more than 0 and at most 1")?;
                let is_temperature = (0.1..=100.0).contains(&temperature);
                check(is_temperature, "objective.distill.temperature", "must be 0.1 to 100")?;
                self.teacher.as_ref().map_or(Ok(()), |teacher| self.check_teacher(teacher))
            }
        }
    }

    fn check_teacher(&self, teacher: &Teacher) -> Result<()> {
        let (teacher, config) = (teacher.config()?, self.config()?);
        if teacher.vocab != config.vocab {
            return Err(Error::TeacherVocabulary { teacher: teacher.vocab, model: config.vocab });
        }
        check(self.context <= teacher.context_max, "context", "must not exceed what the teacher sees at once")
    }

    /// Operations of a token, forward and backward, and what the teacher computes of it; `of_model` are those of what is
    /// trained.
    pub fn flops_per_token(&self, of_model: f64) -> Result<f64> {
        let Some(teacher) = &self.teacher else { return Ok(of_model) };
        Ok(of_model + teacher.config()?.flops_per_token_train(self.context) / 3.0)
    }

    /// Parts of a step that ranks share: workers where there are some, or else micro-batches.
    pub fn parts(&self) -> usize {
        self.diloco.map_or(self.micro_batches, |diloco| diloco.workers)
    }

    /// Refuses ranks that are no whole number of teams of `n_team`, or of pipelines of so many stages that are a team each, or
    /// that cannot share the step's parts evenly.
    pub fn check_teams(&self, n_ranks: usize, [n_team, n_stages]: [usize; 2]) -> Result<()> {
        let of_model = n_team * n_stages;
        if of_model > 0 && n_ranks.is_multiple_of(of_model) {
            return self.check_ranks(n_ranks / of_model);
        }
        Err(match n_stages {
            1 => Error::Teams { n_ranks, n_team },
            _ => Error::Pipelines { n_ranks, n_stages, n_team },
        })
    }

    /// Whether each rank has to sum its own share of a step's parts, which must then be a node of the tree of sums.
    pub fn wants_nodes(&self) -> bool {
        self.diloco.is_some() || self.muon.is_some()
    }

    /// Refuses more ranks than there are parts of a step, and ranks that cannot share them in the order of sums: workers that
    /// meet, and what needs all gradients on every rank, want a power of two that divides them.
    pub fn check_ranks(&self, n_ranks: usize) -> Result<()> {
        let are_nodes = tree::are_nodes(self.parts(), n_ranks);
        match self.diloco {
            Some(Diloco { workers, .. }) if !are_nodes => Err(Error::Workers { n_ranks, workers }),
            Some(_) => Ok(()),
            None if !(1..=self.micro_batches).contains(&n_ranks) => {
                Err(Error::Ranks { n_ranks, micro_batches: self.micro_batches })
            }
            None if self.wants_nodes() && !are_nodes => Err(Error::MuonDivided),
            None => Ok(()),
        }
    }

    /// The workers of a rank; none where all take each step together.
    pub(crate) fn workers_of(&self, rank: usize, n_ranks: usize) -> Range<usize> {
        self.diloco.map_or(0..0, |diloco| tree::share(diloco.workers, rank, n_ranks))
    }
}

/// A plan of version 1 in today's fields. It stays of version 1: what it says is what it said.
fn from_version_1(plan: &mut serde_json::Value) {
    if let Some(fields) = plan.as_object_mut()
        && let (Some(dataset), Some(sha256)) = (fields.remove("dataset"), fields.remove("dataset_sha256"))
    {
        let data = serde_json::json!([{"dataset": dataset, "sha256": sha256, "weight": 1.0}]);
        fields.insert("data".into(), data);
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn check(holds: bool, field: &'static str, must: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::PlanField { field, must }) }
}
