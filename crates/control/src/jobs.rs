//! The table of jobs. What users ask for is written freely; what the reconciler saw and did is written under its lease, and
//! only if the job is still as the reconciler knew it.

use std::collections::BTreeMap;
use std::path::Path;

use crate::clock::UnixMs;
use crate::database::{Control, Stop};
use crate::error::{Error, Result};
use crate::job::{Desired, Ending, Job, JobId, JobSpec, JobState, Submitted};
use crate::leases::Lease;
use crate::log;
use crate::nodes::{self, Node};
use crate::place::{Cluster, Placement, Share, Wait, place};
use crate::process::ProcessRef;
use crate::projects::{self, Project};
use crate::reconcile::Policy;
use crate::room::check_exists;
use crate::sql::{Fault, Row, Transaction, values};

/// Jobs that are not over at once.
const UNFINISHED_MAX: usize = 1_000;

/// The most a log tail returns.
const LOG_TAIL_BYTES_MAX: usize = 16 << 20;

const COLUMNS: &str = "id, spec, desired, state, n_starts, n_failures, n_short, process, ending, message, log_path, \
                       created_ms, started_ms, finished_ms, retry_ms, stop_ms, waiting_ms, placed";

/// The end of a job's process, or of the job, as the reconciler decided it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Any state but `Running`.
    pub state: JobState,
    pub ending: Option<Ending>,
    pub message: Option<String>,
    pub n_failures: u32,
    pub n_short: u32,
    pub retry_at: Option<UnixMs>,
}

/// A start as it was decided and prepared.
#[derive(Clone, Copy)]
pub(crate) struct Start<'a> {
    pub(crate) id: JobId,
    /// Who starts it, where there are nodes.
    pub(crate) node: Option<&'a str>,
    pub(crate) shares: &'a [Share],
    pub(crate) process: &'a ProcessRef,
    pub(crate) log_path: Option<&'a Path>,
}

/// The cluster at one instant, as the reconciler needs it.
pub(crate) struct Survey {
    /// Every job that is not over, oldest first.
    pub(crate) unfinished: Vec<Job>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) projects: Vec<Project>,
    /// By the clock that nodes go by when they say that they are there.
    pub(crate) now: UnixMs,
    /// How many jobs there are in each state.
    pub(crate) counts: [(JobState, usize); 6],
}

impl Survey {
    /// What is to start where: on the nodes there are, or for a controller that has none, on whatever its launcher finds.
    pub(crate) fn placement(&self, node: Option<&str>, policy: &Policy) -> Placement {
        let anywhere = [Node::anywhere(policy.max_running, self.now)];
        let nodes = if node.is_some() { &self.nodes[..] } else { &anywhere };
        let Survey { unfinished: jobs, projects, now, .. } = self;
        place(&Cluster { jobs, nodes, projects, now: *now }, policy)
    }
}

impl Control {
    /// Asks for a job. While a job of that name is not over, the same submission again returns it, and another one is
    /// refused with [`Error::JobConflict`]. One that asks for more than there is is refused with [`Error::Beyond`].
    pub fn submit(&self, spec: &JobSpec) -> Result<Submitted> {
        spec.check()?;
        let now = self.now();
        let submitted = self.write("submit a job", |transaction| submit(transaction, spec, now))?;
        self.notify_jobs_changed();
        Ok(submitted)
    }

    pub fn get_job(&self, id: JobId) -> Result<Option<Job>> {
        self.read("read a job", |transaction| Ok(find(transaction, id)?))
    }

    /// The last `limit` jobs, newest first.
    pub fn list_jobs(&self, limit: usize) -> Result<Vec<Job>> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.read("list jobs", |transaction| {
            let sql = format!("SELECT {COLUMNS} FROM jobs ORDER BY id DESC LIMIT ?1");
            Ok(transaction.rows(&sql, values![limit])?.iter().map(job).collect::<Result<_, _>>()?)
        })
    }

    /// All jobs that are not over, oldest first.
    pub fn unfinished_jobs(&self) -> Result<Vec<Job>> {
        Ok(self.survey_jobs()?.unfinished)
    }

    /// Why the jobs that wait do.
    pub fn waiting(&self) -> Result<BTreeMap<JobId, Wait>> {
        let survey = self.survey_jobs()?;
        let node = survey.nodes.first().map(|node| node.spec.name.clone());
        Ok(survey.placement(node.as_deref(), &Policy::default()).waits)
    }

    /// The newest job of that name or id.
    pub fn find_job(&self, name: &str) -> Result<Option<Job>> {
        let id = name.strip_prefix("job-").and_then(|id| id.parse::<i64>().ok()).unwrap_or(-1);
        self.read("find a job", |transaction| {
            let sql = format!(
                "SELECT {COLUMNS} FROM jobs WHERE id = ?1 OR name = ?2 ORDER BY id = ?1 DESC, id DESC LIMIT 1"
            );
            Ok(transaction.row(&sql, values![id, name])?.as_ref().map(job).transpose()?)
        })
    }

    /// Runs a job that is over again, as a new one.
    pub fn retry_job(&self, id: JobId) -> Result<Job> {
        let job = self.get_job(id)?.ok_or(Error::NoJob(id))?;
        if !job.state.is_over() {
            return Err(Error::JobNotOver { id, state: job.state.as_str() });
        }
        Ok(self.submit(&job.spec)?.job)
    }

    /// What a job has written from `from` on, at most `bytes_max` of it, and where to go on. Without `from`, or where the
    /// log has been cut since, the end of it.
    pub fn job_log_from(&self, job: &Job, from: Option<u64>, bytes_max: usize) -> Result<(Vec<u8>, u64)> {
        match &job.log_path {
            Some(path) => log::from(path, from, bytes_max.min(LOG_TAIL_BYTES_MAX)),
            None => Ok((Vec::new(), 0)),
        }
    }

    /// Asks for a job to end. Its process is stopped by the reconciler; a job that is over stays as it is.
    pub fn cancel_job(&self, id: JobId) -> Result<Job> {
        let job = self.write("cancel a job", |transaction| cancel(transaction, id))?;
        self.notify_jobs_changed();
        Ok(job)
    }

    /// Forgets a job that is over, and its log.
    pub fn delete_job(&self, id: JobId) -> Result<()> {
        let job = self.write("delete a job", |transaction| {
            let job = by_id(transaction, id)?;
            if !job.state.is_over() {
                return Err(Stop::Refused(Error::JobUnfinished(id)));
            }
            transaction.execute("DELETE FROM jobs WHERE id = ?1", values![id.0])?;
            Ok(job)
        })?;
        job.log_path.map_or(Ok(()), |path| log::remove(&path))
    }

    /// The end of what a job wrote, all attempts together: at most `bytes_max` bytes (and 16 MiB), from the start of a line.
    /// Bytes that are not UTF-8 are replaced.
    pub fn job_log_tail(&self, id: JobId, bytes_max: usize) -> Result<String> {
        let job = self.get_job(id)?.ok_or(Error::NoJob(id))?;
        let Some(path) = job.log_path else {
            return Ok(String::new());
        };
        log::tail(&path, bytes_max.min(LOG_TAIL_BYTES_MAX))
    }

    pub(crate) fn survey_jobs(&self) -> Result<Survey> {
        self.read("survey jobs", |transaction| Ok(self.survey(transaction)?))
    }

    fn survey(&self, transaction: &mut Transaction) -> Result<Survey, Fault> {
        let mut counts = JobState::ALL.map(|state| (state, 0));
        for row in transaction.rows("SELECT count(*), state FROM jobs GROUP BY state", &[])? {
            let found = state(1, row.text(1)?)?;
            let n_jobs = usize::try_from(row.int(0)?).unwrap_or(0);
            for (_, n) in counts.iter_mut().filter(|(state, _)| *state == found) {
                *n = n_jobs;
            }
        }
        let sql = format!(
            "SELECT {COLUMNS} FROM jobs WHERE state IN ('pending', 'running', 'interrupted') ORDER BY id"
        );
        Ok(Survey {
            unfinished: transaction.rows(&sql, &[])?.iter().map(job).collect::<Result<_, _>>()?,
            nodes: nodes::all(transaction)?,
            projects: projects::all(transaction)?,
            now: self.lease_now(transaction)?,
            counts,
        })
    }

    /// The job's process exists and may be let go. `false`, and nothing is changed, when the job must not start any more:
    /// what is decided by the state that is written to is not what `start` was decided by.
    pub(crate) fn record_started(&self, lease: &Lease, start: &Start, policy: &Policy) -> Result<bool> {
        let now = self.now();
        self.fenced(lease, "record a job's start", |transaction| {
            let placement = self.survey(transaction)?.placement(start.node, policy);
            if placement.starts.get(&start.id).map(Vec::as_slice) != Some(start.shares) {
                return Ok(false);
            }
            let log_path = start.log_path.map(Path::to_string_lossy);
            let n_changed = transaction.execute(
                "UPDATE jobs
                 SET state = 'running', process = ?2, log_path = ?3, n_starts = n_starts + 1, started_ms = ?4,
                     retry_ms = NULL, stop_ms = NULL, ending = NULL, placed = ?5
                 WHERE id = ?1 AND desired = 'running' AND state IN ('pending', 'interrupted')",
                values![start.id.0, &json(start.process), log_path.as_deref(), now.0, &json(&start.shares),],
            )?;
            Ok(n_changed == 1)
        })
    }

    /// The process is about to be stopped; `asked_at` is set when it is asked, not when it is killed. `false` when it is
    /// not the job's process any more.
    pub(crate) fn record_stop(
        &self,
        lease: &Lease,
        id: JobId,
        process: &ProcessRef,
        asked_at: Option<UnixMs>,
    ) -> Result<bool> {
        self.fenced(lease, "record a job's stop", |transaction| {
            let n_changed = transaction.execute(
                "UPDATE jobs SET stop_ms = coalesce(?3, stop_ms) WHERE id = ?1 AND process = ?2",
                values![id.0, &json(process), asked_at.map(|at| at.0)],
            )?;
            Ok(n_changed == 1)
        })
    }

    /// The process (or, without one, the job) has ended. `false` when the job has another process, or is over.
    pub(crate) fn record_end(
        &self,
        lease: &Lease,
        id: JobId,
        process: Option<&ProcessRef>,
        end: &End,
    ) -> Result<bool> {
        let now = self.now();
        let finished_at = end.state.is_over().then_some(now);
        self.fenced(lease, "record a job's end", |transaction| {
            let (process, ending) = (process.map(json), end.ending.as_ref().map(json));
            let n_changed = transaction.execute(
                "UPDATE jobs
                 SET state = ?3, process = NULL, stop_ms = NULL, ending = coalesce(?4, ending), message = ?5,
                     n_failures = ?6, n_short = ?7, retry_ms = ?8, finished_ms = ?9, waiting_ms = ?10
                 WHERE id = ?1 AND process IS NOT DISTINCT FROM ?2
                       AND state IN ('pending', 'running', 'interrupted')",
                values![
                    id.0,
                    process.as_ref(),
                    end.state.as_str(),
                    ending.as_ref(),
                    end.message.as_ref(),
                    end.n_failures,
                    end.n_short,
                    end.retry_at.map(|at| at.0),
                    finished_at.map(|at| at.0),
                    now.0,
                ],
            )?;
            Ok(n_changed == 1)
        })
    }
}

/// A submission inside of a transaction.
pub(crate) fn submit(transaction: &mut Transaction, spec: &JobSpec, now: UnixMs) -> Result<Submitted, Stop> {
    if let Some(job) = unfinished_by_name(transaction, &spec.name)? {
        if job.spec != *spec {
            return Err(Stop::Refused(Error::JobConflict { name: spec.name.clone(), id: job.id }));
        }
        let created = false;
        return Ok(Submitted { job, created });
    }
    let n_unfinished = transaction
        .number("SELECT count(*) FROM jobs WHERE state IN ('pending', 'running', 'interrupted')", &[])?;
    if usize::try_from(n_unfinished).is_ok_and(|n| n >= UNFINISHED_MAX) {
        return Err(Stop::Refused(Error::TooMany { what: "unfinished jobs", max: UNFINISHED_MAX }));
    }
    check_exists(spec, &nodes::all(transaction)?, &projects::all(transaction)?)?;
    let id = transaction.number(
        "INSERT INTO jobs (name, spec, desired, state, created_ms, waiting_ms)
         VALUES (?1, ?2, 'running', 'pending', ?3, ?3) RETURNING id",
        values![&spec.name, &json(spec), now.0],
    )?;
    let job = by_id(transaction, JobId(id))?;
    Ok(Submitted { job, created: true })
}

/// A cancellation inside of a transaction.
pub(crate) fn cancel(transaction: &mut Transaction, id: JobId) -> Result<Job, Stop> {
    transaction.execute(
        "UPDATE jobs SET desired = 'cancelled'
         WHERE id = ?1 AND state IN ('pending', 'running', 'interrupted')",
        values![id.0],
    )?;
    by_id(transaction, id)
}

pub(crate) fn find(transaction: &mut Transaction, id: JobId) -> Result<Option<Job>, Fault> {
    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1");
    transaction.row(&sql, values![id.0])?.as_ref().map(job).transpose()
}

fn by_id(transaction: &mut Transaction, id: JobId) -> Result<Job, Stop> {
    find(transaction, id)?.ok_or(Stop::Refused(Error::NoJob(id)))
}

fn unfinished_by_name(transaction: &mut Transaction, name: &str) -> Result<Option<Job>, Fault> {
    let sql = format!(
        "SELECT {COLUMNS} FROM jobs WHERE name = ?1 AND state IN ('pending', 'running', 'interrupted')"
    );
    transaction.row(&sql, values![name])?.as_ref().map(job).transpose()
}

fn job(row: &Row) -> Result<Job, Fault> {
    let time = |column| Ok::<_, Fault>(row.int_or_null(column)?.map(UnixMs));
    Ok(Job {
        id: JobId(row.int(0)?),
        spec: parsed(row, 1)?.ok_or_else(|| Fault::unknown_word(1, "NULL"))?,
        desired: match row.text(2)? {
            "running" => Desired::Running,
            "cancelled" => Desired::Cancelled,
            other => return Err(Fault::unknown_word(2, other)),
        },
        state: state(3, row.text(3)?)?,
        n_starts: row.u32(4)?,
        n_failures: row.u32(5)?,
        n_short: row.u32(6)?,
        process: parsed(row, 7)?,
        ending: parsed(row, 8)?,
        message: row.text_or_null(9)?.map(str::to_owned),
        log_path: row.text_or_null(10)?.map(Into::into),
        created_at: UnixMs(row.int(11)?),
        waiting_at: time(16)?.unwrap_or(UnixMs(row.int(11)?)),
        placed: parsed(row, 17)?.unwrap_or_default(),
        started_at: time(12)?,
        finished_at: time(13)?,
        retry_at: time(14)?,
        stop_sent_at: time(15)?,
    })
}

fn state(column: usize, word: &str) -> Result<JobState, Fault> {
    let found = JobState::ALL.into_iter().find(|state| state.as_str() == word);
    found.ok_or_else(|| Fault::unknown_word(column, word))
}

fn parsed<T: serde::de::DeserializeOwned>(row: &Row, column: usize) -> Result<Option<T>, Fault> {
    let parse = |text| serde_json::from_str(text).map_err(|error| Fault::row(column, error.to_string()));
    row.text_or_null(column)?.map(parse).transpose()
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data has a JSON form")
}
