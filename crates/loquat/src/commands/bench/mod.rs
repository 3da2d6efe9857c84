//! `loquat bench`: tokens a second of prompts and of generation, with the share of this machine's limit that they reach.
//!
//! Tests have llama-bench's names: `pp512` computes a prompt of 512 tokens, `tg128` generates 128 tokens one step at a
//! time; `b8` says for how many streams at once, `d4096` how many tokens each has behind it.

mod table;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use model::{Transformer, Weights};
use tensor::Pool;
use tensor::limits::{Limits, measure, read_bytes_per_s};

use crate::args;
use crate::home::Home;
use crate::session::{self, Row, Session};
use crate::view::progress;
use table::{Measured, Table};

/// Tokens of one step of a long prompt, as the engine cuts it.
const STEP_TOKENS: usize = 512;
/// Generating is held against reading as many bytes as a step reads, again and again: weights that fit in the last-level cache
/// come from there. At most so many, which no cache holds.
const READ_MAX: usize = 2 << 30;
/// Bounds of what can be asked for.
const LIST_MAX: usize = 32;
const STREAMS_MAX: usize = 1024;
const REPETITIONS_MAX: usize = 1000;
/// Tokens of the check before the first test.
const CHECKED_TOKENS: usize = 24;

pub(crate) fn run(home: &Home, args: &args::Bench) -> Result<ExitCode> {
    check_args(args)?;
    let threads = if args.threads.is_empty() { vec![crate::n_threads()] } else { args.threads.clone() };
    let mut table = Table::begin(args.output, &tensor::cpu::describe());
    for model in &args.models {
        let path = super::model::resolve(home, model)?;
        let loader = Pool::new(threads.iter().copied().max().unwrap_or(1));
        let (transformer, loaded) = session::load(&path, &loader)?;
        drop(loader);
        for &n_threads in &threads {
            let pool = Pool::new(n_threads);
            let memory_bytes_per_s = read_bytes_per_s(&pool, transformer.bytes_per_token().min(READ_MAX));
            let limits = Limits { memory_bytes_per_s, ..measure(&pool) };
            let bench = Bench { args, model: &transformer, pool: &pool, limits, weights: &loaded.weights };
            bench.check().with_context(|| format!("{} cannot be trusted", path.display()))?;
            bench.run(&super::model::name_of(model), &mut table)?;
        }
    }
    table.end();
    Ok(ExitCode::SUCCESS)
}

fn check_args(args: &args::Bench) -> Result<()> {
    for (flag, list) in [
        ("--prompt", &args.prompt),
        ("--generate", &args.generate),
        ("--batch", &args.batch),
        ("--depth", &args.depth),
        ("--threads", &args.threads),
    ] {
        if list.len() > LIST_MAX {
            bail!("{flag} has {} values, at most {LIST_MAX} are taken", list.len());
        }
    }
    if let Some(b) = args.batch.iter().find(|b| !(1..=STREAMS_MAX).contains(*b)) {
        bail!("--batch {b} is not between 1 and {STREAMS_MAX}");
    }
    if let Some(t) = args.threads.iter().find(|t| !(1..=STREAMS_MAX).contains(*t)) {
        bail!("--threads {t} is not between 1 and {STREAMS_MAX}");
    }
    if !(1..=REPETITIONS_MAX).contains(&args.repetitions) {
        bail!("--repetitions {} is not between 1 and {REPETITIONS_MAX}", args.repetitions);
    }
    Ok(())
}

/// One test of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    Prompt { n: usize, depth: usize },
    Generate { n: usize, streams: usize, depth: usize },
}

impl Test {
    fn name(self) -> String {
        let at = |depth: usize| if depth > 0 { format!(" @ d{depth}") } else { String::new() };
        match self {
            Test::Prompt { n, depth } => format!("pp{n}{}", at(depth)),
            Test::Generate { n, streams: 1, depth } => format!("tg{n}{}", at(depth)),
            Test::Generate { n, streams, depth } => format!("tg{n} b{streams}{}", at(depth)),
        }
    }

    fn streams(self) -> usize {
        match self {
            Test::Prompt { .. } => 1,
            Test::Generate { streams, .. } => streams,
        }
    }

    /// Positions every stream has in the end.
    fn positions(self) -> usize {
        match self {
            Test::Prompt { n, depth } | Test::Generate { n, depth, .. } => n + depth,
        }
    }

    fn depth(self) -> usize {
        match self {
            Test::Prompt { depth, .. } | Test::Generate { depth, .. } => depth,
        }
    }
}

fn tests(args: &args::Bench) -> Vec<Test> {
    let mut tests = Vec::new();
    for &depth in &args.depth {
        tests.extend(args.prompt.iter().filter(|n| **n > 0).map(|&n| Test::Prompt { n, depth }));
        for &streams in &args.batch {
            let generate = |&n: &usize| Test::Generate { n, streams, depth };
            tests.extend(args.generate.iter().filter(|n| **n > 0).map(generate));
        }
    }
    tests
}

struct Bench<'a> {
    args: &'a args::Bench,
    model: &'a Transformer,
    pool: &'a Pool,
    limits: Limits,
    weights: &'a Weights,
}

impl Bench<'_> {
    /// The model must give finite logits, and the same ones for a prompt computed at once and token by token.
    fn check(&self) -> Result<()> {
        let kv = self.args.kv.kv_type();
        let n = CHECKED_TOKENS.min(self.model.context_max());
        let mut session = Session::new(self.model, self.pool, kv, 2, n)?;
        let tokens: Vec<u32> = (0..n).map(|p| self.token(0, p)).collect();
        let whole = session.step(&[Row { stream: 0, tokens: &tokens, n_cached: 0, n_logits: 1 }])?.to_vec();
        if let Some(bad) = whole.iter().find(|x| !x.is_finite()) {
            bail!("it gives a logit of {bad}");
        }
        for (p, token) in tokens.chunks(1).enumerate() {
            let logits = session.step(&[Row { stream: 1, tokens: token, n_cached: p, n_logits: 1 }])?;
            if p + 1 == n && logits != whole {
                bail!("{n} tokens give other logits at once than one by one");
            }
        }
        Ok(())
    }

    fn run(&self, name: &str, table: &mut Table) -> Result<()> {
        let tests = tests(self.args);
        let streams = tests.iter().map(|t| t.streams()).max().unwrap_or(0);
        // Streams of tests that need fewer positions than others would waste memory if all had a cache of their own.
        let mut caches = Caches { session: None, filled: Vec::new() };
        for test in tests {
            let widest = self.args.batch.iter().copied().filter(|b| *b <= streams).max().unwrap_or(1);
            self.prepare(&mut caches, test, widest)?;
            let mut seconds = Vec::with_capacity(self.args.repetitions);
            // The first round warms caches and buffers.
            for round in 0..=self.args.repetitions {
                progress(&format!("{name} {} {round}/{}", test.name(), self.args.repetitions));
                let took = self.time(caches.session()?, test)?;
                seconds.extend((round > 0).then_some(took));
            }
            progress("");
            table.row(&self.measured(name, test, seconds));
        }
        Ok(())
    }

    /// A cache with room for the test, and `depth` tokens in each of its streams.
    fn prepare<'b>(&'b self, caches: &mut Caches<'b>, test: Test, widest: usize) -> Result<()> {
        if caches.session.is_none() {
            let positions = tests(self.args).iter().map(|t| t.positions()).max().unwrap_or(1);
            let kv = self.args.kv.kv_type();
            caches.session = Some(Session::new(self.model, self.pool, kv, widest, positions)?);
            caches.filled = vec![0; widest];
        }
        for stream in 0..test.streams() {
            while caches.filled[stream] < test.depth() {
                let first = caches.filled[stream];
                let end = (first + STEP_TOKENS).min(test.depth());
                progress(&format!("stream {stream}: {first} of {} tokens", test.depth()));
                self.prompt(caches.session()?, stream, first, end)?;
                caches.filled[stream] = end;
            }
        }
        Ok(())
    }

    /// Seconds of one round of the test.
    fn time(&self, session: &mut Session, test: Test) -> Result<f64> {
        let start = Instant::now();
        match test {
            Test::Prompt { n, depth } => {
                for first in (depth..depth + n).step_by(STEP_TOKENS) {
                    self.prompt(session, 0, first, (first + STEP_TOKENS).min(depth + n))?;
                }
            }
            Test::Generate { n, streams, depth } => {
                for p in depth..depth + n {
                    let tokens: Vec<u32> = (0..streams).map(|stream| self.token(stream, p)).collect();
                    let row = |(stream, token)| Row { stream, tokens: token, n_cached: p, n_logits: 1 };
                    let rows: Vec<Row> = tokens.chunks(1).enumerate().map(row).collect();
                    session.step(&rows)?;
                }
            }
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// Computes positions `first..end` of a stream in one step.
    fn prompt(&self, session: &mut Session, stream: usize, first: usize, end: usize) -> Result<()> {
        let tokens: Vec<u32> = (first..end).map(|p| self.token(stream, p)).collect();
        session.step(&[Row { stream, tokens: &tokens, n_cached: first, n_logits: 1 }])?;
        Ok(())
    }

    /// Spread over the vocabulary, and a function of the place alone: what one test has left in the cache is right for
    /// the next one.
    fn token(&self, stream: usize, position: usize) -> u32 {
        ((position * 7919 + stream * 104_729 + 17) % self.model.config().vocab) as u32
    }

    fn measured(&self, name: &str, test: Test, seconds: Vec<f64>) -> Measured {
        let (n_tokens, limit) = match test {
            Test::Prompt { n, depth } => (n, self.flops(n, depth) / self.limits.bf16_per_s),
            Test::Generate { n, streams, depth } => {
                (n * streams, self.bytes(n, streams, depth) / self.limits.memory_bytes_per_s)
            }
        };
        Measured {
            model: name.to_owned(),
            kind: table::kind(self.weights),
            bytes: self.weights.n_bytes() as u64,
            n_params: self.weights.n_params() as u64,
            n_threads: self.pool.n_threads(),
            kv: format!("{:?}", self.args.kv).to_lowercase(),
            test: test.name(),
            is_prompt: matches!(test, Test::Prompt { .. }),
            n_tokens,
            seconds,
            limit_seconds: limit,
            bf16_per_s: self.limits.bf16_per_s,
            memory_bytes_per_s: self.limits.memory_bytes_per_s,
        }
    }

    /// Operations of a prompt: two for each weight that a token meets, and 4 · t · h · d a layer for attention. Only the
    /// last token of a step meets the head, which is left out.
    fn flops(&self, n: usize, depth: usize) -> f64 {
        let config = self.model.config();
        let n_embeddings = if config.tied_embeddings { 1 } else { 2 };
        let matrices = config.n_params() - n_embeddings * config.vocab * config.width;
        let context: f64 = (depth..depth + n).map(|p| (p + 1) as f64).sum();
        2.0 * (n * matrices) as f64 + 4.0 * context * (config.n_layers * config.q_width()) as f64
    }

    /// Bytes that generating has to read: all weights once a step, keys and values once a token.
    fn bytes(&self, n: usize, streams: usize, depth: usize) -> f64 {
        let per_position = self.model.kv_block_bytes(self.args.kv.kv_type()) / model::BLOCK_TOKENS;
        let context: f64 = (depth..depth + n).map(|p| (p + 1) as f64).sum();
        (n * self.model.bytes_per_token()) as f64 + streams as f64 * context * per_position as f64
    }
}

/// The cache, and how many positions of each stream hold what they should.
struct Caches<'a> {
    session: Option<Session<'a>>,
    filled: Vec<usize>,
}

impl<'a> Caches<'a> {
    fn session(&mut self) -> Result<&mut Session<'a>> {
        self.session.as_mut().context("no cache was prepared")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_have_llama_bench_names() {
        assert_eq!(Test::Prompt { n: 512, depth: 0 }.name(), "pp512");
        assert_eq!(Test::Prompt { n: 512, depth: 4096 }.name(), "pp512 @ d4096");
        assert_eq!(Test::Generate { n: 128, streams: 1, depth: 0 }.name(), "tg128");
        assert_eq!(Test::Generate { n: 128, streams: 8, depth: 64 }.name(), "tg128 b8 @ d64");
    }
}
