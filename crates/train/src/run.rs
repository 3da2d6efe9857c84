//! A run from its plan to a published model: start or resume, ranks, checkpoints, the final model.
//!
//! A run is a place in the store, `runs/<run>/`: `plan.json`, `metrics/`, `checkpoints/`, `samples/`. To go on with it
//! needs nothing else.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use comm::{Comm, Record};
use data::{Dataset, chain};
use model::{Stage, Stripes, TrainModel, Trainable, Weights};
use store::{ObjectName, Store};
use tensor::{Buf, Pool, Precision};

use crate::checkpoint::{Checkpoints, Loaded, Reader};
use crate::exchange::Memory;
use crate::layout::{Layout, Zero};
use crate::metrics_log::MetricsLog;
use crate::optimizer::Optimizer;
use crate::part::{self, Part};
use crate::pipeline::in_flight;
use crate::plans::stored_plan;
use crate::publish::{Trained, publish};
use crate::rank::team::{self, Team};
use crate::rank::{Lead, Links, Pipe, Rank, Rounds, check_pipeline};
use crate::sample::Sampler;
use crate::saver::Saver;
use crate::sources::Sources;
use crate::state::State;
use crate::tasks::Asker;
use crate::tensorboard::TensorBoard;
use crate::{Curve, Error, Event, Plan, Result, Started, agree, read_metrics, start};

/// How often metrics reach the store while steps go on.
const FLUSH_SECONDS: f64 = 2.0;

/// What a run is carried out with. None of it changes the result.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// Stopped on request; the same call goes on with it.
    Interrupted,
}

/// What every rank needs of a run.
struct Opened {
    plan: Plan,
    sources: Sources,
    trainable: Trainable,
    /// Of a pipeline.
    stages: Vec<Stage>,
    /// Of ranks that compute one model together, stage by stage and by their place in their team: what they compute.
    parts: Vec<Part>,
    checkpoints: Checkpoints,
}

impl Opened {
    fn open(context: &Context) -> Result<Opened> {
        let run = &context.run;
        let (plan, plan_sha256) =
            stored_plan(&context.store, run)?.ok_or_else(|| Error::NoRun { run: run.clone() })?;
        plan.check_teams(context.n_ranks, [context.n_team, context.n_stages])?;
        team::check(&plan, context.n_team)?;
        check_pipeline(&plan, context.zero, context.n_stages)?;
        check_division(&plan, context.zero, context.n_ranks / context.n_team / context.n_stages)?;
        let sources = Sources::open(&context.store, &plan)?;
        let trainable = start::trainable(&context.store, run, &plan)?;
        let checkpoints = Checkpoints {
            store: context.store.clone(),
            run: run.clone(),
            plan_sha256,
            n_params: trainable.n_params(),
            n_workers: plan.diloco.map_or(0, |diloco| diloco.workers),
        };
        let stages = Stage::divide(trainable.config(), plan.context, context.n_stages)?;
        let parts = Part::all(&trainable, context.n_team, &stages)?;
        Ok(Opened { plan, sources, trainable, stages, parts, checkpoints })
    }

    /// What a rank computes.
    fn part(&self, rank: usize) -> &Part {
        &self.parts[rank % self.parts.len()]
    }

    /// Of the state of its part, what a rank keeps.
    fn layout(&self, context: &Context, rank: usize) -> Layout {
        let n_parts = self.parts.len();
        let alike = [rank / n_parts, context.n_ranks / n_parts];
        let Part { trainable, first, .. } = self.part(rank);
        Layout::behind(*first, trainable, (context.zero, alike), self.plan.micro_batches)
    }

    /// What every rank stores of the whole model's vectors.
    fn writers(&self, context: &Context) -> Arc<[Stripes]> {
        let layouts: Vec<Layout> = (0..self.parts.len()).map(|place| self.layout(context, place)).collect();
        part::writers(&self.parts, &layouts).into()
    }

    /// What a rank with so many workers begins with.
    fn initial(&self, reader: &Reader) -> Loaded {
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
    fn load_all(&self, context: &Context, refused: &mut Vec<Event>) -> Result<Vec<Loaded>> {
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
    fn forget_start(&mut self) {
        if !self.plan.objective.is_of_pairs() {
            self.trainable.forget_start();
        }
    }
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

/// Carries a created run out as one rank of several processes; `comm` leads to the others. Only on rank 0 `on_event` is
/// told what happens. An error on one rank leaves the others waiting: end the process.
pub fn run_rank(
    context: &Context,
    (comm, record): (Box<dyn Comm>, Record),
    on_event: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    record.work(0, "opening the run");
    let mut opened = Opened::open(context)?;
    let mut refused = Vec::new();
    let layout = opened.layout(context, comm.rank());
    let workers = opened.plan.workers_of(comm.rank(), comm.n_ranks());
    let reader = Reader { layout: &layout, stripes: &opened.part(comm.rank()).stripes, workers };
    let load = |step| opened.checkpoints.load(step, &reader);
    let found = agree::newest(&opened.checkpoints, comm.as_ref(), &load, &mut refused)?;
    let loaded = found.unwrap_or_else(|| opened.initial(&reader));
    let step = loaded.state.step;
    opened.forget_start();
    let mut leader =
        if comm.rank() == 0 { Some(Leader::new(context, &opened, step, on_event)?) } else { None };
    if let Some(leader) = &mut leader {
        leader.begin(refused, step, &opened);
    }
    let mut rank = RankParts::new(context, &opened)?.rank(comm, loaded, record)?;
    let lead = leader.as_mut().map(|leader| leader as &mut dyn Lead);
    let finished = rank.run(lead, context.stop)?;
    let trained = rank.trained(finished)?;
    let outcome = match leader {
        Some(leader) => leader.end(finished, &opened, trained)?,
        None if finished => Outcome::Finished,
        None => Outcome::Interrupted,
    };
    rank.record.work(rank.state.step, "leaving");
    rank.comm.leave()?;
    Ok(outcome)
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
        let stored = part.stored(&layout.owned(layout.rank));
        let how = (plan.checkpoint.keep, context.threads_of_a_rank());
        let saver = Saver::new(checkpoints.clone(), writers.clone(), (rank, &stored), how);
        let Loaded { state, workers } = loaded;
        let computed = part.trainable.clone();
        let rounds = plan.diloco.map(|diloco| Rounds {
            diloco,
            first: plan.workers_of(comm.rank(), comm.n_ranks()).start,
            alone: Layout::new(trainable, Zero::Nothing, [0, 1], plan.micro_batches / diloco.workers),
            workers,
            checkpoints: checkpoints.clone(),
            saved: state.step,
        });
        let Groups { comm, team, pipe } = self.groups(comm)?;
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
            optimizer: Optimizer::new(plan, computed.specs(), &computed.decayed(), precision),
            model: TrainModel::new(computed, plan.rows, plan.context, precision)
                .with_z_loss(plan.z_loss)
                .with_recompute(context.recompute)
                .with_flights(n_flights),
            trainable: trainable.clone(),
            mixture: sources.mixture.clone(),
            validation: sources.validation.clone(),
            token_bytes: self.token_bytes.clone(),
            squares: Vec::new(),
            state,
            rounds,
            links: Links::default(),
            seconds: context.seconds,
            bytes_told: 0,
            record,
        })
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
        })
    }

    fn begin(&mut self, refused: Vec<Event>, step: u64, opened: &Opened) {
        refused.into_iter().for_each(|event| self.event(event));
        self.started(step, opened);
    }

    fn end(mut self, finished: bool, opened: &Opened, trained: Option<Trained>) -> Result<Outcome> {
        if finished {
            self.finish(&opened.sources.voice, &opened.trainable, trained)?;
        }
        self.flush();
        self.flush_board();
        Ok(if finished { Outcome::Finished } else { Outcome::Interrupted })
    }

    fn started(&mut self, step: u64, Opened { trainable, sources, .. }: &Opened) {
        self.event(Event::Started(Started {
            run: self.context.run.clone(),
            step,
            n_steps: self.plan.steps,
            n_params: trainable.n_params() as u64,
            flops_per_token: trainable.flops_per_token(self.plan.context),
            peak_flops: self.context.peak_flops,
            n_ranks: self.context.n_ranks as u64,
            hosts: self.context.hosts.clone(),
            began_unix: self.context.started_unix,
            after: self.context.after.clone(),
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
