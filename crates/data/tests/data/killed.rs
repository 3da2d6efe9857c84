//! An ingest that is killed again and again ends with the bytes of one that was not.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use data::{IngestStage, ingest};
use store::{Local, Store};

use crate::ingest::{contents, corpus, plan, run};

const ROOT: &str = "DATA_TEST_CHILD_ROOT";
const INPUT: &str = "DATA_TEST_CHILD_INPUT";

/// Not a test but the work of the process that is killed: says a line for every report of progress.
#[test]
fn child_ingests() {
    let (Some(root), Some(input)) = (std::env::var_os(ROOT), std::env::var_os(INPUT)) else { return };
    let store: Arc<dyn Store> = Arc::new(Local::open(Path::new(&root)).unwrap());
    println!();
    let done = ingest(&plan(vec![input.into()]), &store, &mut |progress| println!("at {:?}", progress.stage));
    println!("done: {:?}", done.map(|info| info.plan_sha256));
}

#[test]
fn a_killed_ingest_resumes_to_the_same_bytes() {
    let inputs = corpus(60);
    let corpus = inputs.path().join("corpus");
    let dir = tempfile::tempdir().unwrap();
    let open = |root: &str| Arc::new(Local::open(&dir.path().join(root)).unwrap()) as Arc<dyn Store>;
    let whole = open("whole");
    run(&plan(vec![corpus.clone()]), &whole).unwrap();

    let mut killed_in = Vec::new();
    for round in 0..60u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::child_ingests", "--nocapture"])
            .env(ROOT, dir.path().join("killed"))
            .env(INPUT, &corpus)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Reports come one a file, then one a part; each round is allowed a few that are new, and a moment more.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let is_past = |line: &&String| line.as_str() == "at Tokens" || line.starts_with("done");
        let mut said: Vec<String> = Vec::new();
        if round < 3 {
            said.extend(
                lines.by_ref().skip_while(|line| !line.starts_with("at")).take(10 + 10 * round as usize),
            );
        } else {
            let mut n_parts = 0;
            said.extend(lines.by_ref().take_while(|line| {
                n_parts += u64::from(is_past(&line));
                !line.starts_with("done") && n_parts < 2 + round % 4
            }));
        }
        std::thread::sleep(Duration::from_micros(round * 353 % 4000));
        child.kill().unwrap();
        said.extend(lines);
        let status = child.wait().unwrap();
        if said.iter().any(|line| line.starts_with("done")) || status.success() {
            break;
        }
        killed_in.push(said.last().cloned().unwrap_or_default());
    }
    let n_in_tokens = killed_in.iter().filter(|at| *at == "at Tokens").count();
    assert!(n_in_tokens >= 3, "killed only in {killed_in:?}");

    let killed = open("killed");
    let mut stages = Vec::new();
    ingest(&plan(vec![corpus]), &killed, &mut |progress| stages.push(progress.stage)).unwrap();
    assert!(!stages.contains(&IngestStage::Scan), "the first pass was done again: {stages:?}");
    let (killed, whole) = (contents(&killed), contents(&whole));
    assert!(killed.keys().eq(whole.keys()), "{:?}\n{:?}", killed.keys(), whole.keys());
    assert!(killed == whole, "the bytes differ");
}
