//! Speed of training and encoding on real text, beside Hugging Face `tokenizers` and tiktoken in the same run.
//!
//! `cargo run --release -p tokenizer --example bench_tokenizer -- DIR [PYTHON]`: DIR holds `.txt` files; PYTHON is an
//! interpreter with `tokenizers` and `tiktoken`. Ids are compared before anything is timed.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::Value;
use tokenizer::{BpeTrainer, Tokenizer};

const ROUNDS: usize = 5;
const VOCAB_SIZES: [usize; 2] = [4096, 32_768];

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let directory = args.next().ok_or("usage: bench_tokenizer DIR [PYTHON]")?;
    let python = args.next();
    let documents = read_documents(Path::new(&directory))?;
    let n_bytes: usize = documents.iter().map(String::len).sum();
    println!("{} documents, {:.1} MB", documents.len(), n_bytes as f64 / 1e6);
    for vocab_size in VOCAB_SIZES {
        bench(&documents, n_bytes, vocab_size, python.as_deref().map(|python| (python, directory.as_str())))?;
    }
    Ok(())
}

fn bench(
    documents: &[String],
    n_bytes: usize,
    vocab_size: usize,
    peers: Option<(&str, &str)>,
) -> Result<(), Box<dyn Error>> {
    let mb = n_bytes as f64 / 1e6;
    let train = |n_threads| {
        let trainer = BpeTrainer { n_threads, ..BpeTrainer::new(vocab_size) };
        trainer.train(documents, &mut |_| {})
    };
    let train_s = |n_threads| {
        fastest(|| {
            let start = Instant::now();
            train(n_threads).map(|_| start)
        })
    };
    let tokenizer = train(1)?;
    let (train_1_s, train_2_s) = (train_s(1)?, train_s(2)?);
    let ids: Vec<Vec<u32>> = documents.iter().map(|text| tokenizer.encode(text)).collect();
    for (document, ids) in documents.iter().zip(&ids) {
        assert!(tokenizer.decode(ids) == *document, "decode(encode(text)) is not the text");
    }
    let encode_s = fastest(|| {
        let start = Instant::now();
        encode_all(&tokenizer, documents);
        Ok(start)
    })?;
    let cold_s = fastest(|| {
        let fresh = tokenizer.with_bos_eos(tokenizer.bos(), tokenizer.eos())?;
        let start = Instant::now();
        encode_all(&fresh, documents);
        Ok(start)
    })?;
    let encode_2_s = fastest(|| {
        let start = Instant::now();
        encode_together(&tokenizer, documents, 2);
        Ok(start)
    })?;
    println!("\n{vocab_size} ids, {:.2} bytes a token", n_bytes as f64 / ids.iter().flatten().count() as f64);
    println!("loquat      train {train_1_s:6.2} s (2 threads {train_2_s:.2} s)");
    println!(
        "            encode {:6.1} MB/s (cache cold {:.1}, 2 threads {:.1})",
        mb / encode_s,
        mb / cold_s,
        mb / encode_2_s
    );
    if let Some((python, directory)) = peers {
        compare(python, directory, &tokenizer, &ids, [train_1_s, mb / encode_s])?;
    }
    Ok(())
}

/// Runs the others on the same text and tokenizer; their ids must be ours.
fn compare(
    python: &str,
    directory: &str,
    tokenizer: &Tokenizer,
    ids: &[Vec<u32>],
    [train_s, encode_mb_s]: [f64; 2],
) -> Result<(), Box<dyn Error>> {
    let path = std::env::temp_dir().join(format!("loquat-bench-tokenizer-{}.json", std::process::id()));
    std::fs::write(&path, tokenizer.to_json())?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tokenizer_peers.py");
    let output = Command::new(python).arg(script).arg(&path).arg(directory).output()?;
    std::fs::remove_file(&path)?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    for line in String::from_utf8(output.stdout)?.lines() {
        let peer: Value = serde_json::from_str(line)?;
        let name = peer["name"].as_str().ok_or("a peer has no name")?;
        if let Some(seconds) = peer["train_s"].as_f64() {
            println!("{name:<11} train {seconds:6.2} s: we are {:.1} times as fast", seconds / train_s);
        }
        if let Some(speed) = peer["encode_mb_s"].as_f64() {
            let theirs: Vec<Vec<u32>> = serde_json::from_value(peer["ids"].clone())?;
            assert!(theirs == ids, "{name} gives other ids");
            println!(
                "{name:<11} encode {speed:6.1} MB/s, same ids: we are {:.1} times as fast",
                encode_mb_s / speed
            );
        }
    }
    Ok(())
}

fn encode_all(tokenizer: &Tokenizer, documents: &[String]) {
    for text in documents {
        std::hint::black_box(tokenizer.encode(text));
    }
}

/// Each thread takes the next document, as a dataset is made: their lengths differ.
fn encode_together(tokenizer: &Tokenizer, documents: &[String], n_threads: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                while let Some(text) = documents.get(next.fetch_add(1, Ordering::Relaxed)) {
                    std::hint::black_box(tokenizer.encode(text));
                }
            });
        }
    });
}

/// Seconds of the fastest of some rounds: what the machine's other users disturbed least. A round may prepare before it
/// starts its clock.
fn fastest(mut round: impl FnMut() -> tokenizer::Result<Instant>) -> tokenizer::Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        best = best.min(round()?.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn read_documents(directory: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let mut paths: Vec<_> = std::fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.sort();
    Ok(paths.iter().map(std::fs::read_to_string).collect::<Result<_, _>>()?)
}
