//! A cluster by the seed: nodes that come, go silent and are cordoned, jobs of all sizes and priorities that keep coming,
//! and nodes that decide by what they saw some time ago. Each start is decided once more by the state it changes, as the
//! database does it.

use super::*;
use crate::testing::Random;

/// Histories of a usual run; `LOQUAT_SIMULATION_SEEDS` asks for another number.
const SEEDS: u64 = 100;
const STEP_MS: i64 = 5_000;
/// Jobs come for so long, and longer than it takes to wait oneself above all of them.
const BUSY_STEPS: usize = 120;
/// Jobs that are not over at once.
const JOBS_MAX: usize = 16;
/// All work there can be then, one job after the other.
const CALM_STEPS: usize = 2_000;
const PRIORITIES: u64 = 6;

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    starts: usize,
    gangs: usize,
    preempted: usize,
    /// Starts that were decided by an old state and refused by the new.
    refused: usize,
    /// The longest wait for a first start, in steps.
    waited_max: usize,
}

struct World {
    random: Random,
    policy: Policy,
    now: UnixMs,
    nodes: Vec<Node>,
    projects: Vec<Project>,
    jobs: Vec<Job>,
    /// Steps of work left, by job; survives preemption, as a checkpoint does.
    left: BTreeMap<JobId, u64>,
    next: i64,
    tally: Tally,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed);
        let n_nodes = 1 + random.below(5);
        let nodes =
            (0..n_nodes).map(|n| node(&format!("n{n}"), 2 << random.below(3), random.below(3) as u32));
        let nodes: Vec<Node> = nodes.collect();
        let cores: u32 = nodes.iter().map(|node| node.spec.cores).sum();
        let quota = Quota { cores: Some(cores.div_ceil(2)), jobs: Some(3), ..Quota::default() };
        let projects = vec![Project { name: "p".to_owned(), quota }];
        let policy =
            Policy { age: Duration::from_secs(60), hold_after: Duration::from_secs(30), ..Policy::default() };
        World {
            random,
            policy,
            now: NOW,
            nodes,
            projects,
            jobs: Vec::new(),
            left: BTreeMap::new(),
            next: 0,
            tally: Tally::default(),
        }
    }

    fn placement(&self, jobs: &[Job]) -> Placement {
        let World { nodes, projects, now, .. } = self;
        place(&Cluster { jobs, nodes, projects, now: *now }, &self.policy)
    }

    /// A job of a random size that could run.
    fn arrive(&mut self) {
        let random = &mut self.random;
        let needs = Needs {
            cores: random.below(5) as u32,
            memory_bytes: random.below(8) * GB,
            accelerators: if random.percent(20) { 1 } else { 0 },
            ranks: [1, 1, 1, 2, 4][random.below(5) as usize],
        };
        let mut job = waiting(self.next + 1, needs, random.below(PRIORITIES) as i32);
        if random.percent(30) {
            job.spec.project = "p".to_owned();
        }
        if check_exists(&job.spec, &self.nodes, &self.projects).is_err() {
            return;
        }
        (job.created_at, job.waiting_at) = (self.now, self.now);
        self.next += 1;
        self.left.insert(job.id, 1 + self.random.below(20));
        self.jobs.push(job);
    }

    /// Each node obeys what it decided by `seen`, in an order of its own.
    fn act(&mut self, seen: &[Job]) {
        let decided = self.placement(seen);
        for id in &decided.preempts {
            let waits_for: i32 =
                seen.iter().filter(|j| j.process.is_none()).map(|j| j.spec.priority).max().unwrap_or(-1);
            let job = self.jobs.iter_mut().find(|job| job.id == *id && job.process.is_some());
            let Some(job) = job else { continue };
            assert!(
                !job.spec.is_service() && job.spec.priority < waits_for,
                "{job:?} moved for nobody above it"
            );
            if job.stop_sent_at.is_none() {
                job.stop_sent_at = Some(self.now);
                self.tally.preempted += 1;
            }
        }
        for (id, shares) in decided.starts {
            if self.placement(&self.jobs).starts.get(&id) != Some(&shares) {
                self.tally.refused += 1;
                continue;
            }
            let waited = self.now;
            let job = self.jobs.iter_mut().find(|job| job.id == id).expect("what starts is there");
            assert!(job.process.is_none(), "{job:?} runs twice at once");
            assert_eq!(shares.iter().map(|s| s.ranks).sum::<u32>(), job.spec.needs.n_ranks(), "half a gang");
            let steps = waited.since(job.created_at).as_millis() as usize / STEP_MS as usize;
            if job.n_starts == 0 {
                self.tally.waited_max = self.tally.waited_max.max(steps);
            }
            self.tally.starts += 1;
            self.tally.gangs += usize::from(shares.len() > 1);
            job.n_starts += 1;
            job.state = JobState::Running;
            job.process = Some(process(id.0, &shares[0].node));
            job.started_at = Some(self.now);
            job.placed = shares;
        }
        self.check_room();
    }

    fn check_room(&self) {
        let mut free =
            Free::whole(&Cluster { jobs: &[], nodes: &self.nodes, projects: &self.projects, now: self.now });
        for job in self.jobs.iter().filter(|job| job.process.is_some()) {
            free.charge(&job.spec, &shares_of(job));
        }
        let rooms = free.sites.values().map(|site| site.free).chain(free.quotas.values().copied());
        for room in rooms {
            let least = room.cores.min(room.memory_bytes).min(room.accelerators).min(room.jobs);
            assert!(least >= 0, "more was given away than there is: {room:?}");
        }
    }

    /// Time passes: jobs work, end, or obey those who asked them to go.
    fn advance(&mut self) {
        self.now = self.now.plus(Duration::from_millis(STEP_MS as u64));
        for node in &mut self.nodes {
            node.seen_at = self.now;
        }
        let mut over = Vec::new();
        for job in self.jobs.iter_mut().filter(|job| job.process.is_some()) {
            let left = self.left.get_mut(&job.id).expect("every job has work");
            *left -= 1;
            if *left == 0 {
                over.push(job.id);
            } else if job.stop_sent_at.is_some() && self.random.percent(60) {
                (job.process, job.stop_sent_at) = (None, None);
                job.state = JobState::Interrupted;
                job.waiting_at = self.now;
            }
        }
        self.jobs.retain(|job| !over.contains(&job.id));
    }

    fn disturb(&mut self) {
        let n = self.random.below(self.nodes.len() as u64) as usize;
        if self.random.percent(5) {
            self.nodes[n].mode = NodeMode::ALL[self.random.below(3) as usize];
        }
        let n = self.random.below(self.nodes.len() as u64) as usize;
        if self.random.percent(3) {
            self.nodes[n].seen_at = UnixMs(self.now.0 - 60_000);
        }
    }
}

fn history(seed: u64) -> Tally {
    let mut world = World::new(seed);
    let mut seen = Vec::new();
    for _ in 0..BUSY_STEPS {
        world.advance();
        world.disturb();
        for _ in 0..world.random.below(3) {
            if world.jobs.len() < JOBS_MAX {
                world.arrive();
            }
        }
        // Some act by what was, some by what is.
        let stale = std::mem::replace(&mut seen, world.jobs.clone());
        let known: Vec<Job> =
            stale.into_iter().filter(|old| world.jobs.iter().any(|job| job.id == old.id)).collect();
        world.act(&known);
        let fresh = world.jobs.clone();
        world.act(&fresh);
    }
    for node in &mut world.nodes {
        node.mode = NodeMode::Open;
    }
    for _ in 0..CALM_STEPS {
        if world.jobs.is_empty() {
            break;
        }
        world.advance();
        let fresh = world.jobs.clone();
        world.act(&fresh);
    }
    assert!(world.jobs.is_empty(), "jobs never ran: {:?}", world.jobs);
    world.tally
}

#[test]
fn nothing_is_given_away_twice_and_every_job_gets_its_turn() {
    let asked = std::env::var("LOQUAT_SIMULATION_SEEDS").ok();
    let n_seeds = asked.map_or(SEEDS, |text| text.parse().expect("a number"));
    let mut total = Tally::default();
    for seed in 0..n_seeds {
        let outcome = std::panic::catch_unwind(|| history(seed));
        assert!(outcome.is_ok(), "simulation failed with seed {seed}");
        let tally = outcome.unwrap_or_default();
        total.starts += tally.starts;
        total.gangs += tally.gangs;
        total.preempted += tally.preempted;
        total.refused += tally.refused;
        total.waited_max = total.waited_max.max(tally.waited_max);
    }
    eprintln!("{n_seeds} seeds: {total:?}");
    // The histories must really hold what they are meant to test.
    let n = n_seeds as usize;
    assert!(
        total.starts > 20 * n && total.gangs > n && total.preempted > n && total.refused > n / 10,
        "{total:?}"
    );
}

/// The one kind of job that a stream of others could keep out for ever: large, low, and each of the others small, higher
/// and always there.
#[test]
fn a_large_low_job_starts_though_small_higher_ones_never_cease() {
    for seed in 0..50 {
        let mut world = World::new(seed);
        world.projects.clear();
        let cores = world.nodes[0].spec.cores;
        world.nodes.truncate(1);
        let arrive = |world: &mut World, needs, priority, work| {
            world.next += 1;
            let job =
                Job { created_at: world.now, waiting_at: world.now, ..waiting(world.next, needs, priority) };
            world.left.insert(job.id, work);
            world.jobs.push(job);
        };
        arrive(&mut world, needs(cores, 1), 0, 3);
        let mut started = None;
        // To wait above priority 5 takes 5 ages of 12 steps; then the room it holds is free when the longest has ended.
        for step in 0..5 * 12 + 12 + 20 {
            for _ in 0..2 * cores {
                let work = 1 + world.random.below(20);
                arrive(&mut world, needs(1, 1), 5, work);
            }
            let fresh = world.jobs.clone();
            world.act(&fresh);
            if world.jobs.iter().any(|job| job.id == JobId(1) && job.process.is_some()) {
                started = Some(step);
                break;
            }
            world.advance();
            // Those who wait do not pile up: the newest give up.
            world.jobs.retain(|job| job.process.is_some() || job.id.0 == 1 || job.id.0 > world.next - 40);
        }
        assert!(started.is_some(), "seed {seed}: it never started");
    }
}
