//! The engine's thread.

use std::sync::Arc;

use telemetry::EngineMetrics;

use crate::engine::{EngineLimits, Phase, Shared};
use crate::runner::Runner;

pub(crate) struct Worker {
    shared: Arc<Shared>,
}

impl Worker {
    pub(crate) fn new(
        _runner: Box<dyn Runner>,
        _limits: EngineLimits,
        shared: Arc<Shared>,
        _metrics: EngineMetrics,
    ) -> Worker {
        Worker { shared }
    }

    pub(crate) fn run(self) {
        let mut state = self.shared.lock();
        state.phase = Phase::Failed("this commit only has the engine's signatures".into());
        state.submitted.clear();
        state.n_unfinished = 0;
    }
}
