//! The registry and its handles.

use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::registry::{Metric, Registry};

use crate::engine::{EngineFamilies, EngineMetrics};
use crate::http::HttpMetrics;
use crate::job::JobMetrics;
use crate::process::ProcessCollector;
use crate::store::StoreMetrics;
use crate::train::{TrainFamilies, TrainMetrics};

/// Every metric of this process. Clones share one registry.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: RwLock<Registry>,
    engine: EngineFamilies,
    train: TrainFamilies,
    http: HttpMetrics,
    store: StoreMetrics,
    job: JobMetrics,
}

impl Metrics {
    /// A fresh registry with all names registered and no series yet, but for `process_*`.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let inner = Inner {
            engine: EngineFamilies::register(&mut registry),
            http: HttpMetrics::register(&mut registry),
            train: TrainFamilies::register(&mut registry),
            store: StoreMetrics::register(&mut registry),
            job: JobMetrics::register(&mut registry),
            registry: RwLock::default(),
        };
        registry.register_collector(Box::new(ProcessCollector));
        *inner.registry.write().unwrap_or_else(PoisonError::into_inner) = registry;
        Self(Arc::new(inner))
    }

    /// Everything as Prometheus text; serve it with [`crate::CONTENT_TYPE`].
    pub fn render(&self) -> String {
        let registry = self.0.registry.read().unwrap_or_else(PoisonError::into_inner);
        crate::text::render(&registry)
    }

    /// Handles for one served model. `context_max` is its longest context in tokens and bounds the token histograms.
    /// The same name gives the same series again.
    pub fn engine(&self, model_name: &str, context_max: usize) -> EngineMetrics {
        self.0.engine.handles(model_name, context_max)
    }

    /// Handles for one training run, named by the operator or the control plane, never by a request.
    pub fn train(&self, run: &str) -> TrainMetrics {
        self.0.train.handles(run)
    }

    /// Drops the series of a training run that is over, so that many runs do not pile up in a long-lived process.
    pub fn forget_train(&self, run: &str) {
        self.0.train.forget(run);
    }

    pub fn http(&self) -> HttpMetrics {
        self.0.http.clone()
    }

    pub fn store(&self) -> StoreMetrics {
        self.0.store.clone()
    }

    pub fn job(&self) -> JobMetrics {
        self.0.job.clone()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers `metric` under `name` and returns it, so that a struct of metrics can be written as one literal.
pub(crate) fn registered<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}
