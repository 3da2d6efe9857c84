//! Reading an object bit by bit, sure of every byte before the last of them is given out.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use crate::{Error, FileEntry, ObjectName, Result, Store};

/// What is in memory of an object.
const CHUNK_BYTES: u64 = 8 << 20;

/// Reads an object that is to be as `entry` says. One that is not fails before its end, so that a put from here leaves
/// nothing; [`Checked::failed`] then says why.
pub(super) struct Checked<'a> {
    store: &'a dyn Store,
    name: &'a ObjectName,
    entry: &'a FileEntry,
    hash: Sha256,
    /// Bytes of the object that were read.
    at: u64,
    chunk: Vec<u8>,
    /// Bytes of the chunk that were given out.
    given: usize,
    checked: bool,
    failed: Option<Error>,
}

impl<'a> Checked<'a> {
    pub(super) fn new(store: &'a dyn Store, name: &'a ObjectName, entry: &'a FileEntry) -> Checked<'a> {
        let (hash, chunk) = (Sha256::new(), Vec::new());
        Checked { store, name, entry, hash, at: 0, chunk, given: 0, checked: false, failed: None }
    }

    /// Why reading failed, if it did.
    pub(super) fn failed(self) -> Option<Error> {
        self.failed
    }

    fn fill(&mut self) -> Result<()> {
        let end = self.entry.bytes.min(self.at + CHUNK_BYTES);
        self.chunk = match self.store.get_range(self.name, self.at..end) {
            Err(Error::OutOfRange { bytes, .. }) => {
                return Err(
                    self.damaged(format!("it has {bytes} bytes and should have {}", self.entry.bytes))
                );
            }
            chunk => chunk?,
        };
        (self.at, self.given) = (end, 0);
        self.hash.update(&self.chunk);
        if self.at == self.entry.bytes {
            let found = hex::encode(std::mem::take(&mut self.hash).finalize());
            if found != self.entry.sha256 {
                let reason = format!("its checksum is {found} and should be {}", self.entry.sha256);
                return Err(self.damaged(reason));
            }
            self.checked = true;
        }
        Ok(())
    }

    fn damaged(&self, reason: String) -> Error {
        Error::Damaged { name: self.name.clone(), store: self.store.url(), reason }
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given == self.chunk.len()
            && !self.checked
            && let Err(error) = self.fill()
        {
            let text = error.to_string();
            self.failed = Some(error);
            return Err(io::Error::other(text));
        }
        let n = buffer.len().min(self.chunk.len() - self.given);
        buffer[..n].copy_from_slice(&self.chunk[self.given..self.given + n]);
        self.given += n;
        Ok(n)
    }
}
