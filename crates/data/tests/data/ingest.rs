use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use data::{
    BadRows, Dataset, DatasetInfo, Error, IngestPlan, IngestStage, ReadOptions, Split, TokenizerSource,
    documents, ingest,
};
use store::{Bundle, ObjectName, Ram, Store};

use crate::{Inputs, text};

pub(crate) fn ram() -> Arc<dyn Store> {
    Arc::new(Ram::new())
}

/// Shards and parts small enough that there are several of each.
pub(crate) fn plan(inputs: Vec<PathBuf>) -> IngestPlan {
    IngestPlan {
        validation_fraction: 0.2,
        shard_tokens: 1000,
        part_bytes: 3000,
        n_threads: 2,
        ..IngestPlan::new("speeches", inputs, TokenizerSource::Train { vocab_size: 300 })
    }
}

pub(crate) fn run(plan: &IngestPlan, store: &Arc<dyn Store>) -> Result<DatasetInfo, Error> {
    ingest(plan, store, &mut |_| {})
}

/// Every object of a store.
pub(crate) fn contents(store: &Arc<dyn Store>) -> BTreeMap<ObjectName, Vec<u8>> {
    let metas = store.list("").unwrap();
    metas.into_iter().map(|meta| (meta.name.clone(), store.get(&meta.name).unwrap())).collect()
}

pub(crate) fn corpus(n_documents: u64) -> Inputs {
    let inputs = Inputs::new();
    for i in 0..n_documents / 2 {
        inputs.write(&format!("corpus/{i:03}.txt"), text(i, 20 + (i as usize * 37) % 300));
    }
    let rows: Vec<_> = (n_documents / 2..n_documents)
        .map(|i| serde_json::json!({ "text": text(i, 150) }).to_string())
        .collect();
    inputs.write("corpus/rest.jsonl", rows.join("\n"));
    inputs
}

/// The stream of a split is its documents, whole, in order, each with an end-of-text id; nothing is lost.
#[test]
fn the_tokens_are_the_documents() {
    let inputs = corpus(60);
    inputs.write("corpus/picture.png", [0, 1]);
    let store = ram();
    let plan = plan(vec![inputs.path().join("corpus")]);
    let mut stages = Vec::new();
    let info = ingest(&plan, &store, &mut |progress| {
        assert!(progress.done <= progress.total, "{progress:?}");
        stages.push(progress.stage);
    });
    let info = info.unwrap();
    assert!(stages.is_sorted() && stages.first() == Some(&IngestStage::Checksums), "{stages:?}");
    assert_eq!(stages.last(), Some(&IngestStage::Publish));

    let dataset = Dataset::open(&store, "speeches").unwrap();
    assert_eq!(*dataset.info(), info);
    let tokenizer = dataset.tokenizer();
    assert_eq!(info.vocab_size, 300);
    assert_eq!(tokenizer.id_of("<|endoftext|>"), Some(info.end_of_text));
    let mut found = Vec::new();
    for split in [Split::Train, Split::Validation] {
        let split_info = info.split(split);
        let tokens = dataset.tokens(split, 0..split_info.n_tokens).unwrap();
        assert_eq!(tokens.last(), Some(&info.end_of_text));
        let documents: Vec<_> = tokens.split(|&token| token == info.end_of_text).collect();
        let (last, documents) = documents.split_last().unwrap();
        assert!(last.is_empty());
        let texts: Vec<_> = documents.iter().map(|ids| tokenizer.decode(ids)).collect();
        assert_eq!(split_info.n_documents, texts.len() as u64);
        assert_eq!(split_info.n_bytes, texts.iter().map(|text| text.len() as u64).sum::<u64>());
        found.push(texts);
    }
    let all: Vec<_> = documents(&inputs.path().join("corpus"), &ReadOptions::default())
        .unwrap()
        .map(|d| d.unwrap().text)
        .collect();
    let (train, validation): (Vec<_>, Vec<_>) = all.into_iter().partition(|text| !found[1].contains(text));
    assert_eq!((&found[0], &found[1]), (&train, &validation));
    assert!((4..25).contains(&validation.len()), "{} of 60 held out", validation.len());
    // Shards are whole but for the last, two bytes a token.
    let bundle = Bundle::open(&store, "datasets/speeches").unwrap().unwrap();
    let shards: Vec<_> =
        bundle.manifest().files.iter().filter(|file| file.name.starts_with("train-")).collect();
    assert!(shards.len() > 3);
    assert!(shards[..shards.len() - 1].iter().all(|shard| shard.bytes == 2000));
    assert_eq!(shards.iter().map(|shard| shard.bytes).sum::<u64>(), 2 * info.train.n_tokens);
    assert_eq!((info.n_files_ignored, info.n_rows_skipped), (1, 0));
    // Provenance: the hash of the first file, by another route.
    let first = std::fs::read(inputs.path().join("corpus/000.txt")).unwrap();
    let entry = store::FileEntry::of("", &first);
    assert_eq!((info.inputs[0].path.as_str(), info.inputs[0].bytes), ("corpus/000.txt", entry.bytes));
    assert_eq!(info.inputs[0].sha256, entry.sha256);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let inputs = corpus(40);
    let base = plan(vec![inputs.path().join("corpus")]);
    let store = ram();
    run(&base, &store).unwrap();
    let expected = contents(&store);
    assert!(
        expected.keys().all(|name| !name.as_str().contains("/ingest/")),
        "records of the ingest were left"
    );
    // Neither threads nor parts nor the folder that the inputs lie in matter.
    let moved = corpus(40);
    for (n_threads, part_bytes, root) in [(1, 1, &inputs), (5, 20_000, &moved), (2, usize::MAX, &inputs)] {
        let store = ram();
        let plan =
            IngestPlan { n_threads, part_bytes, inputs: vec![root.path().join("corpus")], ..base.clone() };
        run(&plan, &store).unwrap();
        assert!(contents(&store) == expected, "{n_threads} threads, parts of {part_bytes}");
    }
    // Again over the result: nothing is done, nothing changes.
    let mut stages = Vec::new();
    ingest(&base, &store, &mut |progress| stages.push(progress.stage)).unwrap();
    assert!(stages.iter().all(|&stage| stage == IngestStage::Checksums), "{stages:?}");
    assert!(contents(&store) == expected);
}

/// A dataset made anew with other settings or inputs replaces the old one and leaves nothing of it.
#[test]
fn another_plan_replaces_the_dataset() {
    let inputs = corpus(40);
    let store = ram();
    let first = plan(vec![inputs.path().join("corpus")]);
    run(&first, &store).unwrap();
    let second = IngestPlan { shard_tokens: 777, ..first.clone() };
    run(&second, &store).unwrap();
    let fresh = ram();
    run(&second, &fresh).unwrap();
    assert!(contents(&store) == contents(&fresh));
    inputs.write("corpus/000.txt", "changed");
    assert_ne!(run(&second, &store).unwrap(), run(&first, &ram()).unwrap());
    assert_eq!(Dataset::open(&store, "speeches").unwrap().info().inputs[0].bytes, 7);
}

#[test]
fn a_given_tokenizer_is_kept() {
    let inputs = corpus(40);
    let store = ram();
    let trained = plan(vec![inputs.path().join("corpus")]);
    run(&trained, &store).unwrap();
    let tokenizer = Dataset::open(&store, "speeches").unwrap().tokenizer();
    let given = IngestPlan {
        name: "again".to_string(),
        tokenizer: TokenizerSource::Given(tokenizer.clone()),
        ..trained
    };
    run(&given, &store).unwrap();
    let (one, two) = (Dataset::open(&store, "speeches").unwrap(), Dataset::open(&store, "again").unwrap());
    assert_eq!(one.info().tokenizer_fingerprint, two.info().tokenizer_fingerprint);
    let n = one.info().train.n_tokens;
    assert_eq!(one.tokens(Split::Train, 0..n).unwrap(), two.tokens(Split::Train, 0..n).unwrap());
}

#[test]
fn corpora_of_one_document() {
    let inputs = Inputs::new();
    let file = inputs.write("one.txt", text(1, 500));
    let refused = run(&plan(vec![file.clone()]), &ram()).unwrap_err();
    assert!(matches!(refused, Error::OneDocument { .. }), "{refused:?}");
    assert!(
        refused.to_string().contains("one.txt") && refused.to_string().contains("validation fraction"),
        "{refused}"
    );
    // The same text twice is still one document: half of it would be in both splits.
    let twice = inputs.write("two.txt", text(1, 500));
    assert!(matches!(run(&plan(vec![file.clone(), twice]), &ram()), Err(Error::OneDocument { .. })));
    // Without validation it is taken, and two documents are enough to hold one out.
    let info = run(&IngestPlan { validation_fraction: 0.0, ..plan(vec![file.clone()]) }, &ram()).unwrap();
    assert_eq!((info.train.n_documents, info.validation.n_documents, info.validation.n_tokens), (1, 0, 0));
    let other = inputs.write("other.txt", text(2, 10));
    let info = run(&IngestPlan { validation_fraction: 1e-9, ..plan(vec![file, other]) }, &ram()).unwrap();
    assert_eq!((info.train.n_documents, info.validation.n_documents), (1, 1));
}

#[test]
fn bad_plans_and_inputs_are_refused_and_nothing_is_lost() {
    let inputs = corpus(10);
    let store = ram();
    let good = plan(vec![inputs.path().join("corpus")]);
    run(&good, &store).unwrap();
    let before = contents(&store);
    let named = |name: &str| IngestPlan { name: name.to_string(), ..good.clone() };
    for name in ["", "a/b", "../x", ".x", "a b", &"x".repeat(300)] {
        assert!(matches!(run(&named(name), &store), Err(Error::Name { .. })), "{name:?}");
    }
    for validation_fraction in [-0.1, 0.6, f64::NAN] {
        let plan = IngestPlan { validation_fraction, ..good.clone() };
        assert!(matches!(run(&plan, &store), Err(Error::Plan { .. })), "{validation_fraction}");
    }
    assert!(matches!(run(&IngestPlan { shard_tokens: 0, ..good.clone() }, &store), Err(Error::Plan { .. })));
    assert!(matches!(run(&IngestPlan { inputs: vec![], ..good.clone() }, &store), Err(Error::Plan { .. })));
    let bad = inputs.write("corpus/bad.jsonl", "\"fine\"\n{oops\n");
    let error = run(&good, &store).unwrap_err();
    assert!(matches!(error, Error::Row { .. }) && error.to_string().contains("bad.jsonl, line 2"), "{error}");
    let tiny = IngestPlan { tokenizer: TokenizerSource::Train { vocab_size: 3 }, ..good.clone() };
    std::fs::remove_file(bad).unwrap();
    assert!(matches!(run(&tiny, &store), Err(Error::TrainTokenizer { .. })));
    assert!(contents(&store) == before, "the published dataset was touched");
    // The bad row can be left out, and is counted.
    inputs.write("corpus/bad.jsonl", "\"fine\"\n{oops\n");
    let read = ReadOptions { bad_rows: BadRows::Skip, ..ReadOptions::default() };
    assert_eq!(run(&IngestPlan { read, ..good }, &store).unwrap().n_rows_skipped, 1);
}

/// Twice the tokens of a 16-bit vocabulary do not fit in 16 bits: such a dataset has four bytes a token.
#[test]
fn large_vocabularies_have_wide_tokens() {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert_with(|| id.into());
    };
    add("<|endoftext|>".to_string());
    (0..70_000).for_each(|i| add(format!("filler{i}")));
    // The bytes of printable ASCII stand for themselves in byte-level vocabularies, a space is U+0120, a line feed U+010A.
    (b'!'..=b'~').for_each(|byte| add((byte as char).to_string()));
    ["\u{120}", "\u{10a}"].iter().for_each(|token| add(token.to_string()));
    let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let tokenizer = tokenizer::Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let inputs = Inputs::new();
    let files = vec![inputs.write("a.txt", "plain words\n"), inputs.write("b.txt", "other words\n")];
    let store = ram();
    let info =
        run(&IngestPlan { tokenizer: TokenizerSource::Given(tokenizer), ..plan(files) }, &store).unwrap();
    assert_eq!((info.token_bytes, info.end_of_text), (4, 0));
    let dataset = Dataset::open(&store, "speeches").unwrap();
    let tokens = dataset.tokens(Split::Train, 0..info.train.n_tokens).unwrap();
    assert!(tokens[0] > 65_536);
    assert!(["plain words\n", "other words\n"].contains(&dataset.tokenizer().decode(&tokens).as_str()));
}

#[test]
fn damaged_datasets_are_named() {
    let inputs = corpus(30);
    let store = ram();
    run(&plan(vec![inputs.path().join("corpus")]), &store).unwrap();
    let error = Dataset::open(&store, "absent").unwrap_err();
    assert!(
        matches!(error, Error::NoDataset { .. }) && error.to_string() == "no dataset absent in mem:",
        "{error}"
    );
    let shard = store
        .list("datasets/speeches")
        .unwrap()
        .into_iter()
        .find(|meta| meta.name.as_str().contains("train-00001"));
    let shard = shard.unwrap().name;
    let bytes = store.get(&shard).unwrap();
    let mut flipped = bytes.clone();
    flipped[700] ^= 16;
    for damaged in [flipped, bytes[..1999].to_vec()] {
        store.put(&shard, &damaged).unwrap();
        let dataset = Dataset::open(&store, "speeches").unwrap();
        assert!(dataset.tokens(Split::Train, 0..1000).is_ok(), "a whole shard is refused");
        let error = dataset.tokens(Split::Train, 999..1001).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("train-00001.bin") && source.contains("is damaged"), "{source}");
    }
    // A dataset from the future, and something that is none.
    let bundle = |kind: &str, meta: serde_json::Value| {
        store::BundleWriter::new(&store, "datasets/other").unwrap().publish(kind, meta).unwrap();
        Dataset::open(&store, "other").unwrap_err()
    };
    assert!(matches!(
        bundle("dataset", serde_json::json!({"format_version": 99})),
        Error::NewerFormat { .. }
    ));
    assert!(bundle("model", serde_json::json!({})).to_string().contains("it is a model"));
    assert!(matches!(bundle("dataset", serde_json::json!({})), Error::Damaged { .. }));
}
