//! Two machines that share a database: here two directories and two names.

use std::path::Path;
use std::time::Duration;

use control::{
    Control, Error, JobLoad, JobSpec, JobState, LocalLauncher, Needs, NodeLoad, NodeMode, NodeSpec, Policy,
    Project, Quota, Reconciler, ReconcilerOptions, Share, Shutdown, Wait,
};
use telemetry::Metrics;

use crate::{Stage, shell, wait_for};

fn start(control: &Control, logs: &Path, name: &str) -> Reconciler {
    let launcher = LocalLauncher::new(Path::new("/bin/sh"), logs).unwrap().on_node(name);
    let options = ReconcilerOptions {
        policy: Policy { backoff_min: Duration::from_millis(20), ..Policy::default() },
        lease_ttl: Duration::from_secs(5),
        tick: Duration::from_millis(20),
        node: Some(NodeSpec {
            name: name.to_owned(),
            machine: "one".to_owned(),
            cores: 2,
            memory_bytes: 1 << 30,
            jobs_max: 2,
            ..NodeSpec::default()
        }),
        ..ReconcilerOptions::default()
    };
    Reconciler::start(control, Box::new(launcher), Metrics::new().job(), options).unwrap()
}

pub(crate) fn jobs_are_shared_by_nodes_and_each_runs_once(stage: &Stage) {
    let ([here, there], clock) = stage.many();
    let place = tempfile::tempdir().unwrap();
    let script = |n: usize| {
        format!("cd {}; echo x >> ran{n}; while [ ! -e end ]; do sleep 0.01; done", place.path().display())
    };
    for n in 0..4 {
        here.submit(&shell(&format!("job{n}"), &script(n), 0)).unwrap();
    }
    let a = start(&here, &place.path().join("a"), "a");
    let b = start(&there, &place.path().join("b"), "b");
    let running = || {
        let jobs = here.list_jobs(9).unwrap();
        let of =
            |node: &str| jobs.iter().filter(|j| j.process.as_ref().is_some_and(|p| p.node == node)).count();
        (of("a"), of("b"))
    };
    wait_for("both to be full", || (running() == (2, 2)).then_some(()));
    let nodes = here.list_nodes().unwrap();
    assert_eq!(nodes.iter().map(|n| n.spec.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);

    // A node that drains asks its jobs to save; they wait for room on the other, and it starts nothing.
    assert!(here.set_node_mode("a", NodeMode::Draining).unwrap());
    assert!(!here.set_node_mode("c", NodeMode::Open).unwrap());
    wait_for("a to drain", || {
        clock.advance(200);
        (running().0 == 0).then_some(())
    });
    assert_eq!(running(), (0, 2));
    // A node whose controller goes keeps its processes, and nobody else takes them for lost.
    b.stop(Shutdown::Leave);
    assert!(here.set_node_mode("a", NodeMode::Open).unwrap());
    wait_for("a to start what waits", || {
        clock.advance(200);
        (running() == (2, 2)).then_some(())
    });
    let b = start(&there, &place.path().join("b"), "b");
    std::fs::write(place.path().join("end"), "").unwrap();
    wait_for("all jobs to end", || {
        clock.advance(200);
        here.list_jobs(9).unwrap().iter().all(|job| job.state == JobState::Succeeded).then_some(())
    });
    for n in 0..4 {
        let ran = std::fs::read_to_string(place.path().join(format!("ran{n}"))).unwrap();
        assert!(ran.lines().count() <= 2, "job{n} ran {} times", ran.lines().count());
    }
    a.stop(Shutdown::Leave);
    b.stop(Shutdown::Leave);
}

fn machine(name: &str, machine: &str) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        machine: machine.to_owned(),
        cores: 4,
        memory_bytes: 8 << 30,
        accelerators: 1,
        disk_bytes: 9,
        jobs_max: 4,
    }
}

pub(crate) fn a_name_has_one_machine_until_it_is_given_up(stage: &Stage) {
    let (control, clock) = stage.one();
    let load = NodeLoad {
        cores: 1.5,
        memory_bytes: 7,
        disk_free_bytes: 8,
        problem: Some("hot".to_owned()),
        jobs: vec![JobLoad { id: 1, cores: 0.5, memory_bytes: 3 }],
    };
    control.put_node(&machine("a", "one"), &load).unwrap();
    let nodes = control.list_nodes().unwrap();
    assert_eq!((&nodes[0].spec, &nodes[0].load), (&machine("a", "one"), &load));
    assert!(!nodes[0].is_open(control.now()), "it is not well");
    let taken = || control.put_node(&machine("a", "two"), &NodeLoad::default());
    assert!(matches!(taken(), Err(Error::NodeTaken { .. })));
    control.put_node(&machine("a", "one"), &NodeLoad::default()).unwrap();
    assert!(matches!(control.forget_node("a"), Err(Error::NodeAlive { .. })));
    assert!(matches!(control.forget_node("b"), Err(Error::NoNode { .. })));

    // What runs there keeps the name for it, silent or not: a machine that is cut off looks like one that is gone.
    let place = tempfile::tempdir().unwrap();
    let id = control.submit(&shell("j", "exec sleep 600", 0)).unwrap().job.id;
    let reconciler = start(&control, place.path(), "a");
    wait_for("the job to run", || {
        clock.advance(200);
        (control.get_job(id).unwrap()?.state == JobState::Running).then_some(())
    });
    reconciler.stop(Shutdown::Leave);
    clock.advance(16_000);
    assert!(matches!(taken(), Err(Error::NodeTaken { .. })));
    let process = control.get_job(id).unwrap().unwrap().process.unwrap();
    control.forget_node("a").unwrap();
    let job = control.get_job(id).unwrap().unwrap();
    assert_eq!((job.state, job.process, job.n_failures), (JobState::Interrupted, None, 0));
    taken().unwrap();
    let killed = std::process::Command::new("kill").args(["-9", &process.pid.to_string()]).status();
    assert!(killed.unwrap().success());
}

pub(crate) fn a_job_beyond_all_nodes_or_its_quota_is_refused(stage: &Stage) {
    let (control, _) = stage.one();
    let asks = |cores: u32, project: &str| JobSpec {
        needs: Needs { cores, ..Needs::default() },
        project: project.to_owned(),
        ..shell(&format!("{project}-{cores}"), "true", 0)
    };
    control.submit(&asks(999, "unknown-yet")).unwrap();
    control.put_node(&machine("a", "one"), &NodeLoad::default()).unwrap();
    let quota = Quota { cores: Some(2), memory_bytes: Some(1 << 40), accelerators: None, jobs: Some(9) };
    let project = Project { name: "p".to_owned(), quota };
    control.put_project(&Project { quota: Quota::default(), ..project.clone() }).unwrap();
    control.put_project(&project).unwrap();
    assert_eq!(control.list_projects().unwrap(), [project]);
    let beyond = |spec: JobSpec| match control.submit(&spec) {
        Err(Error::Beyond { field, at_most, .. }) => Some((field, at_most)),
        other => panic!("{other:?}"),
    };
    assert_eq!(beyond(asks(5, "default")), Some(("cores", 4)));
    assert_eq!(beyond(asks(3, "p")), Some(("cores", 2)));
    let first = control.submit(&asks(2, "p")).unwrap().job;
    let second = control.submit(&asks(1, "p")).unwrap().job;
    let waiting = control.waiting().unwrap();
    assert!(!waiting.contains_key(&first.id), "it is about to start: {waiting:?}");
    assert_eq!(waiting[&second.id], Wait::Quota { project: "p".to_owned(), field: "cores" });
    assert_eq!(control.find_job("p-1").unwrap().unwrap().id, second.id);
    assert_eq!(control.find_job(&first.id.to_string()).unwrap().unwrap().id, first.id);
    assert!(control.delete_project("p").unwrap() && !control.delete_project("p").unwrap());
    assert!(!control.waiting().unwrap().contains_key(&second.id));
    assert!(matches!(control.retry_job(first.id), Err(Error::JobNotOver { .. })));
}

/// A gang that no machine can take alone: both give their part, and are told of each other.
pub(crate) fn a_gang_takes_its_part_of_several_nodes(stage: &Stage) {
    let ([here, there], clock) = stage.many();
    let place = tempfile::tempdir().unwrap();
    let told = place.path().join("told");
    let script =
        format!("echo $LOQUAT_HOSTS $LOQUAT_CORES > {0}.new; mv {0}.new {0}; sleep 600", told.display());
    let needs = Needs { cores: 1, ranks: 4, ..Needs::default() };
    let gang = JobSpec { needs, ..shell("gang", &script, 0) };
    let a = start(&here, &place.path().join("a"), "a");
    let b = start(&there, &place.path().join("b"), "b");
    wait_for("both nodes", || {
        clock.advance(200);
        (here.list_nodes().unwrap().len() == 2).then_some(())
    });
    let id = here.submit(&gang).unwrap().job.id;
    wait_for("the gang to run", || {
        clock.advance(200);
        told.exists().then_some(())
    });
    assert_eq!(std::fs::read_to_string(&told).unwrap(), "a,b 2\n");
    let placed = here.get_job(id).unwrap().unwrap().placed;
    let share = |node: &str| Share { node: node.to_owned(), ranks: 2 };
    assert_eq!(placed, [share("a"), share("b")]);
    let needs = Needs { cores: 1, ..Needs::default() };
    let other = here.submit(&JobSpec { needs, ..shell("other", "true", 0) }).unwrap().job.id;
    for _ in 0..20 {
        clock.advance(100);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(here.get_job(other).unwrap().unwrap().n_starts, 0, "the room of the ranks is taken on both");
    here.cancel_job(id).unwrap();
    wait_for("the other to run", || {
        clock.advance(200);
        (here.get_job(other).unwrap()?.state == JobState::Succeeded).then_some(())
    });
    a.stop(Shutdown::Leave);
    b.stop(Shutdown::Leave);
}
