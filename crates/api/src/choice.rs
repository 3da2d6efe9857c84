//! One answer: the engine's ids on their way to text.

use std::collections::VecDeque;

use engine::{Event, FinishReason, Logprobs};
use serde::Serialize;
use tokenizer::{StreamDecoder, Tokenizer};

use crate::error::{ApiError, Result, echo};
use crate::sampling::Options;
use crate::stop::StopMatcher;

/// One running sequence. Dropping it frees its place in the engine at the next step.
pub(crate) struct Choice {
    /// `None` once the answer has ended.
    stream: Option<engine::Stream>,
    tokenizer: Tokenizer,
    decoder: StreamDecoder,
    /// Special tokens that are text here.
    spoken_ids: Vec<u32>,
    stops: StopMatcher,
    /// Tokens whose text is not wholly passed on.
    pending: VecDeque<Token>,
    /// Bytes of text decoded and passed on so far.
    n_decoded: usize,
    n_passed: usize,
    usage: engine::Usage,
    /// The field that said what the answer must look like.
    structure_param: &'static str,
}

/// What became known since the last piece.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// The tokens that begin in this text, if log-probabilities were asked for.
    pub(crate) tokens: Vec<Token>,
    /// The prompt's own, once, in the first piece, if asked for. The first token has none.
    pub(crate) prompt: Vec<Option<Logprobs>>,
    pub(crate) end: Option<End>,
}

/// A generated token with its log-probabilities.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) id: u32,
    /// Bytes of the answer before this token's text.
    pub(crate) offset: usize,
    pub(crate) logprobs: Logprobs,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) reason: Finish,
    pub(crate) usage: engine::Usage,
}

/// OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Finish {
    Stop,
    Length,
    ToolCalls,
}

impl Choice {
    /// `n_prompt` is what usage says if a stop string ends the answer before the engine reports.
    pub(crate) fn new(
        stream: engine::Stream,
        tokenizer: &Tokenizer,
        options: &Options,
        n_prompt: usize,
    ) -> Choice {
        Choice {
            stream: Some(stream),
            tokenizer: tokenizer.clone(),
            // It spells out special tokens; those that are no text do not get there.
            decoder: tokenizer.decoder_special(),
            spoken_ids: options.spoken_ids.clone(),
            stops: StopMatcher::new(options.stops.clone()),
            pending: VecDeque::new(),
            n_decoded: 0,
            n_passed: 0,
            usage: engine::Usage { prompt: n_prompt, ..engine::Usage::default() },
            structure_param: options.structure.as_ref().map_or("structured_outputs", |s| s.param),
        }
    }

    /// The next piece with something in it; `None` after the one with an end.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>> {
        while let Some(stream) = &mut self.stream {
            let Some(event) = stream.next().await else {
                return Err(ApiError::internal("the engine's stream broke off"));
            };
            let piece = self.take(event)?;
            if !piece.text.is_empty() || !piece.prompt.is_empty() || piece.end.is_some() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    fn take(&mut self, event: Event) -> Result<Piece> {
        match event {
            Event::PromptLogprobs(prompt) => Ok(Piece { prompt, ..Piece::default() }),
            Event::Token { id, logprobs } => Ok(self.take_token(id, logprobs)),
            Event::Finished { reason, usage } => self.take_finish(reason, usage),
        }
    }

    fn take_token(&mut self, id: u32, logprobs: Option<Logprobs>) -> Piece {
        self.usage.completion += 1;
        if let Some(logprobs) = logprobs {
            self.pending.push_back(Token { id, offset: self.n_decoded, logprobs });
        }
        // Special tokens steer the model; they are no text.
        let is_silent = self.tokenizer.is_special(id) && !self.spoken_ids.contains(&id);
        let text = if is_silent { String::new() } else { self.decoder.push(id) };
        self.n_decoded += text.len();
        let passed = self.stops.push(&text);
        let end = passed.stopped.then(|| {
            // Dropping the stream ends the sequence; its own report would come too late to wait for.
            let stream = self.stream.take();
            self.usage.cached = stream.map_or(0, |stream| stream.cached_tokens());
            End { reason: Finish::Stop, usage: self.usage }
        });
        self.piece(passed.text, end)
    }

    fn take_finish(&mut self, reason: FinishReason, usage: engine::Usage) -> Result<Piece> {
        self.stream = None;
        let reason = match reason {
            FinishReason::Stop => Finish::Stop,
            FinishReason::Length => Finish::Length,
            FinishReason::Cancelled => return Err(ApiError::Draining),
            FinishReason::Deadline => return Err(ApiError::internal("the engine's deadline passed")),
            FinishReason::Constraint(why) => return Err(ApiError::invalid(self.structure_param, echo(&why))),
            FinishReason::Error(why) => return Err(ApiError::Internal(why)),
        };
        let passed = self.stops.push(&self.decoder.finish());
        let mut text = passed.text;
        if !passed.stopped {
            text.push_str(&self.stops.finish());
        }
        let reason = if passed.stopped { Finish::Stop } else { reason };
        let mut piece = self.piece(text, Some(End { reason, usage }));
        if !passed.stopped {
            // Tokens without text at the very end.
            piece.tokens.extend(self.pending.drain(..));
        }
        Ok(piece)
    }

    fn piece(&mut self, text: String, end: Option<End>) -> Piece {
        self.n_passed += text.len();
        let n_begun = self.pending.iter().take_while(|token| token.offset < self.n_passed).count();
        let tokens = self.pending.drain(..n_begun).collect();
        Piece { text, tokens, prompt: Vec::new(), end }
    }
}
