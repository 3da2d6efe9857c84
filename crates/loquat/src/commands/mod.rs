//! One file a subcommand.

pub(crate) mod backup;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod data;
pub(crate) mod demo;
pub(crate) mod deploy;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod ingest;
pub(crate) mod job;
pub(crate) mod key;
pub(crate) mod model;
pub(crate) mod node;
pub(crate) mod plan;
pub(crate) mod presets;
pub(crate) mod project;
pub(crate) mod promote;
pub(crate) mod train;
pub(crate) mod up;
