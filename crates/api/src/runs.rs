//! Training runs, for the console and for operators. Who knows them implements [`Runs`].

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{ApiError, Result};
use crate::state::{AppState, Cause};

/// Points of a curve that one answer carries; a screen shows fewer.
const POINTS_MAX: usize = 600;

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
    /// What its ranks lose time to and send, in words.
    pub notes: Vec<String>,
}

/// One training step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Point {
    pub step: u64,
    /// Nats per token, the mean over the step's batch.
    pub loss: f64,
    pub lr: Option<f64>,
    /// Trained on so far.
    pub tokens: Option<u64>,
    pub tokens_per_second: Option<f64>,
}

/// One look at the validation documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Eval {
    pub step: u64,
    pub bits_per_byte: f64,
    pub loss: Option<f64>,
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
        "notes": curve.notes,
        "last": curve.points.last(),
    })))
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
