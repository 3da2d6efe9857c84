//! The doer: holds the lease, observes, has [`reconcile`] decide, and obeys.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use telemetry::{JobMetrics, Utilisation, chain};

use crate::clock::UnixMs;
use crate::database::{Control, random_hex};
use crate::error::{Error, Result};
use crate::job::{Desired, Ending, Job, JobId};
use crate::jobs::{Start, Survey};
use crate::launcher::{Launcher, StopHow};
use crate::leases::Lease;
use crate::meter::Meter;
use crate::nodes::{self, NodeLoad, NodeMode, NodeSpec};
use crate::place::Share;
use crate::process::ProcessRef;
use crate::reconcile::{Action, Policy, ended, reconcile};

/// How often a machine says that it is there, and hears what it may do.
const NODE_EVERY: Duration = Duration::from_secs(1);

/// How often it measures itself. Reading every process of a large machine takes a while.
const LOAD_EVERY: Duration = Duration::from_secs(5);

/// The variables that tell a job what it was given: the cores of its first node, and the machines of its ranks where they
/// are several.
const CORES_VARIABLE: &str = "LOQUAT_CORES";
const HOSTS_VARIABLE: &str = "LOQUAT_HOSTS";

/// The lease that the controllers of a node compete for, or all where there are no nodes.
pub(crate) fn lease_name(node: Option<&str>) -> String {
    match node {
        Some(node) => format!("reconciler@{node}"),
        None => "reconciler".to_owned(),
    }
}

#[derive(Clone, Debug)]
pub struct ReconcilerOptions {
    pub policy: Policy,
    /// How long a dead controller keeps others waiting.
    pub lease_ttl: Duration,
    /// The longest pause between two looks at the processes; changes made in this process are seen at once.
    pub tick: Duration,
    /// This machine, where several share the database: each looks after the processes that run on it.
    pub node: Option<NodeSpec>,
    /// Where the jobs of this machine write. With it the machine is measured: what is free there, too.
    pub disk: Option<PathBuf>,
}

impl Default for ReconcilerOptions {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            lease_ttl: Duration::from_secs(5),
            tick: Duration::from_millis(250),
            node: None,
            disk: None,
        }
    }
}

/// What becomes of running jobs when the reconciler stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// They go on; the next controller adopts them.
    Leave,
    /// They are asked to save and exit, and go on when the next controller starts.
    Interrupt,
}

/// How long stopping may take beyond the jobs' grace, before the reconciler goes and leaves them running.
const STOP_MARGIN: Duration = Duration::from_secs(10);

const RUN: u8 = 0;
const LEAVE: u8 = 1;
const INTERRUPT: u8 = 2;

/// A thread that keeps jobs as they are wanted, while it holds the lease. Dropping it leaves running jobs alone.
#[derive(Debug)]
pub struct Reconciler {
    control: Control,
    order: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Reconciler {
    pub fn start(
        control: &Control,
        launcher: Box<dyn Launcher + Send>,
        metrics: JobMetrics,
        options: ReconcilerOptions,
    ) -> Result<Self> {
        let order = Arc::new(AtomicU8::new(RUN));
        let mut worker = Worker {
            control: control.clone(),
            launcher,
            metrics,
            holder: format!("pid {} {}", std::process::id(), random_hex::<4>()?),
            meter: options.disk.clone().map(Meter::new),
            load: None,
            running: Vec::new(),
            options,
            order: Arc::clone(&order),
            node_seen: None,
            lease: None,
        };
        let thread = std::thread::Builder::new()
            .name("reconciler".to_owned())
            .spawn(move || worker.run())
            .map_err(Error::StartThread)?;
        Ok(Self { control: control.clone(), order, thread: Some(thread) })
    }

    /// Stops the thread and waits for it. With [`Shutdown::Interrupt`] that takes until the jobs have saved, at most
    /// [`Policy::stop_grace`] and a little.
    pub fn stop(mut self, how: Shutdown) {
        self.finish(match how {
            Shutdown::Leave => LEAVE,
            Shutdown::Interrupt => INTERRUPT,
        });
    }

    fn finish(&mut self, order: u8) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.order.store(order, Ordering::SeqCst);
        self.control.notify_jobs_changed();
        if thread.join().is_err() {
            tracing::error!("the reconciler's thread panicked");
        }
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        self.finish(LEAVE);
    }
}

struct Worker {
    control: Control,
    launcher: Box<dyn Launcher + Send>,
    metrics: JobMetrics,
    holder: String,
    options: ReconcilerOptions,
    order: Arc<AtomicU8>,
    meter: Option<Meter>,
    /// What the machine measured last, and when.
    load: Option<(UnixMs, NodeLoad)>,
    /// Jobs that ran at the last turn, with the marks of their processes.
    running: Vec<(JobId, String)>,
    /// When this machine last said that it is there, and what it may do.
    node_seen: Option<(UnixMs, NodeMode)>,
    /// The lease, and when it was last extended.
    lease: Option<(Lease, UnixMs)>,
}

impl Worker {
    fn run(&mut self) {
        let mut seen = 0;
        let mut deadline = None;
        loop {
            let order = self.order.load(Ordering::SeqCst);
            self.options.policy.draining = order == INTERRUPT;
            let n_running = if order == LEAVE { 0 } else { self.turn() };
            if order != RUN {
                let now = monotonic_now();
                let deadline = *deadline.get_or_insert(now + self.options.policy.stop_grace + STOP_MARGIN);
                if n_running == 0 {
                    break;
                }
                if now > deadline {
                    tracing::error!(n_running, "jobs could not be stopped in time and are left running");
                    break;
                }
            }
            seen = self.control.wait_jobs_changed(seen, self.options.tick);
        }
        self.give_up_lease();
    }

    fn give_up_lease(&mut self) {
        if let Some((lease, _)) = self.lease.take()
            && let Err(error) = self.control.release(&lease)
        {
            warn("cannot release the lease", &error);
        }
        self.metrics.set_lease_held(false);
    }

    /// One look at everything; returns how many jobs run under this controller. What fails is logged and tried again at
    /// the next turn.
    fn turn(&mut self) -> usize {
        self.launcher.tick();
        let started = monotonic_now();
        let outcome = self.hold_lease().and_then(|lease| match lease {
            Some(lease) => {
                let policy = self.policy()?;
                let node = self.options.node.as_ref().map(|node| node.name.as_str());
                let launcher = self.launcher.as_mut();
                self.running = pass(&self.control, launcher, &lease, (&policy, node), &self.metrics)?;
                Ok(self.running.len())
            }
            None => Ok(0),
        });
        self.metrics.reconciled(started.elapsed(), outcome.is_ok());
        self.metrics.set_lease_held(self.lease.is_some());
        match outcome {
            Ok(n_running) => n_running,
            Err(Error::StaleLease { .. }) => {
                tracing::warn!("another controller has taken over the jobs");
                self.lease = None;
                0
            }
            Err(error @ Error::NodeTaken { .. }) => {
                warn("jobs are not started here", &error);
                self.give_up_lease();
                0
            }
            Err(error) => {
                warn("cannot reconcile jobs", &error);
                usize::from(self.lease.is_some())
            }
        }
    }

    /// The policy, under what this machine may do at present.
    fn policy(&mut self) -> Result<Policy> {
        let mut policy = self.options.policy.clone();
        let Some(node) = &self.options.node else { return Ok(policy) };
        let now = self.control.now();
        let mode = match self.node_seen {
            Some((at, mode)) if now >= at && now.since(at) < NODE_EVERY => mode,
            _ => {
                let load = measured(&mut self.meter, &mut self.load, &self.running, now);
                self.metrics.set_node(&node.name, &utilisation(node, &load));
                let mode = self.control.put_node(node, &load)?;
                self.node_seen = Some((now, mode));
                mode
            }
        };
        policy.cordoned = mode != NodeMode::Open;
        policy.draining |= mode == NodeMode::Draining;
        Ok(policy)
    }

    /// The lease, taken or extended as needed; `None` while another controller holds it.
    fn hold_lease(&mut self) -> Result<Option<Lease>> {
        let ttl = self.options.lease_ttl;
        let now = self.control.now();
        match &mut self.lease {
            Some((lease, extended_at)) => {
                if now < *extended_at || now.since(*extended_at) >= ttl / 3 {
                    self.control.renew(lease, ttl)?;
                    *extended_at = now;
                }
            }
            None => {
                let name = lease_name(self.options.node.as_ref().map(|node| node.name.as_str()));
                let lease = self.control.acquire(&name, &self.holder, ttl)?;
                self.lease = lease.map(|lease| (lease, now));
            }
        }
        Ok(self.lease.as_ref().map(|(lease, _)| lease.clone()))
    }
}

/// What the machine uses, measured now or not long ago. A machine that cannot be measured goes on without.
fn measured(
    meter: &mut Option<Meter>,
    last: &mut Option<(UnixMs, NodeLoad)>,
    running: &[(JobId, String)],
    now: UnixMs,
) -> NodeLoad {
    match last {
        Some((at, load)) if now >= *at && now.since(*at) < LOAD_EVERY => load.clone(),
        _ => {
            let look = meter.as_mut().map_or(Ok(NodeLoad::default()), |meter| meter.look(running));
            let load = look.unwrap_or_else(|error| {
                tracing::warn!(%error, "this machine cannot be measured");
                NodeLoad::default()
            });
            *last = Some((now, load.clone()));
            load
        }
    }
}

fn utilisation(node: &NodeSpec, load: &NodeLoad) -> Utilisation {
    Utilisation {
        cores: node.cores.into(),
        cores_used: load.cores,
        job_cores_used: load.jobs.iter().map(|job| job.cores).sum(),
        memory_bytes: node.memory_bytes as f64,
        memory_bytes_used: load.memory_bytes as f64,
        job_memory_bytes_used: load.jobs.iter().map(|job| job.memory_bytes as f64).sum(),
        disk_free_bytes: load.disk_free_bytes as f64,
    }
}

/// Observes every unfinished job, decides, and does what was decided, under `lease`. Returns the jobs that had a process
/// here at its start, with the process's mark. Errors: [`Error::StaleLease`] when another controller took over, or the database's; what could not be done
/// is found to be missing at the next pass.
fn pass(
    control: &Control,
    launcher: &mut dyn Launcher,
    lease: &Lease,
    (policy, node): (&Policy, Option<&str>),
    metrics: &JobMetrics,
) -> Result<Vec<(JobId, String)>> {
    let survey = control.survey_jobs()?;
    let mut placement = survey.placement(node, policy);
    metrics.set_waiting(placement.waits.len());
    placement.starts.retain(|_, shares| shares[0].node == node.unwrap_or_default());
    let Survey { unfinished: mut jobs, counts, .. } = survey;
    jobs.retain(|job| nodes::is_of(job, node));
    let mut observed = BTreeMap::new();
    let running: Vec<&Job> = jobs.iter().filter(|job| job.process.is_some()).collect();
    for job in &running {
        match launcher.poll(job) {
            Ok(seen) => drop(observed.insert(job.id, seen)),
            Err(error) => warn("cannot observe a job", &error),
        }
    }
    let mut doer = Doer {
        control,
        launcher,
        lease,
        policy,
        metrics,
        node,
        starts: &placement.starts,
        jobs: jobs.iter().map(|job| (job.id, job)).collect(),
    };
    for (state, n_jobs) in counts {
        metrics.set_jobs(state.as_str(), n_jobs);
    }
    for action in reconcile(&jobs, &observed, &placement, control.now(), policy) {
        doer.act(action)?;
    }
    let marked = running.iter().filter_map(|job| Some((job.id, job.process.as_ref()?.mark.clone())));
    Ok(marked.collect())
}

struct Doer<'a> {
    control: &'a Control,
    launcher: &'a mut dyn Launcher,
    lease: &'a Lease,
    policy: &'a Policy,
    metrics: &'a JobMetrics,
    node: Option<&'a str>,
    /// Where each job that is to be started here gets its room.
    starts: &'a BTreeMap<JobId, Vec<Share>>,
    jobs: BTreeMap<JobId, &'a Job>,
}

impl Doer<'_> {
    /// Every effect on a process is preceded by a write under the lease that names the process: a controller that was
    /// taken over meanwhile stops at the write, and one that falls asleep behind it can only do what was recorded.
    fn act(&mut self, action: Action) -> Result<()> {
        match action {
            Action::Start { id } => self.start(id),
            Action::Stop { id, process, how } => {
                let asked_at = (how == StopHow::Ask).then(|| self.control.now());
                if self.control.record_stop(self.lease, id, &process, asked_at)? {
                    let job = self.jobs[&id];
                    if how == StopHow::Ask && !self.policy.draining && job.desired == Desired::Running {
                        self.metrics.preempted();
                    }
                    tracing::info!(job = %id, pid = process.pid, ?how, "stopping a job");
                    if let Err(error) = self.launcher.stop(&process, how) {
                        warn("cannot stop a job", &error);
                    }
                }
                Ok(())
            }
            Action::End { id, process, end } => {
                if self.control.record_end(self.lease, id, process.as_ref(), &end)? {
                    // Who waits for its room need not wait for the next tick.
                    self.control.notify_jobs_changed();
                    let ending = end.ending.map(|e| e.to_string());
                    tracing::info!(job = %id, state = end.state.as_str(), ending, "a job's process ended");
                }
                if let Some(process) = &process {
                    self.launcher.forget(process);
                }
                Ok(())
            }
        }
    }

    fn start(&mut self, id: JobId) -> Result<()> {
        let job = self.jobs[&id];
        let shares = &self.starts[&id];
        let prepared = match self.launcher.prepare(&given(job, shares)) {
            Ok(prepared) => prepared,
            Err(error) if error.is_of_the_launcher() => {
                warn("cannot start a job yet", &error);
                return Ok(());
            }
            Err(error) => {
                let mut end = ended(job, Ending::NotStarted, self.control.now(), self.policy);
                end.message = Some(chain(&error));
                warn("cannot start a job", &error);
                self.control.record_end(self.lease, id, None, &end)?;
                return Ok(());
            }
        };
        let process: &ProcessRef = &prepared.process;
        let start = Start { id, node: self.node, shares, process, log_path: prepared.log_path.as_deref() };
        let recorded = self.control.record_started(self.lease, &start, self.policy);
        if !matches!(recorded, Ok(true)) {
            // Cancelled or given another place meanwhile, taken over by another controller, or the database failed: it must not run.
            if let Err(error) = self.launcher.abandon(process) {
                warn("cannot end a process that must not run", &error);
            }
            return recorded.map(drop);
        }
        if let Err(error) = self.launcher.release(process) {
            warn("cannot release a job's process", &error);
        }
        self.metrics.started(job.n_starts > 0);
        tracing::info!(job = %id, name = job.spec.name, pid = process.pid, attempt = job.n_starts + 1, "started a job");
        Ok(())
    }
}

/// The job, told what it was given.
fn given(job: &Job, shares: &[Share]) -> Job {
    let mut job = job.clone();
    let cores = job.spec.needs.cores * shares[0].ranks;
    let mut tell = |variable: &str, value: String| {
        job.spec.env.entry(variable.to_owned()).or_insert(value);
    };
    if cores > 0 {
        tell(CORES_VARIABLE, cores.to_string());
    }
    if shares.len() > 1 {
        let nodes: Vec<&str> = shares.iter().map(|share| share.node.as_str()).collect();
        tell(HOSTS_VARIABLE, nodes.join(","));
    }
    job
}

/// For durations within this process; what is recorded goes by the control plane's clock.
fn monotonic_now() -> Instant {
    #[allow(clippy::disallowed_methods)]
    Instant::now()
}

fn warn(what: &str, error: &Error) {
    tracing::warn!(error = chain(error), "{what}");
}

#[cfg(test)]
mod simulation;
