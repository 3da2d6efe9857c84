//! The tables of deployments and replicas: which models other processes serve, how many of them there should be, and where
//! they are. What people ask for is written freely; what the deployer decides is written under its lease.

use crate::clock::UnixMs;
use crate::database::{Control, Stop};
use crate::error::{Error, Result};
use crate::job::{JobId, JobSpec, Needs};
use crate::jobs;
use crate::leases::Lease;
use crate::models::check_name;
use crate::nodes;
use crate::projects;
use crate::room::check_exists;
use crate::sql::{Fault, Row, Transaction, values};

/// Replicas of one model.
pub const REPLICAS_MAX: u32 = 64;

/// Models with replicas, and replicas in all.
const DEPLOYMENTS_MAX: usize = 1_000;
const ALL_REPLICAS_MAX: usize = 10_000;

const COLUMNS: &str = "model, n_replicas, n_min, n_max, live, canary, canary_percent, args, message, created_ms, changed_ms, needs";

/// How one model is to be served by replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deployment {
    pub model: String,
    /// Wanted now; scaling moves it between `n_min` and `n_max`.
    pub n_replicas: u32,
    pub n_min: u32,
    pub n_max: u32,
    /// The source that is served: a path, or a bundle of the store.
    pub live: String,
    pub canary: Option<Canary>,
    /// More of the command line of `loquat serve`.
    pub args: Vec<String>,
    /// Of each replica.
    pub needs: Needs,
    /// The last decision, in words.
    pub message: Option<String>,
    pub created_at: UnixMs,
    /// When the number of replicas, the live version or the canary was last changed.
    pub changed_at: UnixMs,
}

/// A version on trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    pub source: String,
    /// Share of the requests, 1 to 99.
    pub percent: u32,
}

/// What a person asks for; fields left out stay as they are.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    pub n_replicas: Option<u32>,
    pub n_min: Option<u32>,
    pub n_max: Option<u32>,
    /// A source other than the live one replaces it, replica by replica.
    pub source: Option<String>,
    pub args: Option<Vec<String>>,
    pub needs: Option<Needs>,
}

/// A process that serves a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    pub name: String,
    pub model: String,
    pub version: String,
    pub url: String,
    /// Started by a job of ours; otherwise somebody else's engine.
    pub own: bool,
    /// What somebody else's engine wants to hear.
    pub key: Option<String>,
    pub draining: bool,
    pub seen_at: UnixMs,
}

impl Control {
    /// Makes `model` one that replicas serve, or changes how.
    pub fn deploy(&self, model: &str, ask: &Ask) -> Result<Deployment> {
        let now = self.now();
        self.write("deploy a model", |transaction| deploy(transaction, model, ask, now))
    }

    pub fn list_deployments(&self) -> Result<Vec<Deployment>> {
        self.read("list deployments", |transaction| {
            let sql = format!("SELECT {COLUMNS} FROM deployments ORDER BY model");
            Ok(transaction.rows(&sql, &[])?.iter().map(deployment).collect::<Result<_, _>>()?)
        })
    }

    pub fn get_deployment(&self, model: &str) -> Result<Option<Deployment>> {
        self.read("read a deployment", |transaction| Ok(find(transaction, model)?))
    }

    /// Forgets how a model is to be served. Its replicas are stopped by the deployer; engines elsewhere are forgotten now.
    pub fn undeploy(&self, model: &str) -> Result<bool> {
        self.write("remove a deployment", |transaction| {
            transaction.execute("DELETE FROM replicas WHERE model = ?1 AND own = 0", values![model])?;
            Ok(transaction.execute("DELETE FROM deployments WHERE model = ?1", values![model])? == 1)
        })
    }

    /// Puts `source` on trial with a share of the model's requests.
    pub fn start_canary(&self, model: &str, source: &str, percent: u32) -> Result<Deployment> {
        let (now, canary) = (self.now(), Canary { source: source.to_owned(), percent });
        self.write("start a canary", |transaction| start_canary(transaction, model, canary, now))
    }

    /// A person ends the trial of a model, whatever is on trial; returns what was done, in words.
    pub fn end_trial(&self, model: &str, promote: bool) -> Result<String> {
        let no_trial = || Error::NoTrial { model: model.to_owned() };
        let found = self.get_deployment(model)?.ok_or(Error::NoDeployment { model: model.to_owned() })?;
        let source = found.canary.ok_or_else(no_trial)?.source;
        let message = format!("{source} was {} by hand", if promote { "promoted" } else { "rolled back" });
        match self.end_canary(model, &source, promote, &message)? {
            true => Ok(message),
            false => Err(no_trial()),
        }
    }

    /// Ends the trial of `source`: it becomes live, or it goes. `false` when it was not on trial any more.
    pub fn end_canary(&self, model: &str, source: &str, promote: bool, message: &str) -> Result<bool> {
        let now = self.now();
        self.write("end a canary", |transaction| {
            end_canary(transaction, model, source, (promote, message), now)
        })
    }

    /// The deployer changes how many replicas there should be, if there should still be `from`.
    pub fn record_scale(&self, lease: &Lease, model: &str, from: u32, to: u32, why: &str) -> Result<bool> {
        let now = self.now();
        self.fenced(lease, "scale a deployment", |transaction| {
            let n_changed = transaction.execute(
                "UPDATE deployments SET n_replicas = ?3, message = ?4, changed_ms = ?5
                 WHERE model = ?1 AND n_replicas = ?2 AND n_min <= ?3 AND n_max >= ?3",
                values![model, from, to, why, now.0],
            )?;
            Ok(n_changed == 1)
        })
    }

    /// The deployer starts a replica: a job like any other.
    pub fn start_replica(&self, lease: &Lease, spec: &JobSpec) -> Result<JobId> {
        spec.check()?;
        let now = self.now();
        let submitted =
            self.fenced(lease, "start a replica", |transaction| jobs::submit(transaction, spec, now))?;
        self.notify_jobs_changed();
        Ok(submitted.job.id)
    }

    /// From now on the replica gets no new requests.
    pub fn drain_replica(&self, lease: &Lease, name: &str) -> Result<()> {
        self.fenced(lease, "drain a replica", |transaction| {
            transaction.execute("UPDATE replicas SET draining = 1 WHERE name = ?1", values![name])?;
            Ok(())
        })
    }

    /// The replica's process is asked to go; it finishes what it has.
    pub fn stop_replica(&self, lease: &Lease, job: JobId) -> Result<()> {
        self.fenced(lease, "stop a replica", |transaction| jobs::cancel(transaction, job))?;
        self.notify_jobs_changed();
        Ok(())
    }

    /// Replicas whose job is over are forgotten.
    pub fn forget_replicas(&self, lease: &Lease) -> Result<usize> {
        self.fenced(lease, "forget replicas", |transaction| {
            Ok(transaction.execute(
                "DELETE FROM replicas WHERE own = 1 AND NOT EXISTS (
                     SELECT 1 FROM jobs WHERE jobs.name = replicas.name
                     AND jobs.state IN ('pending', 'running', 'interrupted'))",
                &[],
            )?)
        })
    }

    /// A replica says where it is. One that says so again, after a restart, takes requests again.
    pub fn put_replica(&self, replica: &Replica) -> Result<()> {
        check_name("replica name", &replica.name)?;
        check_name("model name", &replica.model)?;
        if !is_address(&replica.url) || replica.url.len() > 512 {
            let why = format!(
                "{:?} is no http:// or https:// address",
                replica.url.chars().take(60).collect::<String>()
            );
            return Err(Error::Invalid { what: "replica address", why });
        }
        self.write("put a replica", |transaction| {
            let n = transaction.number("SELECT count(*) FROM replicas", &[])?;
            if usize::try_from(n).is_ok_and(|n| n >= ALL_REPLICAS_MAX) {
                return Err(Error::TooMany { what: "replicas", max: ALL_REPLICAS_MAX }.into());
            }
            transaction.execute(
                "INSERT INTO replicas (name, model, version, url, own, key, draining, seen_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0, ?7)
                 ON CONFLICT (name) DO UPDATE
                 SET model = excluded.model, version = excluded.version, url = excluded.url, own = excluded.own,
                     key = excluded.key, draining = 0, seen_ms = excluded.seen_ms",
                values![
                    &replica.name,
                    &replica.model,
                    &replica.version,
                    &replica.url,
                    u32::from(replica.own),
                    replica.key.as_ref(),
                    replica.seen_at.0,
                ],
            )?;
            Ok(())
        })
    }

    /// The replica is gone. `false` when it was not known.
    pub fn remove_replica(&self, name: &str) -> Result<bool> {
        self.write("remove a replica", |transaction| {
            Ok(transaction.execute("DELETE FROM replicas WHERE name = ?1", values![name])? == 1)
        })
    }

    pub fn list_replicas(&self) -> Result<Vec<Replica>> {
        self.read("list replicas", |transaction| {
            let sql =
                "SELECT name, model, version, url, own, key, draining, seen_ms FROM replicas ORDER BY name";
            Ok(transaction.rows(sql, &[])?.iter().map(replica).collect::<Result<_, _>>()?)
        })
    }
}

/// A deployment, inside of a transaction.
pub(crate) fn deploy(
    transaction: &mut Transaction,
    model: &str,
    ask: &Ask,
    now: UnixMs,
) -> Result<Deployment, Stop> {
    check_name("model name", model)?;
    let found = find(transaction, model)?;
    if found.is_none() {
        let n = transaction.number("SELECT count(*) FROM deployments", &[])?;
        if usize::try_from(n).is_ok_and(|n| n >= DEPLOYMENTS_MAX) {
            return Err(Error::TooMany { what: "deployments", max: DEPLOYMENTS_MAX }.into());
        }
    }
    let wanted = changed(found, model, ask, now)?;
    let replica = JobSpec { needs: wanted.needs, max_restarts: u32::MAX, ..JobSpec::default() };
    check_exists(&replica, &nodes::all(transaction)?, &projects::all(transaction)?)?;
    put(transaction, &wanted)?;
    Ok(wanted)
}

/// A trial begins, inside of a transaction.
pub(crate) fn start_canary(
    transaction: &mut Transaction,
    model: &str,
    canary: Canary,
    now: UnixMs,
) -> Result<Deployment, Stop> {
    let invalid = |why: String| Stop::Refused(Error::Invalid { what: "canary", why });
    let Canary { source, percent } = &canary;
    if !(1..=99).contains(percent) {
        return Err(invalid("its share must be 1 to 99 percent".to_owned()));
    }
    let found = find(transaction, model)?;
    let mut wanted = found.ok_or(Error::NoDeployment { model: model.to_owned() })?;
    if wanted.live == *source {
        return Err(invalid(format!("{source} is live already")));
    }
    check_source(source)?;
    wanted.message = Some(format!("{source} on trial with {percent} % of the requests"));
    wanted.canary = Some(canary);
    wanted.changed_at = now;
    put(transaction, &wanted)?;
    Ok(wanted)
}

/// A trial ends, inside of a transaction.
pub(crate) fn end_canary(
    transaction: &mut Transaction,
    model: &str,
    source: &str,
    (promote, message): (bool, &str),
    now: UnixMs,
) -> Result<bool, Stop> {
    let Some(mut wanted) = find(transaction, model)? else { return Ok(false) };
    match wanted.canary.take() {
        Some(canary) if canary.source == source => {}
        _ => return Ok(false),
    }
    if promote {
        wanted.live = source.to_owned();
    } else {
        // No gateway asks it any more, whoever runs it.
        let of_it = values![model, source];
        transaction.execute("DELETE FROM replicas WHERE model = ?1 AND version = ?2 AND own = 0", of_it)?;
        transaction.execute("UPDATE replicas SET draining = 1 WHERE model = ?1 AND version = ?2", of_it)?;
    }
    wanted.message = Some(message.to_owned());
    wanted.changed_at = now;
    put(transaction, &wanted)?;
    Ok(true)
}

fn check_source(source: &str) -> Result<()> {
    if source.is_empty() || source.len() > 4096 || source.contains('\0') {
        let why = "it must have 1 to 4096 bytes and no zero byte".to_owned();
        return Err(Error::Invalid { what: "model source", why });
    }
    Ok(())
}

/// The deployment after what was asked, or why it cannot be.
fn changed(found: Option<Deployment>, model: &str, ask: &Ask, now: UnixMs) -> Result<Deployment> {
    let invalid = |why: String| Error::Invalid { what: "deployment", why };
    let mut wanted = match (found, &ask.source) {
        (Some(found), _) => found,
        (None, Some(source)) => Deployment {
            model: model.to_owned(),
            n_replicas: 1,
            n_min: 1,
            n_max: 1,
            live: source.clone(),
            canary: None,
            args: Vec::new(),
            needs: Needs::default(),
            message: None,
            created_at: now,
            changed_at: now,
        },
        (None, None) => return Err(invalid(format!("{model} is new and has no source"))),
    };
    if let Some(n) = ask.n_replicas {
        (wanted.n_min, wanted.n_max) = (n, n);
    }
    wanted.n_min = ask.n_min.unwrap_or(wanted.n_min);
    wanted.n_max = ask.n_max.unwrap_or(wanted.n_max);
    if wanted.n_max > REPLICAS_MAX {
        return Err(invalid(format!("{} replicas are more than {REPLICAS_MAX}", wanted.n_max)));
    }
    if wanted.n_min > wanted.n_max {
        return Err(invalid(format!("at least {} and at most {} replicas", wanted.n_min, wanted.n_max)));
    }
    wanted.n_replicas = wanted.n_replicas.clamp(wanted.n_min, wanted.n_max);
    if let Some(source) = &ask.source {
        check_source(source)?;
        wanted.live.clone_from(source);
        // What was on trial was compared with another version.
        wanted.canary = None;
    }
    if let Some(args) = &ask.args {
        wanted.args.clone_from(args);
    }
    wanted.needs = ask.needs.unwrap_or(wanted.needs);
    wanted.changed_at = now;
    Ok(wanted)
}

fn put(transaction: &mut Transaction, wanted: &Deployment) -> Result<(), Stop> {
    let args = serde_json::to_string(&wanted.args).expect("a list of texts has a JSON form");
    let needs = serde_json::to_string(&wanted.needs).expect("numbers have a JSON form");
    let (canary, percent) = match &wanted.canary {
        Some(canary) => (Some(&canary.source), canary.percent),
        None => (None, 0),
    };
    transaction.execute(
        "INSERT INTO deployments (model, n_replicas, n_min, n_max, live, canary, canary_percent, args, message,
                                  created_ms, changed_ms, needs)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
         ON CONFLICT (model) DO UPDATE
         SET n_replicas = excluded.n_replicas, n_min = excluded.n_min, n_max = excluded.n_max,
             live = excluded.live, canary = excluded.canary, canary_percent = excluded.canary_percent,
             args = excluded.args, needs = excluded.needs, message = excluded.message, changed_ms = excluded.changed_ms",
        values![
            &wanted.model,
            wanted.n_replicas,
            wanted.n_min,
            wanted.n_max,
            &wanted.live,
            canary,
            percent,
            &args,
            wanted.message.as_ref(),
            wanted.created_at.0,
            wanted.changed_at.0,
            &needs,
        ],
    )?;
    Ok(())
}

pub(crate) fn find(transaction: &mut Transaction, model: &str) -> Result<Option<Deployment>, Fault> {
    let sql = format!("SELECT {COLUMNS} FROM deployments WHERE model = ?1");
    transaction.row(&sql, values![model])?.as_ref().map(deployment).transpose()
}

fn deployment(row: &Row) -> Result<Deployment, Fault> {
    let needs = row.text_or_null(11)?.map(serde_json::from_str).transpose();
    let canary = match row.text_or_null(5)? {
        Some(source) => Some(Canary { source: source.to_owned(), percent: row.u32(6)? }),
        None => None,
    };
    Ok(Deployment {
        model: row.text(0)?.to_owned(),
        n_replicas: row.u32(1)?,
        n_min: row.u32(2)?,
        n_max: row.u32(3)?,
        live: row.text(4)?.to_owned(),
        canary,
        args: serde_json::from_str(row.text(7)?).map_err(|error| Fault::row(7, error.to_string()))?,
        message: row.text_or_null(8)?.map(str::to_owned),
        created_at: UnixMs(row.int(9)?),
        changed_at: UnixMs(row.int(10)?),
        needs: needs.map_err(|error| Fault::row(11, error.to_string()))?.unwrap_or_default(),
    })
}

fn replica(row: &Row) -> Result<Replica, Fault> {
    Ok(Replica {
        name: row.text(0)?.to_owned(),
        model: row.text(1)?.to_owned(),
        version: row.text(2)?.to_owned(),
        url: row.text(3)?.to_owned(),
        own: row.int(4)? == 1,
        key: row.text_or_null(5)?.map(str::to_owned),
        draining: row.int(6)? == 1,
        seen_at: UnixMs(row.int(7)?),
    })
}

/// Whether a source is an engine's address, not a model that replicas of ours can load.
pub fn is_address(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}
