//! The one place that reads the time. The scheduler and the sampler never do.

use std::time::Instant;

pub(crate) fn now() -> Instant {
    Instant::now()
}
