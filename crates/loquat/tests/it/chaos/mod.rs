//! A cluster under faults: two gateways over a PostgreSQL, objects in a SeaweedFS of three nodes, jobs on three nodes of Slurm,
//! each a host of its own (child processes elsewhere), steady requests through both gateways, pretraining and writes beside
//! them, and one part after the other killed with signal 9 or cut off, as a seed has it.
//!
//! `./test` does this for a short while on child processes; `./test --long` for half an hour on Slurm. Both can be changed:
//! `LOQUAT_CHAOS_SECONDS`, `LOQUAT_CHAOS_BETWEEN` (seconds from fault to fault), `LOQUAT_CHAOS_SEED`.

mod place;
mod traffic;
mod verdict;
mod weed;
mod writes;

use std::time::{Duration, Instant};

use control::JobState;

use place::{Fault, Place};
use traffic::{Asked, Traffic};
use verdict::{Calm, RECOVERED_MAX, Verdict};
use writes::Writes;

/// How long faults come, how far apart they are, and what the jobs run on.
struct Plan {
    seconds: u64,
    between: Duration,
    on_slurm: bool,
    /// Of a run, and those after which it writes a checkpoint.
    steps: (u64, u64),
    /// The least share of training's time, and of clients', that is spent as it would be without faults.
    goodput_min: f64,
}

/// Once the faults are over.
const QUIET: Duration = Duration::from_secs(5);

/// Faults come faster than their ends here, which costs much.
#[test]
fn a_cluster_outlives_any_of_its_parts() {
    let between = Duration::from_secs(5);
    disturb(&Plan { seconds: 30, between, on_slurm: false, steps: (150, 10), goodput_min: 0.3 });
}

#[cfg(feature = "long")]
#[test]
fn a_cluster_outlives_half_an_hour_of_faults_on_slurm() {
    let between = Duration::from_secs(45);
    disturb(&Plan { seconds: 1800, between, on_slurm: true, steps: (1500, 30), goodput_min: 0.9 });
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text}, and no number")))
}

fn disturb(plan: &Plan) {
    let seconds = number("LOQUAT_CHAOS_SECONDS").unwrap_or(plan.seconds);
    let between = number("LOQUAT_CHAOS_BETWEEN").map_or(plan.between, Duration::from_secs);
    let seed = number("LOQUAT_CHAOS_SEED").unwrap_or(1);
    let Some(mut place) = Place::start(plan.on_slurm, plan.steps) else { return };
    println!("chaos for {seconds} s with seed {seed}, of {:?}", place.faults());
    let traffic = Traffic::start(&place.clients());
    let writes = Writes::start(place.database(), place.store());
    // How long the run takes, and how fast answers come, beside each other and without faults.
    let started = Instant::now();
    let run = place.train("calm");
    let useful = verdict::useful_seconds(&place.store(), "calm");
    let calm = Calm { started, run, useful };
    let bound = calm.bound(&traffic.so_far());

    let started = Instant::now();
    let deadline = started + Duration::from_secs(seconds);
    let mut faults = Vec::new();
    let mut runs = vec![place.submit(0)];
    let mut next_fault = started + between / 2;
    let mut order = Order { random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, left: Vec::new() };
    while Instant::now() < deadline || !place.is_over(*runs.last().unwrap()) {
        assert!(
            Instant::now() < deadline + crate::support::PATIENCE,
            "the last run does not end: {}",
            place.state()
        );
        std::thread::sleep(Duration::from_millis(100));
        if Instant::now() < deadline && Instant::now() >= next_fault {
            if between > RECOVERED_MAX {
                place.check_orphans();
            }
            let fault = order.next(&place.faults());
            println!("{:>7.1?} {fault:?}", started.elapsed());
            faults.push((Instant::now(), fault));
            place.break_down(fault);
            next_fault = Instant::now() + between;
        }
        place.mend();
        if place.is_over(*runs.last().unwrap()) && Instant::now() < deadline {
            runs.push(place.submit(runs.len()));
        }
    }
    let elapsed = started.elapsed();
    place.mend_all();
    wait_for_quiet(&traffic, bound, faults.last().unwrap().0);
    let asked = traffic.end();

    let verdict = Verdict { calm, bound, started, asked: &asked, faults: &faults };
    verdict.check_answers(plan.goodput_min);
    let wrong = verdict.recoveries();
    writes.check(place.database(), &place.store());
    let whole = place.weights("calm");
    let mut useful = 0.0;
    for (n, id) in runs.iter().enumerate() {
        let (run, job) = (place::run_name(n), place.job(*id));
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
        assert!(place.weights(&run) == whole, "seed {seed}: run {n} has other weights after {job:?}");
        useful += verdict::useful_seconds(&place.store(), &run);
    }
    let n_starts: u32 = runs.iter().map(|id| place.job(*id).n_starts).sum();
    println!("{} faults; {} runs of the same bytes in {n_starts} lives", faults.len(), runs.len());
    verdict.check_goodput(useful, elapsed, plan.goodput_min);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    place.end();
}

/// Every kind of fault once, in an order that the seed gives, then again.
struct Order {
    random: u64,
    left: Vec<Fault>,
}

impl Order {
    fn next(&mut self, all: &[Fault]) -> Fault {
        if self.left.is_empty() {
            self.left = all.to_vec();
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.left.swap_remove((self.random % self.left.len() as u64) as usize)
    }
}

/// Waits until all is well for a while, which must be so in time.
fn wait_for_quiet(traffic: &Traffic, bound: Duration, last_fault: Instant) {
    let deadline = last_fault.max(Instant::now()) + RECOVERED_MAX;
    loop {
        let now = Instant::now();
        let recent: Vec<Asked> = traffic.so_far().into_iter().filter(|one| one.at + QUIET > now).collect();
        if recent.len() > 5 && recent.iter().all(|one| one.is_well(bound)) {
            return;
        }
        assert!(now < deadline, "not well again: {recent:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
