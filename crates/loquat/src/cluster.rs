//! The cluster as the API shows and steers it: the calls of `loquat job`, `node`, `deploy` and `project`, as JSON.

use std::collections::BTreeMap;

use api::{Call, Cluster, JobAsk, LogPiece, NeedsAsk, NodeOrder, QuotaAsk, Refusal};
use control::{
    Control, Deployment, Error, Job, JobId, JobSpec, Needs, Node, NodeMode, Project, Promotion, Quota,
    Replica, Wait,
};
use serde_json::{Value, json};

use crate::commands::deploy;
use crate::home::Home;

/// Jobs in one answer, the newest first.
const JOBS_SHOWN: usize = 200;

pub(crate) struct ControlCluster {
    pub(crate) control: Control,
    pub(crate) home: Home,
}

impl Cluster for ControlCluster {
    fn call(&self, call: Call) -> Result<Value, Refusal> {
        let control = &self.control;
        Ok(match call {
            Call::Jobs => self.jobs()?,
            Call::Job(name) => self.view(&self.find(&name)?)?,
            Call::SubmitJob(ask) => self.view(&control.submit(&self.spec(ask)).map_err(refusal)?.job)?,
            Call::CancelJob(name) => {
                self.view(&control.cancel_job(self.find(&name)?.id).map_err(refusal)?)?
            }
            Call::RetryJob(name) => self.view(&control.retry_job(self.find(&name)?.id).map_err(refusal)?)?,
            Call::Nodes => self.nodes()?,
            Call::SetNode { name, order } => self.set_node(&name, order)?,
            Call::Deployments => self.deployments()?,
            Call::Deployment(model) => self.deployment(&model)?,
            Call::Deploy { model, ask } => {
                let needs = ask.needs.map(needs_of);
                let ask = control::Ask {
                    n_replicas: ask.replicas,
                    n_min: ask.min,
                    n_max: ask.max,
                    source: ask.source,
                    args: ask.args,
                    needs,
                };
                deploy::set(&self.home, control, &model, ask).map_err(any)?;
                self.deployment(&model)?
            }
            Call::Canary { model, ask } => {
                deploy::canary(&self.home, control, (&model, &ask.source), ask.percent).map_err(any)?;
                self.deployment(&model)?
            }
            Call::EndTrial { model, promote } => {
                control.end_trial(&model, promote).map_err(refusal)?;
                self.deployment(&model)?
            }
            Call::Undeploy(model) => {
                if !control.undeploy(&model).map_err(refusal)? {
                    return Err(Refusal::NotFound { what: "deployment", name: model });
                }
                json!({"id": model, "object": "deployment", "deleted": true})
            }
            Call::Promotions => self.promotions()?,
            Call::Projects => self.projects()?,
            Call::SetProject { name, quota } => {
                let QuotaAsk { cores, memory_bytes, accelerators, jobs } = quota;
                let project = Project { name, quota: Quota { cores, memory_bytes, accelerators, jobs } };
                control.put_project(&project).map_err(refusal)?;
                project_view(&project, &control.unfinished_jobs().map_err(refusal)?)
            }
            Call::DeleteProject(name) => {
                if !control.delete_project(&name).map_err(refusal)? {
                    return Err(Refusal::NotFound { what: "project with a quota", name });
                }
                json!({"id": name, "object": "project", "deleted": true})
            }
        })
    }

    fn log(&self, job: &str, from: Option<u64>, bytes_max: usize) -> Result<LogPiece, Refusal> {
        // Looked at before the log: what it wrote last is not missed.
        let job = self.find(job)?;
        let (bytes, next) = self.control.job_log_from(&job, from, bytes_max).map_err(refusal)?;
        Ok(LogPiece { bytes, next, is_over: job.state.is_over() })
    }
}

impl ControlCluster {
    fn find(&self, name: &str) -> Result<Job, Refusal> {
        let found = self.control.find_job(name).map_err(refusal)?;
        found.ok_or_else(|| Refusal::NotFound { what: "job", name: name.to_owned() })
    }

    fn spec(&self, ask: JobAsk) -> JobSpec {
        JobSpec {
            name: ask.name,
            args: self.home.as_args().into_iter().chain(ask.args).collect(),
            max_restarts: ask.max_restarts,
            needs: needs_of(ask.needs),
            priority: ask.priority,
            project: ask.project.unwrap_or_else(|| control::DEFAULT_PROJECT.to_owned()),
            ..JobSpec::default()
        }
    }

    fn view(&self, job: &Job) -> Result<Value, Refusal> {
        let waiting = self.control.waiting().map_err(refusal)?;
        Ok(job_view(job, waiting.get(&job.id)))
    }

    fn jobs(&self) -> Result<Value, Refusal> {
        let waiting: BTreeMap<JobId, Wait> = self.control.waiting().map_err(refusal)?;
        let jobs = self.control.list_jobs(JOBS_SHOWN).map_err(refusal)?;
        Ok(list(jobs.iter().map(|job| job_view(job, waiting.get(&job.id)))))
    }

    fn promotions(&self) -> Result<Value, Refusal> {
        let promotions = self.control.list_promotions(JOBS_SHOWN).map_err(refusal)?;
        let view = |promotion: &Promotion| {
            let Promotion { id, pipeline, candidate, stage, scores, history, created_at, .. } = promotion;
            json!({
                "id": id.to_string(), "object": "promotion", "model": pipeline.model, "candidate": candidate,
                "stage": stage.as_str(), "scores": scores, "history": history, "created": created_at.seconds(),
            })
        };
        Ok(list(promotions.iter().map(view)))
    }

    fn nodes(&self) -> Result<Value, Refusal> {
        let jobs = self.control.unfinished_jobs().map_err(refusal)?;
        let nodes = self.control.list_nodes().map_err(refusal)?;
        Ok(list(nodes.iter().map(|node| self.node_view(node, &jobs))))
    }

    fn set_node(&self, name: &str, order: NodeOrder) -> Result<Value, Refusal> {
        let mode = match order {
            NodeOrder::Cordon => NodeMode::Cordoned,
            NodeOrder::Uncordon => NodeMode::Open,
            NodeOrder::Drain => NodeMode::Draining,
            NodeOrder::Forget => {
                self.control.forget_node(name).map_err(refusal)?;
                return Ok(json!({"id": name, "object": "node", "deleted": true}));
            }
        };
        if !self.control.set_node_mode(name, mode).map_err(refusal)? {
            return Err(Refusal::NotFound { what: "node", name: name.to_owned() });
        }
        let jobs = self.control.unfinished_jobs().map_err(refusal)?;
        let nodes = self.control.list_nodes().map_err(refusal)?;
        let node = nodes.iter().find(|node| node.spec.name == name);
        Ok(node.map_or(Value::Null, |node| self.node_view(node, &jobs)))
    }

    fn node_view(&self, node: &Node, jobs: &[Job]) -> Value {
        let (spec, load) = (&node.spec, &node.load);
        let on = |job: &&Job| job.process.as_ref().is_some_and(|process| process.node == spec.name);
        let ranks_here = |job: &Job| {
            let here = job.placed.iter().find(|share| share.node == spec.name);
            u64::from(here.map_or(job.spec.needs.n_ranks(), |share| share.ranks))
        };
        let used = |job: &Job| load.jobs.iter().find(|used| used.id == job.id.0).copied().unwrap_or_default();
        let job_view = |job: &Job| {
            let used = used(job);
            json!({
                "id": job.id.to_string(),
                "name": job.spec.name,
                "cores_reserved": u64::from(job.spec.needs.cores) * ranks_here(job),
                "memory_bytes_reserved": job.spec.needs.memory_bytes.saturating_mul(ranks_here(job)),
                "cores_used": used.cores,
                "memory_bytes_used": used.memory_bytes,
            })
        };
        json!({
            "id": spec.name,
            "object": "node",
            "state": node.state(self.control.now()),
            "mode": node.mode.as_str(),
            "problem": load.problem,
            "cores": spec.cores,
            "cores_used": load.cores,
            "memory_bytes": spec.memory_bytes,
            "memory_bytes_used": load.memory_bytes,
            "accelerators": spec.accelerators,
            "disk_bytes": spec.disk_bytes,
            "disk_free_bytes": load.disk_free_bytes,
            "jobs_max": spec.jobs_max,
            "jobs": jobs.iter().filter(on).map(job_view).collect::<Vec<_>>(),
            "seen": node.seen_at.seconds(),
        })
    }

    fn deployments(&self) -> Result<Value, Refusal> {
        let replicas = self.control.list_replicas().map_err(refusal)?;
        let found = self.control.list_deployments().map_err(refusal)?;
        Ok(list(found.iter().map(|deployment| deployment_view(deployment, &replicas))))
    }

    fn deployment(&self, model: &str) -> Result<Value, Refusal> {
        let found = self.control.get_deployment(model).map_err(refusal)?;
        let found = found.ok_or_else(|| Refusal::NotFound { what: "deployment", name: model.to_owned() })?;
        Ok(deployment_view(&found, &self.control.list_replicas().map_err(refusal)?))
    }

    fn projects(&self) -> Result<Value, Refusal> {
        let jobs = self.control.unfinished_jobs().map_err(refusal)?;
        let projects = self.control.list_projects().map_err(refusal)?;
        Ok(list(projects.iter().map(|project| project_view(project, &jobs))))
    }
}

fn list(data: impl Iterator<Item = Value>) -> Value {
    json!({"object": "list", "data": data.collect::<Vec<_>>()})
}

fn needs_of(ask: NeedsAsk) -> Needs {
    let NeedsAsk { cores, memory_bytes, accelerators, ranks } = ask;
    Needs { cores, memory_bytes, accelerators, ranks }
}

/// A job, and why it waits if it does.
pub(crate) fn job_view(job: &Job, wait: Option<&Wait>) -> Value {
    let spec = &job.spec;
    let seconds = |at: Option<control::UnixMs>| at.map(control::UnixMs::seconds);
    json!({
        "id": job.id.to_string(),
        "object": "job",
        "name": spec.name,
        "state": job.state.as_str(),
        "desired": job.desired.as_str(),
        "stopping": job.stop_sent_at.is_some(),
        "waits_for": wait.map(ToString::to_string),
        "restarts": job.n_starts.saturating_sub(1),
        "failures": job.n_failures,
        "message": job.message,
        "priority": spec.priority,
        "project": spec.project,
        "needs": spec.needs,
        "nodes": job.placed,
        "service": spec.is_service(),
        "created": job.created_at.seconds(),
        "started": seconds(job.started_at),
        "finished": seconds(job.finished_at),
    })
}

fn deployment_view(deployment: &Deployment, replicas: &[Replica]) -> Value {
    let own = replicas.iter().filter(|replica| replica.model == deployment.model);
    let replica_view = |replica: &Replica| {
        json!({
            "id": replica.name,
            "version": replica.version,
            "url": replica.url,
            "own": replica.own,
            "draining": replica.draining,
        })
    };
    json!({
        "id": deployment.model,
        "object": "deployment",
        "replicas": deployment.n_replicas,
        "min": deployment.n_min,
        "max": deployment.n_max,
        "live": deployment.live,
        "canary": deployment.canary.as_ref().map(|c| json!({"source": c.source, "percent": c.percent})),
        "args": deployment.args,
        "needs": deployment.needs,
        "message": deployment.message,
        "running": own.map(replica_view).collect::<Vec<_>>(),
        "created": deployment.created_at.seconds(),
        "changed": deployment.changed_at.seconds(),
    })
}

/// A quota, and what the jobs of the project that run have of it.
fn project_view(project: &Project, jobs: &[Job]) -> Value {
    let own = || jobs.iter().filter(|job| job.spec.project == project.name && job.process.is_some());
    let sum = |of: fn(&Needs) -> u64| -> u64 {
        own().map(|job| of(&job.spec.needs).saturating_mul(job.spec.needs.n_ranks().into())).sum()
    };
    let Quota { cores, memory_bytes, accelerators, jobs } = project.quota;
    json!({
        "id": project.name,
        "object": "project",
        "quota": {"cores": cores, "memory_bytes": memory_bytes, "accelerators": accelerators, "jobs": jobs},
        "used": {
            "cores": sum(|needs| needs.cores.into()),
            "memory_bytes": sum(|needs| needs.memory_bytes),
            "accelerators": sum(|needs| needs.accelerators.into()),
            "jobs": own().filter(|job| !job.spec.is_service()).count(),
        },
    })
}

/// What a client reads of an error of the control plane.
fn refusal(error: Error) -> Refusal {
    let why = error.to_string();
    match error {
        Error::NoJob(id) => Refusal::NotFound { what: "job", name: id.to_string() },
        Error::NoNode { name } => Refusal::NotFound { what: "node", name },
        Error::NoDeployment { model } => Refusal::NotFound { what: "deployment", name: model },
        Error::Beyond { field, .. } => Refusal::Invalid { param: Some(format!("needs.{field}")), why },
        Error::Invalid { .. } => Refusal::Invalid { param: None, why },
        Error::JobConflict { .. }
        | Error::JobNotOver { .. }
        | Error::JobUnfinished(_)
        | Error::NodeAlive { .. }
        | Error::NoTrial { .. }
        | Error::TooMany { .. } => Refusal::Conflict(why),
        Error::Unreachable { .. } => unavailable("The cluster's database cannot be reached.", error),
        Error::Busy { .. } => unavailable("The cluster's database is busy.", error),
        Error::DiskFull { .. } => unavailable("The disk of the cluster's database is full.", error),
        Error::ReadOnly { .. } => unavailable("The cluster's database can only be read.", error),
        other => Refusal::Failed(other.into()),
    }
}

/// Where the database is stands in the log; clients need not know.
fn unavailable(why: &'static str, error: Error) -> Refusal {
    Refusal::Unavailable(why, error.into())
}

/// As [`refusal`], where also files were looked for.
fn any(error: anyhow::Error) -> Refusal {
    match error.downcast::<Error>() {
        Ok(error) => refusal(error),
        Err(other) => Refusal::Invalid { param: Some("source".to_owned()), why: format!("{other:#}") },
    }
}
