//! A stand-in for a Kubernetes cluster: an API server that keeps Jobs and pods, checks what clients send, and lets pods live
//! as child processes of the test. No real cluster was to be had; what this one refuses or does is what the documentation
//! of the API says.

mod cases;
mod life;
mod server;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use control::{Control, KubernetesLauncher, KubernetesOptions};
use serde_json::{Value, json};

pub(crate) use cases::more_than_every_launcher_must;

const NAMESPACE: &str = "models";
const TOKEN: &str = "only-for-this-test";

pub(crate) struct Kubernetes {
    state: Arc<Shared>,
    address: String,
    directory: tempfile::TempDir,
}

pub(super) struct Shared {
    objects: Mutex<Objects>,
    stop: AtomicBool,
    /// Requests are answered with 503 while it is set.
    down: AtomicBool,
}

/// What the server keeps.
#[derive(Default)]
pub(super) struct Objects {
    version: u64,
    jobs: BTreeMap<String, Value>,
    pods: BTreeMap<String, life::Pod>,
    /// Every manifest that was accepted, as it was sent.
    accepted: Vec<Value>,
    /// Pods ever started, by Job.
    n_started: BTreeMap<String, usize>,
}

impl Objects {
    /// What every write does to an object.
    fn touch(version: &mut u64, object: &mut Value) {
        *version += 1;
        object["metadata"]["resourceVersion"] = version.to_string().into();
    }
}

impl Kubernetes {
    pub(crate) fn start() -> Kubernetes {
        let state = Arc::new(Shared {
            objects: Mutex::default(),
            stop: AtomicBool::new(false),
            down: AtomicBool::new(false),
        });
        let address = server::start(&state);
        life::start(&state);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("token"), format!("{TOKEN}\n")).unwrap();
        Kubernetes { state, address, directory }
    }

    pub(crate) fn options(&self) -> KubernetesOptions {
        let options = json!({
            "server": self.address, "namespace": NAMESPACE, "image": "registry.example/loquat:1",
            "program": "/bin/sh", "token_file": self.directory.path().join("token"),
        });
        serde_json::from_value(options).unwrap()
    }

    pub(crate) fn launcher(&self, log_dir: &Path, control: &Control) -> KubernetesLauncher {
        KubernetesLauncher::new(self.options(), log_dir, &control.cluster_id().unwrap()).unwrap()
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.state.objects.lock().unwrap()
    }

    /// Holds every manifest that was accepted against Kubernetes' published schemas.
    pub(crate) fn validate(&self) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../var/venv/bin/kubernetes-validate");
        let manifests = self.objects().accepted.clone();
        assert!(!manifests.is_empty());
        if !root.exists() {
            eprintln!("SKIPPED IN PART: {} is missing (./test installs it)", root.display());
            return;
        }
        let write = |(i, manifest): (usize, &Value)| -> PathBuf {
            let path = self.directory.path().join(format!("{i}.yaml"));
            std::fs::write(&path, manifest.to_string()).unwrap();
            path
        };
        let files: Vec<PathBuf> = manifests.iter().enumerate().map(write).collect();
        let told = Command::new(&root).arg("--strict").args(&files).output().unwrap();
        let text =
            String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
        assert!(told.status.success(), "{text}");
        // One that is wrong is found to be: the tool does look.
        let mut wrong = manifests[0].clone();
        wrong["spec"]["completions"] = "three".into();
        let told = Command::new(&root).arg("--strict").arg(write((files.len(), &wrong))).output().unwrap();
        assert!(!told.status.success(), "a wrong manifest passed");
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let mut objects = self.objects();
        objects.pods.values_mut().for_each(life::Pod::kill);
    }
}
