//! How many replicas a load needs.

/// What is known about a model's load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Requests that run or wait, at all gateways together, averaged over the last seconds.
    pub in_flight: f64,
    /// Milliseconds since the last request.
    pub idle_ms: u64,
    /// Milliseconds since the number of replicas was last changed.
    pub since_change_ms: u64,
    /// The share of its cache that the fullest replica uses, where replicas say so.
    pub cache_used: f64,
}

#[derive(Clone, Debug)]
pub struct ScalePolicy {
    pub n_min: usize,
    pub n_max: usize,
    /// Requests at once that one replica should have.
    pub per_replica: f64,
    /// Without a request for so long the last replica goes, if `n_min` is 0.
    pub idle_ms: u64,
    /// How long to wait before there are fewer: a replica takes longer to come than to go.
    pub calm_ms: u64,
    /// A cache fuller than this needs another replica.
    pub cache_used_max: f64,
}

impl Default for ScalePolicy {
    fn default() -> ScalePolicy {
        ScalePolicy {
            n_min: 1,
            n_max: 1,
            per_replica: 8.0,
            idle_ms: 300_000,
            calm_ms: 60_000,
            cache_used_max: 0.9,
        }
    }
}

/// How many replicas there should be, where there are `n` now. More at once, fewer one at a time and late, so that a load
/// that swings does not swing the replicas.
pub fn scale(n: usize, load: &Load, policy: &ScalePolicy) -> usize {
    let mut wanted = (load.in_flight / policy.per_replica).ceil() as usize;
    if load.cache_used > policy.cache_used_max {
        wanted = wanted.max(n + 1);
    }
    // While somebody asks, or asked just now, one stays.
    if load.in_flight > 0.0 || load.idle_ms < policy.idle_ms {
        wanted = wanted.max(1);
    }
    if wanted < n {
        // One less must still have room: 20 % of it, or the next request would bring it back.
        let fits = load.in_flight <= 0.8 * policy.per_replica * (n - 1) as f64;
        let calm = load.since_change_ms >= policy.calm_ms;
        wanted = if fits && calm { n - 1 } else { n };
    }
    wanted.clamp(policy.n_min, policy.n_max.max(policy.n_min))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_follow_the_load_up_at_once_and_down_late() {
        let policy = ScalePolicy { n_min: 0, n_max: 4, ..ScalePolicy::default() };
        let check = |n: usize, in_flight: f64, [idle_s, change_s]: [u64; 2], expected: usize| {
            let (idle_ms, since_change_ms) = (idle_s * 1_000, change_s * 1_000);
            let load = Load { in_flight, idle_ms, since_change_ms, cache_used: 0.0 };
            assert_eq!(scale(n, &load, &policy), expected, "{n} replicas, {load:?}");
        };
        check(0, 1.0, [0, 0], 1);
        check(1, 30.0, [0, 0], 4);
        check(1, 900.0, [0, 0], 4);
        check(4, 2.0, [0, 10], 4);
        check(4, 2.0, [0, 60], 3);
        check(2, 7.0, [0, 999], 2);
        check(1, 0.0, [299, 999], 1);
        check(1, 0.0, [300, 999], 0);
        check(0, 0.0, [999, 999], 0);
        let full = Load { in_flight: 1.0, cache_used: 0.95, ..Load::default() };
        assert_eq!(scale(2, &full, &policy), 3, "a full cache needs another replica");
        assert_eq!(scale(1, &Load { idle_ms: u64::MAX, ..Load::default() }, &ScalePolicy::default()), 1);
    }
}
