//! Ranks that are slow, or whose memory goes bad: found and named.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::*;

impl Runs {
    /// The process that is this rank of the run.
    fn process(&self, run: &str, rank: usize) -> u32 {
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_it = |pid: &u32| {
            let all = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            all.split(|byte| *byte == 0).any(|one| one == variable.as_bytes())
        };
        self.ranks(run).into_iter().find(is_it).expect("there is no such rank")
    }
}

fn events(told: &str) -> Vec<Value> {
    told.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn a_straggler_is_named_and_measured() {
    let Some(runs) = Runs::prepared() else { return };
    let command = |run: &str, steps| runs.command(runs.words(run, steps, "--launch mpi --ranks 2"));
    let (begun, steps, run) = runs.begin_midway("slow", command);
    let n_before = events(&begun.text()).len();
    // It gets two thirds of the time less, until it is gone.
    let victim = runs.process(&run, 1);
    let script =
        format!("while kill -STOP {victim} 2>&-; do sleep 0.06; kill -CONT {victim} 2>&-; sleep 0.03; done");
    let mut slowing = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let told = begun.end();
    slowing.wait().unwrap();

    let all = events(&told);
    let ranks: Vec<&Value> =
        all[n_before..].iter().map(|event| &event["ranks"]).filter(|r| r.is_object()).collect();
    assert!(ranks.len() > 20, "too few steps to tell: {told}");
    // Not every step falls into a time in which it stands still; those that do make the others wait.
    let waited_for = |rank: u64| {
        let slowest = ranks.iter().filter(|ranks| ranks["slowest"] == rank);
        let seconds = |name: &str| slowest.clone().filter_map(|ranks| ranks[name].as_f64()).sum::<f64>();
        seconds("slowest_seconds") - seconds("median_seconds")
    };
    let (own, other) = (waited_for(1), waited_for(0));
    assert!(own > 0.1 && own > 2.0 * other, "{own} s for rank 1, {other} s for rank 0: {told}");
    let hosts = all.iter().find_map(|event| event["hosts"].as_array()).map(Vec::len);
    assert_eq!(hosts, Some(2), "ranks have hosts: {told}");
    let links = all.iter().filter_map(|event| event["links"].as_array()).flatten();
    let sent = |from: usize| {
        links.clone().filter(|l| l["from"] == from).filter_map(|l| l["bytes"].as_u64()).sum::<u64>()
    };
    assert!(sent(0) > 100_000 && sent(1) > 100_000, "{} and {} bytes", sent(0), sent(1));
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}

#[test]
fn a_rank_whose_memory_goes_bad_is_named_and_all_end_alike() {
    let Some(runs) = Runs::prepared() else { return };
    // Parameters stay as they are to the bit, so that the checkpoint's are what a rank has in its memory.
    let extra = "--lr 1e-30 --launch mpi --ranks 2 --rank-limit 30 --restarts 0";
    let mut begun = runs.begin(runs.command(runs.words("bad", 19_200, extra)), "bad");
    let checkpoints = runs.home.path().join("store/runs/bad/checkpoints");
    let dirs = std::fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path());
    let dir = dirs.filter(|dir| dir.join("manifest.json").exists()).min().unwrap();
    let mut files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let params = files.find(|path| path.to_string_lossy().ends_with("params.f32")).unwrap();
    let params = std::fs::read(params).unwrap();
    assert!(spoil(runs.process("bad", 1), &params[40_000..40_064]) > 0, "the parameters were not found");

    let code = wait_exit(&mut begun.child);
    let told = begun.text();
    assert!(code != Some(0), "{told}");
    let skipped: Vec<Value> = events(&told).into_iter().filter(|e| e["event"] == "skipped").collect();
    assert!(skipped.len() == 10 && skipped.iter().all(|event| event["rank"] == 1), "{told}");
    // (mpirun may end the other one before it says the same.)
    assert!(told.contains("11 in a row: its gradient is not a number"), "{told}");
}

/// Makes the first number of what is found in the process' memory no number; in how many places.
fn spoil(pid: u32, what: &[u8]) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
    let mut n = 0;
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        let mut bytes = vec![0; (end - start).min(1 << 28) as usize];
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue;
        }
        for at in (0..bytes.len().saturating_sub(what.len())).step_by(4) {
            if bytes[at..].starts_with(what) {
                memory.write_all_at(&f32::NAN.to_le_bytes(), start + at as u64).unwrap();
                n += 1;
            }
        }
    }
    n
}
