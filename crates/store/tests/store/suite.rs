//! What every [`Store`] must do. Each check works under names of its own, so one store serves them all.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use store::{Error, ObjectName, PUT_IF_ABSENT_BYTES_MAX, Put, Store};

pub(crate) fn name(name: &str) -> ObjectName {
    ObjectName::parse(name).unwrap()
}

/// Bytes that differ at every place: a shift, a repeat or a cut shows.
pub(crate) fn pattern(n_bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..n_bytes).map(|_| next()).collect()
}

pub(crate) fn store_suite(store: &Arc<dyn Store>) {
    puts_and_gets(store.as_ref());
    large_objects(store.as_ref());
    ranges(store.as_ref());
    puts_from_readers(store.as_ref());
    lists(store.as_ref());
    deletes(store.as_ref());
    put_if_absent(store.as_ref());
    one_of_many_wins(store);
    replacements_are_whole(store);
    serves_async_callers(store);
}

fn puts_and_gets(store: &dyn Store) {
    let object = name("suite/put/a.b_c=d@e:f+g-h");
    assert!(matches!(store.get(&object), Err(Error::NotFound { .. })));
    assert_eq!(store.head(&object).unwrap(), None);
    for bytes in [&b"first"[..], b"", b"\0\xff\n", &pattern(100_000, 1)] {
        store.put(&object, bytes).unwrap();
        assert_eq!(store.get(&object).unwrap(), bytes);
        let meta = store.head(&object).unwrap().unwrap();
        assert_eq!((meta.name, meta.bytes), (object.clone(), bytes.len() as u64));
    }
    let error = store.get(&name("suite/put/absent")).unwrap_err().to_string();
    assert!(error.contains("suite/put/absent") && error.contains(&store.url()), "{error}");
    // A place where other objects lie is not an object.
    assert!(matches!(store.get(&name("suite/put")), Err(Error::NotFound { .. })));
    assert!(matches!(store.get_range(&name("suite/put"), 0..1), Err(Error::NotFound { .. })));
    assert_eq!(store.head(&name("suite/put")).unwrap(), None);
    assert_eq!(store.head(&name("suite/put/a.b_c=d@e:f+g-h/below")).unwrap(), None);
}

/// Larger than the parts that S3 travels in.
fn large_objects(store: &dyn Store) {
    let object = name("suite/large");
    let bytes = pattern((17 << 20) + 17, 2);
    store.put(&object, &bytes).unwrap();
    assert_eq!(store.head(&object).unwrap().unwrap().bytes, bytes.len() as u64);
    assert!(store.get(&object).unwrap() == bytes, "a large object came back different");
    let range = (15 << 20) + 3..(17 << 20) + 1;
    assert!(store.get_range(&object, range.start as u64..range.end as u64).unwrap() == bytes[range]);
    store.delete(&object).unwrap();
}

fn ranges(store: &dyn Store) {
    let object = name("suite/range");
    let bytes = pattern(1000, 3);
    store.put(&object, &bytes).unwrap();
    for range in [0..1000u64, 0..1, 999..1000, 10..500, 0..0, 1000..1000, 500..500] {
        let expected = &bytes[range.start as usize..range.end as usize];
        assert_eq!(store.get_range(&object, range.clone()).unwrap(), expected, "{range:?}");
    }
    #[allow(clippy::reversed_empty_ranges)]
    for range in
        [0..1001, 999..1001, 1000..1001, 1001..1001, 2000..3000, 5..2, 0..u64::MAX, u64::MAX..u64::MAX]
    {
        match store.get_range(&object, range.clone()) {
            Err(Error::OutOfRange { bytes, start, .. }) => assert_eq!((bytes, start), (1000, range.start)),
            other => panic!("{range:?}: {other:?}"),
        }
    }
    let absent = store.get_range(&name("suite/range-absent"), 0..1);
    assert!(matches!(absent, Err(Error::NotFound { .. })), "{absent:?}");
}

fn puts_from_readers(store: &dyn Store) {
    for n_bytes in [0, 1, 70_000, (16 << 20) + 5] {
        let object = name(&format!("suite/reader/{n_bytes}"));
        let bytes = pattern(n_bytes, 4);
        store.put_reader(&object, &mut bytes.as_slice(), n_bytes as u64).unwrap();
        assert!(store.get(&object).unwrap() == bytes, "{n_bytes} bytes came back different");
        // A source that does not hold what it promised leaves what was there.
        for promised in [n_bytes as u64 + 1, (n_bytes as u64).saturating_sub(1)] {
            if promised == n_bytes as u64 {
                continue;
            }
            let wrong = store.put_reader(&object, &mut pattern(n_bytes, 5).as_slice(), promised);
            assert!(matches!(wrong, Err(Error::SourceLength { .. })), "{n_bytes} for {promised}: {wrong:?}");
        }
        let broken = store.put_reader(&object, &mut bytes.as_slice().chain(Broken), n_bytes as u64 + 9);
        assert!(matches!(broken, Err(Error::Object { .. })), "{broken:?}");
        assert!(store.get(&object).unwrap() == bytes, "{n_bytes} bytes were changed by a failed put");
    }
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::other("the source broke"))
    }
}

fn lists(store: &dyn Store) {
    let names = ["b/2", "b/1", "b/10", "b/sub/x", "b/sub/deep/er", "bb/1", "a", "b-/1", "c/z"];
    for n in names {
        store.put(&name(&format!("suite/list/{n}")), n.as_bytes()).unwrap();
    }
    let list = |prefix: &str| {
        let metas = store.list(prefix).unwrap();
        for meta in &metas {
            let rest = meta.name.as_str().strip_prefix("suite/list/").unwrap();
            assert_eq!(meta.bytes, rest.len() as u64);
        }
        metas.iter().map(|meta| meta.name.as_str()["suite/list/".len()..].to_string()).collect::<Vec<_>>()
    };
    assert_eq!(list("suite/list/b"), ["b/1", "b/10", "b/2", "b/sub/deep/er", "b/sub/x"]);
    assert_eq!(list("suite/list/b/"), list("suite/list/b"));
    assert_eq!(list("suite/list/b/sub"), ["b/sub/deep/er", "b/sub/x"]);
    let mut all = names.map(str::to_string);
    all.sort();
    assert_eq!(list("suite/list"), all);
    for nothing in ["suite/list/x", "suite/list/b/1", "suite/li", "absent"] {
        assert!(store.list(nothing).unwrap().is_empty(), "{nothing}");
    }
    let everything = store.list("").unwrap();
    assert!(
        everything.iter().filter(|meta| meta.name.as_str().starts_with("suite/list/")).count() == names.len()
    );
    assert!(everything.is_sorted_by(|a, b| a.name < b.name));
    for hostile in ["/", "..", "a//b", "../x/", "a//"] {
        assert!(matches!(store.list(hostile), Err(Error::Name { .. })), "{hostile:?} was listed");
    }
}

fn deletes(store: &dyn Store) {
    let (object, sibling) = (name("suite/delete/deep/er/x"), name("suite/delete/y"));
    store.put(&object, b"x").unwrap();
    store.put(&sibling, b"y").unwrap();
    store.delete(&object).unwrap();
    assert!(matches!(store.get(&object), Err(Error::NotFound { .. })));
    assert_eq!(store.get(&sibling).unwrap(), b"y");
    store.delete(&object).unwrap();
    store.delete(&name("suite/delete/never/was")).unwrap();
    // Something under a name is not the object of that name.
    store.delete(&name("suite/delete")).unwrap();
    assert_eq!(store.get(&sibling).unwrap(), b"y");
    store.delete(&sibling).unwrap();
    assert!(store.list("suite/delete").unwrap().is_empty());
    // Nothing that a delete leaves stands in the way of another object.
    store.put(&name("suite/delete"), b"now an object").unwrap();
    store.delete(&name("suite/delete")).unwrap();
    store.put(&object, b"again").unwrap();
    assert_eq!(store.get(&object).unwrap(), b"again");
}

fn put_if_absent(store: &dyn Store) {
    let object = name("suite/absent/x");
    assert_eq!(store.put_if_absent(&object, b"first").unwrap(), Put::Created);
    assert_eq!(store.put_if_absent(&object, b"second").unwrap(), Put::Exists);
    assert_eq!(store.get(&object).unwrap(), b"first");
    store.put(&object, b"third").unwrap();
    assert_eq!(store.put_if_absent(&object, b"fourth").unwrap(), Put::Exists);
    assert_eq!(store.get(&object).unwrap(), b"third");
    store.delete(&object).unwrap();
    assert_eq!(store.put_if_absent(&object, b"").unwrap(), Put::Created);
    assert_eq!(store.get(&object).unwrap(), b"");
    let too_large = vec![0; PUT_IF_ABSENT_BYTES_MAX as usize + 1];
    let refused = store.put_if_absent(&name("suite/absent/large"), &too_large);
    assert!(matches!(refused, Err(Error::TooLarge { .. })), "{refused:?}");
}

fn one_of_many_wins(store: &Arc<dyn Store>) {
    const WRITERS: usize = 8;
    // SeaweedFS makes a writer that meets a lock wait for whole seconds, so a few rounds must do.
    for round in 0..3 {
        let object = name(&format!("suite/race/deep-{round}/x"));
        let start = Barrier::new(WRITERS);
        let winners: Vec<usize> = std::thread::scope(|scope| {
            let race = |writer: usize| {
                let (start, object) = (&start, &object);
                scope.spawn(move || {
                    start.wait();
                    let put = store.put_if_absent(object, &pattern(50_000, writer as u64)).unwrap();
                    (put == Put::Created).then_some(writer)
                })
            };
            let writers: Vec<_> = (0..WRITERS).map(race).collect();
            writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect()
        });
        assert_eq!(winners.len(), 1, "round {round}: {winners:?} all believe that they created it");
        assert!(
            store.get(&object).unwrap() == pattern(50_000, winners[0] as u64),
            "the winner's bytes are not there"
        );
    }
}

/// A reader beside a writer sees one object or the other, never a mixture, a part, or nothing.
fn replacements_are_whole(store: &Arc<dyn Store>) {
    let object = name("suite/replace/x");
    let versions: Vec<_> = (0..4).map(|i| pattern(40_000 + 20_000 * i, i as u64)).collect();
    store.put(&object, &versions[0]).unwrap();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..40 {
                store.put(&object, &versions[i % versions.len()]).unwrap();
            }
            is_done.store(true, Ordering::Release);
        });
        while !is_done.load(Ordering::Acquire) {
            let bytes = store.get(&object).unwrap();
            assert!(versions.contains(&bytes), "{} bytes that nobody wrote", bytes.len());
        }
    });
}

/// A store that is called, and dropped, inside an async runtime must not panic (it may block).
fn serves_async_callers(store: &Arc<dyn Store>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store = store.clone();
    runtime.block_on(async move {
        store.put(&name("suite/async"), b"x").unwrap();
        assert_eq!(store.get(&name("suite/async")).unwrap(), b"x");
    });
}

/// Of stores that can tell.
pub(crate) fn names_do_not_nest(store: &Arc<dyn Store>) {
    store.put(&name("nest/a"), b"x").unwrap();
    store.put(&name("nest/b/c"), b"x").unwrap();
    for (put, existing) in
        [("nest/a/b", "nest/a"), ("nest/a/b/c", "nest/a"), ("nest", "nest/"), ("nest/b", "nest/b/")]
    {
        let put = name(put);
        let errors = [
            store.put(&put, b"y"),
            store.put_if_absent(&put, b"y").map(|_| ()),
            store.put_reader(&put, &mut &b"y"[..], 1),
        ];
        for error in errors {
            match error {
                Err(Error::Nested { existing: found, .. }) => assert!(found.starts_with(existing), "{found}"),
                other => panic!("{put}: {other:?}"),
            }
        }
    }
    assert_eq!(store.list("nest").unwrap().len(), 2);
}
