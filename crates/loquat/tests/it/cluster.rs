//! Several processes that are one cluster: over a PostgreSQL, with replicas that die.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::postgres::Postgres;
use crate::support::{Client, PATIENCE, Running, loquat, succeed};
use crate::tiny;

/// `loquat` of a home of its own, over a database that others may share.
fn over(home: &Path, database: &str) -> Command {
    let mut command = loquat(home);
    command.args(["--database", database]);
    command
}

#[test]
fn two_gateways_over_one_postgresql_share_keys_and_a_foreign_store_is_refused() {
    let Some(mut server) = Postgres::start() else { return };
    let database = server.new_database();
    let homes = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let store = tempfile::tempdir().unwrap();
    let store_url = store.path().to_str().unwrap().to_owned();
    let up = |home: &Path| {
        let mut command = over(home, &database);
        command.args(["--store", &store_url, "up", "--port", "0", "--kv-mib", "8"]);
        command
    };
    let mut gateways = homes.each_ref().map(|home| Running::start(&mut up(home.path())));
    let clients = gateways.each_mut().map(Running::client);
    let key = String::from_utf8(
        over(homes[0].path(), &database).args(["key", "create", "k"]).output().unwrap().stdout,
    );
    let key = key.unwrap().trim().to_owned();
    for client in &clients {
        assert_eq!(client.with_key(&key).get("/v1/models").0, 200, "a key made anywhere is good everywhere");
    }

    // Another cluster's database beside this store.
    let other = server.new_database();
    let mut foreign = over(homes[1].path(), &other);
    let refused = foreign.args(["--store", &store_url, "up", "--port", "0"]).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("belongs to another cluster"), "{text}");
    assert!(!text.contains("only-for-this-test"), "a password in an error: {text}");

    // A second store beside this database.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut apart = over(homes[1].path(), &database);
    let refused = apart.arg("--store").arg(elsewhere.path()).args(["up", "--port", "0"]).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains("goes with the store") && text.contains(&store_url),
        "{text}"
    );
    assert!(!elsewhere.path().join("cluster.json").exists(), "the wrong store was marked");

    // Without the database serving goes on and changes are refused, by name.
    server.kill_9();
    for client in &clients {
        assert_eq!(client.with_key(&key).get("/v1/models").0, 200);
        let (status, text) = client.post("/v1/jobs", &json!({"name": "j", "args": ["doctor"]}));
        assert!(status == 503 && text.contains("database cannot be reached"), "{status} {text}");
        assert!(!text.contains("127.0.0.1"), "where it is stands in the log: {text}");
    }
    let refused = over(homes[0].path(), &database).args(["key", "create", "k"]).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("postgres://app@127.0.0.1"), "{text}");
    server.resume();
    let again = over(homes[0].path(), &database).args(["key", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&again.stdout).contains("k"), "what was acknowledged is there");
    for gateway in gateways {
        assert_eq!(gateway.stop(), Some(0));
    }
    drop(succeed(homes[0].path(), &["key", "list"]));
}

/// What clients saw who asked one request after another until told to stop.
#[derive(Debug, Default)]
struct Seen {
    n_whole: usize,
    /// Ended early, and said so: a refusal, an error event or a broken connection.
    failures: Vec<String>,
    /// Ended early and looked whole.
    n_lost: usize,
}

struct Traffic {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Seen>>,
}

impl Traffic {
    fn start(client: &Client, n_clients: usize) -> Traffic {
        let stop = Arc::new(AtomicBool::new(false));
        let ask = |i: usize| {
            let (client, stop) = (client.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut seen = Seen::default();
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let prompt = format!("client {i} asks for the {round}th time");
                    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 40, "ignore_eos": true, "stream": true});
                    match client.try_post("/v1/completions", &body) {
                        Ok((200, text)) if text.contains("\"error\"") => seen.failures.push(text),
                        Ok((200, text)) if text.trim_end().ends_with("[DONE]") => seen.n_whole += 1,
                        Ok((200, _)) => seen.n_lost += 1,
                        Ok((status, text)) => seen.failures.push(format!("{status} {text}")),
                        Err(error) => seen.failures.push(error),
                    }
                }
                seen
            })
        };
        Traffic { clients: (0..n_clients).map(ask).collect(), stop }
    }

    fn end(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Seen::default();
        for client in self.clients {
            let seen = client.join().unwrap();
            all.n_whole += seen.n_whole;
            all.failures.extend(seen.failures);
            all.n_lost += seen.n_lost;
        }
        all
    }
}

/// Processes that serve as replicas of `home`, by name.
fn replica_pids(home: &Path) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let is_ours = words.iter().any(|word| Path::new(&**word) == home) && !words[0].ends_with("sh");
        if let (true, Some(at)) = (is_ours, words.iter().position(|word| word == "--replica")) {
            found.insert(words[at + 1].to_string(), pid);
        }
    }
    found
}

/// Waits until exactly `n` replicas are well, all of `version` if it is given.
fn wait_well(client: &Client, n: usize, version: Option<&str>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let listed = client.get_json("/v1/replicas");
        let all = listed["data"].as_array().unwrap();
        let is_well = |r: &&serde_json::Value| r["state"] == "well";
        let right = all.iter().filter(is_well).filter(|r| version.is_none_or(|v| r["version"] == v)).count();
        if all.len() == n && right == n {
            return;
        }
        assert!(Instant::now() < deadline, "not {n} replicas of {version:?}: {listed:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn replicas_are_replaced_updated_tried_and_scaled_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let models = ["one", "two"].map(|name| tiny::directory(dir.path(), name).display().to_string());
    let mut up = loquat(&home);
    up.args(["up", "--port", "0", "--kv-mib", "8"]).env("LOQUAT_IDLE_SECONDS", "2");
    let mut gateway = Running::start(&mut up);
    let client = gateway.client();
    let flags = ["--", "--threads", "1", "--kv-mib", "8", "--max-num-seqs", "4"];
    let set = |more: &[&str]| succeed(&home, &[&["deploy", "set", "m"], more, &flags].concat());
    set(&["--source", &models[0], "--replicas", "2"]);
    wait_well(&client, 2, Some(&models[0]));
    let canonical = home.canonicalize().unwrap();

    // kill −9 of one of two: what it had fails and says so, the other's go on, and it is replaced.
    let traffic = Traffic::start(&client, 4);
    std::thread::sleep(Duration::from_secs(1));
    let before = replica_pids(&canonical);
    assert_eq!(before.len(), 2, "{before:?}");
    let (name, pid) = before.iter().next().unwrap();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    std::thread::sleep(Duration::from_secs(1));
    wait_well(&client, 2, None);
    let seen = traffic.end();
    assert_eq!(seen.n_lost, 0, "an answer was lost without an error");
    assert!(seen.failures.len() <= 4, "one of each client at most was there: {seen:?}");
    assert!(seen.n_whole > 10, "{seen:?}");
    let after = replica_pids(&canonical);
    assert!(after.len() == 2 && after.contains_key(name) && after[name] != *pid, "{before:?} {after:?}");
    let untouched = before.iter().all(|(other, pid)| other == name || after[other] == *pid);
    assert!(untouched, "{before:?} {after:?}");

    // A new version comes and the old one goes without a failed request.
    let traffic = Traffic::start(&client, 4);
    set(&["--source", &models[1]]);
    wait_well(&client, 2, Some(&models[1]));
    let seen = traffic.end();
    assert!(seen.failures.is_empty() && seen.n_lost == 0 && seen.n_whole > 10, "{seen:?}");

    // A version on trial that fails is rolled back by itself, and nothing of it is left.
    let bad = failing_engine();
    let traffic = Traffic::start(&client, 4);
    succeed(&home, &["deploy", "canary", "m", &bad, "--percent", "30"]);
    let deadline = Instant::now() + PATIENCE;
    while !succeed(&home, &["deploy", "list"]).contains("was rolled back") {
        assert!(Instant::now() < deadline, "{}", succeed(&home, &["deploy", "list"]));
        std::thread::sleep(Duration::from_millis(100));
    }
    let seen = traffic.end();
    assert!(seen.n_lost == 0 && !seen.failures.is_empty(), "{seen:?}");
    let listed = succeed(&home, &["deploy", "list"]);
    assert!(listed.contains("of its answers failed") && listed.contains(&models[1]), "{listed}");
    // Gateways look four times a second.
    wait_well(&client, 2, Some(&models[1]));
    let traffic = Traffic::start(&client, 4);
    std::thread::sleep(Duration::from_secs(1));
    let seen = traffic.end();
    assert!(seen.failures.is_empty(), "the rolled-back version is still asked: {seen:?}");

    // Nobody asks, all go; somebody asks, one comes.
    set(&["--min", "0", "--max", "2"]);
    let deadline = Instant::now() + PATIENCE;
    while !replica_pids(&canonical).is_empty() {
        assert!(Instant::now() < deadline, "{}", succeed(&home, &["deploy", "list"]));
        std::thread::sleep(Duration::from_millis(100));
    }
    let (status, text) =
        client.post("/v1/completions", &json!({"model": "m", "prompt": "x", "max_tokens": 2}));
    assert_eq!(status, 200, "{text}");

    // Without the deployment its replicas end; no process is left.
    succeed(&home, &["deploy", "remove", "m"]);
    let deadline = Instant::now() + PATIENCE;
    while !replica_pids(&canonical).is_empty() {
        assert!(Instant::now() < deadline, "replicas are left");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(gateway.stop(), Some(0));
}

/// An engine that is well as long as nobody asks it for more than a token; returns its address.
fn failing_engine() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream));
        }
    });
    address
}

fn answer(mut stream: TcpStream) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // Bodies here end with the first brace that closes them.
        if text.split_once("\r\n\r\n").is_none_or(|(_, body)| !body.ends_with('}')) {
            continue;
        }
        bytes.clear();
        let status = if text.contains("\"max_tokens\":1,") { "200 OK" } else { "500 Internal Server Error" };
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}");
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}
