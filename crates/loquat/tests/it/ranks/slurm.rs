//! Ranks of a job that Slurm starts on several of its nodes.

use super::*;
use crate::slurm::{Site, Slurm};
use crate::support::Running;

/// The node of Slurm on which a process runs.
fn node_of(pid: u32) -> String {
    let all = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let words = all.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    words
        .filter_map(|word| word.strip_prefix("SLURMD_NODENAME=").map(str::to_owned))
        .next()
        .unwrap_or_default()
}

#[test]
fn ranks_on_two_nodes_of_slurm_lose_one_and_end_with_the_same_bytes() {
    let (Some(runs), Some(slurm)) = (Runs::prepared(), Slurm::start(Site::loopback())) else { return };
    let mut up = loquat(runs.home.path());
    up.args(["up", "--launcher", "slurm", "--kv-mib", "8", "--port", "0"]).env("SLURM_CONF", slurm.conf());
    let mut up = Running::start(up.env("PATH", path_with(&runs.mpi)));
    up.client();
    // What a person would type: submit, and look on.
    let submit_and_look = r#"program=$1 home=$2 name=$3; shift 3
        "$program" --home "$home" job submit "$name" --cores 2 --ranks 3 -- "$@" &&
        exec "$program" --home "$home" job logs -f "$name""#;
    let job = |run: &str, steps: u64| {
        let mut command = Command::new("sh");
        command
            .args(["-c", submit_and_look, "sh", env!("CARGO_BIN_EXE_loquat")])
            .arg(runs.home.path())
            .arg(run);
        command.args(runs.words(run, steps, "--launch mpi --ranks 3 --rank-limit 30"));
        command
    };
    let (begun, steps, run) = runs.begin_midway("slurm", job);
    let ranks = runs.ranks(&run);
    let mut nodes: Vec<String> = ranks.iter().map(|pid| node_of(*pid)).collect();
    nodes.sort();
    assert_eq!(nodes, ["n1", "n1", "n2"], "{}", begun.text());
    assert!(Command::new("kill").args(["-KILL", &ranks[1].to_string()]).status().unwrap().success());
    let recovery = begun.recovery();
    let told = begun.end();
    assert!(recovery < Duration::from_secs(30), "{recovery:?}: {told}");
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
    assert_eq!(up.stop(), Some(0));
}
