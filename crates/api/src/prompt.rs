//! From what a client sends to the ids the model goes on from.

use serde_json::{Map, Value, json};
use tokenizer::ChatInput;

use crate::error::{ApiError, Result, echo};
use crate::json::{Fields, expected};
use crate::sampling::{Prompt, read_token_id};
use crate::state::ServedModel;
use crate::tools::Tools;

/// Messages of one chat.
const MESSAGES_MAX: usize = 4096;
const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool", "function"];

/// The messages of a chat, laid out by the model's template with the functions it may call, ready for the assistant's turn.
pub(crate) fn read_messages(fields: Fields, model: &ServedModel, tools: Option<&Tools>) -> Result<Prompt> {
    let declared = tools.map_or(&[][..], |tools| &tools.declared);
    let messages = fields.list("messages")?;
    let messages = messages.ok_or_else(|| ApiError::invalid("messages", "it is required"))?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "at least one message is required"));
    }
    if messages.len() > MESSAGES_MAX {
        return Err(ApiError::invalid("messages", format!("at most {MESSAGES_MAX} messages are allowed")));
    }
    let mut clean = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        clean.push(read_message(index, message)?);
    }
    model.template.spell_tools(&mut clean, declared, tools.is_some_and(|tools| tools.free));
    let n_bytes: usize = clean.iter().filter_map(|m| m["content"].as_str()).map(str::len).sum();
    refuse_hopeless(n_bytes, model, "messages")?;
    // vLLM's; a chat ends with what makes the assistant speak.
    let add_generation_prompt = fields.flag_or("add_generation_prompt", true)?;
    let input =
        ChatInput { messages: &clean, tools: declared, add_generation_prompt, ..ChatInput::default() };
    let tokens = model.template.encode_input(&model.tokenizer, &input).map_err(|e| {
        // The template's own refusals ("roles must alternate") are meant for whoever wrote the messages.
        ApiError::invalid("messages", echo(&e.to_string()))
    })?;
    Ok(Prompt { tokens, text: String::new(), param: "messages" })
}

fn read_message(index: usize, message: &Value) -> Result<Value> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let object = message.as_object().ok_or_else(|| expected(at(""), "an object", message))?;
    let role = object.get("role").and_then(Value::as_str).unwrap_or_default();
    if !ROLES.contains(&role) {
        let why = format!("expected one of {}, got `{}`", ROLES.join(", "), echo(role));
        return Err(ApiError::invalid(at(".role"), why));
    }
    let content = read_content(object, role, &at(".content"))?;
    // What OpenAI calls developer, chat templates call system.
    let role = if role == "developer" { "system" } else { role };
    let mut clean = json!({"role": role, "content": content});
    if let Some(name) = object.get("name").filter(|name| !name.is_null()) {
        clean["name"] = name.as_str().ok_or_else(|| expected(at(".name"), "a string", name))?.into();
    }
    if let Some(calls) = object.get("tool_calls").filter(|calls| !calls.is_null()) {
        clean["tool_calls"] = read_calls(calls, &at(".tool_calls"))?;
    }
    if let Some(id) = object.get("tool_call_id").filter(|id| !id.is_null()) {
        clean["tool_call_id"] =
            id.as_str().ok_or_else(|| expected(at(".tool_call_id"), "a string", id))?.into();
    }
    Ok(clean)
}

/// Earlier calls. Arguments become objects again, where they are, because that is what templates write out.
fn read_calls(calls: &Value, at: &str) -> Result<Value> {
    let list = calls.as_array().ok_or_else(|| expected(at, "an array", calls))?;
    let mut clean = Vec::with_capacity(list.len());
    for (index, call) in list.iter().enumerate() {
        let function = &call["function"];
        let (Some(name), Some(arguments)) = (function["name"].as_str(), function["arguments"].as_str())
        else {
            let why = "expected a name and arguments, both strings";
            return Err(ApiError::invalid(format!("{at}[{index}].function"), why));
        };
        let arguments = serde_json::from_str(arguments).unwrap_or_else(|_| Value::from(arguments));
        clean.push(
            json!({"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}),
        );
    }
    Ok(clean.into())
}

/// A string, or an array of text parts, which are joined by line ends.
fn read_content(message: &Map<String, Value>, role: &str, at: &str) -> Result<String> {
    match message.get("content") {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) if !parts.is_empty() => {
            let texts: Result<Vec<&str>> =
                parts.iter().enumerate().map(|(i, part)| read_part(part, at, i)).collect();
            Ok(texts?.join("\n"))
        }
        // An assistant's turn that only called tools has no text.
        None | Some(Value::Null) if role == "assistant" && message.contains_key("tool_calls") => {
            Ok(String::new())
        }
        None | Some(Value::Null) => Err(ApiError::invalid(at, "it is required")),
        Some(other) => Err(expected(at, "a string or an array of text parts", other)),
    }
}

fn read_part<'a>(part: &'a Value, at: &str, index: usize) -> Result<&'a str> {
    let kind = part.get("type").and_then(Value::as_str).unwrap_or("none");
    if kind != "text" {
        let why = format!("this model reads text only, got a part of type `{}`", echo(kind));
        return Err(ApiError::invalid(format!("{at}[{index}].type"), why));
    }
    let text = part.get("text").unwrap_or(&Value::Null);
    text.as_str().ok_or_else(|| expected(format!("{at}[{index}].text"), "a string", text))
}

/// The prompts of a text completion, with the text each stands for (needed by `echo`).
pub(crate) fn read_prompts(fields: Fields, model: &ServedModel) -> Result<Vec<Prompt>> {
    if !fields.0.contains_key("prompt") {
        return Err(ApiError::invalid("prompt", "it is required"));
    }
    let prompts = match fields.get("prompt") {
        // OpenAI: without a prompt the model begins as at the start of a document.
        None => vec![text_prompt("", model)?],
        Some(Value::String(text)) => vec![text_prompt(text, model)?],
        Some(Value::Array(items)) => read_prompt_list(items, model)?,
        Some(other) => return Err(expected("prompt", "a string, an array of strings or token ids", other)),
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "it must not be empty"));
    }
    Ok(prompts)
}

fn read_prompt_list(items: &[Value], model: &ServedModel) -> Result<Vec<Prompt>> {
    match items.first() {
        Some(Value::Number(_)) => Ok(vec![ids_prompt(items, model)?]),
        _ => items.iter().map(|item| read_one_of_many(item, model)).collect(),
    }
}

fn read_one_of_many(item: &Value, model: &ServedModel) -> Result<Prompt> {
    match item {
        Value::String(text) => text_prompt(text, model),
        Value::Array(ids) => ids_prompt(ids, model),
        other => Err(expected("prompt", "strings or arrays of token ids", other)),
    }
}

fn ids_prompt(ids: &[Value], model: &ServedModel) -> Result<Prompt> {
    if ids.is_empty() {
        return Err(ApiError::invalid("prompt", "an array of token ids must not be empty"));
    }
    let vocab = model.engine.vocab();
    let tokens: Result<Vec<u32>> = ids.iter().map(|id| read_token_id("prompt", id, vocab)).collect();
    let tokens = tokens?;
    let text = model.tokenizer.decode(&tokens);
    Ok(Prompt { tokens, text, param: "prompt" })
}

fn text_prompt(text: &str, model: &ServedModel) -> Result<Prompt> {
    refuse_hopeless(text.len(), model, "prompt")?;
    let tokenizer = &model.tokenizer;
    let mut tokens = Vec::new();
    if tokenizer.add_bos() || text.is_empty() {
        tokens.extend(tokenizer.bos().or(tokenizer.eos()));
    }
    tokens.extend(tokenizer.encode(text));
    if tokens.is_empty() {
        return Err(ApiError::invalid(
            "prompt",
            "it must not be empty, this model has no token that begins a text",
        ));
    }
    Ok(Prompt { tokens, text: text.to_owned(), param: "prompt" })
}

/// Refuses a text before the work of tokenizing it, if even the longest tokens could not make it fit.
fn refuse_hopeless(n_bytes: usize, model: &ServedModel, param: &'static str) -> Result<()> {
    let context_max = model.context_max();
    let n_least = n_bytes / model.token_bytes_max;
    if n_least <= context_max {
        return Ok(());
    }
    let message = format!(
        "This model's context is {context_max} tokens. The prompt has {n_bytes} bytes, which is at least {n_least} tokens."
    );
    Err(ApiError::ContextLength { param, message })
}
