//! Time as the database keeps it.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMs(pub i64);

impl UnixMs {
    /// Whole seconds since the epoch, as the OpenAI API's `created` fields have it.
    pub fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    pub fn plus(self, duration: Duration) -> Self {
        let ms = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(ms))
    }

    /// From `earlier` to `self`; zero when the clock was set back in between.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// Where [`crate::Control`] takes the time from: the system, or a test.
#[derive(Clone)]
pub struct Clock {
    now: Arc<dyn Fn() -> UnixMs + Send + Sync>,
    is_system: bool,
}

impl Clock {
    pub fn new(now: impl Fn() -> UnixMs + Send + Sync + 'static) -> Self {
        Self { now: Arc::new(now), is_system: false }
    }

    /// The system's wall clock. It may jump; everything that reads it expects that.
    pub fn system() -> Self {
        let clock = Self::new(|| {
            // The one place in this crate that asks the system for the time.
            #[allow(clippy::disallowed_methods)]
            let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            // A clock before 1970 is set wrong; zero keeps the rows valid until it is set right.
            UnixMs(since_epoch.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX)))
        });
        Self { is_system: true, ..clock }
    }

    pub fn now(&self) -> UnixMs {
        (self.now)()
    }

    pub(crate) fn is_system(&self) -> bool {
        self.is_system
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}
