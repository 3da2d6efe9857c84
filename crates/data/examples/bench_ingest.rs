//! How fast text becomes a dataset: `cargo run --release -p data --example bench_ingest -- INPUT...`
//!
//! Ingests into RAM and into a directory with a BPE vocabulary of 4,096 ids, checks that the tokens decode to the first
//! document, and prints seconds by stage and megabytes of text a second.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use data::{Batches, Dataset, IngestPlan, ReadOptions, Split, TokenizerSource, documents, ingest};
use store::{Local, Ram, Store};

fn main() -> Result<(), Box<dyn Error>> {
    let inputs: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let Some(first) = inputs.first().cloned() else { return Err("usage: bench_ingest INPUT...".into()) };
    let first = documents(&first, &ReadOptions::default())?.next().ok_or("no documents")??;
    let plan = IngestPlan::new("bench", inputs, TokenizerSource::Train { vocab_size: 4096 });
    let dir = tempfile::tempdir()?;
    let local: Arc<dyn Store> = Arc::new(Local::open(dir.path())?);
    for store in [Arc::new(Ram::new()) as Arc<dyn Store>, local] {
        let started = Instant::now();
        let mut by_stage: BTreeMap<_, f64> = BTreeMap::new();
        let mut last = started;
        let info = ingest(&plan, &store, &mut |progress| {
            *by_stage.entry(progress.stage).or_default() += last.elapsed().as_secs_f64();
            last = Instant::now();
        })?;
        let seconds = started.elapsed().as_secs_f64();
        let dataset = Dataset::open(&store, "bench")?;
        check(&dataset, &first.text)?;
        let (n_bytes, n_tokens) =
            (info.train.n_bytes + info.validation.n_bytes, info.train.n_tokens + info.validation.n_tokens);
        println!("{}: {:.1} MB of text, {n_tokens} tokens", store.url(), n_bytes as f64 / 1e6);
        println!(
            "  {seconds:.2} s, {:.1} MB/s, on {} threads",
            n_bytes as f64 / 1e6 / seconds,
            plan.n_threads
        );
        for (stage, seconds) in by_stage {
            println!("  {seconds:6.2} s until reported as {stage:?}");
        }
        windows(&dataset)?;
    }
    Ok(())
}

/// The first document is the beginning of one of the splits.
fn check(dataset: &Dataset, text: &str) -> Result<(), Box<dyn Error>> {
    for split in [Split::Train, Split::Validation] {
        let n = dataset.info().split(split).n_tokens.min(text.len() as u64);
        if dataset.tokenizer().decode(&dataset.tokens(split, 0..n)?).starts_with(text) {
            return Ok(());
        }
    }
    Err("the tokens do not decode to the first document".into())
}

fn windows(dataset: &Dataset) -> Result<(), Box<dyn Error>> {
    let batches = Batches::new(dataset, Split::Train, 1, 256)?;
    batches.row(0)?;
    let started = Instant::now();
    for index in 0..batches.n_rows() {
        std::hint::black_box(batches.row(index)?);
    }
    let micros = started.elapsed().as_secs_f64() * 1e6 / batches.n_rows() as f64;
    println!("  {:.2} us for a window of 257 tokens in random order ({} windows)", micros, batches.n_rows());
    Ok(())
}
