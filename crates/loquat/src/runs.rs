//! Training runs as the console sees them: read from the metrics that the runs leave in the store.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use api::{Cause, Curve, Eval, Point, Runs};
use store::Store;
use train::Event;

use crate::links::{self, traffic};
use crate::lives::Lives;

/// Runs whose events are kept in memory; one more drops them all, which only costs reading them again.
const CACHED_RUNS_MAX: usize = 16;

/// Reads runs from the store.
pub(crate) struct StoredRuns {
    store: Arc<dyn Store>,
    cache: Mutex<HashMap<String, Cached>>,
}

/// A run's events and what they were read from: (objects, bytes). Metrics only grow, or shrink when a run resumes.
struct Cached {
    state: (usize, u64),
    curve: Curve,
}

impl StoredRuns {
    pub(crate) fn new(store: Arc<dyn Store>) -> StoredRuns {
        StoredRuns { store, cache: Mutex::default() }
    }
}

impl Runs for StoredRuns {
    fn names(&self) -> Result<Vec<String>, Cause> {
        let mut names: Vec<String> = Vec::new();
        for object in self.store.list("runs")? {
            let name = object.name.as_str().split('/').nth(1).unwrap_or_default();
            if names.last().is_none_or(|last| last != name) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn curve(&self, name: &str) -> Result<Option<Curve>, Cause> {
        // A name that cannot be an object's is a run that does not exist.
        if name.contains('/') || store::ObjectName::parse(name).is_err() {
            return Ok(None);
        }
        let Some(plan) = train::read_plan(&self.store, name)? else {
            return Ok(None);
        };
        let objects = self.store.list(&format!("runs/{name}/metrics"))?;
        let state = (objects.len(), objects.iter().map(|o| o.bytes).sum());
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = cache.get(name).filter(|c| c.state == state) {
            return Ok(Some(cached.curve.clone()));
        }
        let events = train::read_metrics(self.store.as_ref(), name)?;
        let curve = curve(&events, plan.steps);
        if cache.len() >= CACHED_RUNS_MAX {
            cache.clear();
        }
        cache.insert(name.to_owned(), Cached { state, curve: curve.clone() });
        Ok(Some(curve))
    }
}

fn curve(events: &[Event], n_steps: u64) -> Curve {
    let mut curve = Curve { steps_total: Some(n_steps), ..Curve::default() };
    let (mut lives, mut links) = (Lives::default(), None);
    for event in events {
        lives.event(event);
        match event {
            Event::Step(s) => curve.points.push(Point {
                step: s.step,
                loss: s.loss,
                lr: Some(f64::from(s.lr)),
                tokens: Some(s.tokens),
                tokens_per_second: Some(s.tokens_per_second),
            }),
            Event::Eval { step, nats_per_token, bits_per_byte, .. } => curve.evals.push(Eval {
                step: *step,
                bits_per_byte: *bits_per_byte,
                loss: Some(*nats_per_token),
            }),
            Event::Links { links: busiest, seconds, .. } => {
                links = links::line(&traffic(busiest, lives.hosts()), *seconds);
            }
            _ => {}
        }
    }
    curve.notes = lives.line_so_far().into_iter().chain(links).collect();
    curve
}
