//! `loquat promote`: from a command line of training to a model that serves, as one declared pipeline.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use control::{Control, Pipeline, Promotion, PromotionId, Stage};
use store::{BundleWriter, Store};

use crate::args::{Loquat, PromoteCommand};
use crate::home::Home;
use crate::promoter::{self, VALIDATION};
use crate::service::BUNDLE;

const SHOWN_MAX: usize = 100;
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

pub(crate) fn run(home: &Home, command: &PromoteCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        PromoteCommand::Start { file, follow } => {
            let mut pipeline = read(file)?;
            check(home, &pipeline).with_context(|| file.display().to_string())?;
            keep_tasks(&home.store()?, &mut pipeline)?;
            if let Some(source) = &mut pipeline.source {
                *source = super::deploy::known(home, source)?;
            }
            let promotion = control.start_promotion(&pipeline)?;
            println!("{}", promotion.id);
            return if *follow { tell_until_over(&control, promotion.id) } else { Ok(ExitCode::SUCCESS) };
        }
        PromoteCommand::List => {
            for promotion in control.list_promotions(SHOWN_MAX)? {
                let why = promotion.history.last().map_or("", |happening| &happening.why);
                let (id, model) = (promotion.id.to_string(), &promotion.pipeline.model);
                println!("{id:<14} {model:<24} {:<12} {why}", promotion.stage.as_str());
            }
        }
        PromoteCommand::Show { id, follow: true } => return tell_until_over(&control, PromotionId(*id)),
        PromoteCommand::Show { id, follow: false } => {
            tell(&get(&control, PromotionId(*id))?, 0);
        }
        PromoteCommand::Cancel { id } => {
            let promotion = control.cancel_promotion(PromotionId(*id))?;
            let over = if promotion.stage.is_over() { promotion.stage.as_str() } else { "will be cancelled" };
            println!("{} {over}", promotion.id);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn get(control: &Control, id: PromotionId) -> Result<Promotion> {
    control.get_promotion(id)?.with_context(|| format!("there is no {id}"))
}

/// Prints what happened after the first `n_told` happenings; returns how many there are.
fn tell(promotion: &Promotion, n_told: usize) -> usize {
    for happening in &promotion.history[n_told..] {
        let seconds = (happening.at_ms - promotion.created_at.0) as f64 / 1e3;
        println!("{seconds:>9.1} s  {:<12} {}", happening.stage.as_str(), happening.why);
    }
    promotion.history.len()
}

fn tell_until_over(control: &Control, id: PromotionId) -> Result<ExitCode> {
    let mut n_told = 0;
    loop {
        let promotion = get(control, id)?;
        n_told = tell(&promotion, n_told);
        if promotion.stage.is_over() {
            let is_live = promotion.stage == Stage::Live;
            return Ok(if is_live { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

/// A pipeline from its file; what it names lies beside the file.
fn read(path: &Path) -> Result<Pipeline> {
    let name = || format!("cannot read the pipeline {}", path.display());
    let text = std::fs::read_to_string(path).with_context(name)?;
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let mut pipeline: Pipeline = match is_json {
        true => serde_json::from_str(&text).with_context(name)?,
        false => toml::from_str(&text).with_context(name)?,
    };
    let dir = path.parent().unwrap_or(Path::new(""));
    for task in pipeline.evaluate.iter_mut().flat_map(|evaluate| &mut evaluate.tasks) {
        *task = dir.join(&*task).to_str().with_context(|| format!("{task} is no UTF-8"))?.to_owned();
    }
    Ok(pipeline)
}

/// Refuses here what would otherwise fail hours later: command lines, tasks, and gates that nothing measures.
fn check(home: &Home, pipeline: &Pipeline) -> Result<()> {
    pipeline.check()?;
    let mut lines = vec![("serve", serve_args(pipeline))];
    lines.extend(pipeline.train.as_ref().map(|_| ("train", promoter::train_args(pipeline, "run", "model"))));
    lines.extend(
        pipeline
            .evaluate
            .as_ref()
            .map(|_| ("evaluate", promoter::evaluate_args(pipeline, "model", "report"))),
    );
    for (stage, words) in lines {
        let words = ["loquat".to_owned()].into_iter().chain(words);
        Loquat::try_parse_from(words).map_err(|error| anyhow::anyhow!("{stage}.args: {error}"))?;
    }
    if let Some(source) = &pipeline.source {
        super::deploy::known(home, source)?;
    }
    let mut measured = Vec::new();
    for task in pipeline.evaluate.iter().flat_map(|evaluate| &evaluate.tasks) {
        measured.push(eval::Task::open(Path::new(task), &eval::Options::default())?.name);
    }
    for threshold in &pipeline.gate {
        let task = threshold.metric.split_once('/').map_or("", |(task, _)| task);
        let is_validation = threshold.metric == VALIDATION && pipeline.train.is_some();
        ensure!(
            is_validation || measured.iter().any(|name| name == task),
            "the gate {} is measured by nothing: tasks are {measured:?}",
            threshold.metric
        );
    }
    Ok(())
}

fn serve_args(pipeline: &Pipeline) -> Vec<String> {
    let own = ["serve", "model", "--served-model-name", &pipeline.model, "--replica", "r"].map(str::to_owned);
    own.into_iter().chain(pipeline.serve.args.iter().cloned()).collect()
}

/// Puts the files of tasks where every machine finds them, and has the pipeline name them there.
fn keep_tasks(store: &Arc<dyn Store>, pipeline: &mut Pipeline) -> Result<()> {
    let Some(evaluate) = &mut pipeline.evaluate else { return Ok(()) };
    let prefix = format!("promotions/tasks-{}", crate::random_hex(8)?);
    let mut bundle = BundleWriter::new(store, &prefix)?;
    let mut names = Vec::new();
    for task in &evaluate.tasks {
        let path = Path::new(task);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if names.contains(&name) {
            bail!("two tasks are called {name}");
        }
        bundle.add_path(&name, path)?;
        names.push(name);
    }
    bundle.publish("tasks", serde_json::Value::Null)?;
    evaluate.tasks = vec![format!("{BUNDLE}{prefix}")];
    Ok(())
}
