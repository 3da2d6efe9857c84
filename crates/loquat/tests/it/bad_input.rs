//! Bad input on the command line: an error that names the thing, a failing exit code, nothing lost.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use crate::support::{output, speeches, succeed};

/// The command must fail, and say all of `words`.
fn check(home: &Path, args: &[&str], words: &[&str]) {
    let output = output(home, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{args:?} succeeded");
    assert!(output.status.code().is_some(), "{args:?} was killed: {error}");
    assert!(!error.contains("panicked"), "{args:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{args:?} does not say '{word}':\n{error}");
    }
}

#[test]
fn bad_text_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let ingest = |path: &str, words: &[&str]| check(&home, &["ingest", "--name", "x", path], words);
    ingest("/nowhere/at/all.txt", &["/nowhere/at/all.txt"]);
    ingest(&file("empty.txt", b""), &[]);
    ingest(&file("binary.txt", b"\x00\xff\xfe\x80 not text"), &["binary.txt"]);
    ingest(&file("cut.jsonl.gz", &[0x1f, 0x8b, 8, 0, 0, 0]), &["cut.jsonl.gz"]);
    ingest(&file("bad.jsonl", b"{\"text\":\"fine\"}\n{\"text\":"), &["bad.jsonl", "2"]);
    ingest(&file("cut.parquet", b"PAR1 and no more"), &["cut.parquet"]);
    let one = file("one.txt", b"A first short document.\n\nA second one.");
    ingest(&one, &["one.txt", "--separator"]);
    let lines = ["--separator", "", "--vocab", "260", "--validation", "0.5"];
    succeed(&home, &[&["ingest", "--name", "two", &one], &lines[..]].concat());
    check(&home, &["ingest", "--name", "../x", &file("a.txt", b"some text")], &["../x"]);
}

#[test]
fn bad_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let serve = |path: &Path, words: &[&str]| {
        check(&home, &["serve", path.to_str().unwrap(), "--port", "0"], words);
    };
    serve(Path::new("/nowhere.gguf"), &["/nowhere.gguf"]);
    let gguf = dir.path().join("cut.gguf");
    fs::write(&gguf, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\0\0\0\0\0\0\0\0").unwrap();
    serve(&gguf, &["cut.gguf"]);
    let newer = dir.path().join("newer");
    fs::create_dir(&newer).unwrap();
    fs::write(newer.join("config.json"), r#"{"model_type":"llama","loquat_format_version":99}"#).unwrap();
    serve(&newer, &["version 99"]);
    fs::write(newer.join("config.json"), r#"{"model_type":"mystery"}"#).unwrap();
    serve(&newer, &["model_type", "mystery"]);
}

#[test]
fn bad_runs_and_ports_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    check(home, &["train", "--run", "r", "--dataset", "absent", "--steps", "1"], &["absent"]);
    let text = speeches();
    succeed(
        home,
        &["ingest", "--name", "d", "--vocab", "300", "--validation", "0.2", text.to_str().unwrap()],
    );
    let train = ["train", "--run", "r", "--dataset", "d", "--steps", "1"];
    check(home, &[&train[..], &["--ranks", "300"]].concat(), &["300 ranks"]);
    check(home, &[&train[..], &["--rows", "0"]].concat(), &["rows"]);
    check(home, &["train", "--run", "../../r", "--dataset", "d", "--steps", "1"], &["../../r"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    check(home, &["up", "--port", &port], &[&port]);
    check(home, &["job", "cancel", "nothing"], &["nothing"]);
}
