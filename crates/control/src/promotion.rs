//! How a model comes to be live: trained, evaluated, held against thresholds, tried on a share of the requests. What a
//! promotion does next is decided here and is pure; `promotions.rs` keeps where it is, so that any controller carries it on.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMs;
use crate::deployments::Deployment;
use crate::error::{Error, Result};
use crate::job::{JobId, JobState, Needs};
use crate::models::check_name;

/// Thresholds and tasks of one pipeline.
const PARTS_MAX: usize = 100;
/// Why a promotion is cancelled that somebody wanted to end.
const BY_HAND: &str = "it was cancelled";
/// Bytes of a pipeline as JSON.
const PIPELINE_BYTES_MAX: usize = 64 << 10;

/// What is declared: every stage from a command line of training to the replicas that are to serve its model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// What clients call the model.
    pub model: String,
    /// Where the candidate comes from: it is trained …
    #[serde(default)]
    pub train: Option<TrainStage>,
    /// … or here already: a path, or the name of a model kept here.
    #[serde(default)]
    pub source: Option<String>,
    #[serde(default)]
    pub evaluate: Option<EvaluateStage>,
    /// All must hold.
    #[serde(default)]
    pub gate: Vec<Threshold>,
    #[serde(default)]
    pub canary: CanaryStage,
    #[serde(default)]
    pub serve: ServeStage,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainStage {
    /// The command line of `loquat train`, without the names of run and model.
    pub args: Vec<String>,
    #[serde(default = "restarts")]
    pub max_restarts: u32,
    #[serde(default)]
    pub needs: Needs,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateStage {
    /// Files as `loquat eval tasks` takes them.
    pub tasks: Vec<String>,
    /// More of its command line.
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default = "restarts")]
    pub max_restarts: u32,
    #[serde(default)]
    pub needs: Needs,
}

/// What a score must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    /// `TASK/METRIC` of the evaluation, or `validation/bits_per_byte` of the training.
    pub metric: String,
    #[serde(default)]
    pub at_least: Option<f64>,
    #[serde(default)]
    pub at_most: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CanaryStage {
    /// Share of the requests.
    pub percent: u32,
    /// A trial without a verdict by then is over.
    pub minutes: u32,
}

impl Default for CanaryStage {
    fn default() -> Self {
        Self { percent: 10, minutes: 60 }
    }
}

/// How a model is served that is not deployed yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeStage {
    pub replicas: Option<u32>,
    /// More of the command line of `loquat serve`.
    pub args: Vec<String>,
    /// Of each replica.
    pub needs: Needs,
}

fn restarts() -> u32 {
    3
}

impl Pipeline {
    /// Refuses what could only fail later.
    pub fn check(&self) -> Result<()> {
        check_name("model name", &self.model)?;
        let invalid = |why: String| Err(Error::Invalid { what: "pipeline", why });
        if self.train.is_some() == self.source.is_some() {
            return invalid("it has either `train` or `source`".to_owned());
        }
        if !(1..=99).contains(&self.canary.percent) || self.canary.minutes == 0 {
            return invalid("a canary takes 1 to 99 percent for at least a minute".to_owned());
        }
        let n_tasks = self.evaluate.as_ref().map_or(0, |evaluate| evaluate.tasks.len());
        if self.evaluate.is_some() && n_tasks == 0 {
            return invalid("`evaluate` names no tasks".to_owned());
        }
        if n_tasks.max(self.gate.len()) > PARTS_MAX {
            return invalid(format!("more than {PARTS_MAX} tasks or thresholds"));
        }
        let is_bound = |bound: Option<f64>| bound.is_none_or(f64::is_finite);
        for Threshold { metric, at_least, at_most } in &self.gate {
            let is_some = at_least.is_some() || at_most.is_some();
            if !is_some || !is_bound(*at_least) || !is_bound(*at_most) {
                return invalid(format!("the gate {metric} needs a number at_least or at_most"));
            }
        }
        let bytes = serde_json::to_string(self).map_or(usize::MAX, |text| text.len());
        if bytes > PIPELINE_BYTES_MAX {
            return invalid(format!("it has {bytes} bytes, at most {PIPELINE_BYTES_MAX} are kept"));
        }
        Ok(())
    }

    pub(crate) fn first_stage(&self) -> Stage {
        if self.train.is_some() { Stage::Train } else { Stage::Evaluate }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PromotionId(pub i64);

impl std::fmt::Display for PromotionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "promotion-{}", self.0)
    }
}

/// Where a promotion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Train,
    Evaluate,
    Gate,
    Canary,
    /// It serves. This and all below are final.
    Live,
    /// Its scores did not pass the gate; nobody was served by it.
    Rejected,
    /// It did badly on trial; what was live before is live.
    RolledBack,
    /// A stage could not be done.
    Failed,
    Cancelled,
}

impl Stage {
    pub const ALL: [Self; 9] = [
        Self::Train,
        Self::Evaluate,
        Self::Gate,
        Self::Canary,
        Self::Live,
        Self::Rejected,
        Self::RolledBack,
        Self::Failed,
        Self::Cancelled,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Evaluate => "evaluate",
            Self::Gate => "gate",
            Self::Canary => "canary",
            Self::Live => "live",
            Self::Rejected => "rejected",
            Self::RolledBack => "rolled_back",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn is_over(self) -> bool {
        self >= Self::Live
    }
}

/// One thing that happened to a promotion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Happening {
    pub at_ms: i64,
    /// Where it was afterwards.
    pub stage: Stage,
    pub why: String,
}

/// A pipeline on its way.
#[derive(Clone, Debug, PartialEq)]
pub struct Promotion {
    pub id: PromotionId,
    pub pipeline: Pipeline,
    /// The version that is to be live: a source as replicas take it.
    pub candidate: String,
    pub stage: Stage,
    /// Somebody wants it to end.
    pub cancelled: bool,
    /// The job of this stage, once it was submitted.
    pub job: Option<JobId>,
    /// What it was measured at, once it was.
    pub scores: BTreeMap<String, f64>,
    /// Everything that happened, oldest first.
    pub history: Vec<Happening>,
    pub created_at: UnixMs,
    /// When it came to this stage.
    pub changed_at: UnixMs,
}

/// What a look at the rest of the cluster gives.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// State and last message of the stage's job; `None` where there is no such job (any more).
    pub job: Option<(JobState, Option<String>)>,
    /// What was measured, or why that cannot be known; `None` as long as nobody looked.
    pub scores: Option<Result<BTreeMap<String, f64>, String>>,
    pub deployment: Option<Deployment>,
}

/// The next thing: a stage to come to (or to stay at), why, and what is done in the same transaction.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    pub stage: Stage,
    pub why: String,
    pub effect: Effect,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    Nothing,
    /// Submit the job of the stage.
    RunJob,
    CancelJob,
    KeepScores(BTreeMap<String, f64>),
    /// Serve the candidate; nothing is live before it.
    Deploy,
    StartTrial,
    /// Take the candidate away.
    EndTrial,
}

/// What to do about `promotion`, if anything.
pub fn advance(promotion: &Promotion, seen: &Seen, now: UnixMs) -> Option<Move> {
    match promotion.stage {
        stage if stage.is_over() => None,
        Stage::Canary => trial(promotion, seen.deployment.as_ref(), now),
        _ if promotion.cancelled => {
            let effect = if promotion.job.is_some() { Effect::CancelJob } else { Effect::Nothing };
            Some(Move { stage: Stage::Cancelled, why: BY_HAND.to_owned(), effect })
        }
        Stage::Train | Stage::Evaluate => work(promotion, seen),
        _ => gate(promotion, seen.deployment.as_ref()),
    }
}

/// A stage that is a job: it is submitted, waited for, and leads on.
fn work(promotion: &Promotion, seen: &Seen) -> Option<Move> {
    let stage = promotion.stage;
    let next = |stage, why: String, effect| Some(Move { stage, why, effect });
    let trains = stage == Stage::Train;
    let (name, has_job) = match trains {
        true => ("training", true),
        false => ("evaluation", promotion.pipeline.evaluate.is_some()),
    };
    if has_job && promotion.job.is_none() {
        return next(stage, format!("{name} is submitted"), Effect::RunJob);
    }
    match &seen.job {
        None if has_job => {
            return next(Stage::Failed, format!("the job of its {name} is gone"), Effect::Nothing);
        }
        Some((JobState::Failed, message)) => {
            let message = message.as_deref().unwrap_or("no reason is known");
            return next(Stage::Failed, format!("its {name} failed: {message}"), Effect::Nothing);
        }
        Some((JobState::Cancelled, _)) => {
            return next(Stage::Cancelled, format!("the job of its {name} was cancelled"), Effect::Nothing);
        }
        Some((JobState::Pending | JobState::Running | JobState::Interrupted, _)) => return None,
        None | Some((JobState::Succeeded, _)) => {}
    }
    if trains {
        return next(Stage::Evaluate, format!("{} is trained", promotion.candidate), Effect::Nothing);
    }
    match seen.scores.as_ref()? {
        Ok(scores) => {
            // What is no number was not measured.
            let finite = scores.iter().filter(|(_, score)| score.is_finite());
            let scores: BTreeMap<String, f64> =
                finite.map(|(metric, score)| (metric.clone(), *score)).collect();
            next(Stage::Gate, told(&scores), Effect::KeepScores(scores))
        }
        Err(why) => next(Stage::Failed, format!("its scores cannot be read: {why}"), Effect::Nothing),
    }
}

fn told(scores: &BTreeMap<String, f64>) -> String {
    let each: Vec<String> = scores.iter().map(|(metric, value)| format!("{metric} {value:.4}")).collect();
    if each.is_empty() { "nothing was measured".to_owned() } else { each.join(", ") }
}

fn gate(promotion: &Promotion, deployment: Option<&Deployment>) -> Option<Move> {
    let Promotion { pipeline, candidate, scores, .. } = promotion;
    let misses: Vec<String> = pipeline.gate.iter().filter_map(|threshold| miss(threshold, scores)).collect();
    if !misses.is_empty() {
        return Some(Move { stage: Stage::Rejected, why: misses.join("; "), effect: Effect::Nothing });
    }
    let passed = match pipeline.gate.len() {
        0 => "no thresholds".to_owned(),
        n => format!("all {n} thresholds hold"),
    };
    let (stage, what, effect) = match deployment {
        None => (Stage::Live, "nothing was live before".to_owned(), Effect::Deploy),
        Some(found) if found.live == *candidate => {
            (Stage::Live, "it is live already".to_owned(), Effect::Nothing)
        }
        // Two trials at once could not be told apart: this one waits.
        Some(Deployment { canary: Some(_), .. }) => return None,
        Some(found) => {
            let percent = pipeline.canary.percent;
            (Stage::Canary, format!("{percent} % of the requests beside {}", found.live), Effect::StartTrial)
        }
    };
    Some(Move { stage, why: format!("{passed}; {what}"), effect })
}

/// Why a threshold does not hold. A score that is missing holds none.
fn miss(threshold: &Threshold, scores: &BTreeMap<String, f64>) -> Option<String> {
    let Threshold { metric, at_least, at_most } = threshold;
    let Some(score) = scores.get(metric) else { return Some(format!("{metric} was not measured")) };
    match (at_least, at_most) {
        (Some(bound), _) if score < bound => {
            Some(format!("{metric} is {score:.4}, at least {bound} is wanted"))
        }
        (_, Some(bound)) if score > bound => {
            Some(format!("{metric} is {score:.4}, at most {bound} is allowed"))
        }
        _ => None,
    }
}

/// The trial's verdict is the gateways'; here it is read off the deployment, and a trial without one ends.
fn trial(promotion: &Promotion, deployment: Option<&Deployment>, now: UnixMs) -> Option<Move> {
    let back = |why: String, effect| Some(Move { stage: Stage::RolledBack, why, effect });
    let Some(deployment) = deployment else {
        return back(format!("{} is not deployed any more", promotion.pipeline.model), Effect::Nothing);
    };
    let message = deployment.message.clone().unwrap_or_default();
    if deployment.live == promotion.candidate {
        return Some(Move { stage: Stage::Live, why: message, effect: Effect::Nothing });
    }
    let is_on_trial = deployment.canary.as_ref().is_some_and(|canary| canary.source == promotion.candidate);
    if !is_on_trial {
        return back(message, Effect::Nothing);
    }
    if promotion.cancelled {
        return Some(Move { stage: Stage::Cancelled, why: BY_HAND.to_owned(), effect: Effect::EndTrial });
    }
    let minutes = promotion.pipeline.canary.minutes;
    let over = now.since(promotion.changed_at) >= Duration::from_secs(60 * u64::from(minutes));
    if over { back(format!("no verdict within {minutes} minutes"), Effect::EndTrial) } else { None }
}

#[cfg(test)]
mod tests;
