//! `loquat deploy`: models that replicas serve.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use control::{Ask, Control, Deployment, Needs, Replica};

use crate::args::DeployCommand;
use crate::home::Home;

pub(crate) fn run(home: &Home, command: &DeployCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        DeployCommand::Set { model, source, replicas, min, max, needs, args } => {
            let needs = needs.needs(1);
            let ask = Ask {
                n_replicas: *replicas,
                n_min: *min,
                n_max: *max,
                source: source.clone(),
                args: (!args.is_empty()).then(|| args.clone()),
                needs: (needs != Needs { ranks: 1, ..Needs::default() }).then_some(needs),
            };
            tell(&set(home, &control, model, ask)?);
        }
        DeployCommand::Canary { model, source, percent } => {
            tell(&canary(home, &control, (model, source), *percent)?);
        }
        DeployCommand::Promote { model } => println!("{}", control.end_trial(model, true)?),
        DeployCommand::Rollback { model } => println!("{}", control.end_trial(model, false)?),
        DeployCommand::Add { model, url, key_env } => add(&control, model, url, key_env.as_deref())?,
        DeployCommand::List => list(&control)?,
        DeployCommand::Remove { model } => {
            // The name of an engine elsewhere, or of a model with all its replicas.
            if !control.undeploy(model)? && !control.remove_replica(model)? {
                bail!("{model} is not deployed");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a model one that replicas serve, or changes how; `ask.source` as a person says it.
pub(crate) fn set(home: &Home, control: &Control, model: &str, ask: Ask) -> Result<Deployment> {
    let source = match (control.get_deployment(model)?, &ask.source) {
        (_, Some(source)) => Some(known(home, source)?),
        // A model that is kept here knows where it is.
        (None, None) => Some(known(home, model)?),
        (Some(_), None) => None,
    };
    Ok(control.deploy(model, &Ask { source, ..ask })?)
}

/// Puts a source, as a person says it, on trial.
pub(crate) fn canary(
    home: &Home,
    control: &Control,
    (model, source): (&str, &str),
    percent: u32,
) -> Result<Deployment> {
    if control::is_address(source) {
        add(control, model, source, None)?;
    }
    Ok(control.start_canary(model, &known(home, source)?, percent)?)
}

/// A source as a replica anywhere finds it: a path of this machine, made whole, or a model's name.
pub(super) fn known(home: &Home, source: &str) -> Result<String> {
    if control::is_address(source) {
        return Ok(address(source));
    }
    crate::commands::model::resolve(home, source)?;
    let path = std::path::Path::new(source);
    Ok(if path.exists() { path.canonicalize()?.display().to_string() } else { source.to_owned() })
}

/// An engine's address without the path of its API.
fn address(url: &str) -> String {
    url.trim_end_matches('/').trim_end_matches("/v1").to_owned()
}

/// An engine elsewhere joins a model's replicas; it needs no job of ours.
fn add(control: &Control, model: &str, url: &str, key_env: Option<&str>) -> Result<()> {
    let url = address(url);
    let key = match key_env {
        Some(name) => Some(std::env::var(name).with_context(|| format!("there is no variable {name}"))?),
        None => None,
    };
    if control.get_deployment(model)?.is_none() {
        let ask = Ask { n_replicas: Some(0), source: Some(url.clone()), ..Ask::default() };
        control.deploy(model, &ask)?;
    }
    let host = url.split_once("://").map_or(&*url, |(_, host)| host).replace('/', "_");
    let name = format!("elsewhere/{host}/{model}");
    control.put_replica(&Replica {
        name: name.clone(),
        model: model.to_owned(),
        version: url.clone(),
        url,
        own: false,
        key,
        draining: false,
        seen_at: control.now(),
    })?;
    println!("{name}");
    Ok(())
}

fn list(control: &Control) -> Result<()> {
    let replicas = control.list_replicas()?;
    for deployment in control.list_deployments()? {
        tell(&deployment);
        for replica in replicas.iter().filter(|replica| replica.model == deployment.model) {
            let state = if replica.draining { "draining" } else { "" };
            println!("  {:<40} {:<28} {} {state}", replica.name, replica.url, replica.version);
        }
    }
    Ok(())
}

fn tell(deployment: &Deployment) {
    let Deployment { model, n_replicas, n_min, n_max, live, canary, message, .. } = deployment;
    let bounds = if n_min == n_max { String::new() } else { format!(" ({n_min} to {n_max})") };
    let trial = canary.as_ref().map_or(String::new(), |c| format!(", {} % to {}", c.percent, c.source));
    println!("{model:<24} {n_replicas} replicas{bounds} of {live}{trial}");
    if let Some(message) = message {
        println!("  {message}");
    }
}
