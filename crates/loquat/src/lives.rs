//! How much of a run's time was of use, and what took the rest: from the starts that its metrics tell of.

use train::{Started, Step};

/// The lives of a run: each from its start until it ended or was lost.
#[derive(Default)]
pub(crate) struct Lives {
    /// When the first began, where that is known.
    began_unix: Option<f64>,
    /// Of the life before this one: why it ended, and how long ago its last step was when this one began.
    lost: Vec<(String, f64)>,
    /// When the last step was, as far as steps tell: a life's begin and the useful seconds since.
    last_unix: Option<f64>,
    elapsed_seconds: f64,
}

impl Lives {
    pub(crate) fn begin(&mut self, started: &Started) {
        if started.began_unix <= 0.0 {
            return;
        }
        self.began_unix.get_or_insert(started.began_unix);
        if let (Some(last), Some(why)) = (self.last_unix, &started.after) {
            let seconds = (started.began_unix - last).max(0.0);
            match self.lost.iter_mut().find(|(cause, _)| cause == why) {
                Some((_, sum)) => *sum += seconds,
                None => self.lost.push((why.clone(), seconds)),
            }
        }
        self.last_unix = Some(started.began_unix);
        self.elapsed_seconds = f64::NAN;
    }

    pub(crate) fn step(&mut self, step: &Step) {
        if let Some(last) = &mut self.last_unix
            && self.elapsed_seconds.is_finite()
        {
            *last += (step.elapsed_seconds - self.elapsed_seconds).max(0.0);
        }
        self.elapsed_seconds = step.elapsed_seconds;
    }

    /// Told once something was lost: the share of the run's time that its steps took, and the causes of lost time.
    pub(crate) fn line(&self, elapsed_seconds: f64, now_unix: f64) -> Option<String> {
        let wall = now_unix - self.began_unix?;
        if self.lost.is_empty() || wall <= 0.0 {
            return None;
        }
        let causes: Vec<String> = self.lost.iter().map(|(why, s)| format!("{s:.0} s to: {why}")).collect();
        let share = (100.0 * elapsed_seconds / wall).min(100.0);
        Some(format!("goodput {share:.0} % of {wall:.0} s; lost {}", causes.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(began_unix: f64, after: Option<&str>) -> Started {
        let run = "r".to_owned();
        let (flops_per_token, peak_flops) = (1.0, 1.0);
        let after = after.map(str::to_owned);
        Started {
            run,
            step: 0,
            n_steps: 9,
            n_params: 1,
            flops_per_token,
            peak_flops,
            n_ranks: 2,
            chats_cut: 0,
            chats_dropped: 0,
            began_unix,
            after,
        }
    }

    fn step(step: u64, elapsed_seconds: f64) -> Step {
        let (loss, lr, grad_norm, tokens) = (1.0, 1.0, 1.0, 1);
        let (tokens_per_second, data_seconds, margin, ranks) = (1.0, 0.0, None, None);
        Step {
            step,
            loss,
            lr,
            grad_norm,
            tokens,
            tokens_per_second,
            data_seconds,
            elapsed_seconds,
            margin,
            ranks,
        }
    }

    #[test]
    fn lost_time_is_told_by_cause() {
        let mut lives = Lives::default();
        lives.begin(&started(1000.0, None));
        (1..=5).for_each(|i| lives.step(&step(i, i as f64)));
        assert_eq!(lives.line(5.0, 1005.0), None, "nothing was lost");
        // Its last step ended 4 s after its first; the next life begins 20 s after the start.
        lives.begin(&started(1020.0, Some("mpirun ended with 137")));
        lives.step(&step(5, 5.0));
        lives.step(&step(10, 10.0));
        let line = lives.line(10.0, 1040.0).unwrap();
        assert_eq!(line, "goodput 25 % of 40 s; lost 16 s to: mpirun ended with 137");
    }
}
