//! The table of nodes: the machines that run jobs, as each says of itself.
//!
//! Where many machines share a database, each has a reconciler of its own, which holds the lease of its node: it alone
//! watches, stops and ends the processes that run there. A job that waits is started by whichever node records the start
//! first; the others end what they had prepared.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMs;
use crate::database::Control;
use crate::error::{Error, Result};
use crate::job::{Job, JobId};
use crate::models::check_name;
use crate::room::{Room, amount};
use crate::sql::{Fault, Row, Transaction, values};

const NODES_MAX: usize = 10_000;

const COLUMNS: &str =
    "name, mode, cores, memory_bytes, seen_ms, accelerators, disk_bytes, jobs_max, machine, load";

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// What tells it from all others, also after a restart.
    pub name: String,
    /// What tells the machine from another one that was given the same name.
    pub machine: String,
    pub cores: u32,
    pub memory_bytes: u64,
    pub accelerators: u32,
    pub disk_bytes: u64,
    /// Jobs beside each other, services aside.
    pub jobs_max: u32,
}

impl NodeSpec {
    pub(crate) fn room(&self) -> Room {
        Room {
            cores: self.cores.into(),
            memory_bytes: amount(self.memory_bytes),
            accelerators: self.accelerators.into(),
            jobs: self.jobs_max.into(),
        }
    }
}

/// What a machine measured last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeLoad {
    /// Cores that were busy, by whatever ran there.
    pub cores: f64,
    pub memory_bytes: u64,
    pub disk_free_bytes: u64,
    /// Why nothing new is to start there.
    pub problem: Option<String>,
    /// The part of it that is jobs.
    pub jobs: Vec<JobLoad>,
}

/// What the processes of a job used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobLoad {
    pub id: i64,
    pub cores: f64,
    pub memory_bytes: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub spec: NodeSpec,
    pub mode: NodeMode,
    pub seen_at: UnixMs,
    pub load: NodeLoad,
}

impl Node {
    /// What a controller without a node of its own starts things on: its launcher finds the machine.
    pub(crate) fn anywhere(jobs_max: usize, now: UnixMs) -> Node {
        let spec = NodeSpec {
            cores: u32::MAX,
            memory_bytes: u64::MAX,
            accelerators: u32::MAX,
            jobs_max: u32::try_from(jobs_max).unwrap_or(u32::MAX),
            ..NodeSpec::default()
        };
        Node { spec, mode: NodeMode::Open, seen_at: now, load: NodeLoad::default() }
    }

    /// Whether nothing was heard of it for too long. What was heard in the future was heard before the clock was set back.
    pub fn is_silent(&self, now: UnixMs) -> bool {
        now.since(self.seen_at).max(self.seen_at.since(now)) > NODE_SILENT_MAX
    }

    /// Whether something new may start there.
    pub fn is_open(&self, now: UnixMs) -> bool {
        self.mode == NodeMode::Open && !self.is_silent(now) && self.load.problem.is_none()
    }

    /// What it is, in one word.
    pub fn state(&self, now: UnixMs) -> &'static str {
        match self {
            _ if self.is_silent(now) => "silent",
            Node { mode: NodeMode::Open, load: NodeLoad { problem: Some(_), .. }, .. } => "unwell",
            _ => self.mode.as_str(),
        }
    }
}

impl Control {
    /// A node says that it is there, and how it is; returns what it may do. A name that another machine uses is refused
    /// while that one is heard of, and as long as jobs run there for all we know.
    pub fn put_node(&self, spec: &NodeSpec, load: &NodeLoad) -> Result<NodeMode> {
        check_name("node name", &spec.name)?;
        let load = serde_json::to_string(load).expect("plain data has a JSON form");
        self.write("put a node", |transaction| {
            let now = self.lease_now(transaction)?;
            match find(transaction, &spec.name)? {
                None => {
                    let n = transaction.number("SELECT count(*) FROM nodes", &[])?;
                    if usize::try_from(n).is_ok_and(|n| n >= NODES_MAX) {
                        return Err(Error::TooMany { what: "nodes", max: NODES_MAX }.into());
                    }
                }
                Some(found) if ["", &spec.machine].contains(&found.spec.machine.as_str()) => {}
                Some(found) => {
                    if !found.is_silent(now) || !running_on(transaction, &spec.name)?.is_empty() {
                        return Err(Error::NodeTaken { name: spec.name.clone() }.into());
                    }
                }
            }
            let row = transaction.row(
                "INSERT INTO nodes (name, mode, cores, memory_bytes, seen_ms, accelerators, disk_bytes, jobs_max,
                                    machine, load)
                 VALUES (?1, 'open', ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
                 ON CONFLICT (name) DO UPDATE
                 SET cores = excluded.cores, memory_bytes = excluded.memory_bytes, seen_ms = excluded.seen_ms,
                     accelerators = excluded.accelerators, disk_bytes = excluded.disk_bytes,
                     jobs_max = excluded.jobs_max, machine = excluded.machine, load = excluded.load
                 RETURNING mode",
                values![
                    &spec.name,
                    spec.cores,
                    amount(spec.memory_bytes),
                    now.0,
                    spec.accelerators,
                    amount(spec.disk_bytes),
                    spec.jobs_max,
                    &spec.machine,
                    &load,
                ],
            )?;
            Ok(mode(0, row.ok_or_else(|| Fault::row(0, "no row"))?.text(0)?)?)
        })
    }

    /// A person says that a machine will not come back: it is forgotten, and what ran there is run again elsewhere. Were
    /// the machine only cut off, its jobs would run twice; so one that was heard of lately is not forgotten.
    pub fn forget_node(&self, name: &str) -> Result<()> {
        let waiting_at = self.now();
        self.write("forget a node", |transaction| {
            let now = self.lease_now(transaction)?;
            let found = find(transaction, name)?.ok_or(Error::NoNode { name: name.to_owned() })?;
            if !found.is_silent(now) {
                return Err(Error::NodeAlive { name: name.to_owned() }.into());
            }
            for id in running_on(transaction, name)? {
                transaction.execute(
                    "UPDATE jobs
                     SET state = CASE desired WHEN 'cancelled' THEN 'cancelled' ELSE 'interrupted' END,
                         process = NULL, stop_ms = NULL, waiting_ms = ?2, message = ?3
                     WHERE id = ?1",
                    values![id.0, waiting_at.0, &format!("its node {name} was given up")],
                )?;
            }
            // Whoever still holds the node's lease cannot write any more.
            transaction.execute(
                "UPDATE leases SET expires_ms = 0, token = token + 1 WHERE name = ?1",
                values![&crate::reconciler::lease_name(Some(name))],
            )?;
            transaction.execute("DELETE FROM nodes WHERE name = ?1", values![name])?;
            Ok(())
        })?;
        self.notify_jobs_changed();
        Ok(())
    }

    pub fn list_nodes(&self) -> Result<Vec<Node>> {
        self.read("list nodes", |transaction| Ok(all(transaction)?))
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

pub(crate) fn all(transaction: &mut Transaction) -> Result<Vec<Node>, Fault> {
    let sql = format!("SELECT {COLUMNS} FROM nodes ORDER BY name");
    transaction.rows(&sql, &[])?.iter().map(node).collect()
}

fn find(transaction: &mut Transaction, name: &str) -> Result<Option<Node>, Fault> {
    let sql = format!("SELECT {COLUMNS} FROM nodes WHERE name = ?1");
    transaction.row(&sql, values![name])?.as_ref().map(node).transpose()
}

/// Jobs whose process is recorded on a node.
fn running_on(transaction: &mut Transaction, name: &str) -> Result<Vec<JobId>, Fault> {
    let mut found = Vec::new();
    for row in transaction.rows("SELECT id, process FROM jobs WHERE state = 'running' ORDER BY id", &[])? {
        let process: crate::process::ProcessRef =
            serde_json::from_str(row.text(1)?).map_err(|error| Fault::row(1, error.to_string()))?;
        if process.node == name {
            found.push(JobId(row.int(0)?));
        }
    }
    Ok(found)
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
    let bytes = |column| Ok::<_, Fault>(u64::try_from(row.int(column)?).unwrap_or(0));
    let spec = NodeSpec {
        name: row.text(0)?.to_owned(),
        machine: row.text(8)?.to_owned(),
        cores: row.u32(2)?,
        memory_bytes: bytes(3)?,
        accelerators: row.u32(5)?,
        disk_bytes: bytes(6)?,
        jobs_max: row.u32(7)?,
    };
    let load = row.text_or_null(9)?.map(serde_json::from_str).transpose();
    let load = load.map_err(|error| Fault::row(9, error.to_string()))?.unwrap_or_default();
    Ok(Node { spec, mode: mode(1, row.text(1)?)?, seen_at: UnixMs(row.int(4)?), load })
}
