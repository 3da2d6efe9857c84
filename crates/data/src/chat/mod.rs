//! Chats: a row of JSON in one of the forms that people share, as messages and what is to be learned of them.

mod forms;
mod messages;

use serde_json::Value;

/// How a row says who said what. Without one it is told by the row's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `{"messages": [{"role", "content"}, …], "tools": […]}`: OpenAI's and most others'.
    Messages,
    /// `{"prompt", "response"}` or `{"prompt", "completion"}`: a text or messages each, perhaps with `"system"`.
    Prompt,
    /// `{"instruction", "input", "output"}`, perhaps with `"system"`.
    Alpaca,
    /// `{"conversations": [{"from": "human" | "gpt" | …, "value"}, …]}`.
    ShareGpt,
    /// `"chosen"` and `"rejected"`, a text or messages each, after a prompt, an instruction or messages.
    Preference,
}

impl Form {
    pub const ALL: [Form; 5] = [Form::Messages, Form::Prompt, Form::Alpaca, Form::ShareGpt, Form::Preference];

    pub fn name(self) -> &'static str {
        match self {
            Form::Messages => "messages",
            Form::Prompt => "prompt",
            Form::Alpaca => "alpaca",
            Form::ShareGpt => "sharegpt",
            Form::Preference => "preference",
        }
    }
}

/// Messages as chat templates take them, and which of them are to be learned.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Example {
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Vec<Value>,
    /// For each message whether the model is to learn to say it.
    pub(crate) is_learned: Vec<bool>,
}

/// What a row holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Chat {
    One(Example),
    /// The better answer, and the worse one to the same messages.
    Pair([Example; 2]),
}

/// Reads a row, or says which field is wrong and why.
pub(crate) fn read(json: &str, form: Option<Form>) -> Result<Chat, String> {
    let row: Value = serde_json::from_str(json)
        .map_err(|error| error.to_string().replace(" at line 1 column ", ", column "))?;
    let row = row.as_object().ok_or("not a JSON object")?;
    let form = match form {
        Some(form) => form,
        None => forms::detect(row)?,
    };
    forms::read(row, form)
}

#[cfg(test)]
mod tests;
