//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};
use tokenizer::Tokenizer;

use crate::body;
use crate::choice::{Finish, Piece};
use crate::error::{ApiError, Result};
use crate::generate::{self, Chunks, Head, UsageBody, Whole, event};
use crate::json::Fields;
use crate::logprobs::{TextLogprobs, of_prompt};
use crate::models;
use crate::prompt;
use crate::sampling::{Options, Prompt};
use crate::state::{AppState, KeyOwner, ServedModel};
use crate::structured;

/// New tokens when the client does not say; OpenAI's default.
const MAX_TOKENS_DEFAULT: usize = 16;

/// What only text completions have.
struct Extras {
    echo: bool,
    /// Of `options.n` answers per prompt, this many are sent.
    n_sent: usize,
    logprobs: bool,
    /// Most likely tokens for each of the prompt, listed beside the answer.
    prompt_logprobs: Option<usize>,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(owner): Extension<KeyOwner>,
    request: Request,
) -> Result<Response> {
    let models = state.models.clone();
    let work = move |map| {
        let fields = Fields(&map);
        let model = models::named(&models, fields)?;
        let (options, extras) = read_options(fields, &model)?;
        let prompts = prompt::read_prompts(fields, &model)?;
        Ok((model, options, extras, prompts))
    };
    let (model, mut options, extras, prompts): (Arc<ServedModel>, Options, Extras, Vec<Prompt>) =
        body::read(&state, request, work).await?;
    structured::constrain(&state, &model, &mut options).await?;
    let choices = generate::submit(&model, &options, &prompts, &owner.id, state.limits.sequences_max)?;
    let head = Head {
        id: generate::random_id("cmpl")?,
        object: "text_completion",
        created: (state.now_unix_s)(),
        model: model.id.clone(),
        include_usage: options.include_usage,
    };
    let writer = Writer { head, tokenizer: model.tokenizer.clone(), prompts, n: options.n, extras };
    if options.stream {
        return Ok(generate::stream(writer, choices, &options, state.limits.keep_alive));
    }
    Ok(writer.whole(generate::collect(choices).await?))
}

fn read_options(fields: Fields, model: &ServedModel) -> Result<(Options, Extras)> {
    if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "this server does not insert text before a suffix"));
    }
    let mut options = Options::read(fields, model)?;
    let echo = fields.flag("echo")?;
    let n_sent = options.n;
    options.n = read_best_of(fields, &options)?;
    let wanted = fields.count("logprobs", 0..=5)?;
    options.logprobs = wanted.or((options.n > n_sent).then_some(0));
    let prompt_logprobs = options.prompt_logprobs;
    let least = if echo || prompt_logprobs.is_some() { 0 } else { 1 };
    let max_tokens = fields.count("max_tokens", least..=usize::MAX)?;
    options.max_tokens = Some(max_tokens.unwrap_or(MAX_TOKENS_DEFAULT.min(model.context_max())));
    options.prompt_logprobs = match wanted {
        Some(_) if echo && prompt_logprobs.is_some() => {
            let why = "`echo` with `logprobs` says the same, ask for one of them";
            return Err(ApiError::invalid("prompt_logprobs", why));
        }
        Some(top) if echo => Some(top),
        // Nothing to generate and nothing to score: the cheapest thing the engine takes.
        _ if max_tokens == Some(0) => Some(prompt_logprobs.unwrap_or(0)),
        _ => prompt_logprobs,
    };
    Ok((options, Extras { echo, n_sent, logprobs: wanted.is_some(), prompt_logprobs }))
}

fn read_best_of(fields: Fields, options: &Options) -> Result<usize> {
    // OpenAI takes 0 for "not given".
    let best_of = fields.count("best_of", 0..=20)?.filter(|&n| n > 0);
    match best_of {
        Some(best_of) if best_of < options.n => Err(ApiError::invalid(
            "best_of",
            format!("it must be at least `n`, {}, got {best_of}", options.n),
        )),
        Some(best_of) if best_of > options.n && options.stream => {
            Err(ApiError::invalid("best_of", "it cannot be more than `n` in a stream"))
        }
        best_of => Ok(best_of.unwrap_or(options.n)),
    }
}

#[derive(Serialize)]
struct TextChoice {
    text: String,
    index: usize,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<Finish>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<Map<String, Value>>>>,
}

impl TextChoice {
    /// Part of a streamed answer.
    fn piece(
        index: usize,
        text: String,
        logprobs: Option<TextLogprobs>,
        finish_reason: Option<Finish>,
    ) -> TextChoice {
        TextChoice { text, index, logprobs, finish_reason, prompt_logprobs: None }
    }
}

struct Writer {
    head: Head,
    tokenizer: Tokenizer,
    prompts: Vec<Prompt>,
    /// Answers generated per prompt.
    n: usize,
    extras: Extras,
}

impl Writer {
    fn whole(&self, answers: Vec<Whole>) -> Response {
        let mut usage = UsageBody::default();
        let mut choices = Vec::with_capacity(answers.len());
        let mut answers = answers.into_iter();
        for prompt in &self.prompts {
            let mut group: Vec<Whole> = answers.by_ref().take(self.n).collect();
            for (index, answer) in group.iter().enumerate() {
                usage.add(answer.usage, index == 0);
            }
            if self.n > self.extras.n_sent {
                group.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
                group.truncate(self.extras.n_sent);
            }
            for answer in group {
                choices.push(self.choice(choices.len(), prompt, answer));
            }
        }
        Json(self.head.envelope(&choices, Some(usage))).into_response()
    }

    fn choice(&self, index: usize, prompt: &Prompt, answer: Whole) -> TextChoice {
        let echoed = if self.extras.echo { prompt.text.as_str() } else { "" };
        let logprobs = self.extras.logprobs.then(|| {
            let mut logprobs = TextLogprobs::default();
            if self.extras.echo {
                logprobs.extend_prompt(&self.tokenizer, &prompt.tokens, &answer.prompt);
            }
            logprobs.extend(&self.tokenizer, &answer.tokens, echoed.len());
            logprobs
        });
        let prompt_logprobs = self.extras.prompt_logprobs;
        TextChoice {
            text: echoed.to_owned() + &answer.text,
            index,
            logprobs,
            finish_reason: Some(answer.finish),
            prompt_logprobs: prompt_logprobs
                .map(|n_top| of_prompt(&self.tokenizer, &prompt.tokens, &answer.prompt, n_top)),
        }
    }

    fn chunk(&self, choice: TextChoice) -> Bytes {
        event(&self.head.envelope(&[choice], None))
    }

    fn prompt_of(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.n]
    }
}

/// How likely the model finds its own answer, per token; what `best_of` sorts by.
fn mean_logprob(answer: &Whole) -> f64 {
    let sum: f64 = answer.tokens.iter().map(|token| f64::from(token.logprobs.logprob)).sum();
    sum / answer.tokens.len().max(1) as f64
}

impl Chunks for Writer {
    /// The echoed prompt, unless its log-probabilities have to come first.
    fn first(&mut self, index: usize) -> Option<Bytes> {
        if !self.extras.echo || self.extras.logprobs {
            return None;
        }
        let text = self.prompt_of(index).text.clone();
        Some(self.chunk(TextChoice::piece(index, text, None, None)))
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Bytes> {
        let prompt = self.prompt_of(index);
        let echoed = self.extras.echo && self.extras.logprobs;
        if !piece.prompt.is_empty() {
            if !echoed {
                return Vec::new();
            }
            let mut logprobs = TextLogprobs::default();
            logprobs.extend_prompt(&self.tokenizer, &prompt.tokens, &piece.prompt);
            let text = prompt.text.clone();
            return vec![self.chunk(TextChoice::piece(index, text, Some(logprobs), None))];
        }
        let offset = if self.extras.echo { prompt.text.len() } else { 0 };
        let logprobs = self.extras.logprobs.then(|| {
            let mut logprobs = TextLogprobs::default();
            logprobs.extend(&self.tokenizer, &piece.tokens, offset);
            logprobs
        });
        let finish_reason = piece.end.map(|end| end.reason);
        vec![self.chunk(TextChoice::piece(index, piece.text, logprobs, finish_reason))]
    }

    fn usage(&mut self, usage: UsageBody) -> Bytes {
        event(&self.head.envelope::<TextChoice>(&[], Some(usage)))
    }
}
