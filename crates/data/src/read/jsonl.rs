use super::Rows;
use super::lines::Lines;
use super::row::RowParser;
use crate::document::text_of;
use crate::error::Place;
use crate::{Error, ReadOptions, Result};

/// A JSON object (or string) on every line; blank lines are left out.
pub(super) struct JsonlRows {
    lines: Lines,
    row: RowParser,
}

impl JsonlRows {
    pub(super) fn new(lines: Lines, options: &ReadOptions) -> JsonlRows {
        JsonlRows { lines, row: RowParser::new(options) }
    }

    fn parse(&self, number: u64, line: Vec<u8>) -> Result<(u64, String)> {
        let line = text_of(&self.lines.path, number, line)?;
        let text = self
            .row
            .parse(&line)
            .map_err(|reason| Error::row(&self.lines.path, Place::Line(number), reason))?;
        Ok((number, text))
    }
}

impl Rows for JsonlRows {
    fn next_row(&mut self) -> Option<Result<(u64, String)>> {
        loop {
            match self.lines.next_line() {
                Ok(None) => return None,
                Ok(Some((_, line))) if line.trim_ascii().is_empty() => {}
                Ok(Some((number, line))) => return Some(self.parse(number, line)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
