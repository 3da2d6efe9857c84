//! A cluster under faults: two gateways over a PostgreSQL, objects in a SeaweedFS of three nodes, jobs on three slurmds where
//! Slurm is (child processes elsewhere), steady requests through both gateways, pretraining beside them, and one part
//! after the other killed with signal 9, as a seed has it.
//!
//! `./test` does this for a short while on child processes; `./test --long` for half an hour on Slurm. Both can be changed:
//! `LOQUAT_CHAOS_SECONDS`, `LOQUAT_CHAOS_BETWEEN` (seconds from fault to fault), `LOQUAT_CHAOS_SEED`.

mod place;
mod traffic;
mod weed;

use std::time::{Duration, Instant};

use control::JobState;

use place::{Fault, Place};
use traffic::{Asked, Traffic};

/// How long faults come, how far apart they are, and what the jobs run on.
struct Plan {
    seconds: u64,
    between: Duration,
    on_slurm: bool,
}

/// After each fault answers must come again, and as fast as before.
const RECOVERED_MAX: Duration = Duration::from_secs(30);
/// Longer than this is slow, however long answers took before: other processes share these cores.
const SLOW: Duration = Duration::from_secs(3);
/// Once the faults are over.
const QUIET: Duration = Duration::from_secs(5);

#[test]
fn a_cluster_outlives_any_of_its_parts() {
    disturb(&Plan { seconds: 30, between: Duration::from_secs(5), on_slurm: false });
}

#[cfg(feature = "long")]
#[test]
fn a_cluster_outlives_half_an_hour_of_faults_on_slurm() {
    disturb(&Plan { seconds: 1800, between: Duration::from_secs(45), on_slurm: true });
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text}, and no number")))
}

fn disturb(plan: &Plan) {
    let seconds = number("LOQUAT_CHAOS_SECONDS").unwrap_or(plan.seconds);
    let between = number("LOQUAT_CHAOS_BETWEEN").map_or(plan.between, Duration::from_secs);
    let seed = number("LOQUAT_CHAOS_SEED").unwrap_or(1);
    let Some(mut place) = Place::start(plan.on_slurm) else { return };
    println!("chaos for {seconds} s with seed {seed}");
    let traffic = Traffic::start(&place.clients());
    // How long the run takes, and how fast answers come, beside each other and without faults.
    let calm = place.train("calm");
    let usual = traffic.so_far();
    let bound = SLOW.max(4 * traffic::p99(&usual));
    println!("undisturbed: a run in {calm:.1?}, answers p99 {:.0?} of {}", traffic::p99(&usual), usual.len());

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
            let fault = order.next(place.faults());
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

    check_answers(&asked, &faults, bound);
    let whole = place.weights("calm");
    for (n, id) in runs.iter().enumerate() {
        let job = place.job(*id);
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
        assert!(
            place.weights(&place::run_name(n)) == whole,
            "seed {seed}: run {n} has other weights after {job:?}"
        );
    }
    let n_starts: u32 = runs.iter().map(|id| place.job(*id).n_starts).sum();
    let goodput = 100.0 * runs.len() as f64 * calm.as_secs_f64() / elapsed.as_secs_f64();
    println!(
        "{} faults; {} runs of the same bytes in {n_starts} lives, goodput {goodput:.0} % of the undisturbed",
        faults.len(),
        runs.len()
    );
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

/// What was accepted ended whole or with an error, and soon after each fault answers came as before.
fn check_answers(asked: &[Asked], faults: &[(Instant, Fault)], bound: Duration) {
    let lost: Vec<&Asked> = asked.iter().filter(|one| one.is_lost()).collect();
    assert!(lost.is_empty(), "lost without an error: {lost:?}");
    let n_failed = asked.iter().filter(|one| !one.is_whole()).count();
    println!("{} requests, {n_failed} ended with an error, none was lost", asked.len());
    assert!(asked.len() > 10 * faults.len() && n_failed < asked.len() / 5, "{n_failed} of {}", asked.len());
    for (i, (at, fault)) in faults.iter().enumerate() {
        let until = faults.get(i + 1).map_or(*at + 2 * RECOVERED_MAX, |(next, _)| *next);
        let after = asked.iter().filter(|one| one.at >= *at && one.at < until);
        let bad = after.filter(|one| !one.is_well(bound)).map(|one| one.at.duration_since(*at));
        let worst = bad.max().unwrap_or_default();
        println!("  {fault:?}: well again after {worst:.1?}");
        assert!(worst <= RECOVERED_MAX, "{fault:?}: not well for {worst:?}");
    }
}
