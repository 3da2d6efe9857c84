//! `loquat train`: one training run, by hand or as a job of the control plane.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use data::{Dataset, DatasetInfo};
use model::{Architecture, Config, Lora, MicroBatch, Objective, Rope, TrainModel, Trainable, Weights};
use tensor::{Buf, Pool, Precision};
use train::{
    AdamW, CheckpointPolicy, DataPart, Decay, Evaluate, Event, Guard, Method, Outcome, PLAN_VERSION, Plan,
    Sample, Schedule,
};

use crate::args;
use crate::home::Home;
use crate::view::View;

/// Steps of a run that is told neither steps nor minutes.
const STEPS_DEFAULT: u64 = 300;
/// Steps in a row that may go wrong before a run ends.
const SKIPS_MAX: u64 = 10;
/// Share of `--minutes` that goes to steps; the rest is evaluation, samples and checkpoints.
const STEP_SHARE: f64 = 0.93;

pub(crate) fn run(home: &Home, args: &args::Train) -> Result<ExitCode> {
    let store = home.store()?;
    let n_threads = args.threads.unwrap_or_else(crate::n_threads);
    let limits = tensor::limits::measure(&Pool::new(n_threads));
    if train::read_plan(&store, &args.run)?.is_none() {
        let (plan, start) = plan(home, args, n_threads)?;
        train::create(&store, &args.run, &plan, start.as_ref())?;
    }
    // SIGINT and SIGTERM end the run after its step, with a checkpoint; a second one ends it at once.
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let start = Instant::now();
    let context = train::Context {
        store: store.clone(),
        run: args.run.clone(),
        n_ranks: args.ranks,
        n_threads,
        peak_flops: if tensor::cpu::features().bf16 { limits.bf16_per_s } else { limits.f32_per_s },
        stop: &stop,
        seconds: &|| start.elapsed().as_secs_f64(),
        started_unix: crate::now_unix_s() as f64,
        yield_to_others: crate::machine::lower_priority,
    };
    let mut view = View::new();
    if !args.json {
        train::read_metrics(store.as_ref(), &args.run)?.iter().for_each(|e| view.remember(e));
    }
    let mut on_event = |event: &Event| match args.json {
        true => print_line(&event.to_line()),
        false => view.show(event),
    };
    match train::run(&context, &mut on_event)? {
        Outcome::Finished => Ok(ExitCode::SUCCESS),
        Outcome::Interrupted => Ok(ExitCode::from(control::EXIT_INTERRUPTED as u8)),
    }
}

fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    // Whoever reads the lines may be gone; the run is worth more than its audience.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// The plan of a new run: what was asked for, on this dataset, for as long as was asked; and the files of the model it
/// starts from.
fn plan(home: &Home, args: &args::Train, n_threads: usize) -> Result<(Plan, Option<model::Files>)> {
    let name = &args.dataset;
    let dataset = Dataset::open(&home.store()?, name)?;
    let pool = Pool::new(n_threads);
    let weights = args.method.init.as_deref().map(|init| start_weights(home, init, &dataset)).transpose()?;
    let config = match (&weights, &args.config) {
        (Some(weights), _) => weights.config.clone(),
        (None, Some(path)) => {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Config::from_json(&bytes).with_context(|| format!("{}", path.display()))?
        }
        (None, None) => small_llama(dataset.info(), args.context),
    };
    let model_name = args.method.init.as_deref().map(super::model::name_of).unwrap_or_default();
    let start = weights.clone().map(|weights| train::start_files(&pool, &model_name, weights)).transpose()?;
    let mut plan = Plan {
        version: PLAN_VERSION,
        data: vec![DataPart {
            dataset: name.clone(),
            sha256: dataset.info().plan_sha256.clone(),
            weight: 1.0,
        }],
        isolated: false,
        publish: args.publish.clone(),
        model: serde_json::from_str(&config.to_json("float32"))?,
        start: start.as_ref().map(|(start, _)| start.clone()),
        method: args.method.method(),
        objective: args.method.objective(),
        context: args.context,
        rows: args.rows,
        micro_batches: args.micro_batches,
        steps: 1,
        schedule: Schedule {
            decay: Decay::Wsd,
            lr_peak: args.lr.unwrap_or_else(|| args.method.lr_default()),
            lr_final_share: 0.05,
            warmup_steps: 0,
        },
        adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        muon: None,
        z_loss: 0.0,
        guard: Guard { skips_max: SKIPS_MAX, spike_sigmas: None },
        clip_norm: 1.0,
        seed: args.seed,
        bf16: tensor::cpu::features().bf16,
        evaluate: Evaluate { every_steps: 1, rows_max: 64 },
        checkpoint: CheckpointPolicy { every_steps: args.checkpoint_every, keep: 2 },
        sample: Sample { every_steps: 1, prompt: args.prompt.clone(), n_tokens: 48 },
    };
    plan.check()?;
    plan.check_ranks(args.ranks)?;
    plan.steps = match (args.steps, args.minutes) {
        (Some(steps), _) => steps,
        (None, Some(minutes)) => steps_in(&plan, trainable(&plan, weights)?, minutes, &pool)?,
        (None, None) => STEPS_DEFAULT,
    };
    plan.schedule.warmup_steps = (plan.steps / 20).clamp(1, 200);
    plan.evaluate.every_steps = (plan.steps / 12).max(1);
    plan.sample.every_steps = (plan.steps / 6).max(1);
    plan.check()?;
    Ok((plan, start.map(|(_, files)| files)))
}

/// A model to start from, whose ids are those of the dataset.
fn start_weights(home: &Home, init: &str, dataset: &Dataset) -> Result<Weights> {
    let path = super::model::resolve(home, init)?;
    let loaded = model::load(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let tokenizer = crate::serving::tokenizer(&loaded.tokenizer)
        .with_context(|| format!("cannot use the tokenizer of {}", path.display()))?;
    dataset.check_tokenizer(init, &tokenizer)?;
    loaded.weights.config.check_trainable()?;
    Ok(loaded.weights)
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
        self.dpo.map_or(Objective::CrossEntropy, |beta| Objective::Dpo { beta })
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

/// How many steps this machine does in `minutes`: measured on a few micro-batches of the plan's shape.
fn steps_in(plan: &Plan, trainable: Trainable, minutes: f64, pool: &Pool) -> Result<u64> {
    if !(minutes > 0.0 && minutes <= 60.0 * 24.0 * 365.0) {
        bail!("--minutes is {minutes}: it must be more than 0 and at most a year");
    }
    let precision = if plan.bf16 { Precision::Bf16 } else { Precision::F32 };
    let vocab = trainable.config().vocab;
    let mut model = TrainModel::new(trainable, plan.rows, plan.context, precision);
    let params = model.trainable().init(plan.seed);
    let mut dparams = Buf::zeroed(params.len());
    let n = plan.rows * plan.context;
    let tokens: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        let of = (MicroBatch::plain(&tokens, &tokens), plan.objective);
        model.loss_and_grads(pool, &params, of, &mut dparams);
        best = best.min(start.elapsed().as_secs_f64());
    }
    let step_seconds = best * plan.micro_batches as f64;
    Ok(((minutes * 60.0 * STEP_SHARE / step_seconds) as u64).max(1))
}

/// 6 layers, 192 wide: 2.4 million parameters in the layers and as many embeddings as the dataset has ids
/// (4,096 * 192 = 0.8 million).
fn small_llama(dataset: &DatasetInfo, context: usize) -> Config {
    Config {
        architecture: Architecture::Llama,
        n_layers: 6,
        width: 192,
        n_heads: 6,
        n_kv_heads: 2,
        head_width: 32,
        ff_width: 512,
        vocab: dataset.vocab_size,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        query_scalar: None,
        window: None,
        tied_embeddings: true,
        context_max: context,
        bos: None,
        eos: vec![dataset.end_of_text],
    }
}
