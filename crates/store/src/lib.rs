//! Named immutable objects: RAM, a local directory, S3.
//!
//! What this is: the [`Store`] trait, its three implementations ([`Ram`], [`Local`], [`S3`]) held to one conformance
//! suite (`tests/`), [`Bundle`]: files that become visible together, and [`Backup`]: copies of a whole store.
//!
//! What this is not: a file system (no appends, no renames, no locks), and it knows nothing of documents or models.
//! It reads no environment: endpoints and credentials are passed in.
//!
//! Start reading in `contract.rs` (the promises), then `local.rs` (how the smallest one keeps them), then `bundle.rs`.

#![forbid(unsafe_code)]

mod backup;
mod bundle;
mod contract;
mod error;
mod local;
mod name;
mod open;
mod ram;
mod s3;

pub use backup::{Backup, Copied, OnProgress, Progress, Snapshot};
pub use bundle::{Bundle, BundleWriter, FileEntry, MANIFEST_VERSION, Manifest};
pub use contract::{LIST_MAX, ObjectMeta, PUT_IF_ABSENT_BYTES_MAX, Put, Store};
pub use error::{Error, Result};
pub use local::Local;
pub use name::ObjectName;
pub use open::{open, open_with};
pub use ram::Ram;
pub use s3::{S3, S3Options};
