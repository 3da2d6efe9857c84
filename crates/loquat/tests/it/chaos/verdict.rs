//! What must hold once the faults are over: of answers, and of the time that training and clients lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::Store;
use train::Event;

use super::place::Fault;
use super::traffic::{Asked, CLIENTS, p99};

/// After each fault answers must come again, and as fast as before.
pub(super) const RECOVERED_MAX: Duration = Duration::from_secs(30);
/// Answers are as fast as before if they take no longer than this, or three times as long as they did. Other processes
/// share these cores.
const FAST: Duration = Duration::from_secs(1);
/// Of so much time together the 99th percentile is taken.
const WINDOW: Duration = Duration::from_secs(5);
/// A step that takes so many times as long as those beside it stood still for the rest of it.
const STILL: f64 = 4.0;

/// A run before the first fault.
pub(super) struct Calm {
    pub(super) started: Instant,
    pub(super) run: Duration,
    pub(super) useful: f64,
}

pub(super) struct Verdict<'a> {
    pub(super) calm: Calm,
    pub(super) bound: Duration,
    /// When faults began to come.
    pub(super) started: Instant,
    pub(super) asked: &'a [Asked],
    pub(super) faults: &'a [(Instant, Fault)],
}

impl Calm {
    /// What an answer may take to be as fast as it was then.
    pub(super) fn bound(&self, asked: &[Asked]) -> Duration {
        let mut slowness = windows(asked, self.started, self.started + self.run);
        if slowness.is_empty() {
            slowness.push(p99(asked, self.started, self.run));
        }
        let usual = median(slowness);
        assert!(usual < Duration::MAX, "requests fail without any fault: {asked:?}");
        let bound = FAST.max(3 * usual);
        println!(
            "undisturbed: a run in {:.1?}, {:.0} % of it in steps; answers p99 {usual:.0?} of {}: {bound:.0?} is well",
            self.run,
            100.0 * self.share(),
            asked.len()
        );
        bound
    }

    /// Of the run's time what was spent in steps.
    fn share(&self) -> f64 {
        self.useful / self.run.as_secs_f64()
    }
}

impl Verdict<'_> {
    /// What was accepted ended whole or with an error, and clients got on for all but a share of their time.
    pub(super) fn check_answers(&self, goodput_min: f64) {
        let asked: Vec<&Asked> = self.asked.iter().filter(|one| one.at >= self.started).collect();
        let lost: Vec<&&Asked> = asked.iter().filter(|one| one.is_lost()).collect();
        assert!(lost.is_empty(), "lost without an error: {lost:?}");
        let n_failed = asked.iter().filter(|one| !one.is_whole()).count();
        let time = |is_well: bool| -> f64 {
            let those = asked.iter().filter(|one| one.is_well(self.bound) == is_well);
            those.map(|one| one.time().as_secs_f64()).sum()
        };
        let goodput = time(true) / (time(true) + time(false));
        println!(
            "{} requests, {n_failed} ended with an error, none was lost; {:.1} % of the clients' time was well spent",
            asked.len(),
            100.0 * goodput
        );
        assert!(asked.len() > 10 * self.faults.len(), "{} requests are no steady load", asked.len());
        assert!(goodput >= goodput_min, "goodput of serving: {goodput}");
    }

    /// Where faults are far enough apart: who has nothing to do with a part that is dead does not notice, and soon all is as
    /// before. Returns what is not so, so that one reads of all faults first.
    #[must_use]
    pub(super) fn recoveries(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let end = self.asked.last().unwrap().at;
        for (i, (at, fault)) in self.faults.iter().enumerate() {
            let until = self.faults.get(i + 1).map_or(end, |(next, _)| *next);
            // One that was under way when the next fault came is that one's.
            let failed = || {
                let failed = self.asked.iter().filter(|one| !one.is_whole());
                failed.filter(|one| (*at..until).contains(&(one.at + one.took)))
            };
            if until.duration_since(*at) < RECOVERED_MAX + WINDOW {
                continue;
            }
            let before = p99(self.asked, *at - 2 * WINDOW, 2 * WINDOW);
            let slowness = windows(self.asked, *at, until);
            // Two in a row. (What comes later is other processes' doing: they share these cores.)
            let is_well = |k: &usize| slowness[*k..].iter().take(2).all(|p99| *p99 <= self.bound);
            let well = (0..slowness.len()).find(is_well);
            let mut failures = BTreeMap::<&str, usize>::new();
            for one in failed() {
                *failures.entry(&one.address).or_default() += 1;
            }
            let n_failed: usize = failures.values().sum();
            let again = median(slowness[well.unwrap_or(0)..].to_vec());
            println!(
                "{:>7.0?} {fault:?}: p99 {before:.0?} before, {again:.0?} when well again {:?} s later; {n_failed} failed",
                at.duration_since(self.started),
                well.map(|k| k as u64 * WINDOW.as_secs())
            );
            if well.is_none_or(|k| k as u32 * WINDOW > RECOVERED_MAX) {
                wrong.push(format!("{fault:?}: too late as before: {slowness:?}"));
            }
            let late: Vec<_> = failed().filter(|one| one.at > *at + RECOVERED_MAX).collect();
            if !late.is_empty() {
                wrong.push(format!("{fault:?}: failures long after it: {late:?}"));
            }
            let is_right = match fault {
                // Serving has nothing to do with them, or goes on without.
                Fault::Rank | Fault::Node | Fault::Storage | Fault::Database => n_failed == 0,
                // At one of the two.
                Fault::Leader | Fault::Gateway => failures.len() <= 1,
                // A client has one request at a time.
                Fault::Replica | Fault::Host => n_failed <= 2 * CLIENTS,
            };
            if !is_right {
                let all: Vec<_> = failed().collect();
                wrong.push(format!("{fault:?} reached whom it should not: {all:?}"));
            }
        }
        wrong
    }

    /// Training got on in nearly as large a share of the time as it does without faults.
    pub(super) fn check_goodput(&self, useful: f64, elapsed: Duration, goodput_min: f64) {
        let share = useful / elapsed.as_secs_f64();
        let goodput = share / self.calm.share();
        println!(
            "{useful:.0} s of {:.0} in steps that count: goodput {:.1} % of the undisturbed",
            elapsed.as_secs_f64(),
            100.0 * goodput
        );
        assert!(goodput >= goodput_min, "goodput of training: {goodput}");
    }
}

/// The 99th percentiles of one stretch of time after the other.
fn windows(asked: &[Asked], from: Instant, until: Instant) -> Vec<Duration> {
    let starts = (0..).map(|k| from + k * WINDOW).take_while(|start| *start + WINDOW <= until);
    starts.map(|start| p99(asked, start, WINDOW)).collect()
}

fn median<T: Copy + PartialOrd>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values[values.len() / 2]
}

/// The time of a run's steps, each counted once however often it was done, and none for more than it would have taken.
pub(super) fn useful_seconds(store: &Arc<dyn Store>, run: &str) -> f64 {
    let events = train::read_metrics(store.as_ref(), run).unwrap();
    let ends: Vec<f64> = events
        .iter()
        .filter_map(|event| if let Event::Step(step) = event { Some(step.elapsed_seconds) } else { None })
        .collect();
    assert!(ends.len() > 100, "the steps of {run} are not told: {}", ends.len());
    let steps: Vec<f64> = ends.windows(2).map(|pair| (pair[1] - pair[0]).max(0.0)).collect();
    let beside = |i: usize| &steps[i.saturating_sub(25)..(i + 25).min(steps.len())];
    (0..steps.len()).map(|i| steps[i].min(STILL * median(beside(i).to_vec()))).sum()
}
