//! Ranks that compute one model together, as processes.

use super::*;

#[test]
fn teams_of_processes_give_the_bytes_of_teams_of_threads() {
    let Some(runs) = Runs::prepared() else { return };
    let losses = |told: &str| -> Vec<f64> {
        let events = told.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        events.filter_map(|event| event["loss"].as_f64()).collect()
    };
    let one = losses(&runs.must_run("one", 8, ""));
    let threads = losses(&runs.must_run("threads", 8, "--ranks 2 --tp 2"));
    assert_eq!(one.len(), 8);
    for (a, b) in one.iter().zip(&threads) {
        assert!((a - b).abs() < 1e-4 * a, "{one:?} {threads:?}");
    }
    runs.must_run("processes", 8, "--launch mpi --ranks 4 --tp 2 --rank-limit 60");
    assert!(runs.weights("processes") == runs.weights("threads"), "two teams of two processes");
    for (extra, words) in [
        ("--ranks 2 --tp 3", "\"3\" is not a power of two"),
        ("--ranks 2 --tp 4", "2 ranks are no whole number of teams of 4"),
        ("--ranks 2 --tp 2 --zero 1", "(--tp 2) exclude"),
        ("--ranks 4 --tp 4", "cannot be divided into 4 parts: its 2 heads of keys and values"),
    ] {
        let (text, code) = runs.run("refused", 8, extra);
        assert!(code != Some(0) && text.contains(words), "no '{words}': {text}");
    }
}
