use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::{Error, Local, Store};

use crate::child;
use crate::suite::{self, name, pattern};

#[test]
fn local_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let local: Arc<dyn Store> = Arc::new(Local::open(&dir.path().join("not/yet/there")).unwrap());
    suite::store_suite(&local);
    suite::names_do_not_nest(&local);
}

fn temporary_files(root: &Path) -> usize {
    std::fs::read_dir(root.join(".tmp")).unwrap().count()
}

/// What a writer acknowledged before it was killed is there, and nothing that is there is a part.
#[test]
fn a_killed_writer_leaves_whole_objects() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::new();
    let mut n_swept = 0;
    for round in 0..16u64 {
        let mut command = child::command("put_until_killed", dir.path());
        let mut writer =
            command.env("STORE_TEST_CHILD_FIRST", (round * 1_000_000).to_string()).spawn().unwrap();
        // Killed in the middle of one of the puts after the first few, however slow this machine is at the moment.
        let mut said = BufReader::new(writer.stdout.take().unwrap());
        let mut lines: Vec<String> = (0..2 + round % 5).map(|_| next_line(&mut said).unwrap()).collect();
        std::thread::sleep(Duration::from_micros(round * 1_700));
        writer.kill().unwrap();
        assert!(!writer.wait().unwrap().success(), "the writer ended by itself");
        lines.extend(std::iter::from_fn(|| next_line(&mut said)));
        for (object, number) in lines.iter().filter_map(|line| line.strip_prefix("put ")?.split_once(' ')) {
            acknowledged.insert(object.to_string(), number.parse::<u64>().unwrap());
        }
        n_swept += temporary_files(dir.path());
        let store = Local::open(dir.path()).unwrap();
        assert_eq!(temporary_files(dir.path()), 0, "open left temporary files of a killed writer");
        for meta in store.list("").unwrap() {
            let bytes = store.get(&meta.name).unwrap();
            let number = child::number_of(&bytes);
            assert!(number.is_some(), "{} is visible with {} wrong bytes", meta.name, bytes.len());
            // The put after the last that was acknowledged may have landed too.
            let known = acknowledged.get(meta.name.as_str()).copied();
            assert!(known <= number, "{} went back from {known:?} to {number:?}", meta.name);
        }
        for object in acknowledged.keys() {
            assert!(
                store.head(&name(object)).unwrap().is_some(),
                "{object} was acknowledged and is not there"
            );
        }
    }
    assert!(acknowledged.len() > 20, "the writers hardly wrote: {} objects", acknowledged.len());
    assert!(n_swept > 0, "no writer was killed inside of a put: the test saw nothing");
}

/// A whole line; not one that the kill cut.
fn next_line(said: &mut impl BufRead) -> Option<String> {
    loop {
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        let line = line.strip_suffix('\n')?;
        if line.starts_with("put ") {
            return Some(line.to_string());
        }
    }
}

/// An `open` beside a writer must not take its temporary file for a dead one's.
#[test]
fn a_living_writer_is_not_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    let object = name("slow/object");
    let bytes = pattern(200_000, 1);
    let mut reader = OpensBeside { bytes: &bytes, root: dir.path(), n_opened: 0 };
    store.put_reader(&object, &mut reader, bytes.len() as u64).unwrap();
    assert!(reader.n_opened > 3);
    assert_eq!(store.get(&object).unwrap(), bytes);
    assert_eq!(temporary_files(dir.path()), 0);
}

/// Opens the store again before every piece that it gives.
struct OpensBeside<'a> {
    bytes: &'a [u8],
    root: &'a Path,
    n_opened: usize,
}

impl Read for OpensBeside<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        Local::open(self.root).unwrap();
        assert_eq!(temporary_files(self.root), 1, "an open swept the file that is being written");
        self.n_opened += 1;
        let n = buffer.len().min(40_000);
        self.bytes.read(&mut buffer[..n])
    }
}

/// A write that cannot be finished names its object and leaves nothing; the next, smaller one works.
#[test]
fn a_file_size_limit_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let child = child::command("put_too_much", dir.path());
    // With the signal ignored, a write beyond the limit is an error. The unit is 512 or 1024 bytes.
    let said = run_in("sh", &["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""], &child);
    assert!(said.contains("error: cannot put big/object in file:"), "{said}");
    only_the_small_object_is_there(dir.path());
}

/// The same on a disk that is really full: a tmpfs of 1 MiB in a mount namespace of its own, where that is allowed.
#[test]
fn a_full_disk_leaves_nothing() {
    let may_mount =
        Command::new("unshare").args(["-m", "true"]).output().is_ok_and(|out| out.status.success());
    if !may_mount {
        eprintln!("SKIPPED: no mount namespaces here (`unshare -m`), so a full disk is not tested");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let child = child::command("put_too_much", &dir.path().join("disk"));
    let script = "mkdir $DIR/disk && mount -t tmpfs -o size=1m none $DIR/disk && \"$0\" \"$@\" && cp -a $DIR/disk $DIR/copy";
    let script = script.replace("$DIR", &dir.path().display().to_string());
    let said = run_in("unshare", &["-m", "sh", "-c", &script], &child);
    assert!(said.contains("disk full: big/object"), "{said}");
    only_the_small_object_is_there(&dir.path().join("copy"));
}

/// Runs the child through a program that gets the child's command line after `args`; its output.
fn run_in(program: &str, args: &[&str], child: &Command) -> String {
    let mut command = Command::new(program);
    command.args(args).arg(child.get_program()).args(child.get_args());
    command.envs(child.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn only_the_small_object_is_there(root: &Path) {
    assert_eq!(temporary_files(root), 0);
    let store = Local::open(root).unwrap();
    let names: Vec<_> = store.list("").unwrap().into_iter().map(|meta| meta.name.to_string()).collect();
    assert_eq!(names, ["small"]);
    assert_eq!(store.get(&name("small")).unwrap(), b"goes on");
}

/// A delete removes the directories that it empties; a put that is about to use one of them must not fail.
#[test]
fn deletes_and_puts_in_one_directory_do_not_clash() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                for i in 0..60 {
                    let object = name(&format!("shared/deep/er/{thread}"));
                    store.put(&object, &[i; 10]).unwrap();
                    assert_eq!(store.get(&object).unwrap(), [i; 10]);
                    store.delete(&object).unwrap();
                }
            });
        }
    });
    assert!(started.elapsed() < Duration::from_secs(60));
    assert!(store.list("").unwrap().is_empty());
}

#[test]
fn foreign_files_are_not_objects() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    store.put(&name("a"), b"x").unwrap();
    for foreign in [".DS_Store", "ein Brief.txt", "ä"] {
        std::fs::write(dir.path().join(foreign), b"?").unwrap();
    }
    assert_eq!(store.list("").unwrap().len(), 1);
}

#[test]
fn a_root_that_cannot_be_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a-file");
    std::fs::write(&file, b"x").unwrap();
    for root in [file.clone(), file.join("below")] {
        let error = Local::open(&root).unwrap_err();
        assert!(matches!(error, Error::Open { .. }) && error.to_string().contains("a-file"), "{error}");
    }
}
