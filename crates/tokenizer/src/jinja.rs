//! Jinja as Hugging Face `transformers` runs chat templates: its whitespace rules, functions and filters, Python's
//! methods and ways to print values; without a clock, files or includes, and with fuel.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, Output, State, Value, escape_formatter};
use minijinja_contrib::pycompat;

use crate::{Error, Result};

/// Steps a template may take. Fuel also pays for data, 64 bytes a unit: so this bounds what a template can allocate or
/// write to 128 MiB. A conversation of 1 MB costs some 50,000.
const FUEL: u64 = 2 << 20;
/// Loops, macros and values nested in each other.
const RECURSION_MAX: usize = 200;
/// Spaces `tojson` may indent by.
const INDENT_MAX: usize = 16;

pub(crate) fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(Error::ParseTemplate)?);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_formatter(print_like_python);
    environment.set_unknown_method_callback(pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// Variables that are written where an answer begins and ends; nothing where they are not given.
pub(crate) const GENERATION_BEGINS: &str = "loquat_generation_begins";
pub(crate) const GENERATION_ENDS: &str = "loquat_generation_ends";

const TAG_ENDS: [(&str, &str); 4] = [("{%-", "-%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%", "%}")];

/// Whether the template says itself, with `{% generation %}`, what a trainer learns from.
pub(crate) fn has_generation_tags(source: &str) -> bool {
    TAG_ENDS.iter().any(|(open, close)| source.contains(&format!("{open} generation {close}")))
}

/// `{% generation %}` and its end become the variables above, between tags that trim white space as the originals do.
pub(crate) fn with_generation_marks(source: &str) -> String {
    let mut prepared = source.to_owned();
    for (open, close) in TAG_ENDS {
        let begins =
            format!("{open} if true %}}{{{{ {GENERATION_BEGINS} }}}}{{% endif %}}{{% if true {close}");
        let ends = format!("{open} endif %}}{{% if true %}}{{{{ {GENERATION_ENDS} }}}}{{% endif {close}");
        prepared = prepared.replace(&format!("{open} generation {close}"), &begins);
        prepared = prepared.replace(&format!("{open} endgeneration {close}"), &ends);
    }
    prepared
}

/// `strftime_now(format)` at a given time.
pub(crate) fn strftime_now(unix_s: i64) -> Value {
    Value::from_function(move |format: &str| strftime(unix_s, format))
}

fn raise_exception(message: &str) -> Result<Value, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, format!("the template refuses: {message}")))
}

fn print_like_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), JinjaError> {
    let is_container = matches!(value.kind(), ValueKind::Seq | ValueKind::Map);
    if value.is_none() || value.kind() == ValueKind::Bool || is_container {
        let mut text = String::new();
        write_repr(value, &mut text, 0)?;
        out.write_str(&text).map_err(JinjaError::from)
    } else {
        escape_formatter(out, state, value)
    }
}

/// Python's `repr` of what JSON can hold.
fn write_repr(value: &Value, text: &mut String, depth: usize) -> Result<(), JinjaError> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => {
            let inner = value.as_str().unwrap_or_default();
            let quote = if inner.contains('\'') && !inner.contains('"') { '"' } else { '\'' };
            let escaped =
                inner.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t").replace('\r', "\\r");
            let escaped = if quote == '\'' { escaped.replace('\'', "\\'") } else { escaped };
            text.push(quote);
            text.push_str(&escaped);
            text.push(quote);
        }
        ValueKind::Seq => {
            text.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                text.push_str(if i > 0 { ", " } else { "" });
                write_repr(&item, text, depth + 1)?;
            }
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                text.push_str(if i > 0 { ", " } else { "" });
                write_repr(&key, text, depth + 1)?;
                text.push_str(": ");
                write_repr(&value.get_item(&key)?, text, depth + 1)?;
            }
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
    Ok(())
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, JinjaError> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let _: Option<Value> = kwargs.get("ensure_ascii")?;
    let _: Option<Value> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|error| {
        JinjaError::new(ErrorKind::BadSerialization, "cannot write JSON").with_source(error)
    })?;
    let mut text = String::new();
    let style = JsonStyle {
        indent: indent.map(|width| width.min(INDENT_MAX)),
        sort_keys: sort_keys.unwrap_or(false),
    };
    style.write(&json, &mut text, 0)?;
    Ok(Value::from_safe_string(text))
}

struct JsonStyle {
    /// Spaces a level, or everything on one line.
    indent: Option<usize>,
    sort_keys: bool,
}

impl JsonStyle {
    fn write(&self, value: &serde_json::Value, text: &mut String, depth: usize) -> Result<(), JinjaError> {
        check_depth(depth)?;
        match value {
            serde_json::Value::Array(items) if !items.is_empty() => {
                text.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(text, i, depth + 1);
                    self.write(item, text, depth + 1)?;
                }
                self.close(text, ']', depth);
            }
            serde_json::Value::Object(fields) if !fields.is_empty() => {
                text.push('{');
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|(name, _)| *name);
                }
                for (i, (name, value)) in fields.into_iter().enumerate() {
                    self.separate(text, i, depth + 1);
                    text.push_str(&serde_json::Value::from(name.as_str()).to_string());
                    text.push_str(": ");
                    self.write(value, text, depth + 1)?;
                }
                self.close(text, '}', depth);
            }
            scalar => text.push_str(&scalar.to_string()),
        }
        Ok(())
    }

    fn separate(&self, text: &mut String, i: usize, depth: usize) {
        match self.indent {
            Some(width) => {
                text.push_str(if i > 0 { ",\n" } else { "\n" });
                text.push_str(&" ".repeat(width * depth));
            }
            None => text.push_str(if i > 0 { ", " } else { "" }),
        }
    }

    fn close(&self, text: &mut String, bracket: char, depth: usize) {
        if let Some(width) = self.indent {
            text.push('\n');
            text.push_str(&" ".repeat(width * depth));
        }
        text.push(bracket);
    }
}

fn check_depth(depth: usize) -> Result<(), JinjaError> {
    match depth {
        0..=RECURSION_MAX => Ok(()),
        _ => Err(JinjaError::new(ErrorKind::InvalidOperation, "a value is nested too deeply")),
    }
}

/// The directives of C's `strftime` that templates use; others are left as they stand. UTC.
fn strftime(unix_s: i64, format: &str) -> String {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = unix_s.div_euclid(86_400);
    let second = unix_s.rem_euclid(86_400);
    let (year, month, day) = civil_date(days);
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[(month - 1) as usize];
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => text += &year.to_string(),
            Some('y') => text += &format!("{:02}", year.rem_euclid(100)),
            Some('m') => text += &format!("{month:02}"),
            Some('d') => text += &format!("{day:02}"),
            Some('e') => text += &format!("{day:2}"),
            Some('B') => text += month_name,
            Some('b') => text += &month_name[..3],
            Some('A') => text += weekday,
            Some('a') => text += &weekday[..3],
            Some('H') => text += &format!("{:02}", second / 3600),
            Some('M') => text += &format!("{:02}", second / 60 % 60),
            Some('S') => text += &format!("{:02}", second % 60),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// (year, month 1-12, day 1-31) of a day counted from 1970-01-01 (Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`). Years start in March, so that the leap day is a year's last.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + (month <= 2) as i64, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        // `date -u -d @… '+%Y-%m-%d %H:%M:%S %A %b %e %y %B'` of GNU coreutils.
        let format = "%Y-%m-%d %H:%M:%S %A %b %e %y %B %% %Q";
        for (unix_s, expected) in [
            (0, "1970-01-01 00:00:00 Thursday Jan  1 70 January % %Q"),
            (951_782_400, "2000-02-29 00:00:00 Tuesday Feb 29 00 February % %Q"),
            (1_795_392_000, "2026-11-23 00:00:00 Monday Nov 23 26 November % %Q"),
            (-1, "1969-12-31 23:59:59 Wednesday Dec 31 69 December % %Q"),
        ] {
            assert_eq!(strftime(unix_s, format), expected);
        }
    }
}
