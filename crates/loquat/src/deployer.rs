//! Models that replicas serve: tells this process's gateway where they are, judges canaries by what it saw, and, while it
//! holds the lease, starts, drains and stops replicas so that there are as many of each version as wanted, and carries
//! promotions on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use api::{Replicas, RouteStatus, Target, TargetKey};
use control::{Control, Deployment, Job, JobSpec, JobState, Lease, Replica, Running, Step, UnixMs};
use gateway::{CanaryPolicy, Endpoint, Load, ScalePolicy, Verdict};
use store::Store;

use crate::promoter::Promoter;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(250);
const LEASE: &str = "deployer";
const LEASE_TTL: Duration = Duration::from_secs(5);
/// Share of the newest look in the mean load: the last two seconds or so count.
const LOAD_SHARE: f64 = 0.1;

pub(crate) struct Deployer {
    control: Control,
    replicas: Replicas,
    promoter: Promoter,
    /// The arguments that make a replica use this home.
    home_args: Vec<String>,
    replica_key: String,
    /// What tells this process from others.
    holder: String,
    lease: Option<Lease>,
    /// When the lease was last extended.
    extended_at: UnixMs,
    /// Mean load by model.
    loads: BTreeMap<String, f64>,
}

impl Deployer {
    pub(crate) fn new(
        control: &Control,
        store: Arc<dyn Store>,
        replicas: &Replicas,
        home_args: Vec<String>,
    ) -> Result<Deployer> {
        Ok(Deployer {
            control: control.clone(),
            replicas: replicas.clone(),
            promoter: Promoter::new(control, store, home_args.clone()),
            home_args,
            replica_key: control.replica_key()?,
            holder: format!("pid {}", std::process::id()),
            lease: None,
            extended_at: UnixMs(0),
            loads: BTreeMap::new(),
        })
    }

    /// Runs until `stop` is set.
    pub(crate) fn spawn(mut self, stop: Arc<AtomicBool>) -> Result<JoinHandle<()>> {
        let run = move || {
            while !stop.load(Ordering::Relaxed) {
                if let Err(error) = self.turn() {
                    // Requests go on to the replicas that are known.
                    tracing::warn!("replicas cannot be looked after: {error:#}");
                }
                std::thread::park_timeout(EVERY);
            }
            if let Some(lease) = self.lease.take()
                && let Err(error) = self.control.release(&lease)
            {
                tracing::warn!(%error, "cannot release the deployer's lease");
            }
        };
        std::thread::Builder::new().name("deployer".into()).spawn(run).context("no thread for the deployer")
    }

    fn turn(&mut self) -> Result<()> {
        // Here, because this thread looks at the database often enough anyway.
        self.control.freshen_keys()?;
        let deployments = self.control.list_deployments()?;
        let replicas = self.control.list_replicas()?;
        self.tell_gateway(&deployments, &replicas);
        for deployment in &deployments {
            self.judge(deployment)?;
        }
        let mut jobs = self.control.unfinished_jobs()?;
        jobs.retain(|job| model_of(&job.spec).is_some());
        let promotions = self.control.survey_promotions()?;
        if deployments.is_empty() && replicas.is_empty() && jobs.is_empty() && promotions.is_empty() {
            return Ok(());
        }
        let Some(lease) = self.hold_lease()? else { return Ok(()) };
        self.promoter.turn(&lease, promotions)?;
        let is_gone = |replica: &Replica| replica.own && jobs.iter().all(|job| job.spec.name != replica.name);
        if replicas.iter().any(is_gone) {
            self.control.forget_replicas(&lease)?;
        }
        for deployment in &deployments {
            self.scale(&lease, deployment)?;
        }
        let deployed = deployments.iter().map(|d| d.model.as_str());
        let running = jobs.iter().filter_map(|job| model_of(&job.spec));
        let models: BTreeSet<&str> = deployed.chain(running).collect();
        for model in models {
            let wanted = deployments.iter().find(|d| d.model == model);
            self.roll_out(&lease, model, wanted, (&jobs, &replicas))?;
        }
        Ok(())
    }

    fn tell_gateway(&self, deployments: &[Deployment], replicas: &[Replica]) {
        for model in self.replicas.models() {
            if deployments.iter().all(|deployment| deployment.model != model) {
                self.replicas.remove(&model);
            }
        }
        for deployment in deployments {
            let own = replicas.iter().filter(|replica| replica.model == deployment.model);
            let targets = own.map(|replica| self.target(replica)).collect();
            let canary = deployment.canary.as_ref().map(|c| (c.source.clone(), f64::from(c.percent) / 100.0));
            let created = deployment.created_at.seconds().unsigned_abs();
            self.replicas.set(&deployment.model, created, targets, canary);
        }
    }

    fn target(&self, replica: &Replica) -> Target {
        let key = match (&replica.key, replica.own) {
            (_, true) => TargetKey::Cluster(self.replica_key.clone()),
            (Some(key), false) => TargetKey::Theirs(key.clone()),
            (None, false) => TargetKey::Nobody,
        };
        let endpoint = Endpoint {
            name: replica.name.clone(),
            version: replica.version.clone(),
            draining: replica.draining,
        };
        Target { endpoint, url: replica.url.clone(), key }
    }

    /// Any gateway may end a trial by what it saw: the first to see enough does.
    fn judge(&self, deployment: &Deployment) -> Result<()> {
        let Some(canary) = &deployment.canary else { return Ok(()) };
        let window = |version: &str| self.replicas.window(&deployment.model, version);
        let (trial, live) = (window(&canary.source), window(&deployment.live));
        let (promote, message) = match gateway::judge(&trial, &live, &CanaryPolicy::default()) {
            Verdict::Wait => return Ok(()),
            Verdict::Promote => {
                (true, format!("{} is live: it did as well as the one before", canary.source))
            }
            Verdict::RollBack(why) => (false, format!("{} was rolled back: {why}", canary.source)),
        };
        if self.control.end_canary(&deployment.model, &canary.source, promote, &message)? {
            tracing::info!(model = deployment.model, message, "a trial ended");
        }
        Ok(())
    }

    fn scale(&mut self, lease: &Lease, deployment: &Deployment) -> Result<()> {
        if deployment.n_min == deployment.n_max {
            return Ok(());
        }
        let model = &deployment.model;
        let Some(status) = self.replicas.status(model) else { return Ok(()) };
        let mean = self.loads.entry(model.clone()).or_default();
        let now = status.in_flight as f64;
        // Who waits for the first replica waits no longer than one look.
        *mean = if deployment.n_replicas == 0 { now } else { *mean + LOAD_SHARE * (now - *mean) };
        let load = Load {
            in_flight: if now == 0.0 && *mean < 0.01 { 0.0 } else { *mean },
            idle_ms: if now > 0.0 { 0 } else { status.idle_ms },
            since_change_ms: self.control.now().since(deployment.changed_at).as_millis() as u64,
            cache_used: 0.0,
        };
        let policy = scale_policy(deployment);
        let to = gateway::scale(deployment.n_replicas as usize, &load, &policy) as u32;
        if to != deployment.n_replicas {
            let why =
                format!("{} to {to} replicas: {:.1} requests at once", deployment.n_replicas, load.in_flight);
            self.control.record_scale(lease, model, deployment.n_replicas, to, &why)?;
        }
        Ok(())
    }

    fn roll_out(
        &self,
        lease: &Lease,
        model: &str,
        wanted: Option<&Deployment>,
        (jobs, replicas): (&[Job], &[Replica]),
    ) -> Result<()> {
        let status = self.replicas.status(model);
        let ours = |job: &&Job| model_of(&job.spec) == Some(model);
        let jobs: Vec<&Job> = jobs.iter().filter(ours).collect();
        let running: Vec<Running> = jobs.iter().map(|job| running(job, replicas, status.as_ref())).collect();
        for step in control::rollout(wanted, &running) {
            tracing::info!(model, ?step, "replicas");
            match step {
                Step::Start { version } => {
                    if let Some(wanted) = wanted {
                        self.control.start_replica(lease, &self.spec(wanted, &version)?)?;
                    }
                }
                Step::Drain { name } => {
                    self.control.drain_replica(lease, &name)?;
                    // One that never said where it is has nothing to drain.
                    let is_known = replicas.iter().any(|replica| replica.name == name);
                    if let Some(job) = jobs.iter().find(|job| !is_known && job.spec.name == name) {
                        self.control.stop_replica(lease, job.id)?;
                    }
                }
                Step::Stop { name } => {
                    if let Some(job) = jobs.iter().find(|job| job.spec.name == name) {
                        self.control.stop_replica(lease, job.id)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A replica as a command line; a person could type it.
    fn spec(&self, deployment: &Deployment, version: &str) -> Result<JobSpec> {
        let name = format!("{REPLICA}{}/{}", deployment.model, crate::random_hex(4)?);
        let mut args = self.home_args.clone();
        args.extend(
            ["serve", version, "--served-model-name", &deployment.model, "--port", "0", "--replica", &name]
                .map(str::to_owned),
        );
        args.extend(deployment.args.iter().cloned());
        Ok(JobSpec { name, args, max_restarts: u32::MAX, needs: deployment.needs, ..JobSpec::default() })
    }

    fn hold_lease(&mut self) -> Result<Option<Lease>> {
        let now = self.control.now();
        match &self.lease {
            Some(_) if now >= self.extended_at && now.since(self.extended_at) < LEASE_TTL / 3 => {}
            Some(lease) => match self.control.renew(lease, LEASE_TTL) {
                Ok(()) => self.extended_at = now,
                Err(control::Error::StaleLease { .. }) => self.lease = None,
                Err(error) => return Err(error.into()),
            },
            None => {
                self.lease = self.control.acquire(LEASE, &self.holder, LEASE_TTL)?;
                self.extended_at = now;
            }
        }
        Ok(self.lease.clone())
    }
}

/// Begins the names of the jobs that are replicas.
const REPLICA: &str = "replica/";

/// The model that a job serves, if it is a replica.
fn model_of(spec: &JobSpec) -> Option<&str> {
    Some(spec.name.strip_prefix(REPLICA)?.rsplit_once('/')?.0)
}

/// The version that a replica's job serves.
fn version_of(spec: &JobSpec) -> String {
    let at = spec.args.iter().position(|arg| arg == "serve");
    at.and_then(|at| spec.args.get(at + 1)).cloned().unwrap_or_default()
}

fn running(job: &Job, replicas: &[Replica], status: Option<&RouteStatus>) -> Running {
    let name = &job.spec.name;
    let seen = status.and_then(|status| status.replicas.iter().find(|seen| seen.name == *name));
    let is_cancelled = job.desired == control::Desired::Cancelled;
    let row = replicas.iter().find(|replica| replica.name == *name);
    Running {
        name: name.clone(),
        version: version_of(&job.spec),
        well: job.state == JobState::Running && seen.is_some_and(|seen| seen.well && !seen.resting),
        draining: is_cancelled || row.is_some_and(|row| row.draining),
        in_flight: seen.map_or(0, |seen| seen.in_flight),
    }
}

fn scale_policy(deployment: &Deployment) -> ScalePolicy {
    let mut policy = ScalePolicy {
        n_min: deployment.n_min as usize,
        n_max: deployment.n_max as usize,
        ..ScalePolicy::default()
    };
    // Asked for on the replica's own command line, so that both ends know the same number.
    let sets = |flag: &str| {
        let at = deployment.args.iter().position(|arg| arg == flag)?;
        deployment.args.get(at + 1)?.parse::<f64>().ok()
    };
    if let Some(n) = sets("--max-num-seqs").or(sets("--parallel")) {
        policy.per_replica = n.max(1.0);
    }
    if let Some(seconds) = std::env::var("LOQUAT_IDLE_SECONDS").ok().and_then(|s| s.parse::<u64>().ok()) {
        policy.idle_ms = seconds * 1_000;
        policy.calm_ms = policy.calm_ms.min(policy.idle_ms);
    }
    policy
}
