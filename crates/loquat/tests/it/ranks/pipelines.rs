//! Ranks that form pipelines, as processes.

use super::*;

/// Of four layers, and an embedding that is the head.
const DEEP: &str = r#"{"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 32}"#;

fn prepared() -> Option<Runs> {
    let runs = Runs::prepared()?;
    std::fs::write(runs.home.path().join("config.json"), DEEP).unwrap();
    Some(runs)
}

#[test]
fn stages_of_processes_train_the_bytes_of_one() {
    let Some(runs) = prepared() else { return };
    runs.must_run("one", 8, "");
    runs.must_run("threads", 8, "--ranks 2 --pp 2");
    assert!(runs.weights("threads") == runs.weights("one"), "two stages of threads");
    for (n_ranks, n_stages) in [(2, 2), (4, 4), (4, 2)] {
        let run = format!("stages-{n_ranks}-{n_stages}");
        let extra = format!("--launch mpi --ranks {n_ranks} --pp {n_stages} --rank-limit 60");
        let told = runs.must_run(&run, 8, &extra);
        assert!(told.contains("\"event\":\"finished\""), "{told}");
        assert!(runs.weights(&run) == runs.weights("one"), "{n_stages} stages, {n_ranks} processes");
    }
    for (extra, words) in [
        ("--ranks 3 --pp 3", "\"3\" is not a power of two"),
        ("--ranks 2 --pp 4", "2 ranks are no whole number of pipelines of 4 stages"),
        ("--ranks 8 --pp 8", "it has 4"),
        ("--ranks 2 --pp 2 --diloco workers=2,every=2", "(--pp 2) exclude workers"),
    ] {
        let (text, code) = runs.run("refused", 8, extra);
        assert!(code != Some(0) && text.contains(words), "no '{words}': {text}");
    }
}

#[test]
fn a_killed_stage_costs_the_steps_since_the_last_checkpoint() {
    let Some(runs) = prepared() else { return };
    let extra = "--launch mpi --ranks 4 --pp 2 --rank-limit 30";
    let (begun, steps, run) =
        runs.begin_midway("killed", |run, steps| runs.command(runs.words(run, steps, extra)));
    let ranks = runs.ranks(&run);
    let victim = ranks[Instant::now().elapsed().subsec_nanos() as usize % ranks.len()].to_string();
    assert!(Command::new("kill").args(["-KILL", &victim]).status().unwrap().success());
    let recovery = begun.recovery();
    let told = begun.end();
    assert!(recovery < Duration::from_secs(30), "{recovery:?}: {told}");
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}

#[test]
fn stages_on_three_hosts_train_the_bytes_of_one() {
    let (Some(runs), Some(hosts)) = (prepared(), Hosts::up("p")) else { return };
    runs.must_run("whole", 8, "");
    let status = hosts.command(&runs, "hosts", 8, "--ranks 4 --pp 4").stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{status}");
    assert!(runs.weights("hosts") == runs.weights("whole"), "4 stages on 3 hosts");
}
