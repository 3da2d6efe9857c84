//! Two controllers, one database, a world that crashes them at every boundary, delays them, lets processes die, recycles
//! pids, reboots the machine and turns the clock. One seed is one history; a failure prints its seed.
//!
//! The database is the real one (in RAM), the decisions and the doer are the real ones; only processes are simulated. While
//! one controller is between two steps, the other may take whole turns, so a controller that wakes up behind its lease is
//! an everyday event here.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::AtomicI64;
use std::sync::{Mutex, MutexGuard};

use telemetry::Metrics;

use super::*;
use crate::clock::Clock;
use crate::job::{Desired, JobSpec, JobState};
use crate::launcher::{Observed, Prepared};
use crate::reconcile::EXIT_INTERRUPTED;

/// Histories of a usual run; `LOQUAT_SIMULATION_SEEDS` asks for another number, `LOQUAT_SIMULATION_SEED` for one.
const SEEDS: u64 = 2_000;
const CHAOS_STEPS: usize = 30;
/// Longest wait after the chaos: a lease of a minute, a pause of a minute, half a minute of grace, the work itself.
const CALM_STEPS: usize = 150;

#[test]
fn no_job_runs_twice_at_once_and_every_job_gets_where_it_should() {
    let asked = |name| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().expect("a number"))
    };
    let only = asked("LOQUAT_SIMULATION_SEED");
    let n_seeds = asked("LOQUAT_SIMULATION_SEEDS").unwrap_or(SEEDS);
    let metrics = Metrics::new();
    let seeds: Vec<u64> = only.map_or_else(|| (0..n_seeds).collect(), |seed| vec![seed]);
    let run = |seeds: &[u64]| {
        let stage = Stage::new();
        let mut total = Tally::default();
        for seed in seeds {
            let outcome = catch_unwind(AssertUnwindSafe(|| Simulation::new(*seed, &stage, &metrics).run()));
            assert!(outcome.is_ok(), "simulation failed with seed {seed}");
            total = total.plus(outcome.unwrap_or_default());
        }
        total
    };
    let (left, right) = seeds.split_at(seeds.len() / 2);
    let total = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(left));
        run(right).plus(other.join().expect("a simulation failed"))
    });
    eprintln!("{} seeds: {total:?}", seeds.len());
    if only.is_none() {
        // The histories must really hold what they are meant to test.
        let n = seeds.len();
        let t = total;
        assert!(t.crashes > n && t.nested > n && t.adopted > n && t.late > n / 10, "{t:?}");
        assert!(t.succeeded > n / 2 && t.failed > n / 50 && t.cancelled > n / 20, "{t:?}");
    }
}

/// What happened, to see that the chaos is chaotic.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    crashes: usize,
    /// Turns of one controller in the middle of a turn of the other.
    nested: usize,
    /// Processes let go by a controller that had lost its lease in between.
    late: usize,
    /// Processes watched by a controller that did not start them.
    adopted: usize,
    succeeded: usize,
    failed: usize,
    cancelled: usize,
}

impl Tally {
    fn plus(self, other: Self) -> Self {
        Self {
            crashes: self.crashes + other.crashes,
            nested: self.nested + other.nested,
            late: self.late + other.late,
            adopted: self.adopted + other.adopted,
            succeeded: self.succeeded + other.succeeded,
            failed: self.failed + other.failed,
            cancelled: self.cancelled + other.cancelled,
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    /// Prepared; ends by itself when this incarnation of a controller dies.
    Gated,
    Running {
        asked_to_stop: bool,
        ignores_requests: bool,
    },
    Ended(Ending),
}

struct Instance {
    job: JobId,
    process: ProcessRef,
    /// The incarnation that started it; only it can tell how it ended.
    parent: u64,
    life: Life,
}

struct World {
    random: Random,
    now: Arc<AtomicI64>,
    control: Control,
    chaos: bool,
    next_ticks: u64,
    next_incarnation: u64,
    boot: u64,
    instances: Vec<Instance>,
    /// What a job still has to do; survives its processes, as a checkpoint does.
    work_left: BTreeMap<JobId, u64>,
    /// Attempts that really failed, counted by the world and not by the controllers.
    n_failures: BTreeMap<JobId, u32>,
    tally: Tally,
}

type SharedWorld = Arc<Mutex<World>>;
type SharedWorkers = Arc<Mutex<[Option<Worker>; 2]>>;

/// Unwinds out of a controller's turn, as kill −9 would end it.
struct Crash;

struct SimulatedLauncher {
    world: SharedWorld,
    workers: SharedWorkers,
    who: usize,
    incarnation: u64,
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl SimulatedLauncher {
    /// Every boundary between a write and an effect: nothing happens, the controller dies, or it sleeps while the other
    /// one goes on.
    fn boundary(&self) {
        let fate = {
            let mut world = lock(&self.world);
            if !world.chaos {
                return;
            }
            let fate = world.random.below(100);
            if fate < 2 {
                world.tally.crashes += 1;
            } else if fate < 10 {
                world.tally.nested += 1;
                let pause = world.random.below(20_000) as i64;
                world.now.fetch_add(pause, Ordering::SeqCst);
            }
            fate
        };
        if fate < 2 {
            resume_unwind(Box::new(Crash));
        } else if fate < 10 {
            take_turn(&self.world, &self.workers, 1 - self.who);
        }
    }
}

impl Launcher for SimulatedLauncher {
    fn prepare(&mut self, job: &Job) -> Result<Prepared> {
        self.boundary();
        let process = {
            let mut world = lock(&self.world);
            if world.chaos && world.random.percent(3) {
                *world.n_failures.entry(job.id).or_default() += 1;
                return Err(Error::StartProcess {
                    program: "simulated".into(),
                    source: std::io::ErrorKind::OutOfMemory.into(),
                });
            }
            world.add_instance(job.id, self.incarnation)
        };
        self.boundary();
        let log_path = None;
        Ok(Prepared { process, log_path })
    }

    fn release(&mut self, process: &ProcessRef) -> Result<()> {
        self.boundary();
        let lease = lock(&self.world).control.lease_holder(LEASE)?;
        let late = lease.is_none_or(|lease| lease.holder != self.incarnation.to_string());
        lock(&self.world).tally.late += usize::from(late);
        lock(&self.world).release(process);
        self.boundary();
        Ok(())
    }

    fn abandon(&mut self, process: &ProcessRef) -> Result<()> {
        self.boundary();
        let mut world = lock(&self.world);
        let instance = world.instance(process);
        assert!(!matches!(instance.life, Life::Running { .. }), "an abandoned process must not have run");
        instance.life = Life::Ended(Ending::Signaled(9));
        Ok(())
    }

    fn poll(&mut self, job: &Job) -> Result<Observed> {
        self.boundary();
        let mut world = lock(&self.world);
        let process = job.process.as_ref().expect("a job that runs");
        let instance = world.instance(process);
        let own = instance.parent == self.incarnation;
        let observed = match instance.life {
            Life::Ended(ending) if own => Observed::Ended(ending),
            Life::Ended(_) => Observed::Ended(Ending::Lost),
            _ => Observed::Running,
        };
        world.tally.adopted += usize::from(!own && observed == Observed::Running);
        Ok(observed)
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) -> Result<()> {
        self.boundary();
        lock(&self.world).stop(process, how);
        self.boundary();
        Ok(())
    }

    fn forget(&mut self, _: &ProcessRef) {
        self.boundary();
    }

    fn tick(&mut self) {
        self.boundary();
    }
}

impl World {
    fn instance(&mut self, process: &ProcessRef) -> &mut Instance {
        self.instances
            .iter_mut()
            .find(|instance| instance.process == *process)
            .expect("only processes that were started are named")
    }

    fn add_instance(&mut self, job: JobId, parent: u64) -> ProcessRef {
        // A handful of pids, so that they come around again and again.
        let taken = |pid: u32, all: &[Instance]| {
            all.iter().any(|i| i.process.pid == pid && !matches!(i.life, Life::Ended(_)))
        };
        let pid = (100..).find(|pid| !taken(*pid, &self.instances)).unwrap_or(100);
        self.next_ticks += 1;
        let process = ProcessRef {
            pid,
            start_ticks: self.next_ticks,
            boot_id: self.boot.to_string(),
            mark: self.next_ticks.to_string(),
        };
        self.instances.push(Instance { job, process: process.clone(), parent, life: Life::Gated });
        process
    }

    fn release(&mut self, process: &ProcessRef) {
        let ignores_requests = self.random.percent(20);
        let instance = self.instance(process);
        if instance.life != Life::Gated {
            return;
        }
        instance.life = Life::Running { asked_to_stop: false, ignores_requests };
        let job = instance.job;
        let n_running =
            self.instances.iter().filter(|i| i.job == job && matches!(i.life, Life::Running { .. })).count();
        assert_eq!(n_running, 1, "{job} runs {n_running} times at once");
        let recorded = self.control.get_job(job).unwrap().unwrap();
        assert_eq!(
            recorded.process.as_ref(),
            Some(process),
            "{job} runs in a process that the database does not know"
        );
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) {
        let job = self.instance(process).job;
        let recorded = self.control.get_job(job).unwrap().unwrap();
        if recorded.process.as_ref() == Some(process) {
            assert!(recorded.stop_sent_at.is_some(), "{job} is stopped without a record of it");
        }
        let instance = self.instance(process);
        instance.life = match (instance.life, how) {
            (Life::Ended(ending), _) => Life::Ended(ending),
            (Life::Gated, StopHow::Ask) => Life::Ended(Ending::Signaled(15)),
            (_, StopHow::Kill) => Life::Ended(Ending::Signaled(9)),
            (Life::Running { ignores_requests, .. }, StopHow::Ask) => {
                Life::Running { asked_to_stop: true, ignores_requests }
            }
        };
    }

    /// Time passes: processes work, end well or badly, and obey requests to stop.
    fn advance(&mut self) {
        let ms = 500 + self.random.below(if self.chaos { 4_000 } else { 12_000 });
        self.now.fetch_add(ms as i64, Ordering::SeqCst);
        for at in 0..self.instances.len() {
            let Life::Running { asked_to_stop, ignores_requests } = self.instances[at].life else {
                continue;
            };
            let job = self.instances[at].job;
            let left = self.work_left.entry(job).or_default();
            *left = left.saturating_sub(ms);
            let ending = if asked_to_stop && !ignores_requests {
                Ending::Exited(EXIT_INTERRUPTED)
            } else if *left == 0 {
                Ending::Exited(0)
            } else if self.chaos && self.random.percent(5) {
                let all = [Ending::Signaled(9), Ending::Exited(1), Ending::Exited(EXIT_INTERRUPTED)];
                all[self.random.below(3) as usize]
            } else {
                continue;
            };
            if !matches!(ending, Ending::Exited(0 | EXIT_INTERRUPTED)) {
                *self.n_failures.entry(job).or_default() += 1;
            }
            self.instances[at].life = Life::Ended(ending);
        }
    }

    /// A controller is gone: what it had prepared ends by itself, what it had started goes on.
    fn bury(&mut self, incarnation: u64) {
        for instance in &mut self.instances {
            if instance.parent == incarnation && instance.life == Life::Gated {
                instance.life = Life::Ended(Ending::Exited(1));
            }
        }
    }
}

/// One turn of controller `who`, if it is up and not in the middle of one.
fn take_turn(world: &SharedWorld, workers: &SharedWorkers, who: usize) {
    let Some(mut worker) = lock(workers)[who].take() else {
        return;
    };
    match catch_unwind(AssertUnwindSafe(|| worker.turn())) {
        Ok(_) => lock(workers)[who] = Some(worker),
        Err(payload) if payload.is::<Crash>() => {
            let incarnation = worker.holder.parse().expect("the holder is its number");
            lock(world).bury(incarnation);
        }
        Err(failure) => resume_unwind(failure),
    }
}

/// A database and a clock for many histories, one after the other: opening a database takes longer than a history.
struct Stage {
    control: Control,
    now: Arc<AtomicI64>,
}

impl Stage {
    fn new() -> Self {
        let now = Arc::new(AtomicI64::new(0));
        let clock = Arc::clone(&now);
        let clock = Clock::new(move || UnixMs(clock.load(Ordering::SeqCst)));
        let control = Control::in_memory(clock).unwrap();
        Self { control, now }
    }

    fn cleared(&self) -> (Control, Arc<AtomicI64>) {
        self.now.store(1_800_000_000_000, Ordering::SeqCst);
        let tables = "DELETE FROM jobs; DELETE FROM leases; DELETE FROM sqlite_sequence";
        let cleared = self.control.write("clear", |t| Ok(t.execute_batch(tables)?));
        cleared.unwrap();
        (self.control.clone(), Arc::clone(&self.now))
    }
}

struct Simulation<'a> {
    world: SharedWorld,
    workers: SharedWorkers,
    control: Control,
    metrics: &'a Metrics,
}

impl<'a> Simulation<'a> {
    fn new(seed: u64, stage: &Stage, metrics: &'a Metrics) -> Self {
        let (control, now) = stage.cleared();
        let mut random = Random(seed);
        let mut work_left = BTreeMap::new();
        for number in 0..=random.below(3) {
            let spec = JobSpec {
                name: format!("job{number}"),
                args: Vec::new(),
                env: BTreeMap::new(),
                max_restarts: random.below(6) as u32,
            };
            let submitted = control.submit(&spec).unwrap();
            work_left.insert(submitted.job.id, random.below(60_000));
        }
        let world = World {
            random,
            now,
            control: control.clone(),
            chaos: true,
            next_ticks: 0,
            next_incarnation: 0,
            boot: 0,
            instances: Vec::new(),
            work_left,
            n_failures: BTreeMap::new(),
            tally: Tally::default(),
        };
        Self { world: Arc::new(Mutex::new(world)), workers: Arc::default(), control, metrics }
    }

    fn run(self) -> Tally {
        for _ in 0..CHAOS_STEPS {
            self.disturb();
            lock(&self.world).advance();
            let first = lock(&self.world).random.below(2) as usize;
            take_turn(&self.world, &self.workers, first);
            take_turn(&self.world, &self.workers, 1 - first);
        }
        lock(&self.world).chaos = false;
        for who in 0..2 {
            self.kill(who);
            self.revive(who);
        }
        for _ in 0..CALM_STEPS {
            if self.control.survey_jobs().unwrap().unfinished.is_empty() {
                break;
            }
            lock(&self.world).advance();
            take_turn(&self.world, &self.workers, 0);
            take_turn(&self.world, &self.workers, 1);
        }
        self.check_end();
        // The workers' launchers hold the workers; without this they would keep each other alive.
        *lock(&self.workers) = [None, None];
        lock(&self.world).tally
    }

    /// What happens between turns: controllers die and come back, users cancel, the clock jumps, the machine reboots.
    fn disturb(&self) {
        for who in 0..2 {
            let up = lock(&self.workers)[who].is_some();
            let (die, revive, drain) = {
                let random = &mut lock(&self.world).random;
                (random.percent(3), random.percent(40), random.percent(2))
            };
            if up && die {
                self.kill(who);
            } else if !up && revive {
                self.revive(who);
            } else if up
                && drain
                && let Some(worker) = &mut lock(&self.workers)[who]
            {
                worker.options.policy.draining = true;
            }
        }
        let (cancel, jump, reboot) = {
            let random = &mut lock(&self.world).random;
            (random.percent(1), random.percent(2), random.percent(1))
        };
        if cancel {
            let jobs = self.control.list_jobs(10).unwrap();
            let at = lock(&self.world).random.below(jobs.len() as u64) as usize;
            self.control.cancel_job(jobs[at].id).unwrap();
        }
        if jump {
            let mut world = lock(&self.world);
            let ms = world.random.below(7_200_000) as i64 - 3_600_000;
            world.now.fetch_add(ms, Ordering::SeqCst);
        }
        if reboot {
            self.kill(0);
            self.kill(1);
            let mut world = lock(&self.world);
            world.boot += 1;
            for instance in &mut world.instances {
                if !matches!(instance.life, Life::Ended(_)) {
                    instance.life = Life::Ended(Ending::Lost);
                }
            }
        }
    }

    fn kill(&self, who: usize) {
        if let Some(worker) = lock(&self.workers)[who].take() {
            let incarnation = worker.holder.parse().expect("the holder is its number");
            lock(&self.world).bury(incarnation);
        }
    }

    fn revive(&self, who: usize) {
        let incarnation = {
            let mut world = lock(&self.world);
            world.next_incarnation += 1;
            world.next_incarnation
        };
        let launcher = SimulatedLauncher {
            world: Arc::clone(&self.world),
            workers: Arc::clone(&self.workers),
            who,
            incarnation,
        };
        lock(&self.workers)[who] = Some(Worker {
            control: self.control.clone(),
            launcher: Box::new(launcher),
            metrics: self.metrics.job(),
            holder: incarnation.to_string(),
            options: ReconcilerOptions::default(),
            order: Arc::default(),
            lease: None,
        });
    }

    fn check_end(&self) {
        let mut world = lock(&self.world);
        for job in self.control.list_jobs(10).unwrap() {
            let alive = world.instances.iter().filter(|i| i.job == job.id);
            let n_alive = alive.filter(|i| !matches!(i.life, Life::Ended(_))).count();
            assert_eq!(n_alive, 0, "{job:?} has a process left");
            let n_failures = world.n_failures.get(&job.id).copied().unwrap_or(0);
            let tally = &mut world.tally;
            match job.state {
                JobState::Succeeded => tally.succeeded += 1,
                JobState::Failed => {
                    tally.failed += 1;
                    assert!(
                        job.n_failures == job.spec.max_restarts + 1 && job.n_failures <= n_failures,
                        "{job:?} is given up after {n_failures} failures"
                    );
                }
                JobState::Cancelled => {
                    tally.cancelled += 1;
                    assert_eq!(job.desired, Desired::Cancelled, "{job:?} was not cancelled");
                }
                _ => panic!("{job:?} is not over"),
            }
            if job.state == JobState::Succeeded {
                assert_eq!(world.work_left[&job.id], 0, "{job:?} is not done");
            }
        }
    }
}
