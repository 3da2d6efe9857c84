//! Placement: which job that waits starts where, and who makes room for it. Pure; a simulation runs it by the thousand.
//!
//! Every node works this out for itself from what the database says and obeys its own part; the write that records a start
//! works it out once more, so that two nodes which saw different states cannot give the same room away twice.
//!
//! **Order.** By priority, raised by one for every [`Policy::age`] of waiting, then by age. A job that runs keeps what it
//! has earned by waiting. **Gangs.** All ranks of a job or none, divided evenly over as few nodes as can take them.
//! **Packing.** The node that is left with least room. **Preemption.** Who asks by its own priority alone moves jobs that
//! stand below it, the lowest and newest first, and nobody who need not go; services stay. **No starvation.** Waiting
//! raises every job above any that comes later, also above those that could preempt it; and one that has waited for
//! [`Policy::hold_after`] holds room, which is not given to those behind it, until enough has become free.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMs;
use crate::job::{Desired, Job, JobId, JobSpec};
use crate::nodes::Node;
use crate::projects::Project;
use crate::reconcile::Policy;
use crate::room::Room;

/// Jobs that may ask others to go, in one look; the next look has the others.
const PREEMPTORS_MAX: usize = 8;

/// Ranks of a job on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    pub node: String,
    pub ranks: u32,
}

/// What is to happen, by job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The process is started on the first node.
    pub starts: BTreeMap<JobId, Vec<Share>>,
    /// These are asked to save and go on later.
    pub preempts: BTreeSet<JobId>,
    /// Everybody else without a process, and why.
    pub waits: BTreeMap<JobId, Wait>,
}

/// Why a job waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// After a failure.
    Pause(Duration),
    /// Its project uses what it may have.
    Quota { project: String, field: &'static str },
    /// No node has enough free of this; with "room", of all that it needs at once.
    Room { field: &'static str },
    /// There will be room for it when those have gone who were asked to, or have ended.
    Leaving,
    /// There is no node that may start something.
    NoNode,
}

impl std::fmt::Display for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pause(left) => write!(f, "pauses for {} s after a failure", left.as_secs() + 1),
            Self::Quota { project, field } => write!(f, "project {project} uses all {field} of its quota"),
            Self::Room { field } => write!(f, "not enough {field} free"),
            Self::Leaving => f.write_str("others save and make room for it"),
            Self::NoNode => f.write_str("no node is open"),
        }
    }
}

/// What can be known of the cluster at one instant.
#[derive(Clone, Copy, Debug)]
pub struct Cluster<'a> {
    /// Jobs that are not over.
    pub jobs: &'a [Job],
    pub nodes: &'a [Node],
    pub projects: &'a [Project],
    pub now: UnixMs,
}

/// Where the jobs that wait are to start, and which are to make room.
pub fn place(cluster: &Cluster, policy: &Policy) -> Placement {
    let mut placement = Placement::default();
    let mut board = Board::of(cluster);
    let mut queue = Vec::new();
    for job in cluster.jobs {
        match pause(job, cluster.now, policy) {
            _ if job.process.is_some() || job.desired == Desired::Cancelled => {}
            Some(left) => drop(placement.waits.insert(job.id, Wait::Pause(left))),
            None => queue.push(job),
        }
    }
    queue.sort_by_key(|job| (Reverse(rank(job, cluster.now, policy)), job.waiting_at, job.id));
    let mut n_preemptors = 0;
    for job in queue {
        let fitted = match board.now.fit(&job.spec) {
            Ok(shares) => {
                board.charge(&job.spec, &shares);
                placement.starts.insert(job.id, shares);
                continue;
            }
            Err(why) => why,
        };
        let wait = match board.soon.fit(&job.spec) {
            Ok(shares) => {
                board.charge(&job.spec, &shares);
                Wait::Leaving
            }
            Err(_) if n_preemptors < PREEMPTORS_MAX && board.can_be_moved_for(job, cluster, policy) => {
                let (victims, shares) = board.make_room(job, cluster, policy);
                n_preemptors += 1;
                for victim in victims {
                    board.soon.release(&victim.spec, &shares_of(victim));
                    placement.preempts.insert(victim.id);
                }
                board.charge(&job.spec, &shares);
                Wait::Leaving
            }
            Err(_) => {
                if cluster.now.since(job.waiting_at) >= policy.hold_after {
                    board.hold(&job.spec);
                }
                fitted
            }
        };
        placement.waits.insert(job.id, wait);
    }
    placement
}

/// What is left of a job's pause after a failure.
fn pause(job: &Job, now: UnixMs, policy: &Policy) -> Option<Duration> {
    // Later than any pause could end: the clock was set back since.
    let at = job.retry_at.filter(|at| *at > now && *at <= now.plus(policy.backoff_max))?;
    Some(at.since(now))
}

/// Where a job stands: its priority, and what it has waited for, or had when it started.
fn rank(job: &Job, now: UnixMs, policy: &Policy) -> i64 {
    let until = job.started_at.filter(|_| job.process.is_some()).unwrap_or(now);
    let waited = until.since(job.waiting_at).as_millis() / policy.age.as_millis().max(1);
    i64::from(job.spec.priority).saturating_add(i64::try_from(waited).unwrap_or(i64::MAX))
}

/// Where a job runs.
pub(crate) fn shares_of(job: &Job) -> Vec<Share> {
    match (&job.placed[..], &job.process) {
        ([], Some(process)) => vec![Share { node: process.node.clone(), ranks: job.spec.needs.n_ranks() }],
        (placed, _) => placed.to_vec(),
    }
}

/// Whether the process will be gone before long.
fn is_leaving(job: &Job) -> bool {
    job.desired == Desired::Cancelled || job.stop_sent_at.is_some()
}

/// The room of the cluster under three views.
struct Board {
    /// What nobody has.
    now: Free,
    /// When those have gone who were asked to.
    soon: Free,
    /// When all have gone but the services, which do not end by themselves.
    bare: Free,
}

impl Board {
    fn of(cluster: &Cluster) -> Board {
        let whole = Free::whole(cluster);
        let mut board = Board { now: whole.clone(), soon: whole.clone(), bare: whole };
        for job in cluster.jobs.iter().filter(|job| job.process.is_some()) {
            let shares = shares_of(job);
            board.now.charge(&job.spec, &shares);
            if !is_leaving(job) {
                board.soon.charge(&job.spec, &shares);
            }
            if job.spec.is_service() && !is_leaving(job) {
                board.bare.charge(&job.spec, &shares);
            }
        }
        board
    }

    /// This room is given away, or held.
    fn charge(&mut self, spec: &JobSpec, shares: &[Share]) {
        for view in [&mut self.now, &mut self.soon, &mut self.bare] {
            view.charge(spec, shares);
        }
    }

    /// Holds the place that the job will have when all others there have ended. It is the same at every look: the first
    /// by name.
    fn hold(&mut self, spec: &JobSpec) {
        if let Ok(shares) = self.bare.fit_first(spec) {
            self.charge(spec, &shares);
        }
    }

    /// Whether there is room for `job` when all have gone whom it may move.
    fn can_be_moved_for(&self, job: &Job, cluster: &Cluster, policy: &Policy) -> bool {
        let mut all_gone = self.soon.clone();
        for victim in movable(job, cluster, policy) {
            all_gone.release(&victim.spec, &shares_of(victim));
        }
        all_gone.fit(&job.spec).is_ok()
    }

    /// Who must go so that there is room for `job`, if there can be.
    fn make_room<'a>(&self, job: &Job, cluster: &Cluster<'a>, policy: &Policy) -> (Vec<&'a Job>, Vec<Share>) {
        let mut free = self.soon.clone();
        let mut gone: Vec<&Job> = Vec::new();
        for victim in movable(job, cluster, policy) {
            if free.fit(&job.spec).is_ok() {
                break;
            }
            free.release(&victim.spec, &shares_of(victim));
            gone.push(victim);
        }
        // Whoever need not go stays, the highest first.
        for victim in gone.clone().into_iter().rev() {
            free.charge(&victim.spec, &shares_of(victim));
            match free.fit(&job.spec) {
                Ok(_) => gone.retain(|other| other.id != victim.id),
                Err(_) => free.release(&victim.spec, &shares_of(victim)),
            }
        }
        let shares = free.fit(&job.spec).expect("it was seen to fit, and those who stayed left it so");
        (gone, shares)
    }
}

/// Who may be asked to go for `job`: who stands below its own priority, the lowest and newest first.
fn movable<'a>(job: &Job, cluster: &Cluster<'a>, policy: &Policy) -> Vec<&'a Job> {
    let below = |other: &&Job| {
        let stays = other.process.is_none() || other.spec.is_service() || is_leaving(other);
        !stays && rank(other, cluster.now, policy) < i64::from(job.spec.priority)
    };
    let mut found: Vec<&Job> = cluster.jobs.iter().filter(below).collect();
    found.sort_by_key(|other| (rank(other, cluster.now, policy), Reverse((other.started_at, other.id))));
    found
}

/// What is free on each node, and of each quota.
#[derive(Clone)]
struct Free {
    /// In the order of their names.
    sites: BTreeMap<String, Site>,
    quotas: BTreeMap<String, Room>,
}

#[derive(Clone)]
struct Site {
    free: Room,
    whole: Room,
    open: bool,
}

impl Free {
    fn whole(cluster: &Cluster) -> Free {
        let site = |node: &Node| {
            let whole = node.spec.room();
            (node.spec.name.clone(), Site { free: whole, whole, open: node.is_open(cluster.now) })
        };
        let quota = |project: &Project| (project.name.clone(), project.quota.room());
        Free {
            sites: cluster.nodes.iter().map(site).collect(),
            quotas: cluster.projects.iter().map(quota).collect(),
        }
    }

    fn charge(&mut self, spec: &JobSpec, shares: &[Share]) {
        self.book(spec, shares, -1);
    }

    fn release(&mut self, spec: &JobSpec, shares: &[Share]) {
        self.book(spec, shares, 1);
    }

    fn book(&mut self, spec: &JobSpec, shares: &[Share], sign: i64) {
        for share in shares {
            if let Some(site) = self.sites.get_mut(&share.node) {
                site.free = site.free.plus(&Room::asked(spec, share.ranks).times(sign));
            }
        }
        if let Some(left) = self.quotas.get_mut(&spec.project) {
            *left = left.plus(&Room::asked(spec, spec.needs.n_ranks()).times(sign));
        }
    }

    /// The tightest place for all ranks of a job.
    fn fit(&self, spec: &JobSpec) -> Result<Vec<Share>, Wait> {
        self.fit_by(spec, |site, asked| site.looseness(asked))
    }

    /// The first place by name.
    fn fit_first(&self, spec: &JobSpec) -> Result<Vec<Share>, Wait> {
        self.fit_by(spec, |_, _| 0.0)
    }

    fn fit_by(&self, spec: &JobSpec, looseness: impl Fn(&Site, &Room) -> f64) -> Result<Vec<Share>, Wait> {
        let n_ranks = spec.needs.n_ranks();
        if let Some(left) = self.quotas.get(&spec.project)
            && let Some(field) = left.lacks(&Room::asked(spec, n_ranks))
        {
            return Err(Wait::Quota { project: spec.project.clone(), field });
        }
        for n_nodes in (1..=n_ranks).filter(|n| n_ranks.is_multiple_of(*n)) {
            if n_nodes as usize > self.sites.len() {
                break;
            }
            let ranks = n_ranks / n_nodes;
            let asked = Room::asked(spec, ranks);
            let fits = |site: &&(&String, &Site)| site.1.open && site.1.free.lacks(&asked).is_none();
            let sites = self.sites.iter().filter(|site| fits(&site));
            let mut sites: Vec<_> = sites.map(|(name, site)| (looseness(site, &asked), name)).collect();
            if sites.len() >= n_nodes as usize {
                // Stable: nodes that are alike keep the order of their names.
                sites.sort_by(|a, b| a.0.total_cmp(&b.0));
                let share = |(_, name): &(f64, &String)| Share { node: (*name).clone(), ranks };
                return Ok(sites[..n_nodes as usize].iter().map(share).collect());
            }
        }
        Err(self.shortage(spec))
    }

    /// What the open nodes have too little of.
    fn shortage(&self, spec: &JobSpec) -> Wait {
        let open: Vec<&Site> = self.sites.values().filter(|site| site.open).collect();
        let asked = Room::asked(spec, 1);
        let lacking = open.iter().map(|site| site.free.lacks(&asked)).collect::<BTreeSet<_>>();
        match lacking.iter().next() {
            None => Wait::NoNode,
            Some(Some(field)) if lacking.len() == 1 => Wait::Room { field },
            Some(_) => Wait::Room { field: "room" },
        }
    }
}

impl Site {
    /// Shares of the node that stay free beside `asked`, summed. A node with accelerators is looser for who needs none.
    fn looseness(&self, asked: &Room) -> f64 {
        self.free.plus(&asked.times(-1)).share_of(&self.whole)
    }
}

#[cfg(test)]
mod tests;
