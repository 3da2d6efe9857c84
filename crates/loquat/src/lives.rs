//! How much of a run's time was of use, and what took the rest: from the events that its metrics hold.

use std::collections::BTreeMap;

use train::{Event, Ranks, Started, Step};

/// The lives of a run: each from its start until it ended or was lost.
#[derive(Default)]
pub(crate) struct Lives {
    /// When the first began, where that is known.
    began_unix: Option<f64>,
    /// When the last step was, as far as steps tell: a life's begin and the seconds of its steps.
    last_unix: Option<f64>,
    /// Why lives were lost, and what that took: steps that are done again, and the time until the next life began.
    lost: Vec<(String, f64)>,
    /// Where each rank is, if that was told.
    hosts: Vec<String>,
    n_ranks: u64,
    /// Up to the newest checkpoint.
    kept: Spent,
    /// Of every step since, which a lost rank would cost.
    open: Vec<(u64, Spent)>,
}

/// Seconds of steps, and of what in them others had to wait for.
#[derive(Clone, Default)]
struct Spent {
    steps: f64,
    data: f64,
    exchange: f64,
    saving: f64,
    /// By the rank that computed longest: how long it did, and the rank in the middle.
    slowest: BTreeMap<usize, [f64; 2]>,
}

impl Lives {
    pub(crate) fn event(&mut self, event: &Event) {
        match event {
            Event::Started(started) => self.begin(started),
            Event::Step(step) => self.spend(step.step, Spent::of_step(step)),
            Event::Round(round) => {
                let mut spent = Spent { steps: round.seconds, ..Spent::default() };
                spent.ranks(round.ranks.as_ref());
                self.spend(round.step, spent);
            }
            Event::Checkpoint { step, seconds, .. } => self.save(*step, *seconds),
            _ => {}
        }
    }

    fn begin(&mut self, started: &Started) {
        if started.began_unix <= 0.0 {
            return;
        }
        (self.n_ranks, self.hosts) = (started.n_ranks, started.hosts.clone());
        self.began_unix.get_or_insert(started.began_unix);
        let again: f64 =
            self.open.iter().filter(|(step, _)| *step > started.step).map(|(_, s)| s.steps).sum();
        self.open.retain(|(step, _)| *step <= started.step);
        if let (Some(last), Some(why)) = (self.last_unix, &started.after) {
            // As it was measured by those that went on, or as far as the two lives tell.
            let apart = || again + (started.began_unix - last).max(0.0);
            let seconds = started.lost_seconds.unwrap_or_else(apart);
            match self.lost.iter_mut().find(|(cause, _)| cause == why) {
                Some((_, sum)) => *sum += seconds,
                None => self.lost.push((why.clone(), seconds)),
            }
        }
        self.last_unix = Some(started.began_unix);
    }

    fn spend(&mut self, step: u64, spent: Spent) {
        if let Some(last) = &mut self.last_unix {
            *last += spent.steps;
        }
        self.open.push((step, spent));
    }

    /// What came before a checkpoint is not lost any more.
    fn save(&mut self, step: u64, seconds: f64) {
        self.kept.saving += seconds;
        let n = self.open.iter().take_while(|(of, _)| *of <= step).count();
        for (_, spent) in self.open.drain(..n) {
            self.kept.add(&spent);
        }
    }

    fn total(&self) -> Spent {
        let mut total = self.kept.clone();
        self.open.iter().for_each(|(_, spent)| total.add(spent));
        total
    }

    /// The share of the run's time in which its ranks computed what was kept.
    pub(crate) fn goodput(&self, now_unix: f64) -> Option<f64> {
        let wall = now_unix - self.began_unix?;
        (wall > 0.0).then(|| (self.total().useful() / wall).clamp(0.0, 1.0))
    }

    /// What took the rest, the longest first: kinds for metrics, words for people, seconds.
    pub(crate) fn causes(&self, now_unix: f64) -> Vec<(&'static str, String, f64)> {
        let Some(began) = self.began_unix else { return Vec::new() };
        let total = self.total();
        let lost: f64 = self.lost.iter().map(|(_, seconds)| seconds).sum();
        let rest = (now_unix - began - total.steps - total.saving - lost).max(0.0);
        let mut causes: Vec<_> = self.lost.iter().map(|(why, s)| ("lost_ranks", why.clone(), *s)).collect();
        causes.extend(total.slowest.iter().map(|(rank, [own, middle])| {
            let times = own / middle.max(1e-9);
            let words = format!("waiting for {} ({times:.1} times as long as the middle)", self.name(*rank));
            ("slowest_rank", words, own - middle)
        }));
        causes.push(("exchange", "exchange".into(), total.exchange));
        causes.push(("data", "data".into(), total.data));
        causes.push(("checkpoints", "checkpoints".into(), total.saving));
        causes.push(("other", "what is between steps".into(), rest));
        causes.sort_by(|a, b| b.2.total_cmp(&a.2));
        causes
    }

    pub(crate) fn hosts(&self) -> &[String] {
        &self.hosts
    }

    pub(crate) fn name(&self, rank: usize) -> String {
        self.hosts.get(rank).map_or(format!("rank {rank}"), |host| format!("rank {rank} on {host}"))
    }

    /// Told where there are several ranks, or something was lost: what took at least a hundredth of the time.
    pub(crate) fn line(&self, now_unix: f64) -> Option<String> {
        let share = self.goodput(now_unix)?;
        if self.lost.is_empty() && self.n_ranks < 2 {
            return None;
        }
        let wall = now_unix - self.began_unix?;
        let causes = self.causes(now_unix);
        let told = causes.iter().filter(|(.., seconds)| *seconds >= 0.01 * wall);
        let told: Vec<String> = told.map(|(_, why, s)| format!("{s:.0} s to: {why}")).collect();
        let lost = if told.is_empty() { String::new() } else { format!("; lost {}", told.join(", ")) };
        Some(format!("goodput {:.0} % of {wall:.0} s{lost}", 100.0 * share))
    }
}

impl Lives {
    /// The same for a run that may be over: up to its last step, as far as steps tell when that was.
    pub(crate) fn line_so_far(&self) -> Option<String> {
        self.line(self.last_unix?)
    }
}

impl Spent {
    fn of_step(step: &Step) -> Spent {
        let tokens = step.tokens as f64 / step.step.max(1) as f64;
        let seconds = tokens / step.tokens_per_second.max(1e-9);
        let mut spent = Spent { steps: seconds, data: step.data_seconds, ..Spent::default() };
        spent.ranks(step.ranks.as_ref());
        spent
    }

    fn ranks(&mut self, ranks: Option<&Ranks>) {
        let Some(ranks) = ranks else { return };
        self.exchange += ranks.exchange_seconds;
        self.slowest.insert(ranks.slowest, [ranks.slowest_seconds, ranks.median_seconds]);
    }

    fn add(&mut self, other: &Spent) {
        self.steps += other.steps;
        self.data += other.data;
        self.exchange += other.exchange;
        self.saving += other.saving;
        for (rank, [own, middle]) in &other.slowest {
            let sum = self.slowest.entry(*rank).or_default();
            *sum = [sum[0] + own, sum[1] + middle];
        }
    }

    fn useful(&self) -> f64 {
        let waits: f64 = self.slowest.values().map(|[own, middle]| own - middle).sum();
        (self.steps - self.data - self.exchange - waits).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(step: u64, began_unix: f64, after: Option<&str>) -> Event {
        let run = "r".to_owned();
        let (flops_per_token, peak_flops) = (1.0, 1.0);
        let after = after.map(str::to_owned);
        Event::Started(Started {
            run,
            step,
            n_steps: 9,
            n_params: 1,
            flops_per_token,
            peak_flops,
            n_ranks: 2,
            hosts: vec!["a".into(), "b".into()],
            chats_cut: 0,
            chats_dropped: 0,
            began_unix,
            after,
            lost_seconds: None,
        })
    }

    /// Of one second, of which the slower rank computes so long and both exchange 0.1 s.
    fn step(step: u64, slowest_seconds: f64) -> Event {
        let ranks = Ranks {
            slowest: 1,
            slowest_seconds,
            median_seconds: 0.4,
            exchange_seconds: 0.1,
            travel_seconds: 0.1,
            bytes_sent: 1,
        };
        Event::Step(Step {
            step,
            loss: 1.0,
            lr: 1.0,
            grad_norm: 1.0,
            tokens: 100 * step,
            tokens_per_second: 100.0,
            data_seconds: 0.0,
            elapsed_seconds: 0.0,
            margin: None,
            ranks: Some(ranks),
        })
    }

    #[test]
    fn lost_time_is_told_by_cause() {
        let mut lives = Lives::default();
        assert_eq!(lives.line(1.0), None);
        lives.event(&started(0, 1000.0, None));
        (1..=6).for_each(|i| lives.event(&step(i, 0.8)));
        lives.event(&Event::Checkpoint { step: 4, bytes: 1, seconds: 0.0, write_seconds: 1.0 });
        // Killed after its last step ended at 1006; two steps are done again.
        lives.event(&started(4, 1020.0, Some("mpirun ended with 137")));
        (5..=10).for_each(|i| lives.event(&step(i, 0.8)));
        // 10 steps of 1 s, each 0.4 s behind rank 1 and 0.1 s on the way: 5 s of use.
        let line = lives.line(1040.0).unwrap();
        assert_eq!(
            line,
            "goodput 12 % of 40 s; lost 16 s to: mpirun ended with 137, 14 s to: what is between steps, \
             4 s to: waiting for rank 1 on b (2.0 times as long as the middle), 1 s to: exchange"
        );
    }
}
