//! The decision: from what is asked for and what was seen to what must be done. Pure; a simulation runs it by the thousand.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::UnixMs;
use crate::job::{Desired, Ending, Job, JobId, JobState};
use crate::jobs::End;
use crate::launcher::{Observed, StopHow};
use crate::place::Placement;
use crate::process::ProcessRef;

/// The exit code of a job that stopped cleanly and wants to be started again to go on (EX_TEMPFAIL of sysexits.h).
pub const EXIT_INTERRUPTED: i32 = 75;

/// Knobs of the reconciler.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Jobs with a process at once, services aside, of a controller that has no node.
    pub max_running: usize,
    /// Waiting that raises a job's priority by one.
    pub age: Duration,
    /// Waiting after which room is held for a job.
    pub hold_after: Duration,
    /// Pause before the first restart; doubles with every further short attempt.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// An attempt that ran longer than this was not short.
    pub short_attempt: Duration,
    /// From being asked to stop to being killed.
    pub stop_grace: Duration,
    /// Start nothing; what runs goes on.
    pub cordoned: bool,
    /// The controller is about to exit: stop what runs, start nothing.
    pub draining: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_running: 4,
            age: Duration::from_secs(300),
            hold_after: Duration::from_secs(120),
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(60),
            short_attempt: Duration::from_secs(60),
            stop_grace: Duration::from_secs(30),
            cordoned: false,
            draining: false,
        }
    }
}

/// One thing to do. Each is safe to do late or twice: it names the process it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Start {
        id: JobId,
    },
    Stop {
        id: JobId,
        process: ProcessRef,
        how: StopHow,
    },
    /// Record that the process, or a job without one, has ended.
    End {
        id: JobId,
        process: Option<ProcessRef>,
        end: End,
    },
}

/// What to do about `jobs`, oldest first. `observed` has what was seen of the processes; a job that runs and is not in it
/// could not be observed and is left alone. Of `placement` only the starts that are this controller's to make.
pub fn reconcile(
    jobs: &[Job],
    observed: &BTreeMap<JobId, Observed>,
    placement: &Placement,
    now: UnixMs,
    policy: &Policy,
) -> Vec<Action> {
    let mut actions = Vec::new();
    for job in jobs.iter().filter(|job| !job.state.is_over()) {
        let action = match (&job.process, observed.get(&job.id)) {
            (Some(process), Some(Observed::Running)) => {
                let unwanted = policy.draining || placement.preempts.contains(&job.id);
                stop(job, process, (unwanted, now), policy)
            }
            (Some(process), Some(Observed::Ended(ending))) => Some(Action::End {
                id: job.id,
                process: Some(process.clone()),
                end: ended(job, *ending, now, policy),
            }),
            (Some(_), None) => None,
            (None, _) => start(job, placement, policy),
        };
        actions.extend(action);
    }
    actions
}

/// A job whose process runs: stop it when it shall not. What was asked to stop is stopped, whatever became of the reason.
fn stop(job: &Job, process: &ProcessRef, (unwanted, now): (bool, UnixMs), policy: &Policy) -> Option<Action> {
    if job.desired == Desired::Running && !unwanted && job.stop_sent_at.is_none() {
        return None;
    }
    let how = match job.stop_sent_at {
        // A request from the future was made before the clock was set back: make it again, or its grace never ends.
        None => StopHow::Ask,
        Some(asked_at) if asked_at > now => StopHow::Ask,
        Some(asked_at) if now.since(asked_at) >= policy.stop_grace => StopHow::Kill,
        Some(_) => return None,
    };
    Some(Action::Stop { id: job.id, process: process.clone(), how })
}

/// A job without a process: start it when there is a place for it, or end it when it was cancelled.
fn start(job: &Job, placement: &Placement, policy: &Policy) -> Option<Action> {
    if job.desired == Desired::Cancelled {
        let end = End {
            state: JobState::Cancelled,
            ending: None,
            message: job.message.clone(),
            n_failures: job.n_failures,
            n_short: job.n_short,
            retry_at: None,
        };
        return Some(Action::End { id: job.id, process: None, end });
    }
    let placed = placement.starts.contains_key(&job.id);
    (placed && !policy.draining && !policy.cordoned).then_some(Action::Start { id: job.id })
}

/// What becomes of a job whose attempt ended like this.
pub(crate) fn ended(job: &Job, ending: Ending, now: UnixMs, policy: &Policy) -> End {
    let ran = job.started_at.map_or(Duration::ZERO, |at| now.since(at));
    let short = ending == Ending::NotStarted || ran < policy.short_attempt;
    let n_short = if short { job.n_short.saturating_add(1) } else { 0 };
    let retry_at = Some(now.plus(backoff(n_short, policy)));
    let end = End {
        state: JobState::Pending,
        ending: Some(ending),
        message: None,
        n_failures: job.n_failures,
        n_short,
        retry_at,
    };
    let over = |state| End { state, retry_at: None, ..end.clone() };
    if job.desired == Desired::Cancelled {
        return over(JobState::Cancelled);
    }
    match ending {
        Ending::Exited(0) => over(JobState::Succeeded),
        // It was asked to stop while it is still wanted: a controller went away. However it ended, it goes on later.
        _ if job.stop_sent_at.is_some() => End { n_short: job.n_short, ..over(JobState::Interrupted) },
        // Nobody saw a lost process fail; jobs resume, so running one again that had succeeded does no harm.
        Ending::Exited(EXIT_INTERRUPTED) | Ending::Lost => End { state: JobState::Interrupted, ..end },
        Ending::Exited(_) | Ending::Signaled(_) | Ending::NotStarted => {
            let n_failures = job.n_failures.saturating_add(1);
            let message = Some(format!("attempt {} {ending}", job.n_starts));
            let end = if n_failures > job.spec.max_restarts { over(JobState::Failed) } else { end };
            End { n_failures, message, ..end }
        }
    }
}

fn backoff(n_short: u32, policy: &Policy) -> Duration {
    let doublings = n_short.saturating_sub(1).min(20);
    policy.backoff_min.saturating_mul(1 << doublings).min(policy.backoff_max)
}

#[cfg(test)]
mod tests;
