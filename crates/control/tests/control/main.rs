//! The control plane from outside: state in one or many processes, and real processes really killed.

mod crash;
mod jobs;
mod keys;
mod launcher;
mod leases;
mod models;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use control::{Clock, Control, JobSpec, UnixMs};

/// A clock that moves only when told to.
#[derive(Clone)]
struct HandClock(Arc<AtomicI64>);

impl HandClock {
    fn new() -> Self {
        Self(Arc::new(AtomicI64::new(1_800_000_000_000)))
    }

    fn clock(&self) -> Clock {
        let now = self.clone();
        Clock::new(move || UnixMs(now.0.load(Ordering::SeqCst)))
    }

    fn advance(&self, ms: i64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

fn in_memory() -> (Control, HandClock) {
    let clock = HandClock::new();
    (Control::in_memory(clock.clock()).unwrap(), clock)
}

/// A job that runs `script` in the shell, for launchers whose program is the shell.
fn shell(name: &str, script: &str, max_restarts: u32) -> JobSpec {
    JobSpec {
        name: name.to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: Default::default(),
        max_restarts,
    }
}

/// Waits until `done` gives something; generous, for a busy machine.
fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
