//! A run from its plan to a published model: start or resume, ranks, checkpoints, the final model.
//!
//! A run is a place in the store, `runs/<run>/`: `plan.json`, `metrics/`, `checkpoints/`, `samples/`. To go on with it
//! needs nothing else.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use comm::ThreadComm;
use data::{Batches, Dataset, Split};
use model::{TrainModel, Trainable};
use sha2::{Digest, Sha256};
use store::{BundleWriter, ObjectName, Put, Store};
use tensor::packed::WeightKind;
use tensor::{Buf, Pool, Precision};

use crate::checkpoint::{Checkpoints, State, chain};
use crate::metrics_log::MetricsLog;
use crate::rank::{Lead, Rank};
use crate::sample::Sampler;
use crate::{Curve, Error, Event, Plan, Result, Started, read_metrics};

/// How often metrics reach the store while steps go on.
const FLUSH_SECONDS: f64 = 2.0;

/// The validation rows are those of this seed in every run, so that runs compare.
const VALIDATION_SEED: u64 = 0;

/// What a run is carried out with. None of it changes the result.
pub struct Context<'a> {
    pub store: Arc<dyn Store>,
    pub run: String,
    pub n_ranks: usize,
    /// Threads of all ranks together.
    pub n_threads: usize,
    /// What the machine can do at most, for those who look: floating-point operations a second.
    pub peak_flops: f64,
    /// Set from outside: stop after the current step, with a checkpoint.
    pub stop: &'a AtomicBool,
    /// A clock that never goes back, in seconds.
    pub seconds: &'a (dyn Fn() -> f64 + Sync),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// Stopped on request; the same call goes on with it.
    Interrupted,
}

/// Writes the plan into the run. A run that exists keeps its plan: another one is refused, naming the first field
/// that differs.
pub fn create(store: &Arc<dyn Store>, run: &str, plan: &Plan) -> Result<()> {
    plan.check()?;
    let name = plan_name(run)?;
    if store.put_if_absent(&name, &plan.to_json())? == Put::Created {
        return Ok(());
    }
    let old = Plan::from_json(&store.get(&name)?)?;
    match first_difference(&as_value(&old)?, &as_value(plan)?, String::new()) {
        None => Ok(()),
        Some(field) => Err(Error::PlanChanged { run: run.to_owned(), field }),
    }
}

/// The plan of a run, if there is such a run.
pub fn read_plan(store: &Arc<dyn Store>, run: &str) -> Result<Option<Plan>> {
    let name = plan_name(run)?;
    match store.head(&name)? {
        Some(_) => Ok(Some(Plan::from_json(&store.get(&name)?)?)),
        None => Ok(None),
    }
}

/// Carries a created run out, from its newest checkpoint if it has one. `on_event` is told what happens.
pub fn run(context: &Context, on_event: &mut dyn FnMut(&Event)) -> Result<Outcome> {
    let run = &context.run;
    let plan = read_plan(&context.store, run)?.ok_or_else(|| Error::NoRun { run: run.clone() })?;
    plan.check_ranks(context.n_ranks)?;
    let dataset = open_dataset(context, &plan)?;
    let trainable = Trainable::new(&plan.config()?);
    let checkpoints = Checkpoints {
        store: context.store.clone(),
        run: run.clone(),
        plan_sha256: hex::encode(Sha256::digest(plan.to_json())),
        n_params: trainable.n_params(),
    };
    let mut refused = Vec::new();
    let state = checkpoints.load_newest(&mut |event| refused.push(event))?;
    let step = state.as_ref().map_or(0, |s| s.step);
    let mut leader = Leader {
        log: MetricsLog::open(context.store.clone(), run, step)?,
        sampler: Sampler::new(&plan, dataset.tokenizer())?,
        checkpoints,
        context,
        plan: &plan,
        on_event,
        flushed: (context.seconds)(),
    };
    for event in refused {
        leader.event(event);
    }
    leader.started(step, trainable.n_params())?;
    let states = (0..context.n_ranks).map(|_| match &state {
        Some(state) => state.clone(),
        None => State::initial(&trainable, plan.seed),
    });
    let ranks = ranks(context, &plan, &dataset, states)?;
    let (finished, params) = run_ranks(ranks, &mut leader, context.stop)?;
    if finished {
        leader.finish(&dataset, &trainable, &params)?;
    }
    leader.flush();
    Ok(if finished { Outcome::Finished } else { Outcome::Interrupted })
}

fn open_dataset(context: &Context, plan: &Plan) -> Result<Dataset> {
    let name = &plan.dataset;
    let dataset = Dataset::open(&context.store, name)?;
    let found = dataset.info().plan_sha256.clone();
    if found != plan.dataset_sha256 {
        let planned = plan.dataset_sha256.clone();
        return Err(Error::DatasetChanged { name: name.clone(), found, planned });
    }
    let (model, dataset_vocab) = (plan.config()?.vocab, dataset.info().vocab_size);
    if model != dataset_vocab {
        return Err(Error::Vocabulary { model, dataset: dataset_vocab });
    }
    Ok(dataset)
}

fn ranks<'a>(
    context: &Context<'a>,
    plan: &'a Plan,
    dataset: &Dataset,
    states: impl Iterator<Item = State>,
) -> Result<Vec<Rank<'a>>> {
    let config = plan.config()?;
    let precision = if plan.bf16 { Precision::Bf16 } else { Precision::F32 };
    let n_threads = (context.n_threads / context.n_ranks).max(1);
    let tokenizer = dataset.tokenizer();
    let bytes = |id: u32| if tokenizer.is_special(id) { 0 } else { tokenizer.token_bytes(id).len() as u32 };
    let token_bytes: Arc<[u32]> = (0..config.vocab as u32).map(bytes).collect();
    let trainable = Trainable::new(&config);
    let group: Vec<ThreadComm> = comm::threads(context.n_ranks)?;
    let rank = |(comm, state): (ThreadComm, State)| -> Result<Rank<'a>> {
        Ok(Rank {
            plan,
            comm: Box::new(comm),
            pool: Pool::new(n_threads),
            model: TrainModel::new(trainable.clone(), plan.rows, plan.context, precision),
            trainable: trainable.clone(),
            train: Batches::new(dataset, Split::Train, plan.seed, plan.context)?,
            validation: Batches::new(dataset, Split::Validation, VALIDATION_SEED, plan.context)?,
            token_bytes: token_bytes.clone(),
            grads: Buf::zeroed(state.params.len()),
            spare: Vec::new(),
            squares: Vec::new(),
            decayed: trainable.decayed(),
            state,
            seconds: context.seconds,
        })
    };
    group.into_iter().zip(states).map(rank).collect()
}

/// Runs every rank in a thread, rank 0 with the leader in this one. Returns whether the plan is done, and rank 0's
/// parameters.
fn run_ranks(mut ranks: Vec<Rank>, leader: &mut Leader, stop: &AtomicBool) -> Result<(bool, Buf<f32>)> {
    let followers = ranks.split_off(1);
    let Some(mut first) = ranks.pop() else { return Err(Error::RankPanicked { rank: 0 }) };
    std::thread::scope(|scope| {
        let running: Vec<_> =
            followers.into_iter().map(|mut rank| scope.spawn(move || rank.run(None, stop))).collect();
        let led = std::panic::catch_unwind(AssertUnwindSafe(|| first.run(Some(leader), stop)));
        let params = std::mem::take(&mut first.state.params);
        drop(first); // Frees followers that wait for a rank that failed.
        let mut results = vec![led];
        results.extend(running.into_iter().map(|r| r.join()));
        let mut finished = true;
        let mut failed = None;
        for (rank, result) in results.into_iter().enumerate() {
            match result.unwrap_or(Err(Error::RankPanicked { rank })) {
                Ok(done) => finished &= done,
                // The others only say that they lost a rank: the cause is the error that is not of the group.
                Err(Error::Comm(e)) => failed = failed.or(Some(Error::Comm(e))),
                Err(e) => failed = Some(e),
            }
        }
        failed.map_or(Ok((finished, params)), Err)
    })
}

/// Rank 0's duties.
struct Leader<'a, 'b> {
    context: &'a Context<'a>,
    plan: &'a Plan,
    checkpoints: Checkpoints,
    log: MetricsLog,
    sampler: Sampler,
    on_event: &'b mut dyn FnMut(&Event),
    flushed: f64,
}

impl Leader<'_, '_> {
    fn started(&mut self, step: u64, n_params: usize) -> Result<()> {
        self.event(Event::Started(Started {
            run: self.context.run.clone(),
            step,
            n_steps: self.plan.steps,
            n_params: n_params as u64,
            flops_per_token: self.plan.config()?.flops_per_token_train(self.plan.context),
            peak_flops: self.context.peak_flops,
            n_ranks: self.context.n_ranks as u64,
        }));
        Ok(())
    }

    fn flush(&mut self) {
        if let Err(error) = self.log.flush() {
            // The store may be full or away for a moment; the lines are kept and tried again.
            (self.on_event)(&Event::MetricsFailed { step: 0, why: chain(&error) });
        }
        self.flushed = (self.context.seconds)();
    }

    /// Publishes the model, draws the curve.
    fn finish(&mut self, dataset: &Dataset, trainable: &Trainable, params: &[f32]) -> Result<()> {
        if let Some(name) = &self.plan.publish {
            publish(self.context, self.plan, name, dataset, trainable, params)?;
        }
        self.event(Event::Finished { step: self.plan.steps, model: self.plan.publish.clone() });
        self.flush();
        let mut curve = Curve::default();
        for event in read_metrics(self.context.store.as_ref(), &self.context.run)? {
            curve.push(&event);
        }
        let svg = curve.svg(&format!("run {}", self.context.run));
        let name = ObjectName::parse(&format!("runs/{}/curve.svg", self.context.run))?;
        Ok(self.context.store.put(&name, svg.as_bytes())?)
    }
}

impl Lead for Leader<'_, '_> {
    fn event(&mut self, event: Event) {
        if let Err(error) = self.log.push(&event) {
            (self.on_event)(&Event::MetricsFailed { step: event.step(), why: chain(&error) });
        }
        (self.on_event)(&event);
        if (self.context.seconds)() - self.flushed > FLUSH_SECONDS {
            self.flush();
        }
    }

    /// A checkpoint that cannot be written (a full disk) is reported; the run goes on and tries again at the next.
    fn save(&mut self, state: &State) -> bool {
        let start = (self.context.seconds)();
        let saved = self.checkpoints.save(state).and_then(|bytes| {
            self.checkpoints.prune(self.plan.checkpoint.keep)?;
            Ok(bytes)
        });
        let seconds = (self.context.seconds)() - start;
        let event = match &saved {
            Ok(bytes) => Event::Checkpoint { step: state.step, bytes: *bytes, seconds },
            Err(error) => Event::CheckpointFailed { step: state.step, why: chain(error) },
        };
        self.event(event);
        saved.is_ok()
    }

    fn sample(&mut self, pool: &Pool, trainable: &Trainable, state: &State) -> Result<()> {
        let text = self.sampler.continue_prompt(pool, trainable, state)?;
        let name = ObjectName::parse(&format!("runs/{}/samples/{:08}.txt", self.context.run, state.step))?;
        if let Err(error) = self.context.store.put(&name, text.as_bytes()) {
            (self.on_event)(&Event::MetricsFailed { step: state.step, why: chain(&error) });
        }
        self.event(Event::Sample { step: state.step, text });
        Ok(())
    }
}

/// The finished model as a Hugging Face directory, visible with its manifest.
fn publish(
    context: &Context,
    plan: &Plan,
    name: &str,
    dataset: &Dataset,
    trainable: &Trainable,
    params: &[f32],
) -> Result<()> {
    let pool = Pool::new(context.n_threads);
    let weights = trainable.to_weights(&pool, params, WeightKind::F32);
    let mut bundle = BundleWriter::new(&context.store, &format!("models/{name}"))?;
    for (file, bytes) in model::hf::files(&weights)? {
        bundle.add(file, &bytes)?;
    }
    bundle.add("tokenizer.json", dataset.tokenizer().to_json().as_bytes())?;
    bundle.add("tokenizer_config.json", dataset.tokenizer().config_json(None).as_bytes())?;
    let meta =
        serde_json::json!({ "run": context.run, "dataset": plan.dataset, "steps": plan.steps, "base": true });
    bundle.publish("model", meta)?;
    Ok(())
}

fn plan_name(run: &str) -> Result<ObjectName> {
    Ok(ObjectName::parse(&format!("runs/{run}/plan.json"))?)
}

fn as_value(plan: &Plan) -> Result<serde_json::Value> {
    serde_json::to_value(plan).map_err(Error::PlanJson)
}

/// The path of the first field in which two values differ.
fn first_difference(old: &serde_json::Value, new: &serde_json::Value, path: String) -> Option<String> {
    use serde_json::Value::Object;
    match (old, new) {
        (Object(a), Object(b)) => a.keys().chain(b.keys()).find_map(|key| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let null = serde_json::Value::Null;
            first_difference(a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null), path)
        }),
        _ => (old != new).then_some(path),
    }
}
