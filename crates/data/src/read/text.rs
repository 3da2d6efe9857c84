use super::Rows;
use super::lines::Lines;
use crate::document::text_of;
use crate::error::Place;
use crate::{Error, ReadOptions, Result};

/// A text file: one document, or several with a separator line between them.
pub(super) struct TextRows {
    lines: Lines,
    separator: Option<Vec<u8>>,
    is_done: bool,
}

impl TextRows {
    pub(super) fn new(lines: Lines, options: &ReadOptions) -> TextRows {
        let separator = options.separator.as_ref().map(|separator| separator.clone().into_bytes());
        TextRows { lines, separator, is_done: false }
    }

    /// Lines up to the next separator or the end, and the number of the first.
    fn next_text(&mut self) -> Result<(u64, String)> {
        let mut first_line = 1;
        let mut text = Vec::new();
        let mut too_long = false;
        loop {
            let (number, line) = match self.lines.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => {
                    self.is_done = true;
                    break;
                }
                // A line longer than a document may be: the document is too long, and read past to its end.
                Err(Error::Row { .. }) => {
                    too_long = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if self.separator.as_deref().is_some_and(|separator| line.trim_ascii_end() == separator) {
                break;
            }
            if text.is_empty() {
                first_line = number;
            }
            too_long |= text.len() + line.len() > self.lines.bytes_max;
            if !too_long {
                text.extend_from_slice(&line);
            }
        }
        if too_long {
            let reason = format!(
                "a document longer than {} bytes begins here: name the line between documents (--separator), or use JSONL",
                self.lines.bytes_max
            );
            return Err(Error::row(&self.lines.path, Place::Line(first_line), reason));
        }
        Ok((first_line, text_of(&self.lines.path, first_line, text)?))
    }
}

impl Rows for TextRows {
    fn next_row(&mut self) -> Option<Result<(u64, String)>> {
        if self.is_done { None } else { Some(self.next_text()) }
    }
}
