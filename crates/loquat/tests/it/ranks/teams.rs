//! Ranks that compute one model together, as processes.

use super::*;

/// Of the steps that were told of.
fn losses(told: &str) -> Vec<f64> {
    let events = told.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    events.filter_map(|event| event["loss"].as_f64()).collect()
}

fn assert_near(one: &[f64], other: &[f64]) {
    assert_eq!(one.len(), other.len());
    for (a, b) in one.iter().zip(other) {
        assert!((a - b).abs() < 1e-4 * a, "{one:?} {other:?}");
    }
}

#[test]
fn teams_of_processes_give_the_bytes_of_teams_of_threads() {
    let Some(runs) = Runs::prepared() else { return };
    let one = losses(&runs.must_run("one", 8, ""));
    let threads = losses(&runs.must_run("threads", 8, "--ranks 2 --tp 2"));
    assert_eq!(one.len(), 8);
    assert_near(&one, &threads);
    runs.must_run("processes", 8, "--launch mpi --ranks 4 --tp 2 --rank-limit 60");
    assert!(runs.weights("processes") == runs.weights("threads"), "two teams of two processes");
    runs.must_run("divided", 8, "--launch mpi --ranks 4 --tp 2 --zero 3 --rank-limit 60");
    assert!(runs.weights("divided") == runs.weights("threads"), "that divide the state of their parts");
    for (extra, words) in [
        ("--ranks 2 --tp 3", "\"3\" is not a power of two"),
        ("--ranks 2 --tp 4", "2 ranks are no whole number of teams of 4"),
        ("--ranks 4 --tp 4", "cannot be divided into 4 parts: its 2 heads of keys and values"),
        ("--ranks 2 --tp 2 --muon 0.02", "(--tp 2) exclude"),
    ] {
        let (text, code) = runs.run("refused", 8, extra);
        assert!(code != Some(0) && text.contains(words), "no '{words}': {text}");
    }
}

#[test]
fn teams_on_three_hosts_give_the_bytes_of_teams_of_threads() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("t")) else { return };
    let layout = "--ranks 4 --tp 2 --zero 3";
    runs.must_run("threads", 8, layout);
    let status = hosts.command(&runs, "hosts", 8, layout).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{status}");
    assert!(runs.weights("hosts") == runs.weights("threads"), "two teams on 3 hosts");
}

/// A checkpoint of four processes, ZeRO 3 in teams of two: 1, 2 and 3 go on from it.
#[test]
fn what_four_processes_write_one_two_and_three_read() {
    let Some(runs) = Runs::prepared() else { return };
    let one = losses(&runs.must_run("one", 12, ""));
    for (i, then) in
        ["", "--launch mpi --ranks 2 --zero 1", "--launch mpi --ranks 3 --zero 3"].iter().enumerate()
    {
        let run = format!("then-{i}");
        runs.must_run(&run, 12, "--launch mpi --ranks 4 --tp 2 --zero 3 --rank-limit 60");
        // As if it had come no further than the checkpoint before the last.
        let newest = runs.home.path().join("store/runs").join(&run).join("checkpoints/00000012");
        std::fs::remove_dir_all(newest).unwrap();
        let went_on = losses(&runs.must_run(&run, 12, then));
        let first = one.len() - went_on.len();
        // One that was due while another was written comes later.
        assert!((5..12).contains(&first), "{run} goes on from step {first}");
        assert_near(&one[first..], &went_on);
    }
}

/// Killed with signal 9 it goes on in another layout, and learns what the undisturbed run does.
#[test]
fn a_killed_team_goes_on_in_another_layout() {
    let Some(runs) = Runs::prepared() else { return };
    let command = |run: &str, steps| runs.command(runs.words(run, steps, "--ranks 4 --tp 2 --zero 3"));
    let (mut begun, steps, run) = runs.begin_midway("killed", command);
    begun.child.kill().unwrap();
    begun.child.wait().unwrap();
    let told = runs.must_run(&run, steps, "--ranks 3 --zero 2");
    assert!(!told.contains("checkpoint_refused"), "{told}");
    let went_on = losses(&told);
    let whole = losses(&runs.must_run("whole", steps, ""));
    let first = whole.len() - went_on.len();
    assert!(first >= 5, "it goes on from a checkpoint: {told}");
    assert_near(&whole[first..first + 20], &went_on[..20]);
}

/// What every product of teams and ZeRO takes is told, and the one chosen that sends least of those that fit: here all do.
#[test]
fn the_planner_chooses_a_product_that_fits() {
    let Some(runs) = Runs::prepared() else { return };
    std::fs::write(runs.home.path().join("config.json"), super::divided::LARGE).unwrap();
    let extra = "--dry-run --launch mpi --ranks 4";
    let told = runs.must_run("large", 3, extra);
    let of_rank = |flags: &str| -> f64 {
        let line = told.lines().find(|line| line.ends_with(&format!(" of each rank with {flags}")));
        let line = line.unwrap_or_else(|| panic!("nothing of {flags}: {told}"));
        assert!(line.contains(" MB "), "{line}");
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1e6
    };
    let [zero, three, both] = ["--zero 0", "--zero 3", "--tp 2 --zero 3"].map(of_rank);
    let [two, four] = ["--tp 2 --zero 0", "--tp 4 --zero 0"].map(of_rank);
    assert!(three < zero && two < zero && four < two && both < two, "{told}");
    assert!(told.contains("choice     --zero 0"), "all of it fits: {told}");
}
