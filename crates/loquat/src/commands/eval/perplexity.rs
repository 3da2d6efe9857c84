//! `loquat eval perplexity`: how well a model foretells a text.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tensor::Pool;

use crate::args::Perplexity;
use crate::home::Home;
use crate::serving;
use crate::session::{self, Row, Session};
use crate::view::progress;

/// Tokens whose logits are in memory at once: 64 · 262,144 · 4 B = 64 MiB with the largest vocabularies.
const SCORED_AT_ONCE: usize = 64;
/// The longest text that is read.
const TEXT_BYTES_MAX: u64 = 1 << 30;

pub(super) fn run(home: &Home, args: &Perplexity) -> Result<ExitCode> {
    if args.context < 4 || !args.context.is_multiple_of(2) {
        bail!("--context {} is not an even number of at least 4", args.context);
    }
    let text = read_text(&args.file)?;
    let path = crate::commands::model::resolve(home, &args.model)?;
    let pool = Pool::new(args.threads.unwrap_or_else(crate::n_threads));
    let (model, loaded) = session::load(&path, &pool)?;
    let tokenizer = serving::tokenizer_of(&path, &loaded)?;
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let tokens: Vec<u32> = bos.into_iter().chain(tokenizer.encode(&text)).collect();
    let n_chunks = (tokens.len() / args.context).min(args.chunks.unwrap_or(usize::MAX));
    if n_chunks == 0 {
        bail!("{} has {} tokens, a context of {}", args.file.display(), tokens.len(), args.context);
    }
    let mut session = Session::new(&model, &pool, args.kv.kv_type(), 1, args.context)?;
    let mut surprise = Surprise::default();
    for (i, chunk) in tokens.chunks_exact(args.context).take(n_chunks).enumerate() {
        let mut chunk = chunk.to_vec();
        // Every context begins as a text does.
        chunk[0] = bos.unwrap_or(chunk[0]);
        score(&mut session, &pool, &chunk, &mut surprise)?;
        progress(&format!("{}/{n_chunks} contexts, perplexity {:.4}", i + 1, surprise.perplexity()));
    }
    progress("");
    tell(args, n_chunks, &surprise);
    Ok(ExitCode::SUCCESS)
}

fn read_text(path: &Path) -> Result<String> {
    let failed = || format!("cannot read {}", path.display());
    let bytes = std::fs::metadata(path).with_context(failed)?.len();
    if bytes > TEXT_BYTES_MAX {
        bail!("{} has {bytes} bytes, at most {TEXT_BYTES_MAX} are read", path.display());
    }
    std::fs::read_to_string(path).with_context(failed)
}

/// Adds what the model thinks of the second half of a context; the first half only leads up to it.
fn score(session: &mut Session, pool: &Pool, chunk: &[u32], surprise: &mut Surprise) -> Result<()> {
    let (half, vocab) = (chunk.len() / 2, session.model.config().vocab);
    session.step(&[Row { stream: 0, tokens: &chunk[..half], n_cached: 0, n_logits: 0 }])?;
    // The last token foretells what is not part of the context.
    for first in (half..chunk.len() - 1).step_by(SCORED_AT_ONCE) {
        let end = (first + SCORED_AT_ONCE).min(chunk.len() - 1);
        let tokens = &chunk[first..end];
        let logits_nv =
            session.step(&[Row { stream: 0, tokens, n_cached: first, n_logits: tokens.len() }])?;
        let mut nats = vec![0.0; tokens.len()];
        pool.run_chunks(&mut nats, 1, |i, nats| {
            nats[0] = nats_of(&logits_nv[i * vocab..(i + 1) * vocab], chunk[first + i + 1]);
        });
        nats.iter().for_each(|nats| surprise.add(*nats));
    }
    Ok(())
}

/// The negative log-probability of `id`.
pub(crate) fn nats_of(logits_v: &[f32], id: u32) -> f64 {
    let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits_v.iter().map(|x| f64::from((x - max).exp())).sum();
    sum.ln() - f64::from(logits_v[id as usize] - max)
}

/// Sums over scored tokens, in nats.
#[derive(Default)]
struct Surprise {
    n: usize,
    sum: f64,
    sum_of_squares: f64,
}

impl Surprise {
    fn add(&mut self, nats: f64) {
        self.n += 1;
        self.sum += nats;
        self.sum_of_squares += nats * nats;
    }

    fn perplexity(&self) -> f64 {
        (self.sum / self.n as f64).exp()
    }

    /// One standard error of [`Surprise::perplexity`], tokens taken as independent.
    fn error(&self) -> f64 {
        let n = self.n as f64;
        let mean = self.sum / n;
        let variance = (self.sum_of_squares / n - mean * mean).max(0.0);
        (variance / (n - 1.0).max(1.0)).sqrt() * self.perplexity()
    }
}

fn tell(args: &Perplexity, n_chunks: usize, surprise: &Surprise) {
    let (perplexity, error) = (surprise.perplexity(), surprise.error());
    match args.json {
        true => {
            let line = serde_json::json!({
                "model": args.model, "file": args.file.display().to_string(), "context": args.context,
                "contexts": n_chunks, "tokens_scored": surprise.n, "perplexity": perplexity, "error": error,
            });
            println!("{line}");
        }
        false => println!(
            "perplexity {perplexity:.4} ± {error:.4} ({} tokens scored in {n_chunks} contexts of {})",
            surprise.n, args.context
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_what_the_formula_says() {
        // p = (1/7, 2/7, 4/7)
        let logits = [0.0, 2f32.ln(), 4f32.ln()];
        assert!((nats_of(&logits, 0) - 7f64.ln()).abs() < 1e-6);
        assert!((nats_of(&logits, 2) - (7f64 / 4.0).ln()).abs() < 1e-6);
        let mut surprise = Surprise::default();
        [1.0, 3.0].into_iter().for_each(|nats| surprise.add(nats));
        assert!((surprise.perplexity() - 2f64.exp()).abs() < 1e-9);
        // Variance 1 of 2 tokens: an error of 1 in the mean.
        assert!((surprise.error() - 2f64.exp()).abs() < 1e-9);
    }
}
