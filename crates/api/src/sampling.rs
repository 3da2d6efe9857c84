//! The fields chat and text completions share, read and checked.

use engine::{Constraint, Request, STOP_IDS_MAX, Sampling, TOP_LOGPROBS_MAX};
use serde_json::Value;

use crate::error::{ApiError, Result};
use crate::json::{Fields, expected};
use crate::state::ServedModel;
use crate::structured::{self, Structure};

/// Strings of `stop`.
const STOPS_MAX: usize = 4;
/// Bytes of one stop string: matching it costs time for every token.
const STOP_BYTES_MAX: usize = 1024;
/// Entries of `logit_bias`.
const BIASES_MAX: usize = 1024;

/// How to generate, for each of the sequences a request asks for.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Answers per prompt.
    pub(crate) n: usize,
    /// New tokens at most; `None` is what the context leaves. Whoever set it is named by `max_tokens_field`.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) max_tokens_field: &'static str,
    pub(crate) min_tokens: usize,
    pub(crate) stops: Vec<String>,
    /// The request's own and the model's.
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    /// At most 0: who asks may let others go first, not himself.
    pub(crate) priority: i8,
    /// The seed in it is the first answer's; the next ones count up from it.
    pub(crate) sampling: Sampling,
    /// Top log-probabilities per token, if any were asked for.
    pub(crate) logprobs: Option<usize>,
    /// The same for the prompt's tokens, because they are echoed or were asked for by themselves.
    pub(crate) prompt_logprobs: Option<usize>,
    /// What the answers must look like, and, once it is compiled, what holds them to it.
    pub(crate) structure: Option<Structure>,
    pub(crate) constraint: Option<Box<dyn Constraint>>,
    /// Special tokens that are part of the answer's text all the same.
    pub(crate) spoken_ids: Vec<u32>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

impl Options {
    /// Everything but `max_tokens` and `logprobs`, which the two endpoints spell differently.
    pub(crate) fn read(fields: Fields, model: &ServedModel) -> Result<Options> {
        let stream = fields.flag("stream")?;
        Ok(Options {
            n: fields.count("n", 1..=128)?.unwrap_or(1),
            max_tokens: None,
            max_tokens_field: "max_tokens",
            min_tokens: fields.count("min_tokens", 0..=model.context_max())?.unwrap_or(0),
            stops: read_stops(fields)?,
            stop_ids: read_stop_ids(fields, model)?,
            ignore_eos: fields.flag("ignore_eos")?,
            // vLLM's, where lower goes first.
            priority: -(fields.integer("priority", 0..=127)?.unwrap_or(0) as i8),
            sampling: read_sampling(fields, model)?,
            logprobs: None,
            prompt_logprobs: read_prompt_logprobs(fields, stream)?,
            structure: structured::read(fields)?,
            constraint: None,
            spoken_ids: Vec::new(),
            stream,
            include_usage: read_include_usage(fields, stream)?,
        })
    }

    /// The engine's requests for one prompt, `n` of them. Refuses a prompt that leaves no room to answer.
    pub(crate) fn requests(
        &self,
        model: &ServedModel,
        prompt: &Prompt,
        tenant: &str,
    ) -> Result<Vec<Request>> {
        let max_tokens = self.room(model.context_max(), prompt)?;
        let request = |index| {
            let mut sampling = self.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index);
            let mut request = Request::new(prompt.tokens.clone(), max_tokens, sampling);
            request.min_tokens = self.min_tokens;
            request.stop_ids = self.stop_ids.clone();
            request.ignore_eos = self.ignore_eos;
            request.priority = self.priority;
            request.logprobs = self.logprobs;
            request.prompt_logprobs = self.prompt_logprobs;
            request.constraint = self.constraint.clone();
            request.adapter = model.adapter.clone();
            request.tenant = tenant.to_owned();
            request
        };
        Ok((0..self.n as u64).map(request).collect())
    }

    /// New tokens this prompt may get.
    fn room(&self, context_max: usize, prompt: &Prompt) -> Result<usize> {
        let n_prompt = prompt.tokens.len();
        let too_long = |param, message| Err(ApiError::ContextLength { param, message });
        // Scoring a prompt asks for no new token and may fill the context.
        let n_least = self.max_tokens.unwrap_or(1).min(1);
        if n_prompt + n_least > context_max {
            let message = format!(
                "This model's context is {context_max} tokens. The prompt has {n_prompt}, which leaves no room for an answer."
            );
            return too_long(prompt.param, message);
        }
        let left = context_max - n_prompt;
        match self.max_tokens {
            Some(max) if max > left => {
                let message = format!(
                    "This model's context is {context_max} tokens. The prompt has {n_prompt}, so `{}` can be at most {left}, got {max}.",
                    self.max_tokens_field
                );
                too_long(self.max_tokens_field, message)
            }
            Some(max) => Ok(max),
            None => Ok(left),
        }
    }
}

/// Ids to go on from, and the field they came from.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    /// What the ids stand for, repeated by `echo`; empty for a chat.
    pub(crate) text: String,
    pub(crate) param: &'static str,
}

fn read_sampling(fields: Fields, model: &ServedModel) -> Result<Sampling> {
    let top_p = fields.float("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    let mut top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?.unwrap_or(0).max(0) as usize;
    if top_p == 0.0 {
        // The smallest set of tokens that sums to at least nothing is the most likely token.
        top_k = 1;
    }
    Ok(Sampling {
        temperature: fields.float("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_k,
        top_p: if top_p == 0.0 { 1.0 } else { top_p },
        min_p: fields.float("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        typical_p: fields.float("typical_p", f64::from(f32::MIN_POSITIVE)..=1.0)?.unwrap_or(1.0),
        seed: match fields.integer("seed", i64::MIN..=i64::MAX)? {
            Some(seed) => seed as u64,
            None => random_seed()?,
        },
        presence_penalty: fields.float("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.float("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        repetition_penalty: fields.float("repetition_penalty", 0.01..=100.0)?.unwrap_or(1.0),
        logit_bias: read_logit_bias(fields, model)?,
    })
}

fn random_seed() -> Result<u64> {
    getrandom::u64().map_err(|e| ApiError::internal(format!("no random numbers: {e}")))
}

fn read_stops(fields: Fields) -> Result<Vec<String>> {
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let values = match value {
        Value::Array(values) => values.as_slice(),
        single => std::slice::from_ref(single),
    };
    if values.len() > STOPS_MAX {
        let why = format!("at most {STOPS_MAX} stop strings are allowed, got {}", values.len());
        return Err(ApiError::invalid("stop", why));
    }
    values.iter().map(read_stop).collect()
}

fn read_stop(value: &Value) -> Result<String> {
    let stop = value.as_str().ok_or_else(|| expected("stop", "a string or an array of strings", value))?;
    if stop.is_empty() {
        return Err(ApiError::invalid("stop", "a stop string must not be empty"));
    }
    if stop.len() > STOP_BYTES_MAX {
        let why = format!("a stop string can have at most {STOP_BYTES_MAX} bytes, got {}", stop.len());
        return Err(ApiError::invalid("stop", why));
    }
    Ok(stop.to_owned())
}

fn read_stop_ids(fields: Fields, model: &ServedModel) -> Result<Vec<u32>> {
    let values = fields.list("stop_token_ids")?.unwrap_or_default();
    let n_max = STOP_IDS_MAX - model.stop_ids.len().min(STOP_IDS_MAX);
    if values.len() > n_max {
        let why = format!("at most {n_max} ids are allowed, got {}", values.len());
        return Err(ApiError::invalid("stop_token_ids", why));
    }
    let mut ids = model.stop_ids.clone();
    for value in values {
        ids.push(read_token_id("stop_token_ids", value, model.engine.vocab())?);
    }
    Ok(ids)
}

/// A token id inside the vocabulary.
pub(crate) fn read_token_id(param: &str, value: &Value, vocab: usize) -> Result<u32> {
    let inside = value.as_u64().filter(|&id| id < vocab as u64);
    inside
        .map(|id| id as u32)
        .ok_or_else(|| expected(param, &format!("token ids from 0 to {}", vocab - 1), value))
}

fn read_logit_bias(fields: Fields, model: &ServedModel) -> Result<Vec<(u32, f32)>> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if biases.0.len() > BIASES_MAX {
        return Err(ApiError::invalid("logit_bias", format!("at most {BIASES_MAX} entries are allowed")));
    }
    let vocab = model.engine.vocab();
    let mut out = Vec::with_capacity(biases.0.len());
    for (key, value) in biases.0 {
        let id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
        let id = id.ok_or_else(|| {
            let why =
                format!("keys are token ids from 0 to {}, got `{}`", vocab - 1, crate::error::echo(key));
            ApiError::invalid("logit_bias", why)
        })?;
        let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| expected("logit_bias", "numbers from -100 to 100", value))?;
        out.push((id, bias as f32));
    }
    Ok(out)
}

/// vLLM's way to score a prompt: a list beside the answer.
fn read_prompt_logprobs(fields: Fields, stream: bool) -> Result<Option<usize>> {
    let wanted = fields.count("prompt_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if wanted.is_some() && stream {
        return Err(ApiError::invalid("prompt_logprobs", "only allowed when `stream` is false"));
    }
    Ok(wanted)
}

fn read_include_usage(fields: Fields, stream: bool) -> Result<bool> {
    let Some(options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "only allowed when `stream` is true"));
    }
    options.flag("include_usage")
}
