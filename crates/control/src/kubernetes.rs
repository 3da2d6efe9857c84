//! Jobs on a Kubernetes cluster, through its API server.
//!
//! Each attempt of a job is a Job object of its own, named after cluster, job and attempt: whoever tries to make it twice is
//! told so. The gate is Kubernetes': it is created suspended, recorded, and released. One that is still suspended when
//! somebody looks was left by a controller that died in between; it is deleted and counts as lost. Every change names the
//! object's uid, and a deletion its version too, so that nothing is done to what has changed since it was seen.
//!
//! Replicas are Jobs as well and no Deployments: a controller behind the reconciler's back that starts pods again would run
//! a job twice that was declared lost. `api.rs` speaks to the server, `manifest.rs` writes Jobs, `logs.rs` brings what pods
//! wrote.

mod api;
mod logs;
mod manifest;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::database::random_hex;
use crate::error::{Error, Result};
use crate::job::{Ending, Job, JobId};
use crate::launcher::{Launcher, Observed, Prepared, StopHow};
use crate::log;
use crate::process::ProcessRef;
use api::{Api, refused};
use manifest::{Attempt, CLUSTER, MARK, STOPPED};

pub use manifest::KubernetesOptions;

/// Digits of the cluster's id in the names of its objects.
const CLUSTER_DIGITS: usize = 10;
/// Begins the boot id of processes that are Jobs; namespace, name and uid follow.
const BOOT: &str = "kubernetes";
/// Turns between two looks at what running pods write.
const LOG_TURNS: u32 = 4;

/// Runs jobs as Jobs. Programs are the image's; logs are copied to where the other launchers leave them.
pub struct KubernetesLauncher {
    api: Api,
    options: KubernetesOptions,
    log_dir: PathBuf,
    cluster: String,
    /// What was seen in this turn; a list costs the server as much as one object.
    seen: Option<BTreeMap<String, Value>>,
    pods: Option<BTreeMap<String, Vec<Value>>>,
    /// Versions of the Jobs that wait for their release.
    prepared: HashMap<ProcessRef, String>,
    /// How Jobs ended, until the end is recorded.
    endings: HashMap<ProcessRef, Ending>,
    /// Jobs whose end is recorded and that are still there.
    leftovers: Vec<ProcessRef>,
    n_turns: u32,
}

impl KubernetesLauncher {
    /// For the cluster of this id. Errors: the API server does not answer, or does not let us see Jobs.
    pub fn new(options: KubernetesOptions, log_dir: &Path, cluster: &str) -> Result<Self> {
        let failed = |source| Error::JobLog { path: log_dir.to_owned(), source };
        fs::create_dir_all(log_dir).map_err(failed)?;
        let log_dir = fs::canonicalize(log_dir).map_err(failed)?;
        let is_name =
            |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !is_name(&options.namespace) || !is_name(cluster) {
            let why = format!("{:?} is no namespace, or {cluster:?} no cluster", options.namespace);
            return Err(Error::Invalid { what: "place in Kubernetes", why });
        }
        let mut launcher = Self {
            api: Api::new(&options)?,
            options,
            log_dir,
            cluster: cluster.to_owned(),
            seen: None,
            pods: None,
            prepared: HashMap::new(),
            endings: HashMap::new(),
            leftovers: Vec::new(),
            n_turns: 0,
        };
        launcher.jobs()?;
        launcher.changed();
        Ok(launcher)
    }

    fn log_path(&self, id: JobId) -> PathBuf {
        self.log_dir.join(format!("{id}.log"))
    }

    fn selector(&self) -> String {
        format!("{CLUSTER}={}", self.cluster)
    }

    /// All Jobs of this cluster by name, as of this turn.
    fn jobs(&mut self) -> Result<&BTreeMap<String, Value>> {
        if self.seen.is_none() {
            let found = self.api.list(&self.api.jobs(""), &self.selector())?;
            let named = |job: Value| (text(&job["metadata"]["name"]).to_owned(), job);
            self.seen = Some(found.into_iter().map(named).collect());
        }
        Ok(self.seen.get_or_insert_default())
    }

    /// The pods of one Job, as of this turn.
    fn pods_of(&mut self, job: &str) -> Result<Vec<Value>> {
        if self.pods.is_none() {
            let mut pods: BTreeMap<String, Vec<Value>> = BTreeMap::new();
            for pod in self.api.list(&self.api.pods(""), &self.selector())? {
                pods.entry(text(&pod["metadata"]["labels"]["job-name"]).to_owned()).or_default().push(pod);
            }
            self.pods = Some(pods);
        }
        Ok(self.pods.as_ref().and_then(|pods| pods.get(job)).cloned().unwrap_or_default())
    }

    fn changed(&mut self) {
        (self.seen, self.pods) = (None, None);
    }

    /// The Job of a process; `None` when it is gone, or somebody else's by now.
    fn find(&mut self, process: &ProcessRef) -> Result<Option<Value>> {
        let Some(place) = Place::of(process).filter(|place| place.namespace == self.options.namespace) else {
            return Ok(None);
        };
        let found = self.jobs()?.get(place.name).cloned();
        let is_it = |job: &Value| {
            text(&job["metadata"]["uid"]) == place.uid
                && text(&job["metadata"]["labels"][MARK]) == process.mark
        };
        Ok(found.filter(is_it))
    }

    /// A Job of this very attempt is there already: its maker died, or sleeps, before it was recorded. It is made ours by
    /// a new mark, so that its maker, should it wake up, does not take it for its own.
    fn take_over(&mut self, name: &str, mark: &str) -> Result<Value> {
        let path = self.api.jobs(name);
        let found = self.api.get(&path)?.expect("read", &path, 200)?;
        let ours = text(&found["metadata"]["labels"][CLUSTER]) == self.cluster;
        if !ours || !is_held(&found) {
            return Err(refused("create", &path, "there is one, and it is not ours to start"));
        }
        let (uid, version) = (&found["metadata"]["uid"], &found["metadata"]["resourceVersion"]);
        let patch = json!({"metadata": {"uid": uid, "resourceVersion": version, "labels": {MARK: mark}}});
        self.api.patch(&path, &patch)?.expect("take over", &path, 200)
    }

    /// Deletes a Job if it still is what it was; one that is gone is no error.
    fn delete(&mut self, process: &ProcessRef, version: Option<&str>) -> Result<()> {
        self.changed();
        let Some(place) = Place::of(process) else { return Ok(()) };
        let mut preconditions = json!({"uid": place.uid});
        if let Some(version) = version {
            preconditions["resourceVersion"] = version.into();
        }
        let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background",
            "preconditions": preconditions});
        let path = self.api.jobs(place.name);
        let answer = self.api.delete(&path, &options)?;
        match answer.status {
            200 | 202 | 404 => Ok(()),
            _ => answer.expect("delete", &path, 200).map(drop),
        }
    }

    /// Has Kubernetes end the Job's pods, each with time to save.
    fn suspend(&mut self, process: &ProcessRef) -> Result<()> {
        let Some(place) = Place::of(process) else { return Ok(()) };
        let patch = json!({"metadata": {"uid": place.uid, "annotations": {STOPPED: "asked"}}, "spec": {"suspend": true}});
        let path = self.api.jobs(place.name);
        let answer = self.api.patch(&path, &patch)?;
        match answer.status {
            404 => Ok(()),
            _ => answer.expect("stop", &path, 200).map(drop),
        }
    }

    /// Never with no grace at all: the object would go while the process may still run where nobody sees it.
    fn kill_pods(&mut self, process: &ProcessRef) -> Result<()> {
        let Some(place) = Place::of(process) else { return Ok(()) };
        self.changed();
        for pod in self.pods_of(place.name)? {
            let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 1,
                "preconditions": {"uid": pod["metadata"]["uid"]}});
            let path = self.api.pods(text(&pod["metadata"]["name"]));
            let answer = self.api.delete(&path, &options)?;
            if !matches!(answer.status, 200 | 202 | 404 | 409) {
                answer.expect("kill", &path, 200)?;
            }
        }
        Ok(())
    }

    /// How a Job ended, or `None` while anything of it is there.
    fn ending(&mut self, job: &Job, process: &ProcessRef) -> Result<Option<Ending>> {
        let Some(found) = self.find(process)? else { return Ok(Some(Ending::Lost)) };
        if has_condition(&found, "Complete") {
            return Ok(Some(Ending::Exited(0)));
        }
        let is_over = has_condition(&found, "Failed");
        if !is_over && is_held(&found) {
            self.delete(process, Some(text(&found["metadata"]["resourceVersion"])))?;
            return Ok(Some(Ending::Lost));
        }
        if !is_over && !is_suspended(&found) {
            return Ok(None);
        }
        // It failed, or was asked to stop: over is what has no pod any more that may run.
        let pods = self.pods_of(text(&found["metadata"]["name"]))?;
        let may_run = |pod: &Value| !matches!(text(&pod["status"]["phase"]), "Succeeded" | "Failed");
        if pods.iter().any(may_run) {
            return Ok(None);
        }
        let asked = job.stop_sent_at.is_some() || is_suspended(&found);
        // Who was stopped by us left nobody to say how it went; who else is gone without a word was lost.
        Ok(Some(first_failure(&pods).unwrap_or(if asked { Ending::Signaled(15) } else { Ending::Lost })))
    }
}

impl Launcher for KubernetesLauncher {
    fn prepare(&mut self, job: &Job) -> Result<Prepared> {
        self.changed();
        let mark = random_hex::<16>()?;
        let cluster = &self.cluster[..self.cluster.len().min(CLUSTER_DIGITS)];
        let name = format!("loquat-{cluster}-{}-{}", job.id.0, job.n_starts + 1);
        let attempt = Attempt { name: &name, cluster: &self.cluster, mark: &mark };
        let made = self.api.post(&self.api.jobs(""), &manifest::job(&self.options, job, &attempt))?;
        let made = match made.status {
            409 => self.take_over(&name, &mark)?,
            _ => made.expect("create", &name, 201)?,
        };
        let log_path = self.log_path(job.id);
        let header =
            format!("== {} ({}), attempt {}: {name} on Kubernetes", job.id, job.spec.name, job.n_starts + 1);
        drop(log::open(&log_path, &header)?);
        let (namespace, uid) = (&self.options.namespace, text(&made["metadata"]["uid"]));
        let process = ProcessRef {
            pid: job.n_starts + 1,
            start_ticks: 0,
            boot_id: format!("{BOOT}/{namespace}/{name}/{uid}"),
            mark,
            node: String::new(),
        };
        let version = text(&made["metadata"]["resourceVersion"]).to_owned();
        self.prepared.insert(process.clone(), version);
        Ok(Prepared { process, log_path: Some(log_path) })
    }

    fn release(&mut self, process: &ProcessRef) -> Result<()> {
        self.changed();
        let (Some(version), Some(place)) = (self.prepared.remove(process), Place::of(process)) else {
            return Ok(());
        };
        let patch =
            json!({"metadata": {"uid": place.uid, "resourceVersion": version}, "spec": {"suspend": false}});
        let path = self.api.jobs(place.name);
        self.api.patch(&path, &patch)?.expect("release", &path, 200).map(drop)
    }

    fn abandon(&mut self, process: &ProcessRef) -> Result<()> {
        match self.prepared.remove(process) {
            Some(version) => self.delete(process, Some(&version)),
            None => Ok(()),
        }
    }

    fn poll(&mut self, job: &Job) -> Result<Observed> {
        let Some(process) = &job.process else { return Ok(Observed::Ended(Ending::Lost)) };
        if let Some(ending) = self.endings.get(process) {
            return Ok(Observed::Ended(*ending));
        }
        let ending = self.ending(job, process)?;
        if ending.is_some() || self.n_turns.is_multiple_of(LOG_TURNS) {
            // What cannot be read now must not hide the job's end; what was written is there as long as the pods.
            if let Err(error) = self.copy_logs(job, process) {
                tracing::warn!(job = %job.id, %error, "cannot copy a job's log");
            }
        }
        let Some(ending) = ending else { return Ok(Observed::Running) };
        self.endings.insert(process.clone(), ending);
        Ok(Observed::Ended(ending))
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) -> Result<()> {
        if self.find(process)?.is_none() {
            return Ok(());
        }
        self.changed();
        self.suspend(process)?;
        if how == StopHow::Kill { self.kill_pods(process) } else { Ok(()) }
    }

    fn forget(&mut self, process: &ProcessRef) {
        self.endings.remove(process);
        self.prepared.remove(process);
        self.leftovers.push(process.clone());
        self.tidy();
    }

    fn tick(&mut self) {
        self.changed();
        self.n_turns = self.n_turns.wrapping_add(1);
        self.tidy();
    }
}

impl KubernetesLauncher {
    /// Removes Jobs whose end is recorded; what cannot be removed now is tried again.
    fn tidy(&mut self) {
        for process in std::mem::take(&mut self.leftovers) {
            self.forget_log(&process);
            if let Err(error) = self.delete(&process, None) {
                tracing::warn!(%error, "cannot remove a Job that is over");
                if error.is_of_the_launcher() {
                    self.leftovers.push(process);
                }
            }
        }
    }
}

impl std::fmt::Debug for KubernetesLauncher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubernetesLauncher").field("server", &self.options.server).finish_non_exhaustive()
    }
}

/// Where the Job of a process is.
struct Place<'a> {
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
}

impl Place<'_> {
    fn of(process: &ProcessRef) -> Option<Place<'_>> {
        let mut parts = process.boot_id.split('/');
        let (Some(BOOT), Some(namespace), Some(name), Some(uid)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        Some(Place { namespace, name, uid })
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn is_suspended(job: &Value) -> bool {
    job["spec"]["suspend"] == true
}

/// Whether it was never let go.
fn is_held(job: &Value) -> bool {
    is_suspended(job) && job["metadata"]["annotations"][STOPPED].is_null()
}

fn has_condition(job: &Value, kind: &str) -> bool {
    let conditions = job["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == kind && condition["status"] == "True")
}

/// How the pod ended that ended badly first; one that was told to stop because of it comes after it.
fn first_failure(pods: &[Value]) -> Option<Ending> {
    let ended = |pod: &Value| {
        let terminated = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        let code = i32::try_from(terminated["exitCode"].as_i64()?).ok().filter(|code| *code != 0)?;
        Some((text(&terminated["finishedAt"]).to_owned(), matches!(code, 75 | 143), code))
    };
    let (_, _, code) = pods.iter().filter_map(ended).min()?;
    // A container that a signal ended has 128 and the signal's number.
    Some(if code > 128 { Ending::Signaled(code - 128) } else { Ending::Exited(code) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(code: i64, at: &str) -> Value {
        json!({"status": {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "finishedAt": at}}}]}})
    }

    #[test]
    fn the_first_failure_is_the_jobs() {
        let check = |pods: &[Value], expected| assert_eq!(first_failure(pods), expected, "{pods:?}");
        check(&[], None);
        check(&[json!({"status": {"reason": "Evicted"}})], None);
        check(&[pod(0, "1")], None);
        check(&[pod(75, "2"), pod(3, "2"), pod(0, "1")], Some(Ending::Exited(3)));
        check(&[pod(143, "2"), pod(137, "1")], Some(Ending::Signaled(9)));
        check(&[pod(75, "1")], Some(Ending::Exited(75)));
    }
}
