//! What a caller asks for and what it gets back: plain data, no behaviour beyond checking.

use std::time::Duration;

use crate::constraint::Constraint;

/// Index into the model's vocabulary.
pub type TokenId = u32;

/// Top log-probabilities a request may ask for per token (OpenAI's limit is 20).
pub const TOP_LOGPROBS_MAX: usize = 20;
/// Stop ids of one request; sampling scans them for every token.
pub const STOP_IDS_MAX: usize = 64;

/// One sequence to generate: prompt ids in, ids out.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt, not empty, every id below the vocabulary's size.
    pub tokens: Vec<TokenId>,
    pub sampling: Sampling,
    /// New tokens at most. 0 is allowed only with `prompt_logprobs` (scoring).
    pub max_tokens: usize,
    /// Stop ids cannot be sampled before this many new tokens, unless a constraint leaves nothing else.
    pub min_tokens: usize,
    /// Generating one of these ends the sequence; the id itself is not sent as a token.
    pub stop_ids: Vec<TokenId>,
    /// Treat stop ids as ordinary tokens (benchmarks want an exact length).
    pub ignore_eos: bool,
    /// `Some(k)`: every token carries its log-probability and the `k` most likely ones.
    pub logprobs: Option<usize>,
    /// `Some(k)`: one [`Event::PromptLogprobs`] before the first token.
    pub prompt_logprobs: Option<usize>,
    /// What the output must look like, at its beginning; `None` leaves it free.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Changes to the model for this request alone.
    pub adapter: Option<model::Adapter>,
    /// Cached prompt blocks are shared only between requests of one tenant; "" is a tenant, too.
    pub tenant: String,
    /// Higher goes first, in the queue and when memory is short. Changes when tokens come, never which.
    pub priority: i8,
    /// Time from submission to the last token; past it the request ends with [`FinishReason::Deadline`].
    pub deadline: Option<Duration>,
}

impl Request {
    /// A request with everything optional left out.
    pub fn new(tokens: Vec<TokenId>, max_tokens: usize, sampling: Sampling) -> Request {
        Request {
            tokens,
            sampling,
            max_tokens,
            min_tokens: 0,
            stop_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            constraint: None,
            adapter: None,
            tenant: String::new(),
            priority: 0,
            deadline: None,
        }
    }
}

/// How the next token is drawn from the logits. Applied in this order: the request's constraint, logit bias, penalties,
/// temperature, min-p, top-k, top-p, typical-p (the order of Hugging Face's and vLLM's samplers).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the most likely token, the lowest id among equals.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose probabilities sum to at least this, in (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one's probability, in [0, 1].
    pub min_p: f32,
    /// Keep the most typical tokens (those whose surprise is nearest to the distribution's entropy) whose probabilities
    /// sum to at least this, in (0, 1].
    pub typical_p: f32,
    /// Random numbers are a pure function of this seed and the position in the output.
    /// The caller draws one when its user gave none.
    pub seed: u64,
    /// Subtracted once from the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once for each time it was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(TokenId, f32)>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
        }
    }
}

impl Sampling {
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }
}

/// What a stream yields. A request gives at most `max_tokens` tokens, one `PromptLogprobs` if it
/// asked for it, and exactly one `Finished`, which is last.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// One entry per prompt token; the first has none, because nothing precedes it.
    PromptLogprobs(Vec<Option<Logprobs>>),
    Token {
        id: TokenId,
        logprobs: Option<Logprobs>,
    },
    Finished {
        reason: FinishReason,
        usage: Usage,
    },
}

/// Natural-log probabilities under the model's own distribution, before bias, penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// The most likely tokens, best first, lower id first among equals.
    pub top: Vec<(TokenId, f32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// One of the request's stop ids was generated.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The stream was dropped, or the engine was told to stop before the end.
    Cancelled,
    /// The request's deadline passed.
    Deadline,
    /// The request's constraint gave up; the text says why.
    Constraint(String),
    /// The model failed on this step; the text says how.
    Error(String),
}

/// Tokens counted for billing and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    /// Prompt tokens whose keys and values came from the prefix cache.
    pub cached: usize,
    /// Generated tokens, a stop id included.
    pub completion: usize,
}

/// Why a request was not accepted. Nothing was queued.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    #[error("the prompt is empty")]
    Empty,
    #[error("token id {id} at prompt index {index} is outside the vocabulary of {vocab}")]
    TokenOutOfVocab { id: TokenId, index: usize, vocab: usize },
    #[error("{n_prompt} prompt tokens and {max_tokens} new ones exceed the context of {context_max}")]
    TooLong { n_prompt: usize, max_tokens: usize, context_max: usize },
    /// `field` is the name the API knows it by.
    #[error("{field} {why}")]
    Invalid { field: &'static str, why: String },
    #[error("the queue is full, try again in {} s", retry_after.as_secs().max(1))]
    QueueFull { retry_after: Duration },
    #[error("the engine is draining")]
    Draining,
    #[error("the engine is not healthy: {why}")]
    Unhealthy { why: String },
}

/// Checks everything that needs only the request and the model's dimensions.
pub(crate) fn check(request: &Request, vocab: usize, context_max: usize) -> Result<(), SubmitError> {
    let n_prompt = request.tokens.len();
    if n_prompt == 0 {
        return Err(SubmitError::Empty);
    }
    let too_long = request.max_tokens > context_max || n_prompt > context_max - request.max_tokens;
    if too_long {
        return Err(SubmitError::TooLong { n_prompt, max_tokens: request.max_tokens, context_max });
    }
    if let Some(index) = request.tokens.iter().position(|&id| id as usize >= vocab) {
        let id = request.tokens[index];
        return Err(SubmitError::TokenOutOfVocab { id, index, vocab });
    }
    check_fields(request, vocab)?;
    check_sampling(&request.sampling, vocab)
}

fn check_fields(request: &Request, vocab: usize) -> Result<(), SubmitError> {
    let top = request.logprobs.max(request.prompt_logprobs).unwrap_or(0);
    require(request.max_tokens > 0 || request.prompt_logprobs.is_some(), "max_tokens", || {
        "must be at least 1 unless prompt log-probabilities are asked for".into()
    })?;
    require(request.min_tokens <= request.max_tokens, "min_tokens", || {
        format!("must not exceed max_tokens, got {}", request.min_tokens)
    })?;
    require(top <= TOP_LOGPROBS_MAX, "logprobs", || {
        format!("must be at most {TOP_LOGPROBS_MAX}, got {top}")
    })?;
    require(request.stop_ids.len() <= STOP_IDS_MAX, "stop_token_ids", || {
        format!("must be at most {STOP_IDS_MAX}, got {}", request.stop_ids.len())
    })?;
    let outside = request.stop_ids.iter().find(|&&id| id as usize >= vocab);
    require(outside.is_none(), "stop_token_ids", || {
        format!("hold {outside:?}, outside the vocabulary of {vocab}")
    })
}

fn check_sampling(sampling: &Sampling, vocab: usize) -> Result<(), SubmitError> {
    let in_range = |field, value: f32, min: f32, max: f32| {
        // A NaN is in no range, so this refuses it.
        require((min..=max).contains(&value), field, || {
            format!("must be between {min} and {max}, got {value}")
        })
    };
    in_range("temperature", sampling.temperature, 0.0, 100.0)?;
    in_range("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0)?;
    in_range("min_p", sampling.min_p, 0.0, 1.0)?;
    in_range("typical_p", sampling.typical_p, f32::MIN_POSITIVE, 1.0)?;
    in_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    in_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    in_range("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)?;
    for &(id, bias) in &sampling.logit_bias {
        in_range("logit_bias", bias, -100.0, 100.0)?;
        require((id as usize) < vocab, "logit_bias", || {
            format!("names token id {id}, outside the vocabulary of {vocab}")
        })?;
    }
    Ok(())
}

fn require(ok: bool, field: &'static str, why: impl FnOnce() -> String) -> Result<(), SubmitError> {
    if ok {
        return Ok(());
    }
    Err(SubmitError::Invalid { field, why: why() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Request)) -> String {
        let mut request = Request::new(vec![1, 2, 3], 5, Sampling::default());
        change(&mut request);
        match check(&request, 10, 8) {
            Ok(()) => "ok".into(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn bad_requests_are_refused_by_name() {
        assert_eq!(refused(|_| ()), "ok");
        assert_eq!(refused(|r| r.tokens.clear()), "the prompt is empty");
        assert!(refused(|r| r.tokens.push(4)).contains("exceed the context of 8"));
        assert!(refused(|r| r.max_tokens = usize::MAX).contains("exceed the context of 8"));
        assert!(refused(|r| r.tokens[1] = 10).contains("token id 10 at prompt index 1"));
        assert!(refused(|r| r.max_tokens = 0).starts_with("max_tokens must be at least 1"));
        assert!(refused(|r| r.min_tokens = 6).starts_with("min_tokens"));
        assert!(refused(|r| r.logprobs = Some(21)).starts_with("logprobs must be at most 20"));
        assert!(refused(|r| r.stop_ids = vec![10]).starts_with("stop_token_ids"));
        assert!(refused(|r| r.sampling.temperature = f32::NAN).starts_with("temperature"));
        assert!(refused(|r| r.sampling.temperature = -1.0).starts_with("temperature"));
        assert!(refused(|r| r.sampling.top_p = 0.0).starts_with("top_p"));
        assert!(refused(|r| r.sampling.min_p = 1.5).starts_with("min_p"));
        assert!(refused(|r| r.sampling.typical_p = 0.0).starts_with("typical_p"));
        assert!(refused(|r| r.sampling.repetition_penalty = 0.0).starts_with("repetition"));
        assert!(refused(|r| r.sampling.logit_bias = vec![(10, 1.0)]).starts_with("logit_bias"));
        assert!(refused(|r| r.sampling.logit_bias = vec![(1, 101.0)]).starts_with("logit_bias"));
    }
}
