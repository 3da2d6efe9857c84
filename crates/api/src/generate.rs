//! What chat and text completions have in common once the request is understood: submit, then answer whole or streamed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use engine::SubmitError;
use futures::future::try_join_all;
use futures::stream::{self, BoxStream, SelectAll, Stream, StreamExt};
use serde::Serialize;

use crate::choice::{Choice, End, Finish, Piece, Token};
use crate::error::{ApiError, Result};
use crate::sampling::{Options, Prompt};
use crate::state::ServedModel;

pub(crate) const FINGERPRINT: &str = concat!("loquat-", env!("CARGO_PKG_VERSION"));

/// What all parts of one answer repeat.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Chunks say `usage: null` until the last one says more.
    pub(crate) include_usage: bool,
}

/// A random id such as `chatcmpl-3f…`.
pub(crate) fn random_id(prefix: &str) -> Result<String> {
    let mut bytes = [0; 12];
    getrandom::fill(&mut bytes).map_err(|e| ApiError::internal(format!("no random numbers: {e}")))?;
    Ok(format!("{prefix}-{}", hex::encode(bytes)))
}

/// A whole answer, or one chunk of a streamed one.
#[derive(Serialize)]
pub(crate) struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

impl Head {
    pub(crate) fn envelope<'a, C: Serialize>(
        &'a self,
        choices: &'a [C],
        usage: Option<UsageBody>,
    ) -> Envelope<'a, C> {
        Envelope {
            id: &self.id,
            object: self.object,
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage: (usage.is_some() || self.include_usage).then_some(usage),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct UsageBody {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
}

impl UsageBody {
    /// Adds one answer. A prompt counts once, however many answers it gets.
    pub(crate) fn add(&mut self, usage: engine::Usage, first_of_prompt: bool) {
        if first_of_prompt {
            self.prompt_tokens += usage.prompt;
            self.prompt_tokens_details.cached_tokens += usage.cached;
        }
        self.completion_tokens += usage.completion;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// Queues every sequence, prompt by prompt, or none.
pub(crate) fn submit(
    model: &Arc<ServedModel>,
    options: &Options,
    prompts: &[Prompt],
    tenant: &str,
    sequences_max: usize,
) -> Result<Vec<Choice>> {
    let n_sequences = prompts.len() * options.n;
    let n_max = sequences_max.min(model.engine.limits().queue_max_requests);
    if n_sequences > n_max {
        let why =
            format!("the request asks for {n_sequences} sequences, this server takes {n_max} at a time");
        return Err(ApiError::invalid(if options.n > n_max { "n" } else { "prompt" }, why));
    }
    let mut choices = Vec::with_capacity(n_sequences);
    for prompt in prompts {
        for request in options.requests(model, prompt, tenant)? {
            let stream = model.engine.submit(request).map_err(|e| refusal(e, options, prompt.param))?;
            choices.push(Choice::new(stream, &model.tokenizer, options, prompt.tokens.len()));
        }
    }
    Ok(choices)
}

fn refusal(error: SubmitError, options: &Options, prompt_param: &'static str) -> ApiError {
    match error {
        SubmitError::Empty | SubmitError::TokenOutOfVocab { .. } => ApiError::invalid(prompt_param, error),
        SubmitError::TooLong { .. } => {
            ApiError::ContextLength { param: options.max_tokens_field, message: error.to_string() }
        }
        SubmitError::Invalid { field, why } => ApiError::invalid(field, why),
        SubmitError::QueueFull { retry_after } => ApiError::QueueFull { retry_after },
        SubmitError::Draining => ApiError::Draining,
        SubmitError::Unhealthy { why } => ApiError::EngineDown(why),
    }
}

/// A finished answer.
pub(crate) struct Whole {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Token>,
    pub(crate) prompt: Vec<Option<engine::Logprobs>>,
    pub(crate) finish: Finish,
    pub(crate) usage: engine::Usage,
}

/// Waits for all answers; the first that fails ends the others.
pub(crate) async fn collect(choices: Vec<Choice>) -> Result<Vec<Whole>> {
    try_join_all(choices.into_iter().map(collect_one)).await
}

async fn collect_one(mut choice: Choice) -> Result<Whole> {
    let mut whole = Piece::default();
    while let Some(piece) = choice.next().await? {
        whole.text.push_str(&piece.text);
        whole.tokens.extend(piece.tokens);
        whole.prompt.extend(piece.prompt);
        whole.end = piece.end;
    }
    let End { reason, usage } = whole.end.ok_or_else(|| ApiError::internal("an answer without an end"))?;
    Ok(Whole { text: whole.text, tokens: whole.tokens, prompt: whole.prompt, finish: reason, usage })
}

/// How an endpoint writes its chunks.
pub(crate) trait Chunks: Send + 'static {
    /// What comes before the first token of answer `index`, if anything.
    fn first(&mut self, index: usize) -> Option<Bytes>;
    /// The chunk or chunks of one piece.
    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Bytes>;
    /// The chunk without choices that closes a stream with usage.
    fn usage(&mut self, usage: UsageBody) -> Bytes;
}

/// One event of a stream: `data: {json}` and an empty line.
pub(crate) fn event<T: Serialize>(value: &T) -> Bytes {
    let mut bytes = b"data: ".to_vec();
    // Writing plain data with string keys into memory cannot fail.
    serde_json::to_writer(&mut bytes, value).expect("plain data is JSON");
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// Server-sent events over all answers, in the order their tokens come. Dropping the body drops the sequences.
pub(crate) fn stream<C: Chunks>(
    mut chunks: C,
    choices: Vec<Choice>,
    options: &Options,
    keep_alive: Duration,
) -> Response {
    let first = (0..choices.len()).filter_map(|index| chunks.first(index)).collect();
    let usage = options.include_usage.then(UsageBody::default);
    let answers =
        stream::select_all(choices.into_iter().enumerate().map(|(i, choice)| pieces(i, choice).boxed()));
    let events = Events { chunks, answers, n: options.n, usage, keep_alive, closed: false };
    let first: Vec<Bytes> = first;
    let body = stream::iter(first).chain(events.into_stream()).map(Ok::<_, Infallible>);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Asks nginx not to collect the stream before passing it on.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(body)).into_response()
}

type Answer = (usize, Result<Piece>);

fn pieces(index: usize, choice: Choice) -> impl Stream<Item = Answer> {
    stream::unfold(choice, move |mut choice| async move {
        let piece = choice.next().await.transpose()?;
        Some(((index, piece), choice))
    })
}

struct Events<C> {
    chunks: C,
    answers: SelectAll<BoxStream<'static, Answer>>,
    /// Answers per prompt.
    n: usize,
    usage: Option<UsageBody>,
    keep_alive: Duration,
    closed: bool,
}

impl<C: Chunks> Events<C> {
    fn into_stream(self) -> impl Stream<Item = Bytes> {
        stream::unfold(self, |mut events| async move {
            let bytes = events.next().await?;
            Some((bytes, events))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        if self.closed {
            return None;
        }
        match tokio::time::timeout(self.keep_alive, self.answers.next()).await {
            Err(_silent) => Some(Bytes::from_static(b": keep-alive\n\n")),
            Ok(Some((index, Ok(piece)))) => Some(self.piece(index, piece)),
            Ok(Some((_, Err(error)))) => Some(self.fail(&error)),
            Ok(None) => Some(self.close()),
        }
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Bytes {
        if let (Some(usage), Some(end)) = (&mut self.usage, &piece.end) {
            usage.add(end.usage, index.is_multiple_of(self.n));
        }
        self.chunks.piece(index, piece).concat().into()
    }

    fn fail(&mut self, error: &ApiError) -> Bytes {
        self.closed = true;
        self.answers.clear();
        error.log();
        event(&error.body())
    }

    fn close(&mut self) -> Bytes {
        self.closed = true;
        let usage = self.usage.take().map(|usage| self.chunks.usage(usage));
        [usage.unwrap_or_default(), Bytes::from_static(b"data: [DONE]\n\n")].concat().into()
    }
}
