//! A run from its plan to a published model: start or resume, ranks, checkpoints, the final model.
//!
//! A run is a place in the store, `runs/<run>/`: `plan.json`, `metrics/`, `checkpoints/`, `samples/`. To go on with it
//! needs nothing else.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use comm::{Comm, Record};
use data::{Dataset, chain};
use model::{Stripes, Teacher, TrainModel, Trainable, Weights};
use serde::{Deserialize, Serialize};
use store::{ObjectName, Store};
use tensor::{Pool, Precision};

use crate::checkpoint::Loaded;
use crate::exchange::Memory;
use crate::layout::{Layout, Zero};
use crate::metrics_log::MetricsLog;
use crate::optimizer::Optimizer;
use crate::pipeline::in_flight;
use crate::publish::{Trained, publish};
use crate::rank::team::Team;
use crate::rank::{Lead, Links, Pipe, Rank, Rounds};
use crate::sample::Sampler;
use crate::saver::Saver;
use crate::tasks::Asker;
use crate::tensorboard::TensorBoard;
use crate::{Curve, Error, Event, Plan, Result, Started, read_metrics};

mod opened;
mod processes;

use opened::Opened;

pub use processes::run_rank;

/// How often metrics reach the store while steps go on.
const FLUSH_SECONDS: f64 = 2.0;

/// What a run is carried out with. None of it changes the result.
#[derive(Clone)]
pub struct Context<'a> {
    pub store: Arc<dyn Store>,
    pub run: String,
    pub n_ranks: usize,
    /// Ranks that compute one model together (tensor parallel); 1: each has the whole. Losses depend on it, within bounds.
    pub n_team: usize,
    /// Stages of layers that ranks form a pipeline of; 1: each rank has all layers. No result depends on it.
    pub n_stages: usize,
    /// The machine of each rank, where they are processes.
    pub hosts: Vec<String>,
    /// What ended the ranks before these, where that is known.
    pub after: Option<String>,
    /// What is divided among the ranks instead of copied.
    pub zero: Zero,
    /// Threads of all ranks together.
    pub n_threads: usize,
    /// Layers are computed again in the backward pass, which takes less memory and more time.
    pub recompute: bool,
    /// What the machine can do at most, for those who look: floating-point operations a second.
    pub peak_flops: f64,
    /// Set from outside: stop after the current step, with a checkpoint.
    pub stop: &'a AtomicBool,
    /// A clock that never goes back, in seconds.
    pub seconds: &'a (dyn Fn() -> f64 + Sync),
    /// Seconds since 1970 when `seconds` was 0: for those who draw curves over time.
    pub started_unix: f64,
}

impl Context<'_> {
    fn threads_of_a_rank(&self) -> usize {
        (self.n_threads / self.n_ranks).max(1)
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Finished,
    /// Stopped on request; the same call goes on with it.
    Interrupted,
}

/// Carries a created run out, from its newest checkpoint if it has one, with ranks that are threads. `on_event` is told
/// what happens.
pub fn run(context: &Context, on_event: &mut dyn FnMut(&Event)) -> Result<Outcome> {
    let mut opened = Opened::open(context)?;
    let mut refused = Vec::new();
    let loaded = opened.load_all(context, &mut refused)?;
    let step = loaded[0].state.step;
    opened.forget_start();
    let mut leader = Leader::new(context, &opened, step, on_event)?;
    leader.begin(refused, step, &opened);
    let parts = RankParts::new(context, &opened)?;
    let group = comm::threads(context.n_ranks)?;
    let ranks = group
        .into_iter()
        .zip(loaded)
        .map(|(comm, loaded)| parts.rank(Box::new(comm), loaded, Record::default()));
    let (finished, trained) = run_ranks(ranks.collect::<Result<_>>()?, &mut leader, context.stop)?;
    leader.end(finished, &opened, trained)
}

/// What ranks are made of, besides what connects them and what they begin with.
struct RankParts<'a> {
    context: &'a Context<'a>,
    opened: &'a Opened,
    precision: Precision,
    token_bytes: Arc<[u32]>,
    /// What every rank stores.
    writers: Arc<[Stripes]>,
}

impl<'a> RankParts<'a> {
    fn new(context: &'a Context<'a>, opened: &'a Opened) -> Result<RankParts<'a>> {
        let config = opened.plan.config()?;
        let precision = if opened.plan.bf16 { Precision::Bf16 } else { Precision::F32 };
        let voice = &opened.sources.voice;
        let (tokenizer, n_ids) = (voice.tokenizer(), voice.info().vocab_size as u32);
        let is_text = |id: u32| id < n_ids && !tokenizer.is_special(id);
        let bytes = |id: u32| if is_text(id) { tokenizer.token_bytes(id).len() as u32 } else { 0 };
        let token_bytes = (0..config.vocab as u32).map(bytes).collect();
        Ok(RankParts { context, opened, precision, token_bytes, writers: opened.writers(context) })
    }

    fn rank(&self, comm: Box<dyn Comm>, loaded: Loaded, record: Record) -> Result<Rank<'a>> {
        let RankParts { context, opened, precision, ref writers, .. } = *self;
        let Opened { plan, sources, trainable, checkpoints, .. } = opened;
        let (rank, part) = (comm.rank(), opened.part(comm.rank()));
        let layout = opened.layout(context, rank);
        let owned = layout.owned(layout.rank);
        let stored = [part.stored(&owned), part.stored(&layout.squared(&owned))];
        let how = (plan.checkpoint.keep, context.threads_of_a_rank());
        let saver = Saver::new(checkpoints.clone(), writers.clone(), (rank, [&stored[0], &stored[1]]), how);
        let Loaded { state, workers } = loaded;
        let computed = part.trainable.clone();
        let step = state.step;
        let rounds = plan.diloco.map(|diloco| Rounds {
            diloco,
            first: plan.workers_of(comm.rank(), comm.n_ranks()).start,
            alone: Layout::new(trainable, Zero::Nothing, [0, 1], plan.micro_batches / diloco.workers),
            workers,
            checkpoints: checkpoints.clone(),
            saved: state.step,
        });
        let Groups { comm, team, pipe } = self.groups(comm)?;
        let optimizer = Optimizer::new(plan, computed.specs(), &computed.decayed(), precision);
        let n_flights = pipe.as_ref().map_or(1, |pipe| match pipe.place() {
            [stage, n_stages] if stage + 1 < n_stages => in_flight([stage, n_stages], layout.n_turns),
            _ => 1,
        });
        Ok(Rank {
            saver,
            team,
            pipe,
            part: part.clone(),
            writers: writers.clone(),
            layout,
            memory: Memory::default(),
            is_saving: false,
            plan,
            comm,
            pool: Pool::new(context.threads_of_a_rank()),
            optimizer,
            model: self.model(computed, n_flights),
            trainable: trainable.clone(),
            mixture: sources.mixture.clone(),
            validation: sources.validation.clone(),
            token_bytes: self.token_bytes.clone(),
            squares: Vec::new(),
            state,
            rounds,
            links: Links::default(),
            first: step,
            // What is due at a later step has been done by whoever wrote its checkpoint.
            looked: if step == 0 { 0 } else { step + 1 },
            stepped: (context.seconds)(),
            seconds: context.seconds,
            bytes_told: 0,
            record,
        })
    }

    /// With memory for so many micro-batches.
    fn model(&self, computed: Trainable, n_flights: usize) -> TrainModel {
        let RankParts { context, opened, precision, .. } = *self;
        let [rows, positions] = [opened.plan.rows, opened.plan.context];
        let model = TrainModel::new(computed, rows, positions, precision)
            .with_z_loss(opened.plan.z_loss)
            .with_recompute(context.recompute)
            .with_flights(n_flights);
        match opened.teacher.clone() {
            Some(teacher) => model.with_teacher(Teacher::new(teacher, [rows, positions], precision)),
            None => model,
        }
    }

    /// The rank's team and its pipeline, if it has only a part of the model, and those that it shares micro-batches with.
    fn groups(&self, all: Box<dyn Comm>) -> Result<Groups> {
        let (context, stages) = (self.context, &self.opened.stages);
        let n_team = context.n_team;
        if n_team * stages.len() == 1 {
            return Ok(Groups { comm: all, team: None, pipe: None });
        }
        let [all, of_model, comm] = comm::teams(all, n_team * stages.len())?;
        let [of_model, of_team, of_pipe] = comm::teams(of_model, n_team)?;
        if stages.len() == 1 {
            return Ok(Groups { comm, team: Some(Team { comm: of_team, all }), pipe: None });
        }
        let pipe = Some(Pipe::new(of_pipe, all, &self.opened.trainable, stages));
        let team = (n_team > 1).then_some(Team { comm: of_team, all: of_model });
        Ok(Groups { comm, team, pipe })
    }
}

/// Whom a rank speaks to.
struct Groups {
    /// Those that compute the same with other micro-batches.
    comm: Box<dyn Comm>,
    team: Option<Team>,
    pipe: Option<Pipe>,
}

/// Runs every rank in a thread, rank 0 with the leader in this one. Returns whether the plan is done, and what has come of
/// it.
fn run_ranks(
    mut ranks: Vec<Rank>,
    leader: &mut Leader,
    stop: &AtomicBool,
) -> Result<(bool, Option<Trained>)> {
    let followers = ranks.split_off(1);
    let Some(mut first) = ranks.pop() else { return Err(Error::RankPanicked { rank: 0 }) };
    std::thread::scope(|scope| {
        let follow = |mut rank: Rank| -> Result<bool> {
            let finished = rank.run(None, stop)?;
            rank.trained(finished)?;
            Ok(finished)
        };
        let running: Vec<_> = followers.into_iter().map(|rank| scope.spawn(move || follow(rank))).collect();
        let mut trained = None;
        let led = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let finished = first.run(Some(leader), stop)?;
            trained = first.trained(finished)?;
            Ok(finished)
        }));
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
        failed.map_or(Ok((finished, trained)), Err)
    })
}

/// Rank 0's duties.
struct Leader<'a, 'b> {
    context: &'a Context<'a>,
    plan: &'a Plan,
    log: MetricsLog,
    board: TensorBoard,
    sampler: Sampler,
    asker: Asker,
    on_event: &'b mut dyn FnMut(&Event),
    flushed: f64,
    /// What it took until those that are left of other ranks go on, if these do.
    lost_seconds: Option<f64>,
}

impl<'a, 'b> Leader<'a, 'b> {
    fn new(
        context: &'a Context<'a>,
        opened: &'a Opened,
        step: u64,
        on_event: &'b mut dyn FnMut(&Event),
    ) -> Result<Leader<'a, 'b>> {
        let (store, run, plan) = (&context.store, &context.run, &opened.plan);
        Ok(Leader {
            log: MetricsLog::open(store.clone(), run, step)?,
            board: TensorBoard::open(store.clone(), run, step, context.started_unix)?,
            sampler: Sampler::new(plan, opened.sources.voice.tokenizer())?,
            asker: Asker::open((store, run), plan, opened.sources.voice.tokenizer())?,
            context,
            plan,
            on_event,
            flushed: (context.seconds)(),
            lost_seconds: None,
        })
    }

    fn begin(&mut self, refused: Vec<Event>, step: u64, opened: &Opened) {
        refused.into_iter().for_each(|event| self.event(event));
        self.started(step, opened);
    }

    fn end(&mut self, finished: bool, opened: &Opened, trained: Option<Trained>) -> Result<Outcome> {
        if finished {
            self.finish(&opened.sources.voice, &opened.trainable, trained)?;
        }
        self.flush_all();
        Ok(if finished { Outcome::Finished } else { Outcome::Interrupted })
    }

    fn started(&mut self, step: u64, Opened { trainable, sources, .. }: &Opened) {
        let of_model = trainable.flops_per_token(self.plan.context);
        self.event(Event::Started(Started {
            run: self.context.run.clone(),
            step,
            n_steps: self.plan.steps,
            n_params: trainable.n_params() as u64,
            // The teacher's shape was read when the run was opened.
            flops_per_token: self.plan.flops_per_token(of_model).unwrap_or(of_model),
            peak_flops: self.context.peak_flops,
            n_ranks: self.context.n_ranks as u64,
            hosts: self.context.hosts.clone(),
            began_unix: self.context.started_unix
                + self.lost_seconds.map_or(0.0, |_| (self.context.seconds)()),
            after: self.context.after.clone(),
            lost_seconds: self.lost_seconds,
            chats_cut: sources.n_cut,
            chats_dropped: sources.n_dropped,
        }));
    }

    fn flush(&mut self) {
        if let Err(error) = self.log.flush() {
            // The store may be full or away for a moment; the lines are kept and tried again.
            (self.on_event)(&Event::MetricsFailed { step: 0, why: chain(&error) });
        }
        self.flushed = (self.context.seconds)();
    }

    fn flush_all(&mut self) {
        self.flush();
        self.flush_board();
    }

    fn flush_board(&mut self) {
        if let Err(error) = self.board.flush((self.context.seconds)()) {
            (self.on_event)(&Event::MetricsFailed { step: 0, why: chain(&error) });
        }
    }

    /// Publishes the model, draws the curve.
    fn finish(&mut self, dataset: &Dataset, trainable: &Trainable, trained: Option<Trained>) -> Result<()> {
        if let (Some(name), Some(trained)) = (&self.plan.publish, trained) {
            publish(self.context, (self.plan, name), dataset, trainable, trained)?;
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
        let seconds = (self.context.seconds)();
        if let Err(error) = self.log.push(&event).and_then(|()| self.board.push(seconds, &event)) {
            (self.on_event)(&Event::MetricsFailed { step: event.step(), why: chain(&error) });
        }
        (self.on_event)(&event);
        if (self.context.seconds)() - self.flushed > FLUSH_SECONDS {
            self.flush();
        }
    }

    fn sample(&mut self, pool: &Pool, weights: Weights, step: u64) -> Result<()> {
        let text = self.sampler.continue_prompt(pool, weights, step)?;
        let name = ObjectName::parse(&format!("runs/{}/samples/{step:08}.txt", self.context.run))?;
        if let Err(error) = self.context.store.put(&name, text.as_bytes()) {
            (self.on_event)(&Event::MetricsFailed { step, why: chain(&error) });
        }
        self.event(Event::Sample { step, text });
        Ok(())
    }

    fn ask(&mut self, pool: &Pool, weights: Weights, step: u64) {
        let mut all = Vec::new();
        let asked = self.asker.ask(pool, weights, &mut |scores| all.push(scores));
        all.into_iter().for_each(|scores| self.event(Event::Task { step, scores }));
        // A task that the model has no room for is told; what is trained does not depend on it.
        if let Err(error) = asked {
            self.event(Event::TasksFailed { step, why: chain(&error) });
        }
    }
}

/// Refuses what cannot be divided.
fn check_division(plan: &Plan, zero: Zero, n_ranks: usize) -> Result<()> {
    match () {
        () if n_ranks == 1 || zero == Zero::Nothing => Ok(()),
        () if plan.muon.is_some() => Err(Error::MuonDivided),
        () if plan.diloco.is_some() => Err(Error::DilocoDivided),
        () if zero == Zero::Parameters && !plan.method.is_full() => Err(Error::LoraDivided),
        () => Ok(()),
    }
}
