//! The table of nodes: the machines that run jobs, as each says of itself.
//!
//! Where many machines share a database, each has a reconciler of its own, which holds the lease of its node: it alone
//! watches, stops and ends the processes that run there. A job that waits is started by whichever node records the start
//! first; the others end what they had prepared.

use std::time::Duration;

use crate::clock::UnixMs;
use crate::database::Control;
use crate::error::{Error, Result};
use crate::job::Job;
use crate::models::check_name;
use crate::sql::{Fault, Row, values};

const NODES_MAX: usize = 10_000;

/// A node that has not been heard of for so long is taken for dead.
pub const NODE_SILENT_MAX: Duration = Duration::from_secs(15);

/// What a node may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeMode {
    Open,
    /// Starts nothing new; what runs goes on.
    Cordoned,
    /// Starts nothing new, and what runs is asked to save and goes on elsewhere.
    Draining,
}

impl NodeMode {
    pub const ALL: [Self; 3] = [Self::Open, Self::Cordoned, Self::Draining];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
        }
    }
}

/// A machine as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// What tells it from all others, also after a restart.
    pub name: String,
    pub cores: u32,
    pub memory_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub spec: NodeSpec,
    pub mode: NodeMode,
    pub seen_at: UnixMs,
}

impl Control {
    /// A node says that it is there; returns what it may do.
    pub fn put_node(&self, spec: &NodeSpec) -> Result<NodeMode> {
        check_name("node name", &spec.name)?;
        let memory_bytes = i64::try_from(spec.memory_bytes).unwrap_or(i64::MAX);
        let now = self.now();
        self.write("put a node", |transaction| {
            let n = transaction.number("SELECT count(*) FROM nodes WHERE name <> ?1", values![&spec.name])?;
            if usize::try_from(n).is_ok_and(|n| n >= NODES_MAX) {
                return Err(Error::TooMany { what: "nodes", max: NODES_MAX }.into());
            }
            let row = transaction.row(
                "INSERT INTO nodes (name, mode, cores, memory_bytes, seen_ms) VALUES (?1, 'open', ?2, ?3, ?4)
                 ON CONFLICT (name) DO UPDATE
                 SET cores = excluded.cores, memory_bytes = excluded.memory_bytes, seen_ms = excluded.seen_ms
                 RETURNING mode",
                values![&spec.name, spec.cores, memory_bytes, now.0],
            )?;
            Ok(mode(0, row.ok_or_else(|| Fault::row(0, "no row"))?.text(0)?)?)
        })
    }

    pub fn list_nodes(&self) -> Result<Vec<Node>> {
        self.read("list nodes", |transaction| {
            let sql = "SELECT name, mode, cores, memory_bytes, seen_ms FROM nodes ORDER BY name";
            Ok(transaction.rows(sql, &[])?.iter().map(node).collect::<Result<_, _>>()?)
        })
    }

    /// `false` when there is no such node.
    pub fn set_node_mode(&self, name: &str, mode: NodeMode) -> Result<bool> {
        let changed = self.write("change a node", |transaction| {
            let sql = "UPDATE nodes SET mode = ?2 WHERE name = ?1";
            Ok(transaction.execute(sql, values![name, mode.as_str()])? == 1)
        })?;
        self.notify_jobs_changed();
        Ok(changed)
    }
}

/// Whether a job is this node's to look after: it runs there, or it waits for anybody.
pub(crate) fn is_of(job: &Job, node: Option<&str>) -> bool {
    match (&job.process, node) {
        (Some(process), Some(node)) => process.node.is_empty() || process.node == node,
        _ => true,
    }
}

fn mode(column: usize, word: &str) -> Result<NodeMode, Fault> {
    let found = NodeMode::ALL.into_iter().find(|mode| mode.as_str() == word);
    found.ok_or_else(|| Fault::unknown_word(column, word))
}

fn node(row: &Row) -> Result<Node, Fault> {
    let memory_bytes = u64::try_from(row.int(3)?).unwrap_or(0);
    let spec = NodeSpec { name: row.text(0)?.to_owned(), cores: row.u32(2)?, memory_bytes };
    Ok(Node { spec, mode: mode(1, row.text(1)?)?, seen_at: UnixMs(row.int(4)?) })
}
