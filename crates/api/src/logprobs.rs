//! Log-probabilities in the shapes of the two endpoints.

use engine::Logprobs;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokenizer::Tokenizer;

use crate::choice::Token;

/// What stands for a probability of zero, whose logarithm JSON cannot write; OpenAI's own choice.
const LOGPROB_MIN: f32 = -9999.0;

/// `choices[].logprobs` of a chat completion.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatToken>,
    pub(crate) refusal: Option<()>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    token: ChatTopToken,
    top_logprobs: Vec<ChatTopToken>,
}

#[derive(Debug, Serialize)]
struct ChatTopToken {
    token: String,
    logprob: f32,
    /// The token's own bytes: its text alone may be half a character.
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn new(tokenizer: &Tokenizer, tokens: &[Token]) -> ChatLogprobs {
        let content = tokens.iter().map(|token| ChatToken::new(tokenizer, token)).collect();
        ChatLogprobs { content, refusal: None }
    }
}

impl ChatToken {
    fn new(tokenizer: &Tokenizer, token: &Token) -> ChatToken {
        let top = token.logprobs.top.iter().map(|&(id, logprob)| ChatTopToken::new(tokenizer, id, logprob));
        ChatToken {
            token: ChatTopToken::new(tokenizer, token.id, token.logprobs.logprob),
            top_logprobs: top.collect(),
        }
    }
}

impl ChatTopToken {
    fn new(tokenizer: &Tokenizer, id: u32, logprob: f32) -> ChatTopToken {
        let bytes = tokenizer.token_bytes(id).to_vec();
        ChatTopToken { token: token_text(&bytes), logprob: finite(logprob), bytes }
    }
}

/// `choices[].logprobs` of a text completion: four parallel lists, one entry per token.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    pub(crate) text_offset: Vec<usize>,
    pub(crate) token_logprobs: Vec<Option<f32>>,
    pub(crate) tokens: Vec<String>,
    pub(crate) top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl TextLogprobs {
    /// Adds generated tokens, whose text begins `offset` bytes into the answer.
    pub(crate) fn extend(&mut self, tokenizer: &Tokenizer, tokens: &[Token], offset: usize) {
        for token in tokens {
            self.push(tokenizer, token.id, offset + token.offset, Some(&token.logprobs));
        }
    }

    /// Adds the prompt's tokens; the first has no log-probability, because nothing precedes it.
    pub(crate) fn extend_prompt(
        &mut self,
        tokenizer: &Tokenizer,
        ids: &[u32],
        logprobs: &[Option<Logprobs>],
    ) {
        let mut offset = 0;
        for (index, &id) in ids.iter().enumerate() {
            self.push(tokenizer, id, offset, logprobs.get(index).and_then(Option::as_ref));
            offset += tokenizer.token_bytes(id).len();
        }
    }

    fn push(&mut self, tokenizer: &Tokenizer, id: u32, offset: usize, logprobs: Option<&Logprobs>) {
        self.text_offset.push(offset);
        self.tokens.push(token_text(tokenizer.token_bytes(id)));
        self.token_logprobs.push(logprobs.map(|l| finite(l.logprob)));
        self.top_logprobs.push(logprobs.map(|l| {
            let mut top = Map::new();
            for &(id, logprob) in &l.top {
                top.insert(token_text(tokenizer.token_bytes(id)), finite(logprob).into());
            }
            // OpenAI adds the token itself when it is not among the most likely.
            let own = token_text(tokenizer.token_bytes(id));
            top.entry(own).or_insert_with(|| finite(l.logprob).into());
            top
        }));
    }
}

/// vLLM's `prompt_logprobs`: for every token of the prompt but the first, its own log-probability and the `n_top` most
/// likely tokens', by id.
pub(crate) fn of_prompt(
    tokenizer: &Tokenizer,
    ids: &[u32],
    logprobs: &[Option<Logprobs>],
    n_top: usize,
) -> Vec<Option<Map<String, Value>>> {
    let entry = |id: u32, logprob: f32, rank: Option<usize>| {
        let text = token_text(tokenizer.token_bytes(id));
        (id.to_string(), json!({"logprob": finite(logprob), "rank": rank, "decoded_token": text}))
    };
    let one = |(&id, logprobs): (&u32, &Option<Logprobs>)| {
        let Logprobs { logprob, top } = logprobs.as_ref()?;
        let top = top.iter().take(n_top).zip(1..);
        let mut map: Map<_, _> = top.map(|(&(id, logprob), rank)| entry(id, logprob, Some(rank))).collect();
        let (key, own) = entry(id, *logprob, None);
        map.entry(key).or_insert(own);
        Some(map)
    };
    ids.iter().zip(logprobs).map(one).collect()
}

/// A token as text; one that is not whole characters is written as OpenAI does, `bytes:\xe2\x96`.
fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(LOGPROB_MIN) } else { LOGPROB_MIN }
}
