//! JSON from outside: strict where laxness hides mistakes, and field access that names what is wrong.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{ApiError, Result, echo};

/// Values in one array. A value takes 32 bytes in memory and as little as two in the body.
const ARRAY_LEN_MAX: usize = 1 << 20;

/// Parses a request's body, which must be one object. serde_json itself refuses nesting beyond 128 levels, numbers
/// beyond f64, NaN, bad UTF-8 and trailing text.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>> {
    let Strict(value) = serde_json::from_slice(bytes).map_err(|e| ApiError::Json(echo(&e.to_string())))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(ApiError::Json(format!("expected an object, got {}", kind(&other)))),
    }
}

/// A JSON value in which no object has a key twice: which of the two the sender meant cannot be known.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Strict, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_bool<E>(self, v: bool) -> std::result::Result<Strict, E> {
        Ok(Strict(Value::Bool(v)))
    }

    fn visit_i64<E>(self, v: i64) -> std::result::Result<Strict, E> {
        Ok(Strict(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> std::result::Result<Strict, E> {
        Ok(Strict(v.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> std::result::Result<Strict, E> {
        let number = Number::from_f64(v).ok_or_else(|| E::custom("number out of range"))?;
        Ok(Strict(Value::Number(number)))
    }

    fn visit_str<E>(self, v: &str) -> std::result::Result<Strict, E> {
        Ok(Strict(Value::String(v.to_owned())))
    }

    fn visit_string<E>(self, v: String) -> std::result::Result<Strict, E> {
        Ok(Strict(Value::String(v)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Strict, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = seq.next_element()? {
            if values.len() == ARRAY_LEN_MAX {
                return Err(A::Error::custom(format!("an array has more than {ARRAY_LEN_MAX} elements")));
            }
            values.push(value);
        }
        Ok(Strict(Value::Array(values)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Strict, A::Error> {
        let mut values = Map::new();
        while let Some((key, Strict(value))) = map.next_entry::<String, Strict>()? {
            if values.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{}` occurs twice in one object", echo(&key))));
            }
            values.insert(key, value);
        }
        Ok(Strict(Value::Object(values)))
    }
}

/// The fields of one object. `null` is the same as absent, as OpenAI has it; a wrong type or a value out of range is
/// refused by the field's name, never adjusted.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    pub(crate) fn float(self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number as f32)),
            _ => Err(expected(name, &format!("a number from {} to {}", range.start(), range.end()), value)),
        }
    }

    pub(crate) fn integer(self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(expected(name, &integers(&range), value)),
        }
    }

    /// An integer that counts something.
    pub(crate) fn count(self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let range = *range.start() as i64..=i64::try_from(*range.end()).unwrap_or(i64::MAX);
        Ok(self.integer(name, range)?.map(|number| number as usize))
    }

    pub(crate) fn flag(self, name: &str) -> Result<bool> {
        self.flag_or(name, false)
    }

    pub(crate) fn flag_or(self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| expected(name, "true or false", value))
    }

    pub(crate) fn text(self, name: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| expected(name, "a string", value))
    }

    pub(crate) fn list(self, name: &str) -> Result<Option<&'a [Value]>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_array().map(|list| Some(list.as_slice())).ok_or_else(|| expected(name, "an array", value))
    }

    pub(crate) fn object(self, name: &str) -> Result<Option<Fields<'a>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_object().map(|map| Some(Fields(map))).ok_or_else(|| expected(name, "an object", value))
    }
}

fn integers(range: &RangeInclusive<i64>) -> String {
    match (*range.start(), *range.end()) {
        (i64::MIN, i64::MAX) => "a 64-bit integer".into(),
        (start, i64::MAX) => format!("an integer of at least {start}"),
        (start, end) => format!("an integer from {start} to {end}"),
    }
}

/// "expected …, got …" about the field `name`.
pub(crate) fn expected(name: impl Into<String>, what: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Number(number) => echo(&number.to_string()),
        Value::Bool(flag) => flag.to_string(),
        other => kind(other).into(),
    };
    ApiError::invalid(name, format!("expected {what}, got {got}"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_clean_json_is_refused() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let long = format!(r#"{{"a":[{}1]}}"#, "1,".repeat(ARRAY_LEN_MAX));
        let bad: [&[u8]; 12] = [
            b"",
            b"{",
            b"[]",
            b"{\"a\":NaN}",
            b"{\"a\":1e400}",
            b"{\"a\":\"\xff\"}",
            b"{\"a\":\"\0\"}",
            b"{}\0",
            b"{\"a\":1,\"a\":2}",
            b"{\"b\":{\"a\":1,\"a\":1}}",
            deep.as_bytes(),
            long.as_bytes(),
        ];
        for bytes in bad {
            let error =
                parse_object(bytes).expect_err(&String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
            assert!(matches!(error, ApiError::Json(_)));
        }
        assert!(parse_object(br#"{"a":1,"b":{"a":-0.0}}"#).is_ok());
    }

    #[test]
    fn fields_name_what_is_wrong() {
        let map = parse_object(br#"{"n":9223372036854775808,"t":-0,"s":5,"z":null,"f":1.5}"#).unwrap();
        let fields = Fields(&map);
        let text = |e: ApiError| e.to_string();
        assert_eq!(
            text(fields.integer("n", 1..=128).unwrap_err()),
            "Invalid value for `n`: expected an integer from 1 to 128, got 9223372036854775808."
        );
        assert!(text(fields.count("t", 0..=5).unwrap_err()).contains("got -0"));
        assert!(text(fields.text("s").unwrap_err()).contains("expected a string, got 5"));
        assert!(text(fields.integer("f", 0..=9).unwrap_err()).contains("got 1.5"));
        assert_eq!(fields.text("z").unwrap(), None);
        assert_eq!(fields.float("f", 0.0..=2.0).unwrap(), Some(1.5));
    }
}
