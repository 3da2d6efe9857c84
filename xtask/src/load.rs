//! A load on an OpenAI server: clients that stream completions one after another, and what they saw.
//!
//! Prompts are token ids that no two requests share, so that no server's prefix cache helps, and answers have an exact
//! length (`ignore_eos`). Any server that takes such prompts can be measured: ours, llama-server, vLLM.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long one answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(600);

/// What is asked of the server.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) n_clients: usize,
    /// Answers that each client waits for, one after another.
    pub(crate) n_rounds: usize,
    pub(crate) prompt_tokens: usize,
    pub(crate) new_tokens: usize,
}

/// What the clients saw.
pub(crate) struct Report {
    pub(crate) tokens_per_s: f64,
    /// Sorted; of every answer.
    first_token: Vec<Duration>,
    /// Sorted; between pieces of one answer.
    gaps: Vec<Duration>,
}

impl Report {
    pub(crate) fn first_token_p(&self, percent: usize) -> Duration {
        percentile(&self.first_token, percent)
    }

    pub(crate) fn gap_p(&self, percent: usize) -> Duration {
        percentile(&self.gaps, percent)
    }
}

impl Load {
    /// Puts the load on the server at `url` (without `/v1`). `salt` makes this run's prompts differ from another's.
    pub(crate) fn run(self, url: &str, model: &str, salt: u64) -> Result<Report> {
        let started = Instant::now();
        let client = |client: usize| -> Result<Vec<Answer>> {
            let agent = agent();
            let seed = |round: usize| salt << 32 | (client * self.n_rounds + round) as u64;
            (0..self.n_rounds).map(|round| self.ask(&agent, url, model, seed(round))).collect()
        };
        let answers: Vec<Answer> = std::thread::scope(|scope| {
            let client = &client;
            let clients: Vec<_> = (0..self.n_clients).map(|i| scope.spawn(move || client(i))).collect();
            let joined = clients.into_iter().map(|c| c.join().expect("a client does not panic"));
            joined.collect::<Result<Vec<_>>>().map(|answers| answers.into_iter().flatten().collect())
        })?;
        let wall = started.elapsed();
        let n_tokens: u64 = answers.iter().map(|a| a.n_tokens).sum();
        let expected = (self.n_clients * self.n_rounds * self.new_tokens) as u64;
        ensure!(n_tokens == expected, "{n_tokens} tokens came, {expected} were asked for");
        let mut first_token: Vec<_> = answers.iter().map(|a| a.first_token).collect();
        let mut gaps: Vec<_> = answers.into_iter().flat_map(|a| a.gaps).collect();
        first_token.sort();
        gaps.sort();
        Ok(Report { tokens_per_s: n_tokens as f64 / wall.as_secs_f64(), first_token, gaps })
    }

    fn ask(self, agent: &ureq::Agent, url: &str, model: &str, seed: u64) -> Result<Answer> {
        let body = json!({
            "model": model, "prompt": prompt(seed, self.prompt_tokens), "max_tokens": self.new_tokens,
            "temperature": 0, "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        });
        let asked = Instant::now();
        let mut response = agent
            .post(format!("{url}/v1/completions"))
            .header("content-type", "application/json")
            .send(body.to_string())?;
        if response.status() != 200 {
            bail!("{}: {}", response.status(), response.body_mut().read_to_string()?);
        }
        let (mut pieces, mut n_tokens) = (Vec::new(), None);
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let line = line.context("the answer broke off")?;
            let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else { continue };
            let event: Value = serde_json::from_str(data)?;
            if event["choices"].as_array().is_some_and(|choices| !choices.is_empty()) {
                pieces.push(asked.elapsed());
            }
            n_tokens = event["usage"]["completion_tokens"].as_u64().or(n_tokens);
        }
        let first_token = *pieces.first().context("an answer without a piece")?;
        let gaps = pieces.windows(2).map(|pair| pair[1] - pair[0]).collect();
        Ok(Answer { first_token, gaps, n_tokens: n_tokens.context("an answer without usage")? })
    }
}

struct Answer {
    first_token: Duration,
    gaps: Vec<Duration>,
    n_tokens: u64,
}

fn agent() -> ureq::Agent {
    // Every request on a connection of its own: llama-server closes some that it said it would keep.
    let config = ureq::Agent::config_builder().timeout_global(Some(ANSWER_MAX)).http_status_as_error(false);
    config.max_idle_connections(0).build().into()
}

/// Ids in 1,000 .. 40,000: ordinary words in every vocabulary of today.
fn prompt(seed: u64, n_tokens: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        1000 + (state % 39_000) as u32
    };
    std::iter::repeat_with(next).take(n_tokens).collect()
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get((sorted.len() * percent / 100).min(last)).copied().unwrap_or_default()
}
