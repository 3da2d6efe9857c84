use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use crate::error::Place;
use crate::{Error, Result};

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The lines of a file as bytes, none longer than a bound.
pub(super) struct Lines {
    pub(super) path: PathBuf,
    pub(super) reader: Box<dyn BufRead + Send>,
    pub(super) bytes_max: usize,
    /// Lines read so far.
    n_lines: u64,
}

impl Lines {
    pub(super) fn new(path: &Path, reader: Box<dyn BufRead + Send>, bytes_max: usize) -> Lines {
        Lines { path: path.to_path_buf(), reader, bytes_max, n_lines: 0 }
    }

    /// The next line with its line feed, if it has one, and its number from 1. A line that is too long is read past
    /// and reported as [`Error::Row`].
    pub(super) fn next_line(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        let mut line = Vec::new();
        let bound = self.bytes_max as u64 + 1;
        let n = self.reader.by_ref().take(bound).read_until(b'\n', &mut line);
        if n.map_err(|error| Error::read(&self.path, error))? == 0 {
            return Ok(None);
        }
        self.n_lines += 1;
        if line.len() > self.bytes_max && !line.ends_with(b"\n") {
            self.skip_line()?;
            let reason = format!("longer than {} bytes", self.bytes_max);
            return Err(Error::row(&self.path, Place::Line(self.n_lines), reason));
        }
        if self.n_lines == 1 && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Some((self.n_lines, line)))
    }

    fn skip_line(&mut self) -> Result<()> {
        loop {
            let buffer = self.reader.fill_buf().map_err(|error| Error::read(&self.path, error))?;
            let (n, is_end) = match buffer.iter().position(|&b| b == b'\n') {
                Some(at) => (at + 1, true),
                None => (buffer.len(), buffer.is_empty()),
            };
            self.reader.consume(n);
            if is_end {
                return Ok(());
            }
        }
    }
}
