//! The parts of a `tokenizer.json` that are rules rather than tokens: normalizer, pre-tokenizer, post-processor, decoder.

use serde_json::Value;

use crate::normalize::NormalizeStep;
use crate::spec::SPACE_MARK;
use crate::split::{Behavior, PrependMark, SplitStep};
use crate::{Error, Result};

/// Steps one sequence may hold.
const SEQUENCE_MAX: usize = 64;

/// What a decoder says that the tokens themselves do not.
pub(crate) struct DecoderFacts {
    pub(crate) strip_leading_space: bool,
}

pub(crate) fn normalize_steps(value: &Value) -> Result<Vec<NormalizeStep>> {
    let mut steps = Vec::new();
    for (field, step) in sequence("normalizer", "normalizers", value)? {
        steps.push(match kind(step) {
            "NFC" => NormalizeStep::Nfc,
            "Prepend" => NormalizeStep::Prepend(text(&field, step, "prepend")?.to_owned()),
            "Replace" => {
                let from = step["pattern"]["String"].as_str().filter(|from| !from.is_empty());
                let from =
                    from.ok_or_else(|| Error::unsupported(format!("{field}.pattern"), "a regex or nothing"))?;
                NormalizeStep::Replace {
                    from: from.to_owned(),
                    to: text(&field, step, "content")?.to_owned(),
                }
            }
            other => return Err(Error::unsupported(field, format!("{other:?}"))),
        });
    }
    Ok(steps)
}

pub(crate) fn split_steps(value: &Value) -> Result<Vec<SplitStep>> {
    let mut steps = Vec::new();
    for (field, step) in sequence("pre_tokenizer", "pretokenizers", value)? {
        let flag = |name: &str, default: bool| step[name].as_bool().unwrap_or(default);
        steps.push(match kind(step) {
            "ByteLevel" => SplitStep::ByteLevel {
                add_prefix_space: flag("add_prefix_space", true),
                use_regex: flag("use_regex", true),
            },
            "Digits" => SplitStep::Digits { individual: flag("individual_digits", false) },
            "Split" => split_step(&field, step)?,
            "Metaspace" => {
                SplitStep::Metaspace { prepend: prepend_mark(&field, step)?, split: flag("split", true) }
            }
            other => return Err(Error::unsupported(field, format!("{other:?}"))),
        });
    }
    Ok(steps)
}

/// The token that the post-processor puts before a text.
pub(crate) fn template_bos(value: &Value) -> Result<Option<String>> {
    let mut bos = None;
    for (field, step) in sequence("post_processor", "processors", value)? {
        match kind(step) {
            "ByteLevel" => {}
            "TemplateProcessing" => {
                bos = step["single"][0]["SpecialToken"]["id"].as_str().map(str::to_owned);
            }
            other => return Err(Error::unsupported(field, format!("{other:?}"))),
        }
    }
    Ok(bos)
}

pub(crate) fn decoder_facts(value: &Value) -> Result<DecoderFacts> {
    let mut facts = DecoderFacts { strip_leading_space: false };
    for (field, step) in sequence("decoder", "decoders", value)? {
        match kind(step) {
            "ByteLevel" | "ByteFallback" | "Fuse" => {}
            "Replace" if step["pattern"]["String"] == SPACE_MARK && step["content"] == " " => {}
            "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => {
                facts.strip_leading_space = true;
            }
            "Metaspace" => {
                facts.strip_leading_space = prepend_mark(&field, step)? != PrependMark::Never;
            }
            other => return Err(Error::unsupported(field, format!("{other:?} as it is set here"))),
        }
    }
    Ok(facts)
}

/// The steps of a `Sequence`, or the one step that stands alone, each with its field; none for null.
fn sequence<'a>(field: &str, list: &str, value: &'a Value) -> Result<Vec<(String, &'a Value)>> {
    if value.is_null() {
        return Ok(Vec::new());
    }
    if kind(value) != "Sequence" {
        return Ok(vec![(field.to_owned(), value)]);
    }
    let field = format!("{field}.{list}");
    let Some(steps) = value[list].as_array() else {
        return Err(Error::field(field, "is no list"));
    };
    if steps.len() > SEQUENCE_MAX {
        return Err(Error::field(field, format!("has more than {SEQUENCE_MAX} steps")));
    }
    Ok(steps.iter().enumerate().map(|(i, step)| (format!("{field}[{i}]"), step)).collect())
}

fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or("")
}

fn text<'a>(field: &str, step: &'a Value, name: &str) -> Result<&'a str> {
    step[name].as_str().ok_or_else(|| Error::field(format!("{field}.{name}"), "is no string"))
}

fn split_step(field: &str, step: &Value) -> Result<SplitStep> {
    let behavior = match text(field, step, "behavior")? {
        "Removed" => Behavior::Removed,
        "Isolated" => Behavior::Isolated,
        "MergedWithPrevious" => Behavior::MergedWithPrevious,
        "MergedWithNext" => Behavior::MergedWithNext,
        "Contiguous" => Behavior::Contiguous,
        other => return Err(Error::unsupported(format!("{field}.behavior"), format!("{other:?}"))),
    };
    let pattern = &step["pattern"];
    let (pattern, literal) = match (pattern["Regex"].as_str(), pattern["String"].as_str()) {
        (Some(regex), None) => (regex, false),
        (None, Some(string)) => (string, true),
        _ => return Err(Error::field(format!("{field}.pattern"), "is neither a Regex nor a String")),
    };
    let invert = step["invert"].as_bool().unwrap_or(false);
    Ok(SplitStep::Pattern { pattern: pattern.to_owned(), literal, behavior, invert })
}

fn prepend_mark(field: &str, step: &Value) -> Result<PrependMark> {
    if step["replacement"] != SPACE_MARK {
        return Err(Error::unsupported(format!("{field}.replacement"), "anything but ▁"));
    }
    match (step["prepend_scheme"].as_str(), step["add_prefix_space"].as_bool()) {
        (Some("first"), _) => Ok(PrependMark::First),
        (Some("always"), _) | (None, None | Some(true)) => Ok(PrependMark::Always),
        (Some("never"), _) | (None, Some(false)) => Ok(PrependMark::Never),
        (Some(other), _) => Err(Error::unsupported(format!("{field}.prepend_scheme"), format!("{other:?}"))),
    }
}
