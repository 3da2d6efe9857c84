//! One machine's Loquat while it runs: API and console, control plane with its jobs, and the models that are served.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use api::{AppState, Limits, Parts};
use control::{
    Control, KubernetesLauncher, KubernetesOptions, Launcher, LocalLauncher, ModelKind, NodeLoad, NodeSpec,
    Reconciler, ReconcilerOptions, Shutdown, SlurmLauncher, SlurmOptions,
};
use store::{Bundle, Store};
use telemetry::Metrics;

use crate::adapters::ControlKeys;
use crate::args::{Listen, Offer};
use crate::cluster::ControlCluster;
use crate::deployer::Deployer;
use crate::home::Home;
use crate::http::Http;
use crate::runs::StoredRuns;
use crate::serving::{self, Share};

/// How often the models that are served are compared with those that should be.
const MODELS_EVERY: Duration = Duration::from_secs(1);
/// Promotions whose versions are told from other models of the store.
const PROMOTIONS_KNOWN: usize = 10_000;

pub(crate) struct Service {
    pub(crate) control: Control,
    pub(crate) state: AppState,
    http: Http,
    reconciler: Reconciler,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    keeper: Arc<ModelKeeper>,
}

impl Service {
    /// Opens the state, binds the port and starts everything; models are loaded as [`ModelKeeper`] finds them.
    pub(crate) fn start(
        home: &Home,
        (listen, tls_ca): (&Listen, Option<&Path>),
        runs_on: &RunsOn,
    ) -> Result<Service> {
        let control = home.control()?;
        let store = home.store()?;
        home.check_cluster(&control, store.as_ref())?;
        let state = AppState::new(Parts {
            keys: Arc::new(ControlKeys(control.clone())),
            runs: Arc::new(StoredRuns::new(store.clone())),
            cluster: Arc::new(ControlCluster { control: control.clone(), home: home.clone() }),
            metrics: Metrics::new(),
            limits: Limits::default(),
            now_unix_s: crate::now_unix_s,
        });
        tls_ca.map(|ca| state.replicas.trust(ca)).transpose()?;
        let http = Http::start(&state, listen)?;
        let (launcher, node) = launcher(home, &control, (runs_on, listen))?;
        if let Some(node) = &node {
            // A name that another machine uses is found out now, and not from a log.
            control.put_node(node, &NodeLoad::default())?;
        }
        let disk = node.as_ref().map(|_| home.path().to_owned());
        let options = ReconcilerOptions { node, disk, ..ReconcilerOptions::default() };
        let reconciler = Reconciler::start(&control, launcher, state.metrics.job(), options)?;
        let stop = Arc::new(AtomicBool::new(false));
        let keeper = Arc::new(ModelKeeper {
            control: control.clone(),
            store: store.clone(),
            state: state.clone(),
            models_dir: home.models(),
            // Nothing to resolve: there is no draft model.
            share: Share::of(listen, listen.guess(), |path| Ok(path.into()))?,
            served: Mutex::default(),
        });
        let models = spawn_keeper(keeper.clone(), stop.clone())?;
        let deployer =
            Deployer::new(&control, store.clone(), &state.replicas, home.as_args())?.spawn(stop.clone())?;
        let threads = vec![models, deployer];
        Ok(Service { control, state, http, reconciler, threads, stop, keeper })
    }

    pub(crate) fn url(&self) -> String {
        self.http.url()
    }

    /// Loads what should be served and is not yet, now.
    pub(crate) fn refresh_models(&self) -> Result<()> {
        self.keeper.refresh()
    }

    /// Ends in order: no new requests, running ones finish, jobs save and stop, then the rest.
    pub(crate) fn shut_down(self) -> Result<()> {
        self.http.close();
        self.stop.store(true, Ordering::Relaxed);
        self.reconciler.stop(Shutdown::Interrupt);
        let served = self.http.join();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the control plane had panicked");
            }
        }
        served
    }
}

/// What runs this machine's jobs.
pub(crate) enum RunsOn {
    ThisMachine(Offer),
    /// With more arguments of sbatch.
    Slurm(Vec<String>),
    Kubernetes(Box<KubernetesOptions>),
}

type AnyLauncher = Box<dyn Launcher + Send>;

/// The launcher, and this machine's name where its processes are its own to look after: a batch system's jobs are anybody's.
fn launcher(
    home: &Home,
    control: &Control,
    (runs_on, listen): (&RunsOn, &Listen),
) -> Result<(AnyLauncher, Option<NodeSpec>)> {
    let (program, logs) = (std::env::current_exe()?, home.job_logs());
    match runs_on {
        RunsOn::ThisMachine(offer) => {
            let node = home.node(offer);
            // Each machine has a certificate of its own, which its replicas show as well.
            let tls = listen.tls_env().into_iter().map(|(name, file)| (name, file.display().to_string()));
            let env = home.as_env().into_iter().chain(tls);
            let launcher = LocalLauncher::new(&program, &logs)?.with_env(env).on_node(&node.name);
            let launcher = launcher.within(&offer.cgroup)?;
            Ok((Box::new(launcher), Some(node)))
        }
        RunsOn::Slurm(sbatch) => {
            let options = SlurmOptions { conf: None, sbatch: sbatch.clone() };
            // Slurm's jobs have no environment of their own. Programs are where they are here.
            let path = std::env::var("PATH").ok().map(|path| ("PATH", path));
            let launcher =
                SlurmLauncher::new(&program, &logs, options)?.with_env(home.as_env()).with_env(path);
            Ok((Box::new(launcher), None))
        }
        // What must not stand in a manifest comes from a Secret there.
        RunsOn::Kubernetes(options) => {
            let options = options.as_ref().clone();
            Ok((Box::new(KubernetesLauncher::new(options, &logs, &control.cluster_id()?)?), None))
        }
    }
}

fn spawn_keeper(keeper: Arc<ModelKeeper>, stop: Arc<AtomicBool>) -> Result<JoinHandle<()>> {
    let keep = move || {
        while !stop.load(Ordering::Relaxed) {
            if let Err(error) = keeper.refresh() {
                tracing::error!("{error:#}");
            }
            std::thread::park_timeout(MODELS_EVERY);
        }
    };
    std::thread::Builder::new().name("models".into()).spawn(keep).context("no thread for the models")
}

/// Makes the served models equal to those the control plane wants: rows of its table, which published bundles join
/// by themselves.
struct ModelKeeper {
    control: Control,
    store: Arc<dyn Store>,
    state: AppState,
    models_dir: PathBuf,
    share: Share,
    /// What each served model was loaded from; one that failed stays here with its version, so that it is tried again
    /// only when it changes.
    served: Mutex<BTreeMap<String, String>>,
}

impl ModelKeeper {
    fn refresh(&self) -> Result<()> {
        // One refresh at a time: loading the same model twice would waste its memory.
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        self.adopt_published()?;
        let mut wanted = self.control.list_models()?;
        // Replicas serve these, here or elsewhere.
        let deployed = self.control.list_deployments()?;
        wanted.retain(|model| deployed.iter().all(|deployment| deployment.model != model.name));
        let gone: Vec<String> =
            served.keys().filter(|name| wanted.iter().all(|m| m.name != **name)).cloned().collect();
        for name in gone {
            served.remove(&name);
            self.state.models.remove(&name);
            self.state.embedders.remove(&name);
            tracing::info!(model = name, "no longer served");
        }
        for model in wanted {
            let version = self.version(&model.source)?;
            if served.get(&model.name) == Some(&version) {
                continue;
            }
            served.insert(model.name.clone(), version);
            let loaded = self
                .local_path(&model.name, &model.source)
                .and_then(|path| serving::load(&model.name, &path, &self.share, &self.state.metrics));
            match loaded {
                Ok(ready) => {
                    ready.publish(&self.state);
                    tracing::info!(model = model.name, source = model.source, "serving");
                }
                Err(error) => tracing::error!(model = model.name, "not served: {error:#}"),
            }
        }
        self.state.lifecycle.set_ready();
        Ok(())
    }

    /// Every model bundle of the store becomes a row, but for versions that are promoted: replicas serve those.
    fn adopt_published(&self) -> Result<()> {
        let promotions = self.control.list_promotions(PROMOTIONS_KNOWN)?;
        for object in self.store.list("models")? {
            let Some(name) = object.name.as_str().strip_prefix("models/") else { continue };
            let Some(name) = name.strip_suffix("/manifest.json") else { continue };
            if promotions.iter().any(|promotion| promotion.candidate == name) {
                continue;
            }
            if self.control.get_model(name)?.is_none() {
                self.control.put_model(name, ModelKind::Base, &format!("{BUNDLE}models/{name}"))?;
            }
        }
        Ok(())
    }

    /// What tells one state of a source from another.
    fn version(&self, source: &str) -> Result<String> {
        let Some(prefix) = source.strip_prefix(BUNDLE) else {
            return Ok(source.to_owned());
        };
        let manifest = store::ObjectName::parse(&format!("{prefix}/manifest.json"))?;
        match self.store.head(&manifest)? {
            Some(_) => Ok(crate::sha256_hex(&self.store.get(&manifest)?)),
            None => Ok("gone".to_owned()),
        }
    }

    /// Where the model's files lie on this machine; a bundle is brought here first.
    fn local_path(&self, name: &str, source: &str) -> Result<PathBuf> {
        let Some(prefix) = source.strip_prefix(BUNDLE) else {
            return Ok(PathBuf::from(source));
        };
        let bundle = Bundle::open(&self.store, prefix)?;
        let bundle = bundle.with_context(|| format!("there is no model at {prefix} in the store"))?;
        crate::commands::model::bring(&bundle, &self.models_dir.join(name))
    }
}

/// Begins a model's source that is a bundle of the store; others are paths.
pub(crate) const BUNDLE: &str = "bundle:";
