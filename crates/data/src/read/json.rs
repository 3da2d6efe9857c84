use std::io::BufRead;

use super::Rows;
use super::lines::Lines;
use super::row::RowParser;
use crate::error::Place;
use crate::{Error, ReadOptions, Result};

/// A JSON array of objects (or strings), read one element at a time: the array may be larger than memory.
pub(super) struct JsonRows {
    lines: Lines,
    row: RowParser,
    n_rows: u64,
    /// The byte that ended the last element, or came before the first: `[` or `,`; `]` at the end.
    last: Option<u8>,
}

impl JsonRows {
    pub(super) fn new(lines: Lines, options: &ReadOptions) -> JsonRows {
        JsonRows { lines, row: RowParser::new(options), n_rows: 0, last: None }
    }

    fn next(&mut self) -> Result<Option<(u64, String)>> {
        if self.last.is_none() {
            self.begin()?;
        }
        if self.last == Some(b']') {
            return Ok(None);
        }
        let Some(element) = self.element()? else { return self.end().map(|()| None) };
        self.n_rows += 1;
        let fail = |reason: String| Error::row(&self.lines.path, Place::Row(self.n_rows), reason);
        let element = String::from_utf8(element).map_err(|_| fail("not UTF-8".to_string()))?;
        let text = self.row.parse(&element).map_err(fail)?;
        if self.last == Some(b']') {
            self.end()?;
        }
        Ok(Some((self.n_rows, text)))
    }

    fn begin(&mut self) -> Result<()> {
        const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];
        let mut first = self.byte()?;
        while first.is_some_and(|b| b.is_ascii_whitespace() || BYTE_ORDER_MARK.contains(&b)) {
            first = self.byte()?;
        }
        self.last = Some(b']');
        if first != Some(b'[') {
            let reason = "not a JSON array (a file with a JSON object on every line is .jsonl)";
            return Err(self.fail(reason));
        }
        self.last = first;
        Ok(())
    }

    /// The bytes of the next element; `None` where the array is empty. Finds where it ends by counting brackets
    /// outside of strings; whether it is JSON is for the parser to say.
    fn element(&mut self) -> Result<Option<Vec<u8>>> {
        let is_first = self.last == Some(b'[');
        let (mut depth, mut in_string, mut escaped) = (0u32, false, false);
        let mut element = Vec::new();
        loop {
            let Some(byte) = self.byte()? else { return Err(self.broken("the array is truncated")) };
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                _ if in_string => {}
                b'[' | b'{' => depth += 1,
                b',' | b']' if depth == 0 => {
                    self.last = Some(byte);
                    let is_empty = is_first && byte == b']' && element.trim_ascii().is_empty();
                    return Ok((!is_empty).then_some(element));
                }
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if element.len() == self.lines.bytes_max {
                let reason = format!("an element longer than {} bytes", self.lines.bytes_max);
                return Err(self.broken(&reason));
            }
            element.push(byte);
        }
    }

    fn end(&mut self) -> Result<()> {
        while let Some(byte) = self.byte()? {
            if !byte.is_ascii_whitespace() {
                return Err(self.fail("something follows the end of the array"));
            }
        }
        Ok(())
    }

    /// An error after which there is no next element to go on with.
    fn broken(&mut self, reason: &str) -> Error {
        self.last = Some(b']');
        self.fail(reason)
    }

    fn fail(&self, reason: &str) -> Error {
        let reason = format!("{reason} (after row {})", self.n_rows);
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, reason);
        Error::read(&self.lines.path, source)
    }

    fn byte(&mut self) -> Result<Option<u8>> {
        let buffer = self.lines.reader.fill_buf().map_err(|error| Error::read(&self.lines.path, error))?;
        let byte = buffer.first().copied();
        self.lines.reader.consume(usize::from(byte.is_some()));
        Ok(byte)
    }
}

impl Rows for JsonRows {
    fn next_row(&mut self) -> Option<Result<(u64, String)>> {
        self.next().transpose()
    }
}
