//! The control plane as the API sees it.

use api::{Cause, JobView, Jobs, KeyChecker, KeyOwner};
use control::{Control, KeyInfo};

/// Jobs in one answer, the newest first.
const JOBS_SHOWN: usize = 200;

pub(crate) struct ControlKeys(pub(crate) Control);

impl KeyChecker for ControlKeys {
    fn check(&self, key: &str) -> Result<Option<KeyOwner>, Cause> {
        Ok(self.0.check_key(key)?.map(owner))
    }

    fn known(&self, key: &str) -> Option<Option<KeyOwner>> {
        Some(self.0.known_key(key)?.map(owner))
    }
}

fn owner(key: KeyInfo) -> KeyOwner {
    KeyOwner { id: key.id.0.to_string(), name: key.name }
}

pub(crate) struct ControlJobs(pub(crate) Control);

impl Jobs for ControlJobs {
    fn list(&self) -> Result<Vec<JobView>, Cause> {
        let view = |job: control::Job| JobView {
            id: job.id.to_string(),
            object: "job",
            name: job.spec.name,
            state: job.state.as_str().to_owned(),
            restarts: job.n_starts.saturating_sub(1),
            message: job.message,
            created: job.created_at.seconds().unsigned_abs(),
        };
        Ok(self.0.list_jobs(JOBS_SHOWN)?.into_iter().map(view).collect())
    }
}

/// One fixed key, for a replica that runs without a control plane; `None` lets everybody in.
pub(crate) struct OneKey(pub(crate) Option<String>);

impl OneKey {
    fn owner(&self, key: &str) -> Option<KeyOwner> {
        let owner = || KeyOwner { id: "0".to_owned(), name: "only".to_owned() };
        // Digests of equal length are compared, so that the time taken says nothing about the key.
        let digest = |text: &str| crate::sha256_hex(text.as_bytes());
        match &self.0 {
            Some(expected) => (digest(expected) == digest(key)).then(owner),
            None => Some(owner()),
        }
    }
}

impl KeyChecker for OneKey {
    fn check(&self, key: &str) -> Result<Option<KeyOwner>, Cause> {
        Ok(self.owner(key))
    }

    fn known(&self, key: &str) -> Option<Option<KeyOwner>> {
        Some(self.owner(key))
    }

    fn nobody(&self) -> Option<KeyOwner> {
        self.0.is_none().then(|| KeyOwner { id: "0".to_owned(), name: "anybody".to_owned() })
    }
}

/// The cluster's key, followed by a dot and whose request it is: what a gateway sends to its replicas.
pub(crate) struct GatewaysOnly(pub(crate) String);

impl GatewaysOnly {
    fn owner(&self, key: &str) -> Option<KeyOwner> {
        let (key, tenant) = key.split_once('.')?;
        OneKey(Some(self.0.clone())).owner(key)?;
        Some(KeyOwner { id: tenant.to_owned(), name: "gateway".to_owned() })
    }
}

impl KeyChecker for GatewaysOnly {
    fn check(&self, key: &str) -> Result<Option<KeyOwner>, Cause> {
        Ok(self.owner(key))
    }

    fn known(&self, key: &str) -> Option<Option<KeyOwner>> {
        Some(self.owner(key))
    }
}

/// No control plane, no jobs.
pub(crate) struct NoJobs;

impl Jobs for NoJobs {
    fn list(&self) -> Result<Vec<JobView>, Cause> {
        Ok(Vec::new())
    }
}
