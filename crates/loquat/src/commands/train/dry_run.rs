//! `loquat train --dry-run`: what a run would be, and what it would take.

use anyhow::{Result, bail};
use data::{Batches, Mixture, Split};
use model::Config;
use tensor::Pool;
use train::{Plan, Zero};

use super::cluster::{Cluster, Work};
use super::memory::{Needs, Pipelines, RanksHere};
use super::plan::{self, Planned};
use crate::args;
use crate::machine::{bytes_text, count_text, memory_available, process_memory_left};
use crate::view::duration;

/// Micro-batches that take longer than this are not tried out.
const TRIAL_SECONDS_MAX: f64 = 20.0;
/// What of the peak is assumed to be reached where it was not measured.
const SHARE_ASSUMED: f64 = 0.5;

/// Prints the plan, for this machine or a described one.
pub(super) fn run(args: &args::Train, mut planned: Planned, (pool, peak): (&Pool, f64)) -> Result<()> {
    let config = planned.plan.config()?;
    let ranks = RanksHere::of(args, None);
    let needs = Needs::new(&planned.plan, ranks, args.recompute)?;
    tell_model(&config, &needs);
    tell_teacher(&planned.plan)?;
    if let Some(path) = &args.cluster {
        tell_run(&planned)?;
        return tell_cluster(&Cluster::read(path)?, &planned.plan, &config);
    }
    let step_seconds = step_seconds(&planned, &needs, (pool, peak), args.recompute)?;
    if let (None, Some(minutes)) = (args.steps, args.minutes) {
        let steps = plan::steps_in(minutes, step_seconds.0)?;
        plan::set_steps(&mut planned.plan, args, steps)?;
    }
    tell_run(&planned)?;
    tell_here(&planned.plan, &needs, args)?;
    tell_time(&planned.plan, step_seconds, peak)?;
    needs.check(memory_available(), process_memory_left())
}

fn tell_model(config: &Config, needs: &Needs) {
    let Needs { n_trained, n_frozen, .. } = *needs;
    let n = config.n_params();
    let tables = config.vocab * config.width * if config.tied_embeddings { 1 } else { 2 };
    println!(
        "model      {} layers, {} wide, {} heads ({} of keys and values), {} ids",
        config.n_layers, config.width, config.n_heads, config.n_kv_heads, config.vocab
    );
    println!(
        "parameters {}: embeddings and head {}, layers {}",
        count_text(n as u64),
        count_text(tables as u64),
        count_text((n - tables.min(n)) as u64)
    );
    if n_frozen > 0 && n_trained < n {
        println!("trained    {} of them, as low-rank changes", count_text(n_trained as u64));
    }
}

fn tell_teacher(plan: &Plan) -> Result<()> {
    if let Some(teacher) = &plan.teacher {
        let config = teacher.config()?;
        println!(
            "teacher    {}: {} layers, {} wide, {} parameters",
            teacher.model,
            config.n_layers,
            config.width,
            count_text(config.n_params() as u64)
        );
    }
    Ok(())
}

fn tell_run(planned: &Planned) -> Result<()> {
    let plan = &planned.plan;
    let (per_step, n_rows) =
        (plan.tokens_per_step() as u64, plan.steps * (plan.rows * plan.micro_batches) as u64);
    println!(
        "run        {} steps of {} micro-batches of {} rows of {} tokens: {} tokens a step, {} in all",
        plan.steps,
        plan.micro_batches,
        plan.rows,
        plan.context,
        count_text(per_step),
        count_text(per_step * plan.steps)
    );
    let mut parts = Vec::new();
    for (part, dataset) in plan.data.iter().zip(&planned.datasets).filter(|(part, _)| part.weight > 0.0) {
        parts.push((Batches::new(dataset, Split::Train, plan.seed, plan.context)?, part.weight));
    }
    let Some(mixture) = Mixture::new(parts, plan.seed) else { bail!("{}", train::Error::Mixture) };
    let total: f64 = plan.data.iter().map(|part| part.weight).sum();
    for (i, part) in plan.data.iter().filter(|part| part.weight > 0.0).enumerate() {
        let epochs = mixture.epochs(i, n_rows);
        println!(
            "data       {}: {:.1} % of the rows, {epochs:.2} epochs",
            part.dataset,
            100.0 * part.weight / total
        );
    }
    Ok(())
}

fn tell_here(plan: &Plan, needs: &Needs, args: &args::Train) -> Result<()> {
    for (kind, bytes) in needs.kinds.iter().filter(|(_, bytes)| *bytes > 0) {
        println!("memory     {:>9} {kind}", bytes_text(*bytes));
    }
    let free = memory_available().map_or("unknown".to_owned(), bytes_text);
    println!("memory     {:>9} in all, {free} free", bytes_text(needs.total()));
    if !args.recompute {
        println!("memory     {:>9} activations with --recompute", bytes_text(needs.recomputed));
    }
    println!(
        "layout     data parallel on {} rank(s) of this machine{}{}, each with {}; {}",
        args.ranks,
        match args.distributed.pp {
            1 => String::new(),
            n => format!(", in pipelines of {n} stages"),
        },
        if args.distributed.tp > 1 {
            format!(", {} of which share a model", args.distributed.tp)
        } else {
            String::new()
        },
        match super::zero(args) {
            Zero::Nothing => "all of the state",
            Zero::Optimizer => "a part of what the optimizer remembers",
            Zero::Gradients => "a part of the gradients and of what the optimizer remembers",
            Zero::Parameters => "a part of parameters, gradients and what the optimizer remembers",
        },
        if plan.bf16 { "products in bf16, sums and weights in f32" } else { "f32" }
    );
    for product in needs.products.iter().filter(|_| args.ranks > 1) {
        println!("memory     {:>9} of each rank with {}", bytes_text(product.of_rank), product.flags());
    }
    if args.ranks > 1 && !needs.products.is_empty() {
        match needs.choice([memory_available(), process_memory_left()]) {
            Some(product) => println!(
                "choice     {}: of what fits the ranks send each other least so; {} of each rank",
                product.flags(),
                bytes_text(product.of_rank)
            ),
            None => println!("choice     nothing fits on {} ranks: take more of them", args.ranks),
        }
    }
    for pipelines in &needs.pipelines {
        let Pipelines { stages, of_rank, .. } = *pipelines;
        println!(
            "memory     {:>9} of the fullest rank with --pp {stages}, whose stages wait {:.0} % of a step",
            bytes_text(of_rank),
            100.0 * waits(plan, args.ranks, stages)
        );
    }
    if args.distributed.pp > 1 {
        println!(
            "pipeline   stages wait {:.0} % of a step: {} of them, {} micro-batches each",
            100.0 * waits(plan, args.ranks, args.distributed.pp),
            args.distributed.pp,
            plan.micro_batches * args.distributed.pp * args.distributed.tp / args.ranks.max(1)
        );
    }
    Ok(())
}

/// Which part of a step the stages of pipelines wait.
fn waits(plan: &Plan, n_ranks: usize, n_stages: usize) -> f64 {
    let n_pipelines = (n_ranks / n_stages).max(1);
    train::bubble(n_stages, (plan.micro_batches / n_pipelines).max(1))
}

/// Seconds of a step, and whether they were measured.
fn step_seconds(
    planned: &Planned,
    needs: &Needs,
    (pool, peak): (&Pool, f64),
    recompute: bool,
) -> Result<(f64, bool)> {
    let plan = &planned.plan;
    let flops = flops(plan)?;
    let assumed = flops / (SHARE_ASSUMED * peak);
    let fits = needs.check(memory_available(), process_memory_left()).is_ok();
    if !fits || assumed / plan.micro_batches as f64 > TRIAL_SECONDS_MAX {
        return Ok((assumed, false));
    }
    let of = (planned.weights.clone(), planned.teacher.as_ref().map(|(weights, _)| weights.clone()));
    Ok((plan::step_seconds(plan, of, pool, (2, recompute))?, true))
}

/// Operations of a step.
fn flops(plan: &Plan) -> Result<f64> {
    let of_model = plan.config()?.flops_per_token_train(plan.context);
    Ok(plan.flops_per_token(of_model)? * plan.tokens_per_step() as f64)
}

fn tell_time(plan: &Plan, (step_seconds, is_measured): (f64, bool), peak: f64) -> Result<()> {
    let flops = flops(plan)?;
    let per_second = plan.tokens_per_step() as f64 / step_seconds;
    println!("compute    {:.3e} FLOP a step, {:.3e} in all", flops, flops * plan.steps as f64);
    let how = if is_measured { "measured" } else { "assumed, not measured" };
    println!(
        "time       {} ({:.2} s a step, {per_second:.0} tokens/s, {:.0} % of this machine's {:.0} GFLOP/s: {how})",
        duration(step_seconds * plan.steps as f64),
        step_seconds,
        100.0 * flops / step_seconds / peak,
        peak / 1e9
    );
    Ok(())
}

fn tell_cluster(cluster: &Cluster, plan: &Plan, config: &Config) -> Result<()> {
    let rows_per_step = plan.rows * plan.micro_batches;
    let work = Work { config, context: plan.context, rows_per_step };
    let n = cluster.n_accelerators();
    let layout = match cluster.choose(&work) {
        Ok(layout) => layout,
        Err(nearest) => {
            let (need, has) = (bytes_text(nearest.memory_bytes as u64), cluster.memory_gb);
            bail!(
                "no layout of {n} accelerators fits: {} needs {need} of each accelerator's {has} GB",
                nearest.text()
            );
        }
    };
    let flops = config.flops_per_token_train(plan.context) * plan.tokens_per_step() as f64;
    println!(
        "cluster    {} nodes of {} accelerators of {} TFLOP/s",
        cluster.nodes, cluster.accelerators, cluster.tflops
    );
    println!("layout     {}", layout.text());
    println!(
        "memory     {} of {} GB on the fullest accelerator",
        bytes_text(layout.memory_bytes as u64),
        cluster.memory_gb
    );
    println!(
        "time       {} ({:.2} s a step, {:.0} tokens/s, {:.0} % of the cluster's peak)",
        duration(layout.step_seconds * plan.steps as f64),
        layout.step_seconds,
        plan.tokens_per_step() as f64 / layout.step_seconds,
        100.0 * flops / layout.step_seconds / (n as f64 * cluster.tflops * 1e12)
    );
    println!("           Only planned. The numbers are a model's, not measurements.");
    Ok(())
}
