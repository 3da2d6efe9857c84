//! What a run reports while it goes on. One definition is the line in the metrics log, the line a job
//! writes for whoever watches it, and what the terminal view and the console draw.

use serde::{Deserialize, Serialize};

use crate::Wrong;
use crate::rank::Times;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run begins, or goes on from the checkpoint of `step`.
    Started(Started),
    Step(Step),
    /// Workers that train by themselves have met (DiLoCo).
    Round(Round),
    /// Bytes that ranks have sent to each other since this was last told, the busiest links first.
    Links {
        step: u64,
        seconds: f64,
        links: Vec<Link>,
    },
    /// A step that went wrong and changed nothing.
    Skipped {
        step: u64,
        wrong: Wrong,
        /// Where it is a number.
        loss: Option<f64>,
        grad_norm: Option<f64>,
        bad: BadBatch,
        /// Where several ranks share the step, the one that brought what is wrong.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rank: Option<usize>,
        /// Since the run began.
        n_skipped: u64,
    },
    /// Loss on held-out rows: a token's, or where pairs are judged a pair's; of several datasets the mean by their weights.
    Eval {
        step: u64,
        nats_per_token: f64,
        bits_per_byte: f64,
        /// Each of several datasets.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        parts: Vec<EvalPart>,
    },
    /// What the model as it is now scores on a task.
    Task {
        step: u64,
        #[serde(flatten)]
        scores: TaskScores,
    },
    /// A continuation written by the model as it is now.
    Sample {
        step: u64,
        text: String,
    },
    /// A checkpoint of `step` is published; `seconds` is how long training stood still for it: 0 where it was copied by
    /// the next step's update.
    Checkpoint {
        step: u64,
        bytes: u64,
        seconds: f64,
        /// From the copy of the state until it was there, beside the steps.
        #[serde(default)]
        write_seconds: f64,
    },
    /// A checkpoint could not be read; the one before it is tried.
    CheckpointRefused {
        step: u64,
        why: String,
    },
    /// A checkpoint could not be written; training goes on.
    CheckpointFailed {
        step: u64,
        why: String,
    },
    /// Metrics or a sample could not be written; training goes on.
    MetricsFailed {
        step: u64,
        why: String,
    },
    /// Not all tasks could be asked; training goes on.
    TasksFailed {
        step: u64,
        why: String,
    },
    /// Stopped on request with everything up to `step` in a checkpoint.
    Interrupted {
        step: u64,
    },
    /// All steps are done; `model` is the name it was published under.
    Finished {
        step: u64,
        model: Option<String>,
    },
}

/// What a run says of itself when it starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    pub run: String,
    /// Steps finished before.
    pub step: u64,
    pub n_steps: u64,
    pub n_params: u64,
    /// Floating-point operations of the model itself for one token, forward and backward.
    pub flops_per_token: f64,
    /// What this machine can do at most, measured: floating-point operations a second.
    pub peak_flops: f64,
    pub n_ranks: u64,
    /// The machine of each, where they are processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Chats that are longer than a row and end with it, and those of which nothing to learn is left.
    #[serde(default)]
    pub chats_cut: u64,
    #[serde(default)]
    pub chats_dropped: u64,
    /// When this life of the run began; 0 in runs of older builds.
    #[serde(default)]
    pub began_unix: f64,
    /// What ended the life before, where a supervisor knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// How long it took from the last step of the life before, where those that are left of its ranks went on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_seconds: Option<f64>,
}

/// One optimizer step. `step` counts finished steps: the first is 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub step: u64,
    /// Mean of the objective over the step's tokens, or pairs, in nats.
    pub loss: f64,
    pub lr: f32,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Tokens trained on since the run began.
    pub tokens: u64,
    pub tokens_per_second: f64,
    /// Time the step waited for its data.
    pub data_seconds: f64,
    /// Seconds of training since the run began, without the time it was stopped.
    pub elapsed_seconds: f64,
    /// Where pairs are judged: by how much the better one is ahead, on average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
    /// Where several ranks share the step: how well they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<Ranks>,
}

/// Steps that workers took by themselves, and their meeting. (The steps between are told as the first worker took them.)
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// The last of its steps.
    pub step: u64,
    pub n_steps: u64,
    /// Mean over what all workers have learned from in it.
    pub loss: f64,
    /// Norm of their mean difference to where it began.
    pub moved: f64,
    /// How long they met, waiting for the last one among it.
    pub seconds: f64,
    /// Where they are on several ranks: the round as these went through it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<Ranks>,
}

/// A step as its ranks went through it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ranks {
    /// The rank that computed longest, and how long; and the median of all.
    pub slowest: usize,
    pub slowest_seconds: f64,
    pub median_seconds: f64,
    /// How long the exchange of gradients was waited for: by the rank that came last, since the others waited for it.
    pub exchange_seconds: f64,
    /// How long they travelled, most of it while others were computed: of that rank, too.
    #[serde(default)]
    pub travel_seconds: f64,
    /// Sent by all ranks together since the step before.
    pub bytes_sent: u64,
}

impl Ranks {
    pub(crate) fn of(ranks: &[Times]) -> Ranks {
        let least = |at: usize| ranks.iter().map(|rank| rank[at]).fold(f64::INFINITY, f64::min);
        let mut order: Vec<usize> = (0..ranks.len()).collect();
        order.sort_by(|a, b| ranks[*a][0].total_cmp(&ranks[*b][0]));
        let slowest = order.last().copied().unwrap_or_default();
        Ranks {
            slowest,
            slowest_seconds: ranks[slowest][0],
            // Of two the faster: a rank is never compared with itself.
            median_seconds: ranks[order[(order.len() - 1) / 2]][0],
            exchange_seconds: least(1),
            travel_seconds: least(4),
            bytes_sent: ranks.iter().map(|rank| rank[2] as u64).sum(),
        }
    }

    /// Of the time in which gradients travelled the share in which something was computed.
    pub fn hidden(&self) -> f64 {
        match self.travel_seconds > 0.0 {
            true => (1.0 - self.exchange_seconds / self.travel_seconds).clamp(0.0, 1.0),
            false => 1.0,
        }
    }
}

/// Bytes from one rank to another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub from: usize,
    pub to: usize,
    pub bytes: u64,
}

/// Held-out loss on one of several datasets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalPart {
    pub dataset: String,
    pub nats_per_token: f64,
    pub bits_per_byte: f64,
}

/// What came out of a task, the usual metric first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskScores {
    pub task: String,
    pub items: usize,
    /// Sequences that were too long for the model and lost their beginning.
    pub truncated: usize,
    pub metrics: Vec<Score>,
}

/// A mean over items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub name: String,
    pub value: f64,
    /// Of the mean.
    pub stderr: f64,
}

/// The micro-batch that made a step go wrong, or lost most in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BadBatch {
    pub micro_batch: usize,
    /// In the order of the run's data.
    pub first_row: u64,
    /// Of each row the dataset and its index in that dataset's order.
    pub from: Vec<(String, u64)>,
}

impl std::fmt::Display for BadBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows: Vec<String> = self.from.iter().map(|(dataset, row)| format!("{dataset} {row}")).collect();
        let last = self.first_row + self.from.len() as u64;
        let (first, micro_batch) = (self.first_row, self.micro_batch);
        write!(f, "micro-batch {micro_batch}, rows {first}..{last} of the data's order: {}", rows.join(", "))
    }
}

impl Event {
    /// The step that the event speaks of.
    pub fn step(&self) -> u64 {
        match self {
            Event::Step(s) => s.step,
            Event::Round(r) => r.step,
            Event::Started(s) => s.step,
            Event::Eval { step, .. }
            | Event::Skipped { step, .. }
            | Event::Task { step, .. }
            | Event::Sample { step, .. }
            | Event::Links { step, .. }
            | Event::Checkpoint { step, .. }
            | Event::CheckpointRefused { step, .. }
            | Event::CheckpointFailed { step, .. }
            | Event::MetricsFailed { step, .. }
            | Event::TasksFailed { step, .. }
            | Event::Interrupted { step }
            | Event::Finished { step, .. } => *step,
        }
    }

    /// The event as one line of JSON, without the line end.
    pub fn to_line(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|e| panic!("an event is plain data: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_rank_is_named() {
        let ranks =
            Ranks::of(&[[1.0, 2.5, 10.0, 0.1, 3.0], [3.0, 0.5, 20.0, 0.1, 2.0], [1.5, 2.0, 30.0, 0.1, 2.5]]);
        assert_eq!((ranks.travel_seconds, ranks.hidden()), (2.0, 0.75));
        let Ranks { slowest, slowest_seconds, median_seconds, exchange_seconds, bytes_sent, .. } = ranks;
        assert_eq!((slowest, slowest_seconds, median_seconds), (1, 3.0, 1.5));
        assert_eq!((exchange_seconds, bytes_sent), (0.5, 60));
    }

    #[test]
    fn a_line_reads_back() {
        let step = Step {
            step: 3,
            loss: 2.5,
            lr: 1e-3,
            grad_norm: 0.7,
            tokens: 4096,
            tokens_per_second: 100.0,
            data_seconds: 0.0,
            elapsed_seconds: 1.5,
            margin: None,
            ranks: None,
        };
        let event = Event::Step(step);
        let line = event.to_line();
        assert!(line.starts_with(r#"{"event":"step","step":3,"loss":2.5"#), "{line}");
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }
}
