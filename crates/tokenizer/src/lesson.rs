//! Lessons: conversations as ids, with a mark on those that the assistant said.
//!
//! What the assistant said is found in the rendered text. A template that says it itself (`{% generation %}`) is taken at
//! its word. Of others the text before an answer is what a request for that answer would render, and the answer is what
//! the conversation up to it renders beyond that: so a model learns to go on from what it will be given.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::jinja::{GENERATION_BEGINS, GENERATION_ENDS};
use crate::tokenizer::{TokenId, Tokenizer};
use crate::{Error, Result};

/// Ids to learn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lesson {
    pub ids: Vec<TokenId>,
    /// For each id whether the model is to learn to write it.
    pub is_learned: Vec<bool>,
}

/// A rendered conversation and the parts of it that the assistant said, in order.
pub(crate) struct Spoken {
    text: String,
    answers: Vec<Range<usize>>,
}

/// Renders variables that are protected already.
type Render<'a> = &'a dyn Fn(&Value) -> Result<String>;

/// What the template itself marks as said by the assistant; `None` if those are not the assistant's messages one by one.
pub(crate) fn marked(
    messages: &[Value],
    protected: &Value,
    [begin, end]: [char; 2],
    render: Render,
) -> Result<Option<Spoken>> {
    let mut variables = protected.clone();
    variables[GENERATION_BEGINS] = begin.to_string().into();
    variables[GENERATION_ENDS] = end.to_string().into();
    let rendered = render(&variables)?;
    let mut spoken = Spoken { text: String::with_capacity(rendered.len()), answers: Vec::new() };
    let mut open = None;
    for c in rendered.chars() {
        match c {
            _ if c == begin => open = Some(spoken.text.len()),
            _ if c == end => spoken.answers.extend(open.take().map(|start| start..spoken.text.len())),
            _ => spoken.text.push(c),
        }
    }
    let n_answers = messages.iter().filter(|message| is_answer(message)).count();
    Ok((spoken.answers.len() == n_answers).then_some(spoken))
}

/// What requests for the answers would render, and what the answers add to it.
pub(crate) fn by_turns(
    messages: &[Value],
    protected: &Value,
    tokenizer: &Tokenizer,
    is_learned: &dyn Fn(usize) -> bool,
    render: Render,
) -> Result<Vec<Spoken>> {
    let mut all: Vec<Spoken> = Vec::new();
    for i in (0..messages.len()).filter(|&i| is_answer(&messages[i]) && is_learned(i)) {
        let before = render(&first(protected, i, true))?;
        let after = render(&first(protected, i + 1, false))?;
        let start = match after.starts_with(&before) {
            true => before.len(),
            false => {
                let certain = render(&first(protected, i, false))?;
                where_answer_starts([&certain, &before, &after], tokenizer).ok_or_else(|| {
                    Error::Template(format!("it writes what comes before messages[{i}] in two ways"))
                })?
            }
        };
        let answer = start..after.len();
        match all.last_mut().filter(|last| after[..start].starts_with(&last.text)) {
            Some(last) => {
                last.text = after;
                last.answers.push(answer);
            }
            None => all.push(Spoken { text: after, answers: vec![answer] }),
        }
    }
    Ok(all)
}

fn is_answer(message: &Value) -> bool {
    message["role"] == "assistant"
}

/// The variables with the first `n` messages only.
fn first(protected: &Value, n: usize, add_generation_prompt: bool) -> Value {
    let with = |(name, value): (&String, &Value)| {
        let value = match (name.as_str(), value) {
            ("messages", Value::Array(messages)) => Value::Array(messages[..n.min(messages.len())].to_vec()),
            ("add_generation_prompt", _) => Value::Bool(add_generation_prompt),
            _ => value.clone(),
        };
        (name.clone(), value)
    };
    Value::Object(
        protected.as_object().map(|map| map.iter().map(with).collect::<Map<_, _>>()).unwrap_or_default(),
    )
}

/// A request's rendering that begins the answer with something the history leaves out (`<think>`): the answer starts
/// where the two part, but never inside of a special token.
fn where_answer_starts([certain, before, after]: [&str; 3], tokenizer: &Tokenizer) -> Option<usize> {
    if !after.starts_with(certain) {
        return None;
    }
    let common = before.bytes().zip(after.bytes()).take_while(|(a, b)| a == b).count();
    let common = after.floor_char_boundary(common);
    let special = tokenizer.special();
    let places = certain.len()..common;
    let mut cut = places.filter(|&at| after.is_char_boundary(at) && special.is_beginning(&after[at..common]));
    (common >= certain.len()).then(|| cut.next().unwrap_or(common))
}

impl Spoken {
    /// Only the answers that are to be learned.
    pub(crate) fn only(mut self, messages: &[Value], is_learned: &dyn Fn(usize) -> bool) -> Spoken {
        let indices = (0..messages.len()).filter(|&i| is_answer(&messages[i]));
        let kept = self.answers.drain(..).zip(indices).filter(|(_, i)| is_learned(*i));
        self.answers = kept.map(|(answer, _)| answer).collect();
        self
    }

    /// Ids, cut where answers begin and end so that no token is half learned.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        bos: Option<TokenId>,
        restore: &dyn Fn(&str) -> String,
    ) -> Lesson {
        let mut ids: Vec<TokenId> = bos.into_iter().collect();
        let mut is_learned = vec![false; ids.len()];
        let mut done = 0;
        let mut ends_itself = false;
        let push = |part: Range<usize>, ids: &mut Vec<TokenId>| {
            tokenizer.encode_rendered(&self.text[part.clone()], part.start == 0, restore, ids);
        };
        for answer in &self.answers {
            push(done..answer.start, &mut ids);
            is_learned.resize(ids.len(), false);
            push(answer.clone(), &mut ids);
            // What a template writes after the token that ends an answer is its own, not the assistant's.
            let said = &ids[is_learned.len()..];
            let end = said
                .iter()
                .rposition(|id| tokenizer.is_special(*id))
                .filter(|&end| tokenizer.decode(&said[end..]).trim().is_empty());
            ends_itself = end.is_some();
            is_learned.resize(is_learned.len() + end.map_or(said.len(), |end| end + 1), true);
            is_learned.resize(ids.len(), false);
            done = answer.end;
        }
        // A template without such a token: the end of the text is the end of the answer.
        if let Some(eos) = tokenizer.eos().filter(|_| !ends_itself && !self.answers.is_empty()) {
            ids.push(eos);
            is_learned.push(true);
        }
        Lesson { ids, is_learned }
    }
}
