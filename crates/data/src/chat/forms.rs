//! The forms of rows.

use serde_json::{Map, Value};

use super::messages::{self, said};
use super::{Chat, Example, Form};

type Fields = Map<String, Value>;

/// By the fields that only one form has; of those that a row has, the one that says most.
pub(super) fn detect(row: &Fields) -> Result<Form, String> {
    let has = |names: &[&str]| names.iter().all(|name| row.get(*name).is_some_and(|value| !value.is_null()));
    let forms: [(&[&str], Form); 6] = [
        (&["chosen", "rejected"], Form::Preference),
        (&["messages"], Form::Messages),
        (&["conversations"], Form::ShareGpt),
        (&["instruction", "output"], Form::Alpaca),
        (&["prompt", "response"], Form::Prompt),
        (&["prompt", "completion"], Form::Prompt),
    ];
    let found = forms.iter().find(|(names, _)| has(names)).map(|(_, form)| *form);
    found.ok_or_else(|| {
        let known: Vec<String> = forms.iter().map(|(names, _)| names.join(" and ")).collect();
        let found: Vec<&str> = row.keys().take(10).map(String::as_str).collect();
        format!("its fields ({}) are of no form of chats: {}", found.join(", "), known.join("; "))
    })
}

pub(super) fn read(row: &Fields, form: Form) -> Result<Chat, String> {
    let example = match form {
        Form::Messages => messages::read(field(row, "messages")?, "messages")?,
        Form::ShareGpt => messages::read_sharegpt(field(row, "conversations")?, "conversations")?,
        Form::Prompt => {
            let name = if row.contains_key("response") { "response" } else { "completion" };
            answered(read_prompt(row)?, field(row, name)?, name)?
        }
        Form::Alpaca => answered(read_instruction(row)?, field(row, "output")?, "output")?,
        Form::Preference => return read_preference(row),
    };
    finish(row, example).map(Chat::One)
}

fn field<'a>(row: &'a Fields, name: &str) -> Result<&'a Value, String> {
    row.get(name).filter(|value| !value.is_null()).ok_or_else(|| format!("{name}: it is missing"))
}

fn text<'a>(row: &'a Fields, name: &str) -> Result<&'a str, String> {
    field(row, name)?.as_str().ok_or_else(|| format!("{name}: not a text"))
}

/// Puts a row's system text and tools with the messages; refuses what has nothing to learn.
fn finish(row: &Fields, mut example: Example) -> Result<Example, String> {
    let begins_with_system = example.messages.first().is_some_and(|first| first["role"] == "system");
    if let Some(Value::String(system)) = row.get("system")
        && !system.is_empty()
        && !begins_with_system
    {
        example.messages.insert(0, said("system", system));
        example.is_learned.insert(0, false);
    }
    example.tools = match row.get("tools") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(tools)) => tools.clone(),
        // Some sets keep the list as a text.
        Some(Value::String(text)) if text.trim().is_empty() => Vec::new(),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|_| "tools: not a JSON array")?,
        Some(_) => return Err("tools: not an array".into()),
    };
    if !example.messages.iter().any(|message| message["role"] == "assistant") {
        return Err("no message is the assistant's, so there is nothing to learn".into());
    }
    if !example.is_learned.contains(&true) {
        return Err("every message of the assistant has weight 0, so there is nothing to learn".into());
    }
    Ok(example)
}

fn question(content: &str) -> Example {
    Example { messages: vec![said("user", content)], tools: Vec::new(), is_learned: vec![false] }
}

fn read_prompt(row: &Fields) -> Result<Example, String> {
    match field(row, "prompt")? {
        Value::String(text) => Ok(question(text)),
        list => messages::read(list, "prompt"),
    }
}

fn read_instruction(row: &Fields) -> Result<Example, String> {
    let instruction = text(row, "instruction")?;
    Ok(match row.get("input") {
        Some(Value::String(input)) if !input.is_empty() => question(&format!("{instruction}\n\n{input}")),
        None | Some(Value::Null | Value::String(_)) => question(instruction),
        Some(_) => return Err("input: not a text".into()),
    })
}

/// The messages so far with an answer, a text or messages. Of what came before nothing is learned.
fn answered(mut so_far: Example, answer: &Value, name: &str) -> Result<Example, String> {
    so_far.is_learned.fill(false);
    let answer = match answer {
        Value::String(text) if text.is_empty() => return Err(format!("{name}: it is empty")),
        Value::String(text) => messages::read(&Value::Array(vec![said("assistant", text)]), name)?,
        list => messages::read(list, name)?,
    };
    so_far.messages.extend(answer.messages);
    so_far.is_learned.extend(answer.is_learned);
    Ok(so_far)
}

/// Two answers to the same messages. Of each only what differs is learned: the last message, or where both are whole
/// chats all after their common beginning.
fn read_preference(row: &Fields) -> Result<Chat, String> {
    let names = ["chosen", "rejected"];
    let prompt = match () {
        _ if row.contains_key("prompt") => Some(read_prompt(row)?),
        _ if row.contains_key("instruction") => Some(read_instruction(row)?),
        _ if row.contains_key("messages") => Some(messages::read(field(row, "messages")?, "messages")?),
        _ => None,
    };
    let mut pair = Vec::new();
    for name in names {
        let answer = field(row, name)?;
        let example = match (&prompt, answer) {
            (Some(prompt), Value::String(_)) => answered(prompt.clone(), answer, name)?,
            (None, Value::String(_)) => return Err("prompt: it is missing".into()),
            (Some(prompt), Value::Array(list)) if list.len() == 1 => answered(prompt.clone(), answer, name)?,
            (_, list) => messages::read(list, name)?,
        };
        pair.push(example);
    }
    let same = pair[0].messages.iter().zip(&pair[1].messages).take_while(|(a, b)| a == b).count();
    let mut examples = Vec::new();
    for (mut example, name) in pair.into_iter().zip(names) {
        example.is_learned[..same.min(example.messages.len())].fill(false);
        if !example.is_learned.contains(&true) {
            return Err(format!("{name}: it has no answer that the other one has not"));
        }
        examples.push(finish(row, example)?);
    }
    let second = examples.pop().ok_or("rejected: it is missing")?;
    let first = examples.pop().ok_or("chosen: it is missing")?;
    Ok(Chat::Pair([first, second]))
}
