use std::sync::Arc;

use serde_json::json;
use store::{Bundle, BundleWriter, Error, FileEntry, Local, MANIFEST_VERSION, Ram, Store};

use crate::suite::{name, pattern};

fn ram() -> Arc<dyn Store> {
    Arc::new(Ram::new())
}

fn publish(store: &Arc<dyn Store>, files: &[(&str, &[u8])], meta: serde_json::Value) {
    let mut writer = BundleWriter::new(store, "models/m").unwrap();
    for (file, bytes) in files {
        writer.add(file, bytes).unwrap();
    }
    writer.publish("model", meta).unwrap();
}

fn open(store: &Arc<dyn Store>) -> Bundle {
    Bundle::open(store, "models/m").unwrap().unwrap()
}

fn object_of(store: &Arc<dyn Store>, file: &str) -> store::ObjectName {
    let metas = store.list("models/m").unwrap();
    metas.into_iter().map(|meta| meta.name).find(|name| name.as_str().ends_with(file)).unwrap()
}

#[test]
fn nothing_is_seen_before_it_is_published() {
    let store = ram();
    let mut writer = BundleWriter::new(&store, "models/m").unwrap();
    writer.add("a.bin", b"aaa").unwrap();
    assert!(Bundle::open(&store, "models/m").unwrap().is_none());
    let meta = json!({"x": 0.1, "y": [1, "ü \u{1f600}", null], "z": 1e300});
    writer.publish("model", meta.clone()).unwrap();
    let bundle = open(&store);
    assert_eq!(bundle.manifest().meta, meta);
    assert_eq!(
        (bundle.manifest().kind.as_str(), bundle.manifest().format_version),
        ("model", MANIFEST_VERSION)
    );
    // FIPS 180-4 hashes are checked against another program's: printf aaa | sha256sum.
    let sha256 = "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0";
    assert_eq!(
        bundle.manifest().files,
        [FileEntry { name: "a.bin".into(), bytes: 3, sha256: sha256.into() }]
    );
    assert_eq!(bundle.read("a.bin").unwrap(), b"aaa");
    assert!(matches!(bundle.read("b.bin"), Err(Error::NoFile { .. })));
}

#[test]
fn publishing_again_replaces_and_leaves_nothing_behind() {
    let store = ram();
    publish(&store, &[("a.bin", b"old"), ("same.bin", b"same"), ("gone.bin", b"gone")], json!(1));
    // A neighbour's objects, and those that are no files of a bundle, are not ours to remove.
    let others = ["models/m2/x", "models/m/sub/state", "models/m/notes"].map(name);
    others.iter().for_each(|other| store.put(other, b"x").unwrap());
    // A writer that was killed before it published.
    BundleWriter::new(&store, "models/m").unwrap().add("stray.bin", b"stray").unwrap();
    let old = open(&store);
    publish(&store, &[("a.bin", b"new"), ("same.bin", b"same")], json!(2));
    let new = open(&store);
    assert_eq!(
        (new.read("a.bin").unwrap(), new.read("same.bin").unwrap()),
        (b"new".to_vec(), b"same".to_vec())
    );
    assert!(matches!(old.read("gone.bin"), Err(Error::NotFound { .. })));
    assert_eq!(store.list("models/m").unwrap().len(), 2 + 1 + 2, "{:?}", store.list("models/m"));
    assert!(others.iter().all(|other| store.head(other).unwrap().is_some()));
}

#[test]
fn of_two_that_publish_if_absent_one_does() {
    let store = ram();
    let writer = |byte| {
        let mut writer = BundleWriter::new(&store, "models/m").unwrap();
        writer.add("a.bin", &[byte]).unwrap();
        writer
    };
    let (first, second) = (writer(1), writer(2));
    assert!(first.publish_if_absent("model", json!({})).unwrap().is_some());
    assert!(second.publish_if_absent("model", json!({})).unwrap().is_none());
    assert_eq!(open(&store).read("a.bin").unwrap(), [1]);
}

#[test]
fn damage_is_found_and_named() {
    let store = ram();
    let bytes = pattern(10_000, 1);
    publish(&store, &[("a.bin", &bytes)], json!({}));
    let object = object_of(&store, "a.bin");
    let dir = tempfile::tempdir().unwrap();
    let check = |damaged: &[u8], why: &str| {
        store.put(&object, damaged).unwrap();
        for error in [open(&store).read("a.bin").map(|_| ()), open(&store).download_to(dir.path())] {
            let error = error.unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(object.as_str()) && text.contains(why), "{text}");
        }
        assert!(!dir.path().join("a.bin").exists(), "a damaged file was given its name");
    };
    for at in [0, 5_000, 9_999] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        check(&flipped, "its checksum is");
    }
    check(&bytes[..9_999], "it has 9999 bytes, the manifest says 10000");
    check(&[], "it has 0 bytes");
    store.delete(&object).unwrap();
    assert!(matches!(open(&store).read("a.bin"), Err(Error::NotFound { .. })));
}

/// Every single flipped bit and every cut of a manifest is an error, never another bundle.
#[test]
fn a_damaged_manifest_is_refused() {
    let store = ram();
    publish(&store, &[("a.bin", b"aaa"), ("b.bin", b"bbb")], json!({"steps": 100, "loss": 2.25}));
    let manifest = name("models/m/manifest.json");
    let bytes = store.get(&manifest).unwrap();
    let refused = |damaged: &[u8], what: &str| {
        store.put(&manifest, damaged).unwrap();
        let error = Bundle::open(&store, "models/m").unwrap_err();
        assert!(matches!(error, Error::Damaged { .. } | Error::NewerFormat { .. }), "{what}: {error:?}");
        assert!(error.to_string().contains("models/m/manifest.json"), "{error}");
    };
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            refused(&flipped, &format!("bit {bit} of byte {at}"));
        }
        refused(&bytes[..at], &format!("cut at {at}"));
    }
}

#[test]
fn a_newer_manifest_is_refused_by_its_version() {
    let store = ram();
    let newer = json!({"format_version": MANIFEST_VERSION + 1, "kind": "model", "something": "new"});
    store.put(&name("models/m/manifest.json"), newer.to_string().as_bytes()).unwrap();
    let error = Bundle::open(&store, "models/m").unwrap_err();
    assert!(matches!(error, Error::NewerFormat { .. }), "{error:?}");
}

/// A manifest is a stranger's file: names in it become paths on this machine.
#[test]
fn hostile_file_names_are_refused() {
    let store = ram();
    let mut writer = BundleWriter::new(&store, "models/m").unwrap();
    for file in ["", "..", "../x", "/etc/passwd", "a/b", ".hidden", "a b", "a\0", &"x".repeat(181)] {
        assert!(matches!(writer.add(file, b"x"), Err(Error::FileName { .. })), "{file:?} was taken");
    }
    writer.add("twice", b"1").unwrap();
    assert!(matches!(writer.add("twice", b"2"), Err(Error::FileName { .. })));
    // The same names in a manifest with a right checksum.
    for file in ["/etc/passwd", "../x", "a/b"] {
        let entry = FileEntry::of("x", b"x");
        let body = |sha256: &str| {
            let files = json!([{"name": file, "bytes": 1, "sha256": entry.sha256}]);
            json!({"format_version": 1, "sha256": sha256, "kind": "model", "files": files, "meta": {}})
                .to_string()
        };
        let sha256 = FileEntry::of("", body(&"0".repeat(64)).as_bytes()).sha256;
        store.put(&name("models/m/manifest.json"), body(&sha256).as_bytes()).unwrap();
        let error = Bundle::open(&store, "models/m").unwrap_err();
        assert!(error.to_string().contains("is refused"), "{file}: {error}");
    }
}

#[test]
fn files_come_from_and_go_to_directories() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(Local::open(&dir.path().join("store")).unwrap());
    let bytes = pattern(9 << 20, 1);
    let source = dir.path().join("source");
    std::fs::write(&source, &bytes).unwrap();
    let mut writer = BundleWriter::new(&store, "models/m").unwrap();
    writer.add_path("big.bin", &source).unwrap();
    writer.add("empty", b"").unwrap();
    assert!(matches!(writer.add_path("x", &dir.path().join("absent")), Err(Error::SourceFile { .. })));
    writer.publish("model", json!({})).unwrap();
    let to = dir.path().join("a/b");
    open(&store).download_to(&to).unwrap();
    assert!(std::fs::read(to.join("big.bin")).unwrap() == bytes);
    assert_eq!(std::fs::read(to.join("empty")).unwrap(), b"");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 2, "more than the bundle's files was left");
    // What is right is not written again, what is wrong is.
    let written = std::fs::metadata(to.join("big.bin")).unwrap().modified().unwrap();
    std::fs::write(to.join("empty"), b"not empty").unwrap();
    open(&store).download_to(&to).unwrap();
    assert_eq!(std::fs::metadata(to.join("big.bin")).unwrap().modified().unwrap(), written);
    assert_eq!(std::fs::read(to.join("empty")).unwrap(), b"");
}

#[test]
fn stored_files_are_taken_over() {
    let store = ram();
    let entry = BundleWriter::new(&store, "models/m").unwrap().add("a.bin", b"aaa").unwrap();
    let mut writer = BundleWriter::new(&store, "models/m").unwrap();
    assert!(writer.add_stored(&entry).unwrap());
    assert!(!writer.add_stored(&FileEntry::of("b.bin", b"never stored")).unwrap());
    writer.publish("model", json!({})).unwrap();
    assert_eq!(open(&store).read("a.bin").unwrap(), b"aaa");
    assert_eq!(open(&store).manifest().files.len(), 1);
}

#[test]
fn pauses_depend_on_bytes_and_not_on_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let local = store::open(&dir.path().display().to_string()).unwrap();
    let bytes = vec![7; 1 << 20];
    for store in [ram(), local] {
        let mut n_pauses = 0;
        let mut writer = BundleWriter::new(&store, "paced").unwrap();
        writer.add_paced("file", &bytes, &mut || n_pauses += 1).unwrap();
        // For the checksum and for the write, each 256 KiB.
        assert_eq!(n_pauses, 8);
    }
}
