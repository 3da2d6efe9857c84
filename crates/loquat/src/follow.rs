//! Reading a log that another process still writes, line by line.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use telemetry::{TrainMetrics, TrainRanks, TrainStep};
use train::{Event, Ranks};

use crate::links::{Traffic, traffic};
use crate::lives::Lives;

/// The most that is read at once, and the longest line that is waited for.
const READ_BYTES_MAX: u64 = 1 << 20;

/// A place in a growing file.
pub(crate) struct Follow {
    offset: u64,
    /// The beginning of a line whose end is not written yet.
    partial: Vec<u8>,
}

impl Follow {
    /// Skips what is in the file already.
    pub(crate) fn from_end_of(path: Option<&Path>) -> Follow {
        let offset = path.and_then(|p| p.metadata().ok()).map_or(0, |m| m.len());
        Follow { offset, partial: Vec::new() }
    }

    /// The whole lines that have come since the last call. A file that is not there yet has none; one that has become
    /// shorter was begun anew.
    pub(crate) fn lines(&mut self, path: Option<&Path>) -> Result<Vec<String>> {
        let Some(path) = path else { return Ok(Vec::new()) };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        if file.metadata()?.len() < self.offset {
            self.offset = 0;
            self.partial.clear();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let n = file.take(READ_BYTES_MAX).read_to_end(&mut self.partial)?;
        self.offset += n as u64;
        let Some(end) = self.partial.iter().rposition(|b| *b == b'\n') else {
            if self.partial.len() as u64 > READ_BYTES_MAX {
                self.partial.clear();
            }
            return Ok(Vec::new());
        };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        Ok(String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect())
    }
}

/// A run's events as metrics of this process, where Prometheus looks.
pub(crate) struct Recorder {
    metrics: TrainMetrics,
    flops_per_token: f64,
    peak_flops: f64,
    tokens: Option<u64>,
    lives: Lives,
}

impl Recorder {
    pub(crate) fn new(metrics: TrainMetrics) -> Recorder {
        Recorder {
            metrics,
            flops_per_token: 0.0,
            peak_flops: f64::INFINITY,
            tokens: None,
            lives: Lives::default(),
        }
    }

    pub(crate) fn record(&mut self, event: &Event) {
        self.lives.event(event);
        match event {
            Event::Started(s) => (self.flops_per_token, self.peak_flops) = (s.flops_per_token, s.peak_flops),
            Event::Step(s) => {
                let n_tokens = s.tokens.saturating_sub(self.tokens.unwrap_or(s.tokens));
                self.tokens = Some(s.tokens);
                self.metrics.step(&TrainStep {
                    step: s.step,
                    n_tokens,
                    loss_nats: s.loss,
                    learning_rate: f64::from(s.lr),
                    grad_norm: s.grad_norm,
                });
                let share = s.tokens_per_second * self.flops_per_token / self.peak_flops;
                self.metrics.speed(s.tokens_per_second, share);
                self.ranks(s.ranks.as_ref());
            }
            Event::Round(round) => self.ranks(round.ranks.as_ref()),
            Event::Links { links, .. } => {
                for Traffic { from, to, bytes } in traffic(links, self.lives.hosts()) {
                    self.metrics.link(&from, &to, bytes);
                }
                self.goodput();
            }
            Event::Eval { bits_per_byte, .. } => self.metrics.validated(*bits_per_byte),
            Event::Task { scores, .. } => {
                for metric in &scores.metrics {
                    self.metrics.scored(&scores.task, &metric.name, metric.value, metric.stderr);
                }
            }
            Event::Checkpoint { bytes, seconds, .. } => {
                self.metrics.checkpointed(*bytes, *seconds);
                self.goodput();
            }
            _ => {}
        }
    }

    fn goodput(&self) {
        let now = crate::now_unix_s() as f64;
        let causes = self.lives.causes(now);
        let lost: Vec<(&str, f64)> = causes.iter().map(|(kind, _, seconds)| (*kind, *seconds)).collect();
        if let Some(share) = self.lives.goodput(now) {
            self.metrics.goodput(share, &lost);
        }
    }

    fn ranks(&self, ranks: Option<&Ranks>) {
        let Some(ranks) = ranks else { return };
        self.metrics.ranks(&TrainRanks {
            slowest: ranks.slowest,
            slowest_seconds: ranks.slowest_seconds,
            median_seconds: ranks.median_seconds,
            exchange_seconds: ranks.exchange_seconds,
            travel_seconds: ranks.travel_seconds,
            n_bytes: ranks.bytes_sent,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_come_whole_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Follow::from_end_of(Some(&path));
        assert!(log.lines(Some(&path)).unwrap().is_empty());
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(log.lines(Some(&path)).unwrap(), ["one"]);
        assert!(log.lines(Some(&path)).unwrap().is_empty());
        file.write_all(b"o\nthree\n").unwrap();
        assert_eq!(log.lines(Some(&path)).unwrap(), ["two", "three"]);
        std::fs::write(&path, "anew\n").unwrap();
        assert_eq!(log.lines(Some(&path)).unwrap(), ["anew"]);
        assert!(Follow::from_end_of(Some(&path)).lines(Some(&path)).unwrap().is_empty());
    }
}
