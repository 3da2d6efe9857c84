//! Typed metadata: key and value pairs at the head of a GGUF file.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use super::reader::{Reader, bad};
use crate::Result;

/// Pairs a file may have; real ones have some dozens.
const N_PAIRS_MAX: u64 = 1 << 16;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

/// All pairs.
#[derive(Debug, Default)]
pub(super) struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    pub(super) fn read<R: Read + Seek>(reader: &mut Reader<R>, n_pairs: u64) -> Result<Self> {
        if n_pairs > N_PAIRS_MAX {
            return Err(bad("metadata count", format!("{n_pairs}, at most {N_PAIRS_MAX} are allowed")));
        }
        let mut pairs = BTreeMap::new();
        for i in 0..n_pairs {
            let key = reader.string(&format!("metadata key {i}"))?;
            let value = Value::read(reader, &key)?;
            if pairs.contains_key(&key) {
                return Err(bad(&key, "is there twice"));
            }
            pairs.insert(key, value);
        }
        Ok(Self(pairs))
    }

    /// A non-negative number; `None` when absent.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Int(n)) => {
                usize::try_from(*n).map(Some).map_err(|_| bad(key, format!("{n} is out of range")))
            }
            Some(_) => Err(bad(key, "is not an integer")),
        }
    }

    pub(super) fn required_count(&self, key: &str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| bad(key, "is missing"))
    }

    /// A token id.
    pub(super) fn id(&self, key: &str) -> Result<Option<u32>> {
        let id = self.count(key)?;
        id.map(|id| u32::try_from(id).map_err(|_| bad(key, format!("{id} is out of range")))).transpose()
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f32>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x as f32)),
            Some(_) => Err(bad(key, "is not a float")),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Bool(x)) => Ok(Some(*x)),
            Some(_) => Err(bad(key, "is not a bool")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(bad(key, "is not a string")),
        }
    }

    /// The strings; empty when absent.
    pub(super) fn texts(&self, key: &str) -> Result<&[String]> {
        match self.0.get(key) {
            None => Ok(&[]),
            Some(Value::Texts(texts)) => Ok(texts),
            Some(_) => Err(bad(key, "is not an array of strings")),
        }
    }

    /// The numbers; empty when absent.
    pub(super) fn ints(&self, key: &str) -> Result<&[i64]> {
        match self.0.get(key) {
            None => Ok(&[]),
            Some(Value::Ints(ints)) => Ok(ints),
            Some(_) => Err(bad(key, "is not an array of integers")),
        }
    }

    /// Moves the strings out; empty when absent.
    pub(super) fn take_texts(&mut self, key: &str) -> Result<Vec<String>> {
        match self.0.remove(key) {
            None => Ok(Vec::new()),
            Some(Value::Texts(texts)) => Ok(texts),
            Some(_) => Err(bad(key, "is not an array of strings")),
        }
    }

    /// Moves the numbers out; empty when absent.
    pub(super) fn take_floats(&mut self, key: &str) -> Result<Vec<f32>> {
        match self.0.remove(key) {
            None => Ok(Vec::new()),
            Some(Value::Floats(floats)) => Ok(floats),
            Some(_) => Err(bad(key, "is not an array of floats")),
        }
    }

    /// Moves the numbers out; empty when absent.
    pub(super) fn take_ints(&mut self, key: &str) -> Result<Vec<i32>> {
        match self.0.remove(key) {
            None => Ok(Vec::new()),
            Some(Value::Ints(ints)) => ints
                .into_iter()
                .map(|n| i32::try_from(n).map_err(|_| bad(key, format!("{n} is out of range"))))
                .collect(),
            Some(_) => Err(bad(key, "is not an array of integers")),
        }
    }
}

impl Value {
    fn read<R: Read + Seek>(reader: &mut Reader<R>, key: &str) -> Result<Self> {
        let kind = reader.u32(key)?;
        Ok(match kind {
            7 => Value::Bool(read_bool(reader, key)?),
            8 => Value::Text(reader.string(key)?),
            9 => Self::read_array(reader, key)?,
            6 | 12 => Value::Float(read_float(reader, key, kind)?),
            _ => Value::Int(read_int(reader, key, kind)?),
        })
    }

    fn read_array<R: Read + Seek>(reader: &mut Reader<R>, key: &str) -> Result<Self> {
        let kind = reader.u32(key)?;
        let n = reader.u64(key)?;
        // The smallest element takes a byte (a string its length of 8), so a count beyond that is a lie.
        let least = if kind == 8 { 8 } else { 1 };
        if n > reader.left() / least {
            return Err(bad(key, format!("{n} elements do not fit the {} bytes left", reader.left())));
        }
        Ok(match kind {
            7 => Value::Bools((0..n).map(|_| read_bool(reader, key)).collect::<Result<_>>()?),
            8 => Value::Texts((0..n).map(|_| reader.string(key)).collect::<Result<_>>()?),
            9 => return Err(bad(key, "is an array of arrays, which is not supported")),
            6 | 12 => Value::Floats(
                (0..n).map(|_| read_float(reader, key, kind).map(|x| x as f32)).collect::<Result<_>>()?,
            ),
            _ => {
                let int = |reader: &mut Reader<R>| {
                    let n = read_int(reader, key, kind)?;
                    i64::try_from(n).map_err(|_| bad(key, format!("{n} is out of range")))
                };
                Value::Ints((0..n).map(|_| int(reader)).collect::<Result<_>>()?)
            }
        })
    }
}

fn read_bool<R: Read + Seek>(reader: &mut Reader<R>, key: &str) -> Result<bool> {
    match reader.u8(key)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(bad(key, format!("{other} is not a bool"))),
    }
}

fn read_float<R: Read + Seek>(reader: &mut Reader<R>, key: &str, kind: u32) -> Result<f64> {
    if kind == 6 { Ok(f32::from_bits(reader.u32(key)?).into()) } else { Ok(f64::from_bits(reader.u64(key)?)) }
}

fn read_int<R: Read + Seek>(reader: &mut Reader<R>, key: &str, kind: u32) -> Result<i128> {
    Ok(match kind {
        0 => reader.u8(key)?.into(),
        1 => (reader.u8(key)? as i8).into(),
        2 => reader.u16(key)?.into(),
        3 => (reader.u16(key)? as i16).into(),
        4 => reader.u32(key)?.into(),
        5 => (reader.u32(key)? as i32).into(),
        10 => reader.u64(key)?.into(),
        11 => (reader.u64(key)? as i64).into(),
        other => return Err(bad(key, format!("has the unknown type {other}"))),
    })
}
