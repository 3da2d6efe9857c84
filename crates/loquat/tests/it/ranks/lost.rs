//! Ranks that are killed, and those that are left and go on in the same processes (Open MPI 5, ULFM).

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use super::{Begun, Runs};

/// What `mpirun` here is told so that ranks may outlive others; `None`, and said so, where it cannot.
fn prepared() -> Option<Runs> {
    let runs = Runs::prepared()?;
    let version = Command::new(runs.mpi.join("mpirun")).arg("--version").output().unwrap().stdout;
    let version = String::from_utf8_lossy(&version);
    if !version.contains("(Open MPI) 5.") {
        eprintln!("SKIPPED: {version} has no --with-ft ulfm");
        return None;
    }
    Some(runs)
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

fn events<'a>(told: &'a str, kind: &'a str) -> impl Iterator<Item = Value> + 'a {
    let events = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.filter(move |event| event["event"] == kind)
}

impl Begun {
    /// Until a group has begun for the n-th time and taken a few steps.
    fn wait_for_group(&self, n: usize) {
        self.wait_until(|| {
            let text = self.text();
            let began = text.match_indices("\"event\":\"started\"").nth(n - 1);
            began.is_some_and(|(at, _)| text[at..].matches("\"event\":\"step\"").count() > 3)
        });
    }
}

#[test]
fn ranks_that_are_left_go_on_in_the_same_processes() {
    let Some(runs) = prepared() else { return };
    let command =
        |run: &str, steps| runs.command(runs.words(run, steps, "--launch mpi --ranks 4 --rank-limit 30"));
    let (begun, steps, run) = runs.begin_midway("survived", command);
    let first: BTreeSet<u32> = runs.ranks(&run).into_iter().collect();
    assert_eq!(first.len(), 4, "{}", begun.text());
    // Pids are in the order of ranks: a follower, then the one that leads. The spare one takes a place.
    let pids: Vec<u32> = first.iter().copied().collect();
    kill(pids[2]);
    begun.wait_for_group(2);
    kill(pids[0]);
    begun.wait_for_group(3);
    let left: BTreeSet<u32> = runs.ranks(&run).into_iter().collect();
    assert_eq!(left, [pids[1], pids[3]].into(), "{}", begun.text());
    let told = begun.end();
    assert!(!told.contains("restarts left"), "{told}");
    let groups: Vec<Value> = events(&told, "started").collect();
    let number = |event: &Value, field: &str| event[field].as_f64().unwrap_or(f64::NAN);
    assert_eq!(groups.iter().map(|group| number(group, "n_ranks")).collect::<Vec<_>>(), [4.0, 2.0, 2.0]);
    for (group, rank) in groups[1..].iter().zip([2, 0]) {
        let (after, lost) = (group["after"].as_str().unwrap(), number(group, "lost_seconds"));
        assert!(after.contains(&format!("rank {rank}")) && after.contains("lost"), "{group}");
        eprintln!("{after}: {lost:.3} s");
        assert!(lost < 15.0, "{group}");
    }
    // No step is taken twice; one that the first rank took with it to the grave may be untold.
    let taken: Vec<u64> = events(&told, "step").map(|step| step["step"].as_u64().unwrap()).collect();
    assert!(taken.is_sorted_by(|a, b| a < b), "{taken:?}");
    assert_eq!(taken.last(), Some(&steps));
    assert!(taken.len() as u64 >= steps - 1, "{} of {steps}", taken.len());
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}

#[test]
fn when_all_ranks_are_lost_they_are_started_again() {
    let Some(runs) = prepared() else { return };
    let command =
        |run: &str, steps| runs.command(runs.words(run, steps, "--launch mpi --ranks 2 --rank-limit 30"));
    let (begun, steps, run) = runs.begin_midway("all", command);
    runs.ranks(&run).into_iter().for_each(kill);
    begun.recovery();
    let told = begun.end();
    assert!(told.contains("3 restarts left"), "{told}");
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}
