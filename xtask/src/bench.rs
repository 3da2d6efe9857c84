//! `cargo xtask bench`: every hot path with its share of the machine's limit, and beside a rival where one is given.
//! What is printed is kept in docs/log.md, with its date.

use std::path::{Path, PathBuf};

use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure; everything when nothing is named.
    what: Vec<What>,
    /// llama.cpp's llama-bench, to run beside ours.
    #[arg(long, env = "LLAMA_BENCH")]
    llama_bench: Option<PathBuf>,
    /// llama.cpp's llama-server, to serve beside ours.
    #[arg(long, env = "LLAMA_SERVER")]
    llama_server: Option<PathBuf>,
    /// Models that are measured beside llama.cpp; SmolLM2-135M in Q4_1 when none is named.
    #[arg(long)]
    model: Vec<String>,
    /// A Python that has PyTorch, to train beside ours.
    #[arg(long, env = "TORCH_PYTHON")]
    torch_python: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum What {
    Limits,
    Matmul,
    Packed,
    Attention,
    Pool,
    Store,
    Ingest,
    Tokenizer,
    Train,
    Checkpoint,
    Comm,
    Engine,
    Serve,
    Speculation,
    Stall,
    Gateway,
    /// Half an hour; only when it is named.
    Soak,
}

const ALL: &[What] = &[
    What::Limits,
    What::Matmul,
    What::Packed,
    What::Attention,
    What::Pool,
    What::Store,
    What::Ingest,
    What::Tokenizer,
    What::Train,
    What::Checkpoint,
    What::Comm,
    What::Engine,
    What::Serve,
    What::Speculation,
    What::Stall,
    What::Gateway,
];

const TEXT: &str = "var/cache/sotu";
const CHAT_MODEL: &str = "var/cache/smollm2-135m-instruct-q4_1.gguf";

impl Args {
    fn models(&self) -> Vec<String> {
        if self.model.is_empty() { vec![CHAT_MODEL.to_owned()] } else { self.model.clone() }
    }
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let chosen = if args.what.is_empty() { ALL.to_vec() } else { args.what.clone() };
    for what in chosen {
        println!("\n\x1b[1m── {}\x1b[0m", name(what));
        match what {
            What::Limits => example(root, "tensor", "bench_limits", &[])?,
            What::Matmul => example(root, "tensor", "bench_matmul", &[])?,
            What::Packed => example(root, "tensor", "bench_packed", &[])?,
            What::Attention => example(root, "tensor", "bench_attention", &[])?,
            What::Pool => example(root, "tensor", "bench_pool", &[])?,
            What::Store => example(root, "store", "bench_store", &[])?,
            What::Ingest => example(root, "data", "bench_ingest", &[TEXT])?,
            What::Tokenizer => example(root, "tokenizer", "bench_tokenizer", &[TEXT])?,
            What::Train => crate::bench_train::run(root, args.torch_python.as_deref())?,
            What::Checkpoint => example(root, "train", "bench_checkpoint", &[])?,
            What::Comm => crate::bench_comm::run(root)?,
            What::Engine => {
                example(root, "engine", "bench_engine", &[CHAT_MODEL])?;
                crate::bench_engine::run(root, &args.models(), args.llama_bench.as_deref())?
            }
            What::Serve => crate::bench_serve::run(root, CHAT_MODEL, args.llama_server.as_deref())?,
            What::Speculation => crate::bench_speculation::run(root, CHAT_MODEL, TEXT)?,
            What::Stall => example(root, "engine", "bench_stall", &[CHAT_MODEL])?,
            What::Gateway => example(root, "api", "bench_gateway", &[])?,
            What::Soak => example(root, "engine", "soak", &[CHAT_MODEL])?,
        }
    }
    Ok(())
}

fn name(what: What) -> String {
    clap::ValueEnum::to_possible_value(&what).map_or(String::new(), |v| v.get_name().to_owned())
}

fn example(root: &Path, package: &str, example: &str, args: &[&str]) -> Result<()> {
    let cargo = ["run", "--release", "--quiet", "--package", package, "--example", example, "--"];
    crate::run(root, "cargo", &[&cargo[..], args].concat())
}
