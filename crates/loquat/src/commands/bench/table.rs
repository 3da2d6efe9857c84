//! The results of a bench, as text, Markdown or JSON lines.

use std::collections::BTreeMap;

use model::Weights;
use serde_json::json;

use crate::args::Output;
use crate::machine::{bytes_text, count_text};

/// One line: a test, how long each of its rounds took, and how long it would take at the machine's limit.
pub(super) struct Measured {
    pub(super) model: String,
    pub(super) kind: &'static str,
    pub(super) bytes: u64,
    pub(super) n_params: u64,
    pub(super) n_threads: usize,
    pub(super) kv: String,
    pub(super) test: String,
    pub(super) is_prompt: bool,
    pub(super) n_tokens: usize,
    /// Of every round; at least one.
    pub(super) seconds: Vec<f64>,
    pub(super) limit_seconds: f64,
    pub(super) bf16_per_s: f64,
    pub(super) memory_bytes_per_s: f64,
}

impl Measured {
    /// Median, least and most tokens a second.
    fn tokens_per_s(&self) -> [f64; 3] {
        let mut rates: Vec<f64> = self.seconds.iter().map(|s| self.n_tokens as f64 / s).collect();
        rates.sort_by(f64::total_cmp);
        let middle = rates.len() / 2;
        let median = if rates.len().is_multiple_of(2) {
            (rates[middle - 1] + rates[middle]) / 2.0
        } else {
            rates[middle]
        };
        [median, rates[0], rates[rates.len() - 1]]
    }

    /// Of the limit, at the median.
    fn share(&self) -> f64 {
        self.limit_seconds * self.tokens_per_s()[0] / self.n_tokens as f64
    }

    fn cells(&self) -> [String; 9] {
        let [median, least, most] = self.tokens_per_s();
        let limit = if self.is_prompt { "bf16 peak" } else { "memory read" };
        [
            self.model.clone(),
            self.kind.to_owned(),
            bytes_text(self.bytes),
            count_text(self.n_params),
            self.n_threads.to_string(),
            self.kv.clone(),
            self.test.clone(),
            format!("{median:.2} ({least:.2} – {most:.2})"),
            format!("{:.0} % of {limit}", self.share() * 100.0),
        ]
    }

    fn json(&self) -> serde_json::Value {
        let [median, least, most] = self.tokens_per_s();
        json!({
            "model": self.model, "kind": self.kind, "bytes": self.bytes, "params": self.n_params,
            "threads": self.n_threads, "kv": self.kv, "test": self.test, "tokens": self.n_tokens,
            "seconds": self.seconds, "tokens_per_s": median, "tokens_per_s_min": least,
            "tokens_per_s_max": most, "limit": if self.is_prompt { "bf16" } else { "memory" },
            "limit_share": self.share(), "bf16_per_s": self.bf16_per_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
        })
    }
}

const HEAD: [&str; 9] =
    ["model", "kind", "size", "params", "threads", "kv", "test", "tokens/s", "of the limit"];
/// Columns of the text form; a longer cell moves its own line only.
const WIDTHS: [usize; 9] = [36, 6, 9, 14, 7, 5, 18, 30, 0];

/// Prints every line as soon as it is known.
pub(super) struct Table {
    output: Output,
    /// The measured limits, by threads and model, for the last lines.
    limits: BTreeMap<(usize, String), [f64; 2]>,
}

impl Table {
    pub(super) fn begin(output: Output, cpu: &str) -> Table {
        match output {
            Output::Text => println!("{cpu}\n{}", text_line(&HEAD.map(str::to_owned))),
            Output::Markdown => println!("{cpu}\n\n| {} |\n|{}", HEAD.join(" | "), "---|".repeat(HEAD.len())),
            Output::Jsonl => {}
        }
        Table { output, limits: BTreeMap::new() }
    }

    pub(super) fn row(&mut self, row: &Measured) {
        self.limits.insert((row.n_threads, row.model.clone()), [row.bf16_per_s, row.memory_bytes_per_s]);
        match self.output {
            Output::Text => println!("{}", text_line(&row.cells())),
            Output::Markdown => println!("| {} |", row.cells().join(" | ")),
            Output::Jsonl => println!("{}", row.json()),
        }
    }

    pub(super) fn end(self) {
        if self.output != Output::Jsonl {
            println!();
            for ((n_threads, model), [bf16, memory]) in self.limits {
                println!(
                    "limits of {n_threads} threads, measured: {:.0} GFLOP/s bf16, {:.1} GB/s of reading what {model} reads",
                    bf16 / 1e9,
                    memory / 1e9
                );
            }
        }
    }
}

fn text_line(cells: &[String; 9]) -> String {
    let padded = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:<width$}"));
    padded.collect::<Vec<_>>().join(" ").trim_end().to_owned()
}

/// The kind that most of the bytes have.
pub(super) fn kind(weights: &Weights) -> &'static str {
    let mut bytes: BTreeMap<&'static str, usize> = BTreeMap::new();
    for tensor in weights.tensors.values() {
        *bytes.entry(tensor.kind.name()).or_default() += tensor.n_bytes();
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(kind, _)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(seconds: &[f64]) -> Measured {
        Measured {
            model: "m".into(),
            kind: "Q8_0",
            bytes: 1000,
            n_params: 2000,
            n_threads: 2,
            kv: "bf16".into(),
            test: "tg100".into(),
            is_prompt: false,
            n_tokens: 100,
            seconds: seconds.to_vec(),
            limit_seconds: 1.0,
            bf16_per_s: 1e12,
            memory_bytes_per_s: 1e10,
        }
    }

    #[test]
    fn a_line_has_the_median_the_spread_and_the_share() {
        let odd = measured(&[4.0, 2.0, 5.0]);
        assert_eq!(odd.tokens_per_s(), [25.0, 20.0, 50.0]);
        assert_eq!(odd.share(), 0.25);
        assert_eq!(measured(&[4.0, 2.0]).tokens_per_s()[0], 37.5);
        let line = text_line(&odd.cells());
        assert!(line.contains("25.00 (20.00 – 50.00)") && line.ends_with("25 % of memory read"), "{line}");
    }
}
