//! What guessing ahead from the text gains: the same chats with and without `--prompt-lookup`, and the same answers.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bench_serve::Server;

/// Guesses in a step at most.
const GUESSES: &str = "8";
const NEW_TOKENS: u32 = 200;
const ROUNDS: usize = 3;
/// Long enough for a slow machine.
const ANSWER_MAX: Duration = Duration::from_secs(300);
/// Words of the text that is to be quoted.
const QUOTED_WORDS: usize = 120;

/// A kind of answer: one that stands in its prompt, and one that does not, which must not become slower.
struct Task {
    name: &'static str,
    prompt: String,
}

/// The best of some rounds.
struct Answer {
    text: String,
    tokens_per_s: f64,
}

pub(crate) fn run(root: &Path, model: &str, text: &str) -> Result<()> {
    crate::run(root, "cargo", &["build", "--release", "--quiet", "--package", "loquat"])?;
    let tasks = tasks(&root.join(text))?;
    let plain = answers(root, model, "0", &tasks)?;
    let guessed = answers(root, model, GUESSES, &tasks)?;
    println!("{NEW_TOKENS} tokens, greedy, one client, best of {ROUNDS}");
    println!("answer | plain, tokens/s | with guesses | times");
    for ((task, plain), guessed) in tasks.iter().zip(plain).zip(guessed) {
        ensure!(plain.text == guessed.text, "{}: guesses changed the answer", task.name);
        let (before, after) = (plain.tokens_per_s, guessed.tokens_per_s);
        println!("{} | {before:.1} | {after:.1} | {:.2}", task.name, after / before);
    }
    Ok(())
}

fn tasks(texts: &Path) -> Result<[Task; 2]> {
    let mut paths: Vec<_> =
        std::fs::read_dir(texts)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    let text = std::fs::read_to_string(paths.first().context("no text")?)?;
    let quoted = text.split_whitespace().take(QUOTED_WORDS).collect::<Vec<_>>().join(" ");
    let quote = format!("Repeat this text word for word, and nothing else:\n\n{quoted}");
    let tell = "Tell a story of a fox who learns to swim.".to_owned();
    Ok([Task { name: "quoting", prompt: quote }, Task { name: "telling", prompt: tell }])
}

fn answers(root: &Path, model: &str, n_guesses: &str, tasks: &[Task]) -> Result<Vec<Answer>> {
    crate::bench_serve::with_ours(root, model, &["--prompt-lookup", n_guesses], |server, name| {
        tasks.iter().map(|task| best_answer(server, name, &task.prompt)).collect()
    })
}

fn best_answer(server: &Server, model: &str, prompt: &str) -> Result<Answer> {
    let config = ureq::Agent::config_builder().timeout_global(Some(ANSWER_MAX)).build();
    let agent = ureq::Agent::new_with_config(config);
    let mut best = Answer { text: String::new(), tokens_per_s: 0.0 };
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let body = json!({
            "model": model, "temperature": 0, "max_tokens": NEW_TOKENS,
            "messages": [{ "role": "user", "content": prompt }],
        });
        let request = agent.post(format!("{}/v1/chat/completions", server.url));
        let mut response = request.content_type("application/json").send(body.to_string())?;
        let answer: Value = serde_json::from_str(&response.body_mut().read_to_string()?)?;
        let text = answer["choices"][0]["message"]["content"].as_str().context("an answer without text")?;
        let n_tokens = answer["usage"]["completion_tokens"].as_f64().context("an answer without usage")?;
        best.text = text.to_owned();
        best.tokens_per_s = best.tokens_per_s.max(n_tokens / started.elapsed().as_secs_f64());
    }
    Ok(best)
}
