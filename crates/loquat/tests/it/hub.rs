//! `model pull` against a stand-in for the Hugging Face hub that fails in all the ways a real one does.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::support::{PATIENCE, loquat, succeed, wait_exit};
use crate::tiny;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// What goes wrong, once each, in order; afterwards all goes well.
#[derive(Clone, Debug, PartialEq)]
enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Nothing more comes after so many bytes.
    Stall(usize),
    /// A status with a header.
    Status(u16, &'static str),
    /// One byte is another.
    Wrong,
    /// More bytes than the list says, or than a range has.
    Long,
    /// The whole file although a part was asked for.
    NoRange,
}

/// A request as the stand-in saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    headers: HashMap<String, String>,
}

#[derive(Default)]
struct State {
    files: Vec<(String, Vec<u8>)>,
    faults: Mutex<Vec<Fault>>,
    seen: Mutex<Vec<Seen>>,
    /// Answers the list instead of the true one.
    list: Mutex<Option<String>>,
    /// Where large files are redirected to.
    cdn: Mutex<String>,
}

/// Two servers, one for the hub and one for its large files, as the real one has it.
struct Hub {
    url: String,
    state: Arc<State>,
}

impl Hub {
    fn start(files: Vec<(String, Vec<u8>)>) -> Hub {
        let state = Arc::new(State { files, ..State::default() });
        let url = listen(state.clone(), false);
        *state.cdn.lock().unwrap() = listen(state.clone(), true);
        Hub { url, state }
    }

    fn of_directory(dir: &Path) -> Hub {
        let read =
            |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
        Hub::start(fs::read_dir(dir).unwrap().map(|entry| read(entry.unwrap())).collect())
    }

    fn fail_with(&self, faults: &[Fault]) {
        *self.state.faults.lock().unwrap() = faults.to_vec();
    }

    fn lie_about_the_list(&self, list: &str) {
        *self.state.list.lock().unwrap() = Some(list.to_owned());
    }

    fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    fn pull(&self, home: &Path, args: &[&str]) -> Output {
        self.command(home, args).output().unwrap()
    }

    fn command(&self, home: &Path, args: &[&str]) -> Command {
        let mut command = loquat(home);
        command.args(["model", "pull"]).args(args);
        command.env("HF_ENDPOINT", &self.url).env("HF_TOKEN", "hf_secret");
        command
    }

    #[track_caller]
    fn pull_well(&self, home: &Path, args: &[&str]) -> String {
        let output = self.pull(home, args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn pull_refused(&self, home: &Path, args: &[&str], words: &[&str]) {
        let output = self.pull(home, args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?} succeeded");
        assert!(!error.contains("panicked"), "{error}");
        words.iter().for_each(|word| assert!(error.contains(word), "no '{word}' in: {error}"));
    }
}

fn listen(state: Arc<State>, is_cdn: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Another name for the same machine: another host.
    let host = if is_cdn { "localhost" } else { "127.0.0.1" };
    let url = format!("http://{host}:{}", listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (state, stream) = (state.clone(), stream.unwrap());
            // A client that goes away is what some tests are about.
            std::thread::spawn(move || answer(&state, is_cdn, stream));
        }
    });
    url
}

fn answer(state: &State, is_cdn: bool, mut stream: TcpStream) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let target = first.split(' ').nth(1)?.to_owned();
    let header = |line: String| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned()));
    let headers: HashMap<_, _> =
        lines.map_while(Result::ok).take_while(|l| !l.is_empty()).filter_map(header).collect();
    let path = target.split('?').next()?.to_owned();
    state.seen.lock().unwrap().push(Seen { path: target.clone(), headers: headers.clone() });
    if path.starts_with("/api/models/acme/tiny/revision/") {
        let list = state.list.lock().unwrap().clone().unwrap_or_else(|| list(&state.files));
        return body(&mut stream, 200, &[], list.as_bytes());
    }
    let name = path.strip_prefix(&format!("/acme/tiny/resolve/{COMMIT}/")).or(path.strip_prefix("/cdn/"));
    let file = name.and_then(|name| state.files.iter().find(|(file, _)| file == name));
    let Some((name, bytes)) = file else { return body(&mut stream, 404, &[], b"Not Found") };
    if is_large(bytes) && !is_cdn {
        let location = format!("Location: {}/cdn/{name}?signature=s", state.cdn.lock().unwrap());
        return body(&mut stream, 302, &[&location], b"");
    }
    let range = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let fault = if is_large(bytes) { take_first(&state.faults) } else { None };
    send_file(&mut stream, bytes, range, fault)
}

fn take_first(faults: &Mutex<Vec<Fault>>) -> Option<Fault> {
    let mut faults = faults.lock().unwrap();
    if faults.is_empty() { None } else { Some(faults.remove(0)) }
}

fn is_large(bytes: &[u8]) -> bool {
    bytes.len() > 40_000
}

fn list(files: &[(String, Vec<u8>)]) -> String {
    let sibling = |(name, bytes): &(String, Vec<u8>)| match is_large(bytes) {
        true => json!({"rfilename": name, "size": bytes.len(), "blobId": "0".repeat(40),
            "lfs": {"sha256": hex::encode(Sha256::digest(bytes)), "size": bytes.len(), "pointerSize": 130}}),
        false => {
            let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
            json!({"rfilename": name, "size": bytes.len(), "blobId": hex::encode(Sha1::digest(blob))})
        }
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    json!({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).to_string()
}

fn body(stream: &mut TcpStream, status: u16, headers: &[&str], bytes: &[u8]) -> Option<()> {
    let headers: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
        bytes.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(bytes).ok()
}

fn send_file(stream: &mut TcpStream, bytes: &[u8], range: Option<usize>, fault: Option<Fault>) -> Option<()> {
    let range = range.filter(|_| fault != Some(Fault::NoRange));
    let from = range.unwrap_or(0);
    let (status, content_range) = match range {
        Some(from) => (206, format!("Content-Range: bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        None => (200, "X-Nothing: 1".to_owned()),
    };
    let mut part = bytes[from..].to_vec();
    match fault {
        Some(Fault::Status(status, header)) => return body(stream, status, &[header], b"no"),
        Some(Fault::Wrong) => part[0] ^= 1,
        Some(Fault::Long) => part.extend([7; 1000]),
        Some(Fault::Cut(n) | Fault::Stall(n)) => {
            let head =
                format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{content_range}\r\n\r\n", part.len());
            stream.write_all(head.as_bytes()).ok()?;
            stream.write_all(&part[..n]).ok()?;
            if matches!(fault, Some(Fault::Stall(_))) {
                std::thread::sleep(PATIENCE);
            }
            return Some(());
        }
        Some(Fault::NoRange) | None => {}
    }
    body(stream, status, &[&content_range], &part)
}

fn setup() -> (tempfile::TempDir, std::path::PathBuf, Hub) {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let hub = Hub::of_directory(&tiny::directory(dir.path(), "tiny"));
    (dir, home, hub)
}

#[test]
fn a_model_comes_whole_and_the_key_stays_home() {
    let (_dir, home, hub) = setup();
    let told = hub.pull_well(&home, &["acme/tiny"]);
    assert!(told.contains("tiny:") && told.contains("0123456789ab"), "{told}");
    assert!(succeed(&home, &["model", "show", "tiny"]).contains("llama"));
    assert!(succeed(&home, &["model", "list"]).contains("chat"));
    let seen = hub.seen();
    let on_cdn = |s: &&Seen| s.path.starts_with("/cdn/");
    assert!(seen.iter().any(|s| on_cdn(&s)), "nothing was redirected");
    for request in &seen {
        let key = request.headers.get("authorization").map(String::as_str);
        assert_eq!(key, if on_cdn(&request) { None } else { Some("Bearer hf_secret") }, "{request:?}");
    }
    assert!(fs::read_dir(home.join("downloads")).unwrap().next().is_none(), "left-overs");
}

#[test]
fn downloads_go_on_where_they_broke_off() {
    let (_dir, home, hub) = setup();
    let busy = Fault::Status(429, "Retry-After: 0");
    hub.fail_with(&[Fault::Cut(10_000), busy, Fault::Status(503, "X-A: b"), Fault::Cut(7), Fault::NoRange]);
    hub.pull_well(&home, &["acme/tiny"]);
    let ranges: Vec<String> = hub
        .seen()
        .iter()
        .filter(|s| s.path.starts_with("/cdn/"))
        .filter_map(|s| s.headers.get("range").cloned())
        .collect();
    assert_eq!(ranges, ["bytes=10000-", "bytes=10000-", "bytes=10000-", "bytes=10007-"]);
}

#[test]
fn a_killed_download_goes_on() {
    let (_dir, home, hub) = setup();
    hub.fail_with(&[Fault::Stall(20_000)]);
    let mut child = hub.command(&home, &["acme/tiny"]).spawn().unwrap();
    let started = Instant::now();
    let part = home.join(format!("downloads/acme--tiny-{COMMIT}/model.safetensors.part"));
    while part.metadata().map_or(0, |meta| meta.len()) < 20_000 {
        assert!(started.elapsed() < PATIENCE, "nothing comes");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    assert_eq!(wait_exit(&mut child), None);
    hub.pull_well(&home, &["acme/tiny"]);
    assert!(hub.seen().iter().any(|s| s.headers.get("range").is_some_and(|r| r == "bytes=20000-")));
}

#[test]
fn what_is_wrong_is_not_kept() {
    let (_dir, home, hub) = setup();
    hub.fail_with(&[Fault::Wrong]);
    hub.pull_refused(&home, &["acme/tiny"], &["model.safetensors", "checksum"]);
    hub.fail_with(&[Fault::Long]);
    hub.pull_refused(&home, &["acme/tiny"], &["model.safetensors", "more came"]);
    hub.fail_with(&[Fault::Status(403, "X-A: b")]);
    hub.pull_refused(&home, &["acme/tiny"], &["403", "HF_TOKEN"]);
    hub.fail_with(&[Fault::Status(302, "Location: file:///etc/passwd")]);
    hub.pull_refused(&home, &["acme/tiny"], &["file:///etc/passwd", "refused"]);
    assert_eq!(succeed(&home, &["model", "list"]), "");
    hub.pull_well(&home, &["acme/tiny"]);
}

#[test]
fn bad_names_and_lists_are_refused() {
    let (_dir, home, hub) = setup();
    hub.pull_refused(&home, &["acme/other"], &["404", "acme/other"]);
    hub.pull_refused(&home, &["../../etc"], &["../../etc"]);
    hub.pull_refused(&home, &["acme/tiny:Q4_K_M"], &["GGUF", "acme/tiny"]);
    hub.pull_refused(&home, &["acme/tiny", "--name", "../up"], &["../up"]);
    let one = |name: &str, size: &str| {
        let lfs = format!(r#"{{"sha256":"{}","size":{size}}}"#, "a".repeat(64));
        format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"{name}","size":1,"lfs":{lfs}}}]}}"#)
    };
    for (list, word) in [
        (one("../../x.safetensors", "10"), "../../x"),
        (one("/etc/x.safetensors", "10"), "/etc/x"),
        (one("model.safetensors", "99999999999999"), "99999999999999"),
        (one("model.safetensors", "-1"), "no list"),
        (r#"{"sha":"../..","siblings":[]}"#.to_owned(), "commit"),
        (format!(r#"{{"sha":"{COMMIT}","siblings":[]}}"#), "neither safetensors nor GGUF"),
        (format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"model.safetensors"}}]}}"#), "checksum"),
        ("{".to_owned(), "no list"),
    ] {
        hub.lie_about_the_list(&list);
        hub.pull_refused(&home, &["acme/tiny"], &[word]);
    }
}

#[test]
fn one_gguf_file_is_picked_by_its_kind() {
    let (dir, home, hub) = setup();
    let mut files = Vec::new();
    for kind in ["Q8_0", "Q4_0"] {
        let out = dir.path().join(format!("Tiny-{kind}.gguf"));
        let model = dir.path().join("tiny");
        succeed(&home, &["model", "quantize", model.to_str().unwrap(), kind, out.to_str().unwrap()]);
        files.push((format!("Tiny-{kind}.gguf"), fs::read(out).unwrap()));
    }
    drop(hub);
    let hub = Hub::start(files);
    hub.pull_well(&home, &["acme/tiny:q8_0"]);
    assert!(succeed(&home, &["model", "show", "tiny-q8_0"]).contains("Q8_0"));
    // Without a word for which, the smaller of the usual kinds.
    hub.pull_well(&home, &["acme/tiny", "--name", "small"]);
    assert!(succeed(&home, &["model", "show", "small"]).contains("Q4_0"));
    hub.pull_refused(&home, &["acme/tiny:Q4_K_M"], &["Q4_K_M", "Tiny-Q8_0.gguf"]);
}
