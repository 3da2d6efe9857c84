//! Parameters, gradients and what the optimizer remembers, divided among processes.

use std::process::{Command, Stdio};

use super::{Hosts, Runs, path_with};

/// Of 12.9 million parameters, most of them in layers: 52 MB for a vector of them.
pub(super) const LARGE: &str = r#"{"model_type": "llama", "num_hidden_layers": 16, "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 32}"#;

/// A model that needs 1.5 times what a process may have: refused on one, and trained on two, as was planned.
#[test]
fn a_model_too_large_for_one_rank_trains_on_two() {
    let Some(runs) = Runs::prepared() else { return };
    std::fs::write(runs.home.path().join("config.json"), LARGE).unwrap();
    let need = |extra: &str| {
        let told = runs.must_run("large", 3, &format!("--dry-run {extra}"));
        let line = told.lines().rfind(|line| line.contains(" of each rank with --zero 3"));
        let alone = told.lines().find(|line| line.contains(" in all, "));
        let line = line.or(alone).unwrap_or_else(|| panic!("{told}"));
        let mega: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(line.contains(" MB "), "{line}");
        mega * 1e6
    };
    let (alone, of_two) = (need(""), need("--ranks 2 --zero 3 --launch mpi"));
    let limit = alone / 1.5;
    assert!(of_two < limit, "each of two needs {of_two}, the limit is {limit}");
    // RLIMIT_DATA: what a process maps for itself, touched or not.
    let limited = |extra: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -d {}; exec \"$@\"", (limit / 1024.0) as u64), "sh"]);
        command.arg(env!("CARGO_BIN_EXE_loquat")).arg("--home").arg(runs.home.path());
        command.args(runs.words("large", 3, extra)).env("PATH", path_with(&runs.mpi));
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (text, output.status.code())
    };
    let (told, code) = limited("");
    assert!(code == Some(1) && told.contains("are allowed to a process"), "{code:?}: {told}");
    assert!(told.contains("--zero 3 divides it among several --ranks"), "{told}");
    let (told, code) = limited("--launch mpi --ranks 2 --restarts 0");
    assert!(code != Some(0) && told.contains("it would fit with --zero 3"), "{code:?}: {told}");
    assert!(!told.contains("\"event\":\"step\""), "nothing was trained: {told}");
    let (told, code) = limited("--launch mpi --ranks 2 --zero 3 --restarts 0");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("\"event\":\"finished\""), "{told}");
}

/// What is divided travels between machines.
#[test]
fn divided_ranks_on_three_hosts_train_the_same_bytes() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("z")) else { return };
    runs.must_run("whole", 8, "");
    for (n_ranks, stage) in [(2, 1), (4, 2), (8, 3)] {
        let run = format!("hosts-{n_ranks}-{stage}");
        let mut command = hosts.command(&runs, &run, 8, &format!("--ranks {n_ranks} --zero {stage}"));
        let status = command.stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{n_ranks} ranks on 3 hosts, --zero {stage}: {status}");
        assert!(runs.weights(&run) == runs.weights("whole"), "{n_ranks} ranks on 3 hosts, --zero {stage}");
    }
}
