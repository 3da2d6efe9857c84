//! A whole server without a model: an engine over a scripted runner, and a tokenizer of single bytes.
//!
//! The script: what stands in the last `[…]` of the prompt is the answer. Without brackets a chat gets a fixed text, and
//! a text is continued by the alphabet, without an end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::{
    AppState, Call, Cause, Cluster, Curve, Eval, KeyChecker, KeyOwner, Limits, LogPiece, Parts, Point,
    Refusal, Role, Runs, ServedModel,
};
use engine::{Engine, EngineLimits, FakeRunner, Runner, RunnerError, RunnerShape, StepInput};
use serde_json::{Value, json};
use telemetry::Metrics;
use tokenizer::{ChatTemplate, Tokenizer};

pub(crate) const KEY: &str = "sk-test";
/// Tokens of context of the fake models.
pub(crate) const CONTEXT_MAX: usize = 4096;
const TURN_START: u32 = 256;
const TURN_END: u32 = 257;
const END_OF_TEXT: u32 = 258;
const VOCAB: usize = 259;

pub(crate) const DEFAULT_ANSWER: &str = "I am a **fake** model. I say:\n\n1. what I was told in brackets,\n2. or this.\n\n\
    ```rust\nfn main() { println!(\"hello\"); }\n```\n";

pub(crate) struct OneKey;

impl KeyChecker for OneKey {
    fn check(&self, key: &str) -> Result<Option<KeyOwner>, Cause> {
        if key == "sk-broken" {
            return Err("the secret detail: cannot open keys.db".into());
        }
        let role = match key {
            KEY => Role::Admin,
            "sk-member" => Role::Member,
            "sk-use" => Role::Use,
            _ => return Ok(None),
        };
        Ok(Some(KeyOwner { id: "k1".into(), name: "test".into(), role }))
    }
}

/// One job and one node; remembers what was asked for.
#[derive(Default)]
pub(crate) struct OneCluster(pub(crate) Mutex<Vec<Call>>);

impl Cluster for OneCluster {
    fn call(&self, call: Call) -> Result<Value, Refusal> {
        self.0.lock().unwrap().push(call.clone());
        let job = json!({"id": "job-1", "object": "job", "name": "train sotu", "state": "running", "restarts": 1,
            "message": null, "created": 1_700_000_000});
        match call {
            Call::Jobs => Ok(json!({"object": "list", "data": [job]})),
            Call::Job(name) | Call::CancelJob(name) if name == "job-1" => Ok(job),
            Call::Job(name) | Call::CancelJob(name) => Err(Refusal::NotFound { what: "job", name }),
            Call::RetryJob(name) => Err(Refusal::Conflict(format!("{name} is running"))),
            Call::SubmitJob(ask) if ask.needs.cores > 8 => Err(Refusal::Invalid {
                param: Some("needs.cores".to_owned()),
                why: "with cores 8 it would fit".to_owned(),
            }),
            Call::Undeploy(_) => Err(Refusal::Failed("the secret detail: no disk".into())),
            other => Ok(json!({"did": format!("{other:?}")})),
        }
    }

    fn log(&self, job: &str, from: Option<u64>, _: usize) -> Result<LogPiece, Refusal> {
        let text = "one\ntwo\nthr\u{e9}\u{e9}\n".as_bytes();
        match (job, from) {
            ("job-1", from) => {
                // It grows by five bytes at every look: in the middle of lines, and of a character.
                let from = from.unwrap_or(0) as usize;
                let looks = self.0.lock().unwrap().len();
                self.0.lock().unwrap().push(Call::Jobs);
                let written = text.len().min(5 * (looks + 1));
                let bytes = text[from..written].to_vec();
                Ok(LogPiece { bytes, next: written as u64, is_over: written == text.len() })
            }
            _ => Err(Refusal::NotFound { what: "job", name: job.to_owned() }),
        }
    }
}

/// One run, `sotu`, that a test may let grow.
pub(crate) struct OneRun(pub(crate) Mutex<Curve>);

impl OneRun {
    pub(crate) fn begun() -> Arc<OneRun> {
        let first = Point { step: 1, loss: 8.3, tokens_per_second: Some(9000.0), ..Point::default() };
        let eval = Eval { step: 1, bits_per_byte: 3.1, loss: None };
        let curve =
            Curve { steps_total: Some(600), points: vec![first], evals: vec![eval], notes: Vec::new() };
        Arc::new(OneRun(Mutex::new(curve)))
    }
}

impl Runs for OneRun {
    fn names(&self) -> Result<Vec<String>, Cause> {
        Ok(vec!["sotu".into()])
    }

    fn curve(&self, name: &str) -> Result<Option<Curve>, Cause> {
        Ok((name == "sotu").then(|| self.0.lock().unwrap().clone()))
    }
}

/// The models `chat`, `base` and `random` (whose logits are noise, for seeds), each step taking `step_time`.
pub(crate) fn state(limits: Limits, step_time: Duration) -> AppState {
    state_over(limits, step_time, OneRun::begun())
}

pub(crate) fn state_over(limits: Limits, step_time: Duration, runs: Arc<dyn Runs>) -> AppState {
    let metrics = Metrics::new();
    let state = AppState::new(Parts {
        keys: Arc::new(OneKey),
        runs,
        cluster: Arc::new(OneCluster::default()),
        metrics: metrics.clone(),
        limits,
        now_unix_s: || 1_700_000_000,
    });
    for (name, template) in [("chat", Some(chat_template())), ("base", None), ("random", None)] {
        let runner = match name {
            "random" => FakeRunner::new(VOCAB, CONTEXT_MAX / 16, 16),
            _ => FakeRunner::with_next(VOCAB, CONTEXT_MAX / 16, 16, next_token),
        };
        let limits = EngineLimits { max_running: 8, queue_max_requests: 16, ..EngineLimits::default() };
        let slow = Slow { inner: runner, step_time };
        let engine = Engine::start(Box::new(slow), limits, metrics.engine(name, CONTEXT_MAX));
        state.models.insert(ServedModel::new(name, 1_700_000_000, engine, tokenizer(), template));
    }
    state.lifecycle.set_ready();
    state
}

struct Slow {
    inner: FakeRunner,
    step_time: Duration,
}

impl Runner for Slow {
    fn shape(&self) -> RunnerShape {
        self.inner.shape()
    }
    fn step(&mut self, input: &StepInput) -> Result<&[f32], RunnerError> {
        std::thread::sleep(self.step_time);
        self.inner.step(input)
    }
}

fn next_token(context: &[u32]) -> u32 {
    let chat = context.iter().rposition(|&id| id == TURN_START);
    let prompt_end = match chat {
        Some(at) => at + "\u{1}assistant\n".len(),
        None => context.iter().position(|&id| id == u32::from(b']')).map_or(context.len(), |at| at + 1),
    };
    let prompt = &context[..prompt_end.min(context.len())];
    let n_said = context.len() - prompt.len();
    let end = if chat.is_some() { TURN_END } else { END_OF_TEXT };
    let open = prompt.iter().rposition(|&id| id == u32::from(b'['));
    let close = prompt.iter().rposition(|&id| id == u32::from(b']'));
    match (open, close) {
        (Some(open), Some(close)) if open < close => {
            prompt[open + 1..close].get(n_said).copied().unwrap_or(end)
        }
        _ if chat.is_some() => DEFAULT_ANSWER.as_bytes().get(n_said).map_or(end, |&byte| byte.into()),
        _ => u32::from(b'a') + (context.len() % 26) as u32,
    }
}

fn chat_template() -> ChatTemplate {
    let source = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                  '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    ChatTemplate::new(source, "", "<|im_end|>").unwrap()
}

/// Every byte is the token of its own number, followed by the three special tokens.
pub(crate) fn tokenizer() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let mut n_unprintable = 0;
    for byte in 0..=255u32 {
        // GPT-2's alphabet: bytes that do not print are moved beyond U+00FF.
        let prints = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let letter = if prints { byte } else { 0x100 + n_unprintable };
        n_unprintable += u32::from(!prints);
        vocab.insert(char::from_u32(letter).unwrap().to_string(), byte.into());
    }
    let added: Vec<serde_json::Value> = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        .iter()
        .zip(TURN_START..)
        .map(|(content, id)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    tokenizer.with_bos_eos(None, Some(END_OF_TEXT)).unwrap()
}
