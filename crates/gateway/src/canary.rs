//! Whether a new version may live, from how it answers beside the one it would replace.

use std::collections::VecDeque;

/// How one request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub ok: bool,
    /// To the first byte of the answer.
    pub ms: f64,
}

/// The latest samples of one version.
#[derive(Clone, Debug, Default)]
pub struct Window {
    latest: VecDeque<Sample>,
    n_seen: u64,
}

/// Samples that a verdict looks at.
const WINDOW: usize = 256;

impl Window {
    pub fn add(&mut self, sample: Sample) {
        if self.latest.len() == WINDOW {
            self.latest.pop_front();
        }
        self.latest.push_back(sample);
        self.n_seen += 1;
    }

    /// Samples ever added.
    pub fn n_seen(&self) -> u64 {
        self.n_seen
    }

    pub fn error_rate(&self) -> f64 {
        let n_failed = self.latest.iter().filter(|sample| !sample.ok).count();
        n_failed as f64 / self.latest.len().max(1) as f64
    }

    /// The time within which a share `q` of the good answers began; `None` without any.
    pub fn quantile_ms(&self, q: f64) -> Option<f64> {
        let mut ms: Vec<f64> = self.latest.iter().filter(|s| s.ok).map(|s| s.ms).collect();
        ms.sort_by(f64::total_cmp);
        let at = (q * ms.len() as f64).ceil() as usize;
        ms.get(at.max(1) - 1).copied()
    }
}

/// What a canary must keep to.
#[derive(Clone, Debug)]
pub struct CanaryPolicy {
    /// Samples before anything good is said, or that it is slow: the first answers of a replica that has just started are.
    pub n_good: u64,
    /// Samples before anything bad is said.
    pub n_bad: u64,
    /// Samples of the live version before speeds are compared.
    pub n_live: u64,
    /// Errors above those of the live version, as a share.
    pub error_rate_more: f64,
    /// How much slower than the live version half of its answers may begin.
    pub slower: f64,
    /// Differences below this are noise, whatever the ratio.
    pub slower_ms: f64,
}

impl Default for CanaryPolicy {
    fn default() -> CanaryPolicy {
        CanaryPolicy { n_good: 50, n_bad: 5, n_live: 20, error_rate_more: 0.05, slower: 2.0, slower_ms: 20.0 }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Wait,
    Promote,
    /// Why, for people.
    RollBack(String),
}

/// Judges `canary` against `live`, which may be without samples when nobody asked it.
pub fn judge(canary: &Window, live: &Window, policy: &CanaryPolicy) -> Verdict {
    if canary.n_seen() < policy.n_bad {
        return Verdict::Wait;
    }
    let (errors, live_errors) = (canary.error_rate(), live.error_rate());
    if errors > live_errors + policy.error_rate_more {
        let (errors, live_errors) = (100.0 * errors, 100.0 * live_errors);
        return Verdict::RollBack(format!(
            "{errors:.0} % of its answers failed, {live_errors:.0} % of the live version's"
        ));
    }
    if canary.n_seen() < policy.n_good {
        return Verdict::Wait;
    }
    // Half of the answers: its best tell nothing, its worst are noise at this number.
    if let (Some(ms), Some(live_ms)) = (canary.quantile_ms(0.5), live.quantile_ms(0.5))
        && live.n_seen() >= policy.n_live
        && ms > policy.slower * live_ms
        && ms > live_ms + policy.slower_ms
    {
        return Verdict::RollBack(format!(
            "half of its answers begin after {ms:.0} ms, the live version's after {live_ms:.0} ms"
        ));
    }
    Verdict::Promote
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(n: usize, ok: impl Fn(usize) -> bool, ms: f64) -> Window {
        let mut window = Window::default();
        for i in 0..n {
            window.add(Sample { ok: ok(i), ms });
        }
        window
    }

    #[test]
    fn good_ones_are_promoted_and_bad_ones_rolled_back() {
        let policy = CanaryPolicy::default();
        let live = window(200, |_| true, 10.0);
        let check = |canary: Window, expected: &str| {
            let verdict = format!("{:?}", judge(&canary, &live, &policy));
            assert!(verdict.contains(expected), "{verdict}");
        };
        check(window(0, |_| true, 10.0), "Wait");
        check(window(4, |_| false, 10.0), "Wait");
        check(window(5, |_| false, 10.0), "100 % of its answers failed");
        check(window(49, |_| true, 12.0), "Wait");
        check(window(50, |_| true, 12.0), "Promote");
        check(window(50, |i| i % 10 > 0, 12.0), "10 % of its answers failed");
        check(window(60, |i| i % 50 > 0, 12.0), "Promote");
        check(window(49, |_| true, 100.0), "Wait");
        check(window(50, |_| true, 100.0), "after 100 ms");
        check(window(50, |_| true, 25.0), "Promote");
        // Slow while it starts, and then as fast as the other.
        let mut started = window(24, |_| true, 100.0);
        (0..26).for_each(|_| started.add(Sample { ok: true, ms: 12.0 }));
        check(started, "Promote");
        // Errors of both are not the canary's fault.
        let bad = window(200, |i| i % 2 == 0, 10.0);
        assert_eq!(judge(&window(50, |i| i % 2 == 0, 10.0), &bad, &policy), Verdict::Promote);
        // Without traffic on the live version speed cannot be compared, errors can.
        assert_eq!(judge(&window(50, |_| true, 900.0), &Window::default(), &policy), Verdict::Promote);
    }

    #[test]
    fn what_was_long_ago_does_not_count() {
        let mut canary = window(300, |_| false, 10.0);
        for _ in 0..WINDOW {
            canary.add(Sample { ok: true, ms: 10.0 });
        }
        assert_eq!(canary.error_rate(), 0.0);
        assert_eq!(canary.quantile_ms(0.99), Some(10.0));
    }
}
