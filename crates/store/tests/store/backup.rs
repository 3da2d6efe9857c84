//! Copies of a store that is written to, and their way back.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use store::{Backup, Bundle, BundleWriter, Error, Local, Progress, Ram, Store};

use crate::suite::{name, pattern};

fn ram() -> Arc<dyn Store> {
    Arc::new(Ram::new())
}

fn local(path: &Path) -> Arc<dyn Store> {
    Arc::new(Local::open(path).unwrap())
}

fn quiet() -> impl FnMut(&Progress) {
    |_| {}
}

fn publish(store: &Arc<dyn Store>, prefix: &str, files: &[(&str, &[u8])]) {
    let mut writer = BundleWriter::new(store, prefix).unwrap();
    for (file, bytes) in files {
        writer.add(file, bytes).unwrap();
    }
    writer.publish("test", json!({})).unwrap();
}

/// Bundles, records beside them, and files of a bundle that is not published yet.
fn fill(store: &Arc<dyn Store>) {
    publish(store, "models/m", &[("a.bin", &pattern(3_000_000, 1)), ("b.bin", b"b"), ("empty.bin", b"")]);
    publish(store, "models/n", &[("a.bin", &pattern(3_000_000, 1))]);
    store.put(&name("runs/r/plan.json"), b"{}").unwrap();
    store.put(&name("runs/r/nothing"), b"").unwrap();
    store.put(&name("datasets/d/ingest/0/record"), &pattern(1000, 2)).unwrap();
    BundleWriter::new(store, "datasets/d").unwrap().add("shard.bin", &pattern(70_000, 3)).unwrap();
}

fn take(backup: &Backup, from: &Arc<dyn Store>, id: &str) -> u64 {
    let copied = backup.copy(from, &mut quiet()).unwrap();
    let snapshot = backup.publish(id, &copied, b"state", json!({"of": id})).unwrap();
    assert_eq!((snapshot.n_objects(), snapshot.bytes()), (copied.n_objects(), copied.bytes()));
    copied.progress.bytes_copied
}

fn same_objects(a: &dyn Store, b: &dyn Store) {
    let (listed, found) = (a.list("").unwrap(), b.list("").unwrap());
    assert_eq!(listed, found);
    for meta in listed {
        assert!(a.get(&meta.name).unwrap() == b.get(&meta.name).unwrap(), "{}", meta.name);
    }
}

/// What every pair of stores must do, in places of its own that are empty.
pub(crate) fn there_and_back(from: &Arc<dyn Store>, place: &Arc<dyn Store>, target: &Arc<dyn Store>) {
    fill(from);
    let backup = Backup::create(place, from, "c1").unwrap();
    // One content of three million bytes under two names, and the empty one.
    let first = take(&backup, from, "1");
    assert!((3_071_001..3_080_000).contains(&first), "{first}");
    assert!(take(&backup, from, "2") == 0, "nothing is new");
    from.put(&name("runs/r/plan.json"), b"{\"new\":1}").unwrap();
    publish(from, "models/n", &[("c.bin", b"other")]);
    let third = take(&backup, from, "3");
    assert!((10..2000).contains(&third), "{third}");

    let backup = Backup::open(place).unwrap();
    assert_eq!(backup.snapshots().unwrap(), ["1", "2", "3"]);
    let newest = backup.snapshot("3").unwrap();
    assert_eq!((newest.state().unwrap(), &newest.meta()["of"]), (b"state".to_vec(), &json!("3")));
    let mut last = Progress::default();
    newest.check(&mut |progress| last = *progress).unwrap();
    assert_eq!((last.n_objects, last.bytes), (last.n_objects_total, last.bytes_total));
    newest.restore_to(target.as_ref(), &mut |progress| last = *progress).unwrap();
    assert_eq!((last.n_objects, last.bytes_copied), (last.n_objects_total, last.bytes_total));
    same_objects(from.as_ref(), target.as_ref());
    // Once more finds all of it there.
    newest.restore_to(target.as_ref(), &mut |progress| last = *progress).unwrap();
    assert_eq!((last.n_objects, last.bytes_copied), (last.n_objects_total, 0));
    // The older one is as it was, and nothing of the newest may be in its way.
    let older = backup.snapshot("1").unwrap();
    let error = older.restore_to(target.as_ref(), &mut quiet()).unwrap_err();
    assert!(matches!(error, Error::NotEmpty { .. }), "{error}");
}

#[test]
fn what_was_there_comes_back_byte_for_byte() {
    let (place, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    there_and_back(&ram(), &local(place.path()), &local(target.path()));
}

#[test]
fn an_old_snapshot_comes_back_as_it_was() {
    let (from, place) = (ram(), tempfile::tempdir().unwrap());
    let backup = Backup::create(&local(place.path()), &from, "c1").unwrap();
    fill(&from);
    take(&backup, &from, "1");
    let before = ram();
    backup.snapshot("1").unwrap().restore_to(before.as_ref(), &mut quiet()).unwrap();
    publish(&from, "models/m", &[("a.bin", b"replaced")]);
    from.delete(&name("runs/r/plan.json")).unwrap();
    take(&backup, &from, "2");
    let again = ram();
    backup.snapshot("1").unwrap().restore_to(again.as_ref(), &mut quiet()).unwrap();
    same_objects(before.as_ref(), again.as_ref());
    // Nothing is missed that the older one has and the newer one has not.
    assert_eq!(backup.prune(1).unwrap(), (1, 3), "b.bin, a manifest and the plan");
    assert_eq!(backup.snapshots().unwrap(), ["2"]);
    backup.snapshot("2").unwrap().check(&mut quiet()).unwrap();
    let target = ram();
    backup.snapshot("2").unwrap().restore_to(target.as_ref(), &mut quiet()).unwrap();
    same_objects(from.as_ref(), target.as_ref());
}

#[test]
fn while_checkpoints_come_and_go_every_snapshot_has_whole_ones() {
    let (source, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = local(source.path());
    let stop = AtomicBool::new(false);
    // Each checkpoint is newer than the one before it, of which two are kept; a model is replaced again and again.
    let write = || {
        for step in 0_u64.. {
            publish(&from, &format!("runs/r/checkpoints/{step:08}"), &[("w", &pattern(200_000, step))]);
            publish(&from, "models/m", &[("w", &pattern(150_000, step)), ("t", &pattern(100, step))]);
            if step >= 2 {
                for meta in from.list(&format!("runs/r/checkpoints/{:08}", step - 2)).unwrap().iter().rev() {
                    from.delete(&meta.name).unwrap();
                }
            }
            if stop.load(Ordering::Relaxed) && step > 5 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    let backup = Backup::create(&local(place.path()), &from, "c1").unwrap();
    std::thread::scope(|scope| {
        let writing = scope.spawn(write);
        while from.head(&name("models/m/manifest.json")).unwrap().is_none() {
            std::thread::yield_now();
        }
        for i in 0..8 {
            take(&backup, &from, &i.to_string());
        }
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap();
    });
    for id in backup.snapshots().unwrap() {
        let target = ram();
        backup.snapshot(&id).unwrap().restore_to(target.as_ref(), &mut quiet()).unwrap();
        let manifests =
            target.list("").unwrap().into_iter().filter(|m| m.name.file_name() == "manifest.json");
        let prefixes: Vec<String> =
            manifests.map(|m| m.name.as_str().strip_suffix("/manifest.json").unwrap().to_owned()).collect();
        assert!(prefixes.iter().any(|prefix| prefix == "models/m"), "{id}: {prefixes:?}");
        assert!(id == "0" || prefixes.len() > 1, "{id} has no checkpoint: {prefixes:?}");
        for prefix in prefixes {
            let bundle = Bundle::open(&target, &prefix).unwrap().unwrap();
            bundle.manifest().files.iter().for_each(|file| drop(bundle.read(&file.name).unwrap()));
        }
    }
}

#[test]
fn an_interrupted_backup_and_an_interrupted_restore_go_on() {
    let (from, place) = (ram(), tempfile::tempdir().unwrap());
    fill(&from);
    let backup = Backup::create(&local(place.path()), &from, "c1").unwrap();
    // Copied, and the end came before it was published: no snapshot, and nothing to copy again.
    backup.copy(&from, &mut quiet()).unwrap();
    assert!(backup.snapshots().unwrap().is_empty());
    assert_eq!(take(&backup, &from, "1"), 0);
    let snapshot = backup.snapshot("1").unwrap();
    let target = ram();
    for meta in from.list("models/m").unwrap().iter().take(2) {
        target.put(&meta.name, &from.get(&meta.name).unwrap()).unwrap();
    }
    snapshot.restore_to(target.as_ref(), &mut quiet()).unwrap();
    same_objects(from.as_ref(), target.as_ref());
}

#[test]
fn a_target_that_holds_something_else_is_left_alone() {
    let (from, place) = (ram(), tempfile::tempdir().unwrap());
    fill(&from);
    let backup = Backup::create(&local(place.path()), &from, "c1").unwrap();
    take(&backup, &from, "1");
    let check = |object: &str, bytes: &[u8]| {
        let target = ram();
        target.put(&name(object), bytes).unwrap();
        let error = backup.snapshot("1").unwrap().restore_to(target.as_ref(), &mut quiet()).unwrap_err();
        assert!(matches!(error, Error::NotEmpty { .. }) && error.to_string().contains(object), "{error}");
        assert_eq!(target.get(&name(object)).unwrap(), bytes);
    };
    check("notes", b"mine");
    check("runs/r/plan.json", b"longer");
    check("runs/r/plan.json", b"[]");
}

/// The content of an object, by the checksum in a manifest or of its bytes.
fn content_of(place: &Arc<dyn Store>, bytes: &[u8]) -> store::ObjectName {
    let found = place.list("content").unwrap().into_iter().map(|meta| meta.name);
    found.into_iter().find(|name| place.get(name).unwrap() == bytes).expect("a content")
}

#[test]
fn a_backup_that_lost_or_altered_something_is_refused_by_the_name_of_the_object() {
    let (from, dir) = (ram(), tempfile::tempdir().unwrap());
    fill(&from);
    let place = local(dir.path());
    let backup = Backup::create(&place, &from, "c1").unwrap();
    take(&backup, &from, "1");
    let bytes = pattern(70_000, 3);
    let content = content_of(&place, &bytes);
    let refused = |words: &[&str], writes_nothing: bool| {
        let snapshot = backup.snapshot("1").unwrap();
        let checked = snapshot.check(&mut quiet()).unwrap_err();
        let target = ram();
        let restored = snapshot.restore_to(target.as_ref(), &mut quiet()).unwrap_err();
        assert_eq!(checked.to_string(), restored.to_string());
        assert!(matches!(restored, Error::BrokenBackup { .. }), "{restored:?}");
        let text = restored.to_string();
        assert!(words.iter().chain(&["datasets/d/", "shard.bin"]).all(|word| text.contains(word)), "{text}");
        assert!(!writes_nothing || target.list("").unwrap().is_empty(), "{:?}", target.list(""));
        let shards = target.list("datasets/d").unwrap();
        assert!(shards.iter().all(|meta| !meta.name.as_str().ends_with("shard.bin")), "{shards:?}");
    };
    place.delete(&content).unwrap();
    refused(&["missing"], true);
    place.put(&content, &bytes[..69_999]).unwrap();
    refused(&["69999", "70000"], true);
    let mut altered = bytes.clone();
    altered[69_999] ^= 1;
    place.put(&content, &altered).unwrap();
    refused(&["checksum"], false);
    place.put(&content, &bytes).unwrap();
    backup.snapshot("1").unwrap().check(&mut quiet()).unwrap();

    // Its lists are a bundle: altered, they are refused by name as well.
    let lists: Vec<_> = place.list("snapshots/1").unwrap().into_iter().map(|meta| meta.name).collect();
    assert_eq!(lists.len(), 3);
    for list in lists {
        let bytes = place.get(&list).unwrap();
        let mut altered = bytes.clone();
        altered[bytes.len() / 2] ^= 1;
        place.put(&list, &altered).unwrap();
        let error = backup.snapshot("1").and_then(|snapshot| snapshot.state()).unwrap_err().to_string();
        assert!(error.contains("snapshots/1/"), "{error}");
        place.put(&list, &bytes).unwrap();
    }
}

#[test]
fn a_store_that_lost_or_altered_something_is_not_copied_in_silence() {
    let (from, dir) = (ram(), tempfile::tempdir().unwrap());
    fill(&from);
    let backup = Backup::create(&local(dir.path()), &from, "c1").unwrap();
    let lost = from.list("models/n").unwrap()[0].name.clone();
    let bytes = from.get(&lost).unwrap();
    let refused = |words: &[&str]| {
        let error = backup.copy(&from, &mut quiet()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Damaged { .. }), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let mut altered = bytes.clone();
    altered[0] ^= 1;
    from.put(&lost, &altered).unwrap();
    // Not seen where its content is known already: the other model's is right. Its length always is.
    from.put(&lost, &bytes[1..]).unwrap();
    refused(&[lost.as_str(), "2999999"]);
    from.delete(&lost).unwrap();
    refused(&["models/n/manifest.json", lost.as_str(), "not there"]);
    from.put(&lost, &bytes).unwrap();
    let shard = from.list("datasets/d").unwrap()[0].name.clone();
    from.put(&shard, &pattern(70_000, 4)).unwrap();
    refused(&[shard.as_str(), "checksum"]);
    from.put(&shard, &pattern(70_000, 3)).unwrap();
    take(&backup, &from, "1");
}

#[test]
fn a_place_that_is_no_backup_of_ours_is_refused_by_name() {
    let (place, dir) = (ram(), tempfile::tempdir().unwrap());
    let (outer, inner) = (local(dir.path()), local(&dir.path().join("backups")));
    let error = Backup::open(&place).unwrap_err().to_string();
    assert!(error.contains("no backup") && error.contains("backup.json"), "{error}");
    place.put(&name("mine"), b"x").unwrap();
    let error = Backup::create(&place, &outer, "c1").unwrap_err().to_string();
    assert!(error.contains("something else"), "{error}");
    place.delete(&name("mine")).unwrap();
    Backup::create(&place, &outer, "c1").unwrap();
    Backup::create(&place, &outer, "c1").unwrap();
    let error = Backup::create(&place, &outer, "c2").unwrap_err();
    assert!(matches!(error, Error::OtherBackup { .. }), "{error}");
    let error = Backup::open(&place).unwrap().snapshot("x").unwrap_err().to_string();
    assert!(error.contains("no snapshot \"x\""), "{error}");
    assert!(Backup::open(&place).unwrap().snapshot("../x").is_err());
    place.put(&name("backup.json"), b"{\"format_version\":9,\"of\":\"c1\",\"more\":1}").unwrap();
    assert!(matches!(Backup::open(&place).unwrap_err(), Error::NewerFormat { version: 9, .. }));

    let error = Backup::create(&inner, &outer, "c1").unwrap_err();
    assert!(matches!(error, Error::BackupInside { .. }), "{error}");
    assert!(inner.list("").unwrap().is_empty(), "a refused place is marked");
    // A neighbour whose name begins alike is outside.
    let beside = local(&dir.path().join("backups-of"));
    Backup::create(&inner, &beside, "c1").unwrap().copy(&beside, &mut quiet()).unwrap();
}
