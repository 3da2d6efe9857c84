//! Training runs and jobs, for the console and for operators.
//!
//! A run's metrics are objects `runs/<run>/metrics/*.jsonl` in the store: whole when they appear, never changed, in the
//! order of their names. A line is an object with an `event`: `step` (with `step`, `loss`, and where known `lr`,
//! `tokens`, `tokens_per_second`) or `eval` (with `step` and `bits_per_byte`). `plan` may say `steps_total` ahead. Other
//! events are none of our business and are skipped.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use store::{ObjectName, Store};

use crate::error::{ApiError, Result};
use crate::state::{AppState, Cause};

/// Points of a curve that one answer carries; a screen shows fewer.
const POINTS_MAX: usize = 600;
/// Metric events of one run that are read; the newest objects win.
const EVENTS_MAX: usize = 2_000_000;

/// What is known of training runs. Called on a blocking thread.
pub trait Runs: Send + Sync {
    /// Names of all runs, sorted.
    fn names(&self) -> std::result::Result<Vec<String>, Cause>;
    /// The curve of one run; `None` if there is no such run.
    fn curve(&self, name: &str) -> std::result::Result<Option<Curve>, Cause>;
}

/// How a run went so far, by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    pub steps_total: Option<u64>,
    pub points: Vec<Point>,
    pub evals: Vec<Eval>,
}

/// One training step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: u64,
    /// Nats per token, the mean over the step's batch.
    pub loss: f64,
    #[serde(default)]
    pub lr: Option<f64>,
    /// Trained on so far.
    #[serde(default)]
    pub tokens: Option<u64>,
    #[serde(default)]
    pub tokens_per_second: Option<f64>,
}

/// One look at the validation documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    pub step: u64,
    pub bits_per_byte: f64,
    #[serde(default)]
    pub loss: Option<f64>,
}

#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Step(Point),
    Eval(Eval),
    Plan {
        #[serde(default)]
        steps_total: Option<u64>,
    },
    #[serde(other)]
    Other,
}

/// Runs as they are in the object store.
pub struct StoreRuns {
    store: Arc<dyn Store>,
    /// Metric objects already read, by name, with their size then. Asking again costs one listing.
    read: Mutex<HashMap<ObjectName, (u64, Arc<Curve>)>>,
}

impl StoreRuns {
    pub fn new(store: Arc<dyn Store>) -> StoreRuns {
        StoreRuns { store, read: Mutex::default() }
    }

    fn read(&self, name: &ObjectName, bytes: u64) -> std::result::Result<Arc<Curve>, Cause> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, curve)) = read.get(name).filter(|(seen, _)| *seen == bytes) {
            return Ok(curve.clone());
        }
        let curve = Arc::new(parse(&self.store.get(name)?));
        let n_events: usize = read.values().map(|(_, curve)| curve.points.len() + curve.evals.len()).sum();
        if n_events > EVENTS_MAX {
            read.clear();
        }
        read.insert(name.clone(), (bytes, curve.clone()));
        Ok(curve)
    }
}

impl Runs for StoreRuns {
    fn names(&self) -> std::result::Result<Vec<String>, Cause> {
        let objects = self.store.list("runs/")?;
        let names = objects.iter().filter_map(|object| run_name(object.name.as_str()).map(str::to_owned));
        let mut names: Vec<String> = names.collect();
        names.dedup();
        Ok(names)
    }

    fn curve(&self, name: &str) -> std::result::Result<Option<Curve>, Cause> {
        // A name that cannot be part of an object's name names no run.
        if name.contains('/') || ObjectName::parse(name).is_err() {
            return Ok(None);
        }
        let objects = self.store.list(&format!("runs/{name}/metrics/"))?;
        if objects.is_empty() {
            return Ok(None);
        }
        let mut whole = Merged::default();
        for object in objects.iter().filter(|object| object.name.as_str().ends_with(".jsonl")) {
            whole.add(&*self.read(&object.name, object.bytes)?);
        }
        Ok(Some(whole.into_curve()))
    }
}

fn run_name(object: &str) -> Option<&str> {
    let (name, rest) = object.strip_prefix("runs/")?.split_once('/')?;
    rest.starts_with("metrics/").then_some(name)
}

fn parse(bytes: &[u8]) -> Curve {
    let mut curve = Curve::default();
    for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).take(EVENTS_MAX) {
        match serde_json::from_slice(line) {
            Ok(Event::Step(point)) => curve.points.push(point),
            Ok(Event::Eval(eval)) => curve.evals.push(eval),
            Ok(Event::Plan { steps_total }) => curve.steps_total = steps_total,
            Ok(Event::Other) => (),
            Err(error) => tracing::warn!(%error, "a line of a run's metrics is not understood"),
        }
    }
    curve
}

/// Objects of one run laid over each other: a run that resumed from a checkpoint repeats steps, the later word counts.
#[derive(Default)]
struct Merged {
    steps_total: Option<u64>,
    points: BTreeMap<u64, Point>,
    evals: BTreeMap<u64, Eval>,
}

impl Merged {
    fn add(&mut self, curve: &Curve) {
        self.steps_total = curve.steps_total.or(self.steps_total);
        self.points.extend(curve.points.iter().map(|point| (point.step, point.clone())));
        self.evals.extend(curve.evals.iter().map(|eval| (eval.step, eval.clone())));
    }

    fn into_curve(self) -> Curve {
        Curve {
            steps_total: self.steps_total,
            points: self.points.into_values().collect(),
            evals: self.evals.into_values().collect(),
        }
    }
}

/// At most [`POINTS_MAX`] points: each the mean loss of equally many steps, at the last of them.
fn thin(points: &[Point]) -> Vec<Point> {
    let n_each = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |chunk: &[Point]| {
        let last = chunk.last()?;
        let loss = chunk.iter().map(|point| point.loss).sum::<f64>() / chunk.len() as f64;
        Some(Point { loss, ..last.clone() })
    };
    points.chunks(n_each).filter_map(mean).collect()
}

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Value>> {
    let runs = state.runs.clone();
    let names = blocking("list runs", move || runs.names()).await?;
    let data: Vec<Value> = names.iter().map(|name| json!({"id": name, "object": "run"})).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

pub(crate) async fn get(
    State(state): State<AppState>,
    name: std::result::Result<Path<String>, PathRejection>,
) -> Result<Json<Value>> {
    let Path(name) = name.map_err(|e| ApiError::NotFound { what: "run", name: e.body_text() })?;
    let runs = state.runs.clone();
    let asked = name.clone();
    let curve = blocking("read a run", move || runs.curve(&asked)).await?;
    let curve = curve.ok_or_else(|| ApiError::NotFound { what: "run", name: name.clone() })?;
    Ok(Json(json!({
        "id": name,
        "object": "run",
        "steps_total": curve.steps_total,
        "n_steps": curve.points.len(),
        "points": thin(&curve.points),
        "evals": curve.evals,
        "last": curve.points.last(),
    })))
}

pub(crate) async fn jobs(State(state): State<AppState>) -> Result<Json<Value>> {
    let jobs = state.jobs.clone();
    let data = blocking("list jobs", move || jobs.list()).await?;
    Ok(Json(json!({"object": "list", "data": data})))
}

/// Runs what may touch a disk or a network away from the async threads.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> std::result::Result<T, Cause> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)?;
    done.map_err(|e| ApiError::internal(format!("cannot {what}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &Arc<dyn Store>, name: &str, text: &str) {
        store.put(&ObjectName::parse(name).unwrap(), text.as_bytes()).unwrap();
    }

    #[test]
    fn a_resumed_run_is_one_curve() {
        let store = store::open("mem:").unwrap();
        put(
            &store,
            "runs/a/metrics/0001.jsonl",
            "{\"event\":\"plan\",\"steps_total\":9}\n{\"event\":\"step\",\"step\":1,\"loss\":3.0}\n{\"event\":\"step\",\"step\":2,\"loss\":9}\n{\"event\":\"new\"}\nnot json\n",
        );
        put(
            &store,
            "runs/a/metrics/0002.jsonl",
            "{\"event\":\"step\",\"step\":2,\"loss\":2.5,\"lr\":0.1}\n{\"event\":\"eval\",\"step\":2,\"bits_per_byte\":1.5}\n",
        );
        put(&store, "runs/b/manifest.json", "{}");
        let runs = StoreRuns::new(store);
        assert_eq!(runs.names().unwrap(), ["a"]);
        let curve = runs.curve("a").unwrap().unwrap();
        let losses: Vec<f64> = curve.points.iter().map(|point| point.loss).collect();
        assert_eq!(losses, [3.0, 2.5]);
        assert_eq!(curve.evals[0].bits_per_byte, 1.5);
        assert_eq!(curve.steps_total, Some(9));
        for name in ["b", "../a", "a/metrics", ""] {
            assert_eq!(runs.curve(name).unwrap(), None, "{name:?}");
        }
    }

    #[test]
    fn a_long_curve_is_thinned_to_means() {
        let points: Vec<Point> =
            (1..=6000).map(|step| Point { step, loss: step as f64, ..Point::default() }).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), 600);
        assert_eq!((thinned[0].step, thinned[0].loss), (10, 5.5));
        assert_eq!(thinned[599].step, 6000);
    }
}
