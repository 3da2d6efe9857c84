//! A job as a Job: the whole manifest, a pure function of what is known.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::job::{Job, Needs};

/// The label of everything of one cluster.
pub(super) const CLUSTER: &str = "loquat/cluster";
/// The label that tells whose attempt it is.
pub(super) const MARK: &str = "loquat/mark";
const JOB: &str = "loquat/job";
/// The annotation of a Job that was asked to stop, and not merely not let go yet.
pub(super) const STOPPED: &str = "loquat/stopped";
const NAME: &str = "loquat/name";
pub(super) const CONTAINER: &str = "loquat";

/// From being asked to stop to being killed by the kubelet: longer than a reconciler waits.
const GRACE_SECONDS: u32 = 120;
/// A finished Job that nobody came back for goes after a week.
const KEPT_SECONDS: u32 = 7 * 24 * 3600;

/// Which Kubernetes, and how jobs run on it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesOptions {
    /// `https://host:port` of the API server.
    #[serde(default)]
    pub server: String,
    /// Holds the token that we show it.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// The certificate that it must show us.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    #[serde(default)]
    pub namespace: String,
    /// What has this program in it.
    pub image: String,
    /// The program in the image.
    #[serde(default = "program")]
    pub program: String,
    /// A Secret whose keys become variables of every job's environment: database, keys of the bucket.
    #[serde(default)]
    pub secret: Option<String>,
    /// The resource that counts accelerators.
    #[serde(default = "accelerator")]
    pub accelerator: String,
    /// Merged into every pod's spec, and into its container's: volumes, tolerations, resources.
    #[serde(default)]
    pub pod: Map<String, Value>,
    #[serde(default)]
    pub container: Map<String, Value>,
}

fn program() -> String {
    "loquat".to_owned()
}

fn accelerator() -> String {
    "nvidia.com/gpu".to_owned()
}

/// What of an attempt is not the job's own.
pub(super) struct Attempt<'a> {
    pub(super) name: &'a str,
    pub(super) cluster: &'a str,
    pub(super) mark: &'a str,
}

/// The Job, on hold. Kubernetes starts nothing again by itself: the reconciler knows how often a job may run.
pub(super) fn job(options: &KubernetesOptions, job: &Job, attempt: &Attempt) -> Value {
    let Attempt { name, cluster, mark } = attempt;
    // One for each rank.
    let n_pods = job.spec.needs.n_ranks();
    let id = job.id.0.to_string();
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            "labels": {"app.kubernetes.io/managed-by": "loquat", CLUSTER: cluster, JOB: id, MARK: mark},
            "annotations": {NAME: job.spec.name},
        },
        "spec": {
            "suspend": true,
            "completionMode": "Indexed",
            "completions": n_pods,
            "parallelism": n_pods,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": {
                "metadata": {"labels": {CLUSTER: cluster, JOB: id}},
                "spec": pod(options, job, mark),
            },
        },
    })
}

fn pod(options: &KubernetesOptions, job: &Job, mark: &str) -> Value {
    let mut pod = json!({
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": false,
    });
    merge(&mut pod, &options.pod);
    pod["containers"] = json!([container(options, job, mark)]);
    pod
}

fn container(options: &KubernetesOptions, job: &Job, mark: &str) -> Value {
    let args: Vec<String> = job.spec.args.iter().map(|arg| literal(arg)).collect();
    let value = |name: &str, value: &str| json!({"name": name, "value": literal(value)});
    let mut env: Vec<Value> = job.spec.env.iter().map(|(name, text)| value(name, text)).collect();
    // Where a replica is to be reached, and of how many ranks this is one.
    env.push(json!({"name": "LOQUAT_ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}));
    env.push(value("LOQUAT_PODS", &job.spec.needs.n_ranks().to_string()));
    // By which the pods of one attempt know each other.
    env.push(value("LOQUAT_POD_GROUP", mark));
    // Who serves in a pod is asked from others.
    env.push(value("LOQUAT_HOST", "0.0.0.0"));
    let mut container = json!({
        "name": CONTAINER,
        "image": options.image,
        "command": [literal(&options.program)],
        "args": args,
        "env": env,
    });
    if let Some(secret) = &options.secret {
        container["envFrom"] = json!([{"secretRef": {"name": secret}}]);
    }
    let requests = requests(options, &job.spec.needs);
    if !requests.is_empty() {
        // What is asked for is what may be used: accelerators allow nothing else, and memory should not.
        container["resources"] = json!({"requests": requests, "limits": requests});
    }
    merge(&mut container, &options.container);
    container
}

/// What one rank needs, in Kubernetes' units.
fn requests(options: &KubernetesOptions, needs: &Needs) -> Map<String, Value> {
    let Needs { cores, memory_bytes, accelerators, .. } = *needs;
    let all = [
        ("cpu", u64::from(cores)),
        ("memory", memory_bytes),
        (options.accelerator.as_str(), u64::from(accelerators)),
    ];
    let asked = all.into_iter().filter(|(_, n)| *n > 0);
    asked.map(|(name, n)| (name.to_owned(), n.to_string().into())).collect()
}

/// Kubernetes replaces `$(NAME)` in arguments and values; `$$` is how it spells a dollar.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

/// As RFC 7396 merges, without its deletions: objects field by field, anything else replaced.
fn merge(into: &mut Value, from: &Map<String, Value>) {
    for (name, value) in from {
        match (&mut into[name.as_str()], value) {
            (found @ Value::Object(_), Value::Object(inner)) => merge(found, inner),
            (found, value) => *found = value.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_text_is_replaced() {
        assert_eq!(literal("kill $$; echo $(HOME) $x"), "kill $$$$; echo $$(HOME) $$x");
    }

    #[test]
    fn more_is_merged_field_by_field() {
        let mut value = json!({"a": {"b": 1, "c": [1]}, "d": 2});
        let Value::Object(more) = json!({"a": {"c": [2], "e": 3}, "f": {"g": 4}}) else { unreachable!() };
        merge(&mut value, &more);
        assert_eq!(value, json!({"a": {"b": 1, "c": [2], "e": 3}, "d": 2, "f": {"g": 4}}));
    }
}
