//! Chats: from rows of JSON to rows of training, where only what the assistant says has a target.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data::{
    BadRows, Batches, Content, Dataset, DatasetInfo, Error, Form, IngestPlan, NO_TARGET, Row, Split,
    TokenizerSource,
};
use serde_json::json;
use store::Store;
use tokenizer::{BpeTrainer, ChatTemplate, Tokenizer};

use crate::Inputs;
use crate::ingest::{contents, ram, run};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn tokenizer() -> Tokenizer {
    let texts: Vec<String> = (0..50).map(|i| crate::text(i, 200)).collect();
    let special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_string).to_vec();
    let trainer = BpeTrainer { special_tokens, ..BpeTrainer::new(400) };
    trainer.train(&texts, &mut |_| {}).unwrap()
}

fn plan(inputs: Vec<PathBuf>, form: Option<Form>) -> IngestPlan {
    let mut plan = IngestPlan::new("chats", inputs, TokenizerSource::Given(tokenizer()));
    plan.read.content = Content::Chats(form);
    plan.chat_template = Some(ChatTemplate::new(CHATML, "", "").unwrap());
    plan.shard_tokens = 1000;
    plan.part_bytes = 3000;
    plan.validation_fraction = 0.2;
    plan
}

fn made(plan: &IngestPlan) -> (Arc<dyn Store>, Dataset) {
    let store = ram();
    run(plan, &store).unwrap();
    let dataset = Dataset::open(&store, "chats").unwrap();
    (store, dataset)
}

/// Chats of one to three answers, told apart by what is said.
fn chats(n: usize) -> Inputs {
    let inputs = Inputs::new();
    let row = |i: usize| {
        let turn = |j: usize| {
            let (ask, answer) =
                (format!("question {i} {j}"), format!("answer {i} {j} {}", crate::text(i as u64, i % 40)));
            [json!({"role": "user", "content": ask}), json!({"role": "assistant", "content": answer})]
        };
        json!({"messages": (0..1 + i % 3).flat_map(turn).collect::<Vec<_>>()}).to_string()
    };
    inputs.write("chats.jsonl", (0..n).map(row).collect::<Vec<_>>().join("\n"));
    inputs
}

fn rows(batches: &Batches) -> Vec<Row> {
    (0..batches.n_rows()).map(|i| batches.row_at(i).unwrap()).collect()
}

/// What the targets of a row say, each run of them a text.
fn learned(tokenizer: &Tokenizer, row: &Row) -> Vec<String> {
    let runs = row.targets.split(|target| *target == NO_TARGET).filter(|run| !run.is_empty());
    runs.map(|run| tokenizer.decode_special(run)).collect()
}

#[test]
fn every_answer_is_learned_once_an_epoch_and_nothing_else() {
    let inputs = chats(60);
    let (_store, dataset) = made(&plan(vec![inputs.path().into()], None));
    let tokenizer = dataset.tokenizer();
    let info = dataset.info().clone();
    let chats = info.chats.clone().unwrap();
    assert!(!chats.is_pairs);
    let mut answers = BTreeSet::new();
    for (split, n_learned) in [(Split::Train, chats.n_learned[0]), (Split::Validation, chats.n_learned[1])] {
        let batches = Batches::new(&dataset, split, 1, 512).unwrap();
        assert_eq!(batches.n_cut_and_dropped(), (0, 0));
        let mut n_targets = 0;
        for row in rows(&batches) {
            check_row(&tokenizer, &row);
            n_targets += row.targets.iter().filter(|t| **t != NO_TARGET).count() as u64;
            for answer in learned(&tokenizer, &row) {
                assert!(answer.starts_with("answer ") && answer.ends_with("<|im_end|>"), "{answer}");
                assert!(answers.insert(answer.clone()), "twice: {answer}");
            }
        }
        assert_eq!(n_targets, n_learned);
    }
    assert_eq!(answers.len(), 60 / 3 * (1 + 2 + 3));
}

/// Documents begin with a turn of the user, do not see each other, and predict only themselves.
fn check_row(tokenizer: &Tokenizer, row: &Row) {
    assert!(row.tokens.len() == 512 && row.targets.len() == 512 && row.starts.len() == 512);
    for at in 0..512 {
        let start = row.starts[at] as usize;
        assert!(start <= at && row.starts[start] as usize == start, "token {at} starts at {start}");
        let follows = row.starts.get(at + 1).is_some_and(|next| *next as usize == start);
        if row.targets[at] != NO_TARGET && follows {
            assert_eq!(row.targets[at], row.tokens[at + 1]);
        }
        let is_text = row.targets[start..]
            .iter()
            .zip(&row.starts[start..])
            .any(|(target, s)| *s as usize == start && *target != NO_TARGET);
        if start == at && is_text {
            assert!(tokenizer.decode_special(&row.tokens[at..]).starts_with("<|im_start|>user\nquestion"));
        }
    }
}

#[test]
fn rows_are_a_pure_function_of_seed_and_index() {
    let inputs = chats(60);
    let (store, dataset) = made(&plan(vec![inputs.path().into()], None));
    let first = Batches::new(&dataset, Split::Train, 7, 128).unwrap();
    let again = Batches::new(&Dataset::open(&store, "chats").unwrap(), Split::Train, 7, 128).unwrap();
    let n = first.n_rows();
    let epoch =
        |batches: &Batches, e: u64| (e * n..(e + 1) * n).map(|i| batches.row(i).unwrap()).collect::<Vec<_>>();
    assert_eq!(epoch(&first, 3), epoch(&again, 3));
    assert_ne!(epoch(&first, 0), epoch(&first, 1));
    let sorted = |mut rows: Vec<Row>| {
        rows.sort_by_key(|row| (row.tokens.clone(), row.targets.clone()));
        rows
    };
    assert_eq!(sorted(epoch(&first, 0)), sorted(rows(&first)));
    assert_ne!(epoch(&first, 0), epoch(&Batches::new(&dataset, Split::Train, 8, 128).unwrap(), 0));
    let (n_cut, n_dropped) = first.n_cut_and_dropped();
    assert!(n_cut > 0, "no chat of up to 40 words three times is longer than 128 tokens?");
    let documents: u64 = rows(&first)
        .iter()
        .map(|r| {
            (0..128)
                .filter(|&i| r.starts[i] as usize == i && r.targets[i..].iter().any(|t| *t != NO_TARGET))
                .count() as u64
        })
        .sum();
    assert!(documents + n_dropped >= dataset.info().train.n_documents);
}

#[test]
fn pairs_come_in_twos() {
    let inputs = Inputs::new();
    let row = |i: usize| json!({"prompt": format!("question {i}"), "chosen": format!("good {i}"), "rejected": format!("bad {i}")});
    let list: Vec<_> = (0..30).map(row).collect();
    inputs.write("pairs.json", json!(list).to_string());
    let (_store, dataset) = made(&plan(vec![inputs.path().into()], None));
    assert!(dataset.info().chats.as_ref().unwrap().is_pairs);
    let batches = Batches::new(&dataset, Split::Train, 3, 64).unwrap();
    let tokenizer = dataset.tokenizer();
    assert!(batches.is_pairs() && batches.n_rows() == dataset.info().train.n_documents);
    for pair in 0..batches.n_rows() {
        let [good, bad] = [2 * pair, 2 * pair + 1].map(|i| learned(&tokenizer, &batches.row(i).unwrap()));
        let number = good[0].strip_prefix("good ").unwrap_or_else(|| panic!("{good:?}"));
        assert_eq!((good.len(), bad), (1, vec![format!("bad {number}")]));
    }
}

#[test]
fn a_killed_ingest_of_chats_gives_the_same_bytes() {
    let inputs = chats(80);
    let plan = plan(vec![inputs.path().into()], None);
    let (whole, _) = made(&plan);
    let store = ram();
    for n_events in 1..40 {
        let mut left = n_events;
        let ingest = std::panic::AssertUnwindSafe(|| {
            data::ingest(&plan, &store, &mut |_| {
                left -= 1;
                if left == 0 {
                    std::panic::resume_unwind(Box::new("killed"));
                }
            })
        });
        if std::panic::catch_unwind(ingest).is_ok() {
            break;
        }
    }
    run(&plan, &store).unwrap();
    assert_eq!(contents(&store), contents(&whole));
}

fn refused(name: &str, bytes: &str, change: impl Fn(&mut IngestPlan)) -> (Error, Result<DatasetInfo, Error>) {
    let inputs = Inputs::new();
    let path = inputs.write(name, bytes);
    let mut plan = plan(vec![path], None);
    plan.validation_fraction = 0.0;
    change(&mut plan);
    let error = run(&plan, &ram()).unwrap_err();
    plan.read.bad_rows = BadRows::Skip;
    (error, run(&plan, &ram()))
}

#[test]
fn bad_rows_are_named_or_skipped() {
    let good = json!({"prompt": "a", "response": "b"});
    let check = |bad: &str, words: &[&str]| {
        let (error, skipped) = refused("x.jsonl", &format!("{good}\n{bad}\n"), |_| {});
        let text = error.to_string();
        assert!(text.contains("x.jsonl, line 2"), "{text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{text} does not say {word}"));
        let info = skipped.unwrap();
        assert_eq!((info.n_rows_skipped, info.train.n_documents), (1, 1), "{bad}");
    };
    check("{\"prompt\":", &["column"]);
    check(r#"{"text": "plain"}"#, &["text", "no form"]);
    check(
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}"#,
        &["messages[1].content"],
    );
    check(r#"{"prompt": "a", "response": "b", "tools": 7}"#, &["tools"]);
    let pair = json!({"prompt": "a", "chosen": "b", "rejected": "c"});
    let text = refused("x.jsonl", &format!("{good}\n{pair}"), |_| {}).0.to_string();
    assert!(text.contains("line 2") && text.contains("pairs"), "{text}");
    // A template's own refusal, too.
    let refuses = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}{{ m.content }}{% endfor %}";
    let strict =
        |plan: &mut IngestPlan| plan.chat_template = Some(ChatTemplate::new(refuses, "", "").unwrap());
    let bad = json!({"prompt": "no", "response": "b"});
    let (error, skipped) = refused("x.json", &json!([good, bad]).to_string(), strict);
    assert!(error.to_string().contains("x.json, row 2") && error.to_string().contains("not this"), "{error}");
    assert_eq!(skipped.unwrap().n_rows_skipped, 1);
}

#[test]
fn what_has_nothing_to_learn_is_refused() {
    let masked = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]});
    let (error, skipped) = refused("x.jsonl", &masked.to_string(), |_| {});
    assert!(
        error.to_string().contains("line 1") && error.to_string().contains("nothing to learn"),
        "{error}"
    );
    assert!(matches!(skipped, Err(Error::NoDocuments { .. })), "{skipped:?}");
    assert!(matches!(refused("x.jsonl", "", |_| {}).0, Error::Empty { .. }));
    assert!(matches!(refused("x.txt", "some text", |_| {}).0, Error::NotReadable { .. }));
    assert!(matches!(refused("x.jsonl", "{}", |plan| plan.chat_template = None).0, Error::Plan { .. }));

    // Answers that begin beyond the row's end.
    let inputs = Inputs::new();
    let long = json!({"prompt": "word ".repeat(100), "response": "b"});
    inputs.write("long.jsonl", long.to_string());
    let mut plan = plan(vec![inputs.path().into()], None);
    plan.validation_fraction = 0.0;
    let (_store, dataset) = made(&plan);
    let error = Batches::new(&dataset, Split::Train, 0, 32).unwrap_err();
    assert!(matches!(error, Error::NothingToLearn { window_tokens: Some(32), .. }), "{error}");
    assert!(Batches::new(&dataset, Split::Train, 0, 1024).is_ok());
}

#[test]
fn another_tokenizer_is_refused_by_name() {
    let inputs = chats(10);
    let (_store, dataset) = made(&plan(vec![inputs.path().into()], None));
    dataset.check_tokenizer("base", &tokenizer()).unwrap();
    let texts = [crate::text(1, 3000)];
    let other = BpeTrainer::new(300).train(&texts, &mut |_| {}).unwrap();
    let error = dataset.check_tokenizer("some-base", &other).unwrap_err().to_string();
    assert!(error.contains("chats") && error.contains("some-base"), "{error}");
}

/// The chats of the project's own data, where they are there.
#[test]
fn real_chats_are_read_whole() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/sft");
    let files = [
        ("chitchat_messages.jsonl.gz", 3188, false),
        ("dolly_hhrlhf_1000.jsonl.gz", 1000, false),
        ("raschka_instructions_1100_with_preference.json.gz", 1100, true),
        ("sgd_service_dialogues.jsonl.gz", 7867, false),
    ];
    if files.iter().any(|(file, ..)| !dir.join(file).exists()) {
        eprintln!("SKIPPED: {} has no chats", dir.display());
        return;
    }
    for (file, n_rows, is_pairs) in files {
        let inputs = Inputs::new();
        let path = match n_rows {
            0..=2000 => dir.join(file),
            // The first of the long ones.
            _ => inputs.write("first.jsonl", first_lines(&dir.join(file), 300)),
        };
        let mut plan = plan(vec![path], None);
        (plan.shard_tokens, plan.part_bytes, plan.read.bad_rows) = (1 << 20, 8 << 20, BadRows::Skip);
        let (_store, dataset) = made(&plan);
        let info = dataset.info();
        let n_documents = info.train.n_documents + info.validation.n_documents;
        // 6 pairs have the same text on both sides.
        let n_skipped = if is_pairs { 6 } else { 0 };
        let n_expected =
            (if n_rows > 2000 { 300 } else { n_rows } - n_skipped) * if is_pairs { 2 } else { 1 };
        assert_eq!((n_documents, info.n_rows_skipped), (n_expected, n_skipped), "{file}");
        let batches = Batches::new(&dataset, Split::Train, 1, 1024).unwrap();
        let n_learned = |row: Row| row.targets.iter().filter(|t| **t != NO_TARGET).count();
        assert!(n_learned(batches.row(0).unwrap()) > 0, "{file}");
    }
}

fn first_lines(path: &Path, n: usize) -> String {
    let file = std::io::BufReader::new(flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()));
    let lines = std::io::BufRead::lines(file).take(n).map(|line| line.unwrap() + "\n");
    lines.collect()
}
