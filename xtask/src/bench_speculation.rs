//! What guessing ahead gains: the same chats without guesses, with those of `--prompt-lookup`, and with those of a draft model
//! that is the model itself in fewer bits. The answers must be the same.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bench_serve::Server;

/// Guesses in a step at most.
const GUESSES: &str = "8";
/// Weights of the models that are guessed for, and of the model that guesses.
const TARGETS: [&str; 2] = ["BF16", "Q8_0"];
const DRAFT: &str = "Q4_0";
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

/// Answers to all tasks, how often something was guessed for them, and how often the first guess was right.
struct Answers {
    answers: Vec<Answer>,
    n_drafts: f64,
    n_right: f64,
}

pub(crate) fn run(root: &Path, model: &str, text: &str) -> Result<()> {
    crate::run(root, "cargo", &["build", "--release", "--quiet", "--package", "loquat"])?;
    let tasks = tasks(&root.join(text))?;
    let plain = answers(root, model, &[], &tasks)?;
    let guessed = answers(root, model, &["--prompt-lookup", GUESSES], &tasks)?;
    println!("{NEW_TOKENS} tokens, greedy, one client, best of {ROUNDS}");
    println!("guesses from the text:");
    compare(&tasks, &plain, &guessed)?;
    let dir = std::env::temp_dir().join(format!("loquat-drafts-{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let done = drafts(root, model, &dir, &tasks);
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    done
}

/// The model in many bits, guessed for by itself in few: no other model has its vocabulary.
fn drafts(root: &Path, model: &str, dir: &Path, tasks: &[Task]) -> Result<()> {
    let draft = quantize(root, model, DRAFT, dir)?;
    let alone = answers(root, &draft, &[], tasks)?;
    for kind in TARGETS {
        let target = quantize(root, model, kind, dir)?;
        let plain = answers(root, &target, &[], tasks)?;
        let guessed = answers(root, &target, &["--model-draft", &draft, "--draft-max", GUESSES], tasks)?;
        println!("guesses of {DRAFT} for {kind}:");
        compare(tasks, &plain, &guessed)?;
        println!("{}", worth(&plain, &alone, &guessed));
    }
    Ok(())
}

/// What theory says, if verifying several tokens takes as long as one: with a share `r` of right guesses, each at a part `c`
/// of a step, one more guess is worth it while r^i > c, and the first gains (1 + r) / (1 + c).
fn worth(plain: &Answers, draft: &Answers, guessed: &Answers) -> String {
    let speed = |answers: &Answers| answers.answers.iter().map(|a| a.tokens_per_s).sum::<f64>();
    let cost = speed(plain) / speed(draft);
    let right = guessed.n_right / guessed.n_drafts.max(1.0);
    let best = (1..=32).map(|k| expected(right, k) / (1.0 + f64::from(k) * cost)).fold(1.0, f64::max);
    format!(
        "{} drafts, of {:.0} % the first guess right; a guess costs {:.0} % of a step, the break-even; at best {best:.2} times",
        guessed.n_drafts,
        right * 100.0,
        cost * 100.0
    )
}

/// Tokens of a step with `k` guesses that are right at a rate of `right` each.
fn expected(right: f64, k: i32) -> f64 {
    (0..=k).map(|i| right.powi(i)).sum()
}

fn quantize(root: &Path, model: &str, kind: &str, dir: &Path) -> Result<String> {
    let path: PathBuf = dir.join(format!("bench-{}.gguf", kind.to_lowercase()));
    let path = path.to_str().context("the temporary directory has no name in UTF-8")?.to_owned();
    let home = dir.join("home");
    let home = home.to_str().context("the temporary directory has no name in UTF-8")?;
    let args = ["model", "quantize", "--home", home, "--pure", model, kind, &path];
    crate::run(root, "target/release/loquat", &args)?;
    Ok(path)
}

fn compare(tasks: &[Task], plain: &Answers, guessed: &Answers) -> Result<()> {
    println!("answer | plain, tokens/s | with guesses | times");
    for ((task, plain), guessed) in tasks.iter().zip(&plain.answers).zip(&guessed.answers) {
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

fn answers(root: &Path, model: &str, flags: &[&str], tasks: &[Task]) -> Result<Answers> {
    crate::bench_serve::with_ours(root, model, flags, |server, name| {
        let answers =
            tasks.iter().map(|task| best_answer(server, name, &task.prompt)).collect::<Result<_>>()?;
        let metrics = ureq::get(format!("{}/metrics", server.url)).call()?.body_mut().read_to_string()?;
        let count = |name: &str, label: &str| {
            let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(label));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
        };
        let n_drafts = count("vllm:spec_decode_num_drafts_total", "");
        let n_right = count("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position=\"0\"");
        Ok(Answers { answers, n_drafts, n_right })
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
