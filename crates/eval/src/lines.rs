//! Lines of JSON, plain or compressed, from a file that may be anything.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// One item. The longest known has 30 kB.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Items of one task, which are all in memory.
const ITEMS_MAX: usize = 1 << 18;
/// All of a file once it is unpacked: a small one may hold a lot of nothing.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// An object and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) path: PathBuf,
    /// From 1, as editors count.
    pub(crate) number: usize,
    pub(crate) object: Map<String, Value>,
}

impl Line {
    pub(crate) fn bad(&self, problem: impl Into<String>) -> Error {
        Error::Line { path: self.path.clone(), line: self.number, problem: problem.into() }
    }

    pub(crate) fn bad_field(&self, field: &str, problem: impl Into<String>) -> Error {
        let problem = problem.into();
        Error::Field { path: self.path.clone(), line: self.number, field: field.to_owned(), problem }
    }

    pub(crate) fn has(&self, field: &str) -> bool {
        self.object.contains_key(field)
    }

    pub(crate) fn text(&self, field: &str) -> Result<&str> {
        let value = self.object.get(field).ok_or_else(|| self.bad_field(field, "it is missing"))?;
        value.as_str().ok_or_else(|| self.bad_field(field, "it is no text"))
    }

    /// A list of texts, none of them empty.
    pub(crate) fn texts(&self, field: &str) -> Result<Vec<String>> {
        let value = self.object.get(field).ok_or_else(|| self.bad_field(field, "it is missing"))?;
        let list = value.as_array().ok_or_else(|| self.bad_field(field, "it is no list"))?;
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let texts: Option<Vec<String>> = list.iter().map(text).collect();
        texts.ok_or_else(|| self.bad_field(field, "not all of it are texts with something in them"))
    }

    /// Which of `n` things: a number, or a text that is one.
    pub(crate) fn index(&self, field: &str, n: usize) -> Result<usize> {
        let value = self.object.get(field).ok_or_else(|| self.bad_field(field, "it is missing"))?;
        let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
        let index = number.and_then(|number| usize::try_from(number).ok()).filter(|&index| index < n);
        index.ok_or_else(|| self.bad_field(field, format!("{value} is none of 0 to {}", n.saturating_sub(1))))
    }
}

/// All objects of a file of this name, at least one. `.gz` is unpacked.
pub(crate) fn read<'a>(path: &Path, file: impl Read + 'a) -> Result<Vec<Line>> {
    let file = BufReader::new(file);
    let packed = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz"));
    let mut bytes: Box<dyn BufRead> =
        if packed { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) };
    let mut lines = Vec::new();
    let (mut number, mut n_bytes) = (0, 0);
    while let Some(line) = read_line(&mut *bytes, path, number)? {
        number += 1;
        n_bytes += line.len() as u64;
        let text = line.trim_ascii();
        if text.is_empty() {
            continue;
        }
        if lines.len() == ITEMS_MAX || n_bytes > FILE_BYTES_MAX {
            let problem = format!("more than {ITEMS_MAX} items or {FILE_BYTES_MAX} bytes");
            return Err(Error::File { path: path.to_owned(), problem });
        }
        let object = serde_json::from_slice(text).map_err(|error| Error::Line {
            path: path.to_owned(),
            line: number,
            problem: format!("it is no JSON object: {error}"),
        })?;
        lines.push(Line { path: path.to_owned(), number, object });
    }
    if lines.is_empty() {
        return Err(Error::File { path: path.to_owned(), problem: "it is empty".to_owned() });
    }
    Ok(lines)
}

fn read_line(bytes: &mut dyn BufRead, path: &Path, number: usize) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = bytes.take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line);
    let n = n.map_err(|source| Error::Read { path: path.to_owned(), line: number, source })?;
    if n as u64 > LINE_BYTES_MAX {
        let problem = format!("it has more than {LINE_BYTES_MAX} bytes");
        return Err(Error::Line { path: path.to_owned(), line: number + 1, problem });
    }
    if number == 0 && line.starts_with(b"\xef\xbb\xbf") {
        line.drain(..3);
    }
    Ok((n > 0).then_some(line))
}
