//! Carries promotions on: looks at what their stages have left, has [`control::advance`] decide, and records what was decided
//! together with what it does. Called by whoever holds the deployer's lease.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use control::{Control, Effect, JobSpec, Lease, Move, Pipeline, Promotion, Seen, Stage};
use serde::Deserialize;
use store::{ObjectName, Store};
use telemetry::chain;

pub(crate) struct Promoter {
    control: Control,
    store: Arc<dyn Store>,
    /// The arguments that make a job use this home.
    home_args: Vec<String>,
}

impl Promoter {
    pub(crate) fn new(control: &Control, store: Arc<dyn Store>, home_args: Vec<String>) -> Promoter {
        Promoter { control: control.clone(), store, home_args }
    }

    /// One look at all that are not over. One that cannot be carried on keeps no other.
    pub(crate) fn turn(&self, lease: &Lease, promotions: Vec<(Promotion, Seen)>) -> Result<()> {
        for (promotion, mut seen) in promotions {
            if promotion.stage == Stage::Evaluate {
                seen.scores = self.scores(&promotion, &seen);
            }
            let Some(next) = control::advance(&promotion, &seen, self.control.now()) else { continue };
            match self.carry_on(lease, &promotion, &next) {
                Err(error) if is_refusal(&error) => {
                    let why = format!("{} cannot be done: {}", next.stage.as_str(), chain(&error));
                    let failed = Move { stage: Stage::Failed, why, effect: Effect::Nothing };
                    self.carry_on(lease, &promotion, &failed)?;
                }
                done => done?,
            }
        }
        Ok(())
    }

    fn carry_on(&self, lease: &Lease, promotion: &Promotion, next: &Move) -> control::Result<()> {
        let spec = (next.effect == Effect::RunJob).then(|| spec(promotion, &self.home_args));
        if self.control.record_move(lease, promotion, next, spec.as_ref())? {
            let (id, stage, why) = (promotion.id, next.stage.as_str(), &next.why);
            tracing::info!(promotion = %id, stage, why, "a promotion moved");
        }
        Ok(())
    }

    /// What was measured, once the evaluation is over; `None` before that, and while the store cannot be read.
    fn scores(&self, promotion: &Promotion, seen: &Seen) -> Option<Result<BTreeMap<String, f64>, String>> {
        let evaluates = promotion.pipeline.evaluate.is_some();
        let is_done = matches!(seen.job, Some((control::JobState::Succeeded, _)));
        if evaluates && !is_done {
            return None;
        }
        match read_scores(self.store.as_ref(), promotion) {
            Ok(scores) => Some(Ok(scores)),
            Err(error) if error.downcast_ref::<serde_json::Error>().is_some() => {
                Some(Err(format!("{error:#}")))
            }
            Err(error) => {
                tracing::warn!(promotion = %promotion.id, "its scores cannot be read yet: {error:#}");
                None
            }
        }
    }
}

/// Whether the control plane understood and said no, so that asking again would not help.
fn is_refusal(error: &control::Error) -> bool {
    use control::Error;
    matches!(error, Error::Invalid { .. } | Error::NoDeployment { .. } | Error::JobConflict { .. })
}

/// The job of a promotion's stage as a command line; a person could type it.
pub(crate) fn spec(promotion: &Promotion, home_args: &[String]) -> JobSpec {
    let Promotion { id, pipeline, candidate, stage, .. } = promotion;
    let (words, max_restarts, needs) = match (stage, &pipeline.train, &pipeline.evaluate) {
        (Stage::Train, Some(train), _) => {
            (train_args(pipeline, &run_name(promotion), candidate), train.max_restarts, train.needs)
        }
        (_, _, Some(evaluate)) => {
            let words = evaluate_args(pipeline, candidate, &report_name(promotion));
            (words, evaluate.max_restarts, evaluate.needs)
        }
        _ => unreachable!("a stage that is a job was declared"),
    };
    JobSpec {
        name: format!("promote/{}/{}", id.0, stage.as_str()),
        args: home_args.iter().cloned().chain(words).collect(),
        max_restarts,
        needs,
        ..JobSpec::default()
    }
}

/// A promotion trains one run.
fn run_name(promotion: &Promotion) -> String {
    promotion.id.to_string()
}

fn report_name(promotion: &Promotion) -> String {
    format!("promotions/{}/report.json", promotion.id.0)
}

pub(crate) fn train_args(pipeline: &Pipeline, run: &str, candidate: &str) -> Vec<String> {
    let own = ["train", "--run", run, "--publish", candidate].map(str::to_owned);
    own.into_iter().chain(pipeline.train.iter().flat_map(|train| train.args.iter().cloned())).collect()
}

pub(crate) fn evaluate_args(pipeline: &Pipeline, candidate: &str, report: &str) -> Vec<String> {
    let own = ["eval", "tasks", candidate].map(str::to_owned);
    let evaluate = pipeline.evaluate.iter();
    let named = evaluate.flat_map(|evaluate| evaluate.tasks.iter().chain(&evaluate.args).cloned());
    own.into_iter().chain(named).chain(["--report".to_owned(), report.to_owned()]).collect()
}

/// What of an [`eval::Report`] is held against thresholds.
#[derive(Deserialize)]
struct Report {
    task: String,
    metrics: Vec<Metric>,
}

#[derive(Deserialize)]
struct Metric {
    name: String,
    /// What is no number is `null`.
    value: Option<f64>,
}

/// `TASK/METRIC` of the report, and the last validation of the run.
fn read_scores(store: &dyn Store, promotion: &Promotion) -> Result<BTreeMap<String, f64>> {
    let mut scores = BTreeMap::new();
    if promotion.pipeline.train.is_some() {
        let events = train::read_metrics(store, &run_name(promotion))?;
        let last = events.iter().rev().find_map(|event| match event {
            train::Event::Eval { bits_per_byte, .. } => Some(*bits_per_byte),
            _ => None,
        });
        scores.extend(last.map(|bits| (VALIDATION.to_owned(), bits)));
    }
    if promotion.pipeline.evaluate.is_some() {
        let name = report_name(promotion);
        let bytes = store.get(&ObjectName::parse(&name)?)?;
        let reports: Vec<Report> = serde_json::from_slice(&bytes).with_context(|| name)?;
        for Report { task, metrics } in reports {
            let measured = metrics.into_iter().filter_map(|metric| Some((metric.name, metric.value?)));
            scores.extend(measured.map(|(name, value)| (format!("{task}/{name}"), value)));
        }
    }
    Ok(scores)
}

/// The score of the held-out documents of the data that a candidate learned from.
pub(crate) const VALIDATION: &str = "validation/bits_per_byte";
