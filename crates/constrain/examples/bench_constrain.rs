//! What constrained output adds to a step: 32 streams held to a JSON schema beside 32 free ones, against 64 free ones.
//!
//! `cargo run --release -p constrain --example bench_constrain -- MODEL.gguf [THREADS]`
//!
//! Before anything is timed, it checks that a constrained answer is a prefix of valid JSON. Rounds of both kinds take
//! turns, and the smallest of each counts, because other programs may share the machine.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use constrain::{Grammars, Source};
use engine::{Constraint, Engine, EngineLimits, Event, ModelRunner, Request, Sampling, Stats};
use model::TokenizerFiles;
use serde_json::{Value, json};
use telemetry::Metrics;
use tensor::Pool;
use tokenizer::Tokenizer;

const STREAMS: usize = 64;
const NEW_TOKENS: usize = 64;
const ROUNDS: usize = 3;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: bench_constrain MODEL.gguf [THREADS]")?;
    let n_threads = args.next().map_or(Ok(2), |n| n.parse())?;
    let loaded = model::load(Path::new(&path))?;
    let TokenizerFiles::Gguf(vocab) = &loaded.tokenizer else {
        return Err("the model is no GGUF file".into());
    };
    let tokenizer = Tokenizer::from_gguf(vocab)?;
    let engine = start(loaded, n_threads)?;
    let grammars =
        Grammars::new(&tokenizer, engine.vocab(), &tokenizer.eos().into_iter().collect::<Vec<_>>());
    let prompt = tokenizer.encode("Weather reports of the last days, as JSON:\n");

    println!(
        "first grammar {:?}, another {:?}, from the cache {:?}",
        times(&grammars, 0)?,
        times(&grammars, 1)?,
        times(&grammars, 1)?
    );
    let constraint = grammars.compile(&Source::JsonSchema(reports(0)))?;
    check(&engine, &tokenizer, &prompt, &*constraint)?;
    let (mut free, mut mixed) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        free.push(round(&engine, &prompt, None));
        mixed.push(round(&engine, &prompt, Some(&*constraint)));
    }
    report(&free, &mixed);
    Ok(())
}

/// Long enough that no answer ends early.
fn reports(kind: usize) -> Value {
    let report = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20 + kind},
            "sky": {"enum": ["clear", "clouds", "rain", "snow"]},
            "degrees": {"type": "number"},
            "wind": {"type": ["integer", "null"], "minimum": 0, "maximum": 200},
        },
        "required": ["city", "sky", "degrees", "wind"],
        "additionalProperties": false
    });
    json!({"type": "array", "items": report, "minItems": 100, "maxItems": 200})
}

fn times(grammars: &Grammars, kind: usize) -> Result<Duration, Failure> {
    let start = Instant::now();
    grammars.compile(&Source::JsonSchema(reports(kind)))?;
    Ok(start.elapsed())
}

fn check(
    engine: &Engine,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    constraint: &dyn Constraint,
) -> Result<(), Failure> {
    let mut stream = engine.submit(request(prompt, 1, Some(constraint)))?;
    let mut ids = Vec::new();
    while let Some(event) = stream.recv() {
        if let Event::Token { id, .. } = event {
            ids.push(id);
        }
    }
    let text = tokenizer.decode(&ids);
    let shown = text.replace('\n', " ");
    match serde_json::from_str::<Value>(&text) {
        Err(e) if e.is_eof() => {
            println!("an answer begins: {}…", shown.chars().take(150).collect::<String>());
            Ok(())
        }
        other => Err(format!("not the beginning of an array: {other:?}: {text}").into()),
    }
}

fn request(prompt: &[u32], seed: u64, constraint: Option<&dyn Constraint>) -> Request {
    let sampling = Sampling { seed, top_p: 0.95, ..Sampling::default() };
    let mut request = Request::new(prompt.to_vec(), NEW_TOKENS, sampling);
    request.constraint = constraint.map(Constraint::fork);
    request.ignore_eos = true;
    request
}

/// What the steps of 64 streams took, half of them constrained if there is something to constrain them.
fn round(engine: &Engine, prompt: &[u32], constraint: Option<&dyn Constraint>) -> Stats {
    let before = engine.stats();
    let of = |i: usize| constraint.filter(|_| i.is_multiple_of(2));
    let streams: Vec<_> = (0..STREAMS)
        .map(|i| engine.submit(request(prompt, i as u64, of(i))).expect("the queue holds a round"))
        .collect();
    for mut stream in streams {
        while stream.recv().is_some() {}
    }
    let after = engine.stats();
    Stats {
        n_steps: after.n_steps - before.n_steps,
        generation_tokens: after.generation_tokens - before.generation_tokens,
        step_time: after.step_time - before.step_time,
        sample_time: after.sample_time - before.sample_time,
        ..Stats::default()
    }
}

fn report(free: &[Stats], mixed: &[Stats]) {
    let us_a_step = |rounds: &[Stats], time: fn(&Stats) -> Duration| {
        let each = rounds.iter().map(|s| time(s).as_secs_f64() * 1e6 / s.n_steps as f64);
        each.fold(f64::MAX, f64::min)
    };
    let (steps, steps_mixed) = (us_a_step(free, |s| s.step_time), us_a_step(mixed, |s| s.step_time));
    let (draws, draws_mixed) = (us_a_step(free, |s| s.sample_time), us_a_step(mixed, |s| s.sample_time));
    println!("us a step      |     all | drawing");
    println!("64 free        | {steps:7.0} | {draws:7.0}");
    println!("32 free, 32 in | {steps_mixed:7.0} | {draws_mixed:7.0}");
    println!("drawing and masks add {:+.2} % to a step", (draws_mixed - draws) / steps * 100.0);
}

fn start(loaded: model::Loaded, n_threads: usize) -> Result<Engine, Failure> {
    let pool = Arc::new(Pool::new(n_threads));
    let llama = model::Transformer::new(loaded.weights, &pool)?;
    let limits = EngineLimits { max_running: STREAMS, ..EngineLimits::default() };
    let kv_bytes = STREAMS * 16 * llama.kv_block_bytes(model::KvType::Bf16);
    let runner = ModelRunner::new(llama, pool, model::KvType::Bf16, kv_bytes, limits.max_running)?;
    Ok(Engine::start(Box::new(runner), limits, Metrics::new().engine("bench", 1024)))
}
