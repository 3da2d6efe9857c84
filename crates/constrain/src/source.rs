//! What can be asked for, and how much of it.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use crate::CompileError;
use crate::gbnf::{self, FindToken};

/// Bytes of a schema or grammar. OpenAI takes 120,000 characters of names and values in a schema.
const TEXT_BYTES_MAX: usize = 256 << 10;
/// Bytes of a regular expression.
const REGEX_BYTES_MAX: usize = 16 << 10;
/// Alternatives of a choice, and their bytes together.
const CHOICES_MAX: usize = 4096;
/// Brackets inside brackets: their parsers are recursive.
const NESTING_MAX: usize = 128;

/// Digits that matter of a `multipleOf`: as many states as its value without the point have to be made.
const MULTIPLE_MAX: u64 = 10_000;

/// White space between the parts of a JSON text: none, one space, or a new line and its indentation. Bounded, because
/// a small model that may write white space for ever does.
const JSON_SPACE: &str = r"( |\n{1,2}[ \t]{0,20})";

/// A description of outputs.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Any JSON object.
    JsonObject,
    /// A JSON text that is valid against this schema.
    JsonSchema(Value),
    /// A text that matches this regular expression as a whole. No look-around and no back references: it is linear.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in the Lark dialect of llguidance.
    Lark(String),
    /// A grammar as llama.cpp reads it.
    Gbnf(String),
}

impl Source {
    /// A grammar in the language that its first rule is written in.
    pub fn from_grammar(text: String) -> Source {
        if gbnf::is_gbnf(&text) { Source::Gbnf(text) } else { Source::Lark(text) }
    }

    /// Two descriptions with one key are the same. The order of a schema's properties counts: outputs follow it.
    pub(crate) fn key(&self) -> String {
        match self {
            Source::JsonObject => "json".into(),
            Source::JsonSchema(schema) => format!("schema {schema}"),
            Source::Regex(regex) => format!("regex {regex}"),
            Source::Choice(choices) => format!("choice {}", Value::from(choices.as_slice())),
            Source::Lark(grammar) => format!("lark {grammar}"),
            Source::Gbnf(grammar) => format!("gbnf {grammar}"),
        }
    }

    /// The same in llguidance's words, if it is within our bounds.
    pub(crate) fn grammar(&self, find_token: FindToken<'_>) -> Result<TopLevelGrammar, CompileError> {
        match self {
            Source::JsonObject => Ok(json_grammar(&json!({"type": "object"}))),
            Source::JsonSchema(schema) => {
                bound(schema.to_string().len(), TEXT_BYTES_MAX, "bytes")?;
                check_multiples(schema)?;
                Ok(json_grammar(schema))
            }
            Source::Regex(regex) => {
                bound(regex.len(), REGEX_BYTES_MAX, "bytes")?;
                check_nesting(regex)?;
                Ok(TopLevelGrammar::from_regex(regex))
            }
            Source::Choice(choices) => choice_grammar(choices),
            Source::Lark(grammar) => {
                bound(grammar.len(), TEXT_BYTES_MAX, "bytes")?;
                check_nesting(grammar)?;
                if grammar.contains("multipleOf") {
                    return Err(CompileError::Invalid(
                        "`multipleOf` is not allowed inside of a grammar".into(),
                    ));
                }
                Ok(TopLevelGrammar::from_lark(grammar.clone()))
            }
            Source::Gbnf(grammar) => {
                bound(grammar.len(), TEXT_BYTES_MAX, "bytes")?;
                Ok(TopLevelGrammar::from_lark(gbnf::to_lark(grammar, find_token)?))
            }
        }
    }
}

fn json_grammar(schema: &Value) -> TopLevelGrammar {
    let mut schema = schema.clone();
    // A schema may be just `true`.
    if let Some(map) = schema.as_object_mut()
        && !map.contains_key("x-guidance")
    {
        map.insert("x-guidance".into(), json!({"whitespace_pattern": JSON_SPACE}));
    }
    TopLevelGrammar::from_json_schema(schema)
}

fn choice_grammar(choices: &[String]) -> Result<TopLevelGrammar, CompileError> {
    bound(choices.len(), CHOICES_MAX, "choices")?;
    bound(choices.iter().map(String::len).sum(), TEXT_BYTES_MAX, "bytes")?;
    if choices.is_empty() || choices.iter().any(String::is_empty) {
        return Err(CompileError::Invalid("a choice needs at least one text, and none may be empty".into()));
    }
    // JSON's strings are a subset of Lark's.
    let quoted: Vec<String> = choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
    Ok(TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | "))))
}

fn bound(n: usize, n_max: usize, what: &str) -> Result<(), CompileError> {
    if n <= n_max {
        return Ok(());
    }
    Err(CompileError::Invalid(format!("it can have at most {n_max} {what}, got {n}")))
}

fn check_nesting(text: &str) -> Result<(), CompileError> {
    let mut depth = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => (),
        }
        if depth > NESTING_MAX {
            return Err(CompileError::Invalid(format!("brackets are nested more than {NESTING_MAX} deep")));
        }
    }
    Ok(())
}

fn check_multiples(schema: &Value) -> Result<(), CompileError> {
    if let Some(number) = schema.get("multipleOf").filter(|value| value.is_number()) {
        let digits: String = number.to_string().chars().filter(char::is_ascii_digit).collect();
        if number.to_string().contains('e') || digits.parse::<u64>().map_or(true, |n| n > MULTIPLE_MAX) {
            let why = format!(
                "`multipleOf` can have a value of at most {MULTIPLE_MAX}, its point left out, got {number}"
            );
            return Err(CompileError::Invalid(why));
        }
    }
    let inner: Box<dyn Iterator<Item = &Value>> = match schema {
        Value::Array(values) => Box::new(values.iter()),
        Value::Object(map) => Box::new(map.values()),
        _ => Box::new(std::iter::empty()),
    };
    inner.into_iter().try_for_each(check_multiples)
}
