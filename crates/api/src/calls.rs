//! Calls of functions in the text of an answer, found as the text comes.
//!
//! Models write calls the way they were taught. Read here: Hermes and Qwen, `<tool_call>{…}</tool_call>`; Llama 3, an
//! object that is the whole answer or follows `<|python_tag|>`; Mistral, `[TOOL_CALLS]` before a list of objects, or
//! before a name and its arguments. An object is a call if it names a declared function and its arguments are an object;
//! everything else stays the text it is.

use std::sync::Arc;

use serde_json::{Map, Value};

/// Text that may be held back while it is not clear whether it is a call. More is text.
const HELD_BYTES_MAX: usize = 64 << 10;
const CLOSING: &str = "</tool_call>";
/// Between a name and its arguments, in newer models of Mistral.
const ARGUMENTS: &str = "[ARGS]";
const OPENINGS: [(&str, Form); 3] =
    [("<tool_call>", Form::Tagged), ("[TOOL_CALLS]", Form::Listed), ("<|python_tag|>", Form::Bare)];
/// How an answer that is a call may go on after its first brace.
const FIRST_KEYS: [&str; 5] = ["\"name\"", "\"type\"", "\"function\"", "\"parameters\"", "\"arguments\""];

/// What special tokens have to be read as text, so that calls are found.
pub(crate) const SPOKEN: [&str; 5] = [OPENINGS[0].0, OPENINGS[1].0, OPENINGS[2].0, CLOSING, ARGUMENTS];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Tagged,
    Listed,
    Bare,
}

/// A part of an answer.
#[derive(Debug, PartialEq)]
pub(crate) enum Said {
    Text(String),
    Call { name: String, arguments: String },
}

/// Reads one answer.
#[derive(Debug)]
pub(crate) struct CallReader {
    /// Of the declared functions.
    names: Arc<[String]>,
    /// Only the first call counts.
    single: bool,
    n_calls: usize,
    /// Text that nothing was said about yet.
    held: String,
    state: State,
}

#[derive(Debug)]
enum State {
    /// `begun` once there was text other than white space.
    Text { begun: bool },
    /// `opening` is what comes back if it is no call.
    Call { form: Form, opening: String, object: Option<Object> },
    /// Between two calls, or behind the last.
    After(Form),
}

/// A JSON value in `held`, from its first brace.
#[derive(Debug)]
struct Object {
    start: usize,
    /// Looked through up to here.
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// What is to be done with the text held.
enum Next {
    /// Look again: the state has changed.
    Again,
    /// More text is needed.
    Wait,
}

impl CallReader {
    pub(crate) fn new(names: Arc<[String]>, single: bool) -> CallReader {
        let state = State::Text { begun: false };
        CallReader { names, single, n_calls: 0, held: String::new(), state }
    }

    pub(crate) fn has_called(&self) -> bool {
        self.n_calls > 0
    }

    /// What is clear once `piece` is known.
    pub(crate) fn push(&mut self, piece: &str) -> Vec<Said> {
        self.held.push_str(piece);
        self.read(false)
    }

    /// What was held back, once it is clear that nothing follows.
    pub(crate) fn finish(&mut self) -> Vec<Said> {
        self.read(true)
    }

    fn read(&mut self, is_last: bool) -> Vec<Said> {
        let mut said = Vec::new();
        loop {
            let next = match self.state {
                State::Text { begun } => self.read_text(begun, is_last, &mut said),
                State::Call { .. } => self.read_call(is_last, &mut said),
                State::After(form) => self.read_after(form, is_last),
            };
            if matches!(next, Next::Wait) {
                return said;
            }
        }
    }

    fn read_text(&mut self, begun: bool, is_last: bool, said: &mut Vec<Said>) -> Next {
        if !begun && self.held.trim_start().starts_with('{') {
            self.state = State::Call { form: Form::Bare, opening: String::new(), object: None };
            return Next::Again;
        }
        let found = OPENINGS.iter().filter_map(|&(word, form)| Some((self.held.find(word)?, word, form)));
        if let Some((at, word, form)) = found.min_by_key(|(at, ..)| *at) {
            let n_said = self.held[..at].trim_end().len();
            let opening = self.held[n_said..at + word.len()].to_owned();
            self.say(n_said, said);
            self.held.drain(..opening.len());
            self.state = State::Call { form, opening, object: None };
            return Next::Again;
        }
        let n_said = if is_last { self.held.len() } else { self.n_certain() };
        if is_last && self.has_called() && self.held.trim().is_empty() {
            self.held.clear();
        } else {
            self.say(n_said, said);
        }
        Next::Wait
    }

    /// Bytes of plain text before white space and what may become an opening.
    fn n_certain(&self) -> usize {
        let begins = |at: usize| OPENINGS.iter().any(|(word, _)| word.starts_with(&self.held[at..]));
        let from = self.held.len().saturating_sub(OPENINGS.map(|(word, _)| word.len())[2]);
        let boundaries = (from..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let end = { boundaries }.find(|&at| begins(at)).unwrap_or(self.held.len());
        let n_certain = self.held[..end].trim_end().len();
        if self.held.len() - n_certain > HELD_BYTES_MAX { self.held.len() } else { n_certain }
    }

    fn say(&mut self, n_bytes: usize, said: &mut Vec<Said>) {
        let rest = self.held.split_off(n_bytes);
        let text = std::mem::replace(&mut self.held, rest);
        if !text.trim().is_empty() {
            self.state = State::Text { begun: true };
        }
        if !text.is_empty() {
            said.push(Said::Text(text));
        }
    }

    fn read_call(&mut self, is_last: bool, said: &mut Vec<Said>) -> Next {
        match self.find_calls() {
            Found::Calls { calls, end } => {
                self.held.drain(..end);
                let State::Call { form, .. } = self.state else { unreachable!("a call is being read") };
                self.state = State::After(form);
                for call in calls {
                    self.n_calls += 1;
                    if self.n_calls == 1 || !self.single {
                        said.push(call);
                    }
                }
                Next::Again
            }
            Found::Open if !is_last && self.held.len() <= HELD_BYTES_MAX => Next::Wait,
            Found::Open | Found::Text => {
                let begun = State::Text { begun: true };
                if let State::Call { opening, .. } = std::mem::replace(&mut self.state, begun)
                    && !opening.is_empty()
                {
                    said.push(Said::Text(opening));
                }
                Next::Again
            }
        }
    }

    fn find_calls(&mut self) -> Found {
        let State::Call { form, object, .. } = &mut self.state else { unreachable!("a call is being read") };
        let (name, start) = match (find_start(&self.held, *form), &object) {
            (Start::At { name, start }, _) => (name, start),
            (Start::Unknown, _) => return Found::Open,
            (Start::Nowhere, _) => return Found::Text,
        };
        let object = object.get_or_insert(Object::at(start));
        let Some(end) = object.end(self.held.as_bytes()) else { return Found::Open };
        let Ok(value) = serde_json::from_str::<Value>(&self.held[start..end]) else { return Found::Text };
        let calls = match (name, value) {
            (Some(name), Value::Object(arguments)) => self.call(name, arguments).map(|call| vec![call]),
            (None, Value::Array(list)) => list.into_iter().map(|value| self.read_object(value)).collect(),
            (None, value) => self.read_object(value).map(|call| vec![call]),
            _ => None,
        };
        match calls.filter(|calls| !calls.is_empty()) {
            Some(calls) => Found::Calls { calls, end },
            None => Found::Text,
        }
    }

    fn read_object(&self, value: Value) -> Option<Said> {
        let Value::Object(mut object) = value else { return None };
        let name = object.remove("name").or_else(|| object.remove("function"))?;
        let arguments = object.remove("arguments").or_else(|| object.remove("parameters"));
        let arguments = match arguments {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            // Some models write what OpenAI's clients read: an object as a text.
            Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
            Some(_) => return None,
        };
        self.call(name.as_str()?, arguments)
    }

    fn call(&self, name: &str, arguments: Map<String, Value>) -> Option<Said> {
        let is_known = self.names.iter().any(|known| known == name);
        is_known
            .then(|| Said::Call { name: name.to_owned(), arguments: Value::Object(arguments).to_string() })
    }

    fn read_after(&mut self, form: Form, is_last: bool) -> Next {
        let separates = |c: char| c.is_whitespace() || (form == Form::Bare && c == ';');
        let rest = self.held.trim_start_matches(separates);
        let closes = form == Form::Tagged && rest.starts_with(CLOSING);
        if !closes && !is_last && (rest.is_empty() || form == Form::Tagged && CLOSING.starts_with(rest)) {
            return if self.held.len() > HELD_BYTES_MAX { self.plainly() } else { Next::Wait };
        }
        let n_rest = rest.len() - if closes { CLOSING.len() } else { 0 };
        self.held.drain(..self.held.len() - n_rest);
        if form == Form::Bare && self.held.starts_with('{') {
            self.state = State::Call { form, opening: String::new(), object: None };
            return Next::Again;
        }
        self.plainly()
    }

    fn plainly(&mut self) -> Next {
        self.state = State::Text { begun: true };
        Next::Again
    }
}

enum Found {
    Calls {
        calls: Vec<Said>,
        end: usize,
    },
    /// What is there may become a call.
    Open,
    Text,
}

enum Start<'a> {
    /// Where the JSON begins, and the function's name if it stands before.
    At {
        name: Option<&'a str>,
        start: usize,
    },
    Unknown,
    Nowhere,
}

fn find_start(held: &str, form: Form) -> Start<'_> {
    let text = held.trim_start();
    let start = held.len() - text.len();
    match text.as_bytes().first() {
        None => Start::Unknown,
        Some(b'{') if form == Form::Bare && !may_be_call(text) => Start::Nowhere,
        Some(b'{') => Start::At { name: None, start },
        Some(b'[') if form == Form::Listed => Start::At { name: None, start },
        Some(_) if form == Form::Listed => find_named_start(held, start),
        Some(_) => Start::Nowhere,
    }
}

/// Of `name{…}` and `name[ARGS]{…}`.
fn find_named_start(held: &str, start: usize) -> Start<'_> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let text = &held[start..];
    let name = &text[..text.find(|c| !is_name(c)).unwrap_or(text.len())];
    let rest = text[name.len()..].trim_start();
    if rest.is_empty() || ARGUMENTS.starts_with(rest) {
        return Start::Unknown;
    }
    let rest = rest.strip_prefix(ARGUMENTS).unwrap_or(rest).trim_start();
    match rest.as_bytes().first() {
        None => Start::Unknown,
        Some(b'{') if !name.is_empty() => Start::At { name: Some(name), start: held.len() - rest.len() },
        Some(_) => Start::Nowhere,
    }
}

/// Whether the object that begins `text` begins as calls do: other objects are answers and should not wait for their end.
fn may_be_call(text: &str) -> bool {
    let key = text[1..].trim_start();
    FIRST_KEYS.iter().any(|first| first.starts_with(key) || key.starts_with(first))
}

impl Object {
    fn at(start: usize) -> Object {
        Object { start, at: start, depth: 0, in_string: false, escaped: false }
    }

    /// Behind its last brace, once that is there. Each byte is looked at once.
    fn end(&mut self, held: &[u8]) -> Option<usize> {
        debug_assert!(self.start <= self.at, "an object does not end before it begins");
        while let Some(&byte) = held.get(self.at) {
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Some(self.at);
                    }
                }
                _ => (),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Said {
        Said::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> Said {
        Said::Call { name: name.into(), arguments: arguments.into() }
    }

    /// What is said if `answer` comes in pieces of `size` characters, neighbouring texts joined.
    fn read(answer: &str, size: usize) -> Vec<Said> {
        let mut reader = CallReader::new(["f".to_owned(), "get-it".to_owned()].into(), false);
        let chars: Vec<char> = answer.chars().collect();
        let mut said: Vec<Said> =
            chars.chunks(size).flat_map(|piece| reader.push(&piece.iter().collect::<String>())).collect();
        said.extend(reader.finish());
        let mut joined: Vec<Said> = Vec::new();
        for part in said {
            match (joined.last_mut(), part) {
                (Some(Said::Text(before)), Said::Text(more)) => before.push_str(&more),
                (_, part) => joined.push(part),
            }
        }
        joined
    }

    fn check(answer: &str, expected: &[Said]) {
        for size in [1, 2, 3, 7, 1000] {
            assert_eq!(read(answer, size), expected, "{answer} by {size}");
        }
    }

    #[test]
    fn calls_are_found_in_every_form() {
        let f = || call("f", r#"{"a":"}<"}"#);
        check("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}<\"}}\n</tool_call>", &[f()]);
        check(
            "I will.\n<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":\"}<\"}}</tool_call>\n<tool_call>{\"name\":\"get-it\"}</tool_call>\nDone.",
            &[text("I will."), f(), call("get-it", "{}"), text("\nDone.")],
        );
        // The end of the answer closes as well.
        check("<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":\\\"}<\\\"}\"}", &[f()]);
        check("{\"name\": \"f\", \"parameters\": {\"a\": \"}<\"}}", &[f()]);
        check(
            " {\"type\":\"function\",\"name\":\"f\",\"parameters\":{\"a\":\"}<\"}}; {\"name\":\"f\",\"parameters\":{}}",
            &[f(), call("f", "{}")],
        );
        check("<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": \"}<\"}}", &[f()]);
        check(
            "[TOOL_CALLS][{\"name\":\"f\",\"arguments\":{\"a\":\"}<\"}},{\"name\":\"f\",\"arguments\":{}}]",
            &[f(), call("f", "{}")],
        );
        check(
            "ok [TOOL_CALLS] get-it[ARGS]{\"b\":[1]}[TOOL_CALLS]f{}",
            &[text("ok"), call("get-it", r#"{"b":[1]}"#), call("f", "{}")],
        );
    }

    #[test]
    fn what_only_looks_like_a_call_stays_text() {
        for answer in [
            "plain text,  with spaces \n",
            "",
            " \n",
            "{\"name\": \"unknown\", \"parameters\": {}}",
            "{\"name\": \"f\", \"parameters\": [1]}",
            "{\"name\": \"f\", \"parameters\": {",
            "{\"name\": 5}",
            "{\"weather\": \"good\"}",
            "{not json}",
            "{",
            "Use the <tool_call> tag.",
            "<tool_call>{\"name\": \"f\"",
            "<tool_call>{\"name\": \"f\", \"arguments\": {}]}</tool_call>",
            "<tool_call></tool_call>",
            "a < b <tool <tool_calls",
            "[TOOL_CALLS]",
            "[TOOL_CALLS] nobody{}",
            "[TOOL_CALLS][]",
            "[TOOL_CALLS][{\"name\":\"f\"},5]",
            "[TOOL_CALLS]f[ARG",
            "an object {\"name\": \"f\", \"parameters\": {}} in a sentence",
            "é<tool_call>é",
        ] {
            let expected = if answer.is_empty() { vec![] } else { vec![text(answer)] };
            check(answer, &expected);
        }
        // One that fails does not hide the next.
        check("<tool_call><tool_call>{\"name\":\"f\"}</tool_call>", &[text("<tool_call>"), call("f", "{}")]);
    }

    /// Whatever a model says, however it comes: the same parts.
    #[test]
    fn parts_do_not_depend_on_the_pieces() {
        let words = [
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<|python_tag|>",
            "{\"name\":\"f\"",
            "}",
            "]",
            "[",
            ",\"arguments\":{",
            "\"",
            "\\",
            ";",
            " ",
            "\n",
            "f",
            "{",
            "é",
            "<",
        ];
        let mut state = 1u64;
        let mut below = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        let mut n_calls = 0;
        for _ in 0..20_000 {
            let answer: String = (0..=below(9)).map(|_| words[below(words.len())]).collect();
            let whole = read(&answer, 1000);
            n_calls += whole.iter().filter(|said| matches!(said, Said::Call { .. })).count();
            for size in [1, 2, 5] {
                assert_eq!(read(&answer, size), whole, "{answer:?} by {size}");
            }
        }
        assert!(n_calls > 50, "{n_calls}");
    }

    #[test]
    fn only_what_may_be_a_call_is_held_back() {
        let mut reader = CallReader::new(["f".to_owned()].into(), true);
        assert_eq!(reader.push("a <b <tool"), [text("a <b")]);
        assert_eq!(reader.push("s"), [text(" <tools")]);
        assert_eq!(reader.push("<tool_call>{"), []);
        let long = "x".repeat(HELD_BYTES_MAX);
        let said = reader.push(&long);
        assert_eq!(said, [text("<tool_call>"), text(&format!("{{{long}"))]);
        for _ in 0..2 {
            reader.push("<tool_call>{\"name\":\"f\"}</tool_call>");
        }
        // The second is dropped, because one was wanted.
        assert_eq!((reader.finish(), reader.n_calls), (vec![], 2));
        let mut json = CallReader::new(["f".to_owned()].into(), true);
        assert_eq!(json.push("{\"we"), [text("{\"we")]);
    }
}
