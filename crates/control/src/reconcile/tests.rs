use super::*;
use crate::job::JobSpec;
use crate::nodes::Node;
use crate::place::{Cluster, place};
use crate::testing::submitted;

const NOW: UnixMs = UnixMs(1_800_000_000_000);

fn job() -> Job {
    let spec = JobSpec { name: "train".to_owned(), max_restarts: 2, ..JobSpec::default() };
    submitted(JobId(1), spec, NOW)
}

fn process() -> ProcessRef {
    ProcessRef {
        pid: 7,
        start_ticks: 1,
        boot_id: "boot".to_owned(),
        mark: "mark".to_owned(),
        node: String::new(),
    }
}

/// Runs since ten seconds before now.
fn running() -> Job {
    Job {
        state: JobState::Running,
        process: Some(process()),
        n_starts: 1,
        started_at: Some(UnixMs(NOW.0 - 10_000)),
        ..job()
    }
}

/// What a controller without a node does.
fn decided(jobs: &[Job], observed: &BTreeMap<JobId, Observed>, policy: &Policy) -> Vec<Action> {
    let nodes = [Node::anywhere(policy.max_running, NOW)];
    let placement = place(&Cluster { jobs, nodes: &nodes, projects: &[], now: NOW }, policy);
    reconcile(jobs, observed, &placement, NOW, policy)
}

fn decide(job: &Job, observed: Option<Observed>, policy: &Policy) -> Option<Action> {
    let observed = observed.map(|seen| (job.id, seen)).into_iter().collect();
    let mut actions = decided(std::slice::from_ref(job), &observed, policy);
    assert!(actions.len() <= 1);
    actions.pop()
}

#[test]
fn a_job_starts_when_it_is_due() {
    let check = |job: Job, expected: bool| {
        let action = decide(&job, None, &Policy::default());
        assert_eq!(action.is_some(), expected, "{job:?}");
        if let Some(action) = action {
            assert_eq!(action, Action::Start { id: JobId(1) });
        }
    };
    let retry = |ms| Job { retry_at: Some(UnixMs(NOW.0 + ms)), ..job() };
    check(job(), true);
    check(retry(0), true);
    check(retry(1), false);
    check(retry(60_000), false);
    // The clock was set back by more than any pause: the job must not wait for the old time to come around.
    check(retry(60_001), true);
    let interrupted = Job { state: JobState::Interrupted, ..job() };
    check(interrupted, true);
}

#[test]
fn no_more_jobs_run_than_allowed_and_the_oldest_go_first() {
    let jobs: Vec<Job> =
        (1..=5).map(|n| Job { id: JobId(n), ..if n == 3 { running() } else { job() } }).collect();
    let observed = BTreeMap::from([(JobId(3), Observed::Running)]);
    let policy = Policy { max_running: 3, ..Policy::default() };
    let start = |n| Action::Start { id: JobId(n) };
    assert_eq!(decided(&jobs, &observed, &policy), [start(1), start(2)]);
    let service = Job { spec: crate::job::JobSpec { max_restarts: u32::MAX, ..job().spec }, ..job() };
    let full = Policy { max_running: 0, ..policy.clone() };
    let due = decided(&[job(), Job { id: JobId(9), ..service }], &BTreeMap::new(), &full);
    assert_eq!(due, [start(9)], "a service takes no job's place");
    let draining = Policy { draining: true, ..policy };
    let actions = decided(&jobs, &observed, &draining);
    assert!(matches!(&actions[..], [Action::Stop { id: JobId(3), .. }]), "{actions:?}");
}

#[test]
fn a_stop_is_asked_for_and_then_enforced() {
    let check = |desired, draining, stop_sent_ms_ago: Option<i64>, expected| {
        let job = Job { desired, stop_sent_at: stop_sent_ms_ago.map(|ms| UnixMs(NOW.0 - ms)), ..running() };
        let policy = Policy { draining, ..Policy::default() };
        let how = match decide(&job, Some(Observed::Running), &policy) {
            None => None,
            Some(Action::Stop { how, .. }) => Some(how),
            other => panic!("{other:?}"),
        };
        assert_eq!(how, expected, "{desired:?} {draining} {stop_sent_ms_ago:?}");
    };
    use Desired::{Cancelled, Running};
    check(Running, false, None, None);
    check(Cancelled, false, None, Some(StopHow::Ask));
    check(Running, true, None, Some(StopHow::Ask));
    check(Cancelled, false, Some(29_999), None);
    check(Cancelled, false, Some(30_000), Some(StopHow::Kill));
    // Asked in the future: the clock was set back.
    check(Cancelled, false, Some(-5), Some(StopHow::Ask));
    // Whoever asked has gone, or the reason has: what was asked to stop is stopped, and goes on later.
    check(Running, false, Some(60_000), Some(StopHow::Kill));
}

#[test]
fn a_job_that_makes_room_is_asked_once_and_goes_on_later() {
    let placement = Placement { preempts: [JobId(1)].into(), ..Placement::default() };
    let observed = BTreeMap::from([(JobId(1), Observed::Running)]);
    let act = |job: &Job| {
        reconcile(std::slice::from_ref(job), &observed, &placement, NOW, &Policy::default()).pop()
    };
    let how = |action| match action {
        Some(Action::Stop { how, .. }) => Some(how),
        _ => None,
    };
    assert_eq!(how(act(&running())), Some(StopHow::Ask));
    let asked = Job { stop_sent_at: Some(NOW), ..running() };
    assert_eq!(how(act(&asked)), None);
    let end = ended(&asked, Ending::Exited(EXIT_INTERRUPTED), NOW, &Policy::default());
    assert_eq!((end.state, end.n_failures, end.retry_at), (JobState::Interrupted, 0, None));
}

#[test]
fn a_job_that_cannot_be_observed_is_left_alone() {
    let job = Job { desired: Desired::Cancelled, ..running() };
    assert_eq!(decide(&job, None, &Policy::default()), None);
}

#[test]
fn endings_are_sorted_into_states() {
    let check = |job: &Job, ending, state, n_failures, retry_ms: Option<i64>| {
        let action = decide(job, Some(Observed::Ended(ending)), &Policy::default());
        let Some(Action::End { process, end, .. }) = action else {
            panic!("{action:?}");
        };
        assert_eq!(process, job.process);
        assert_eq!(end.state, state, "{job:?} {ending:?}");
        assert_eq!(end.n_failures, n_failures, "{job:?} {ending:?}");
        assert_eq!(end.retry_at, retry_ms.map(|ms| UnixMs(NOW.0 + ms)), "{job:?} {ending:?}");
    };
    use JobState::{Cancelled, Failed, Interrupted, Pending, Succeeded};
    let first = running();
    check(&first, Ending::Exited(0), Succeeded, 0, None);
    check(&first, Ending::Exited(75), Interrupted, 0, Some(1_000));
    check(&first, Ending::Lost, Interrupted, 0, Some(1_000));
    check(&first, Ending::Exited(1), Pending, 1, Some(1_000));
    check(&first, Ending::Signaled(9), Pending, 1, Some(1_000));

    let third_short = Job { n_short: 3, n_failures: 1, ..running() };
    check(&third_short, Ending::Exited(1), Pending, 2, Some(8_000));
    let long = Job { started_at: Some(UnixMs(NOW.0 - 60_000)), ..third_short.clone() };
    check(&long, Ending::Exited(1), Pending, 2, Some(1_000));
    let often = Job { n_short: 1_000_000, ..running() };
    check(&often, Ending::Lost, Interrupted, 0, Some(60_000));

    let last = Job { n_failures: 2, ..running() };
    check(&last, Ending::Signaled(9), Failed, 3, None);
    check(&last, Ending::Exited(75), Interrupted, 2, Some(1_000));

    // Its controller had asked it to stop in order to exit: whatever came of it is no failure, and it goes on at once.
    let drained = Job { stop_sent_at: Some(NOW), ..last };
    check(&drained, Ending::Signaled(15), Interrupted, 2, None);
    check(&drained, Ending::Exited(0), Succeeded, 2, None);

    let cancelled = Job { desired: Desired::Cancelled, ..running() };
    check(&cancelled, Ending::Exited(75), Cancelled, 0, None);
    check(&cancelled, Ending::Signaled(9), Cancelled, 0, None);
}

#[test]
fn a_cancelled_job_without_a_process_is_over() {
    let job = Job { desired: Desired::Cancelled, ..job() };
    let action = decide(&job, None, &Policy::default());
    assert!(
        matches!(&action, Some(Action::End { process: None, end, .. }) if end.state == JobState::Cancelled),
        "{action:?}"
    );
}

#[test]
fn a_job_that_is_over_is_left_alone() {
    for state in JobState::ALL.into_iter().filter(|state| state.is_over()) {
        let job = Job { state, desired: Desired::Cancelled, ..job() };
        assert_eq!(decide(&job, None, &Policy::default()), None);
    }
}
