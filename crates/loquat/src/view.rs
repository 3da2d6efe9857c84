//! The live view of a training run: a block of lines redrawn in place on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use train::{Curve, Event, Ranks, Round, Started, Step, TaskScores};

use crate::links::{self, Traffic, traffic};
use crate::lives::Lives;

/// How often plain output tells where the run is.
const PLAIN_EVERY: Duration = Duration::from_secs(10);
/// How often a terminal is redrawn at most.
const DRAW_EVERY: Duration = Duration::from_millis(120);
const CURVE_WIDTH: usize = 60;
const CURVE_HEIGHT: usize = 8;
const SAMPLE_CHARS_MAX: usize = 220;

pub(crate) struct View {
    started: Option<Started>,
    last: Option<Step>,
    /// Where workers train by themselves: their last meeting.
    met: Option<Round>,
    /// The busiest links, and over how many seconds.
    traffic: Option<(Vec<Traffic>, f64)>,
    bits_per_byte: Option<f64>,
    /// Tokens per second, smoothed over some steps.
    speed: Option<f64>,
    /// Of every task the last scores, and of which step they are.
    tasks: BTreeMap<String, (u64, TaskScores)>,
    sample: Option<(u64, String)>,
    notice: Option<String>,
    curve: Curve,
    lives: Lives,
    terminal: bool,
    /// Lines of the block on the screen, to go back over.
    n_drawn: usize,
    told: Option<Instant>,
}

impl View {
    pub(crate) fn new() -> View {
        View {
            started: None,
            last: None,
            met: None,
            traffic: None,
            bits_per_byte: None,
            speed: None,
            tasks: BTreeMap::new(),
            sample: None,
            notice: None,
            curve: Curve::default(),
            lives: Lives::default(),
            terminal: std::io::stdout().is_terminal(),
            n_drawn: 0,
            told: None,
        }
    }

    /// Takes an event that was seen before this view began: for the curve only.
    pub(crate) fn remember(&mut self, event: &Event) {
        self.curve.push(event);
        self.lives.event(event);
    }

    pub(crate) fn show(&mut self, event: &Event) {
        self.curve.push(event);
        self.lives.event(event);
        match event {
            Event::Started(started) => {
                self.started = Some(started.clone());
                if let (Some(why), Some(seconds)) = (&started.after, started.lost_seconds) {
                    self.warn(&format!("{why}; {} go on after {seconds:.2} s", started.n_ranks));
                }
                let Started { chats_cut: cut, chats_dropped: dropped, .. } = *started;
                if cut + dropped > 0 {
                    self.warn(&format!(
                        "{cut} chats are longer than a row and end with it, {dropped} are left out: nothing to learn is in \
                         their row (loquat data show prints rows)"
                    ));
                }
            }
            Event::Step(step) => {
                let speed = self.speed.unwrap_or(step.tokens_per_second);
                self.speed = Some(0.9 * speed + 0.1 * step.tokens_per_second);
                self.last = Some(step.clone());
            }
            Event::Round(round) => self.met = Some(round.clone()),
            Event::Links { links, seconds, .. } => {
                self.traffic = Some((traffic(links, self.lives.hosts()), *seconds));
            }
            Event::Eval { bits_per_byte, .. } => self.bits_per_byte = Some(*bits_per_byte),
            Event::Task { step, scores } => {
                self.tasks.insert(scores.task.clone(), (*step, scores.clone()));
                if !self.terminal {
                    println!("step {step}: {}", score_text(scores));
                }
            }
            Event::Sample { step, text } => self.sample = Some((*step, text.clone())),
            Event::Checkpoint { step, write_seconds, .. } => {
                self.notice =
                    Some(format!("checkpoint of step {step} ({write_seconds:.1} s beside the steps)"));
            }
            Event::Skipped { step, wrong, bad, rank, .. } => {
                let of_rank = rank.map_or(String::new(), |rank| format!(" on rank {rank}"));
                self.warn(&format!("step {step} skipped{of_rank}, {}: {bad}", wrong.text()));
            }
            Event::CheckpointRefused { step, why } => self.warn(&format!("checkpoint {step} refused: {why}")),
            Event::CheckpointFailed { step, why } => {
                self.warn(&format!("no checkpoint at step {step}: {why}"))
            }
            Event::TasksFailed { step, why } => self.warn(&format!("tasks not asked at step {step}: {why}")),
            Event::MetricsFailed { why, .. } => self.warn(&format!("metrics not written: {why}")),
            Event::Interrupted { step } => self.notice = Some(format!("stopped after step {step}, saved")),
            Event::Finished { .. } => self.notice = Some("finished".to_owned()),
        }
        let ends = matches!(event, Event::Interrupted { .. } | Event::Finished { .. });
        let every = if self.terminal { DRAW_EVERY } else { PLAIN_EVERY };
        let sample = !self.terminal && matches!(event, Event::Sample { .. } | Event::Started(_));
        if ends || sample || self.told.is_none_or(|t| t.elapsed() >= every) {
            self.told = Some(Instant::now());
            self.draw(sample);
        }
    }

    /// A line that stays, above the block.
    fn warn(&mut self, text: &str) {
        self.erase();
        println!("warning: {text}");
    }

    fn erase(&mut self) {
        if self.n_drawn > 0 {
            print!("\x1b[{}A\x1b[J", self.n_drawn);
            self.n_drawn = 0;
        }
    }

    fn draw(&mut self, with_sample: bool) {
        if !self.terminal {
            let mut lines = self.status();
            lines.truncate(6);
            if with_sample {
                lines.extend(self.sample_line());
            }
            for line in lines {
                println!("{line}");
            }
            return;
        }
        let mut lines = self.status();
        lines.extend(self.curve.terminal(CURVE_WIDTH, CURVE_HEIGHT));
        lines.extend(self.tasks_line());
        lines.extend(self.sample_line());
        lines.extend(self.notice.clone());
        self.erase();
        let width = terminal_width();
        for line in &lines {
            let line: String = line.chars().take(width.saturating_sub(1)).collect();
            println!("{line}");
        }
        self.n_drawn = lines.len();
        // A terminal that has gone away must not end the training that it only watches.
        let _ = std::io::stdout().flush();
    }

    fn status(&self) -> Vec<String> {
        let Some(started) = &self.started else {
            return vec!["starting…".to_owned()];
        };
        let step = self.last.as_ref().map_or(started.step, |s| s.step);
        let share = step as f64 / started.n_steps.max(1) as f64;
        let mut first = format!(
            "{} {} {:>3.0} %  step {step}/{}",
            started.run,
            bar(share, 24),
            share * 100.0,
            started.n_steps
        );
        let Some((last, speed)) = self.last.as_ref().zip(self.speed) else {
            let millions = started.n_params as f64 / 1e6;
            return vec![first, format!("{millions:.2} million parameters, {} ranks", started.n_ranks)];
        };
        let tokens_per_step = last.tokens as f64 / last.step.max(1) as f64;
        let left = (started.n_steps.saturating_sub(step)) as f64 * tokens_per_step / speed.max(1e-9);
        first += &format!("  {} left", duration(left));
        let peak = speed * started.flops_per_token / started.peak_flops.max(1.0);
        let validation =
            self.bits_per_byte.map_or(String::new(), |b| format!("  validation {b:.3} bits/byte"));
        let peak_gflops = started.peak_flops / 1e9;
        let second = format!(
            "loss {:.3}{validation}  {speed:.0} tokens/s  {:.0} % of this machine's {peak_gflops:.0} GFLOP/s",
            last.loss,
            peak * 100.0
        );
        let mut lines = vec![first, second];
        lines.extend(last.ranks.as_ref().map(|ranks| rank_line(ranks, last, &self.lives)));
        lines.extend(self.met.as_ref().map(|round| round_line(round, &self.lives)));
        lines.extend(self.traffic.as_ref().and_then(|(busiest, seconds)| links::line(busiest, *seconds)));
        lines.extend(self.lives.line(crate::now_unix_s() as f64));
        lines
    }

    fn tasks_line(&self) -> Option<String> {
        let (step, _) = self.tasks.values().next()?;
        let scores: Vec<String> = self.tasks.values().map(|(_, scores)| score_text(scores)).collect();
        Some(format!("step {step}: {}", scores.join("  ")))
    }

    fn sample_line(&self) -> Option<String> {
        let (step, text) = self.sample.as_ref()?;
        let flat: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let cut: String = flat.chars().take(SAMPLE_CHARS_MAX).collect();
        Some(format!("step {step} writes: {cut}"))
    }
}

/// The first metric is the usual one.
fn score_text(scores: &TaskScores) -> String {
    let metric = scores.metrics.first();
    let text = metric.map_or(String::new(), |m| format!(" {} {:.3} ± {:.3}", m.name, m.value, m.stderr));
    format!("{}{text}", scores.task)
}

fn rank_line(ranks: &Ranks, step: &Step, lives: &Lives) -> String {
    let step_seconds = (step.tokens as f64 / step.step.max(1) as f64 / step.tokens_per_second).max(1e-9);
    format!(
        "slowest: {}, {:.3} s of computing, {:.3} s in the middle; {:.0} % of the step waits for exchange, {:.0} % of \
         which is hidden, {:.0} MB/s sent",
        lives.name(ranks.slowest),
        ranks.slowest_seconds,
        ranks.median_seconds,
        100.0 * ranks.exchange_seconds / step_seconds,
        100.0 * ranks.hidden(),
        ranks.bytes_sent as f64 / 1e6 / step_seconds,
    )
}

fn round_line(round: &Round, lives: &Lives) -> String {
    let Round { step, n_steps, loss, moved, seconds, ranks } = round;
    let sent = ranks.as_ref().map_or(String::new(), |ranks| {
        format!(
            ", {:.2} MB sent; slowest: {}, {:.1} s of computing, {:.1} s in the middle",
            ranks.bytes_sent as f64 / 1e6,
            lives.name(ranks.slowest),
            ranks.slowest_seconds,
            ranks.median_seconds
        )
    });
    format!(
        "workers met after {n_steps} steps at step {step}: loss {loss:.3}, moved {moved:.3}, {seconds:.2} s{sent}"
    )
}

/// A bar of `width` cells of which `share` is full.
pub(crate) fn bar(share: f64, width: usize) -> String {
    let full = ((share.clamp(0.0, 1.0) * width as f64).round() as usize).min(width);
    format!("{}{}", "█".repeat(full), "░".repeat(width - full))
}

/// Overwrites the line that a terminal stands in. Progress is only for looking at.
pub(crate) fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        eprint!("\r\x1b[K{text}");
        // A terminal that is gone is no reason to stop.
        let _ = stderr.flush();
    }
}

pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

fn terminal_width() -> usize {
    std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_bars() {
        assert_eq!(duration(42.4), "42 s");
        assert_eq!(duration(125.0), "2 min 05 s");
        assert_eq!(duration(7265.0), "2 h 01 min");
        assert_eq!(bar(0.5, 4), "██░░");
        assert_eq!(bar(7.0, 2), "██");
    }

    #[test]
    fn status_tells_time_left_and_share_of_the_peak() {
        let mut view = View::new();
        view.terminal = false;
        let (n_steps, n_params) = (100, 3_000_000);
        let (flops_per_token, peak_flops) = (2e7, 2e11);
        let run = "r".to_owned();
        view.show(&Event::Started(Started {
            run,
            step: 0,
            n_steps,
            n_params,
            flops_per_token,
            peak_flops,
            n_ranks: 1,
            hosts: Vec::new(),
            chats_cut: 0,
            chats_dropped: 0,
            began_unix: 0.0,
            after: None,
            lost_seconds: None,
        }));
        view.show(&Event::Step(Step {
            step: 50,
            loss: 4.0,
            lr: 1e-3,
            grad_norm: 1.0,
            tokens: 50 * 4096,
            tokens_per_second: 5000.0,
            data_seconds: 0.0,
            elapsed_seconds: 41.0,
            margin: None,
            ranks: None,
        }));
        let status = view.status().join("\n");
        assert!(status.contains("step 50/100") && status.contains("41 s left"), "{status}");
        assert!(status.contains("50 % of this machine's 200 GFLOP/s"), "{status}");
    }
}
