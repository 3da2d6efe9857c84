//! The table of jobs. What users ask for is written freely; what the reconciler saw and did is written under its lease, and
//! only if the job is still as the reconciler knew it.

use std::path::Path;

use crate::clock::UnixMs;
use crate::database::{Control, Stop};
use crate::error::{Error, Result};
use crate::job::{Desired, Ending, Job, JobId, JobSpec, JobState, Submitted};
use crate::leases::Lease;
use crate::log;
use crate::process::ProcessRef;
use crate::sql::{Fault, Row, Transaction, values};

/// Jobs that are not over at once.
const UNFINISHED_MAX: usize = 1_000;

/// The most a log tail returns.
const LOG_TAIL_BYTES_MAX: usize = 16 << 20;

const COLUMNS: &str = "id, spec, desired, state, n_starts, n_failures, n_short, process, ending, message, log_path, \
                       created_ms, started_ms, finished_ms, retry_ms, stop_ms";

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

/// All jobs at one instant, as the reconciler needs them.
pub(crate) struct Survey {
    /// Every job that is not over, oldest first.
    pub(crate) unfinished: Vec<Job>,
    /// How many jobs there are in each state.
    pub(crate) counts: [(JobState, usize); 6],
}

impl Control {
    /// Asks for a job. While a job of that name is not over, the same submission again returns it, and another one is
    /// refused with [`Error::JobConflict`].
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
        self.read("survey jobs", |transaction| {
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
            let unfinished = transaction.rows(&sql, &[])?.iter().map(job).collect::<Result<_, _>>()?;
            Ok(Survey { unfinished, counts })
        })
    }

    /// The job's process exists and may be let go. `false`, and nothing is changed, when the job must not start any more.
    pub(crate) fn record_started(
        &self,
        lease: &Lease,
        id: JobId,
        process: &ProcessRef,
        log_path: Option<&Path>,
    ) -> Result<bool> {
        let now = self.now();
        self.fenced(lease, "record a job's start", |transaction| {
            let log_path = log_path.map(Path::to_string_lossy);
            let n_changed = transaction.execute(
                "UPDATE jobs
                 SET state = 'running', process = ?2, log_path = ?3, n_starts = n_starts + 1, started_ms = ?4,
                     retry_ms = NULL, stop_ms = NULL, ending = NULL
                 WHERE id = ?1 AND desired = 'running' AND state IN ('pending', 'interrupted')",
                values![id.0, &json(process), log_path.as_deref(), now.0],
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
        let finished_at = end.state.is_over().then(|| self.now());
        self.fenced(lease, "record a job's end", |transaction| {
            let (process, ending) = (process.map(json), end.ending.as_ref().map(json));
            let n_changed = transaction.execute(
                "UPDATE jobs
                 SET state = ?3, process = NULL, stop_ms = NULL, ending = coalesce(?4, ending), message = ?5,
                     n_failures = ?6, n_short = ?7, retry_ms = ?8, finished_ms = ?9
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
    let id = transaction.number(
        "INSERT INTO jobs (name, spec, desired, state, created_ms)
         VALUES (?1, ?2, 'running', 'pending', ?3) RETURNING id",
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
