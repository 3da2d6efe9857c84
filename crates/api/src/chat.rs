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
use crate::calls::{CallReader, SPOKEN, Said};
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
use crate::tools::{self, Call, ToolCall, Tools};

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(owner): Extension<KeyOwner>,
    request: Request,
) -> Result<Response> {
    let models = state.models.clone();
    let work = move |map| {
        let fields = Fields(&map);
        let model = models::named(&models, fields)?;
        let (options, tools) = read_options(fields, &model)?;
        let prompt = prompt::read_messages(fields, &model, tools.as_ref())?;
        Ok((model, options, prompt, tools.map_or(Call::None, |tools| tools.call)))
    };
    let (model, mut options, prompt, call): (Arc<ServedModel>, Options, Prompt, Call) =
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
        let chunks = ChatChunks {
            head,
            tokenizer: model.tokenizer.clone(),
            logprobs: options.logprobs.is_some(),
            readers: (0..options.n).map(|_| (call.reader(), 0)).collect(),
            call,
        };
        return Ok(generate::stream(chunks, choices, &options, state.limits.keep_alive));
    }
    let answers = generate::collect(choices).await?;
    Ok(whole(
        &head,
        &model.tokenizer,
        answers,
        &Wanted { options: &options, prompt: &prompts[0], call: &call },
    ))
}

fn read_options(fields: Fields, model: &ServedModel) -> Result<(Options, Option<Tools>)> {
    refuse_unsupported(fields)?;
    let mut options = Options::read(fields, model)?;
    let (tools, structure) = tools::read(fields)?.unzip();
    if let Some(structure) = structure.flatten()
        && let Some(other) = options.structure.replace(structure)
    {
        return Err(ApiError::invalid(
            other.param,
            "the answer is a function's call already, see `tool_choice`",
        ));
    }
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
    if tools.as_ref().is_some_and(|tools| tools.free) {
        let ids = SPOKEN.iter().filter_map(|word| model.tokenizer.id_of(word));
        options.spoken_ids = ids.collect();
    }
    // A base model does not end its turn, it goes on with the next one.
    options.stops.extend(model.template.stop().map(str::to_owned));
    Ok((options, tools))
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
    content: Option<String>,
    refusal: Value,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

impl Message {
    /// The answer `text` and the reader that has seen all of it.
    fn new(call: &Call, reader: &mut CallReader, text: String, id: impl Fn(usize) -> String) -> Message {
        let (content, tool_calls) = match call {
            Call::None => (Some(text), Vec::new()),
            Call::Of(name) => (None, vec![ToolCall::new(id(0), name, &text)]),
            Call::Read { .. } => {
                let mut content = String::new();
                let mut calls = Vec::new();
                let said = reader.push(&text).into_iter().chain(reader.finish());
                said.for_each(|said| match said {
                    Said::Text(text) => content.push_str(&text),
                    Said::Call { name, arguments } => {
                        calls.push(ToolCall::new(id(calls.len()), &name, &arguments));
                    }
                });
                // Beside a call, no text is `null`.
                (Some(content).filter(|text| calls.is_empty() || !text.trim().is_empty()), calls)
            }
        };
        Message { role: "assistant", content, refusal: Value::Null, tool_calls }
    }
}

/// OpenAI's word for the end of an answer that calls functions: a call of one the client named just stops.
fn finish(reader: &CallReader, reason: Finish) -> Finish {
    match reason {
        Finish::Stop if reader.has_called() => Finish::ToolCalls,
        _ => reason,
    }
}

/// What a whole answer is made for.
struct Wanted<'a> {
    options: &'a Options,
    prompt: &'a Prompt,
    call: &'a Call,
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
    let Wanted { options, prompt, call } = wanted;
    let logprobs = options.logprobs.is_some();
    let scored = answers.first().zip(options.prompt_logprobs);
    let prompt_logprobs =
        scored.map(|(first, n_top)| of_prompt(tokenizer, &prompt.tokens, &first.prompt, n_top));
    let mut usage = UsageBody::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        usage.add(answer.usage, index == 0);
        let mut reader = call.reader();
        let message = Message::new(call, &mut reader, answer.text, |n| call_id(head, index, n));
        choices.push(ChatChoice {
            index,
            message,
            logprobs: logprobs.then(|| crate::logprobs::ChatLogprobs::new(tokenizer, &answer.tokens)),
            finish_reason: finish(&reader, answer.finish),
        });
    }
    let envelope = head.envelope(&choices, Some(usage));
    Json(WholeBody { envelope, prompt_logprobs }).into_response()
}

/// Unique in its conversation, which is all that clients ask of it.
fn call_id(head: &Head, index: usize, n: usize) -> String {
    format!("call_{}{index}{n}", head.id.trim_start_matches("chatcmpl-"))
}

struct ChatChunks {
    head: Head,
    tokenizer: Tokenizer,
    logprobs: bool,
    call: Call,
    /// One for each answer, and how many calls of it were sent.
    readers: Vec<(CallReader, usize)>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCall; 1]>,
}

impl Delta {
    fn content(text: String) -> Delta {
        Delta { content: Some(text), ..Delta::default() }
    }

    fn call(call: ToolCall) -> Delta {
        Delta { tool_calls: Some([call]), ..Delta::default() }
    }
}

impl ChatChunks {
    /// What can be said once `text` is known.
    fn deltas(&mut self, index: usize, text: String, is_last: bool) -> Vec<Delta> {
        let (reader, n_calls) = &mut self.readers[index];
        match &self.call {
            Call::None if text.is_empty() => Vec::new(),
            Call::None => vec![Delta::content(text)],
            Call::Of(_) => vec![Delta::call(ToolCall::more(text))],
            Call::Read { .. } => {
                let mut said = reader.push(&text);
                if is_last {
                    said.extend(reader.finish());
                }
                let head = &self.head;
                let mut delta = |said| match said {
                    Said::Text(text) => Delta::content(text),
                    Said::Call { name, arguments } => {
                        let call = ToolCall::new(call_id(head, index, *n_calls), &name, &arguments);
                        *n_calls += 1;
                        Delta::call(call.in_stream(*n_calls - 1))
                    }
                };
                said.into_iter().map(&mut delta).collect()
            }
        }
    }

    fn chunk(&self, choice: ChunkChoice) -> Bytes {
        event(&self.head.envelope(&[choice], None))
    }
}

impl Chunks for ChatChunks {
    fn first(&mut self, index: usize) -> Option<Bytes> {
        let mut delta = match &self.call {
            Call::Of(name) => {
                let call = ToolCall::new(call_id(&self.head, index, 0), name, "");
                Delta::call(call.in_stream(0))
            }
            _ => Delta::content(String::new()),
        };
        delta.role = Some("assistant");
        Some(self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason: None }))
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Bytes> {
        let mut deltas = self.deltas(index, piece.text, piece.end.is_some());
        let mut logprobs =
            self.logprobs.then(|| crate::logprobs::ChatLogprobs::new(&self.tokenizer, &piece.tokens));
        if deltas.is_empty() && !piece.tokens.is_empty() {
            deltas.push(Delta::content(String::new()));
        }
        let mut chunks = Vec::with_capacity(2);
        for delta in deltas {
            let logprobs = logprobs.take();
            chunks.push(self.chunk(ChunkChoice { index, delta, logprobs, finish_reason: None }));
        }
        if let Some(end) = piece.end {
            let delta = Delta::default();
            chunks.push(self.chunk(ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: Some(finish(&self.readers[index].0, end.reason)),
            }));
        }
        chunks
    }

    fn usage(&mut self, usage: UsageBody) -> Bytes {
        event(&self.head.envelope::<ChunkChoice>(&[], Some(usage)))
    }
}
