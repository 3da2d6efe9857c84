//! Metrics of the object store.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::buckets;
use crate::metrics::registered;

/// Counts, sizes and times store operations. Clones share the same series.
#[derive(Clone, Debug)]
pub struct StoreMetrics {
    operations: Family<OutcomeLabels, Counter>,
    bytes: Family<OperationLabels, Counter>,
    seconds: Family<OperationLabels, Histogram, fn() -> Histogram>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    operation: &'static str,
    outcome: &'static str,
}

impl StoreMetrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        Self {
            operations: registered(
                registry,
                "loquat_store_operations",
                "Store operations, by operation and outcome (ok, error)",
                Family::default(),
            ),
            bytes: registered(
                registry,
                "loquat_store_bytes",
                "Bytes written or read by successful store operations",
                Family::default(),
            ),
            seconds: registered(
                registry,
                "loquat_store_operation_seconds",
                "Time of one store operation",
                Family::new_with_constructor(|| Histogram::new(buckets::STORE_SECONDS.iter().copied())),
            ),
        }
    }

    /// One operation (`put`, `get`, `list`, ...) that moved `n_bytes` of object data.
    pub fn operation(&self, operation: &'static str, n_bytes: u64, took: Duration, ok: bool) {
        let outcome = if ok { "ok" } else { "error" };
        self.operations.get_or_create_owned(&OutcomeLabels { operation, outcome }).inc();
        let labels = OperationLabels { operation };
        if ok {
            self.bytes.get_or_create_owned(&labels).inc_by(n_bytes);
        }
        self.seconds.get_or_create_owned(&labels).observe(took.as_secs_f64());
    }
}
