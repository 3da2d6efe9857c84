//! Chat templates: messages → the ids a model was trained to answer.
//!
//! A template writes special tokens (`<|im_start|>`) around what people wrote; people may write the same characters. So
//! before rendering, every place in the messages where a special token begins, or might begin if more text followed, gets
//! a stand-in for its first character that occurs nowhere else. In the rendered text only the template's own special
//! tokens are left to recognise; the stand-ins are turned back in the text between them before it is merged.

use std::collections::BTreeSet;
use std::sync::Arc;

use minijinja::value::Serde;
use minijinja::{Environment, Value as Jinja, context};
use serde_json::{Map, Value, json};

use crate::added::Finder;
use crate::jinja;
use crate::lesson::{self, Lesson};
use crate::tokenizer::{TokenId, Tokenizer};
use crate::{Error, Result};

/// The longest known template has 20 kB.
const SOURCE_BYTES_MAX: usize = 1 << 20;
const NAME: &str = "chat";

/// What a base model, which knows no roles, is most likely to go on with.
const PLAIN: &str = r"
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set text = message.content %}
    {%- else %}
        {%- set text = (message.content or []) | selectattr('text', 'defined') | map(attribute='text') | join %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- 'User: ' ~ text ~ '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant: ' ~ text ~ '\n' }}
    {%- else %}
        {{- text ~ '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}";

/// A compiled chat template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    source: String,
    environment: Environment<'static>,
    bos: String,
    eos: String,
    is_plain: bool,
}

/// What a template is given.
#[derive(Debug, Clone, Default)]
pub struct ChatInput<'a> {
    /// `{"role": …, "content": …}` and whatever else the template knows.
    pub messages: &'a [Value],
    /// OpenAI's tool definitions.
    pub tools: &'a [Value],
    /// End with what makes the model answer.
    pub add_generation_prompt: bool,
    /// Seconds since 1970 for `strftime_now`; templates that find none write a fixed date.
    pub now_unix_s: Option<i64>,
    /// Further variables, such as `enable_thinking`.
    pub extra: Option<&'a Map<String, Value>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate({} bytes)", self.0.source.len())
    }
}

impl ChatTemplate {
    /// Compiles a template as `tokenizer_config.json` and GGUF files carry it; `bos` and `eos` are the texts of those
    /// tokens, which templates may write.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate> {
        ChatTemplate::compile(source, bos, eos, false)
    }

    /// For base models: `User: …` and `Assistant: …` on lines of their own, after the tokenizer's beginning-of-text
    /// token if it wants one.
    pub fn plain() -> ChatTemplate {
        ChatTemplate::compile(PLAIN, "", "", true).expect("the template is a constant of this file")
    }

    /// Where an answer of a base model should stop because it begins to speak for the user; only for
    /// [`ChatTemplate::plain`].
    pub fn stop(&self) -> Option<&'static str> {
        self.0.is_plain.then_some("\nUser:")
    }

    /// What a model's files say of it; nothing for [`ChatTemplate::plain`].
    pub fn own_source(&self) -> Option<&str> {
        (!self.0.is_plain).then_some(&self.0.source)
    }

    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// For templates that know no functions or no calls of them: what there is to call is said in the system's message,
    /// and what was called is text. What is served and what is learned go the same way. `free`: it is the model that says
    /// when it calls one, so it is told how.
    pub fn spell_tools(&self, messages: &mut Vec<Value>, tools: &[Value], free: bool) {
        if !self.0.source.contains("tool_calls") {
            spell_calls(messages);
        }
        if !tools.is_empty() && !self.0.source.contains("tools") {
            describe_tools(messages, tools, free);
        }
    }

    /// Ids of a conversation. Special tokens come from the template alone: in messages they are plain text.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<Vec<TokenId>> {
        self.encode_input(tokenizer, &ChatInput { messages, add_generation_prompt, ..ChatInput::default() })
    }

    /// [`ChatTemplate::encode`] with tools, a clock and further variables.
    pub fn encode_input(&self, tokenizer: &Tokenizer, input: &ChatInput) -> Result<Vec<TokenId>> {
        let variables = Value::Object(variables(input));
        let stand_ins = StandIns::new(tokenizer, &self.0.source, &variables)?;
        let protected = stand_ins.protect(tokenizer.special(), &variables);
        let rendered = self.render_variables(&protected, input.now_unix_s)?;
        let mut ids = Vec::new();
        ids.extend(tokenizer.bos().filter(|_| self.0.is_plain && tokenizer.add_bos()));
        tokenizer.encode_rendered(&rendered, true, |text| stand_ins.restore(text), &mut ids);
        Ok(ids)
    }

    /// What a model can learn from a conversation: what the assistant says, where `is_learned` (of the message's index)
    /// says so, each answer after exactly the ids that it would follow in a request.
    ///
    /// One lesson, unless the template writes earlier turns another way once more follow (as those do that leave out
    /// past thoughts): then what came before such a turn is written again, in a lesson of its own.
    pub fn lessons(
        &self,
        tokenizer: &Tokenizer,
        input: &ChatInput,
        is_learned: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Lesson>> {
        let variables = Value::Object(variables(input));
        let stand_ins = StandIns::new(tokenizer, &self.0.source, &variables)?;
        let protected = stand_ins.protect(tokenizer.special(), &variables);
        let bos = tokenizer.bos().filter(|_| self.0.is_plain && tokenizer.add_bos());
        let restore = |text: &str| stand_ins.restore(text);
        let render = |variables: &Value| self.render_variables(variables, input.now_unix_s);
        let spoken = match jinja::has_generation_tags(&self.0.source) {
            true => lesson::marked(input.messages, &protected, stand_ins.spare, &render)?,
            false => None,
        };
        let spoken = match spoken {
            Some(spoken) => vec![spoken.only(input.messages, is_learned)],
            None => lesson::by_turns(input.messages, &protected, tokenizer, is_learned, &render)?,
        };
        Ok(spoken.iter().map(|spoken| spoken.encode(tokenizer, bos, &restore)).collect())
    }

    /// The rendered text, for people to look at. Do not encode it: a message can say special tokens in it.
    pub fn render(&self, input: &ChatInput) -> Result<String> {
        self.render_variables(&Value::Object(variables(input)), input.now_unix_s)
    }

    fn compile(source: &str, bos: &str, eos: &str, is_plain: bool) -> Result<ChatTemplate> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(Error::Template(format!("has more than {SOURCE_BYTES_MAX} bytes")));
        }
        let mut environment = jinja::environment()?;
        let prepared = jinja::with_generation_marks(source);
        environment.add_template_owned(NAME, prepared).map_err(Error::ParseTemplate)?;
        let (source, bos, eos) = (source.to_owned(), bos.to_owned(), eos.to_owned());
        Ok(ChatTemplate(Arc::new(Inner { source, environment, bos, eos, is_plain })))
    }

    fn render_variables(&self, variables: &Value, now_unix_s: Option<i64>) -> Result<String> {
        let clock = match now_unix_s {
            Some(now) => context! { strftime_now => jinja::strftime_now(now) },
            None => context! {},
        };
        let context = context! {
            bos_token => self.0.bos.as_str(),
            eos_token => self.0.eos.as_str(),
            ..context! { ..clock, ..Jinja::from(Serde(variables)) }
        };
        let template = self.0.environment.get_template(NAME).map_err(Error::RenderTemplate)?;
        template.render(context).map_err(Error::RenderTemplate)
    }
}

/// Calls where nothing was said, one a line.
fn spell_calls(messages: &mut [Value]) {
    for message in messages.iter_mut().filter(|message| message["content"] == "") {
        let calls = message["tool_calls"].as_array().into_iter().flatten();
        let texts: Vec<String> =
            calls.map(|call| format!("<tool_call>{}</tool_call>", call["function"])).collect();
        message["content"] = texts.join("\n").into();
    }
}

fn describe_tools(messages: &mut Vec<Value>, tools: &[Value], free: bool) {
    let functions: Vec<String> = tools.iter().map(|tool| tool["function"].to_string()).collect();
    let mut about = format!("You can call these functions with arguments in JSON:\n{}", functions.join("\n"));
    if free {
        about += "\nTo call one, answer with <tool_call>{\"name\": …, \"arguments\": {…}}</tool_call>.";
    }
    match messages.first_mut().filter(|first| first["role"] == "system") {
        Some(system) => {
            let said = system["content"].as_str().unwrap_or_default();
            system["content"] = format!("{said}\n\n{about}").into();
        }
        None => messages.insert(0, json!({"role": "system", "content": about})),
    }
}

fn variables(input: &ChatInput) -> Map<String, Value> {
    let mut variables = input.extra.cloned().unwrap_or_default();
    variables.insert("messages".into(), Value::Array(input.messages.to_vec()));
    // Templates test `if tools`: none and an empty list are the same to them.
    let tools = if input.tools.is_empty() { Value::Null } else { Value::Array(input.tools.to_vec()) };
    variables.insert("tools".into(), tools);
    variables.insert("add_generation_prompt".into(), Value::Bool(input.add_generation_prompt));
    variables
}

/// The characters that stand for the first characters of special tokens in what people wrote.
struct StandIns {
    pairs: Vec<(char, char)>,
    /// Two more characters that occur nowhere.
    spare: [char; 2],
}

impl StandIns {
    fn new(tokenizer: &Tokenizer, template: &str, variables: &Value) -> Result<StandIns> {
        let mut taken = BTreeSet::new();
        template.chars().filter(|&c| is_candidate(c)).for_each(|c| _ = taken.insert(c));
        for_each_text(variables, &mut |text| {
            text.chars().filter(|&c| is_candidate(c)).for_each(|c| _ = taken.insert(c));
        });
        let mut free = candidates().filter(|c| !taken.contains(c));
        let firsts: BTreeSet<char> = tokenizer.special().first_chars().collect();
        let mut next =
            || free.next().ok_or_else(|| Error::Template("the messages use every private character".into()));
        let spare = [next()?, next()?];
        let pairs: Result<Vec<_>> = firsts.into_iter().map(|first| Ok((first, next()?))).collect();
        Ok(StandIns { pairs: pairs?, spare })
    }

    /// The same value with stand-ins in all its texts, names of fields included.
    fn protect(&self, special: &Finder, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.protect_text(special, text)),
            Value::Array(items) => items.iter().map(|item| self.protect(special, item)).collect(),
            Value::Object(fields) => {
                let field = |(name, value): (&String, &Value)| {
                    (self.protect_text(special, name), self.protect(special, value))
                };
                Value::Object(fields.iter().map(field).collect())
            }
            other => other.clone(),
        }
    }

    fn protect_text(&self, special: &Finder, text: &str) -> String {
        let stand_in = |c: char| self.pairs.iter().find(|(first, _)| *first == c).map_or(c, |pair| pair.1);
        text.char_indices()
            .map(|(at, c)| if special.may_start(&text[at..]) { stand_in(c) } else { c })
            .collect()
    }

    fn restore(&self, text: &str) -> String {
        let first = |c: char| self.pairs.iter().find(|(_, stand_in)| *stand_in == c).map_or(c, |pair| pair.0);
        text.chars().map(|c| if is_candidate(c) { first(c) } else { c }).collect()
    }
}

/// Noncharacters first, which no text should hold, then a private plane.
fn candidates() -> impl Iterator<Item = char> {
    ('\u{FDD0}'..='\u{FDEF}').chain('\u{F0000}'..='\u{FFFFD}')
}

fn is_candidate(c: char) -> bool {
    matches!(c, '\u{FDD0}'..='\u{FDEF}' | '\u{F0000}'..='\u{FFFFD}')
}

fn for_each_text(value: &Value, visit: &mut dyn FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| for_each_text(item, visit)),
        Value::Object(fields) => {
            for (name, value) in fields {
                visit(name);
                for_each_text(value, visit);
            }
        }
        _ => {}
    }
}
