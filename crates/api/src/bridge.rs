//! The control plane behind the narrow views the handlers have of it.

use control::Control;

use crate::state::{Cause, JobView, Jobs, KeyChecker, KeyOwner};

/// Jobs one answer lists, newest first.
const JOBS_MAX: usize = 200;

impl KeyChecker for Control {
    fn check(&self, key: &str) -> Result<Option<KeyOwner>, Cause> {
        let info = self.check_key(key)?;
        Ok(info.map(|info| KeyOwner { id: format!("key-{}", info.id.0), name: info.name }))
    }
}

impl Jobs for Control {
    fn list(&self) -> Result<Vec<JobView>, Cause> {
        Ok(self.list_jobs(JOBS_MAX)?.into_iter().map(view).collect())
    }
}

fn view(job: control::Job) -> JobView {
    JobView {
        id: job.id.to_string(),
        object: "job",
        name: job.spec.name,
        state: job.state.as_str().to_owned(),
        restarts: job.n_starts.saturating_sub(1),
        message: job.message,
        created: u64::try_from(job.created_at.seconds()).unwrap_or_default(),
    }
}
