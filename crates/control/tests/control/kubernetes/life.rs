//! Pods that live: what the Job controller and a kubelet would do, by child processes.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use super::{NAMESPACE, Objects, Shared};

pub(super) struct Pod {
    pub(super) object: Value,
    child: Child,
    /// Lines with the time each was written at.
    pub(super) log: Arc<Mutex<Vec<(String, String)>>>,
    /// When what was asked to end is killed.
    kill_at: Option<Instant>,
}

impl Pod {
    /// As a kubelet does: TERM now, KILL after the grace.
    pub(super) fn end(&mut self, grace: Duration) {
        let kill_at = Instant::now() + grace;
        if self.kill_at.is_none() {
            self.signal_if_alive(Signal::TERM);
            self.object["metadata"]["deletionTimestamp"] = now().into();
        }
        self.kill_at = Some(self.kill_at.map_or(kill_at, |earlier| earlier.min(kill_at)));
    }

    pub(super) fn kill(&mut self) {
        self.signal_if_alive(Signal::KILL);
        drop(self.child.wait());
    }

    /// A whole container: everything in the group that its first process leads. By the system call: kill(1) takes a
    /// negative number for an option, or for everybody.
    fn signal_if_alive(&self, signal: Signal) {
        // The number of one that was waited for may be another's by now.
        if self.is_over() {
            return;
        }
        let group = i32::try_from(self.child.id()).ok().filter(|pid| *pid > 1).and_then(Pid::from_raw);
        match kill_process_group(group.expect("a child has a number"), signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => panic!("cannot signal a pod: {error}"),
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
    }
}

pub(super) fn start(state: &Arc<Shared>) {
    let state = state.clone();
    std::thread::spawn(move || {
        while !state.stop.load(Ordering::SeqCst) {
            turn(&mut state.objects.lock().unwrap());
            std::thread::sleep(Duration::from_millis(15));
        }
    });
}

fn turn(objects: &mut Objects) {
    let Objects { version, jobs, pods, n_started, .. } = objects;
    for pod in pods.values_mut() {
        if pod.kill_at.is_some_and(|at| Instant::now() > at) {
            pod.signal_if_alive(Signal::KILL);
        }
        if !pod.is_over()
            && let Some(status) = pod.child.try_wait().unwrap()
        {
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
            let terminated = json!({"exitCode": code, "finishedAt": now()});
            pod.object["status"] = json!({
                "phase": if code == 0 { "Succeeded" } else { "Failed" },
                "containerStatuses": [{"name": "loquat", "state": {"terminated": terminated}}],
            });
        }
    }
    // What was deleted is gone once its process is.
    let mut lost: Vec<String> = Vec::new();
    pods.retain(|_, pod| {
        let stays = pod.kill_at.is_none() || !pod.is_over();
        if !stays {
            lost.push(pod.object["metadata"]["labels"]["job-name"].as_str().unwrap().to_owned());
        }
        stays
    });
    for (name, job) in jobs.iter_mut().filter(|(_, job)| job["status"]["conditions"].is_null()) {
        if job["spec"]["suspend"] == true {
            let seconds = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
            let own = |pod: &&mut Pod| pod.object["metadata"]["labels"]["job-name"] == name.as_str();
            pods.values_mut().filter(own).for_each(|pod| pod.end(Duration::from_secs(seconds)));
            continue;
        }
        let n = job["spec"]["completions"].as_u64().unwrap();
        if !n_started.contains_key(name) {
            for index in 0..n {
                let pod = run(job, name, index);
                pods.insert(pod.object["metadata"]["name"].as_str().unwrap().to_owned(), pod);
                *n_started.entry(name.clone()).or_default() += 1;
            }
        }
        let own: Vec<&mut Pod> = pods
            .values_mut()
            .filter(|pod| pod.object["metadata"]["labels"]["job-name"] == name.as_str())
            .collect();
        let failed = |pod: &&mut Pod| pod.object["status"]["phase"] == "Failed";
        let condition = if own.iter().any(failed) || lost.contains(name) {
            "Failed"
        } else if own.len() as u64 == n && own.iter().all(|pod| pod.is_over()) {
            "Complete"
        } else {
            continue;
        };
        // No retries are wanted: the others end with the first that failed.
        own.into_iter().filter(|pod| !pod.is_over()).for_each(|pod| pod.end(Duration::from_secs(1)));
        job["status"] = json!({"conditions": [{"type": condition, "status": "True"}]});
        Objects::touch(version, job);
    }
}

/// Starts one pod of a Job, as its template says.
fn run(job: &Value, name: &str, index: u64) -> Pod {
    let spec = &job["spec"]["template"]["spec"];
    let container = &spec["containers"][0];
    let mut env: Vec<(String, String)> = vec![("JOB_COMPLETION_INDEX".to_owned(), index.to_string())];
    for variable in container["env"].as_array().unwrap() {
        let value = variable["value"].as_str().map_or("10.0.0.7".to_owned(), |value| expanded(value, &env));
        env.push((variable["name"].as_str().unwrap().to_owned(), value));
    }
    let words = ["command", "args"].iter().flat_map(|part| container[part].as_array().unwrap());
    let words: Vec<String> = words.map(|word| expanded(word.as_str().unwrap(), &env)).collect();
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .envs(env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    collect(child.stdout.take().unwrap(), &log);
    collect(child.stderr.take().unwrap(), &log);
    let mut labels = job["spec"]["template"]["metadata"]["labels"].clone();
    labels["job-name"] = name.into();
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{name}-{index}-x{}", child.id()), "namespace": NAMESPACE, "labels": labels,
            "uid": format!("pod-{}", child.id()),
            "annotations": {"batch.kubernetes.io/job-completion-index": index.to_string()},
        },
        "status": {"phase": "Running", "containerStatuses": [{"name": "loquat", "state": {"running": {}}}]},
    });
    Pod { object, child, log, kill_at: None }
}

fn collect(from: impl Read + Send + 'static, log: &Arc<Mutex<Vec<(String, String)>>>) {
    let log = log.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            log.lock().unwrap().push((now(), line));
        }
    });
}

/// As Kubernetes expands: `$(NAME)` of what is known, `$$` is a dollar.
fn expanded(text: &str, env: &[(String, String)]) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match env.iter().find(|(known, _)| known == name) {
                Some((_, value)) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out + rest
}

/// RFC 3339 with nine digits, as a kubelet writes times; only their order matters here.
pub(super) fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let (day, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    format!(
        "20{:02}-01-01T{:02}:{:02}:{:02}.{:09}Z",
        day % 100,
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}
