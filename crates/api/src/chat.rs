//! `POST /v1/chat/completions`.

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use tokenizer::Tokenizer;

use crate::body;
use crate::choice::{Finish, Piece};
use crate::error::{ApiError, Result};
use crate::generate::{self, Chunks, Envelope, Head, UsageBody, Whole, event};
use crate::json::Fields;
use crate::logprobs::of_prompt;
use crate::models;
use crate::prompt;
use crate::sampling::{Options, Prompt};
use crate::state::{AppState, KeyOwner, ServedModel};
use crate::structured;

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(owner): Extension<KeyOwner>,
    request: Request,
) -> Result<Response> {
    let models = state.models.clone();
    let work = move |map| {
        let fields = Fields(&map);
        let model = models::named(&models, fields)?;
        let options = read_options(fields, &model)?;
        let prompt = prompt::read_messages(fields, &model)?;
        Ok((model, options, prompt))
    };
    let (model, mut options, prompt): (Arc<ServedModel>, Options, Prompt) =
        body::read(&state, request, work).await?;
    structured::constrain(&state, &model, &mut options).await?;
    let prompts = [prompt];
    let choices = generate::submit(&model, &options, &prompts, &owner.id, state.limits.sequences_max)?;
    let head = Head {
        id: generate::random_id("chatcmpl")?,
        object: if options.stream { "chat.completion.chunk" } else { "chat.completion" },
        created: (state.now_unix_s)(),
        model: model.id.clone(),
        include_usage: options.include_usage,
    };
    if options.stream {
        let chunks =
            ChatChunks { head, tokenizer: model.tokenizer.clone(), logprobs: options.logprobs.is_some() };
        return Ok(generate::stream(chunks, choices, &options, state.limits.keep_alive));
    }
    let answers = generate::collect(choices).await?;
    Ok(whole(&head, &model.tokenizer, answers, &Wanted { options: &options, prompt: &prompts[0] }))
}

fn read_options(fields: Fields, model: &ServedModel) -> Result<Options> {
    refuse_unsupported(fields)?;
    let mut options = Options::read(fields, model)?;
    let old = fields.count("max_tokens", 1..=usize::MAX)?;
    let new = fields.count("max_completion_tokens", 1..=usize::MAX)?;
    if old.is_some() && new.is_some() && old != new {
        let why = "it differs from `max_completion_tokens`; send only that one";
        return Err(ApiError::invalid("max_tokens", why));
    }
    options.max_tokens = new.or(old);
    if new.is_some() {
        options.max_tokens_field = "max_completion_tokens";
    }
    options.logprobs = read_logprobs(fields)?;
    // A base model does not end its turn, it goes on with the next one.
    options.stops.extend(model.template.stop().map(str::to_owned));
    Ok(options)
}

fn read_logprobs(fields: Fields) -> Result<Option<usize>> {
    let wanted = fields.flag("logprobs")?;
    let top = fields.count("top_logprobs", 0..=20)?;
    if top.is_some() && !wanted {
        return Err(ApiError::invalid("top_logprobs", "only allowed when `logprobs` is true"));
    }
    Ok(wanted.then(|| top.unwrap_or(0)))
}

/// Fields that change what the answer means are refused rather than ignored.
fn refuse_unsupported(fields: Fields) -> Result<()> {
    for name in ["tools", "functions"] {
        if fields.list(name)?.is_some_and(|list| !list.is_empty()) {
            return Err(ApiError::invalid(name, "this server does not support tools yet"));
        }
    }
    let modalities = fields.list("modalities")?.unwrap_or_default();
    if modalities.iter().any(|m| m.as_str() != Some("text")) || fields.get("audio").is_some() {
        return Err(ApiError::invalid("modalities", "this server answers in text only"));
    }
    Ok(())
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: Message,
    logprobs: Option<crate::logprobs::ChatLogprobs>,
    finish_reason: Finish,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Value,
}

/// What a whole answer is made for.
struct Wanted<'a> {
    options: &'a Options,
    prompt: &'a Prompt,
}

#[derive(Serialize)]
struct WholeBody<'a> {
    #[serde(flatten)]
    envelope: Envelope<'a, ChatChoice>,
    /// vLLM's: for the prompt as a whole, so not in the choices.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<Map<String, Value>>>>,
}

fn whole(head: &Head, tokenizer: &Tokenizer, answers: Vec<Whole>, wanted: &Wanted) -> Response {
    let Wanted { options, prompt } = wanted;
    let logprobs = options.logprobs.is_some();
    let scored = answers.first().zip(options.prompt_logprobs);
    let prompt_logprobs =
        scored.map(|(first, n_top)| of_prompt(tokenizer, &prompt.tokens, &first.prompt, n_top));
    let mut usage = UsageBody::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        usage.add(answer.usage, index == 0);
        choices.push(ChatChoice {
            index,
            logprobs: logprobs.then(|| crate::logprobs::ChatLogprobs::new(tokenizer, &answer.tokens)),
            message: Message { role: "assistant", content: answer.text, refusal: Value::Null },
            finish_reason: answer.finish,
        });
    }
    let envelope = head.envelope(&choices, Some(usage));
    Json(WholeBody { envelope, prompt_logprobs }).into_response()
}

struct ChatChunks {
    head: Head,
    tokenizer: Tokenizer,
    logprobs: bool,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<crate::logprobs::ChatLogprobs>,
    finish_reason: Option<Finish>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl ChatChunks {
    fn chunk(&self, choice: ChunkChoice) -> Bytes {
        event(&self.head.envelope(&[choice], None))
    }
}

impl Chunks for ChatChunks {
    fn first(&mut self, index: usize) -> Option<Bytes> {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        Some(self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason: None }))
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Bytes> {
        let mut chunks = Vec::with_capacity(2);
        if !piece.text.is_empty() || !piece.tokens.is_empty() {
            let logprobs =
                self.logprobs.then(|| crate::logprobs::ChatLogprobs::new(&self.tokenizer, &piece.tokens));
            let delta = Delta { role: None, content: Some(piece.text) };
            chunks.push(self.chunk(ChunkChoice { index, delta, logprobs, finish_reason: None }));
        }
        if let Some(end) = piece.end {
            let delta = Delta::default();
            chunks.push(self.chunk(ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: Some(end.reason),
            }));
        }
        chunks
    }

    fn usage(&mut self, usage: UsageBody) -> Bytes {
        event(&self.head.envelope::<ChunkChoice>(&[], Some(usage)))
    }
}
