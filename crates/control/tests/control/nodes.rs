//! Two machines that share a database: here two directories and two names.

use std::path::Path;
use std::time::Duration;

use control::{
    Control, JobState, LocalLauncher, NodeMode, NodeSpec, Policy, Reconciler, ReconcilerOptions, Shutdown,
};
use telemetry::Metrics;

use crate::{Stage, shell, wait_for};

fn start(control: &Control, logs: &Path, name: &str) -> Reconciler {
    let launcher = LocalLauncher::new(Path::new("/bin/sh"), logs).unwrap().on_node(name);
    let options = ReconcilerOptions {
        policy: Policy { max_running: 2, backoff_min: Duration::from_millis(20), ..Policy::default() },
        lease_ttl: Duration::from_secs(5),
        tick: Duration::from_millis(20),
        node: Some(NodeSpec { name: name.to_owned(), cores: 2, memory_bytes: 1 << 30 }),
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
