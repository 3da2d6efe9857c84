//! What the tests of several modules need.

use crate::clock::UnixMs;
use crate::job::{Desired, Job, JobId, JobSpec, JobState};

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub(crate) fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }
}

/// A job as it is submitted.
pub(crate) fn submitted(id: JobId, spec: JobSpec, at: UnixMs) -> Job {
    Job {
        id,
        spec,
        desired: Desired::Running,
        state: JobState::Pending,
        n_starts: 0,
        n_failures: 0,
        n_short: 0,
        process: None,
        placed: Vec::new(),
        ending: None,
        message: None,
        log_path: None,
        created_at: at,
        waiting_at: at,
        started_at: None,
        finished_at: None,
        retry_at: None,
        stop_sent_at: None,
    }
}
