//! Serving played through: requests arrive by chance, the gateway's router sends them to replicas, which read prompts one
//! after another and write all their answers together, as the engine does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use anyhow::{Result, bail};
use gateway::{Endpoint, Outcome, Policy, Prefix, Random, Router};
use model::Config;

use crate::commands::train::cluster::Cluster;

/// Of an accelerator's memory, what weights, keys and values may take.
const MEMORY_SHARE: f64 = 0.9;
/// Of its bandwidth, what reading weights, keys and values reaches.
const BANDWIDTH_SHARE: f64 = 0.7;
/// Between two tokens, whatever the model: kernels are started, the next batch is made.
const OVERHEAD_SECONDS: f64 = 0.002;
const SEQUENCES_MAX: usize = 256;
/// How busy a replica should be at most, so that chance has room.
const BUSY_MAX: f64 = 0.8;
const REQUESTS_PLAYED: usize = 20_000;
const REPLICAS_MAX: usize = 4_096;

pub(super) struct Load {
    /// Requests a second.
    pub(super) rate: f64,
    /// Tokens of each.
    pub(super) prompt: usize,
    pub(super) answer: usize,
}

pub(super) struct Plan {
    /// Of one replica.
    pub(super) accelerators: usize,
    pub(super) sequences_max: usize,
    pub(super) tokens_per_second: f64,
    pub(super) requests_per_second: f64,
    pub(super) n_replicas: usize,
    /// Half of them, and all but one in a hundred.
    pub(super) first_token_ms: (f64, f64),
    pub(super) token_ms: f64,
    pub(super) busy: f64,
    pub(super) limit: &'static str,
}

/// One replica of a model, as fast as its accelerators are.
#[derive(Clone, Copy)]
struct Replica {
    accelerators: usize,
    sequences_max: usize,
    /// Of one prompt.
    prompt_seconds: f64,
    /// Of one token of every sequence, with all of them.
    step_seconds: f64,
    is_memory_bound: bool,
}

pub(super) fn plan(cluster: &Cluster, config: &Config, load: &Load, seed: u64) -> Result<Plan> {
    if !(load.rate.is_finite() && load.rate > 0.0) || load.answer == 0 {
        bail!("--load must be more than 0 requests a second, of an answer of at least one token");
    }
    let replica = smallest(cluster, config, load)?;
    let per_request =
        replica.prompt_seconds + load.answer as f64 * replica.step_seconds / replica.sequences_max as f64;
    let n = (load.rate * per_request / BUSY_MAX).ceil() as usize;
    let room = cluster.n_accelerators() / replica.accelerators;
    if n > room.min(REPLICAS_MAX) {
        bail!(
            "{} requests/s need {n} replicas of {} accelerators each; there is room for {room}, which take {:.1} requests/s",
            load.rate,
            replica.accelerators,
            BUSY_MAX * room as f64 / per_request
        );
    }
    let mut first_token_ms = play(&replica, load, n, seed);
    first_token_ms.sort_by(f64::total_cmp);
    let at = |share: f64| first_token_ms[((first_token_ms.len() - 1) as f64 * share) as usize];
    Ok(Plan {
        accelerators: replica.accelerators,
        sequences_max: replica.sequences_max,
        tokens_per_second: replica.sequences_max as f64 / replica.step_seconds,
        requests_per_second: 1.0 / per_request,
        n_replicas: n,
        first_token_ms: (at(0.5), at(0.99)),
        token_ms: 1e3 * replica.step_seconds,
        busy: load.rate * per_request / n as f64,
        limit: if replica.is_memory_bound { "memory's bandwidth" } else { "computing" },
    })
}

/// The fewest accelerators of a node that hold the model and some sequences.
fn smallest(cluster: &Cluster, config: &Config, load: &Load) -> Result<Replica> {
    let weights = 2.0 * config.n_params() as f64;
    let position_bytes = 2.0 * 2.0 * (config.n_layers * config.kv_width()) as f64;
    let sequence_bytes = position_bytes * (load.prompt + load.answer) as f64;
    let is_divisor = |n: &usize| config.n_heads.is_multiple_of(*n) && cluster.accelerators.is_multiple_of(*n);
    for accelerators in (1..=cluster.accelerators).filter(is_divisor) {
        let n = accelerators as f64;
        let left = MEMORY_SHARE * cluster.memory_gb * 1e9 * n - weights;
        let sequences_max = ((left / sequence_bytes).max(0.0) as usize).min(SEQUENCES_MAX);
        if sequences_max < 4 {
            continue;
        }
        let flops = cluster.tflops * 1e12 * cluster.efficiency * n;
        let per_token = 2.0 * config.n_params() as f64;
        // On the average an answer is half written.
        let held = sequences_max as f64 * position_bytes * (load.prompt as f64 + load.answer as f64 / 2.0);
        let reading = (weights + held) / (cluster.memory_tb_per_s * 1e12 * BANDWIDTH_SHARE * n);
        let computing = per_token * sequences_max as f64 / flops;
        // Two sums over the ranks in every layer, of one token of each sequence.
        let moved = config.n_layers as f64 * 2.0 * 2.0 * (n - 1.0) / n
            * sequences_max as f64
            * config.width as f64
            * 2.0;
        return Ok(Replica {
            accelerators,
            sequences_max,
            prompt_seconds: per_token * load.prompt as f64 / flops,
            step_seconds: reading.max(computing) + moved / (cluster.node_gb_per_s * 1e9) + OVERHEAD_SECONDS,
            is_memory_bound: reading > computing,
        });
    }
    let need = (weights + 4.0 * sequence_bytes) / 1e9;
    bail!(
        "the model with four sequences needs {need:.0} GB; a node has {:.0}",
        cluster.memory_gb * cluster.accelerators as f64
    )
}

/// Sends requests through a router to `n` replicas; returns each one's time to the first token, in milliseconds.
fn play(replica: &Replica, load: &Load, n: usize, seed: u64) -> Vec<f64> {
    let mut router = Router::new(Policy::default(), seed);
    let endpoint = |i: usize| Endpoint { name: i.to_string(), version: String::new(), draining: false };
    router.set(&(0..n).map(endpoint).collect::<Vec<_>>());
    (0..n).for_each(|i| router.probed(&i.to_string(), true, 0));
    let mut random = Random::new(seed);
    // When the prompts given so far are read, and when each sequence's place is free again.
    let mut read_at = vec![0.0_f64; n];
    let mut free_at: Vec<BinaryHeap<Reverse<u64>>> = vec![BinaryHeap::new(); n];
    let mut running = BinaryHeap::new();
    let mut tickets = Vec::new();
    let mut now = 0.0;
    let mut taken = Vec::with_capacity(REQUESTS_PLAYED);
    for _ in 0..REQUESTS_PLAYED {
        now += -(1.0 - random.unit()).ln() / load.rate;
        let now_us = (now * 1e6) as u64;
        while running.peek().is_some_and(|Reverse((at, _))| *at <= now_us) {
            if let Some(Reverse((at, ticket))) = running.pop() {
                router.finish(&tickets[ticket], Outcome::Answered { ms: 0.0 }, at / 1_000);
            }
        }
        let Some(ticket) = router.pick(&Prefix::default(), &[], now_us / 1_000) else { continue };
        let at: usize = ticket.name.parse().expect("replicas are named by number");
        let mut start = now.max(read_at[at]);
        if free_at[at].len() == replica.sequences_max
            && let Some(Reverse(free)) = free_at[at].pop()
        {
            start = start.max(free as f64 / 1e6);
        }
        read_at[at] = start + replica.prompt_seconds;
        let first = read_at[at] + replica.step_seconds;
        // Prompts of others are read in between.
        let share = 1.0 + load.rate / n as f64 * replica.prompt_seconds;
        let end_us = ((first + load.answer as f64 * replica.step_seconds * share) * 1e6) as u64;
        free_at[at].push(Reverse(end_us));
        taken.push((first - now) * 1e3);
        running.push(Reverse((end_us, tickets.len())));
        tickets.push(ticket);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::presets;

    fn cluster(nodes: usize) -> Cluster {
        Cluster {
            nodes,
            accelerators: 8,
            tflops: 989.0,
            memory_gb: 80.0,
            node_gb_per_s: 450.0,
            network_gb_per_s: 50.0,
            memory_tb_per_s: 3.35,
            ..Cluster::for_tests()
        }
    }

    fn planned(nodes: usize, preset: &str, rate: f64) -> Result<Plan> {
        let config = presets::config(preset, 128_256, 0, 4096).unwrap();
        plan(&cluster(nodes), &config, &Load { rate, prompt: 512, answer: 256 }, 1)
    }

    #[test]
    fn larger_models_take_more_accelerators_and_more_load_more_replicas() {
        let small = planned(1, "llama-8b", 10.0).unwrap();
        assert_eq!((small.accelerators, small.n_replicas), (1, 1));
        let large = planned(4, "llama-70b", 10.0).unwrap();
        assert!(large.accelerators >= 2 && large.token_ms > small.token_ms / 2.0);
        let busy = planned(100, "llama-8b", 1_000.0).unwrap();
        assert!(busy.n_replicas > 10 && busy.busy <= 0.8 && busy.busy > 0.7, "{}", busy.n_replicas);
        // At four fifths the queue is short.
        assert!(busy.first_token_ms.1 < 2_000.0, "{:?}", busy.first_token_ms);
        assert!(busy.first_token_ms.0 <= busy.first_token_ms.1);
    }

    #[test]
    fn what_does_not_fit_is_said_with_what_would() {
        let error = planned(1, "llama-8b", 5_000.0).err().unwrap().to_string();
        assert!(error.contains("there is room for 8") && error.contains("requests/s"), "{error}");
        let error = planned(1, "llama-405b", 1.0).err().unwrap().to_string();
        assert!(error.contains("GB"), "{error}");
        assert!(planned(1, "llama-8b", -1.0).is_err());
    }
}
