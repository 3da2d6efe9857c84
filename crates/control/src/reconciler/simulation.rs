//! Two controllers, one database, a world that crashes them at every boundary, delays them, lets processes die, recycles
//! pids, reboots the machine, turns the clock, and delivers what was sent once more, at once or much later. In every other
//! history the controllers are of a node with a few cores, and jobs of different needs and priorities make room for each
//! other. One seed is one history; a failure prints its seed.
//!
//! The database is the real one (in RAM), the decisions and the doer are the real ones; only processes are simulated. While
//! one controller is between two steps, the other may take whole turns, so a controller that wakes up behind its lease is
//! an everyday event here.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::AtomicI64;

use telemetry::Metrics;

use super::*;
use crate::clock::Clock;
use crate::job::{Desired, JobSpec, JobState, Needs};
use crate::testing::Random;

mod world;

use world::{Crash, Life, SharedWorkers, SharedWorld, SimulatedLauncher, World, lock};

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
        assert!(t.replayed > n && t.moved > n / 10, "{t:?}");
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
    /// Messages delivered again, after anything may have happened.
    replayed: usize,
    /// Jobs asked to stop that are still wanted.
    moved: usize,
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
            replayed: self.replayed + other.replayed,
            moved: self.moved + other.moved,
            succeeded: self.succeeded + other.succeeded,
            failed: self.failed + other.failed,
            cancelled: self.cancelled + other.cancelled,
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
        let tables = "DELETE FROM jobs; DELETE FROM leases; DELETE FROM nodes; DELETE FROM sqlite_sequence";
        let cleared = self.control.write("clear", |t| Ok(t.batch(tables)?));
        cleared.unwrap();
        (self.control.clone(), Arc::clone(&self.now))
    }
}

struct Simulation<'a> {
    world: SharedWorld,
    workers: SharedWorkers,
    control: Control,
    metrics: &'a Metrics,
    /// The machine of both controllers, if they are of one.
    node: Option<NodeSpec>,
}

/// Of the node.
const CORES: u32 = 4;

fn named(machine: &str) -> NodeSpec {
    NodeSpec { name: "n".to_owned(), machine: machine.to_owned(), ..NodeSpec::default() }
}

impl<'a> Simulation<'a> {
    fn new(seed: u64, stage: &Stage, metrics: &'a Metrics) -> Self {
        let (control, now) = stage.cleared();
        let mut random = Random(seed);
        let mut work_left = BTreeMap::new();
        let node = (seed % 2 == 1).then(|| NodeSpec { cores: CORES, jobs_max: 4, ..named("machine") });
        for number in 0..=random.below(3) {
            let spec = JobSpec {
                name: format!("job{number}"),
                max_restarts: random.below(6) as u32,
                needs: Needs { cores: random.below(u64::from(CORES) + 1) as u32, ..Needs::default() },
                priority: random.below(4) as i32,
                ..JobSpec::default()
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
            node: node.clone(),
            sent: Vec::new(),
            instances: Vec::new(),
            work_left,
            n_failures: BTreeMap::new(),
            tally: Tally::default(),
        };
        Self { world: Arc::new(Mutex::new(world)), workers: Arc::default(), control, metrics, node }
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
        self.repeat();
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

    /// What was sent comes once more: to a process, from a user, from another machine that was given the same name.
    fn repeat(&self) {
        let (resend, resubmit, impostor) = {
            let random = &mut lock(&self.world).random;
            (random.percent(20), random.percent(5), random.percent(5))
        };
        if resend {
            lock(&self.world).replay();
        }
        let jobs = self.control.list_jobs(10).unwrap();
        let at = lock(&self.world).random.below(jobs.len() as u64) as usize;
        let job = &jobs[at];
        if resubmit && !job.state.is_over() {
            let again = self.control.submit(&job.spec).unwrap();
            assert!(!again.created && again.job.id == job.id, "{job:?} was submitted twice");
        }
        if impostor && self.node.is_some() {
            let nodes = self.control.list_nodes().unwrap();
            let is_ours = nodes.first().is_some_and(|node| {
                let runs = jobs.iter().any(|job| job.process.is_some());
                node.spec.machine == "machine" && (runs || !node.is_silent(self.control.now()))
            });
            let taken = self.control.put_node(&named("another"), &NodeLoad::default());
            // Otherwise it is nobody's at present; we take it back when the other has been silent for long enough.
            if is_ours {
                assert!(matches!(taken, Err(Error::NodeTaken { .. })), "{taken:?}");
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
            options: ReconcilerOptions { node: self.node.clone(), ..ReconcilerOptions::default() },
            meter: None,
            load: None,
            running: Vec::new(),
            order: Arc::default(),
            node_seen: None,
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
