//! What pods wrote, copied from the API server to the file where every launcher leaves a job's log.
//!
//! Lines come with their times; how far a Job's pods are copied stands in a small file beside the logs, so that a controller
//! that takes over goes on where the last one was, if it sees that directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;

use serde_json::Value;

use super::api::escaped;
use super::manifest::CONTAINER;
use super::{KubernetesLauncher, Place, text};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::log;
use crate::process::ProcessRef;

/// What one look takes of one pod's log.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes of one job's log before it is cut; twice this is kept.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// By pod: the time of the last line that is copied, and why it does not run yet.
type Copied = BTreeMap<String, (String, String)>;

impl KubernetesLauncher {
    pub(super) fn copy_logs(&mut self, job: &Job, process: &ProcessRef) -> Result<()> {
        let (Some(place), Some(path)) = (Place::of(process), &job.log_path) else { return Ok(()) };
        let pods = self.pods_of(place.name)?;
        let seen = self.seen_path(place.name);
        let mut copied: Copied =
            fs::read(&seen).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let before = copied.clone();
        let mut lines = Vec::new();
        for pod in &pods {
            let name = text(&pod["metadata"]["name"]);
            let (last, reason) = copied.entry(name.to_owned()).or_default();
            // One of many says which it is.
            let index = text(&pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]);
            let prefix = if pods.len() > 1 { format!("[{index}] ") } else { String::new() };
            if let Some(why) = waits_for(pod).filter(|why| why != reason) {
                lines.push(format!("{prefix}== {why}"));
                *reason = why;
            }
            for (at, line) in self.lines_after(name, last)? {
                lines.push(format!("{prefix}{line}"));
                *last = at;
            }
        }
        if copied == before {
            return Ok(());
        }
        let failed = |source| Error::JobLog { path: path.clone(), source };
        let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed)?;
        fs::write(&seen, serde_json::to_vec(&copied).expect("texts have a JSON form")).map_err(failed)?;
        log::rotate(path, LOG_BYTES_MAX)
    }

    /// Lines written after a time, each with its own. Nothing while the container is on its way.
    fn lines_after(&self, pod: &str, last: &str) -> Result<Vec<(String, String)>> {
        let since = if last.is_empty() { String::new() } else { format!("&sinceTime={}", escaped(last)) };
        let query = format!("/log?container={CONTAINER}&timestamps=true&limitBytes={PIECE_BYTES}{since}");
        let answer = self.api.get(&format!("{}{query}", self.api.pods(pod)))?;
        if answer.status != 200 {
            return Ok(Vec::new());
        }
        let whole = String::from_utf8_lossy(&answer.body);
        let timed = whole.lines().filter_map(|line| line.split_once(' ').or(Some((line, ""))));
        // The server counts in seconds: what is known already comes again.
        let new = timed.filter(|(at, _)| *at > last);
        Ok(new.map(|(at, line)| (at.to_owned(), line.to_owned())).collect())
    }

    fn seen_path(&self, name: &str) -> PathBuf {
        self.log_dir.join(format!("{name}.seen"))
    }

    /// The Job is over and copied.
    pub(super) fn forget_log(&self, process: &ProcessRef) {
        let Some(place) = Place::of(process) else { return };
        match fs::remove_file(self.seen_path(place.name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, "cannot remove how far a log was copied");
            }
            _ => {}
        }
    }
}

/// Why a pod does not run, in Kubernetes' own words: no room for it, no image.
fn waits_for(pod: &Value) -> Option<String> {
    let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let unscheduled = conditions.into_iter().find(|c| c["type"] == "PodScheduled" && c["status"] == "False");
    let (reason, message) = match (text(&waiting["reason"]), unscheduled) {
        ("", Some(condition)) => (text(&condition["reason"]), text(&condition["message"])),
        ("" | "ContainerCreating" | "PodInitializing", _) => return None,
        (reason, _) => (reason, text(&waiting["message"])),
    };
    Some(format!("waits: {reason} {message}").trim_end().to_owned())
}
