//! Metrics of the control plane's jobs.

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

    pub fn set_lease_held(&self, held: bool) {
        self.lease_held.set(i64::from(held));
    }
}
