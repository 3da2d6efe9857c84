//! What an answer must look like, in the spellings of OpenAI, vLLM and llama.cpp.

use std::sync::Arc;

use constrain::{CompileError, Source};
use engine::Constraint;
use serde_json::Value;

use crate::error::{ApiError, Result, echo};
use crate::json::{Fields, expected};
use crate::sampling::Options;
use crate::state::{AppState, ServedModel};

/// A description of answers, and the field it came from.
#[derive(Clone, Debug)]
pub(crate) struct Structure {
    pub(crate) source: Source,
    pub(crate) param: &'static str,
}

/// The one description a request has, if any. Two would have to be met at once, which nobody means.
pub(crate) fn read(fields: Fields) -> Result<Option<Structure>> {
    let found = [
        ("response_format", read_response_format(fields)?),
        ("structured_outputs", read_structured_outputs(fields)?),
        ("guided_json", read_schema(fields, "guided_json", "guided_json")?),
        ("guided_regex", read_text(fields, "guided_regex")?.map(Source::Regex)),
        ("guided_choice", read_choice(fields, "guided_choice", "guided_choice")?),
        ("guided_grammar", read_text(fields, "guided_grammar")?.map(Source::from_grammar)),
        // llama.cpp's.
        ("json_schema", read_schema(fields, "json_schema", "json_schema")?),
        // Its clients send an empty one for none.
        ("grammar", read_text(fields, "grammar")?.filter(|text| !text.is_empty()).map(Source::from_grammar)),
    ];
    let mut found =
        found.into_iter().filter_map(|(param, source)| Some(Structure { source: source?, param }));
    let first = found.next();
    match (&first, found.next()) {
        (Some(first), Some(second)) => {
            let why = format!("`{}` says already what the answer must look like", first.param);
            Err(ApiError::invalid(second.param, why))
        }
        _ => Ok(first),
    }
}

fn read_response_format(fields: Fields) -> Result<Option<Source>> {
    const PARAM: &str = "response_format";
    let Some(format) = fields.object(PARAM)? else { return Ok(None) };
    match format.text("type")?.unwrap_or_default() {
        "text" => Ok(None),
        "json_object" => Ok(Some(Source::JsonObject)),
        "json_schema" => {
            let named = format.object("json_schema").map_err(|e| inside(PARAM, e))?;
            let named = named.ok_or_else(|| ApiError::invalid(PARAM, "`json_schema` is required"))?;
            // OpenAI reads a format without a schema as any object.
            Ok(Some(read_schema(named, "schema", PARAM)?.unwrap_or(Source::JsonObject)))
        }
        other => {
            let why = format!("`type` is one of text, json_object, json_schema, got `{}`", echo(other));
            Err(ApiError::invalid(PARAM, why))
        }
    }
}

fn read_structured_outputs(fields: Fields) -> Result<Option<Source>> {
    const PARAM: &str = "structured_outputs";
    let Some(options) = fields.object(PARAM)? else { return Ok(None) };
    let inside = |e| inside(PARAM, e);
    let any_object = options.flag("json_object").map_err(inside)?;
    let found = [
        read_schema(options, "json", PARAM)?,
        options.text("regex").map_err(inside)?.map(|text| Source::Regex(text.into())),
        read_choice(options, "choice", PARAM)?,
        options.text("grammar").map_err(inside)?.map(|text| Source::from_grammar(text.into())),
        any_object.then_some(Source::JsonObject),
    ];
    let mut found = found.into_iter().flatten();
    match (found.next(), found.next()) {
        (Some(source), None) => Ok(Some(source)),
        _ => {
            Err(ApiError::invalid(PARAM, "expected exactly one of json, regex, choice, grammar, json_object"))
        }
    }
}

/// A schema as it is, or as a text that holds it.
fn read_schema(fields: Fields, name: &str, param: &'static str) -> Result<Option<Source>> {
    let schema = match fields.get(name) {
        None => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|e| {
            ApiError::invalid(param, format!("`{name}` is no JSON: {}", echo(&e.to_string())))
        })?,
        Some(value) => value.clone(),
    };
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Some(Source::JsonSchema(schema))),
        other => Err(expected(param, "a JSON schema", &other)),
    }
}

fn read_choice(fields: Fields, name: &str, param: &'static str) -> Result<Option<Source>> {
    let Some(choices) = fields.list(name).map_err(|e| inside(param, e))? else { return Ok(None) };
    let text =
        |choice: &Value| choice.as_str().map(str::to_owned).ok_or_else(|| expected(param, "strings", choice));
    Ok(Some(Source::Choice(choices.iter().map(text).collect::<Result<_>>()?)))
}

fn read_text(fields: Fields, name: &str) -> Result<Option<String>> {
    Ok(fields.text(name)?.map(str::to_owned))
}

/// An error about a field of a field is named by the outer one, which is what the client sees first.
fn inside(param: &'static str, error: ApiError) -> ApiError {
    match error {
        ApiError::Invalid { message, .. } => ApiError::invalid(param, message.trim_end_matches('.')),
        other => other,
    }
}

/// Puts what holds the answers to their description into `options`, if they have one.
pub(crate) async fn constrain(
    state: &AppState,
    model: &Arc<ServedModel>,
    options: &mut Options,
) -> Result<()> {
    if let Some(structure) = &options.structure {
        options.constraint = Some(compile(state, model, structure).await?);
    }
    Ok(())
}

/// Compiles off the async threads, a few at a time: clients bring the grammars, so neither their number nor their cost
/// may slow down others.
async fn compile(
    state: &AppState,
    model: &Arc<ServedModel>,
    structure: &Structure,
) -> Result<Box<dyn Constraint>> {
    if let Some(constraint) = model.grammars.cached(&structure.source) {
        return Ok(constraint);
    }
    let time_max = state.limits.compile_time_max;
    let turn = tokio::time::timeout(time_max, state.compiling.clone().acquire_owned()).await;
    let turn =
        turn.map_err(|_| ApiError::QueueFull { retry_after: time_max })?.map_err(ApiError::internal)?;
    let (grammars, source) = (model.grammars.clone(), structure.source.clone());
    let compiling = tokio::task::spawn_blocking(move || {
        let compiled = grammars.compile(&source);
        // Held to the end, even if nobody waits any more.
        drop(turn);
        compiled
    });
    let late = |_| ApiError::invalid(structure.param, format!("compiling it takes more than {time_max:?}"));
    let compiled = tokio::time::timeout(time_max, compiling).await.map_err(late)?;
    compiled.map_err(ApiError::internal)?.map_err(|error| match error {
        CompileError::Invalid(why) => ApiError::invalid(structure.param, echo(&why)),
        CompileError::Internal(why) => ApiError::internal(why),
    })
}
