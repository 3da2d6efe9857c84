//! `loquat eval tasks` from the command line.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{output, succeed};
use crate::tiny;

const CHOICES: &str = r#"{"query": "Question: Is water wet?", "choices": ["yes", "no, it is not"], "gold": 0}
{"query": "Question: Is fire cold?", "choices": ["yes", "no"], "gold": 1}
{"query": "Question: Is ice hot?", "choices": ["of course", "no"], "gold": 1}
"#;
const NUMBERS: &str = r#"{"question": "What is 1 + 1?", "answer": "One and one.\n#### 2"}
{"question": "What is 2 + 2?", "answer": "Two and two.\n#### 4"}
"#;

fn reports(home: &Path, args: &[&str]) -> Vec<Value> {
    let text = succeed(home, &[&["eval", "tasks"], args, &["--json"]].concat());
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn tasks_are_scored_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (choices, numbers) = (write("wet.jsonl", CHOICES), write("sums.jsonl", NUMBERS));
    let args = [model.to_str().unwrap(), &choices, &numbers, "--shots", "1", "--seed", "5", "--kv", "f32"];
    let found = reports(&home, &args);
    assert_eq!(found.len(), 2);
    let [wet, sums] = &found[..] else { panic!("{found:?}") };
    let names = |report: &Value| -> Vec<String> {
        report["metrics"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(
        (&wet["task"], &wet["form"], &wet["items"]),
        (&"wet".into(), &"multiple_choice".into(), &3.into())
    );
    assert_eq!(wet["delimiter"], "\nAnswer: ");
    assert_eq!(names(wet), ["acc", "acc_norm", "acc_bytes", "bits_per_byte"]);
    assert_eq!(names(sums), ["exact_match", "flexible_match"]);
    // A random model finds every byte about as surprising as its 49,155 ids make it: log2 of that, over their length.
    let bits = wet["metrics"][3]["value"].as_f64().unwrap();
    assert!((2.0..20.0).contains(&bits), "{bits}");
    let mut again = reports(&home, &args);
    let timeless =
        |reports: &mut Vec<Value>| reports.iter_mut().for_each(|report| report["seconds"] = 0.into());
    let mut found = found.clone();
    timeless(&mut found);
    timeless(&mut again);
    assert_eq!(found, again, "a seed is a seed");
    let table = succeed(&home, &["eval", "tasks", args[0], &choices, "--limit", "2"]);
    assert!(table.lines().count() == 5 && table.contains("acc_norm") && table.contains('±'), "{table}");
}

#[test]
fn bad_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let file = dir.path().join("bad.jsonl");
    let name = file.to_str().unwrap();
    for (text, words) in [
        ("", "it is empty"),
        ("{\"query\": \"q\"", "line 1"),
        ("{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 7}", "field gold"),
    ] {
        fs::write(&file, text).unwrap();
        // The files are looked at before the model is, so there need not be one.
        let output = output(&home, &["eval", "tasks", "nothing", name]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("bad.jsonl") && error.contains(words), "{error}");
    }
}
