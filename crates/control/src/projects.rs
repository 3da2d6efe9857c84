//! The table of projects: what the jobs of each may use at once.

use crate::database::Control;
use crate::error::{Error, Result};
use crate::models::check_name;
use crate::room::{Room, amount};
use crate::sql::{Fault, Row, Transaction, values};

const PROJECTS_MAX: usize = 10_000;

/// The project of a job that names none.
pub const DEFAULT_PROJECT: &str = "default";

/// What the jobs of a project may use at once; `None` is as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    pub cores: Option<u32>,
    pub memory_bytes: Option<u64>,
    pub accelerators: Option<u32>,
    /// Jobs beside each other, services aside.
    pub jobs: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    pub name: String,
    pub quota: Quota,
}

impl Quota {
    pub(crate) fn room(&self) -> Room {
        let all = Room::UNBOUNDED;
        Room {
            cores: self.cores.map_or(all.cores, i64::from),
            memory_bytes: self.memory_bytes.map_or(all.memory_bytes, amount),
            accelerators: self.accelerators.map_or(all.accelerators, i64::from),
            jobs: self.jobs.map_or(all.jobs, i64::from),
        }
    }
}

impl Control {
    /// Sets what a project may use. What its jobs use already is left to them.
    pub fn put_project(&self, project: &Project) -> Result<()> {
        check_name("project name", &project.name)?;
        let Quota { cores, memory_bytes, accelerators, jobs } = project.quota;
        self.write("put a project", |transaction| {
            let n = transaction
                .number("SELECT count(*) FROM projects WHERE name <> ?1", values![&project.name])?;
            if usize::try_from(n).is_ok_and(|n| n >= PROJECTS_MAX) {
                return Err(Error::TooMany { what: "projects", max: PROJECTS_MAX }.into());
            }
            transaction.execute(
                "INSERT INTO projects (name, cores_max, memory_bytes_max, accelerators_max, jobs_max)
                 VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (name) DO UPDATE
                 SET cores_max = excluded.cores_max, memory_bytes_max = excluded.memory_bytes_max,
                     accelerators_max = excluded.accelerators_max, jobs_max = excluded.jobs_max",
                values![&project.name, cores, memory_bytes.map(amount), accelerators, jobs],
            )?;
            Ok(())
        })?;
        self.notify_jobs_changed();
        Ok(())
    }

    /// Projects with a quota, by name.
    pub fn list_projects(&self) -> Result<Vec<Project>> {
        self.read("list projects", |transaction| Ok(all(transaction)?))
    }

    /// Takes a project's quota away. `false` when it had none.
    pub fn delete_project(&self, name: &str) -> Result<bool> {
        let deleted = self.write("delete a project", |transaction| {
            Ok(transaction.execute("DELETE FROM projects WHERE name = ?1", values![name])? == 1)
        })?;
        self.notify_jobs_changed();
        Ok(deleted)
    }
}

pub(crate) fn all(transaction: &mut Transaction) -> Result<Vec<Project>, Fault> {
    let sql =
        "SELECT name, cores_max, memory_bytes_max, accelerators_max, jobs_max FROM projects ORDER BY name";
    transaction.rows(sql, &[])?.iter().map(project).collect()
}

fn project(row: &Row) -> Result<Project, Fault> {
    let small = |column| Ok::<_, Fault>(row.int_or_null(column)?.and_then(|n| u32::try_from(n).ok()));
    let quota = Quota {
        cores: small(1)?,
        memory_bytes: row.int_or_null(2)?.and_then(|n| u64::try_from(n).ok()),
        accelerators: small(3)?,
        jobs: small(4)?,
    };
    Ok(Project { name: row.text(0)?.to_owned(), quota })
}
