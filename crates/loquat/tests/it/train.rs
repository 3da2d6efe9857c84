//! `loquat train` and `loquat ingest` as people type them: chats, mixtures, presets, dry runs.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{output, speeches, succeed};
use crate::tiny;

const SMALL: &[&str] = &["--rows", "2", "--micro-batches", "2", "--context", "64"];

fn ingest_text(home: &Path, name: &str, vocab: &str) {
    let text = speeches();
    succeed(
        home,
        &["ingest", "--name", name, "--vocab", vocab, "--validation", "0.2", text.to_str().unwrap()],
    );
}

/// What a failing command says.
fn refused(home: &Path, args: &[&str], words: &[&str]) {
    let output = output(home, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !error.contains("panicked"), "{args:?}: {error}");
    words.iter().for_each(|word| assert!(error.contains(word), "{args:?} does not say '{word}':\n{error}"));
}

#[test]
fn from_text_to_a_model_that_learned_chats() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    ingest_text(home, "d", "512");
    let base = ["train", "--run", "base", "--dataset", "d", "--publish", "base", "--steps", "3", "--json"];
    succeed(home, &[&base[..], SMALL].concat());

    let chats = dir.path().join("chats.jsonl");
    let chat = |i: usize| json!({"prompt": format!("Is {i} even?"), "response": if i.is_multiple_of(2) { "Yes" } else { "No" }});
    fs::write(&chats, (0..60).map(|i| chat(i).to_string() + "\n").collect::<String>()).unwrap();
    let ingest = ["ingest", "--name", "chats", "--tokenizer", "base", "--validation", "0.1"];
    let told = succeed(home, &[&ingest[..], &["--chats", chats.to_str().unwrap()]].concat());
    assert!(told.contains("chats: ") && told.contains("% of the tokens are learned"), "{told}");

    let tune =
        ["train", "--run", "tuned", "--dataset", "chats=3", "d=1", "--init", "base", "--publish", "tuned"];
    let told =
        succeed(home, &[&tune[..], SMALL, &["--steps", "4", "--muon", "--lr", "1e-3", "--json"]].concat());
    let events: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last_eval = events.iter().rfind(|event| event["event"] == "eval").unwrap();
    let names: Vec<&str> =
        last_eval["parts"].as_array().unwrap().iter().map(|p| p["dataset"].as_str().unwrap()).collect();
    assert_eq!(names, ["chats", "d"]);
    assert!(events.iter().any(|event| event["event"] == "finished" && event["model"] == "tuned"), "{told}");

    let told = succeed(home, &["train", "--resume", "tuned", "--json"]);
    assert!(
        told.contains("\"started\"") && told.contains("\"finished\"") && !told.contains("\"skipped\""),
        "{told}"
    );
    refused(home, &["train", "--resume", "nobody"], &["nobody", "does not exist"]);

    ingest_text(home, "other", "300");
    refused(
        home,
        &["train", "--run", "bad", "--dataset", "other", "--init", "base", "--steps", "1"],
        &["other", "base", "tokenizer"],
    );
}

/// A small model learns from one that was trained here, and goes on without it; one of other ids cannot teach.
#[test]
fn a_model_learns_from_another() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    ingest_text(home, "d", "512");
    let large = ["train", "--run", "large", "--dataset", "d", "--publish", "large", "--steps", "3", "--json"];
    succeed(home, &[&large[..], SMALL].concat());
    let learn = ["train", "--run", "learner", "--dataset", "d", "--steps", "3", "--distill", "large"];
    let learn = [&learn[..], SMALL, &["--distill-weight", "0.7", "--distill-temperature", "2"]].concat();
    let told = succeed(home, &[&learn[..], &["--dry-run"]].concat());
    assert!(
        ["teacher    large: ", " the teacher\n", "the teacher's activations"]
            .iter()
            .all(|t| told.contains(t)),
        "{told}"
    );
    let told = succeed(home, &[&learn[..], &["--json", "--publish", "learner"]].concat());
    assert!(told.contains("\"finished\""), "{told}");
    // All that a run needs lies in it.
    fs::remove_dir_all(home.join("store/models/large")).unwrap();
    assert!(succeed(home, &["train", "--resume", "learner", "--json"]).contains("\"finished\""));

    ingest_text(home, "other", "300");
    let other = ["train", "--run", "bad", "--dataset", "other", "--steps", "1", "--distill", "learner"];
    refused(home, &other, &["other", "learner", "tokenizer"]);
    let alone = ["train", "--run", "bad", "--dataset", "d", "--steps", "1", "--distill-weight", "0.5"];
    refused(home, &alone, &["--distill"]);
    let much = ["train", "--run", "bad", "--dataset", "d", "--distill", "learner", "--distill-weight", "2"];
    refused(home, &much, &["distill.weight"]);
}

#[test]
fn bad_chats_and_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    ingest_text(home, "d", "512");
    let base = ["train", "--run", "base", "--dataset", "d", "--publish", "base", "--steps", "1", "--json"];
    succeed(home, &[&base[..], SMALL].concat());
    let file = dir.path().join("bad.jsonl");
    fs::write(&file, "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"a\"}\n").unwrap();
    let path = file.to_str().unwrap();
    let ingest = ["ingest", "--name", "c", "--tokenizer", "base", "--validation", "0"];
    refused(home, &[&ingest[..], &["--chats", path]].concat(), &["bad.jsonl", "line 2", "prompt"]);
    refused(home, &[&ingest[..], &["--chats=alpaca", path]].concat(), &["line 1", "instruction"]);
    refused(home, &[&ingest[..], &["--chats=klingon", path]].concat(), &["klingon", "sharegpt"]);
    let told = succeed(home, &[&ingest[..], &["--skip-bad-rows", "--chats=prompt", path]].concat());
    assert!(told.contains("1 rows could not be read"), "{told}");
    refused(home, &["train", "--run", "r", "--dataset", "d=much", "--steps", "1"], &["d=much"]);
    refused(home, &["train", "--run", "r", "--dataset", "d=0", "--steps", "1"], &["weight"]);
    refused(home, &["train", "--run", "r", "--dataset", "d", "d", "--steps", "1"], &["twice"]);
}

/// What people change between two starts of one run, and what is wrong with a model they start from.
#[test]
fn changed_flags_and_broken_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    ingest_text(home, "d", "512");
    let run = ["train", "--run", "r", "--dataset", "d", "--steps", "2", "--json"];
    succeed(home, &[&run[..], SMALL].concat());
    succeed(home, &[&run[..], SMALL, &["--threads", "1", "--recompute"]].concat());
    for (changed, field) in [
        (&["--lr", "0.5"][..], "schedule.lr_peak"),
        (&["--seed", "7"], "seed"),
        (&["--preset", "small"], "model."),
        (&["--muon"], "muon"),
    ] {
        refused(home, &[&run[..], SMALL, changed].concat(), &["the run r was planned with another", field]);
    }
    refused(home, &[&run[..], &SMALL[2..]].concat(), &["rows"]);

    // Out of memory is refused on resume, too, with the numbers.
    let plan = home.join("store/runs/r/plan.json");
    let text = fs::read_to_string(&plan).unwrap();
    let mut huge: Value = serde_json::from_str(&text).unwrap();
    huge["model"]["num_hidden_layers"] = 1000.into();
    huge["model"]["intermediate_size"] = 65_536.into();
    fs::create_dir_all(home.join("store/runs/huge")).unwrap();
    fs::write(home.join("store/runs/huge/plan.json"), huge.to_string()).unwrap();
    refused(home, &["train", "--resume", "huge"], &["the run needs", "are free", "optimizer"]);

    // A weight that is no number.
    let base = tiny::directory(dir.path(), "broken");
    let tensors = base.join("model.safetensors");
    let mut bytes = fs::read(&tensors).unwrap();
    let n = bytes.len();
    bytes[n - 2..].copy_from_slice(&[0xc0, 0x7f]);
    fs::write(&tensors, bytes).unwrap();
    let ingest = ["ingest", "--name", "own", "--tokenizer", base.to_str().unwrap(), "--validation", "0.2"];
    succeed(home, &[&ingest[..], &[speeches().to_str().unwrap()]].concat());
    let start =
        ["train", "--run", "nan", "--dataset", "own", "--steps", "1", "--init", base.to_str().unwrap()];
    refused(home, &[&start[..], SMALL].concat(), &["broken", "not a number", "model."]);

    // Data of one line, and chats that teach nothing.
    let one = dir.path().join("one.txt");
    fs::write(&one, "One line.").unwrap();
    succeed(home, &["ingest", "--name", "one", "--vocab", "260", "--validation", "0", one.to_str().unwrap()]);
    refused(home, &["train", "--run", "one", "--dataset", "one", "--steps", "1"], &["one", "tokens"]);
    let mute = dir.path().join("mute.jsonl");
    fs::write(&mute, "{\"messages\": [{\"role\": \"user\", \"content\": \"Anybody?\"}]}\n").unwrap();
    let ingest = ["ingest", "--name", "mute", "--tokenizer", base.to_str().unwrap(), "--validation", "0"];
    refused(home, &[&ingest[..], &["--chats", mute.to_str().unwrap()]].concat(), &["mute", "learn"]);
}

#[test]
fn a_dry_run_tells_what_a_run_would_take() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    ingest_text(home, "d", "512");
    let dry = ["train", "--dry-run", "--run", "r", "--dataset", "d", "--steps", "100"];
    let told = succeed(home, &[&dry[..], SMALL].concat());
    for word in
        ["parameters 2.", "100 steps", "epochs", "optimizer", "FLOP a step", "tokens/s", "measured", "layout"]
    {
        assert!(told.contains(word), "no '{word}': {told}");
    }
    assert!(!home.join("store/runs").exists(), "a dry run leaves nothing");
    let line = |told: &str, of: &str| {
        let line = told.lines().find(|line| line.starts_with("memory") && line.ends_with(of));
        line.unwrap_or_else(|| panic!("no memory of {of}: {told}")).to_owned()
    };
    let less = succeed(home, &[&dry[..], SMALL, &["--recompute"]].concat());
    let recomputed = line(&told, "activations with --recompute");
    assert_eq!(line(&less, "activations"), recomputed.replace(" with --recompute", ""));
    assert_ne!(line(&told, "activations"), line(&less, "activations"));
    let huge = ["--preset", "llama-70b", "--rows", "1"];
    refused(home, &[&dry[..], &huge].concat(), &["the run needs", "optimizer", "are free", "--recompute"]);
    let run = ["train", "--run", "r", "--dataset", "d", "--steps", "1"];
    refused(home, &[&run[..], &huge].concat(), &["the run needs", "parameters", "are free"]);
    assert!(!home.join("store/runs").exists(), "refused before anything was written");

    let cluster = dir.path().join("cluster.toml");
    fs::write(
        &cluster,
        "nodes = 4\naccelerators = 8\ntflops = 989\nmemory_gb = 80\nnode_gb_per_s = 450\nnetwork_gb_per_s = 50\n",
    )
    .unwrap();
    let on = ["--micro-batches", "64", "--context", "4096", "--cluster", cluster.to_str().unwrap()];
    let told = succeed(home, &[&dry[..], &huge, &on].concat());
    for word in ["68.46 billion", "4 nodes of 8", "tensor", "pipeline", "ZeRO", "Only planned"] {
        assert!(told.contains(word), "no '{word}': {told}");
    }
}
