use std::fmt::Debug;
use std::io::Read;
use std::ops::Range;

use crate::{Error, ObjectName, Result};

/// The most names one `list` returns; more is an error, never a silent cut.
/// 1e6 names * ~100 B = 100 MB.
pub const LIST_MAX: usize = 1_000_000;

/// Put-if-absent is for small things that decide (manifests, records): one request everywhere, never multipart.
pub const PUT_IF_ABSENT_BYTES_MAX: u64 = 16 << 20;

/// What put-if-absent did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Put {
    Created,
    /// An object of this name was there; it is untouched.
    ///
    /// Over a network a first attempt may have landed and its answer been lost, so that the retry finds the caller's
    /// own bytes: a caller to whom that matters puts bytes that name their writer and reads them back.
    Exists,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    pub name: ObjectName,
    pub bytes: u64,
}

/// Named objects, written whole.
///
/// - An object is visible whole or not at all, to every reader, also after its writer was killed with SIGKILL.
/// - When a put returns, the object survives a crash of the machine (as far as the medium keeps its promises).
/// - A name that is an object has no objects under it (`a` and `a/b` exclude each other). `Ram` and `Local` refuse the
///   second; S3 servers differ, so callers keep to it.
/// - Calls block. Async callers use `spawn_blocking`.
pub trait Store: Send + Sync + Debug {
    /// Writes an object, replacing one of that name.
    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<()>;

    /// `put` from a reader that gives exactly `bytes` bytes; memory stays bounded on `Local` and `S3`. A source that
    /// fails, or gives fewer or more, leaves nothing behind.
    fn put_reader(&self, name: &ObjectName, reader: &mut dyn Read, bytes: u64) -> Result<()>;

    /// Writes an object unless there is one: of any number of racing callers exactly one gets [`Put::Created`].
    /// Takes at most [`PUT_IF_ABSENT_BYTES_MAX`].
    fn put_if_absent(&self, name: &ObjectName, bytes: &[u8]) -> Result<Put>;

    /// The whole object, or [`Error::NotFound`].
    fn get(&self, name: &ObjectName) -> Result<Vec<u8>>;

    /// Bytes `range` of the object. A range that is not inside it is [`Error::OutOfRange`], never a short answer.
    fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Vec<u8>>;

    fn head(&self, name: &ObjectName) -> Result<Option<ObjectMeta>>;

    /// Objects under `prefix` at any depth, sorted by name. A prefix is whole parts (`runs/a` does not find
    /// `runs/ab/x`), with or without a slash at its end; `""` is everything. Things whose names are no
    /// [`ObjectName`]s (a stranger's files in the same place) are not objects and are left out.
    fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>>;

    /// Removes an object; one that is absent is no error.
    fn delete(&self, name: &ObjectName) -> Result<()>;

    /// Where this is, for messages: no credentials in it.
    fn url(&self) -> String;
}

/// Checks a list prefix and drops the slash at its end. `None`: everything.
pub(crate) fn parse_prefix(prefix: &str) -> Result<Option<ObjectName>> {
    match prefix.strip_suffix('/').unwrap_or(prefix) {
        "" if prefix.is_empty() => Ok(None),
        trimmed => ObjectName::parse(trimmed).map(Some),
    }
}

pub(crate) fn check_put_if_absent_bytes(name: &ObjectName, bytes: &[u8]) -> Result<()> {
    if bytes.len() as u64 > PUT_IF_ABSENT_BYTES_MAX {
        let bytes = bytes.len() as u64;
        return Err(Error::TooLarge { name: name.clone(), bytes, bytes_max: PUT_IF_ABSENT_BYTES_MAX });
    }
    Ok(())
}

/// `range` as far as it lies in an object of `bytes` bytes, else the error that says so.
pub(crate) fn check_range(
    store: &dyn Store,
    name: &ObjectName,
    range: &Range<u64>,
    bytes: u64,
) -> Result<()> {
    if range.start <= range.end && range.end <= bytes {
        return Ok(());
    }
    let Range { start, end } = *range;
    Err(Error::OutOfRange { name: name.clone(), store: store.url(), start, end, bytes })
}
