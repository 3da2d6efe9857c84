//! A described cluster, and the layout of ranks on it that would be fastest by a simple model.
//!
//! The model counts: FLOP of the model over the accelerators' peak and a share of it that is reached; the bubble of a
//! pipeline with interleaved stages (Narayanan et al. 2021); what tensor parallelism exchanges in every layer, over the links' bandwidth; what data
//! parallelism exchanges in every step, as far as it takes longer than half of the step's compute that it overlaps; memory as mixed-precision Adam has it (Rajbhandari et al. 2020, ZeRO): 2 bytes
//! of parameters, 2 of gradients, 12 of optimizer, each divided by what its stage divides; activations as selective
//! recomputation leaves them, 34 bytes a token, channel and layer (Korthikanti et al. 2022), or 2 with full
//! recomputation, which computes a third more.

use std::path::Path;

use anyhow::{Context, Result, bail};
use model::Config;
use serde::Deserialize;

/// Share of the peak that kernels of large models reach on accelerators: with it the runs of docs/plan.md come out within a
/// quarter of what was published.
const EFFICIENCY: f64 = 0.45;
/// Share of a step's compute during which gradients can travel.
const OVERLAP: f64 = 0.5;
/// What the framework and the allocator keep of an accelerator's memory.
const MEMORY_SHARE: f64 = 0.9;

/// As its TOML file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cluster {
    pub(crate) nodes: usize,
    /// Of a node.
    pub(crate) accelerators: usize,
    /// Of an accelerator, 16-bit, at most.
    pub(crate) tflops: f64,
    /// Of an accelerator.
    pub(crate) memory_gb: f64,
    /// Between accelerators of a node, one way, each.
    pub(crate) node_gb_per_s: f64,
    /// Between nodes, one way, for each accelerator.
    pub(crate) network_gb_per_s: f64,
    /// The share of `tflops` that is reached.
    #[serde(default = "efficiency")]
    pub(crate) efficiency: f64,
    /// Of an accelerator's memory: what serving is limited by.
    #[serde(default = "memory_tb_per_s")]
    pub(crate) memory_tb_per_s: f64,
    #[serde(default = "failures_per_accelerator_hour")]
    pub(crate) failures_per_accelerator_hour: f64,
    /// How long a run stands still for a checkpoint, and how long it takes to go on after a failure.
    #[serde(default = "checkpoint_seconds")]
    pub(crate) checkpoint_seconds: f64,
    #[serde(default = "restart_seconds")]
    pub(crate) restart_seconds: f64,
    /// In whatever money.
    #[serde(default)]
    pub(crate) price_per_accelerator_hour: f64,
}

fn memory_tb_per_s() -> f64 {
    3.35
}

/// 419 in 54 days of 16,384 (Llama Team 2024, section 3.3.4).
fn failures_per_accelerator_hour() -> f64 {
    419.0 / (54.0 * 24.0 * 16_384.0)
}

fn checkpoint_seconds() -> f64 {
    10.0
}

fn restart_seconds() -> f64 {
    300.0
}

fn efficiency() -> f64 {
    EFFICIENCY
}

/// How the ranks divide the work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Layout {
    pub(crate) data: usize,
    /// ZeRO's stage: what the ranks of `data` divide among them besides the rows.
    pub(crate) zero: usize,
    pub(crate) tensor: usize,
    pub(crate) pipeline: usize,
    /// Share of the layers whose activations are computed again in the backward pass.
    pub(crate) recompute: f64,
    pub(crate) memory_bytes: f64,
    pub(crate) step_seconds: f64,
    /// What the step is made of.
    pub(crate) compute_seconds: f64,
    pub(crate) bubble_seconds: f64,
    pub(crate) in_layers_seconds: f64,
    /// Exchange of gradients, as far as it is waited for.
    pub(crate) in_step_seconds: f64,
}

impl Layout {
    pub(crate) fn text(&self) -> String {
        let Layout { data, zero, tensor, pipeline, recompute, .. } = self;
        let zero = if *zero > 0 { format!(" with ZeRO stage {zero}") } else { String::new() };
        let recompute = match *recompute {
            0.0 => String::new(),
            1.0 => ", activations recomputed".to_owned(),
            share => format!(", activations of {:.0} % of the layers recomputed", 100.0 * share),
        };
        format!("data {data}{zero} × tensor {tensor} × pipeline {pipeline}{recompute}")
    }
}

/// What one step is.
pub(crate) struct Work<'a> {
    pub(crate) config: &'a Config,
    pub(crate) context: usize,
    pub(crate) rows_per_step: usize,
}

impl Cluster {
    pub(crate) fn read(path: &Path) -> Result<Cluster> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let cluster: Cluster = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
        let numbers = [
            ("tflops", cluster.tflops),
            ("memory_gb", cluster.memory_gb),
            ("node_gb_per_s", cluster.node_gb_per_s),
            ("network_gb_per_s", cluster.network_gb_per_s),
            ("efficiency", cluster.efficiency),
            ("memory_tb_per_s", cluster.memory_tb_per_s),
            ("failures_per_accelerator_hour", cluster.failures_per_accelerator_hour),
            ("checkpoint_seconds", cluster.checkpoint_seconds),
            ("restart_seconds", cluster.restart_seconds),
            ("nodes", cluster.nodes as f64),
            ("accelerators", cluster.accelerators as f64),
        ];
        if let Some((field, value)) = numbers.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            bail!("{}: {field} is {value}, it must be more than 0", path.display());
        }
        if cluster.n_accelerators() > 1 << 20 {
            bail!("{}: more than a million accelerators", path.display());
        }
        Ok(cluster)
    }

    /// One with every default, for other modules' tests to change.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Cluster {
        let text =
            "nodes = 1\naccelerators = 1\ntflops = 1\nmemory_gb = 1\nnode_gb_per_s = 1\nnetwork_gb_per_s = 1";
        toml::from_str(text).unwrap()
    }

    pub(crate) fn n_accelerators(&self) -> usize {
        self.nodes.saturating_mul(self.accelerators)
    }

    /// The fastest layout that fits, and the one that comes nearest to fitting where none does.
    pub(crate) fn choose(&self, work: &Work) -> Result<Layout, Layout> {
        let layouts = self.layouts(work);
        let limit = MEMORY_SHARE * self.memory_gb * 1e9;
        let fastest = |a: &&Layout, b: &&Layout| a.step_seconds.total_cmp(&b.step_seconds);
        let smallest = |a: &&Layout, b: &&Layout| a.memory_bytes.total_cmp(&b.memory_bytes);
        match layouts.iter().filter(|layout| layout.memory_bytes <= limit).min_by(fastest) {
            Some(layout) => Ok(*layout),
            None => Err(*layouts.iter().min_by(smallest).unwrap_or_else(|| panic!("one rank is a layout"))),
        }
    }

    fn layouts(&self, work: &Work) -> Vec<Layout> {
        let n = self.n_accelerators();
        let Config { n_heads, n_kv_heads, n_layers, .. } = *work.config;
        let is_tensor = |t: &usize| n_heads.is_multiple_of(*t) && n_kv_heads.is_multiple_of(*t);
        let mut layouts = Vec::new();
        for tensor in divisors(self.accelerators).filter(is_tensor) {
            for pipeline in divisors(n / tensor).filter(|p| *p <= n_layers) {
                let data = n / (tensor * pipeline);
                if !work.rows_per_step.is_multiple_of(data) {
                    continue;
                }
                for zero in 0..=3 {
                    // Gradients and parameters that are divided do not wait in a pipeline's stages.
                    if (data == 1 && zero > 0) || (pipeline > 1 && zero > 1) {
                        continue;
                    }
                    for recompute in [0.0, 0.25, 0.5, 0.75, 1.0] {
                        layouts.push(self.layout(work, [data, zero, tensor, pipeline], recompute));
                    }
                }
            }
        }
        if layouts.is_empty() {
            layouts.push(self.layout(work, [1, 0, 1, 1], 1.0));
        }
        layouts
    }

    /// Time and memory of one layout, whether or not it fits.
    pub(crate) fn layout(
        &self,
        work: &Work,
        [data, zero, tensor, pipeline]: [usize; 4],
        recompute: f64,
    ) -> Layout {
        let Work { config, context, rows_per_step } = work;
        let (t, c, l) = (*context as f64, config.width as f64, config.n_layers as f64);
        // Stages of unlike numbers of layers wait for the longest.
        let stage_layers = config.n_layers.div_ceil(pipeline) as f64;
        let longest = stage_layers * pipeline as f64 / l;
        let n_params = longest * config.n_params() as f64 / (tensor * pipeline) as f64;
        let divided = |stage: usize| if zero >= stage { data as f64 } else { 1.0 };
        let states = n_params * (2.0 / divided(3) + 2.0 / divided(2) + 12.0 / divided(1));
        // One row at a time; a pipeline's first stage holds as many rows as there are stages, each with its layers.
        let kept = 34.0 * (1.0 - recompute) + (2.0 + 34.0 / l) * recompute;
        let activations = t * c * l * kept / tensor as f64;
        let logits = 6.0 * t * config.vocab as f64 / tensor as f64;

        let micro_batches = (rows_per_step / data).max(1) as f64;
        let n = (data * tensor * pipeline) as f64;
        let tokens = (rows_per_step * context) as f64;
        let flops = config.flops_per_token_train(*context) * tokens * (1.0 + recompute / 3.0);
        let compute = longest * flops / (n * self.tflops * 1e12 * self.efficiency);
        // Each stage's layers are dealt out one by one, so that a pipeline fills as fast as one of single layers.
        let bubble = compute * (pipeline - 1) as f64 / (micro_batches * stage_layers);
        // Per row and layer 4 sums over the ranks of `tensor` (2 forward, 2 backward), a ring passing each twice.
        let ring = |ranks: usize| 2.0 * (ranks - 1) as f64 / ranks as f64;
        let in_layers = micro_batches * stage_layers * 4.0 * ring(tensor) * t * c * 2.0;
        let node = self.node_gb_per_s * 1e9;
        // Data-parallel ranks of one node talk over its links, others over the network.
        let is_inside = data * tensor <= self.accelerators;
        let between = if is_inside { node } else { self.network_gb_per_s * 1e9 };
        // With stage 3 parameters are gathered for both passes, in every micro-batch.
        let passes = if zero == 3 { 1.0 + micro_batches } else { 1.0 };
        let in_step = passes * ring(data) * n_params * 2.0;
        let in_layers_seconds = in_layers / node;
        let in_step_seconds = (in_step / between - OVERLAP * compute).max(0.0);
        Layout {
            data,
            zero,
            tensor,
            pipeline,
            recompute,
            memory_bytes: states + activations + logits,
            step_seconds: compute + bubble + in_layers_seconds + in_step_seconds,
            compute_seconds: compute,
            bubble_seconds: bubble,
            in_layers_seconds,
            in_step_seconds,
        }
    }
}

fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n.is_multiple_of(*d))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::presets;

    const H100: Cluster = Cluster {
        nodes: 4,
        accelerators: 8,
        tflops: 989.0,
        memory_gb: 80.0,
        node_gb_per_s: 450.0,
        network_gb_per_s: 50.0,
        efficiency: 0.4,
        memory_tb_per_s: 3.35,
        failures_per_accelerator_hour: 2e-5,
        checkpoint_seconds: 10.0,
        restart_seconds: 300.0,
        price_per_accelerator_hour: 0.0,
    };

    fn choose(cluster: &Cluster, preset: &str, rows: usize) -> Result<Layout, Layout> {
        let config = presets::config(preset, 128_256, 0, 4096).unwrap();
        cluster.choose(&Work { config: &config, context: 4096, rows_per_step: rows })
    }

    #[test]
    fn small_models_are_copied_and_large_ones_divided() {
        let small = choose(&H100, "llama-1b", 256).unwrap();
        assert_eq!((small.data, small.tensor, small.pipeline), (32, 1, 1), "{small:?}");
        let large = choose(&H100, "llama-70b", 256).unwrap();
        assert!(large.tensor * large.pipeline > 1 || large.zero == 3, "{large:?}");
        assert!(large.memory_bytes < 72e9 && large.step_seconds > 10.0 * small.step_seconds, "{large:?}");
        // 6 * 70e9 parameters * 1 Mi tokens / (32 * 989e12 * 0.4) = 35 s, and what it exchanges.
        assert!((33.0..80.0).contains(&large.step_seconds), "{large:?}");
    }

    #[test]
    fn what_fits_nowhere_is_said() {
        let one = Cluster { nodes: 1, accelerators: 1, ..H100 };
        let nearest = choose(&one, "llama-70b", 8).unwrap_err();
        assert!(nearest.memory_bytes > 1e12, "16 bytes a parameter: {nearest:?}");
        assert!(choose(&one, "smollm2-135m", 8).is_ok());
    }

    #[test]
    fn files_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.toml");
        let good = "nodes = 2\naccelerators = 8\ntflops = 989\nmemory_gb = 80\nnode_gb_per_s = 450\nnetwork_gb_per_s = 50\n";
        std::fs::write(&path, good).unwrap();
        assert_eq!(Cluster::read(&path).unwrap().n_accelerators(), 16);
        for (bad, word) in [
            (good.replace("nodes = 2", "nodes = 0"), "nodes"),
            (good.replace("tflops = 989", "tflops = -1"), "tflops"),
            (format!("{good}color = 1\n"), "color"),
            (good.replace("memory_gb = 80\n", ""), "memory_gb"),
        ] {
            std::fs::write(&path, bad).unwrap();
            let error = format!("{:#}", Cluster::read(&path).unwrap_err());
            assert!(error.contains(word) && error.contains("cluster.toml"), "{error}");
        }
    }
}
