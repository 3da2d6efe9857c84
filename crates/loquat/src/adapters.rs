//! The control plane as the API sees it.

use api::{Call, Cause, Cluster, KeyChecker, KeyOwner, LogPiece, Refusal, Role};
use control::{Control, KeyInfo};
use serde_json::{Value, json};

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
    let role = match key.role {
        control::Role::Use => Role::Use,
        control::Role::Member => Role::Member,
        control::Role::Admin => Role::Admin,
    };
    KeyOwner { id: key.id.0.to_string(), name: key.name, role }
}

/// One fixed key, for a replica that runs without a control plane; `None` lets everybody in.
pub(crate) struct OneKey(pub(crate) Option<String>);

impl OneKey {
    fn owner(&self, key: &str) -> Option<KeyOwner> {
        let owner = || KeyOwner { id: "0".to_owned(), name: "only".to_owned(), role: Role::Admin };
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
        self.0.is_none().then(|| KeyOwner {
            id: "0".to_owned(),
            name: "anybody".to_owned(),
            role: Role::Admin,
        })
    }
}

/// The cluster's key, followed by a dot and whose request it is: what a gateway sends to its replicas.
pub(crate) struct GatewaysOnly(pub(crate) String);

impl GatewaysOnly {
    fn owner(&self, key: &str) -> Option<KeyOwner> {
        let (key, tenant) = key.split_once('.')?;
        OneKey(Some(self.0.clone())).owner(key)?;
        Some(KeyOwner { id: tenant.to_owned(), name: "gateway".to_owned(), role: Role::Use })
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

/// No control plane, no cluster.
pub(crate) struct NoCluster;

impl Cluster for NoCluster {
    fn call(&self, call: Call) -> Result<Value, Refusal> {
        match call {
            Call::Jobs | Call::Nodes | Call::Deployments | Call::Promotions | Call::Projects => {
                Ok(json!({"object": "list", "data": []}))
            }
            _ => Err(Refusal::Conflict("this server is one replica, without a control plane".to_owned())),
        }
    }

    fn log(&self, job: &str, _: Option<u64>, _: usize) -> Result<LogPiece, Refusal> {
        Err(Refusal::NotFound { what: "job", name: job.to_owned() })
    }
}
