//! The forms in which files ask. Each is read into one of four kinds of question.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::lines::Line;

/// Of one item. ARC has up to 5, BIG-bench's languages 11.
const CHOICES_MAX: usize = 64;

/// A question with its answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Item {
    /// Which of the choices goes on?
    Choice { context: String, choices: Vec<String>, gold: usize },
    /// Behind which of the contexts does this go on?
    Schema { contexts: Vec<String>, continuation: String, gold: usize },
    /// Does the model go on like this by itself?
    Continuation { context: String, continuation: String },
    /// What does the model answer?
    Answer { context: String, worked: String, expected: Expected },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expected {
    /// This number, behind `####` or at the end.
    Number(String),
    /// One of these.
    AnyOf(Vec<String>),
}

/// What an item looks like in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// `query`, `choices`, `gold`: ARC, BoolQ, COPA, CommonsenseQA, …
    MultipleChoice,
    /// `ctx_a`, `ctx_b`, `endings`, `label`, as published.
    HellaSwag,
    /// `question`, `choices`, `answer`: MMLU, whose choices are letters.
    Lettered,
    /// `context_options`, `continuation`, `gold`: Winograd.
    Schema,
    /// `context`, `continuation` (Jeopardy, LAMBADA, arithmetic) or `input`, `target` (BIG-Bench Hard).
    LanguageModeling,
    /// `context`, `answer`, `aliases`: TriviaQA.
    Aliases,
    /// `context` or `question`, `answer`, perhaps `chain_of_thought`: GSM8K, SVAMP.
    Number,
}

/// Fields that tell a form from all others, the most telling first.
const FORMS: [(&[&str], Form); 9] = [
    (&["context_options", "continuation"], Form::Schema),
    (&["ctx_a", "ctx_b", "endings"], Form::HellaSwag),
    (&["query", "choices"], Form::MultipleChoice),
    (&["question", "choices"], Form::Lettered),
    (&["context", "continuation"], Form::LanguageModeling),
    (&["input", "target"], Form::LanguageModeling),
    (&["context", "answer", "aliases"], Form::Aliases),
    (&["context", "answer"], Form::Number),
    (&["question", "answer"], Form::Number),
];

impl Form {
    pub(crate) fn of(line: &Line) -> Result<Form> {
        let found = FORMS.iter().find(|(fields, _)| fields.iter().all(|field| line.has(field)));
        found.map(|(_, form)| *form).ok_or_else(|| {
            let fields: Vec<&str> = line.object.keys().take(10).map(String::as_str).collect();
            line.bad(format!("its fields ({}) are those of no task that is known here", fields.join(", ")))
        })
    }

    pub(crate) fn read(self, line: &Line) -> Result<Item> {
        match self {
            Form::MultipleChoice => {
                let (context, choices) = (line.text("query")?.to_owned(), read_choices(line, "choices")?);
                Ok(Item::Choice { gold: line.index("gold", choices.len())?, context, choices })
            }
            Form::HellaSwag => read_hellaswag(line),
            Form::Lettered => read_lettered(line),
            Form::Schema => {
                let contexts = read_choices(line, "context_options")?;
                let gold = line.index("gold", contexts.len())?;
                Ok(Item::Schema { contexts, continuation: read_continuation(line, "continuation")?, gold })
            }
            Form::LanguageModeling => {
                let named = line.has("context");
                let names = if named { ["context", "continuation"] } else { ["input", "target"] };
                let context = line.text(names[0])?.to_owned();
                Ok(Item::Continuation { context, continuation: read_continuation(line, names[1])? })
            }
            Form::Aliases => {
                let answer = line.text("answer")?;
                let mut accepted = line.texts("aliases")?;
                accepted.push(answer.to_owned());
                let (context, worked) = (line.text("context")?.to_owned(), answer.to_owned());
                Ok(Item::Answer { context, worked, expected: Expected::AnyOf(accepted) })
            }
            Form::Number => read_number(line),
        }
    }
}

fn read_choices(line: &Line, field: &str) -> Result<Vec<String>> {
    let choices = line.texts(field)?;
    match choices.len() {
        2..=CHOICES_MAX => Ok(choices),
        n => Err(line.bad_field(field, format!("it has {n} texts, not 2 to {CHOICES_MAX}"))),
    }
}

fn read_continuation(line: &Line, field: &str) -> Result<String> {
    match line.text(field)? {
        "" => Err(line.bad_field(field, "it is empty")),
        text => Ok(text.to_owned()),
    }
}

/// As lm-evaluation-harness lays it out: the activity, the sentence, the beginning of the next one.
fn read_hellaswag(line: &Line) -> Result<Item> {
    let activity = if line.has("activity_label") {
        format!("{}: ", line.text("activity_label")?)
    } else {
        String::new()
    };
    let second = line.text("ctx_b")?;
    let mut letters = second.chars();
    let capitalized = letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters.flat_map(char::to_lowercase)).collect()
    });
    let context = without_markup(&format!("{activity}{} {capitalized}", line.text("ctx_a")?));
    let choices: Vec<String> =
        read_choices(line, "endings")?.iter().map(|text| without_markup(text)).collect();
    if choices.iter().any(String::is_empty) {
        return Err(line.bad_field("endings", "nothing is left of one without its markup"));
    }
    Ok(Item::Choice { context, gold: line.index("label", choices.len())?, choices })
}

/// WikiHow's marks for titles and such.
fn without_markup(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        let Some(close) = rest[open..].find(']') else { break };
        clean.push_str(&rest[..open]);
        rest = &rest[open + close + 1..];
    }
    clean.push_str(rest);
    clean.replace("  ", " ")
}

fn read_lettered(line: &Line) -> Result<Item> {
    let texts = read_choices(line, "choices")?;
    if texts.len() > 26 {
        return Err(line.bad_field("choices", "there are more than there are letters"));
    }
    let letters: Vec<String> = ('A'..='Z').take(texts.len()).map(String::from).collect();
    let listed: String =
        letters.iter().zip(&texts).map(|(letter, text)| format!("{letter}. {text}\n")).collect();
    let context = format!("{}\n{listed}Answer:", line.text("question")?.trim());
    Ok(Item::Choice { context, gold: line.index("answer", texts.len())?, choices: letters })
}

fn read_number(line: &Line) -> Result<Item> {
    let question = line.text(if line.has("question") { "question" } else { "context" })?;
    let answer = line.text("answer")?;
    let (thoughts, number) = match (answer.rsplit_once("####"), line.has("chain_of_thought")) {
        (Some((thoughts, number)), false) => (thoughts.trim(), number.trim()),
        (_, true) => (line.text("chain_of_thought")?, answer.trim()),
        (None, false) => ("", answer.trim()),
    };
    if !number.contains(|c: char| c.is_ascii_digit()) {
        return Err(line.bad_field("answer", "there is no number in it"));
    }
    let worked = format!("{thoughts}\n#### {number}").trim_start().to_owned();
    let context = format!("Question: {question}\nAnswer:");
    Ok(Item::Answer { context, worked, expected: Expected::Number(number.to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: serde_json::Value) -> Result<(Form, Item)> {
        let object = json.as_object().unwrap().clone();
        let line = Line { path: "x.jsonl".into(), number: 7, object };
        let form = Form::of(&line)?;
        Ok((form, form.read(&line)?))
    }

    #[test]
    fn every_form_is_read() {
        use serde_json::json;
        let (form, item) = read(json!({"query": "q", "choices": ["a", "b"], "gold": 1})).unwrap();
        assert_eq!(form, Form::MultipleChoice);
        assert_eq!(
            item,
            Item::Choice { context: "q".into(), choices: vec!["a".into(), "b".into()], gold: 1 }
        );
        let (_, item) =
            read(json!({"question": " Why? ", "choices": ["x", "y"], "answer": 0, "subject": "s"})).unwrap();
        let context = "Why?\nA. x\nB. y\nAnswer:".into();
        assert_eq!(item, Item::Choice { context, choices: vec!["A".into(), "B".into()], gold: 0 });
        let (form, item) = read(json!({
            "activity_label": "Cooking", "ctx_a": "He cooks [title] Rice.", "ctx_b": "then He",
            "endings": [" eats [substeps] it. ", "sleeps."], "label": "1", "ind": 4, "ctx": "…"
        }))
        .unwrap();
        assert_eq!(form, Form::HellaSwag);
        let context = "Cooking: He cooks. Rice. Then he".into();
        assert_eq!(
            item,
            Item::Choice { context, choices: vec!["eats it.".into(), "sleeps.".into()], gold: 1 }
        );
        let (form, _) = read(json!({"context_options": ["a", "b"], "continuation": "c", "gold": 0})).unwrap();
        assert_eq!(form, Form::Schema);
        let (_, item) = read(json!({"task": "t", "input": "True is", "target": "True"})).unwrap();
        assert_eq!(item, Item::Continuation { context: "True is".into(), continuation: "True".into() });
        let (_, item) = read(json!({"question": "2+2?", "answer": "Two and two.\n#### 4"})).unwrap();
        let (context, worked) = ("Question: 2+2?\nAnswer:".into(), "Two and two.\n#### 4".into());
        assert_eq!(item, Item::Answer { context, worked, expected: Expected::Number("4".into()) });
        let (_, again) =
            read(json!({"context": "2+2?", "chain_of_thought": "Two and two.", "answer": "4"})).unwrap();
        assert_eq!(again, item);
    }

    #[test]
    fn what_is_wrong_is_named() {
        use serde_json::json;
        for (bad, words) in [
            (json!({"a": 1, "b": 2}), "line 7: its fields (a, b)"),
            (json!({"query": "q", "choices": ["a", "b"]}), "field gold: it is missing"),
            (json!({"query": "q", "choices": ["a", "b"], "gold": 2}), "field gold: 2 is none of 0 to 1"),
            (json!({"query": "q", "choices": ["a"], "gold": 0}), "field choices: it has 1 texts"),
            (json!({"query": "q", "choices": ["a", ""], "gold": 0}), "field choices: not all"),
            (json!({"query": 1, "choices": ["a", "b"], "gold": 0}), "field query: it is no text"),
            (json!({"context": "q", "continuation": ""}), "field continuation: it is empty"),
            (json!({"question": "q", "answer": "none"}), "field answer: there is no number"),
            (json!({"context": "q", "answer": "a", "aliases": "b"}), "field aliases: it is no list"),
        ] {
            let error = read(bad.clone()).unwrap_err().to_string();
            assert!(error.starts_with("x.jsonl, line 7") && error.contains(words), "{bad}: {error}");
        }
    }
}
