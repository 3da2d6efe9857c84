//! The promise of exactness: the same bits on any number of ranks, on any number of threads, stopped and resumed or not,
//! with a damaged checkpoint in between. (A real kill −9 of a real process: `crates/loquat/tests`.)

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use data::{Dataset, IngestPlan, TokenizerSource};
use model::Objective;
use store::{Bundle, Store};
use train::{
    AdamW, CheckpointPolicy, Context, DataPart, Decay, Error, Evaluate, Event, Guard, Method, Outcome,
    PLAN_VERSION, Plan, Sample, Schedule, Zero,
};

mod diloco;
mod divided;
mod methods;
mod mishaps;
mod pipelines;
mod teams;

const STEPS: u64 = 6;
/// Of a loss, between layouts that round otherwise.
const LOSS_TOLERANCE: f64 = 1e-4;

/// A store with a small dataset of real text, and a plan for it.
fn prepared() -> (Arc<dyn Store>, Plan) {
    let store = store::open("mem:").unwrap();
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text");
    let mut ingest = IngestPlan::new("speeches", vec![text], TokenizerSource::Train { vocab_size: 320 });
    ingest.validation_fraction = 0.2;
    data::ingest(&ingest, &store, &mut |_| {}).unwrap();
    let dataset = Dataset::open(&store, "speeches").unwrap();
    let model = serde_json::json!({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": dataset.info().vocab_size,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "max_position_embeddings": 32,
    });
    let plan = Plan {
        version: PLAN_VERSION,
        data: vec![DataPart {
            dataset: "speeches".into(),
            sha256: dataset.info().plan_sha256.clone(),
            weight: 1.0,
        }],
        isolated: false,
        publish: Some("tiny".into()),
        model,
        start: None,
        method: Method::Full,
        objective: Objective::CrossEntropy,
        teacher: None,
        context: 32,
        rows: 2,
        micro_batches: 8,
        steps: STEPS,
        schedule: Schedule { decay: Decay::Cosine, lr_peak: 1e-2, lr_final_share: 0.1, warmup_steps: 2 },
        adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        muon: None,
        diloco: None,
        z_loss: 0.0,
        guard: Guard::default(),
        clip_norm: 1.0,
        seed: 3,
        bf16: false,
        evaluate: Evaluate { every_steps: 3, rows_max: 5 },
        checkpoint: CheckpointPolicy { every_steps: 2, keep: 2 },
        sample: Sample { every_steps: 6, prompt: "Fellow citizens".into(), n_tokens: 8 },
        tasks: None,
    };
    (store, plan)
}

/// On one rank, all state on each, by a clock that stands.
fn context<'a>(store: &Arc<dyn Store>, run: &str, stop: &'a AtomicBool) -> Context<'a> {
    Context {
        store: store.clone(),
        run: run.into(),
        n_ranks: 1,
        n_team: 1,
        n_stages: 1,
        hosts: Vec::new(),
        after: None,
        zero: Zero::Nothing,
        n_threads: 1,
        recompute: false,
        peak_flops: 1.0,
        stop,
        seconds: &|| 0.0,
        started_unix: 0.0,
    }
}

/// What carries a run out.
#[derive(Clone, Copy, Debug)]
struct Layout {
    n_ranks: usize,
    /// Of all ranks together.
    n_threads: usize,
    n_team: usize,
    n_stages: usize,
    zero: Zero,
}

/// Ranks that compute whole models, and their threads.
impl From<[usize; 2]> for Layout {
    fn from([n_ranks, n_threads]: [usize; 2]) -> Layout {
        Layout { n_ranks, n_threads, n_team: 1, n_stages: 1, zero: Zero::Nothing }
    }
}

/// Carries `run` out; stops it after step `until` if that is `Some`.
fn carry_out(
    store: &Arc<dyn Store>,
    run: &str,
    layout: impl Into<Layout>,
    until: Option<u64>,
) -> (Outcome, Vec<Event>) {
    let stop = AtomicBool::new(false);
    let Layout { n_ranks, n_threads, n_team, n_stages, zero } = layout.into();
    // Some layouts compute layers again, and change no bit either.
    let recompute = n_ranks == 4 * n_stages;
    let start = Context { recompute, ..context(store, run, &stop) };
    let context = Context { n_ranks, n_threads, n_team, n_stages, zero, ..start };
    let mut events = Vec::new();
    let outcome = train::run(&context, &mut |event| {
        if matches!(event, Event::Step(s) if Some(s.step) == until) {
            stop.store(true, Ordering::Relaxed);
        }
        events.push(event.clone());
    });
    (outcome.unwrap(), events)
}

/// Carries `run` out on one layout after the other, each until its step, with no checkpoint that fails.
fn carry_out_parts(
    store: &Arc<dyn Store>,
    run: &str,
    parts: impl IntoIterator<Item = (impl Into<Layout>, Option<u64>)>,
) {
    for (layout, until) in parts {
        let (outcome, events) = carry_out(store, run, layout, until);
        assert_eq!(outcome == Outcome::Finished, until.is_none(), "{run}");
        let went_wrong =
            |e: &Event| matches!(e, Event::CheckpointRefused { .. } | Event::CheckpointFailed { .. });
        assert!(!events.iter().any(went_wrong), "{run}: {events:?}");
    }
}

/// The published weights, and the losses that the metrics log holds, with their steps, as bits.
type Results = (Vec<u8>, Vec<(u64, u64)>);

fn results(store: &Arc<dyn Store>, run: &str) -> Results {
    let weights = Bundle::open(store, "models/tiny").unwrap().unwrap().read("model.safetensors").unwrap();
    let losses = train::read_metrics(store.as_ref(), run).unwrap();
    let losses = losses.iter().filter_map(|event| match event {
        Event::Step(s) => Some((s.step, s.loss.to_bits())),
        _ => None,
    });
    (weights, losses.collect())
}

fn run_in_parts(
    store: &Arc<dyn Store>,
    plan: &Plan,
    run: &str,
    parts: impl IntoIterator<Item = (impl Into<Layout>, Option<u64>)>,
) -> Results {
    train::create(store, run, plan, None).unwrap();
    carry_out_parts(store, run, parts);
    results(store, run)
}

fn whole_run(store: &Arc<dyn Store>, plan: &Plan, run: &str, layout: impl Into<Layout>) -> Results {
    run_in_parts(store, plan, run, [(layout, None)])
}

/// Losses of a layout that rounds otherwise: sums of several parts instead of one.
fn assert_near(one: &[(u64, u64)], other: &[(u64, u64)]) {
    assert_eq!(one.len(), other.len());
    for ((step, a), (_, b)) in one.iter().zip(other) {
        let (a, b) = (f64::from_bits(*a), f64::from_bits(*b));
        assert!((a - b).abs() < LOSS_TOLERANCE * a, "step {step}: {a} and {b}");
    }
}

#[test]
fn ranks_and_threads_change_no_bit() {
    let (store, plan) = prepared();
    let one = whole_run(&store, &plan, "one", [1, 1]);
    assert_eq!(one.1.iter().map(|l| l.0).collect::<Vec<_>>(), (1..=STEPS).collect::<Vec<_>>());
    let first = f64::from_bits(one.1[0].1);
    let last = f64::from_bits(one.1[STEPS as usize - 1].1);
    assert!(last < first - 0.3, "nothing was learned: {first} then {last}");
    for (n_ranks, n_threads) in [(1, 3), (2, 2), (3, 3), (4, 4), (7, 1), (8, 2)] {
        let run = format!("on-{n_ranks}-{n_threads}");
        assert!(
            whole_run(&store, &plan, &run, [n_ranks, n_threads]) == one,
            "{n_ranks} ranks, {n_threads} threads"
        );
    }
    let other = Plan { seed: 4, ..plan };
    assert!(
        whole_run(&store, &other, "other-seed", [1, 1]) != one,
        "the comparison sees no difference at all"
    );
}

#[test]
fn stopped_and_resumed_on_other_ranks_changes_no_bit() {
    let (store, plan) = prepared();
    let uninterrupted = whole_run(&store, &plan, "whole", [1, 1]);
    train::create(&store, "parts", &plan, None).unwrap();
    assert_eq!(carry_out(&store, "parts", [4, 4], Some(1)).0, Outcome::Interrupted);
    assert_eq!(carry_out(&store, "parts", [2, 2], Some(3)).0, Outcome::Interrupted);
    assert_eq!(carry_out(&store, "parts", [3, 3], Some(4)).0, Outcome::Interrupted);
    let (outcome, events) = carry_out(&store, "parts", [8, 1], None);
    assert_eq!(outcome, Outcome::Finished);
    assert!(matches!(&events[0], Event::Started(s) if s.step == 4), "{:?}", events[0]);
    assert!(results(&store, "parts") == uninterrupted);
}

#[test]
fn a_damaged_checkpoint_falls_back_to_the_one_before() {
    let (store, plan) = prepared();
    let uninterrupted = whole_run(&store, &plan, "whole", [1, 1]);
    train::create(&store, "hurt", &plan, None).unwrap();
    carry_out(&store, "hurt", [1, 1], Some(4));
    let newest = store.list("runs/hurt/checkpoints/00000004").unwrap();
    let victim = newest.iter().find(|o| o.name.as_str().ends_with("params.f32")).unwrap();
    let mut bytes = store.get(&victim.name).unwrap();
    bytes[1000] ^= 1;
    store.put(&victim.name, &bytes).unwrap();
    let (_, events) = carry_out(&store, "hurt", [1, 1], None);
    assert!(events.iter().any(|e| matches!(e, Event::CheckpointRefused { step: 4, .. })), "{events:?}");
    assert!(results(&store, "hurt") == uninterrupted);

    // With no checkpoint left that can be read, the run says so instead of starting over.
    for object in store.list("runs/hurt/checkpoints").unwrap() {
        if object.name.as_str().ends_with("adam_v.f32") {
            store.put(&object.name, b"short").unwrap();
        }
    }
    let stop = AtomicBool::new(false);
    let context = context(&store, "hurt", &stop);
    assert!(matches!(train::run(&context, &mut |_| {}), Err(Error::NoCheckpoint { .. })));
}

#[test]
fn a_changed_plan_and_other_data_are_refused_by_name() {
    let (store, plan) = prepared();
    train::create(&store, "fixed", &plan, None).unwrap();
    train::create(&store, "fixed", &plan, None).unwrap();
    let mut changed = plan.clone();
    changed.schedule.lr_peak = 0.5;
    let error = train::create(&store, "fixed", &changed, None).unwrap_err();
    assert!(error.to_string().contains("schedule.lr_peak"), "{error}");

    let moved = Plan { data: vec![DataPart { sha256: "00".into(), ..plan.data[0].clone() }], ..plan.clone() };
    train::create(&store, "moved", &moved, None).unwrap();
    let stop = AtomicBool::new(false);
    let context = |run: &str, n_ranks| Context { n_ranks, ..context(&store, run, &stop) };
    assert!(matches!(train::run(&context("moved", 1), &mut |_| {}), Err(Error::DatasetChanged { .. })));
    assert!(matches!(train::run(&context("fixed", 9), &mut |_| {}), Err(Error::Ranks { .. })));
    assert!(matches!(train::run(&context("absent", 1), &mut |_| {}), Err(Error::NoRun { .. })));
    let bad = Plan { rows: 0, ..plan };
    assert!(train::create(&store, "bad", &bad, None).unwrap_err().to_string().contains("rows"));
}
