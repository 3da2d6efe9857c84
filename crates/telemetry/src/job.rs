//! Metrics of the control plane's jobs.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::buckets;
use crate::metrics::registered;

/// What the reconciler sees and does. Clones share the same series.
#[derive(Clone, Debug)]
pub struct JobMetrics {
    jobs: Family<StateLabels, Gauge>,
    starts: Counter,
    restarts: Counter,
    reconcile_seconds: Histogram,
    reconcile_errors: Counter,
    lease_held: Gauge,
    waiting: Gauge,
    preemptions: Counter,
    nodes: NodeFamilies,
}

type NodeGauge = Family<NodeLabels, Gauge<f64, AtomicU64>>;

#[derive(Clone, Debug)]
struct NodeFamilies {
    cores: NodeGauge,
    cores_used: NodeGauge,
    memory: NodeGauge,
    memory_used: NodeGauge,
    disk_free: NodeGauge,
}

/// `part` is `all`, or `jobs` for what the processes of jobs use.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NodeLabels {
    node: String,
    part: &'static str,
}

/// What a machine has, and what of it is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Utilisation {
    pub cores: f64,
    pub cores_used: f64,
    pub job_cores_used: f64,
    pub memory_bytes: f64,
    pub memory_bytes_used: f64,
    pub job_memory_bytes_used: f64,
    pub disk_free_bytes: f64,
}

impl NodeFamilies {
    fn register(registry: &mut Registry) -> Self {
        let mut family = |name: &str, help: &str| registered(registry, name, help, NodeGauge::default());
        Self {
            cores: family("loquat_node_cores", "Cores that a node gives to jobs"),
            cores_used: family(
                "loquat_node_cores_used",
                "Cores of a node that are busy, on the mean since the last look",
            ),
            memory: family("loquat_node_memory_bytes", "Memory that a node gives to jobs"),
            memory_used: family("loquat_node_memory_used_bytes", "Memory of a node that is in use"),
            disk_free: family("loquat_node_disk_free_bytes", "What is free where a node's jobs write"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

impl JobMetrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        Self {
            jobs: registered(
                registry,
                "loquat_job_count",
                "Jobs known to the control plane, by observed state",
                Family::default(),
            ),
            starts: registered(
                registry,
                "loquat_job_starts",
                "Processes started for jobs, first attempts and restarts",
                Counter::default(),
            ),
            restarts: registered(
                registry,
                "loquat_job_restarts",
                "Processes started again for a job that had run before",
                Counter::default(),
            ),
            reconcile_seconds: registered(
                registry,
                "loquat_job_reconcile_seconds",
                "Time of one pass of the reconciler: observe, decide, act",
                Histogram::new(buckets::RECONCILE_SECONDS.iter().copied()),
            ),
            reconcile_errors: registered(
                registry,
                "loquat_job_reconcile_errors",
                "Passes of the reconciler that failed and will be repeated",
                Counter::default(),
            ),
            lease_held: registered(
                registry,
                "loquat_job_lease_held",
                "1 while this process holds the lease on reconciling jobs, else 0",
                Gauge::default(),
            ),
            waiting: registered(
                registry,
                "loquat_job_waiting",
                "Jobs that wait for room, a quota or the end of a pause",
                Gauge::default(),
            ),
            preemptions: registered(
                registry,
                "loquat_job_preemptions",
                "Jobs asked to save and make room for others",
                Counter::default(),
            ),
            nodes: NodeFamilies::register(registry),
        }
    }

    /// How many jobs are in `state` now. Call it for every state, also those with none, so that no old count stays.
    pub fn set_jobs(&self, state: &'static str, n_jobs: usize) {
        self.jobs.get_or_create_owned(&StateLabels { state }).set(i64::try_from(n_jobs).unwrap_or(i64::MAX));
    }

    /// A process was started for a job; `again` when the job had run before.
    pub fn started(&self, again: bool) {
        self.starts.inc();
        if again {
            self.restarts.inc();
        }
    }

    /// One pass of the reconciler.
    pub fn reconciled(&self, took: Duration, ok: bool) {
        self.reconcile_seconds.observe(took.as_secs_f64());
        if !ok {
            self.reconcile_errors.inc();
        }
    }

    pub fn set_waiting(&self, n_jobs: usize) {
        self.waiting.set(i64::try_from(n_jobs).unwrap_or(i64::MAX));
    }

    /// A job was asked to make room.
    pub fn preempted(&self) {
        self.preemptions.inc();
    }

    /// What this machine has and uses; `node` is its name in the cluster.
    pub fn set_node(&self, node: &str, seen: &Utilisation) {
        let set = |family: &NodeGauge, part, value| {
            family.get_or_create_owned(&NodeLabels { node: node.to_owned(), part }).set(value);
        };
        set(&self.nodes.cores, "all", seen.cores);
        set(&self.nodes.cores_used, "all", seen.cores_used);
        set(&self.nodes.cores_used, "jobs", seen.job_cores_used);
        set(&self.nodes.memory, "all", seen.memory_bytes);
        set(&self.nodes.memory_used, "all", seen.memory_bytes_used);
        set(&self.nodes.memory_used, "jobs", seen.job_memory_bytes_used);
        set(&self.nodes.disk_free, "all", seen.disk_free_bytes);
    }

    pub fn set_lease_held(&self, held: bool) {
        self.lease_held.set(i64::from(held));
    }
}
