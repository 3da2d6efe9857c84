//! Messages as people write them, made into what chat templates expect.

use serde_json::{Map, Value, json};

use super::Example;

/// Messages of one chat.
const MESSAGES_MAX: usize = 4096;
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// The messages of field `at`, all that the assistant says to be learned, but for a `weight` of 0.
pub(super) fn read(value: &Value, at: &str) -> Result<Example, String> {
    let list = value.as_array().ok_or_else(|| format!("{at}: not an array of messages"))?;
    if list.is_empty() {
        return Err(format!("{at}: it is empty"));
    }
    if list.len() > MESSAGES_MAX {
        return Err(format!("{at}: {} messages, at most {MESSAGES_MAX} are read", list.len()));
    }
    let (mut messages, mut is_learned) = (Vec::new(), Vec::new());
    for (i, item) in list.iter().enumerate() {
        let (message, learned) = read_message(item, &format!("{at}[{i}]"))?;
        messages.push(message);
        is_learned.push(learned);
    }
    Ok(Example { messages, tools: Vec::new(), is_learned })
}

/// ShareGPT's, with its own names of roles.
pub(super) fn read_sharegpt(value: &Value, at: &str) -> Result<Example, String> {
    let list = value.as_array().ok_or_else(|| format!("{at}: not an array"))?;
    let mut messages = Vec::new();
    for (i, item) in list.iter().enumerate() {
        if item.get("role").is_some() {
            messages.push(item.clone());
            continue;
        }
        let from = item["from"].as_str().ok_or_else(|| format!("{at}[{i}].from: it is missing"))?;
        let said = item["value"].as_str().ok_or_else(|| format!("{at}[{i}].value: not a text"))?;
        messages.push(match from {
            "human" | "user" => json!({"role": "user", "content": said}),
            "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" => {
                json!({"role": "assistant", "content": said})
            }
            "system" => json!({"role": "system", "content": said}),
            "tool" | "observation" | "function_response" => json!({"role": "tool", "content": said}),
            "function_call" => {
                let call: Value = serde_json::from_str(said)
                    .map_err(|_| format!("{at}[{i}].value: a function_call that is not JSON"))?;
                json!({"role": "assistant", "content": "", "tool_call": call})
            }
            _ => return Err(format!("{at}[{i}].from: {from:?} is not a known speaker")),
        });
    }
    read(&Value::Array(messages), at)
}

pub(super) fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn read_message(item: &Value, at: &str) -> Result<(Value, bool), String> {
    let fields = item.as_object().ok_or_else(|| format!("{at}: not an object"))?;
    let role =
        fields.get("role").and_then(Value::as_str).ok_or_else(|| format!("{at}.role: it is missing"))?;
    if !ROLES.contains(&role) {
        return Err(format!("{at}.role: {role:?} is not one of {}", ROLES.join(", ")));
    }
    let calls = read_calls(fields, at)?;
    let content = read_content(fields, !calls.is_empty(), &format!("{at}.content"))?;
    let weight = match fields.get("weight") {
        None | Some(Value::Null) => 1,
        Some(weight) => match weight.as_u64() {
            Some(weight @ 0..=1) => weight,
            _ => return Err(format!("{at}.weight: {weight} is not 0 or 1")),
        },
    };
    // What OpenAI calls developer, chat templates call system.
    let mut clean = said(if role == "developer" { "system" } else { role }, &content);
    for field in ["name", "tool_call_id", "reasoning_content"] {
        match fields.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => clean[field] = text.as_str().into(),
            Some(_) => return Err(format!("{at}.{field}: not a text")),
        }
    }
    if !calls.is_empty() {
        clean["tool_calls"] = calls.into();
    }
    Ok((clean, role == "assistant" && weight == 1))
}

/// A text, or text parts, which are joined by line ends. Only a message that calls tools may be without.
fn read_content(fields: &Map<String, Value>, calls: bool, at: &str) -> Result<String, String> {
    match fields.get("content") {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let text = |(i, part): (usize, &Value)| {
                let text = part["text"].as_str().filter(|_| part["type"] == "text");
                text.map(str::to_owned).ok_or_else(|| format!("{at}[{i}]: not a part of type \"text\""))
            };
            Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        None | Some(Value::Null) if calls => Ok(String::new()),
        None | Some(Value::Null) => Err(format!("{at}: it is missing")),
        Some(_) => Err(format!("{at}: not a text")),
    }
}

/// OpenAI's `tool_calls`, or one `tool_call` of name and arguments. Arguments become objects, as templates write them.
fn read_calls(fields: &Map<String, Value>, at: &str) -> Result<Vec<Value>, String> {
    if let Some(call) = fields.get("tool_call").filter(|call| !call.is_null()) {
        return Ok(vec![read_call(call, &Value::Null, &format!("{at}.tool_call"))?]);
    }
    match fields.get("tool_calls") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(calls)) => {
            let call = |(i, call): (usize, &Value)| {
                let function = if call["function"].is_object() { &call["function"] } else { call };
                read_call(function, &call["id"], &format!("{at}.tool_calls[{i}]"))
            };
            calls.iter().enumerate().map(call).collect()
        }
        Some(_) => Err(format!("{at}.tool_calls: not an array")),
    }
}

fn read_call(function: &Value, id: &Value, at: &str) -> Result<Value, String> {
    let name = function["name"].as_str().ok_or_else(|| format!("{at}: no name of a function"))?;
    let arguments = match &function["arguments"] {
        Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| text.as_str().into()),
        Value::Null => json!({}),
        other => other.clone(),
    };
    let mut call = json!({"type": "function", "function": {"name": name, "arguments": arguments}});
    if !id.is_null() {
        call["id"] = id.clone();
    }
    Ok(call)
}
