//! Ranks in several pods: network namespaces with the variables that the manifest and Kubernetes set, without ssh. They find
//! each other by the store.

use super::*;

/// A pod of the group, on host `index + 1`.
fn pod(hosts: &Hosts, runs: &Runs, (group, index): (&str, usize), words: &[String]) -> Command {
    let enter = hosts.enter(index + 1);
    let mut command = Command::new(&enter[0]);
    command
        .args(&enter[1..])
        .arg(env!("CARGO_BIN_EXE_loquat"))
        .arg("--home")
        .arg(runs.home.path())
        .args(words);
    for option in [
        "--launch",
        "mpi",
        "--mpirun-option=--mca btl tcp,self",
        "--mpirun-option=--mca btl_tcp_if_include 198.18.7.0/24",
        "--mpirun-option=--prtemca prte_if_include 198.18.7.0/24",
    ] {
        command.arg(option);
    }
    command.env("PATH", path_with(&runs.mpi)).stdin(Stdio::null());
    command.env("LOQUAT_PODS", "3").env("JOB_COMPLETION_INDEX", index.to_string());
    command.env("LOQUAT_POD_GROUP", group).env("LOQUAT_ADDRESS", address(index + 1));
    command
}

#[test]
fn pods_of_one_job_train_together_and_save_when_they_are_asked_to_stop() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("p")) else { return };
    let steps = 400;
    runs.must_run("whole", steps, "");
    let words = runs.words("pods", steps, "--ranks 3");
    let start = |group: &str| -> Vec<Child> {
        let spawn = |index| {
            let out = std::fs::File::create(runs.home.path().join(format!("{group}-{index}.out"))).unwrap();
            let mut command = pod(&hosts, &runs, (group, index), &words);
            // The others may start before the first, which waits for the last.
            if index != 1 {
                std::thread::sleep(Duration::from_millis(300));
            }
            command.stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap()
        };
        [1, 0, 2].map(spawn).into()
    };
    let said = |group: &str| -> String {
        let of = |i| std::fs::read_to_string(runs.home.path().join(format!("{group}-{i}.out"))).unwrap();
        (0..3).map(of).collect()
    };

    let mut first = start("one");
    // Far before its end: ranks that take turns on two cores make some tens of steps a second.
    let deadline = Instant::now() + PATIENCE;
    let checkpoints = runs.home.path().join("store/runs/pods/checkpoints");
    while !std::fs::read_dir(&checkpoints).is_ok_and(|mut dir| dir.next().is_some()) {
        assert!(Instant::now() < deadline, "no checkpoint came: {}", said("one"));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(runs.ranks("pods").len(), 3, "{}", said("one"));
    // As Kubernetes asks all pods of a Job that is suspended.
    for child in &first {
        // nsenter, unshare and the shell have become what they start: it is one process.
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
    let codes: Vec<_> = first.iter_mut().map(wait_exit).collect();
    assert_eq!(codes, [Some(75); 3], "{}", said("one"));

    // The next attempt goes on; none of its pods may be of the first.
    let mut second = start("two");
    let codes: Vec<_> = second.iter_mut().map(wait_exit).collect();
    assert_eq!(codes, [Some(0); 3], "{}", said("two"));
    assert!(runs.weights("pods") == runs.weights("whole"), "other weights: {}", said("two"));
    let told = said("two");
    let started =
        told.lines().find(|line| line.contains("\"event\":\"started\"")).expect("it says that it starts");
    assert!(started.contains("\"n_ranks\":3") && !started.contains("\"step\":0,"), "{started}");
    // Nothing of the keys is left.
    let left = std::fs::read_dir(runs.home.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with("pods-")));
    assert!(!runs.home.path().join("store/runs/pods/pods").exists(), "keys are left in the store");
}
