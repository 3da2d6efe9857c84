//! Plans as they lie in their runs: written before the first step, and never changed.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use store::{ObjectName, Put, Store};

use crate::{Error, Plan, Result, start};

/// Writes the plan into the run, and the files of the model it starts from, if it names one (see [`crate::start_files`]).
/// A run that exists keeps its plan: another one is refused, naming the first field that differs.
pub fn create(store: &Arc<dyn Store>, run: &str, plan: &Plan, start: Option<&model::Files>) -> Result<()> {
    plan.check()?;
    let name = plan_name(run)?;
    if read_plan(store, run)?.is_none() {
        // First, so that a run with a plan has all that it needs.
        if let Some(files) = start {
            start::keep(store, run, files)?;
        }
        if store.put_if_absent(&name, &plan.to_json())? == Put::Created {
            return Ok(());
        }
    }
    let old = Plan::from_json(&store.get(&name)?)?;
    match first_difference(&as_value(&old)?, &as_value(plan)?, String::new()) {
        None => Ok(()),
        Some(field) => Err(Error::PlanChanged { run: run.to_owned(), field }),
    }
}

/// The plan of a run, if there is such a run.
pub fn read_plan(store: &Arc<dyn Store>, run: &str) -> Result<Option<Plan>> {
    Ok(stored_plan(store, run)?.map(|(plan, _)| plan))
}

/// The plan and the SHA-256 of its bytes as they were written: what checkpoints name it by, whatever a newer build would
/// write.
pub(crate) fn stored_plan(store: &Arc<dyn Store>, run: &str) -> Result<Option<(Plan, String)>> {
    let name = plan_name(run)?;
    if store.head(&name)?.is_none() {
        return Ok(None);
    }
    let bytes = store.get(&name)?;
    Ok(Some((Plan::from_json(&bytes)?, hex::encode(Sha256::digest(&bytes)))))
}

/// The SHA-256 of a run's plan as it was written: what every rank of the run must have alike.
pub fn plan_sha256(store: &Arc<dyn Store>, run: &str) -> Result<String> {
    let found = stored_plan(store, run)?.ok_or_else(|| Error::NoRun { run: run.to_owned() })?;
    Ok(found.1)
}

fn plan_name(run: &str) -> Result<ObjectName> {
    Ok(ObjectName::parse(&format!("runs/{run}/plan.json"))?)
}

fn as_value(plan: &Plan) -> Result<serde_json::Value> {
    serde_json::to_value(plan).map_err(Error::PlanJson)
}

/// The path of the first field in which two values differ.
fn first_difference(old: &serde_json::Value, new: &serde_json::Value, path: String) -> Option<String> {
    use serde_json::Value::Object;
    match (old, new) {
        (Object(a), Object(b)) => a.keys().chain(b.keys()).find_map(|key| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let null = serde_json::Value::Null;
            first_difference(a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null), path)
        }),
        _ => (old != new).then_some(path),
    }
}
