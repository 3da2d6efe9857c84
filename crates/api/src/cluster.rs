//! The cluster seen and steered: jobs, nodes, deployments and the quotas of projects. Who knows them implements
//! [`Cluster`]; what a key may do is decided here, by [`Call::needs`].
//!
//! | route | method | role | |
//! |---|---|---|---|
//! | `/v1/jobs` | GET | member | the newest, with why they wait |
//! | | POST | admin | `name`, `args`, `max_restarts`, `needs` (`cores`, `memory_bytes`, `accelerators`, `ranks`), `priority`, `project` |
//! | `/v1/jobs/{name or id}` | GET | member | |
//! | `/v1/jobs/{…}/logs` | GET | member | the end of it; `?follow=true` goes on as events until the job is over |
//! | `/v1/jobs/{…}/cancel`, `retry` | POST | member | |
//! | `/v1/nodes` | GET | member | what each has, and what is used by what |
//! | `/v1/nodes/{name}/cordon`, `uncordon`, `drain`, `forget` | POST | admin | |
//! | `/v1/deployments`, `/v1/deployments/{model}` | GET | member | |
//! | `/v1/deployments/{model}` | POST | admin | `source`, `replicas`, `min`, `max`, `args`; what is left out stays |
//! | | DELETE | admin | |
//! | `/v1/deployments/{model}/canary` | POST | admin | `source`, `percent` |
//! | `/v1/deployments/{model}/promote`, `rollback` | POST | admin | |
//! | `/v1/promotions` | GET | member | models on their way to being live: stage, scores, everything that happened and why |
//! | `/v1/projects` | GET | member | quotas and what is used of them |
//! | `/v1/projects/{name}` | POST | admin | `cores`, `memory_bytes`, `accelerators`, `jobs`; what is left out is not limited |
//! | | DELETE | admin | |

use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use serde::Deserialize;
use serde_json::{Map, Value};
use telemetry::chain;

use crate::body;
use crate::error::{ApiError, Result};
use crate::state::{AppState, Cause, KeyOwner, Role};

mod log;

pub(crate) use log::logs;

/// What the control plane knows and does. Called on a blocking thread.
pub trait Cluster: Send + Sync {
    /// The answer as clients read it.
    fn call(&self, call: Call) -> std::result::Result<Value, Refusal>;

    /// What a job has written from `from` on, or the end of it.
    fn log(&self, job: &str, from: Option<u64>, bytes_max: usize) -> std::result::Result<LogPiece, Refusal>;
}

/// One thing to show or to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Jobs,
    Job(String),
    SubmitJob(JobAsk),
    CancelJob(String),
    RetryJob(String),
    Nodes,
    SetNode { name: String, order: NodeOrder },
    Deployments,
    Deployment(String),
    Deploy { model: String, ask: DeployAsk },
    Canary { model: String, ask: CanaryAsk },
    EndTrial { model: String, promote: bool },
    Undeploy(String),
    Promotions,
    Projects,
    SetProject { name: String, quota: QuotaAsk },
    DeleteProject(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeOrder {
    Cordon,
    Uncordon,
    Drain,
    Forget,
}

/// A job to run: a command line of the server's own program.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobAsk {
    pub name: String,
    pub args: Vec<String>,
    #[serde(default)]
    pub max_restarts: u32,
    #[serde(default)]
    pub needs: NeedsAsk,
    #[serde(default)]
    pub priority: i32,
    pub project: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NeedsAsk {
    pub cores: u32,
    pub memory_bytes: u64,
    pub accelerators: u32,
    pub ranks: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeployAsk {
    pub source: Option<String>,
    pub replicas: Option<u32>,
    pub min: Option<u32>,
    pub max: Option<u32>,
    pub args: Option<Vec<String>>,
    /// Of each replica.
    pub needs: Option<NeedsAsk>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanaryAsk {
    pub source: String,
    pub percent: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaAsk {
    pub cores: Option<u32>,
    pub memory_bytes: Option<u64>,
    pub accelerators: Option<u32>,
    pub jobs: Option<u32>,
}

/// Why nothing was done.
#[derive(Debug)]
pub enum Refusal {
    NotFound {
        what: &'static str,
        name: String,
    },
    /// Something that was asked for cannot be; where known, the field.
    Invalid {
        param: Option<String>,
        why: String,
    },
    /// Not as things are.
    Conflict(String),
    /// Not now: what keeps the cluster's state cannot be written or reached. A sentence for clients, and the cause.
    Unavailable(&'static str, Cause),
    Failed(Cause),
}

/// A part of a job's log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogPiece {
    pub bytes: Vec<u8>,
    /// Where the next begins.
    pub next: u64,
    /// Nothing more will be written.
    pub is_over: bool,
}

impl Call {
    /// The role it takes, and what it is called in a refusal.
    fn needs(&self) -> (Role, &'static str) {
        match self {
            Call::Jobs | Call::Job(_) => (Role::Member, "see jobs"),
            Call::SubmitJob(_) => (Role::Admin, "submit a job"),
            Call::CancelJob(_) => (Role::Member, "cancel a job"),
            Call::RetryJob(_) => (Role::Member, "retry a job"),
            Call::Nodes => (Role::Member, "see nodes"),
            Call::SetNode { order, .. } => (
                Role::Admin,
                match order {
                    NodeOrder::Cordon => "cordon a node",
                    NodeOrder::Uncordon => "uncordon a node",
                    NodeOrder::Drain => "drain a node",
                    NodeOrder::Forget => "forget a node",
                },
            ),
            Call::Deployments | Call::Deployment(_) => (Role::Member, "see deployments"),
            Call::Deploy { .. } | Call::Undeploy(_) => (Role::Admin, "change a deployment"),
            Call::Canary { .. } => (Role::Admin, "start a canary"),
            Call::EndTrial { promote: true, .. } => (Role::Admin, "promote a canary"),
            Call::EndTrial { promote: false, .. } => (Role::Admin, "roll a canary back"),
            Call::Promotions => (Role::Member, "see promotions"),
            Call::Projects => (Role::Member, "see projects"),
            Call::SetProject { .. } | Call::DeleteProject(_) => (Role::Admin, "change a quota"),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        match refusal {
            Refusal::NotFound { what, name } => ApiError::NotFound { what, name },
            Refusal::Invalid { param, why } => {
                let message = sentence(&why);
                ApiError::Invalid { param: param.unwrap_or_else(|| "body".to_owned()), message }
            }
            Refusal::Conflict(why) => ApiError::Conflict(sentence(&why)),
            Refusal::Unavailable(why, cause) => ApiError::StateDown { why, detail: chain(cause.as_ref()) },
            Refusal::Failed(cause) => ApiError::internal(chain(cause.as_ref())),
        }
    }
}

/// Errors are written to be parts of sentences; clients read whole ones.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", chars.as_str())
}

fn allowed(owner: &KeyOwner, (role, what): (Role, &'static str)) -> Result<()> {
    if owner.role >= role { Ok(()) } else { Err(ApiError::Forbidden { what, has: owner.role, needs: role }) }
}

async fn perform(state: AppState, owner: KeyOwner, call: Call) -> Result<Json<Value>> {
    allowed(&owner, call.needs())?;
    let cluster = state.cluster.clone();
    let done = tokio::task::spawn_blocking(move || cluster.call(call)).await.map_err(ApiError::internal)?;
    Ok(Json(done?))
}

/// Whoever asks: every handler here has a key's owner.
type Owner = Extension<KeyOwner>;
type Segment<T> = std::result::Result<Path<T>, axum::extract::rejection::PathRejection>;

fn segment<T>(what: &'static str, path: Segment<T>) -> Result<T> {
    path.map(|Path(value)| value).map_err(|e| ApiError::NotFound { what, name: e.body_text() })
}

/// The body as `T`; an error names the field.
async fn ask<T: for<'a> Deserialize<'a> + Send + 'static>(state: &AppState, request: Request) -> Result<T> {
    body::read(state, request, |map: Map<String, Value>| {
        serde_path(Value::Object(map)).map_err(|(param, why)| ApiError::invalid(param, why))
    })
    .await
}

/// serde names unknown and missing fields in quotes, and no field for a value of the wrong type: those are tried one by one.
fn serde_path<T: for<'a> Deserialize<'a>>(value: Value) -> std::result::Result<T, (String, String)> {
    serde_json::from_value(value.clone()).map_err(|error| {
        let why = error.to_string();
        let quoted = why.split('`').nth(1).filter(|_| why.contains("field"));
        let guilty = || {
            let Value::Object(map) = &value else { return None };
            let still_wrong = |key: &&String| {
                let mut without = map.clone();
                without.remove(*key);
                let again = serde_json::from_value::<T>(Value::Object(without)).err();
                again.is_none_or(|again| again.to_string() != why)
            };
            map.keys().find(still_wrong).cloned()
        };
        let param = quoted.map(str::to_owned).or_else(guilty).unwrap_or_else(|| "body".to_owned());
        (param, why)
    })
}

pub(crate) async fn jobs(State(state): State<AppState>, Extension(owner): Owner) -> Result<Json<Value>> {
    perform(state, owner, Call::Jobs).await
}

pub(crate) async fn submit_job(
    State(state): State<AppState>,
    Extension(owner): Owner,
    request: Request,
) -> Result<Json<Value>> {
    let ask = ask(&state, request).await?;
    perform(state, owner, Call::SubmitJob(ask)).await
}

pub(crate) async fn job(
    State(state): State<AppState>,
    Extension(owner): Owner,
    name: Segment<String>,
) -> Result<Json<Value>> {
    perform(state, owner, Call::Job(segment("job", name)?)).await
}

pub(crate) async fn steer_job(
    State(state): State<AppState>,
    Extension(owner): Owner,
    path: Segment<(String, String)>,
) -> Result<Json<Value>> {
    let (name, order) = segment("job", path)?;
    let call = match order.as_str() {
        "cancel" => Call::CancelJob(name),
        "retry" => Call::RetryJob(name),
        _ => return Err(ApiError::NotFound { what: "order for a job called", name: order }),
    };
    perform(state, owner, call).await
}

pub(crate) async fn nodes(State(state): State<AppState>, Extension(owner): Owner) -> Result<Json<Value>> {
    perform(state, owner, Call::Nodes).await
}

pub(crate) async fn steer_node(
    State(state): State<AppState>,
    Extension(owner): Owner,
    path: Segment<(String, String)>,
) -> Result<Json<Value>> {
    let (name, order) = segment("node", path)?;
    let found = serde_json::from_value(Value::String(order.clone()));
    let order = found.map_err(|_| ApiError::NotFound { what: "order for a node called", name: order })?;
    perform(state, owner, Call::SetNode { name, order }).await
}

pub(crate) async fn deployments(
    State(state): State<AppState>,
    Extension(owner): Owner,
) -> Result<Json<Value>> {
    perform(state, owner, Call::Deployments).await
}

pub(crate) async fn deployment(
    State(state): State<AppState>,
    Extension(owner): Owner,
    model: Segment<String>,
) -> Result<Json<Value>> {
    perform(state, owner, Call::Deployment(segment("deployment", model)?)).await
}

pub(crate) async fn deploy(
    State(state): State<AppState>,
    Extension(owner): Owner,
    model: Segment<String>,
    request: Request,
) -> Result<Json<Value>> {
    let (model, ask) = (segment("deployment", model)?, ask(&state, request).await?);
    perform(state, owner, Call::Deploy { model, ask }).await
}

pub(crate) async fn undeploy(
    State(state): State<AppState>,
    Extension(owner): Owner,
    model: Segment<String>,
) -> Result<Json<Value>> {
    perform(state, owner, Call::Undeploy(segment("deployment", model)?)).await
}

pub(crate) async fn steer_deployment(
    State(state): State<AppState>,
    Extension(owner): Owner,
    path: Segment<(String, String)>,
    request: Request,
) -> Result<Json<Value>> {
    let (model, order) = segment("deployment", path)?;
    let call = match order.as_str() {
        "canary" => Call::Canary { model, ask: ask(&state, request).await? },
        "promote" => Call::EndTrial { model, promote: true },
        "rollback" => Call::EndTrial { model, promote: false },
        _ => return Err(ApiError::NotFound { what: "order for a deployment called", name: order }),
    };
    perform(state, owner, call).await
}

pub(crate) async fn promotions(
    State(state): State<AppState>,
    Extension(owner): Owner,
) -> Result<Json<Value>> {
    perform(state, owner, Call::Promotions).await
}

pub(crate) async fn projects(State(state): State<AppState>, Extension(owner): Owner) -> Result<Json<Value>> {
    perform(state, owner, Call::Projects).await
}

pub(crate) async fn set_project(
    State(state): State<AppState>,
    Extension(owner): Owner,
    name: Segment<String>,
    request: Request,
) -> Result<Json<Value>> {
    let (name, quota) = (segment("project", name)?, ask(&state, request).await?);
    perform(state, owner, Call::SetProject { name, quota }).await
}

pub(crate) async fn delete_project(
    State(state): State<AppState>,
    Extension(owner): Owner,
    name: Segment<String>,
) -> Result<Json<Value>> {
    perform(state, owner, Call::DeleteProject(segment("project", name)?)).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_wrong_field_is_named() {
        let check = |body: Value, expected: &str| {
            let (param, _) = serde_path::<JobAsk>(body).unwrap_err();
            assert_eq!(param, expected);
        };
        check(json!({"args": []}), "name");
        check(json!({"name": "a", "args": [], "nonsense": 1}), "nonsense");
        check(json!({"name": "a", "args": [], "priority": "high"}), "priority");
        check(json!({"name": 1, "args": []}), "name");
        check(json!({"name": "a", "args": [], "needs": {"cores": -1}}), "needs");
    }
}
