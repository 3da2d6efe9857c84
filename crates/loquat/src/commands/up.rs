//! `loquat up` and `loquat serve`: serving until told to stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use api::{AppState, KeyChecker, Limits, Parts};
use control::{Control, Role};
use store::Bundle;
use telemetry::Metrics;

use crate::adapters::{GatewaysOnly, NoCluster, OneKey};
use crate::args;
use crate::home::Home;
use crate::http::Http;
use crate::runs::StoredRuns;
use crate::service::{RunsOn, Service};
use crate::serving::{self, Share};
use crate::signals::Stop;

pub(crate) fn up(home: &Home, args: &args::Up) -> Result<ExitCode> {
    let stop = Stop::on_signals()?;
    let runs_on = match args.launcher {
        args::LauncherName::Local => RunsOn::ThisMachine(args.offer.clone()),
        args::LauncherName::Slurm => RunsOn::Slurm(args.sbatch.clone()),
        args::LauncherName::Kubernetes => {
            let path = args.kubernetes.as_deref().context("--kubernetes names no file")?;
            RunsOn::Kubernetes(Box::new(crate::pods::options(path)?))
        }
    };
    let service = Service::start(home, (&args.listen, args.tls_ca.as_deref()), &runs_on)?;
    let key = console_key(home, &service.control)?;
    service.refresh_models()?;
    tell(&service.state, &service.url(), Some(&key));
    stop.wait();
    println!("stopping: running answers finish, jobs save and stop");
    service.shut_down()?;
    Ok(ExitCode::SUCCESS)
}

/// One replica without a control plane: what `llama-server` or `vllm serve` would be used for.
pub(crate) fn serve(home: &Home, args: &args::Serve) -> Result<ExitCode> {
    let stop = Stop::on_signals()?;
    let replica = Replica::start(home, args)?;
    tell(&replica.state, &replica.http.url(), args.api_key.as_deref());
    if let Some(name) = &args.replica {
        register(home, name, args, &replica.http)?;
    }
    stop.wait();
    replica.stop()?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the cluster's gateways where this replica is.
fn register(home: &Home, name: &str, args: &args::Serve, http: &Http) -> Result<()> {
    let (control, address) = (home.control()?, http.address);
    let host = match crate::pods::address() {
        Some(pod) => pod,
        None if address.ip().is_unspecified() => crate::machine::host_name(),
        None => address.ip().to_string(),
    };
    control.put_replica(&control::Replica {
        name: name.to_owned(),
        model: served_name(args, 0),
        version: args.models()[0].to_owned(),
        url: format!("{}://{host}:{}", http.scheme, address.port()),
        own: true,
        key: None,
        draining: false,
        seen_at: control.now(),
    })?;
    Ok(())
}

/// Models being served, without a control plane.
pub(crate) struct Replica {
    state: AppState,
    http: Http,
}

impl Replica {
    /// Binds the port, then loads the models; returns when all are served.
    pub(crate) fn start(home: &Home, args: &args::Serve) -> Result<Replica> {
        let keys: Arc<dyn KeyChecker> = match &args.replica {
            Some(_) => Arc::new(GatewaysOnly(home.control()?.replica_key()?)),
            None => Arc::new(OneKey(args.api_key.clone())),
        };
        let state = AppState::new(Parts {
            keys,
            runs: Arc::new(StoredRuns::new(home.store()?)),
            cluster: Arc::new(NoCluster),
            metrics: Metrics::new(),
            limits: Limits { runtime_adapters: args.allow_runtime_lora, ..Limits::default() },
            now_unix_s: crate::now_unix_s,
        });
        let http = Http::start(&state, &args.listen)?;
        let resolve = |model: &str| crate::commands::model::resolve(home, model);
        let share = Share::of(&args.listen, args.guess()?, resolve)?;
        for (i, model) in args.models().into_iter().enumerate() {
            let (id, path) = (served_name(args, i), resolve(model)?);
            serving::load(&id, &path, &share, &state.metrics)?.publish(&state);
        }
        serve_adapters(home, &state, args)?;
        state.lifecycle.set_ready();
        Ok(Replica { state, http })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.http.address
    }

    /// Running answers finish first.
    pub(crate) fn stop(self) -> Result<()> {
        self.http.join()
    }
}

/// What clients call model `i`.
fn served_name(args: &args::Serve, i: usize) -> String {
    match &args.served_model_name {
        Some(name) if i == 0 => name.clone(),
        _ => crate::commands::model::name_of(args.models()[i]),
    }
}

fn serve_adapters(home: &Home, state: &AppState, args: &args::Serve) -> Result<()> {
    if args.lora_modules.is_empty() {
        return Ok(());
    }
    let base = state.models.get(&served_name(args, 0)).context("there is no model to adapt")?;
    for module in &args.lora_modules {
        let (name, dir) =
            module.split_once('=').with_context(|| format!("--lora-modules {module}: not NAME=DIRECTORY"))?;
        let adapted = base.adapted(name, crate::now_unix_s(), &adapter_dir(home, dir)?);
        let adapted = adapted.map_err(|why| anyhow!("cannot load the adapter {dir}: {why}"))?;
        ensure!(state.models.insert_new(adapted), "--lora-modules {module}: the name is taken");
    }
    Ok(())
}

/// Where an adapter lies: a directory, or one that a run published, which is brought here.
fn adapter_dir(home: &Home, dir: &str) -> Result<PathBuf> {
    let prefix = format!("adapters/{dir}");
    if Path::new(dir).exists() || store::ObjectName::parse(&prefix).is_err() {
        return Ok(PathBuf::from(dir));
    }
    let Some(bundle) = Bundle::open(&home.store()?, &prefix)? else { return Ok(PathBuf::from(dir)) };
    let local = home.path().join(&prefix);
    bundle.download_to(&local)?;
    Ok(local)
}

/// Where it is, with which key, and a line to try: what a new user needs, each on a line of its own.
pub(crate) fn tell(state: &AppState, url: &str, key: Option<&str>) {
    let names: Vec<String> = state.models.list().iter().map(|m| m.id.clone()).collect();
    let chat = state.models.list().into_iter().min_by_key(|m| m.is_base);
    let fragment = key.map_or(String::new(), |k| format!("#key={k}"));
    println!("\nserving   {}", if names.is_empty() { "no model yet".to_owned() } else { names.join(", ") });
    println!("console   {url}/{fragment}");
    if let Some(key) = key {
        println!("API key   {key}");
    }
    if let Some(model) = chat {
        let header = key.map_or(String::new(), |k| format!(" -H 'Authorization: Bearer {k}'"));
        println!(
            "try       curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' \
             -d '{{\"model\":\"{}\",\"messages\":[{{\"role\":\"user\",\"content\":\"What is the capital of France?\"}}]}}'",
            model.id
        );
    }
    println!("stop      Ctrl-C\n");
}

/// The key that this machine's user opens the console with. Kept readable for them alone, because a printed address
/// must work again tomorrow; the database has only its hash.
pub(crate) fn console_key(home: &Home, control: &Control) -> Result<String> {
    let path = home.path().join("console-key");
    if let Ok(key) = std::fs::read_to_string(&path) {
        let key = key.trim().to_owned();
        if control.check_key(&key)?.is_some() {
            return Ok(key);
        }
    }
    let key = control.create_key("console", Role::Admin)?.expose().to_owned();
    write_private(&path, &key).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(key)
}

fn write_private(path: &std::path::Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let whole = path.with_extension("new");
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&whole)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(whole, path)
}
