//! What a checkpoint costs the steps beside it: `cargo run --release -p train --example bench_checkpoint [STEPS]`.
//!
//! One run into a directory, with a checkpoint every now and then. A step's time is from the end of the step before to its
//! own end, so that what training stands still for counts. Steps with a checkpoint beside them are compared with the
//! others of the same run: medians, so that a neighbour's moment does not decide.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use data::{Dataset, IngestPlan, TokenizerSource};
use model::Objective;
use serde_json::json;
use store::Store;
use train::{
    AdamW, CheckpointPolicy, Context, DataPart, Decay, Evaluate, Event, Guard, Method, PLAN_VERSION, Plan,
    Sample, Schedule,
};

/// Steps between checkpoints: about as many without one beside them as with.
const EVERY: u64 = 25;
/// The first steps find nothing in caches and no memory mapped.
const WARM_UP: u64 = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let steps = std::env::args().nth(1).map_or(Ok(201), |arg| arg.parse())?;
    let dir = tempfile::tempdir()?;
    let store = store::open(&dir.path().display().to_string())?;
    let plan = plan(&store, steps)?;
    train::create(&store, "bench", &plan, None)?;
    let start = Instant::now();
    let context = Context {
        store,
        run: "bench".into(),
        n_ranks: 1,
        n_team: 1,
        n_stages: 1,
        hosts: Vec::new(),
        n_threads: std::thread::available_parallelism()?.get(),
        recompute: false,
        after: None,
        zero: train::Zero::Nothing,
        peak_flops: 1.0,
        stop: &AtomicBool::new(false),
        seconds: &|| start.elapsed().as_secs_f64(),
        started_unix: 0.0,
    };
    let mut seen = Seen::default();
    train::run(&context, &mut |event| seen.push(event, start.elapsed().as_secs_f64()))?;
    seen.report();
    Ok(())
}

fn plan(store: &Arc<dyn Store>, steps: u64) -> Result<Plan, Box<dyn std::error::Error>> {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text");
    let ingest = IngestPlan::new("text", vec![text], TokenizerSource::Train { vocab_size: 1024 });
    data::ingest(&ingest, store, &mut |_| {})?;
    let dataset = Dataset::open(store, "text")?;
    let info = dataset.info();
    Ok(Plan {
        version: PLAN_VERSION,
        data: vec![DataPart { dataset: "text".into(), sha256: info.plan_sha256.clone(), weight: 1.0 }],
        isolated: false,
        publish: None,
        model: json!({
            "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 192, "num_attention_heads": 6,
            "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": info.vocab_size,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "max_position_embeddings": 256,
        }),
        start: None,
        method: Method::Full,
        objective: Objective::CrossEntropy,
        teacher: None,
        context: 256,
        rows: 16,
        micro_batches: 1,
        steps,
        schedule: Schedule { decay: Decay::Constant, lr_peak: 1e-4, lr_final_share: 1.0, warmup_steps: 1 },
        adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        muon: None,
        diloco: None,
        z_loss: 0.0,
        guard: Guard::default(),
        clip_norm: 1.0,
        seed: 1,
        bf16: false,
        // Beyond the end: nothing but steps and checkpoints.
        evaluate: Evaluate { every_steps: steps + 1, rows_max: 1 },
        checkpoint: CheckpointPolicy { every_steps: EVERY, keep: 2 },
        sample: Sample { every_steps: steps + 1, prompt: "We".into(), n_tokens: 1 },
        tasks: None,
    })
}

/// Times of steps by what was beside them.
#[derive(Default)]
struct Seen {
    /// When the step before ended.
    last: Option<f64>,
    /// A checkpoint is being written since this step.
    since: Option<u64>,
    alone: Vec<f64>,
    beside: Vec<f64>,
    /// Of the steps that begin with the copy.
    first: Vec<f64>,
    stalled: Vec<f64>,
    written: Vec<f64>,
}

impl Seen {
    fn push(&mut self, event: &Event, now: f64) {
        match event {
            Event::Step(step) => {
                if let Some(last) = self.last.replace(now).filter(|_| step.step > WARM_UP) {
                    let kind = match self.since {
                        None => &mut self.alone,
                        Some(since) if since + 1 == step.step => &mut self.first,
                        Some(_) => &mut self.beside,
                    };
                    kind.push(now - last);
                }
                if step.step.is_multiple_of(EVERY) {
                    self.since = self.since.or(Some(step.step));
                }
            }
            // The step that goes on while this is told had a checkpoint beside its beginning: it counts for none.
            Event::Checkpoint { step, seconds, write_seconds, .. } if self.since == Some(*step) => {
                self.since = None;
                self.stalled.push(*seconds);
                self.written.push(*write_seconds);
            }
            _ => {}
        }
    }

    fn report(mut self) {
        let n = [&self.alone, &self.beside, &self.first].map(Vec::len);
        let [alone, beside, first] =
            [&mut self.alone, &mut self.beside, &mut self.first].map(|times| median(times));
        let [stalled, written] = [&mut self.stalled, &mut self.written].map(|times| median(times));
        let percent = |x: f64| 100.0 * (x / alone - 1.0);
        println!("{:.1} ms a step without a checkpoint beside it (median of {})", 1e3 * alone, n[0]);
        println!("{:+.2} % with one being written (median of {})", percent(beside), n[1]);
        println!("{:+.2} % where it begins (median of {})", percent(first), n[2]);
        println!("{:.1} ms stood still, {written:.1} s until it was there (medians)", 1e3 * stalled);
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
