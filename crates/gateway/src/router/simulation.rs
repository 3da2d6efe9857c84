//! Hours of traffic in milliseconds: seeded arrivals, replicas that are slow, die, come back and forget.

use std::collections::{BTreeMap, HashSet, VecDeque};

use super::*;
use crate::prefix::BLOCK_BYTES;

fn endpoint(name: &str, version: &str) -> Endpoint {
    Endpoint { name: name.to_owned(), version: version.to_owned(), draining: false }
}

/// A router over `n` replicas that have been seen to be well.
fn router(n: usize, seed: u64) -> Router {
    let mut router = Router::new(Policy::default(), seed);
    let endpoints: Vec<_> = (0..n).map(|i| endpoint(&format!("r{i}"), "v1")).collect();
    router.set(&endpoints);
    for i in 0..n {
        router.probed(&format!("r{i}"), true, 0);
    }
    router
}

fn conversation(id: usize, turns: usize) -> Prefix {
    let mut bytes = Vec::new();
    for turn in 0..turns {
        bytes.extend([(id % 251) as u8; BLOCK_BYTES / 2]);
        bytes.extend(id.to_le_bytes().iter().cycle().take(BLOCK_BYTES / 4));
        bytes.extend([turn as u8; BLOCK_BYTES / 4]);
    }
    Prefix::of("t", &bytes)
}

#[test]
fn nobody_is_asked_who_was_never_seen_is_draining_or_was_tried() {
    let mut router = Router::new(Policy::default(), 1);
    let none = Prefix::default();
    router.set(&[endpoint("a", "v1"), endpoint("b", "v1")]);
    assert_eq!(router.pick(&none, &[], 0), None);
    router.probed("a", true, 0);
    assert_eq!(router.pick(&none, &[], 0).unwrap().name, "a");
    router.probed("b", true, 0);
    assert_eq!(router.pick(&none, &["a".to_owned()], 0).unwrap().name, "b");
    router.set(&[Endpoint { draining: true, ..endpoint("a", "v1") }, endpoint("b", "v1")]);
    for _ in 0..20 {
        assert_eq!(router.pick(&none, &[], 0).unwrap().name, "b");
    }
    // Gone and back under the same name: it must be seen again, and old tickets do not touch its count.
    let ticket = router.pick(&none, &[], 0).unwrap();
    router.set(&[endpoint("a", "v1")]);
    router.set(&[endpoint("a", "v1"), endpoint("b", "v2")]);
    router.finish(&ticket, Outcome::Answered { ms: 1.0 }, 0);
    let b = &router.status()[1];
    assert_eq!((b.name.as_str(), b.in_flight, b.well, b.n_answered), ("b", 0, false, 0));
}

#[test]
fn a_canary_gets_its_share_and_all_when_it_is_alone() {
    let mut router = router(4, 5);
    router.set(&[endpoint("r0", "v1"), endpoint("r1", "v1"), endpoint("r2", "v2")]);
    router.set_canary(Some(("v2".to_owned(), 0.1)));
    let mut n_canary = 0;
    for _ in 0..2_000 {
        let ticket = router.pick(&conversation(3, 4), &[], 0).unwrap();
        n_canary += usize::from(ticket.version == "v2");
        router.finish(&ticket, Outcome::Answered { ms: 5.0 }, 0);
    }
    assert!((150..250).contains(&n_canary), "{n_canary} of 2,000 at 10 %");
    assert_eq!(router.window("v2").n_seen(), n_canary as u64);
    router.set(&[endpoint("r2", "v2")]);
    assert_eq!(router.pick(&Prefix::default(), &[], 0).unwrap().version, "v2");
}

/// A replica's cache as its engine keeps it: the latest beginnings.
#[derive(Default)]
struct Cache {
    held: HashSet<(usize, usize)>,
    order: VecDeque<(usize, usize)>,
}

impl Cache {
    /// Whether all but the newest turn of a conversation is there; it is afterwards.
    fn ask(&mut self, id: usize, turns: usize, max: usize) -> bool {
        let hit = turns > 1 && self.held.contains(&(id, turns - 1));
        if self.held.insert((id, turns)) {
            self.order.push_back((id, turns));
        }
        while self.order.len() > max {
            let oldest = self.order.pop_front().unwrap();
            self.held.remove(&oldest);
        }
        hit
    }
}

/// Conversations of a few turns, some far more popular than others; returns hits of those that could hit, and the worst load
/// over the guard.
fn skewed_traffic(seed: u64, by_prefix: bool) -> (f64, f64) {
    let n = 8;
    let mut router = router(n, seed);
    let mut random = Random::new(seed + 1_000);
    let mut caches: BTreeMap<String, Cache> = BTreeMap::new();
    let mut turns: BTreeMap<usize, usize> = BTreeMap::new();
    let mut running: VecDeque<Ticket> = VecDeque::new();
    let (mut n_hits, mut n_could, mut worst) = (0, 0, 0.0_f64);
    for now in 0..20_000_u64 {
        // Zipf-like: half of all requests go to a few of the thousand conversations.
        let id = (1_000.0_f64.powf(random.unit()) - 1.0) as usize;
        let n_turns = turns.entry(id).or_default();
        *n_turns = *n_turns % 20 + 1;
        let prefix = if by_prefix { conversation(id, *n_turns) } else { Prefix::default() };
        let ticket = router.pick(&prefix, &[], now).expect("all are well");
        let status = router.status();
        let load = |name: &str| f64::from(status.iter().find(|r| r.name == name).unwrap().in_flight);
        let mean = status.iter().map(|r| f64::from(r.in_flight)).sum::<f64>() / n as f64;
        worst = worst.max(load(&ticket.name) - (1.25 * mean + 2.0));
        let hit = caches.entry(ticket.name.clone()).or_default().ask(id, *n_turns, 4_000);
        n_could += usize::from(*n_turns > 1);
        n_hits += usize::from(hit);
        running.push_back(ticket);
        // Some sixty at once.
        while running.len() > 60 {
            let at = random.below(running.len());
            let done = running.swap_remove_back(at).unwrap();
            router.finish(&done, Outcome::Answered { ms: 10.0 }, now);
        }
    }
    (n_hits as f64 / n_could as f64, worst)
}

#[test]
fn skewed_traffic_hits_caches_and_nobody_is_overloaded_for_it() {
    for seed in 0..5 {
        let (hits, worst) = skewed_traffic(seed, true);
        let (by_chance, _) = skewed_traffic(seed, false);
        assert!(hits >= 0.9, "seed {seed}: {hits}");
        assert!(by_chance < 0.6, "seed {seed}: without prefixes {by_chance}");
        assert!(worst <= 0.0, "seed {seed}: {worst} over the guard");
    }
}

/// Replicas die and come back, and are forgotten and told of again; requests are tried at most three times.
#[test]
fn through_any_order_of_faults_no_count_is_wrong_and_the_well_are_found() {
    for seed in 0..1_000 {
        let mut random = Random::new(seed);
        let n = 2 + random.below(5);
        let mut router = router(n, seed);
        let mut dead = vec![false; n];
        let mut running: Vec<(Ticket, usize)> = Vec::new();
        let mut now = 0;
        for _ in 0..300 {
            now += random.below(200) as u64;
            match random.below(20) {
                0 => dead[random.below(n)] = true,
                1 | 2 => dead[random.below(n)] = false,
                3 => {
                    let told: Vec<_> = (0..n).filter(|_| random.below(4) > 0).collect();
                    let drain = random.below(n);
                    let endpoints: Vec<_> = told
                        .iter()
                        .map(|i| Endpoint { draining: *i == drain, ..endpoint(&format!("r{i}"), "v1") })
                        .collect();
                    router.set(&endpoints);
                }
                4..=9 => {
                    let at = random.below(n);
                    router.probed(&format!("r{at}"), !dead[at], now);
                }
                10..=12 if !running.is_empty() => {
                    let (ticket, at) = running.swap_remove(random.below(running.len()));
                    let outcome = match (dead[at], random.below(10)) {
                        (true, _) => Outcome::Failed,
                        (false, 0) => Outcome::Nothing,
                        (false, 1) => Outcome::Busy,
                        _ => Outcome::Answered { ms: 3.0 },
                    };
                    router.finish(&ticket, outcome, now);
                }
                _ => {
                    if let Some(ticket) = router.pick(&conversation(random.below(9), 3), &[], now) {
                        let at: usize = ticket.name[1..].parse().unwrap();
                        running.push((ticket, at));
                    }
                }
            }
        }
        // All is well again: everything ends, everybody is told of, seen, and gets requests.
        for (ticket, _) in running.drain(..) {
            router.finish(&ticket, Outcome::Answered { ms: 1.0 }, now);
        }
        router.set(&(0..n).map(|i| endpoint(&format!("r{i}"), "v1")).collect::<Vec<_>>());
        (0..n).for_each(|i| router.probed(&format!("r{i}"), true, now));
        assert_eq!(router.in_flight(), 0, "seed {seed}");
        let picked: HashSet<String> =
            (0..200).map(|_| router.pick(&Prefix::default(), &[], now).unwrap().name).collect();
        assert_eq!(picked.len(), n, "seed {seed}");
    }
}

#[test]
fn a_replica_that_fails_rests_and_is_tried_with_one_request() {
    let mut router = router(2, 9);
    let none = Prefix::default();
    let ask = |router: &mut Router, now| router.pick(&none, &["r1".to_owned()], now);
    for _ in 0..3 {
        let ticket = ask(&mut router, 0).unwrap();
        router.finish(&ticket, Outcome::Failed, 0);
    }
    assert_eq!(ask(&mut router, 999), None, "it rests");
    let trial = ask(&mut router, 1_000).unwrap();
    assert_eq!(ask(&mut router, 1_000), None, "one is enough to see");
    router.finish(&trial, Outcome::Answered { ms: 1.0 }, 1_010);
    assert!(ask(&mut router, 1_010).is_some());
}
