//! Amounts of what a node has and a job needs.

use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::nodes::Node;
use crate::projects::Project;

/// More than any cluster has; sums of a thousand of them fit into 64 bits.
const UNBOUNDED: i64 = i64::MAX >> 12;

/// Amounts; below zero where more is held than there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) cores: i64,
    pub(crate) memory_bytes: i64,
    pub(crate) accelerators: i64,
    /// Jobs beside each other, services aside.
    pub(crate) jobs: i64,
}

impl Room {
    pub(crate) const UNBOUNDED: Room =
        Room { cores: UNBOUNDED, memory_bytes: UNBOUNDED, accelerators: UNBOUNDED, jobs: UNBOUNDED };

    /// What `ranks` ranks of a job ask of one node.
    pub(crate) fn asked(spec: &JobSpec, ranks: u32) -> Room {
        let needs = &spec.needs;
        let one = Room {
            cores: needs.cores.into(),
            memory_bytes: amount(needs.memory_bytes),
            accelerators: needs.accelerators.into(),
            jobs: 0,
        };
        Room { jobs: i64::from(!spec.is_service()), ..one.times(ranks.into()) }
    }

    fn fields(&self) -> [(&'static str, i64); 4] {
        [
            ("cores", self.cores),
            ("memory_bytes", self.memory_bytes),
            ("accelerators", self.accelerators),
            ("jobs", self.jobs),
        ]
    }

    fn map(&self, other: &Room, f: impl Fn(i64, i64) -> i64) -> Room {
        Room {
            cores: f(self.cores, other.cores),
            memory_bytes: f(self.memory_bytes, other.memory_bytes),
            accelerators: f(self.accelerators, other.accelerators),
            jobs: f(self.jobs, other.jobs),
        }
    }

    pub(crate) fn plus(&self, other: &Room) -> Room {
        self.map(other, i64::saturating_add)
    }

    pub(crate) fn times(&self, n: i64) -> Room {
        self.map(self, |amount, _| amount.saturating_mul(n))
    }

    /// The first field of which more is asked than is here.
    pub(crate) fn lacks(&self, asked: &Room) -> Option<&'static str> {
        let pairs = self.fields().into_iter().zip(asked.fields());
        pairs
            .into_iter()
            .find(|((_, here), (_, asked))| *asked > 0 && asked > here)
            .map(|((name, _), _)| name)
    }

    /// How often `asked` is here.
    fn holds(&self, asked: &Room) -> i64 {
        let pairs = self.fields().into_iter().zip(asked.fields());
        let of_each = pairs.filter(|(_, (_, asked))| *asked > 0).map(|((_, here), (_, asked))| here / asked);
        of_each.min().unwrap_or(UNBOUNDED)
    }

    /// The sum of each field's share of `whole`.
    pub(crate) fn share_of(&self, whole: &Room) -> f64 {
        let pairs = self.fields().into_iter().zip(whole.fields());
        pairs
            .filter(|(_, (_, whole))| *whole > 0)
            .map(|((_, part), (_, whole))| part as f64 / whole as f64)
            .sum()
    }
}

/// Bytes as a signed amount.
pub(crate) fn amount(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX).min(UNBOUNDED)
}

/// Refuses what could never run, with the most that could. Without any node nothing is known, and nothing refused.
pub(crate) fn check_exists(spec: &JobSpec, nodes: &[Node], projects: &[Project]) -> Result<()> {
    let rooms: Vec<Room> = nodes.iter().map(|node| node.spec.room()).collect();
    let n_ranks = spec.needs.n_ranks();
    if let Some(project) = projects.iter().find(|project| project.name == spec.project) {
        let (quota, asked) = (project.quota.room(), Room::asked(spec, n_ranks));
        if let Some((field, asked)) = field_of(quota.lacks(&asked), &asked) {
            let at_most = field_of(Some(field), &quota).map_or(0, |(_, most)| most);
            return beyond(field, asked, at_most, &format!("the quota of project {}", project.name));
        }
    }
    if rooms.is_empty() {
        return Ok(());
    }
    check_one_fits(spec, &rooms)?;
    let fits = |n_ranks: u32| {
        (1..=n_ranks).filter(|n| n_ranks.is_multiple_of(*n)).any(|n_nodes| {
            let each = Room { jobs: 0, ..Room::asked(spec, n_ranks / n_nodes) };
            rooms.iter().filter(|room| room.lacks(&each).is_none()).count() >= n_nodes as usize
        })
    };
    match (1..=n_ranks).rev().find(|n| fits(*n)) {
        Some(most) if most == n_ranks => Ok(()),
        most => beyond("ranks", n_ranks.into(), most.unwrap_or(0).into(), "the cluster"),
    }
}

/// The same where ranks need not be divided evenly.
pub(crate) fn check_fits(spec: &JobSpec, rooms: &[Room]) -> Result<()> {
    if rooms.is_empty() {
        return Ok(());
    }
    check_one_fits(spec, rooms)?;
    let one = Room { jobs: 0, ..Room::asked(spec, 1) };
    let (n_ranks, most) = (spec.needs.n_ranks().into(), rooms.iter().map(|room| room.holds(&one)).sum());
    if most < n_ranks { beyond("ranks", n_ranks, most, "the cluster") } else { Ok(()) }
}

/// One rank fits somewhere.
fn check_one_fits(spec: &JobSpec, rooms: &[Room]) -> Result<()> {
    let one = Room { jobs: 0, ..Room::asked(spec, 1) };
    if rooms.iter().any(|room| room.lacks(&one).is_none()) {
        return Ok(());
    }
    for (field, asked) in one.fields() {
        // The most of this field on nodes that have enough of the others.
        let others = without(&one, field);
        let fitting = rooms.iter().filter(|room| room.lacks(&others).is_none());
        let most = fitting.filter_map(|room| field_of(Some(field), room)).map(|(_, most)| most).max();
        if let Some(most) = most.filter(|most| *most < asked) {
            return beyond(field, asked, most, "a node that has the rest");
        }
    }
    // Too much of several fields at once: the first that no node has.
    let most = rooms.iter().fold(Room::default(), |most, room| most.map(room, i64::max));
    let field = field_of(most.lacks(&one), &one).unwrap_or(("cores", one.cores));
    let at_most = field_of(Some(field.0), &most).map_or(0, |(_, most)| most);
    beyond(field.0, field.1, at_most, "any node")
}

fn beyond(field: &'static str, asked: i64, at_most: i64, whose: &str) -> Result<()> {
    let (asked, at_most) = (asked.unsigned_abs(), at_most.max(0).unsigned_abs());
    Err(Error::Beyond { field, asked, at_most, whose: whose.to_owned() })
}

fn field_of(name: Option<&'static str>, room: &Room) -> Option<(&'static str, i64)> {
    room.fields().into_iter().find(|(field, _)| Some(*field) == name)
}

fn without(room: &Room, field: &str) -> Room {
    let keep = |name: &str, amount| if name == field { 0 } else { amount };
    Room {
        cores: keep("cores", room.cores),
        memory_bytes: keep("memory_bytes", room.memory_bytes),
        accelerators: keep("accelerators", room.accelerators),
        jobs: keep("jobs", room.jobs),
    }
}
