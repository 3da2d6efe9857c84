//! `loquat node`: the machines that run jobs.

use std::process::ExitCode;

use anyhow::{Result, bail};
use control::{Control, Job, NodeMode, NodeSpec};

use crate::args::NodeCommand;
use crate::home::Home;
use crate::machine::bytes_text;

pub(crate) fn run(home: &Home, command: &NodeCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        NodeCommand::List => list(&control)?,
        NodeCommand::Cordon { name } => set(&control, name, NodeMode::Cordoned)?,
        NodeCommand::Drain { name } => set(&control, name, NodeMode::Draining)?,
        NodeCommand::Uncordon { name } => set(&control, name, NodeMode::Open)?,
        NodeCommand::Forget { name } => control.forget_node(name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What each has, and what of it is in use.
fn list(control: &Control) -> Result<()> {
    let jobs = control.unfinished_jobs()?;
    for node in control.list_nodes()? {
        let NodeSpec { name, cores, memory_bytes, accelerators, .. } = &node.spec;
        let on = |job: &&Job| job.process.as_ref().is_some_and(|process| process.node == *name);
        println!(
            "{name:<24} {:<9} {:>5.1} of {cores} cores  {:>9} of {:<9} {accelerators} accelerators  {} free  {} jobs  {}",
            node.state(control.now()),
            node.load.cores,
            bytes_text(node.load.memory_bytes),
            bytes_text(*memory_bytes),
            bytes_text(node.load.disk_free_bytes),
            jobs.iter().filter(on).count(),
            node.load.problem.as_deref().unwrap_or_default(),
        );
    }
    Ok(())
}

fn set(control: &Control, name: &str, mode: NodeMode) -> Result<()> {
    if !control.set_node_mode(name, mode)? {
        bail!("there is no node {name}");
    }
    println!("{name} is {}", mode.as_str());
    Ok(())
}
