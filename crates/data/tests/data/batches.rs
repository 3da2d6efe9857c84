use std::collections::BTreeSet;
use std::sync::Arc;

use data::{Batches, Dataset, Error, Mixture, Row, Split};
use store::Store;

use crate::ingest::{corpus, plan, ram, run};

fn dataset() -> (Arc<dyn Store>, Dataset) {
    let inputs = corpus(40);
    let store = ram();
    run(&plan(vec![inputs.path().join("corpus")]), &store).unwrap();
    let dataset = Dataset::open(&store, "speeches").unwrap();
    (store, dataset)
}

/// The ids that a row of text was cut from.
fn window(row: Result<Row, Error>) -> Vec<u32> {
    let row = row.unwrap();
    assert_eq!(row.targets[..row.targets.len() - 1], row.tokens[1..]);
    assert!(row.starts.len() == row.tokens.len() && row.starts.iter().all(|start| *start == 0));
    row.tokens.iter().chain(row.targets.last()).copied().collect()
}

#[test]
fn isolated_documents_begin_after_the_end_of_text() {
    let (_store, dataset) = dataset();
    let eot = dataset.info().end_of_text;
    let plain = Batches::new(&dataset, Split::Train, 5, 500).unwrap();
    let isolated = plain.clone().isolated(true);
    let mut n_starts = 0;
    for i in 0..plain.n_rows() {
        let (plain, isolated) = (plain.row(i).unwrap(), isolated.row(i).unwrap());
        assert_eq!((&plain.tokens, &plain.targets), (&isolated.tokens, &isolated.targets));
        for at in 1..500 {
            let expected = if isolated.tokens[at - 1] == eot { at as u32 } else { isolated.starts[at - 1] };
            assert_eq!(isolated.starts[at], expected, "row {i}, token {at}");
            n_starts += usize::from(isolated.starts[at] == at as u32);
        }
    }
    assert!(n_starts > 5, "no documents met in a row");
}

#[test]
fn an_epoch_is_every_window_once() {
    let (_store, dataset) = dataset();
    let n_tokens = dataset.info().train.n_tokens;
    let stream = dataset.tokens(Split::Train, 0..n_tokens).unwrap();
    for t in [1, 7, 64, 1000, n_tokens as usize - 1] {
        let batches = Batches::new(&dataset, Split::Train, 5, t).unwrap();
        let n = batches.n_rows();
        assert_eq!(n, (n_tokens - 1) / t as u64);
        let in_order: Vec<_> = (0..n).map(|i| window(batches.row_at(i))).collect();
        for (i, window) in in_order.iter().enumerate() {
            assert_eq!(window[..], stream[i * t..i * t + t + 1]);
        }
        let epoch =
            |epoch: u64| (epoch * n..(epoch + 1) * n).map(|i| window(batches.row(i))).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        let mut sorted = [in_order.clone(), first.clone(), second.clone()];
        sorted.iter_mut().for_each(|windows| windows.sort());
        assert!(
            sorted[0] == sorted[1] && sorted[0] == sorted[2],
            "an epoch is not every window once (t = {t})"
        );
        if n > 20 {
            assert!(first != in_order && second != first, "the order is not random, or the same every epoch");
        }
        assert_eq!((batches.epoch(n - 1), batches.epoch(n), batches.epoch(6 * n - 1)), (0, 1, 5));
        assert!(matches!(batches.row_at(n), Err(Error::OutOfRange { .. })));
    }
}

/// A run that is resumed asks for the same indices of another `Batches`.
#[test]
fn a_window_depends_on_seed_and_index_only() {
    let (store, dataset) = dataset();
    let batches = Batches::new(&dataset, Split::Train, 7, 16).unwrap();
    let again = Batches::new(&Dataset::open(&store, "speeches").unwrap(), Split::Train, 7, 16).unwrap();
    let other_seed = Batches::new(&dataset, Split::Train, 8, 16).unwrap();
    let indices = [1_000_000, 3, 2, 1 << 40, 3, u64::MAX];
    let of = |batches: &Batches| indices.map(|i| window(batches.row(i)));
    assert_eq!(of(&batches), of(&again));
    assert_ne!(of(&batches), of(&other_seed));
    // From several threads at once, as ranks do.
    let expected = of(&batches);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(of(&batches), expected));
        }
    });
    let distinct: BTreeSet<_> = (0..batches.n_rows()).map(|i| window(batches.row(i))).collect();
    assert!(distinct.len() as u64 > batches.n_rows() / 2);
}

/// Every dataset has its share, its rows come in its own order and none is left out.
#[test]
fn a_mixture_keeps_its_weights_and_every_row() {
    let (_store, dataset) = dataset();
    let part = |t: usize, seed: u64| Batches::new(&dataset, Split::Train, seed, t).unwrap();
    let new = |seed| {
        let parts = vec![(part(16, 1), 3.0), (part(16, 2), 1.0), (part(16, 3), 4.0)];
        Mixture::new(parts, seed).unwrap()
    };
    let mixture = new(5);
    let mut seen: [Vec<u64>; 3] = Default::default();
    for index in 0..3 * 4096 {
        let (which, row) = mixture.place(index);
        seen[which].push(row);
        assert_eq!((which, row), new(5).place(index));
    }
    for (rows, n) in seen.iter().zip([3 * 1536, 3 * 512, 3 * 2048]) {
        let mut sorted = rows.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n).collect::<Vec<u64>>());
    }
    // Mixed through and through: the first 256 places hold about 96, 32 and 128 rows.
    let first = |which| (0..256).filter(|&i| mixture.place(i).0 == which).count();
    assert!((70..125).contains(&first(0)) && (15..50).contains(&first(1)), "{} {}", first(0), first(1));
    assert_ne!(
        (0..64).map(|i| new(6).place(i)).collect::<Vec<_>>(),
        (0..64).map(|i| mixture.place(i)).collect::<Vec<_>>()
    );
    let (which, row) = mixture.place(1000);
    assert_eq!(mixture.row(1000).unwrap(), part(16, which as u64 + 1).row(row).unwrap());
    let alone = Mixture::new(vec![(part(16, 1), 0.3)], 5).unwrap();
    assert_eq!(alone.row(77).unwrap(), part(16, 1).row(77).unwrap());
    assert!(Mixture::new(vec![(part(16, 1), 1.0), (part(16, 2), 1e-6)], 5).is_none());
    assert!(Mixture::new(vec![(part(16, 1), 0.0)], 5).is_none());
    assert!(Mixture::new(Vec::new(), 5).is_none());
}

#[test]
fn a_split_smaller_than_a_window_is_named() {
    let (_store, dataset) = dataset();
    let n_tokens = dataset.info().validation.n_tokens;
    let error = Batches::new(&dataset, Split::Validation, 0, n_tokens as usize).unwrap_err();
    assert!(matches!(error, Error::TooSmall { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("speeches") && text.contains("validation") && text.contains(&n_tokens.to_string()),
        "{text}"
    );
    assert!(matches!(dataset.tokens(Split::Validation, 0..n_tokens + 1), Err(Error::OutOfRange { .. })));
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = dataset.tokens(Split::Validation, 5..2);
    assert!(matches!(backwards, Err(Error::OutOfRange { .. })));
}
