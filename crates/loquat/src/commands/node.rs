//! `loquat node`: the machines that run jobs.

use std::process::ExitCode;

use anyhow::{Result, bail};
use control::{Control, NODE_SILENT_MAX, Node, NodeMode};

use crate::args::NodeCommand;
use crate::home::Home;
use crate::machine::bytes_text;

pub(crate) fn run(home: &Home, command: &NodeCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        NodeCommand::List => {
            let jobs = control.list_jobs(usize::MAX)?;
            for node in control.list_nodes()? {
                let on = |process: &control::ProcessRef| process.node == node.spec.name;
                let n_jobs = jobs.iter().filter(|job| job.process.as_ref().is_some_and(on)).count();
                println!(
                    "{:<24} {:<9} {:>4} cores {:>9}  {n_jobs} jobs",
                    node.spec.name,
                    state(&control, &node),
                    node.spec.cores,
                    bytes_text(node.spec.memory_bytes)
                );
            }
        }
        NodeCommand::Cordon { name } => set(&control, name, NodeMode::Cordoned)?,
        NodeCommand::Drain { name } => set(&control, name, NodeMode::Draining)?,
        NodeCommand::Open { name } => set(&control, name, NodeMode::Open)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn state(control: &Control, node: &Node) -> &'static str {
    if control.now().since(node.seen_at) > NODE_SILENT_MAX { "silent" } else { node.mode.as_str() }
}

fn set(control: &Control, name: &str, mode: NodeMode) -> Result<()> {
    if !control.set_node_mode(name, mode)? {
        bail!("there is no node {name}");
    }
    println!("{name} is {}", mode.as_str());
    Ok(())
}
