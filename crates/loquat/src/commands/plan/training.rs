//! A training run played through: steps, checkpoints, and failures that throw it back to the last one.

use anyhow::{Result, bail};
use gateway::Random;

use crate::commands::train::cluster::{Cluster, Layout, Work};

/// Failures that are played one by one; a run with more is one that does not get on.
const FAILURES_MAX: usize = 1_000_000;

pub(super) struct Plan {
    pub(super) layout: Layout,
    pub(super) n_steps: u64,
    /// Of one accelerator, counting what the model needs and not what is computed twice.
    pub(super) model_flops: f64,
    pub(super) checkpoint_every_seconds: f64,
    pub(super) n_failures: usize,
    /// Share of the time that no failure took back and no checkpoint stood still for.
    pub(super) goodput: f64,
    pub(super) seconds: f64,
    pub(super) accelerator_hours: f64,
    /// What would have to be better for the run to be shorter.
    pub(super) limit: String,
}

pub(super) fn plan(cluster: &Cluster, work: &Work, tokens: f64, seed: u64) -> Result<Plan> {
    let layout = match cluster.choose(work) {
        Ok(layout) => layout,
        Err(nearest) => bail!(
            "no layout of {} accelerators fits: {} needs {:.0} GB of each one's {}",
            cluster.n_accelerators(),
            nearest.text(),
            nearest.memory_bytes / 1e9,
            cluster.memory_gb
        ),
    };
    played(cluster, work, layout, tokens, seed)
}

/// The run with this layout.
pub(super) fn played(cluster: &Cluster, work: &Work, layout: Layout, tokens: f64, seed: u64) -> Result<Plan> {
    let n = cluster.n_accelerators() as f64;
    let step_tokens = (work.rows_per_step * work.context) as f64;
    let n_steps = (tokens / step_tokens).ceil().max(1.0);
    let flops = work.config.flops_per_token_train(work.context) * step_tokens;
    let run = Run {
        work_seconds: n_steps * layout.step_seconds,
        mean_seconds_between: 3600.0 / (cluster.failures_per_accelerator_hour * n),
        checkpoint_seconds: cluster.checkpoint_seconds,
        restart_seconds: cluster.restart_seconds,
    };
    let every = run.checkpoint_every();
    let (seconds, n_failures) = run.play(every, &mut Random::new(seed))?;
    Ok(Plan {
        n_steps: n_steps as u64,
        model_flops: flops / layout.step_seconds / n,
        checkpoint_every_seconds: every,
        n_failures,
        goodput: run.work_seconds / seconds,
        seconds,
        accelerator_hours: n * seconds / 3600.0,
        limit: limit(&layout, run.work_seconds / seconds),
        layout,
    })
}

fn limit(layout: &Layout, goodput: f64) -> String {
    let parts = [
        ("computing", layout.compute_seconds),
        ("waiting in the pipeline", layout.bubble_seconds),
        ("exchanging inside of layers", layout.in_layers_seconds),
        ("exchanging gradients", layout.in_step_seconds),
        ("failures and checkpoints", layout.step_seconds * (1.0 / goodput - 1.0)),
    ];
    let total: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    let mut sorted = parts;
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    let text: Vec<String> =
        sorted.iter().map(|(what, seconds)| format!("{what} {:.0} %", 100.0 * seconds / total)).collect();
    text.join(", ")
}

/// A run as failures see it.
struct Run {
    work_seconds: f64,
    mean_seconds_between: f64,
    checkpoint_seconds: f64,
    restart_seconds: f64,
}

impl Run {
    /// The pause between checkpoints that loses least (Young 1974): √(2 · checkpoint · time between failures).
    fn checkpoint_every(&self) -> f64 {
        let best = (2.0 * self.checkpoint_seconds.max(1.0) * self.mean_seconds_between).sqrt();
        best.min(self.work_seconds.max(1.0))
    }

    /// Plays the run; returns how long it took and how often it failed.
    fn play(&self, every: f64, random: &mut Random) -> Result<(f64, usize)> {
        let until_failure = |random: &mut Random| -(1.0 - random.unit()).ln() * self.mean_seconds_between;
        let (mut done, mut now, mut n_failures) = (0.0, 0.0, 0);
        let mut failure = until_failure(random);
        while done < self.work_seconds {
            let piece = every.min(self.work_seconds - done);
            // The last piece ends with the model itself, which is written as a checkpoint is.
            let end = now + piece + self.checkpoint_seconds;
            if failure >= end {
                (now, done) = (end, done + piece);
                continue;
            }
            n_failures += 1;
            if n_failures > FAILURES_MAX {
                bail!("the run does not get on: it fails more often than it can write a checkpoint");
            }
            now = failure + self.restart_seconds;
            failure = now + until_failure(random);
        }
        Ok((now, n_failures))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::presets;

    /// One step of a published run with its published layout, and what was published.
    struct Published {
        preset: &'static str,
        vocab: usize,
        context: usize,
        rows: usize,
        layout: [usize; 4],
        recompute: f64,
        tflops: f64,
        memory_gb: f64,
        node_gb_per_s: f64,
        network_gb_per_s: f64,
        /// Seconds of the whole run's steps, without failures.
        tokens: f64,
        seconds: f64,
    }

    impl Published {
        fn cluster(&self) -> Cluster {
            let [data, _, tensor, pipeline] = self.layout;
            let accelerators = 8;
            Cluster {
                nodes: data * tensor * pipeline / accelerators,
                accelerators,
                tflops: self.tflops,
                memory_gb: self.memory_gb,
                node_gb_per_s: self.node_gb_per_s,
                network_gb_per_s: self.network_gb_per_s,
                ..Cluster::for_tests()
            }
        }

        fn check(&self) -> f64 {
            let config = presets::config(self.preset, self.vocab, 0, self.context).unwrap();
            let work = Work { config: &config, context: self.context, rows_per_step: self.rows };
            let cluster = self.cluster();
            let layout = cluster.layout(&work, self.layout, self.recompute);
            // It fitted, so the estimate may be over by the quarter that the time may, too: what frameworks free early is
            // not known here.
            assert!(layout.memory_bytes < 1.25 * self.memory_gb * 1e9, "{}: {layout:?}", self.preset);
            let n_steps = self.tokens / (self.rows * self.context) as f64;
            let ratio = n_steps * layout.step_seconds / self.seconds;
            eprintln!(
                "{}: {:.2} s a step, {ratio:.2} of the published time",
                self.preset, layout.step_seconds
            );
            assert!((0.75..=1.25).contains(&ratio), "{}: {ratio:.2} of the published time", self.preset);
            // So is the layout that the planner would choose.
            let chosen = cluster.choose(&work).unwrap();
            let chosen_ratio = n_steps * chosen.step_seconds / self.seconds;
            eprintln!("chosen: {}, {chosen_ratio:.2} of the published time", chosen.text());
            assert!(chosen_ratio <= 1.25, "{chosen:?} {layout:?}");
            ratio
        }
    }

    /// Llama Team 2024, "The Llama 3 Herd of Models", table 4: 16,384 H100, tensor 8 × pipeline 16 × data 128, 16 Mi tokens
    /// a step, 400 TFLOP/s of each.
    #[test]
    fn llama_3_405b_takes_as_long_as_published() {
        let (tokens, params) = (15.6e12, 405e9);
        Published {
            preset: "llama-405b",
            vocab: 128_256,
            context: 8192,
            rows: 2048,
            layout: [128, 1, 8, 16],
            recompute: 0.0,
            tflops: 989.0,
            memory_gb: 80.0,
            node_gb_per_s: 450.0,
            network_gb_per_s: 50.0,
            tokens,
            seconds: 6.0 * params * tokens / (16_384.0 * 400e12),
        }
        .check();
    }

    /// Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 5.1: 300 billion tokens
    /// on 1,024 A100 in 34 days, with all activations recomputed.
    #[test]
    fn gpt_3_175b_takes_as_long_as_published() {
        Published {
            preset: "gpt3-175b",
            vocab: 51_200,
            context: 2048,
            rows: 1536,
            layout: [16, 1, 8, 8],
            recompute: 1.0,
            tflops: 312.0,
            memory_gb: 80.0,
            node_gb_per_s: 300.0,
            network_gb_per_s: 25.0,
            tokens: 300e9,
            seconds: 34.0 * 86_400.0,
        }
        .check();
    }

    /// nanochat, README.md and dev/LEADERBOARD.md, run 1 (commit 348fbb3): depth 24, 16,704 steps of 524,288 tokens on one node of
    /// 8 H100 in bfloat16, 10,949 s in steps.
    #[test]
    fn nanochats_speed_run_takes_as_long_as_published() {
        let config = presets::config("nanochat-d24", 32_768, 0, 2048).unwrap();
        let ratio = config.flops_per_token_train(2048) * 16_704.0 * 524_288.0 / 4.330784131228946e19;
        assert!((0.9..1.1).contains(&ratio), "it is another model: {ratio:.2} of the published FLOP");
        Published {
            preset: "nanochat-d24",
            vocab: 32_768,
            context: 2048,
            rows: 256,
            layout: [8, 1, 1, 1],
            recompute: 0.0,
            tflops: 989.0,
            memory_gb: 80.0,
            node_gb_per_s: 450.0,
            network_gb_per_s: 50.0,
            tokens: 16_704.0 * 524_288.0,
            seconds: 10_949.467,
        }
        .check();
    }

    /// The report on Llama 3 again: 419 unexpected interruptions in 54 days on 16,384 accelerators, and more than 90 % of the time used.
    #[test]
    fn failures_take_the_share_that_was_published() {
        let run = Run {
            work_seconds: 54.0 * 86_400.0 * 0.9,
            mean_seconds_between: 54.0 * 86_400.0 / 419.0,
            checkpoint_seconds: 10.0,
            restart_seconds: 300.0,
        };
        for seed in 0..20 {
            let (seconds, n_failures) = run.play(run.checkpoint_every(), &mut Random::new(seed)).unwrap();
            let goodput = run.work_seconds / seconds;
            assert!((0.88..0.96).contains(&goodput), "seed {seed}: {goodput}");
            assert!((320..520).contains(&n_failures), "seed {seed}: {n_failures}");
        }
    }

    #[test]
    fn a_run_that_cannot_get_on_says_so_and_one_without_failures_loses_nothing() {
        let run = |mean_seconds_between| Run {
            work_seconds: 1e6,
            mean_seconds_between,
            checkpoint_seconds: 60.0,
            restart_seconds: 60.0,
        };
        let error = run(1.0).play(1_000.0, &mut Random::new(1)).unwrap_err();
        assert!(error.to_string().contains("does not get on"), "{error}");
        let (seconds, n_failures) = run(f64::INFINITY).play(1e6, &mut Random::new(1)).unwrap();
        assert_eq!((seconds, n_failures), (1e6 + 60.0, 0));
    }
}
