//! From flags to a plan.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use data::Dataset;
use model::{Config, Lora, MicroBatch, Objective, Teacher, TrainModel, Trainable, Weights};
use store::Store;
use tensor::{Buf, Pool, Precision};
use train::{
    AdamW, CheckpointPolicy, DataPart, Decay, Evaluate, Guard, Method, Muon, PLAN_VERSION, Plan, Sample,
    Schedule, Tasks,
};

use crate::args::{self, DecayName};
use crate::commands::model::{name_of, resolve};
use crate::commands::presets;
use crate::home::Home;

/// Steps of a run that is told neither steps nor minutes.
const STEPS_DEFAULT: u64 = 300;
/// Steps in a row that may go wrong before a run ends.
const SKIPS_MAX: u64 = 10;
/// Share of `--minutes` that goes to steps; the rest is evaluation, samples and checkpoints.
const STEP_SHARE: f64 = 0.93;

/// Of the file of a task.
const TASK_BYTES_MAX: u64 = 256 << 20;

/// A plan and what it was made of.
pub(super) struct Planned {
    pub(super) plan: Plan,
    /// The model it starts from, and its files.
    pub(super) weights: Option<Weights>,
    pub(super) files: Option<model::Files>,
    /// Of whom it learns from.
    pub(super) teacher: Option<(Weights, model::Files)>,
    /// Of tasks, by name.
    pub(super) task_files: Vec<(String, Vec<u8>)>,
    pub(super) datasets: Vec<Dataset>,
}

/// The plan of a new run: what was asked for, on these datasets. Its steps are as many as was asked for, or 0 where that
/// is a time, which is measured only once it is known that the run fits in memory.
pub(super) fn plan(home: &Home, args: &args::Train, pool: &Arc<Pool>) -> Result<Planned> {
    let store = home.store()?;
    let choices = args.datasets().map_err(anyhow::Error::msg)?;
    let datasets: Vec<Dataset> =
        choices.iter().map(|choice| Dataset::open(&store, &choice.name)).collect::<Result<_, _>>()?;
    let weights = args.method.init.as_deref().map(|init| start_weights(home, init, &datasets)).transpose()?;
    let taught =
        args.method.distill.as_deref().map(|name| teacher(home, name, (&datasets, pool))).transpose()?;
    let (teacher, taught) = taught.unzip();
    let config = match &weights {
        Some(weights) => weights.config.clone(),
        None => shape(args, (&datasets[0], teacher.as_ref()))?,
    };
    let model_name = args.method.init.as_deref().map(name_of).unwrap_or_default();
    let start = weights.clone().map(|weights| train::start_files(pool, &model_name, weights)).transpose()?;
    let task_files = args.eval_tasks.iter().map(|path| task_file(path)).collect::<Result<Vec<_>>>()?;
    let tasks = Tasks::new(args.eval_every.unwrap_or(1), args.eval_shots, args.eval_limit, &task_files)?;
    let part = |(choice, dataset): (args::DataChoice, &Dataset)| DataPart {
        dataset: choice.name,
        sha256: dataset.info().plan_sha256.clone(),
        weight: choice.weight,
    };
    let mut plan = Plan {
        version: PLAN_VERSION,
        data: choices.into_iter().zip(&datasets).map(part).collect(),
        isolated: args.isolate,
        publish: args.publish.clone(),
        model: serde_json::from_str(&config.to_json("float32"))?,
        start: start.as_ref().map(|(start, _)| start.clone()),
        method: args.method.method(),
        objective: args.method.objective(),
        teacher,
        context: args.context,
        rows: args.rows,
        micro_batches: args.micro_batches,
        steps: args.steps.unwrap_or(STEPS_DEFAULT),
        schedule: schedule(args),
        adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        muon: muon(args),
        diloco: args.diloco,
        z_loss: args.z_loss,
        guard: Guard { skips_max: SKIPS_MAX, spike_sigmas: args.skip_spikes },
        clip_norm: 1.0,
        seed: args.seed,
        bf16: tensor::cpu::features().bf16,
        evaluate: Evaluate { every_steps: 1, rows_max: 64 },
        checkpoint: CheckpointPolicy { every_steps: args.checkpoint_every, keep: 2 },
        sample: Sample { every_steps: 1, prompt: args.prompt.clone(), n_tokens: 48 },
        tasks: Some(tasks).filter(|tasks| !tasks.files.is_empty()),
    };
    spread(&mut plan, args);
    plan.check()?;
    // (Processes are told how many there are by who starts them, and the run checks that.)
    if args.ranks > 1 {
        plan.check_teams(args.ranks, [args.distributed.tp, args.distributed.pp])?;
    }
    Ok(Planned { plan, weights, files: start.map(|(_, files)| files), teacher: taught, task_files, datasets })
}

/// The plan of a run that exists with all that the flags say by themselves: where it differs, something else is asked for
/// than was planned. What comes of measurements, datasets and models is left as it is.
pub(super) fn as_asked(store: &Arc<dyn Store>, old: &Plan, args: &args::Train) -> Result<Plan> {
    let sha256 =
        |name: &str| old.data.iter().find(|part| part.dataset == name).map(|part| part.sha256.clone());
    let part = |choice: args::DataChoice| DataPart {
        sha256: sha256(&choice.name).unwrap_or_default(),
        dataset: choice.name,
        weight: choice.weight,
    };
    let start = args.method.init.as_deref().map(|init| {
        let sha256 = old.start.as_ref().map_or(String::new(), |start| start.sha256.clone());
        train::Start { model: name_of(init), sha256 }
    });
    let teacher = args.method.distill.as_deref().map(|name| match &old.teacher {
        Some(teacher) => train::Teacher { model: name_of(name), ..teacher.clone() },
        None => train::Teacher { model: name_of(name), sha256: String::new(), config: old.model.clone() },
    });
    let mut plan = Plan {
        data: args.datasets().map_err(anyhow::Error::msg)?.into_iter().map(part).collect(),
        isolated: args.isolate,
        publish: args.publish.clone(),
        start,
        method: args.method.method(),
        objective: args.method.objective(),
        teacher,
        context: args.context,
        rows: args.rows,
        micro_batches: args.micro_batches,
        steps: args.steps.unwrap_or(old.steps),
        muon: muon(args),
        diloco: args.diloco,
        z_loss: args.z_loss,
        seed: args.seed,
        ..old.clone()
    };
    if args.method.init.is_none()
        && let Some(first) = plan.data.first()
    {
        let asked = shape(args, (&Dataset::open(store, &first.dataset)?, plan.teacher.as_ref()))?;
        if asked != old.config()? {
            plan.model = serde_json::from_str(&asked.to_json("float32"))?;
        }
    }
    let planned = schedule(args);
    (plan.schedule.decay, plan.schedule.lr_peak) = (planned.decay, planned.lr_peak);
    plan.schedule.warmup_steps = args.warmup.unwrap_or(old.schedule.warmup_steps);
    plan.guard.spike_sigmas = args.skip_spikes;
    plan.checkpoint.every_steps = args.checkpoint_every;
    plan.sample.prompt = args.prompt.clone();
    Ok(plan)
}

fn muon(args: &args::Train) -> Option<Muon> {
    args.muon.map(|lr_peak| Muon { lr_peak, ..Muon::default() })
}

/// Sets the number of steps, and what is derived from it.
pub(super) fn set_steps(plan: &mut Plan, args: &args::Train, steps: u64) -> Result<()> {
    plan.steps = steps;
    spread(plan, args);
    Ok(plan.check()?)
}

fn spread(plan: &mut Plan, args: &args::Train) {
    plan.schedule.warmup_steps = args.warmup.unwrap_or((plan.steps / 20).clamp(1, 200));
    plan.evaluate.every_steps = (plan.steps / 12).max(1);
    plan.sample.every_steps = (plan.steps / 6).max(1);
    if let Some(tasks) = &mut plan.tasks {
        tasks.every_steps = args.eval_every.unwrap_or((plan.steps / 6).max(1));
    }
}

fn task_file(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let size = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if size > TASK_BYTES_MAX {
        bail!("{} has {size} bytes, at most {TASK_BYTES_MAX} are kept in a run", path.display());
    }
    Ok((name, std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?))
}

fn schedule(args: &args::Train) -> Schedule {
    let decay = match args.decay {
        DecayName::Wsd => Decay::Wsd,
        DecayName::Cosine => Decay::Cosine,
        DecayName::Linear => Decay::Linear,
        DecayName::Constant => Decay::Constant,
    };
    let lr_peak = args.lr.unwrap_or_else(|| args.method.lr_default());
    Schedule { decay, lr_peak, lr_final_share: 0.05, warmup_steps: 0 }
}

/// Of a new model; one that has a teacher has as many ids, which may be more than the tokenizer's.
fn shape(args: &args::Train, (dataset, teacher): (&Dataset, Option<&train::Teacher>)) -> Result<Config> {
    if let Some(path) = &args.config {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Config::from_json(&bytes).with_context(|| format!("{}", path.display()));
    }
    let (name, info) = (args.preset.as_deref().unwrap_or("tiny"), dataset.info());
    let vocab = teacher.map(|teacher| teacher.config()).transpose()?.map_or(info.vocab_size, |of| of.vocab);
    presets::config(name, vocab, info.end_of_text, args.context)
}

/// A model to start from, whose ids are those of the datasets.
fn start_weights(home: &Home, init: &str, datasets: &[Dataset]) -> Result<Weights> {
    let path = resolve(home, init)?;
    let loaded = model::load(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let tokenizer = crate::serving::tokenizer_of(&path, &loaded)?;
    // As datasets keep it: a GGUF file's tokenizer, written and read again, gives the same ids by other rules.
    let (json, config) = (tokenizer.to_json(), tokenizer.config_json(None));
    let tokenizer = tokenizer::Tokenizer::from_json_with_config(json.as_bytes(), config.as_bytes())?;
    for dataset in datasets {
        dataset.check_tokenizer(init, &tokenizer)?;
    }
    loaded.weights.config.check_trainable()?;
    Ok(loaded.weights)
}

/// Whom a run learns from, as its plan and its directory have it.
fn teacher(
    home: &Home,
    name: &str,
    (datasets, pool): (&[Dataset], &Arc<Pool>),
) -> Result<(train::Teacher, (Weights, model::Files))> {
    let weights = start_weights(home, name, datasets)?;
    let config = serde_json::from_str(&weights.config.to_json("float32"))?;
    let (start, files) = train::start_files(pool, &name_of(name), weights.clone())?;
    let teacher = train::Teacher { model: start.model, sha256: start.sha256, config };
    Ok((teacher, (weights, files)))
}

fn trainable(plan: &Plan, weights: Option<Weights>) -> Result<Trainable> {
    Ok(match (weights, &plan.method) {
        (None, _) => Trainable::new(&plan.config()?),
        (Some(weights), Method::Full) => Trainable::from_weights(weights)?,
        (Some(weights), Method::Lora { changes, .. }) => Trainable::lora(weights, changes)?,
    })
}

impl args::Method {
    fn method(&self) -> Method {
        let Some(rank) = self.lora_rank else { return Method::Full };
        let alpha = self.lora_alpha.unwrap_or(2.0 * rank as f32);
        let changes = Lora { rank, alpha, targets: self.lora_targets.clone() };
        Method::Lora { changes, merge: self.merge }
    }

    fn objective(&self) -> Objective {
        match (self.dpo, &self.distill) {
            (Some(beta), _) => Objective::Dpo { beta },
            (None, None) => Objective::CrossEntropy,
            (None, Some(_)) => {
                let (weight, temperature) = (self.distill_weight, self.distill_temperature);
                Objective::Distill { weight, temperature }
            }
        }
    }

    /// What is common for each: large for random weights, small where a model must not forget, smaller where
    /// preferences pull at it.
    fn lr_default(&self) -> f32 {
        match (&self.init, self.lora_rank, self.dpo) {
            (None, ..) => 3e-3,
            (_, Some(_), None) => 2e-4,
            (_, None, None) => 2e-5,
            (_, Some(_), Some(_)) => 2e-5,
            (_, None, Some(_)) => 1e-6,
        }
    }
}

/// How many steps fit in `minutes`.
pub(super) fn steps_in(minutes: f64, step_seconds: f64) -> Result<u64> {
    if !(minutes > 0.0 && minutes <= 60.0 * 24.0 * 365.0) {
        bail!("--minutes is {minutes}: it must be more than 0 and at most a year");
    }
    Ok(((minutes * 60.0 * STEP_SHARE / step_seconds) as u64).max(1))
}

/// Seconds of one step here: the best of a few micro-batches of the plan's shape.
pub(super) fn step_seconds(
    plan: &Plan,
    (weights, teacher): (Option<Weights>, Option<Weights>),
    pool: &Pool,
    (n_trials, recompute): (usize, bool),
) -> Result<f64> {
    let trainable = trainable(plan, weights)?;
    let precision = if plan.bf16 { Precision::Bf16 } else { Precision::F32 };
    let vocab = trainable.config().vocab;
    let model = TrainModel::new(trainable, plan.rows, plan.context, precision);
    let mut model = model.with_recompute(recompute);
    if let Some(weights) = teacher {
        let teacher = Trainable::from_weights(weights)?;
        model = model.with_teacher(Teacher::new(teacher, [plan.rows, plan.context], precision));
    }
    let params = model.trainable().init(plan.seed);
    let mut dparams = Buf::zeroed(params.len());
    let n = plan.rows * plan.context;
    let tokens: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    let mut best = f64::INFINITY;
    for _ in 0..n_trials {
        let start = Instant::now();
        let of = (MicroBatch::plain(&tokens, &tokens), plan.objective);
        model.loss_and_grads(pool, &params, of, &mut dparams);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best * plan.micro_batches as f64)
}
