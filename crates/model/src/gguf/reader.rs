//! Bytes of a GGUF file, in order, never past its end.

use std::io::{Read, Seek, SeekFrom};

use crate::{Error, Result};

/// Reads numbers and strings; every length is compared with what is left before anything is allocated for it.
pub(super) struct Reader<R> {
    inner: R,
    at: u64,
    len: u64,
}

impl<R: Read + Seek> Reader<R> {
    pub(super) fn new(mut inner: R) -> Result<Self> {
        let len = inner.seek(SeekFrom::End(0)).and_then(|len| inner.rewind().map(|()| len));
        Ok(Self { inner, at: 0, len: len.map_err(|source| unreadable("file", source))? })
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Where the next byte comes from.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn left(&self) -> u64 {
        self.len - self.at
    }

    pub(super) fn bytes(&mut self, n: u64, field: &str) -> Result<Vec<u8>> {
        if n > self.left() {
            return Err(ends_early(field, n, self.left()));
        }
        let mut bytes = vec![0; usize::try_from(n).map_err(|_| ends_early(field, n, self.left()))?];
        self.inner.read_exact(&mut bytes).map_err(|source| unreadable(field, source))?;
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        if N as u64 > self.left() {
            return Err(ends_early(field, N as u64, self.left()));
        }
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes).map_err(|source| unreadable(field, source))?;
        self.at += N as u64;
        Ok(bytes)
    }

    pub(super) fn u8(&mut self, field: &str) -> Result<u8> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(super) fn u16(&mut self, field: &str) -> Result<u16> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self, field: &str) -> Result<String> {
        let n = self.u64(field)?;
        let bytes = self.bytes(n, field)?;
        String::from_utf8(bytes).map_err(|_| bad(field, "is not UTF-8"))
    }
}

/// An error about `field`; what came from the file is kept short.
pub(super) fn bad(field: &str, problem: impl Into<String>) -> Error {
    Error::Gguf { field: field.chars().take(100).collect(), problem: problem.into() }
}

fn ends_early(field: &str, needed: u64, left: u64) -> Error {
    bad(field, format!("the file ends early: {needed} bytes needed, {left} left"))
}

fn unreadable(field: &str, source: std::io::Error) -> Error {
    bad(field, format!("cannot be read: {source}"))
}
