//! Functions a model may call: what a client declares, the grammar that follows, and the calls in the answer.
//!
//! A call that the client demands (`tool_choice` is `required` or names one) is held to the functions' schemas, whatever
//! the model. Whether to call one by itself (`auto`) is the model's own habit: `calls.rs` reads how each spells it.

use std::sync::Arc;

use constrain::Source;
use serde::Serialize;
use serde_json::{Value, json};

use crate::calls::CallReader;
use crate::error::{ApiError, Result, echo};
use crate::json::{Fields, expected};
use crate::structured::Structure;

/// OpenAI's bounds.
const TOOLS_MAX: usize = 128;
const NAME_CHARS_MAX: usize = 64;

/// What the answer's call is about.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    /// As the client sent them; chat templates know this form.
    pub(crate) declared: Vec<Value>,
    pub(crate) call: Call,
    /// Whether to call one is left to the model.
    pub(crate) free: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Call {
    /// The functions are known to the model, and not called.
    None,
    /// The answer is the arguments of this function.
    Of(String),
    /// Calls of these functions are read from the answer, only the first if `single`.
    Read { names: Arc<[String]>, single: bool },
}

impl Call {
    /// Reads calls from one answer, if any are to be read.
    pub(crate) fn reader(&self) -> CallReader {
        match self {
            Call::Read { names, single } => CallReader::new(names.clone(), *single),
            Call::None | Call::Of(_) => CallReader::new([].into(), false),
        }
    }
}

/// What a request says about calling.
enum Wanted {
    Nothing,
    Free,
    Any,
    One(String),
}

struct Function<'a> {
    name: &'a str,
    parameters: Value,
}

/// The functions a request declares, if any, and what its answer must look like if it has to call one.
pub(crate) fn read(fields: Fields) -> Result<Option<(Tools, Option<Structure>)>> {
    if fields.list("functions")?.is_some_and(|list| !list.is_empty()) {
        return Err(ApiError::invalid("functions", "they are deprecated, send `tools`"));
    }
    let declared = fields.list("tools")?.unwrap_or_default();
    if declared.len() > TOOLS_MAX {
        return Err(ApiError::invalid(
            "tools",
            format!("at most {TOOLS_MAX} are allowed, got {}", declared.len()),
        ));
    }
    let mut functions: Vec<Function> = Vec::with_capacity(declared.len());
    for (index, tool) in declared.iter().enumerate() {
        let function = read_function(tool, &format!("tools[{index}]"))?;
        if functions.iter().any(|known| known.name == function.name) {
            let why = format!("there are two functions `{}`", function.name);
            return Err(ApiError::invalid(format!("tools[{index}].function.name"), why));
        }
        functions.push(function);
    }
    let wanted = read_choice(fields, &functions)?;
    if functions.is_empty() {
        return Ok(None);
    }
    let schema = match &wanted {
        Wanted::Nothing | Wanted::Free => None,
        Wanted::One(name) => functions.iter().find(|f| f.name == *name).map(|f| f.parameters.clone()),
        Wanted::Any => Some(any_call(&functions)),
    };
    let structure = schema.map(|schema| Structure { source: Source::JsonSchema(schema), param: "tools" });
    let free = matches!(wanted, Wanted::Free);
    let single = !fields.flag_or("parallel_tool_calls", true)?;
    let call = match wanted {
        Wanted::Nothing => Call::None,
        Wanted::One(name) => Call::Of(name),
        Wanted::Free | Wanted::Any => {
            Call::Read { names: functions.iter().map(|f| f.name.to_owned()).collect(), single }
        }
    };
    Ok(Some((Tools { declared: declared.to_vec(), call, free }, structure)))
}

fn read_function<'a>(tool: &'a Value, at: &str) -> Result<Function<'a>> {
    if tool["type"] != "function" {
        return Err(ApiError::invalid(format!("{at}.type"), "only `function` is supported"));
    }
    let function = tool["function"].as_object();
    let function =
        function.ok_or_else(|| expected(format!("{at}.function"), "an object", &tool["function"]))?;
    let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !(1..=NAME_CHARS_MAX).contains(&name.len()) || !name.chars().all(is_plain) {
        let why = format!("expected 1 to {NAME_CHARS_MAX} letters, digits, `_` or `-`, got `{}`", echo(name));
        return Err(ApiError::invalid(format!("{at}.function.name"), why));
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => {
            json!({"type": "object", "properties": {}, "additionalProperties": false})
        }
        Some(parameters) if parameters.is_object() => parameters.clone(),
        Some(other) => return Err(expected(format!("{at}.function.parameters"), "a JSON schema", other)),
    };
    Ok(Function { name, parameters })
}

fn read_choice(fields: Fields, functions: &[Function]) -> Result<Wanted> {
    const PARAM: &str = "tool_choice";
    let free = if functions.is_empty() { Wanted::Nothing } else { Wanted::Free };
    let wanted = match fields.get(PARAM) {
        None => return Ok(free),
        Some(Value::String(word)) if word == "auto" => return Ok(free),
        Some(Value::String(word)) if word == "none" => return Ok(Wanted::Nothing),
        Some(Value::String(word)) if word == "required" => match functions {
            [] => return Err(ApiError::invalid(PARAM, "there are no `tools` to call")),
            [only] => only.name,
            _ => return Ok(Wanted::Any),
        },
        Some(named) => named["function"]["name"].as_str().ok_or_else(|| {
            expected(PARAM, "one of none, auto, required, or an object that names a function", named)
        })?,
    };
    if !functions.iter().any(|function| function.name == wanted) {
        return Err(ApiError::invalid(PARAM, format!("there is no function `{}` in `tools`", echo(wanted))));
    }
    Ok(Wanted::One(wanted.to_owned()))
}

/// One schema for a call of any of them.
fn any_call(functions: &[Function]) -> Value {
    let one = |(index, function): (usize, &Function)| {
        let mut parameters = function.parameters.clone();
        move_references(&mut parameters, &format!("#/anyOf/{index}/properties/arguments"));
        json!({
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": false
        })
    };
    json!({"anyOf": functions.iter().enumerate().map(one).collect::<Vec<_>>()})
}

/// References to the root of a schema that is now `root` of another.
fn move_references(schema: &mut Value, root: &str) {
    match schema {
        Value::Array(values) => values.iter_mut().for_each(|value| move_references(value, root)),
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(reference) if key == "$ref" && reference.starts_with('#') => {
                        *reference = format!("{root}{}", &reference[1..]);
                    }
                    inner => move_references(inner, root),
                }
            }
        }
        _ => (),
    }
}

/// A call in an answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ToolCall {
    /// Only in the pieces of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: CalledFunction,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct CalledFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// JSON as text.
    arguments: String,
}

impl ToolCall {
    pub(crate) fn new(id: String, name: &str, arguments: &str) -> ToolCall {
        let function = CalledFunction { name: Some(name.to_owned()), arguments: arguments.to_owned() };
        ToolCall { index: None, id: Some(id), kind: Some("function"), function }
    }

    /// The same as a piece of a stream, in which it is call `index`.
    pub(crate) fn in_stream(self, index: usize) -> ToolCall {
        ToolCall { index: Some(index), ..self }
    }

    /// More of the arguments of a call whose beginning was sent.
    pub(crate) fn more(arguments: String) -> ToolCall {
        ToolCall { index: Some(0), id: None, kind: None, function: CalledFunction { name: None, arguments } }
    }
}
