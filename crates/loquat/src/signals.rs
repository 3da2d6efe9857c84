//! SIGINT and SIGTERM: the first asks for an orderly end, a second one ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

/// Exit status of a process that was told twice.
const EXIT_KILLED: i32 = 130;

#[derive(Clone)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn on_signals() -> Result<Stop> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, sets it; the second finds it set.
            signal_hook::flag::register_conditional_shutdown(signal, EXIT_KILLED, flag.clone())?;
            signal_hook::flag::register(signal, flag.clone())?;
        }
        Ok(Stop(flag))
    }

    /// SIGUSR1, too: it is what launchers pass on to every rank.
    pub(crate) fn on_usr1(&self) -> Result<()> {
        signal_hook::flag::register(SIGUSR1, self.0.clone())?;
        Ok(())
    }

    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.0
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn wait(&self) {
        while !self.is_set() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
