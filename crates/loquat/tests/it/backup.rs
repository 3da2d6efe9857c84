//! A live system is copied, wiped and brought back: keys work, files are what they were, and the run that was under way ends
//! with the bytes of one that nothing ever happened to.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::kill::{ingest, weights};
use crate::postgres::Postgres;
use crate::support::{Client, PATIENCE, Running, loquat, succeed};

/// A machine that is quicker needs more of them for its run to be under way when it is copied.
const STEPS: [u32; 3] = [1200, 4800, 19_200];
const SHAPE: &str = "--json --checkpoint-every 10 --rows 1 --micro-batches 8 --context 32 --ranks 1 --config";

fn train(home: &Path, run: &str, steps: u32) -> Vec<String> {
    let words = format!("train --dataset d --run {run} --publish {run} --steps {steps} {SHAPE}");
    // Outside of the home: what a job's words name by its path no backup of the cluster has.
    let config = home.with_extension("json").display().to_string();
    words.split(' ').map(str::to_owned).chain([config]).collect()
}

/// A home, and the database beside it where that is not its own file.
struct Cluster {
    home: PathBuf,
    database: Option<String>,
}

impl Cluster {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = loquat(&self.home);
        command.args(args);
        if let Some(url) = &self.database {
            command.env("LOQUAT_DATABASE", url);
        }
        command
    }

    fn run(&self, args: &[&str]) -> (bool, String) {
        let output = self.command(args).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    fn succeed(&self, args: &[&str]) -> String {
        let (went_well, text) = self.run(args);
        assert!(went_well, "{args:?}: {text}");
        text
    }

    fn refused(&self, args: &[&str], words: &[&str]) {
        let (went_well, text) = self.run(args);
        assert!(!went_well && words.iter().all(|word| text.contains(word)), "{args:?}: {text}");
        assert!(!text.contains("only-for-this-test"), "a password in an error: {text}");
    }

    fn up(&self) -> Running {
        Running::start(&mut self.command(&["up", "--port", "0", "--kv-mib", "8", "--node-memory-gb", "8"]))
    }

    /// Objects of the store by name, but for those that begin with `without`.
    fn objects(&self, without: &str) -> BTreeMap<String, Vec<u8>> {
        let root = self.home.join("store");
        let (mut found, mut dirs) = (BTreeMap::new(), vec![root.clone()]);
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                if name.starts_with('.') || name.starts_with(without) {
                    continue;
                }
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    found.insert(name, fs::read(&path).unwrap());
                }
            }
        }
        found
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks on and on; returns how many answers came.
fn ask((client, model): (&Client, &str), stop: &AtomicBool, n_answers: &AtomicUsize) {
    while !stop.load(Ordering::Relaxed) {
        let answer = client.post_json(
            "/v1/completions",
            &json!({"model": model, "prompt": "The people", "max_tokens": 8, "temperature": 0}),
        );
        assert!(answer["choices"][0]["text"].is_string(), "{answer}");
        n_answers.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_live_system_comes_back_from_sqlite_and_from_postgresql() {
    let directory = tempfile::tempdir().unwrap();
    let server = Postgres::start();
    let url = || server.as_ref().map(Postgres::new_database);
    let place = |name: &str, database: Option<String>| {
        let home = directory.path().join(name);
        fs::create_dir_all(&home).unwrap();
        Cluster { home, database }
    };
    // What was in one kind of database comes back in the other.
    there_and_back(&place("a", None), &place("b", url()), directory.path());
    if server.is_some() {
        there_and_back(&place("c", url()), &place("d", None), directory.path());
    }
}

fn there_and_back(from: &Cluster, to: &Cluster, directory: &Path) {
    let kept = directory.join(format!("kept-{}", from.home.file_name().unwrap().display()));
    let kept = kept.to_str().unwrap();
    if from.database.is_none() {
        from.refused(&["backup", kept], &["holds no cluster"]);
    }
    let Live { run, whole, files, key } = live(from, kept);

    // All is gone.
    fs::remove_dir_all(&from.home).unwrap();
    corrupted_backups_are_refused(to, Path::new(kept));
    let told = to.succeed(&["restore", kept]);
    assert!(told.contains("restored snapshot 20"), "{told}");
    to.refused(&["restore", kept], &["already"]);
    let restored = to.objects("nothing");
    let missing: Vec<&String> = files
        .iter()
        .filter(|(name, bytes)| restored.get(*name) != Some(bytes))
        .map(|(name, _)| name)
        .collect();
    assert!(missing.is_empty(), "not as they were: {missing:?}");
    assert!(!restored.contains_key(&format!("models/{run}/manifest.json")), "it was over when it was copied");

    let mut up = to.up();
    let client = up.client();
    let member = client.with_key(&key);
    assert_eq!(member.get("/v1/models").0, 200, "the key of before");
    wait("the run to end", || {
        let job = member.get_json(&format!("/v1/jobs/{run}"));
        assert_ne!(job["state"], "failed", "{job}");
        job["state"] == "succeeded"
    });
    assert!(weights(&to.home, &run) == whole, "other weights after the restore");
    let logs = fs::read_dir(to.home.join("jobs")).unwrap().map(|entry| entry.unwrap().path());
    let logs: String = logs.map(|path| fs::read_to_string(path).unwrap()).collect();
    let started =
        logs.lines().find(|line| line.contains("\"event\":\"started\"")).expect("it says that it starts");
    assert!(!started.contains("\"step\":0,"), "from its last checkpoint: {started}");
    assert_eq!(up.stop(), Some(0));
}

/// What is known of a cluster that was copied while it trained and answered.
struct Live {
    run: String,
    /// The weights of an undisturbed run.
    whole: Vec<u8>,
    /// What does not change any more of its files.
    files: BTreeMap<String, Vec<u8>>,
    key: String,
}

fn live(cluster: &Cluster, kept: &str) -> Live {
    let home = &cluster.home;
    ingest(home);
    fs::rename(home.join("config.json"), home.with_extension("json")).unwrap();
    let mut up = cluster.up();
    let client = up.client();
    let key = cluster.command(&["key", "create", "k", "--role", "member"]).output().unwrap();
    let key = String::from_utf8(key.stdout).unwrap().trim().to_owned();
    for steps in STEPS {
        let [whole, run] = ["whole", "run"].map(|name| format!("{name}-{steps}"));
        let words = train(home, &whole, steps);
        succeed(home, &words.iter().map(String::as_str).collect::<Vec<_>>());
        if let Some(files) = copied_midway(cluster, (&client, &whole), (&run, steps), kept) {
            let whole = weights(home, &whole);
            assert_eq!(up.stop(), Some(0));
            return Live { run, whole, files, key };
        }
    }
    panic!("every run was over before it was copied");
}

/// `None` where the run was over too soon.
fn copied_midway(
    cluster: &Cluster,
    (client, model): (&Client, &str),
    (run, steps): (&str, u32),
    kept: &str,
) -> Option<BTreeMap<String, Vec<u8>>> {
    wait("the model", || client.get("/v1/models").1.contains(&format!("{model:?}")));
    let words = train(&cluster.home, run, steps);
    let words = ["job", "submit", run, "--"].into_iter().chain(words.iter().map(String::as_str));
    cluster.succeed(&words.collect::<Vec<_>>());
    let checkpoints = cluster.home.join("store/runs").join(run).join("checkpoints");
    let is_whole =
        |entry: std::io::Result<fs::DirEntry>| entry.is_ok_and(|e| e.path().join("manifest.json").exists());
    wait("a checkpoint", || fs::read_dir(&checkpoints).is_ok_and(|mut dir| dir.any(is_whole)));

    let (stop, n_answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let files = std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask((client, model), &stop, &n_answers));
        wait("an answer", || n_answers.load(Ordering::Relaxed) > 0);
        let first = cluster.succeed(&["backup", kept]);
        let files = cluster.objects(&format!("runs/{run}"));
        let seen = n_answers.load(Ordering::Relaxed);
        let second = cluster.succeed(&["backup", kept, "--keep", "1"]);
        assert!(second.contains("older snapshots"), "{second}");
        let new = |told: &str| told.split_once('(').unwrap().1.split_once(" new)").unwrap().0.to_owned();
        assert_ne!(new(&second), new(&first), "{first}{second}");
        wait("an answer after it", || n_answers.load(Ordering::Relaxed) > seen);
        stop.store(true, Ordering::Relaxed);
        asking.join().unwrap();
        files
    });
    let listed = cluster.succeed(&["backup", kept, "--list"]);
    assert_eq!(listed.lines().count(), 1, "{listed}");
    let is_running = client.get_json(&format!("/v1/jobs/{run}"))["state"] == "running";
    is_running.then_some(files)
}

/// The content of the weights is altered, cut and lost, a list is altered, and a schema is newer; each is refused by name,
/// and then the backup is as it was.
fn corrupted_backups_are_refused(to: &Cluster, kept: &Path) {
    let files = |dir: PathBuf| -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries
            .flat_map(|path| {
                if path.is_dir() {
                    fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect()
                } else {
                    vec![path]
                }
            })
            .collect()
    };
    let largest =
        files(kept.join("content")).into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let state = files(kept.join("snapshots"))
        .into_iter()
        .find(|path| path.to_string_lossy().ends_with("state.json"))
        .unwrap();
    let kept = kept.to_str().unwrap();
    let check = |file: &Path, change: &dyn Fn(&mut Vec<u8>), words: &[&str]| {
        let whole = fs::read(file).unwrap();
        let mut changed = whole.clone();
        change(&mut changed);
        fs::write(file, changed).unwrap();
        to.refused(&["restore", kept, "--check"], words);
        to.refused(&["restore", kept], words);
        assert!(!to.home.join("loquat.db").exists(), "a database of a broken backup");
        fs::write(file, whole).unwrap();
        drop(fs::remove_dir_all(to.home.join("store")));
    };
    check(&largest, &|bytes| bytes[100] ^= 1, &["cannot be restored", "checksum", "runs/"]);
    check(&largest, &|bytes| bytes.truncate(100), &["cannot be restored", "100 bytes", "runs/"]);
    check(&state, &|bytes| bytes[50] ^= 1, &["state.json", "checksum"]);
    let hidden = largest.with_extension("away");
    fs::rename(&largest, &hidden).unwrap();
    to.refused(&["restore", kept], &["cannot be restored", "missing", "runs/"]);
    fs::rename(&hidden, &largest).unwrap();
    let told = to.succeed(&["restore", kept, "--check"]);
    assert!(told.contains("whole"), "{told}");
    to.refused(&["restore", kept, "--snapshot", "nothing"], &["no snapshot \"nothing\""]);
    to.refused(&["restore", directory_without(kept)], &["no backup"]);
    // Something of somebody else's is in the way.
    fs::create_dir_all(to.home.join("store")).unwrap();
    fs::write(to.home.join("store/mine"), "x").unwrap();
    to.refused(&["restore", kept], &["not empty", "mine"]);
    fs::remove_file(to.home.join("store/mine")).unwrap();
}

fn directory_without(kept: &str) -> &str {
    kept.rsplit_once('/').unwrap().0
}
