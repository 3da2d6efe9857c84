//! `loquat plan`: what training and serving would take on a cluster that is described, not there.
//!
//! The step's time is the planner's of `train --dry-run --cluster`; failures and checkpoints are played out with a seed
//! (`training.rs`); requests are sent through the router that the gateway runs to replicas that are played, too
//! (`serving.rs`). docs/plan.md holds the results beside published runs.

mod serving;
mod training;

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::args;
use crate::commands::presets;
use crate::commands::train::cluster::{Cluster, Work};
use crate::machine::{bytes_text, count_text};
use crate::view::duration;

pub(crate) fn run(args: &args::Plan) -> Result<ExitCode> {
    let cluster = Cluster::read(&args.cluster)?;
    let config = presets::config(&args.preset, args.vocab, 0, args.context)?;
    println!(
        "model      {}: {} parameters, context {}",
        args.preset,
        count_text(config.n_params() as u64),
        args.context
    );
    println!(
        "cluster    {} nodes of {} accelerators of {} TFLOP/s and {} GB",
        cluster.nodes, cluster.accelerators, cluster.tflops, cluster.memory_gb
    );
    if args.tokens.is_none() && args.load.is_none() {
        bail!("say what to plan: --tokens to train on, or --load of requests a second to serve");
    }
    if let Some(tokens) = args.tokens {
        let rows_per_step = (args.batch_tokens / args.context).max(1);
        let work = Work { config: &config, context: args.context, rows_per_step };
        let plan = training::plan(&cluster, &work, tokens, args.seed)?;
        tell_training(&cluster, &plan);
    }
    if let Some(rate) = args.load {
        let load = serving::Load { rate, prompt: args.prompt, answer: args.answer };
        tell_serving(&cluster, &serving::plan(&cluster, &config, &load, args.seed)?);
    }
    println!(
        "           Played through a model of the cluster; docs/plan.md says how near it comes to published runs."
    );
    Ok(ExitCode::SUCCESS)
}

fn tell_training(cluster: &Cluster, plan: &training::Plan) {
    println!("layout     {}", plan.layout.text());
    println!(
        "memory     {} of {} GB on the fullest accelerator",
        bytes_text(plan.layout.memory_bytes as u64),
        cluster.memory_gb
    );
    println!(
        "step       {:.2} s: {:.0} TFLOP/s of each accelerator, {:.0} % of the peak",
        plan.layout.step_seconds,
        plan.model_flops / 1e12,
        100.0 * plan.model_flops / (cluster.tflops * 1e12)
    );
    println!(
        "failures   {}, a checkpoint every {}: {:.1} % of the time is progress",
        plan.n_failures,
        duration(plan.checkpoint_every_seconds),
        100.0 * plan.goodput
    );
    println!(
        "training   {} steps in {}: {} accelerator-hours{}",
        plan.n_steps,
        duration(plan.seconds),
        count_text(plan.accelerator_hours as u64),
        price(cluster, plan.accelerator_hours)
    );
    println!("limit      {}", plan.limit);
}

fn tell_serving(cluster: &Cluster, plan: &serving::Plan) {
    println!(
        "replica    {} accelerators, {} sequences at once: {:.0} tokens/s, {:.2} requests/s at most",
        plan.accelerators, plan.sequences_max, plan.tokens_per_second, plan.requests_per_second
    );
    println!(
        "serving    {} replicas: first token p50 {:.0} ms, p99 {:.0} ms; {:.1} ms a token; {:.0} % busy",
        plan.n_replicas,
        plan.first_token_ms.0,
        plan.first_token_ms.1,
        plan.token_ms,
        100.0 * plan.busy
    );
    let n = (plan.n_replicas * plan.accelerators) as f64;
    println!("accelerators  {n}{}", price(cluster, n).replace(" for", " an hour:"));
    println!("limit      {}", plan.limit);
}

fn price(cluster: &Cluster, hours: f64) -> String {
    let price = cluster.price_per_accelerator_hour;
    if price > 0.0 { format!(" for {:.0}", price * hours) } else { String::new() }
}
