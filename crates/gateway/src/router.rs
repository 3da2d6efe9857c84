//! The choice of a replica for each request to one model.
//!
//! In this order: those that may be asked (told of, well, not draining, not failing, not tried by this request already);
//! the canary's share; who has the longest beginning of the prompt in its cache, unless it has more than its share of the
//! load; else the less loaded of two taken by chance (Mitzenmacher 2001), which needs no memory and no agreement between
//! gateways to stay near the best.

use std::collections::BTreeMap;

use crate::breaker::{Breaker, Limits};
use crate::canary::{Sample, Window};
use crate::prefix::{Affinity, Prefix};
use crate::random::Random;

#[derive(Clone, Debug)]
pub struct Policy {
    /// A replica with a prompt's beginning is preferred until it has so many times the mean load …
    pub load_times: f64,
    /// … and so many requests more.
    pub load_more: f64,
    /// Failures in a row that give a replica a rest.
    pub failures: u32,
    pub rest_ms: u64,
    pub rest_ms_max: u64,
    /// Beginnings that are remembered.
    pub n_blocks_max: usize,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            load_times: 1.25,
            load_more: 2.0,
            failures: 3,
            rest_ms: 1_000,
            rest_ms_max: 30_000,
            n_blocks_max: 1 << 17,
        }
    }
}

/// A replica as it is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub name: String,
    /// What it serves; a canary's differs.
    pub version: String,
    /// Takes no new requests.
    pub draining: bool,
}

/// How a request at a replica ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// It was answered, beginning after so many milliseconds.
    Answered { ms: f64 },
    /// It could not be reached, failed, or broke off.
    Failed,
    /// It said that it is busy or going: nothing is wrong with it, but ask another one.
    Busy,
    /// The client went away, or asked for nonsense.
    Nothing,
}

/// A request on its way to a replica.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    id: u32,
    /// The replica's name.
    pub name: String,
    pub version: String,
    /// Blocks of the prompt that the replica has had before.
    pub n_known: usize,
}

struct Replica {
    name: String,
    endpoint: Endpoint,
    /// Seen to answer. Who has never been seen is not asked.
    well: bool,
    in_flight: u32,
    breaker: Breaker,
    n_answered: u64,
    n_failed: u64,
}

/// What a person wants to see of a replica.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaStatus {
    pub name: String,
    pub version: String,
    pub draining: bool,
    pub well: bool,
    pub resting: bool,
    pub in_flight: u32,
    pub n_answered: u64,
    pub n_failed: u64,
}

pub struct Router {
    policy: Policy,
    random: Random,
    replicas: BTreeMap<u32, Replica>,
    next_id: u32,
    affinity: Affinity,
    /// The version on trial and the share of requests it gets, 0 to 1.
    canary: Option<(String, f64)>,
    windows: BTreeMap<String, Window>,
}

impl Router {
    pub fn new(policy: Policy, seed: u64) -> Router {
        let affinity = Affinity::new(policy.n_blocks_max);
        let (replicas, windows) = (BTreeMap::new(), BTreeMap::new());
        Router { policy, random: Random::new(seed), replicas, next_id: 0, affinity, canary: None, windows }
    }

    /// The replicas there are from now on. One that is told of again keeps what is known of it.
    pub fn set(&mut self, endpoints: &[Endpoint]) {
        let gone: Vec<u32> =
            self.replicas.iter().filter(|(_, r)| !is_among(r, endpoints)).map(|r| *r.0).collect();
        for id in gone {
            self.replicas.remove(&id);
            self.affinity.forget(id);
        }
        for endpoint in endpoints {
            match self.replicas.values_mut().find(|r| r.name == endpoint.name) {
                Some(replica) => replica.endpoint = endpoint.clone(),
                None => self.add(endpoint),
            }
        }
        let versions = &self.replicas;
        self.windows.retain(|version, _| versions.values().any(|r| r.endpoint.version == *version));
    }

    fn add(&mut self, endpoint: &Endpoint) {
        let replica = Replica {
            name: endpoint.name.clone(),
            endpoint: endpoint.clone(),
            well: false,
            in_flight: 0,
            breaker: Breaker::default(),
            n_answered: 0,
            n_failed: 0,
        };
        self.replicas.insert(self.next_id, replica);
        self.next_id += 1;
    }

    /// From now on a share of the requests goes to `version`.
    pub fn set_canary(&mut self, canary: Option<(String, f64)>) {
        if self.canary.as_ref().map(|c| &c.0) != canary.as_ref().map(|c| &c.0) {
            // A new trial is judged by itself.
            self.windows.clear();
        }
        self.canary = canary;
    }

    /// A replica for a request that `tried` some already; `None` when nobody can take it.
    pub fn pick(&mut self, prefix: &Prefix, tried: &[String], now_ms: u64) -> Option<Ticket> {
        let candidates = self.share(self.candidates(tried, now_ms));
        if candidates.is_empty() {
            return None;
        }
        let known = self.affinity.owners(prefix, |id| candidates.contains(&id));
        let near = known.as_ref().and_then(|(owners, _)| self.least_loaded(owners));
        let id = match near {
            Some(id) if self.is_within_guard(id, &candidates) => id,
            _ => {
                let id = self.less_of_two(&candidates);
                // Both may be full of prefixes of theirs; somebody is not.
                let least = self.least_loaded(&candidates)?;
                if self.is_within_guard(id, &candidates) { id } else { least }
            }
        };
        let n_known = known.filter(|(owners, _)| owners.contains(&id)).map_or(0, |(_, n)| n);
        self.affinity.learn(prefix, id);
        let replica = self.replicas.get_mut(&id)?;
        replica.in_flight += 1;
        replica.breaker.sent();
        Some(Ticket { id, name: replica.name.clone(), version: replica.endpoint.version.clone(), n_known })
    }

    /// The request that `ticket` stands for has ended.
    pub fn finish(&mut self, ticket: &Ticket, outcome: Outcome, now_ms: u64) {
        let limits = self.limits();
        // The replica may be gone, and another one in its place.
        let Some(replica) = self.replicas.get_mut(&ticket.id) else { return };
        replica.in_flight -= 1;
        let sample = match outcome {
            Outcome::Answered { ms } => {
                replica.breaker.succeeded();
                replica.n_answered += 1;
                Sample { ok: true, ms }
            }
            Outcome::Failed => {
                replica.breaker.failed(now_ms, &limits);
                replica.n_failed += 1;
                Sample { ok: false, ms: 0.0 }
            }
            Outcome::Busy | Outcome::Nothing => return replica.breaker.said_nothing(),
        };
        self.windows.entry(ticket.version.clone()).or_default().add(sample);
    }

    /// A look at a replica's health: it generated, or it did not.
    pub fn probed(&mut self, name: &str, ok: bool, now_ms: u64) {
        let limits = self.limits();
        let Some((&id, replica)) = self.replicas.iter_mut().find(|(_, r)| r.name == name) else { return };
        if ok {
            replica.well = true;
            replica.breaker.succeeded();
        } else {
            replica.breaker.failed(now_ms, &limits);
            if replica.breaker.is_open() && replica.well {
                replica.well = false;
                // A process that comes back under this name has an empty cache.
                self.affinity.forget(id);
            }
        }
    }

    fn limits(&self) -> Limits {
        let Policy { failures, rest_ms, rest_ms_max, .. } = self.policy;
        Limits { failures, rest_ms, rest_ms_max }
    }

    /// Who may be asked at all.
    fn candidates(&self, tried: &[String], now_ms: u64) -> Vec<u32> {
        let may = |r: &Replica| {
            r.well && !r.endpoint.draining && r.breaker.lets_pass(now_ms) && !tried.contains(&r.name)
        };
        self.replicas.iter().filter(|(_, r)| may(r)).map(|(id, _)| *id).collect()
    }

    /// Those of the version whose turn it is; all where that version has none.
    fn share(&mut self, candidates: Vec<u32>) -> Vec<u32> {
        let Some((version, share)) = &self.canary else { return candidates };
        let wants_canary = self.random.unit() < *share;
        let is_canary = |id: &u32| self.replicas[id].endpoint.version == *version;
        let chosen: Vec<u32> =
            candidates.iter().copied().filter(|id| is_canary(id) == wants_canary).collect();
        if chosen.is_empty() { candidates } else { chosen }
    }

    fn least_loaded(&self, ids: &[u32]) -> Option<u32> {
        // The first of equals is the one that had it last.
        ids.iter().copied().min_by_key(|id| self.replicas[id].in_flight)
    }

    /// Whether one request more would leave the replica near its share of the load.
    fn is_within_guard(&self, id: u32, candidates: &[u32]) -> bool {
        let load = |id: &u32| f64::from(self.replicas[id].in_flight);
        let mean = (candidates.iter().map(load).sum::<f64>() + 1.0) / candidates.len() as f64;
        load(&id) + 1.0 <= self.policy.load_times * mean + self.policy.load_more
    }

    fn less_of_two(&mut self, candidates: &[u32]) -> u32 {
        let n = candidates.len();
        let first = candidates[self.random.below(n)];
        let second = if n > 1 {
            let others: Vec<u32> = candidates.iter().copied().filter(|id| *id != first).collect();
            others[self.random.below(n - 1)]
        } else {
            first
        };
        let load = |id: u32| self.replicas[&id].in_flight;
        if load(second) < load(first) { second } else { first }
    }

    /// How the requests of `version` ended lately.
    pub fn window(&self, version: &str) -> Window {
        self.windows.get(version).cloned().unwrap_or_default()
    }

    /// Requests on their way, at all replicas.
    pub fn in_flight(&self) -> u32 {
        self.replicas.values().map(|r| r.in_flight).sum()
    }

    pub fn status(&self) -> Vec<ReplicaStatus> {
        let status = |r: &Replica| ReplicaStatus {
            name: r.name.clone(),
            version: r.endpoint.version.clone(),
            draining: r.endpoint.draining,
            well: r.well,
            resting: r.breaker.is_open(),
            in_flight: r.in_flight,
            n_answered: r.n_answered,
            n_failed: r.n_failed,
        };
        self.replicas.values().map(status).collect()
    }
}

fn is_among(replica: &Replica, endpoints: &[Endpoint]) -> bool {
    endpoints.iter().any(|endpoint| endpoint.name == replica.name)
}

#[cfg(test)]
mod simulation;
