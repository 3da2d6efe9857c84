use super::*;
use crate::error::Error;
use crate::job::{JobState, Needs};
use crate::nodes::{NodeLoad, NodeMode, NodeSpec};
use crate::process::ProcessRef;
use crate::projects::Quota;
use crate::room::check_exists;
use crate::testing::submitted;

mod simulation;

const NOW: UnixMs = UnixMs(1_800_000_000_000);
const GB: u64 = 1 << 30;

fn node(name: &str, cores: u32, accelerators: u32) -> Node {
    let spec = NodeSpec {
        name: name.to_owned(),
        cores,
        memory_bytes: 4 * u64::from(cores) * GB,
        accelerators,
        jobs_max: 100,
        ..NodeSpec::default()
    };
    Node { spec, mode: NodeMode::Open, seen_at: NOW, load: NodeLoad::default() }
}

fn needs(cores: u32, ranks: u32) -> Needs {
    Needs { cores, ranks, ..Needs::default() }
}

/// Waits since `n` seconds before now for its number.
fn waiting(n: i64, needs: Needs, priority: i32) -> Job {
    let spec = JobSpec { name: format!("job{n}"), needs, priority, ..JobSpec::default() };
    submitted(JobId(n), spec, NOW)
}

fn process(n: i64, node: &str) -> ProcessRef {
    ProcessRef {
        pid: n as u32,
        start_ticks: n as u64,
        boot_id: "boot".to_owned(),
        mark: n.to_string(),
        node: node.to_owned(),
    }
}

fn running(n: i64, needs: Needs, priority: i32, on: &[(&str, u32)]) -> Job {
    Job {
        state: JobState::Running,
        process: Some(process(n, on[0].0)),
        placed: shares(on),
        started_at: Some(NOW),
        ..waiting(n, needs, priority)
    }
}

fn shares(on: &[(&str, u32)]) -> Vec<Share> {
    on.iter().map(|(node, ranks)| Share { node: (*node).to_owned(), ranks: *ranks }).collect()
}

fn placed(jobs: &[Job], nodes: &[Node], projects: &[Project]) -> Placement {
    place(&Cluster { jobs, nodes, projects, now: NOW }, &Policy::default())
}

#[test]
fn a_job_goes_where_it_leaves_least_and_spares_accelerators() {
    let nodes = [node("a", 8, 0), node("b", 4, 0), node("c", 4, 2)];
    let check = |needs: Needs, on: &str| {
        let got = placed(&[waiting(1, needs, 0)], &nodes, &[]);
        assert_eq!(got.starts[&JobId(1)], shares(&[(on, 1)]), "{needs:?}");
    };
    check(needs(3, 1), "b");
    check(needs(6, 1), "a");
    check(Needs { accelerators: 1, ..needs(1, 1) }, "c");
    check(Needs { memory_bytes: 20 * GB, ..Needs::default() }, "a");
    // Without needs it takes a place among the jobs, and nothing else.
    assert_eq!(placed(&[waiting(1, Needs::default(), 0)], &nodes, &[]).starts.len(), 1);
}

#[test]
fn a_gang_starts_whole_on_as_few_nodes_as_take_it_or_not_at_all() {
    let nodes = [node("a", 4, 0), node("b", 4, 0), node("c", 2, 0)];
    let check = |needs: Needs, expected: Option<&[(&str, u32)]>| {
        let got = placed(&[waiting(1, needs, 0)], &nodes, &[]);
        assert_eq!(got.starts.get(&JobId(1)), expected.map(shares).as_ref(), "{needs:?}: {got:?}");
    };
    check(needs(1, 4), Some(&[("a", 4)]));
    check(needs(2, 4), Some(&[("a", 2), ("b", 2)]));
    check(needs(1, 8), Some(&[("a", 4), ("b", 4)]));
    check(needs(2, 3), Some(&[("c", 1), ("a", 1), ("b", 1)]));
    check(needs(2, 5), None);
    // What half a gang leaves behind is nobody's.
    let both = [waiting(1, needs(2, 4), 0), waiting(2, needs(2, 4), 0)];
    let got = placed(&both, &nodes, &[]);
    assert_eq!((got.starts.len(), &got.waits[&JobId(2)]), (1, &Wait::Room { field: "room" }));
}

#[test]
fn nodes_that_may_start_nothing_get_nothing() {
    let silent = Node { seen_at: UnixMs(NOW.0 - 60_000), ..node("a", 8, 0) };
    let cordoned = Node { mode: NodeMode::Cordoned, ..node("b", 8, 0) };
    let full = NodeLoad { problem: Some("full".to_owned()), ..NodeLoad::default() };
    let unwell = Node { load: full, ..node("c", 8, 0) };
    let got = placed(&[waiting(1, needs(1, 1), 0)], &[silent, cordoned, unwell], &[]);
    assert_eq!(got.waits[&JobId(1)], Wait::NoNode);
}

#[test]
fn a_higher_job_moves_the_lowest_and_newest_and_no_more_than_it_must() {
    let nodes = [node("a", 4, 0), node("b", 4, 0)];
    let mut jobs = vec![
        running(1, needs(2, 1), 1, &[("a", 1)]),
        running(2, needs(2, 1), 3, &[("a", 1)]),
        running(3, needs(1, 1), 0, &[("b", 1)]),
        running(4, needs(3, 1), 4, &[("b", 1)]),
        waiting(5, needs(2, 1), 5),
    ];
    let got = placed(&jobs, &nodes, &[]);
    // Job 3 stands lowest, but its going alone would help nobody, so it stays.
    assert_eq!(got.preempts, BTreeSet::from([JobId(1)]));
    assert_eq!(got.waits[&JobId(5)], Wait::Leaving);
    // While it goes nobody else is asked, and the room is not given to those behind.
    jobs[0].stop_sent_at = Some(NOW);
    jobs.push(waiting(6, needs(1, 1), 0));
    let got = placed(&jobs, &nodes, &[]);
    assert!(got.preempts.is_empty() && got.starts.is_empty(), "{got:?}");
    // Gone: it is there for whom it was made.
    let gone = Job { waiting_at: NOW, ..waiting(1, needs(2, 1), 1) };
    jobs[0] = gone;
    let got = placed(&jobs, &nodes, &[]);
    assert_eq!(got.starts, BTreeMap::from([(JobId(5), shares(&[("a", 1)]))]));
}

#[test]
fn equals_and_services_and_what_has_earned_its_place_are_not_moved() {
    let nodes = [node("a", 4, 0)];
    let check = |victim: Job, moved: bool| {
        let got = placed(&[victim, waiting(2, needs(4, 1), 5)], &nodes, &[]);
        assert_eq!(!got.preempts.is_empty(), moved, "{got:?}");
    };
    let low = running(1, needs(4, 1), 0, &[("a", 1)]);
    check(low.clone(), true);
    check(running(1, needs(4, 1), 5, &[("a", 1)]), false);
    let service = JobSpec { max_restarts: u32::MAX, ..low.spec.clone() };
    check(Job { spec: service, ..low.clone() }, false);
    // It waited for five ages before it started.
    check(Job { waiting_at: UnixMs(NOW.0 - 5 * 300_000), ..low.clone() }, false);
    // To move it would not be enough.
    let other = running(3, needs(1, 1), 9, &[("a", 1)]);
    let got = placed(
        &[
            Job { spec: JobSpec { needs: needs(3, 1), ..low.spec.clone() }, ..low },
            other,
            waiting(2, needs(4, 1), 5),
        ],
        &nodes,
        &[],
    );
    assert!(got.preempts.is_empty(), "{got:?}");
}

#[test]
fn a_project_uses_no_more_than_its_quota_and_moves_its_own() {
    let nodes = [node("a", 16, 0)];
    let quota = Quota { cores: Some(4), ..Quota::default() };
    let projects = [Project { name: "p".to_owned(), quota }];
    let of_p = |job: Job| Job { spec: JobSpec { project: "p".to_owned(), ..job.spec.clone() }, ..job };
    let mut jobs = vec![
        of_p(running(1, needs(3, 1), 0, &[("a", 1)])),
        of_p(waiting(2, needs(2, 1), 0)),
        waiting(3, needs(2, 1), 0),
    ];
    let got = placed(&jobs, &nodes, &projects);
    assert_eq!(got.starts.keys().collect::<Vec<_>>(), [&JobId(3)]);
    assert_eq!(got.waits[&JobId(2)], Wait::Quota { project: "p".to_owned(), field: "cores" });
    jobs[1].spec.priority = 1;
    assert_eq!(placed(&jobs, &nodes, &projects).preempts, BTreeSet::from([JobId(1)]));
}

#[test]
fn who_has_waited_long_holds_room_against_those_behind() {
    let nodes = [node("a", 4, 0)];
    let busy = running(1, needs(2, 1), 0, &[("a", 1)]);
    let small = waiting(3, needs(1, 1), 0);
    let big =
        |waited_s: i64| Job { waiting_at: UnixMs(NOW.0 - waited_s * 1000), ..waiting(2, needs(4, 1), 0) };
    let starts = |big: Job| placed(&[busy.clone(), big, small.clone()], &nodes, &[]).starts.len();
    assert_eq!(starts(big(0)), 1, "at first the room is used");
    assert_eq!(starts(big(120)), 0, "then it is kept");
}

#[test]
fn what_exceeds_everything_is_refused_with_what_would_fit() {
    let nodes = [node("a", 8, 0), node("b", 4, 2)];
    let quota = Quota { cores: Some(6), ..Quota::default() };
    let projects = [Project { name: "p".to_owned(), quota }];
    let check = |needs: Needs, project: &str, expected: Option<(&str, u64)>| {
        let spec = JobSpec { needs, project: project.to_owned(), ..waiting(1, needs, 0).spec };
        let got = match check_exists(&spec, &nodes, &projects) {
            Ok(()) => None,
            Err(Error::Beyond { field, at_most, .. }) => Some((field, at_most)),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(got, expected, "{needs:?}");
    };
    let memory = |n: u64| Needs { memory_bytes: n * GB, ..Needs::default() };
    check(needs(8, 1), "default", None);
    check(needs(9, 1), "default", Some(("cores", 8)));
    check(memory(33), "default", Some(("memory_bytes", 32 * GB)));
    check(Needs { accelerators: 3, ..Needs::default() }, "default", Some(("accelerators", 2)));
    // Each exists, but not on one node.
    check(Needs { accelerators: 1, ..needs(8, 1) }, "default", Some(("cores", 4)));
    check(Needs { accelerators: 9, memory_bytes: 99 * GB, ..needs(9, 1) }, "default", Some(("cores", 8)));
    check(needs(1, 8), "default", None);
    check(needs(4, 2), "default", None);
    check(needs(4, 4), "default", Some(("ranks", 2)));
    check(needs(3, 2), "p", None);
    check(needs(7, 1), "p", Some(("cores", 6)));
    let none = check_exists(&waiting(1, needs(999, 1), 0).spec, &[], &[]);
    assert!(none.is_ok(), "without nodes nobody knows what there is");
}
