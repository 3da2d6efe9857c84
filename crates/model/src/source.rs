//! [`Source`]: the bytes of a file, read where and when they are needed.

use std::fs::File;
use std::io::{BufReader, Read, Result, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// What one read of a header asks the system for at least.
const BUFFER_BYTES: usize = 1 << 18;

/// A file that stays open as long as a tensor in it has not been read; or memory.
#[derive(Clone)]
pub(crate) enum Source {
    File(Arc<File>),
    Memory(Arc<Vec<u8>>),
}

impl Source {
    pub(crate) fn open(path: &Path) -> crate::Result<Self> {
        let file = File::open(path).map_err(|source| crate::Error::Read { path: path.to_owned(), source })?;
        Ok(Self::File(Arc::new(file)))
    }

    /// Fills `bytes` from position `at` on; no position is shared with other readers.
    pub(crate) fn read_at(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(bytes, at),
            Self::Memory(memory) => {
                let end = at as usize + bytes.len();
                let stored = memory.get(at as usize..end).ok_or(std::io::ErrorKind::UnexpectedEof)?;
                bytes.copy_from_slice(stored);
                Ok(())
            }
        }
    }

    fn len(&self) -> Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Memory(memory) => Ok(memory.len() as u64),
        }
    }

    /// Reads on from the start: what headers want.
    pub(crate) fn reader(&self) -> BufReader<SourceReader> {
        BufReader::with_capacity(BUFFER_BYTES, SourceReader { source: self.clone(), at: 0 })
    }
}

/// A position in a [`Source`].
pub(crate) struct SourceReader {
    source: Source,
    at: u64,
}

impl Read for SourceReader {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let left = self.source.len()?.saturating_sub(self.at);
        let n = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.source.read_at(&mut bytes[..n], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for SourceReader {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.source.len()?.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
