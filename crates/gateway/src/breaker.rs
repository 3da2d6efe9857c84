//! A circuit breaker: after failures in a row a replica gets a rest, then one request to show that it is well.

/// When to break, and for how long.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Failures in a row that break it.
    pub(crate) failures: u32,
    /// The first rest; each further one is twice as long.
    pub(crate) rest_ms: u64,
    pub(crate) rest_ms_max: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Breaker {
    failures: u32,
    /// Rests in a row.
    n_rests: u32,
    /// Closed (`None`), or open until then.
    open_until: Option<u64>,
    /// A request is out to show whether it is well again.
    on_trial: bool,
}

impl Breaker {
    pub(crate) fn lets_pass(&self, now_ms: u64) -> bool {
        match self.open_until {
            None => true,
            Some(until) => now_ms >= until && !self.on_trial,
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open_until.is_some()
    }

    /// A request is on its way.
    pub(crate) fn sent(&mut self) {
        self.on_trial = self.open_until.is_some();
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Breaker::default();
    }

    /// The request ended without saying anything about the replica.
    pub(crate) fn said_nothing(&mut self) {
        self.on_trial = false;
    }

    pub(crate) fn failed(&mut self, now_ms: u64, limits: &Limits) {
        self.failures = self.failures.saturating_add(1);
        let was_trial = std::mem::take(&mut self.on_trial);
        if was_trial || (self.open_until.is_none() && self.failures >= limits.failures) {
            let rest = limits.rest_ms.saturating_mul(1 << self.n_rests.min(20)).min(limits.rest_ms_max);
            self.n_rests += 1;
            self.open_until = Some(now_ms.saturating_add(rest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_after_one_success() {
        let limits = Limits { failures: 3, rest_ms: 100, rest_ms_max: 300 };
        let mut breaker = Breaker::default();
        for _ in 0..2 {
            breaker.failed(0, &limits);
        }
        breaker.succeeded();
        for _ in 0..2 {
            breaker.failed(0, &limits);
        }
        assert!(breaker.lets_pass(0), "they were not in a row");
        breaker.failed(0, &limits);
        assert!(!breaker.lets_pass(99) && breaker.lets_pass(100));
        breaker.failed(50, &limits);
        assert!(breaker.lets_pass(100), "one that was sent before it opened changes nothing");
        breaker.sent();
        assert!(!breaker.lets_pass(100), "one request at a time is enough to see");
        breaker.said_nothing();
        assert!(breaker.lets_pass(100));
        let mut now = 100;
        for rest in [200, 300, 300] {
            breaker.sent();
            breaker.failed(now, &limits);
            assert!(!breaker.lets_pass(now + rest - 1) && breaker.lets_pass(now + rest));
            now += rest;
        }
        breaker.sent();
        breaker.succeeded();
        assert!(breaker.lets_pass(0) && !breaker.is_open());
    }
}
