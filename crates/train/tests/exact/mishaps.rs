//! What goes wrong beside the steps, and other ways to take them: several datasets, Muon, steps that are skipped, a full
//! disk. All with the same promise.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use data::{Dataset, IngestPlan, TokenizerSource};
use model::{Config, ParamSpec, Trainable};
use store::{Bundle, BundleWriter, ObjectMeta, ObjectName, Put, Store};
use train::{Context, DataPart, Error, Event, Guard, Muon, Outcome, Plan, Tasks};

use crate::{STEPS, carry_out, context, prepared, results, whole_run};

/// The speeches, and a second dataset of the same tokenizer.
fn two_datasets() -> (Arc<dyn Store>, Plan) {
    let (store, mut plan) = prepared();
    let tokenizer = Dataset::open(&store, "speeches").unwrap().tokenizer();
    let dir = tempfile::tempdir().unwrap();
    for i in 0..40 {
        std::fs::write(
            dir.path().join(format!("{i}.txt")),
            format!("Count with me: {}", "one two ".repeat(30 + i)),
        )
        .unwrap();
    }
    let mut ingest = IngestPlan::new("counts", vec![dir.path().into()], TokenizerSource::Given(tokenizer));
    ingest.validation_fraction = 0.2;
    let sha256 = data::ingest(&ingest, &store, &mut |_| {}).unwrap().plan_sha256;
    plan.data.push(DataPart { dataset: "counts".into(), sha256, weight: 3.0 });
    (store, plan)
}

fn check_exact(store: &Arc<dyn Store>, plan: &Plan) {
    let one = whole_run(store, plan, "one", [1, 1]);
    assert!(whole_run(store, plan, "four", [4, 2]) == one, "4 ranks");
    train::create(store, "parts", plan, None).unwrap();
    carry_out(store, "parts", [4, 4], Some(1));
    carry_out(store, "parts", [2, 2], Some(4));
    carry_out(store, "parts", [8, 1], None);
    assert!(results(store, "parts") == one, "stopped and resumed on other ranks");
}

#[test]
fn mixtures_are_exact_and_validated_apart() {
    let (store, mut plan) = two_datasets();
    check_exact(&store, &plan);
    let events = train::read_metrics(store.as_ref(), "one").unwrap();
    let evals: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Eval { nats_per_token, parts, .. } => Some((*nats_per_token, parts.clone())),
            _ => None,
        })
        .collect();
    let (mean, parts) = evals.last().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part.dataset.as_str()).collect();
    assert_eq!(names, ["speeches", "counts"]);
    assert!((mean - (parts[0].nats_per_token + 3.0 * parts[1].nats_per_token) / 4.0).abs() < 1e-9);
    assert!(parts[1].nats_per_token < parts[0].nats_per_token - 0.3, "counting is learned faster: {parts:?}");

    // A dataset of weight 0 is validated on and changes nothing.
    plan.data[1].weight = 0.0;
    let watched = whole_run(&store, &plan, "watched", [1, 1]);
    plan.data.pop();
    assert!(whole_run(&store, &plan, "alone", [1, 1]) == watched);
}

#[test]
fn datasets_that_do_not_fit_each_other_are_named() {
    let (store, mut plan) = two_datasets();
    let ingest = |name: &str| {
        let text = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text");
        let plan = IngestPlan::new(name, vec![text], TokenizerSource::Train { vocab_size: 300 });
        data::ingest(&plan, &store, &mut |_| {}).unwrap().plan_sha256
    };
    plan.data[1] = DataPart { dataset: "other".into(), sha256: ingest("other"), weight: 1.0 };
    train::create(&store, "r", &plan, None).unwrap();
    let error = start(&store, "r").unwrap_err().to_string();
    assert!(error.contains("300"), "{error}");
    let refused = |plan: &Plan, word: &str| {
        let error = train::create(&store, "bad", plan, None).unwrap_err().to_string();
        assert!(error.contains(word), "{error} does not say {word}");
    };
    plan.data[1].dataset = plan.data[0].dataset.clone();
    refused(&plan, "twice");
    plan.data[1] = DataPart { weight: f64::NAN, dataset: "x".into(), ..plan.data[1].clone() };
    refused(&plan, "data.weight");
    plan.data.iter_mut().for_each(|part| part.weight = 0.0);
    refused(&plan, "more than 0");
}

/// Matrices of Muon have no mean of squares, and checkpoints none of them; older builds wrote zeros there.
#[test]
fn checkpoints_of_muon_are_small_and_older_ones_are_read() {
    let (store, mut plan) = prepared();
    plan.muon = Some(Muon::default());
    let whole = whole_run(&store, &plan, "whole", [1, 1]);
    train::create(&store, "older", &plan, None).unwrap();
    carry_out(&store, "older", [1, 1], Some(4));
    let prefix = "runs/older/checkpoints/00000004";
    let bundle = Bundle::open(&store, prefix).unwrap().unwrap();
    let files = ["params.f32", "adam_m.f32", "adam_v.f32"].map(|file| bundle.read(file).unwrap());
    let (n, n_squared) = (files[0].len() / 4, files[2].len() / 4);
    // Embeddings and norms of a model that is 32 wide; nearly all of the rest are matrices.
    assert!(n_squared < n && n_squared % 32 == 0, "{n_squared} of {n}");
    let config = Config::from_json(plan.model.to_string().as_bytes()).unwrap();
    let trainable = Trainable::new(&config);
    let is_matrix = |spec: &&ParamSpec| spec.dims.len() == 2 && !spec.name.contains("embed");
    let mut squares = vec![0; 4 * n];
    let (mut at, mut from) = (0, 0);
    let matrices = trainable.specs().iter().filter(is_matrix).map(|spec| spec.range.clone());
    for matrix in matrices.chain(std::iter::once(n..n)) {
        let bytes = 4 * at..4 * matrix.start;
        squares[bytes.clone()].copy_from_slice(&files[2][from..from + bytes.len()]);
        (at, from) = (matrix.end, from + bytes.len());
    }
    assert_eq!(from, files[2].len());
    let (kind, meta) = (bundle.manifest().kind.clone(), bundle.manifest().meta.clone());
    for object in store.list(prefix).unwrap() {
        store.delete(&object.name).unwrap();
    }
    let mut older = BundleWriter::new(&store, prefix).unwrap();
    for (file, bytes) in [("params.f32", &files[0]), ("adam_m.f32", &files[1]), ("adam_v.f32", &squares)] {
        older.add(file, bytes).unwrap();
    }
    older.publish(&kind, meta).unwrap();
    let (outcome, events) = carry_out(&store, "older", [2, 2], None);
    assert_eq!(outcome, Outcome::Finished);
    assert!(matches!(&events[0], Event::Started(s) if s.step == 4), "{:?}", events[0]);
    assert!(results(&store, "older") == whole);
}

#[test]
fn muon_is_exact_and_learns() {
    let (store, mut plan) = prepared();
    plan.muon = Some(Muon::default());
    plan.z_loss = 1e-4;
    check_exact(&store, &plan);
    let by_muon = results(&store, "one");
    let losses: Vec<f64> = by_muon.1.iter().map(|(_, bits)| f64::from_bits(*bits)).collect();
    assert!(losses[5] < losses[0] - 0.3, "{losses:?}");
    plan.muon = None;
    assert!(whole_run(&store, &plan, "adamw", [1, 1]) != by_muon);
}

fn start(store: &Arc<dyn Store>, run: &str) -> Result<Outcome, Error> {
    carry_out_with(store, run, 1, &mut |_| {})
}

fn carry_out_with(
    store: &Arc<dyn Store>,
    run: &str,
    n_ranks: usize,
    on_event: &mut dyn FnMut(&Event),
) -> Result<Outcome, Error> {
    let stop = AtomicBool::new(false);
    let context = Context { n_ranks, n_threads: n_ranks, ..context(store, run, &stop) };
    train::run(&context, on_event)
}

#[test]
fn steps_that_are_no_number_end_a_run_with_their_rows() {
    let (store, mut plan) = prepared();
    plan.schedule.lr_peak = 1e30;
    plan.schedule.warmup_steps = 0;
    plan.guard = Guard { skips_max: 2, spike_sigmas: None };
    let mut told = Vec::new();
    for n_ranks in [1, 4] {
        let run = format!("on-{n_ranks}");
        train::create(&store, &run, &plan, None).unwrap();
        let mut skipped = Vec::new();
        let error = carry_out_with(&store, &run, n_ranks, &mut |event| {
            if let Event::Skipped { rank, .. } = event {
                assert_eq!(rank.is_some(), n_ranks > 1, "the rank is named where there are several");
                let rank = rank.map_or(String::new(), |rank| format!("\"rank\":{rank},"));
                skipped.push(event.to_line().replace(&rank, ""));
            }
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("step 4") && error.contains("3 in a row"), "{error}");
        assert!(error.contains("not a number") && error.contains("speeches"), "{error}");
        assert_eq!(skipped.len(), 2, "{skipped:?}");
        told.push(skipped);
    }
    // (Which micro-batch is named differs: of several ranks it is known whose gradient it was.)
    assert_eq!(told[0], told[1], "ranks decide alike");
    plan.guard = Guard::default();
    train::create(&store, "strict", &plan, None).unwrap();
    assert!(matches!(start(&store, "strict"), Err(Error::StepsWentWrong { n: 1, step: 2, .. })));
}

#[test]
fn spikes_are_skipped_alike_after_a_resume() {
    let (store, mut plan) = prepared();
    plan.steps = 30;
    // Losses that only wander: about every other one is "far" above the mean.
    plan.schedule.lr_peak = 1e-6;
    plan.guard = Guard { skips_max: 100, spike_sigmas: Some(0.01) };
    let skipped = |run: &str| -> Vec<u64> {
        let events = train::read_metrics(store.as_ref(), run).unwrap();
        events.iter().filter(|e| matches!(e, Event::Skipped { .. })).map(Event::step).collect()
    };
    let one = whole_run(&store, &plan, "one", [1, 1]);
    let steps = skipped("one");
    assert!((1..10).contains(&steps.len()) && steps[0] > 20, "{steps:?}");
    assert_eq!(one.1.len() + steps.len(), 30, "every step is told once");
    train::create(&store, "parts", &plan, None).unwrap();
    carry_out(&store, "parts", [2, 2], Some(one.1[15].0));
    carry_out(&store, "parts", [4, 4], Some(one.1[21].0));
    carry_out(&store, "parts", [1, 1], None);
    assert!(results(&store, "parts") == one);
    assert_eq!(skipped("parts"), steps);
}

/// A store whose disk is full for the checkpoints of one step.
#[derive(Debug)]
struct FullDisk {
    inner: Arc<dyn Store>,
    step: &'static str,
}

impl FullDisk {
    fn check(&self, name: &ObjectName) -> store::Result<()> {
        if name.as_str().contains(self.step) {
            let store = self.url();
            return Err(store::Error::DiskFull { operation: "put", name: name.clone(), store });
        }
        Ok(())
    }
}

impl Store for FullDisk {
    fn put(&self, name: &ObjectName, bytes: &[u8]) -> store::Result<()> {
        self.check(name)?;
        self.inner.put(name, bytes)
    }
    fn put_reader(&self, name: &ObjectName, reader: &mut dyn Read, bytes: u64) -> store::Result<()> {
        self.check(name)?;
        self.inner.put_reader(name, reader, bytes)
    }
    fn put_if_absent(&self, name: &ObjectName, bytes: &[u8]) -> store::Result<Put> {
        self.check(name)?;
        self.inner.put_if_absent(name, bytes)
    }
    fn get(&self, name: &ObjectName) -> store::Result<Vec<u8>> {
        self.inner.get(name)
    }
    fn get_range(&self, name: &ObjectName, range: Range<u64>) -> store::Result<Vec<u8>> {
        self.inner.get_range(name, range)
    }
    fn head(&self, name: &ObjectName) -> store::Result<Option<ObjectMeta>> {
        self.inner.head(name)
    }
    fn list(&self, prefix: &str) -> store::Result<Vec<ObjectMeta>> {
        self.inner.list(prefix)
    }
    fn delete(&self, name: &ObjectName) -> store::Result<()> {
        self.inner.delete(name)
    }
    fn url(&self) -> String {
        self.inner.url()
    }
}

#[test]
fn a_full_disk_leaves_training_going_and_is_told() {
    let (store, mut plan) = prepared();
    // The first one: where an earlier is still being written, step 4 would have none.
    plan.checkpoint.every_steps = 4;
    let uninterrupted = whole_run(&store, &plan, "whole", [1, 1]);
    let full: Arc<dyn Store> = Arc::new(FullDisk { inner: store.clone(), step: "checkpoints/00000004" });
    train::create(&full, "full", &plan, None).unwrap();
    let (_, events) = carry_out(&full, "full", [2, 2], None);
    let failed: Vec<&Event> = events.iter().filter(|e| matches!(e, Event::CheckpointFailed { .. })).collect();
    let [Event::CheckpointFailed { step: 4, why }] = failed[..] else { panic!("{failed:?}") };
    assert!(why.contains("the disk is full"), "{why}");
    assert!(events.iter().any(|e| matches!(e, Event::Checkpoint { step: 6, .. })), "{events:?}");
    assert!(results(&store, "full") == uninterrupted);
}

/// A run that an older build planned and half did goes on: its plan keeps its bytes, its checkpoints are its own.
#[test]
fn plans_of_version_1_are_read_and_go_on() {
    let (store, plan) = prepared();
    let uninterrupted = whole_run(&store, &plan, "whole", [1, 1]);
    let mut old: serde_json::Value = serde_json::from_slice(&plan.to_json()).unwrap();
    let fields = old.as_object_mut().unwrap();
    fields.insert("version".into(), 1.into());
    fields.remove("data");
    fields.insert("dataset".into(), plan.data[0].dataset.clone().into());
    fields.insert("dataset_sha256".into(), plan.data[0].sha256.clone().into());
    let bytes = serde_json::to_vec(&old).unwrap();
    let read = Plan::from_json(&bytes).unwrap();
    assert_eq!(Plan { version: plan.version, ..read.clone() }, plan);
    store.put(&ObjectName::parse("runs/old/plan.json").unwrap(), &bytes).unwrap();
    train::create(&store, "old", &read, None).unwrap();
    carry_out(&store, "old", [1, 1], Some(3));
    let (_, events) = carry_out(&store, "old", [2, 1], None);
    assert!(matches!(&events[0], Event::Started(s) if s.step == 3), "{:?}", events[0]);
    assert!(results(&store, "old") == uninterrupted);
}

const CHOICES: &str = r#"{"query": "Fellow citizens of the", "choices": ["Senate", "qqq zzz"], "gold": 0}
{"query": "We the", "choices": ["people", "xylophone"], "gold": 0}
{"query": "The state of the", "choices": ["jkvw", "union"], "gold": 1}
"#;

/// The plan with tasks, whose files are in the run.
fn with_tasks(store: &Arc<dyn Store>, plan: &Plan, run: &str, files: &[(String, Vec<u8>)]) -> Plan {
    train::keep_tasks(store, run, files).unwrap();
    let plan = Plan { tasks: Some(Tasks::new(4, 1, 2, files).unwrap()), ..plan.clone() };
    train::create(store, run, &plan, None).unwrap();
    plan
}

fn asked(store: &Arc<dyn Store>, run: &str) -> Vec<Event> {
    let events = train::read_metrics(store.as_ref(), run).unwrap();
    events.into_iter().filter(|e| matches!(e, Event::Task { .. } | Event::TasksFailed { .. })).collect()
}

#[test]
fn tasks_are_asked_and_change_no_bit() {
    let (store, plan) = prepared();
    let unasked = whole_run(&store, &plan, "unasked", [1, 1]);
    let files = [("words.jsonl".to_owned(), CHOICES.as_bytes().to_vec())];
    with_tasks(&store, &plan, "one", &files);
    carry_out(&store, "one", [1, 1], None);
    assert!(results(&store, "one") == unasked);
    let one = asked(&store, "one");
    assert_eq!(one.iter().map(Event::step).collect::<Vec<_>>(), [0, 4, STEPS]);
    for event in &one {
        let Event::Task { scores, .. } = event else { panic!("{event:?}") };
        assert_eq!(
            (scores.task.as_str(), scores.items, scores.metrics[0].name.as_str()),
            ("words", 2, "acc")
        );
        assert!((0.0..=1.0).contains(&scores.metrics[0].value) && scores.metrics[0].stderr <= 0.5);
    }
    assert_ne!(one[0].to_line().replace("\"step\":0", ""), one[2].to_line().replace("\"step\":6", ""));
    let board = store.list("runs/one/tensorboard").unwrap();
    let bytes = store.get(&board[0].name).unwrap();
    for tag in ["tasks/words/acc", "tasks/words/acc_stderr"] {
        assert!(bytes.windows(tag.len()).any(|w| w == tag.as_bytes()), "{tag}");
    }

    with_tasks(&store, &plan, "parts", &files);
    carry_out(&store, "parts", [4, 4], Some(3));
    carry_out(&store, "parts", [2, 2], None);
    assert!(results(&store, "parts") == unasked);
    assert_eq!(asked(&store, "parts"), one, "on other ranks, stopped and resumed");
}

#[test]
fn tasks_that_cannot_be_asked_are_told() {
    let (store, plan) = prepared();
    let files = |text: &str| [("words.jsonl".to_owned(), text.as_bytes().to_vec())];
    let error = Tasks::new(1, 0, 5, &files("{\"query\": 3}")).unwrap_err().to_string();
    assert!(error.contains("words.jsonl, line 1"), "{error}");

    // Answers that are longer than the model's context: the run goes on, and says so.
    let sum = r#"{"question": "What is 1 + 1?", "answer": "One and one.\n#### 2"}"#;
    let unasked = whole_run(&store, &plan, "unasked", [1, 1]);
    let of_one = Plan { tasks: Some(Tasks::new(9, 0, 2, &files(sum)).unwrap()), ..plan.clone() };
    train::keep_tasks(&store, "sums", &files(sum)).unwrap();
    train::create(&store, "sums", &of_one, None).unwrap();
    carry_out(&store, "sums", [1, 1], None);
    assert!(results(&store, "sums") == unasked);
    let told = asked(&store, "sums");
    let [Event::TasksFailed { step: 0, why }, Event::TasksFailed { .. }] = &told[..] else {
        panic!("{told:?}")
    };
    assert!(why.contains("the model failed"), "{why}");

    // Another file in the run than was planned.
    with_tasks(&store, &plan, "changed", &files(CHOICES));
    train::keep_tasks(&store, "changed", &files(&CHOICES.replace("people", "person"))).unwrap();
    let error = start(&store, "changed").unwrap_err().to_string();
    assert!(error.contains("words.jsonl") && error.contains("changed"), "{error}");
}

#[test]
fn curves_are_there_for_tensorboard() {
    let (store, plan) = prepared();
    whole_run(&store, &plan, "r", [1, 1]);
    let files = store.list("runs/r/tensorboard").unwrap();
    assert_eq!(files.len(), 1, "{files:?}");
    let bytes = store.get(&files[0].name).unwrap();
    let has = |text: &str| bytes.windows(text.len()).filter(|w| *w == text.as_bytes()).count();
    assert_eq!((has("brain.Event:2"), has("train/loss"), has("validation/bits_per_byte")), (1, 6, 3));
}
