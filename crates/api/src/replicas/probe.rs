//! Whether replicas are well: a token generated says more than a port that is open.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::{Known, Replicas, Route};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A replica that answered somebody within this time is well.
const WELL_FOR_MS: u64 = 2_000;
/// Between two looks at one that is not.
const ILL_EVERY_MS: u64 = 200;
const PROBE_MAX: Duration = Duration::from_secs(5);

/// Looks at all replicas for as long as it is polled.
pub(crate) async fn watch(replicas: Replicas) {
    loop {
        sleep(LOOK_EVERY).await;
        for route in replicas.routes() {
            let due = due(&replicas, &route);
            for known in due {
                let (replicas, route) = (replicas.clone(), route.clone());
                tokio::spawn(async move { look(&replicas, &route, &known).await });
            }
        }
    }
}

/// Those not heard of for a while, each given once.
fn due(replicas: &Replicas, route: &Route) -> Vec<Arc<Known>> {
    let now = replicas.now_ms();
    let targets = route.targets.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let is_due = |known: &&Arc<Known>| {
        let heard = known.last_well_ms.load(Ordering::Relaxed);
        let is_silent = heard == 0 || now.saturating_sub(heard) >= WELL_FOR_MS;
        is_silent && known.next_probe_ms.load(Ordering::Relaxed) <= now
    };
    let due: Vec<Arc<Known>> = targets.iter().filter(is_due).cloned().collect();
    for known in &due {
        // Not again while this one is out.
        known.next_probe_ms.store(u64::MAX, Ordering::Relaxed);
    }
    due
}

async fn look(replicas: &Replicas, route: &Route, known: &Known) {
    let outcome = match timeout(PROBE_MAX, generate_one(replicas, route, known)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("no token within {PROBE_MAX:?}")),
    };
    let (now, name) = (replicas.now_ms(), &known.target.endpoint.name);
    route.router().probed(name, outcome.is_ok(), now);
    match outcome {
        Ok(()) => {
            known.last_well_ms.store(now.max(1), Ordering::Relaxed);
            known.next_probe_ms.store(now + WELL_FOR_MS, Ordering::Relaxed);
        }
        Err(why) => {
            tracing::debug!(replica = name, why, "a replica is not well");
            known.next_probe_ms.store(now + ILL_EVERY_MS, Ordering::Relaxed);
        }
    }
}

/// Asks for one token. A replica that says it is busy is well.
async fn generate_one(replicas: &Replicas, route: &Route, known: &Known) -> Result<(), String> {
    let body = json!({"model": route.model, "prompt": "a", "max_tokens": 1, "temperature": 0});
    let uri = format!("{}/v1/completions", known.target.url);
    let mut request = Request::post(uri).header(header::CONTENT_TYPE, "application/json");
    if let Some(bearer) = known.target.key.bearer("gateway") {
        request = request.header(header::AUTHORIZATION, bearer);
    }
    let request = request.body(Body::from(body.to_string())).map_err(|error| error.to_string())?;
    let answer = replicas.ask(request).await?;
    match answer.status() {
        StatusCode::OK | StatusCode::TOO_MANY_REQUESTS => Ok(()),
        status => Err(format!("it answered {status}")),
    }
}
