//! The command line, in the order of the way from text to a chat answer.

mod cluster;
mod serve;
mod tools;
mod train;

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use tools::KvName;

pub(crate) use cluster::{
    Backup, JobCommand, KeyCommand, NeedFlags, NodeCommand, Offer, ProjectCommand, Restore,
};
pub(crate) use serve::{Guess, Serve, spelled_out};
pub(crate) use train::{DataChoice, DecayName, Method, OnLoss, Train};

pub(crate) use tools::{
    Bench, Chat, EvalCommand, Export, ExportFormat, ModelCommand, Output, Perplexity, Quantize, Tasks,
};

/// The infrastructure behind a ChatGPT, whole, in one program.
#[derive(Parser)]
#[command(name = "loquat", version, max_term_width = 100)]
pub(crate) struct Loquat {
    /// Where everything is kept: the store, the cluster's state, logs.
    #[arg(long, global = true, default_value = "loquat-home", env = "LOQUAT_HOME")]
    pub(crate) home: PathBuf,
    /// The object store when it is not the home's own directory: a path or s3://bucket/prefix.
    #[arg(long, global = true, env = "LOQUAT_STORE")]
    pub(crate) store: Option<String>,
    /// The cluster's state when it is not a file of the home's own: postgres://user:password@host/name, which any number
    /// of machines may share, or the path of a file.
    #[arg(long, global = true, env = "LOQUAT_DATABASE", hide_env_values = true, value_name = "URL")]
    pub(crate) database: Option<String>,
    /// Log lines as JSON.
    #[arg(long, global = true)]
    pub(crate) log_json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Turn text files into a dataset of token shards, training a tokenizer on the way.
    Ingest(Ingest),
    /// Train a model on a dataset; a run that exists goes on where it was.
    Train(Box<Train>),
    /// Datasets: look at what training sees of them.
    Data {
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Serve models over the OpenAI API, without a control plane.
    Serve(Serve),
    /// Everything on one machine: control plane, jobs, models, API and console.
    Up(Up),
    /// From text to a served chat model in one go; what ./run calls.
    Demo(Demo),
    /// Chat with a model in the terminal: a file, a directory, a name kept here, or a running server.
    Chat(Chat),
    /// How fast a model runs here, and how close that is to what the machine can do at most.
    Bench(Bench),
    /// How good a model is.
    Eval {
        #[command(subcommand)]
        command: EvalCommand,
    },
    /// Models: look at them, fetch, keep, convert and remove them.
    Model {
        #[command(subcommand)]
        command: ModelCommand,
    },
    /// Training and other jobs.
    Job {
        #[command(subcommand)]
        command: JobCommand,
    },
    /// The machines that run jobs, where several share a database.
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// What training or serving would take on a cluster that is described in a file.
    Plan(Plan),
    /// Models that replicas serve: how many, which version, canaries, engines elsewhere.
    Deploy {
        #[command(subcommand)]
        command: DeployCommand,
    },
    /// What the jobs of each project may use at once.
    Project {
        #[command(subcommand)]
        command: ProjectCommand,
    },
    /// Train, evaluate, hold against thresholds, try and serve a model, as one declared pipeline.
    Promote {
        #[command(subcommand)]
        command: PromoteCommand,
    },
    /// Keys that clients of the API need.
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Copy the cluster while it runs: the database, and every object of the store. Content that is there already is not
    /// copied again, so one that was interrupted goes on, and the next one is quick. Logs of jobs stay where they are.
    Backup(Backup),
    /// Bring a backup back into an empty home, store and database (SQLite or PostgreSQL, whichever it came from), each
    /// byte checked. What ran goes on from its last checkpoint; end what is left of the old cluster first.
    Restore(Restore),
    /// Runs a command in another pod of the same job; called by mpirun, as ssh is.
    #[command(hide = true)]
    PodShell {
        table: PathBuf,
        host: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// What this machine can do, measured, and whether everything is in order.
    Doctor,
}

#[derive(Args)]
pub(crate) struct Ingest {
    /// Name of the dataset.
    #[arg(long)]
    pub(crate) name: String,
    /// Files or directories: .txt, .md, .jsonl, .json, .parquet, also .gz and .zst.
    #[arg(required = true)]
    pub(crate) inputs: Vec<PathBuf>,
    /// Token ids of the tokenizer that is trained on the text.
    #[arg(long, default_value_t = 4096)]
    pub(crate) vocab: usize,
    /// Share of the documents that is held out for validation.
    #[arg(long, default_value_t = 0.03)]
    pub(crate) validation: f64,
    /// The field that holds the text, in formats that have fields.
    #[arg(long, default_value = "text")]
    pub(crate) text_field: String,
    /// In text files, a line that stands between documents, such as <|endoftext|>; empty: a blank line. Without it a file is a
    /// document.
    #[arg(long, value_name = "LINE")]
    pub(crate) separator: Option<String>,
    /// Use the tokenizer of this model instead of training one: what a model that is to learn on needs.
    #[arg(long, value_name = "MODEL", conflicts_with = "vocab")]
    pub(crate) tokenizer: Option<String>,
    /// The rows are chats or pairs of answers, to be learned where the assistant speaks: messages, prompt (and response or
    /// completion), alpaca, sharegpt or preference; without a name each row's fields tell.
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "auto", requires = "tokenizer")]
    pub(crate) chats: Option<String>,
    /// Leave out rows that cannot be read, and count them, instead of stopping at the first.
    #[arg(long)]
    pub(crate) skip_bad_rows: bool,
}

#[derive(Subcommand)]
pub(crate) enum DataCommand {
    /// Rows as training sees them, what is learned of them marked.
    Show {
        /// Name of the dataset.
        dataset: String,
        /// Tokens of one row.
        #[arg(long, default_value_t = 256)]
        context: usize,
        /// Rows to print.
        #[arg(long, default_value_t = 3)]
        rows: u64,
        /// Rows to pass over first.
        #[arg(long, default_value_t = 0)]
        skip: u64,
        /// Of the documents that are held out.
        #[arg(long)]
        validation: bool,
    },
}

/// Where and how to serve.
#[derive(Args, Clone)]
pub(crate) struct Listen {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1", env = "LOQUAT_HOST")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Speak TLS: a file with this server's certificate and those between it and its authority, in PEM. It must name the
    /// address that clients ask, of replicas as `loquat deploy list` shows it. A new one is taken up while the server runs.
    #[arg(long, value_name = "FILE", requires = "tls_key", env = "LOQUAT_TLS_CERT")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "LOQUAT_TLS_KEY")]
    pub(crate) tls_key: Option<PathBuf>,
    #[arg(long, short = 't')]
    pub(crate) threads: Option<usize>,
    /// Tokens that one sequence may have, prompt and answer together; 0 is what the model was made for.
    #[arg(long, short = 'c', alias = "max-model-len", default_value_t = 0)]
    pub(crate) ctx_size: usize,
    /// Memory for keys and values of running sequences, in MiB, for each model. [default: 256, or more if --ctx-size
    /// needs it]
    #[arg(long)]
    pub(crate) kv_mib: Option<usize>,
    /// How keys and values are kept.
    #[arg(long, alias = "cache-type-k", value_enum, default_value_t = KvName::Bf16)]
    pub(crate) kv_cache_dtype: KvName,
    /// Sequences that each model computes at the same time; more wait.
    #[arg(long, alias = "parallel", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub(crate) max_num_seqs: u32,
    /// Guess so many tokens ahead from what stands in the text already. Changes how fast answers come, never what they say.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=16))]
    pub(crate) prompt_lookup: u32,
}

impl Listen {
    /// For a server that only this process uses.
    pub(crate) fn local(threads: Option<usize>, kv_mib: usize) -> Listen {
        Listen {
            host: "127.0.0.1".to_owned(),
            port: 0,
            tls_cert: None,
            tls_key: None,
            threads,
            ctx_size: 0,
            kv_mib: Some(kv_mib),
            kv_cache_dtype: KvName::Bf16,
            max_num_seqs: 1,
            prompt_lookup: 0,
        }
    }

    /// What processes that this one starts show their clients: the same.
    pub(crate) fn tls_env(&self) -> Vec<(&'static str, &Path)> {
        let files = [("LOQUAT_TLS_CERT", &self.tls_cert), ("LOQUAT_TLS_KEY", &self.tls_key)];
        files.into_iter().filter_map(|(name, file)| Some((name, file.as_deref()?))).collect()
    }

    /// How tokens are guessed ahead, as far as these flags say.
    pub(crate) fn guess(&self) -> Guess {
        match self.prompt_lookup {
            0 => Guess::Off,
            k_max => Guess::Lookup { k_max: k_max as usize },
        }
    }
}

#[derive(Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) listen: Listen,
    /// Whom the gateway believes that it is a replica, where those speak TLS: a file of authorities' certificates, in PEM. A
    /// new one is taken up while it runs. [default: the authorities that browsers believe]
    #[arg(long, value_name = "FILE", env = "LOQUAT_TLS_CA")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// What runs jobs: processes of this machine, a Slurm cluster whose nodes see this home and this program, or a
    /// Kubernetes cluster whose pods reach the store and the database.
    #[arg(long, value_enum, default_value_t = LauncherName::Local)]
    pub(crate) launcher: LauncherName,
    /// More arguments of sbatch, each one: --sbatch=--partition=gpu
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub(crate) sbatch: Vec<String>,
    #[command(flatten)]
    pub(crate) offer: Offer,
    /// How jobs run on Kubernetes: a TOML file with image, and as needed namespace, server, token_file, ca_file, secret,
    /// program, accelerator, pod and container.
    #[arg(long, value_name = "FILE", required_if_eq("launcher", "kubernetes"))]
    pub(crate) kubernetes: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub(crate) enum LauncherName {
    Local,
    Slurm,
    Kubernetes,
}

#[derive(Args)]
pub(crate) struct Demo {
    /// Files or directories of text to learn from.
    #[arg(long, required = true)]
    pub(crate) text: Vec<PathBuf>,
    /// A chat model to serve beside the trained one: a .gguf file or a Hugging Face directory.
    #[arg(long)]
    pub(crate) chat_model: Option<PathBuf>,
    /// Name of the dataset, the run and the model.
    #[arg(long, default_value = "sotu")]
    pub(crate) name: String,
    #[arg(long, default_value_t = 3.0)]
    pub(crate) minutes: f64,
    /// Optimizer steps, instead of a time.
    #[arg(long)]
    pub(crate) steps: Option<u64>,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 25)]
    pub(crate) checkpoint_every: u64,
    #[command(flatten)]
    pub(crate) listen: Listen,
}

#[derive(Args)]
pub(crate) struct Plan {
    /// nodes, accelerators of a node, and of each: tflops, memory_gb, node_gb_per_s, network_gb_per_s; if known also
    /// memory_tb_per_s, efficiency, failures_per_accelerator_hour, checkpoint_seconds, restart_seconds,
    /// price_per_accelerator_hour.
    pub(crate) cluster: PathBuf,
    /// The model's shape.
    #[arg(long, value_parser = crate::commands::presets::names())]
    pub(crate) preset: String,
    #[arg(long, default_value_t = 128_256)]
    pub(crate) vocab: usize,
    #[arg(long, default_value_t = 8192, value_parser = at_least_one)]
    pub(crate) context: usize,
    /// Train on so many tokens.
    #[arg(long)]
    pub(crate) tokens: Option<f64>,
    /// Tokens of a step.
    #[arg(long, default_value_t = 4 << 20)]
    pub(crate) batch_tokens: usize,
    /// Serve so many requests a second.
    #[arg(long)]
    pub(crate) load: Option<f64>,
    /// Tokens of each one's prompt.
    #[arg(long, default_value_t = 1024)]
    pub(crate) prompt: usize,
    /// Tokens of each one's answer.
    #[arg(long, default_value_t = 256)]
    pub(crate) answer: usize,
    /// Of failures and arrivals.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(n) => Ok(n),
        Err(error) => Err(format!("{error}")),
    }
}

#[derive(Subcommand)]
pub(crate) enum DeployCommand {
    /// Serve a model by replicas, or change how. Another source replaces the live one, replica by replica.
    Set {
        /// What clients call it.
        model: String,
        /// A .gguf file, a Hugging Face directory or the name of a model kept here, which is the default.
        #[arg(long)]
        source: Option<String>,
        #[arg(long, conflicts_with_all = ["min", "max"])]
        replicas: Option<u32>,
        /// At least so many; 0 lets the last one go when nobody asks for five minutes (LOQUAT_IDLE_SECONDS of `loquat up`).
        #[arg(long)]
        min: Option<u32>,
        /// At most so many, as the load needs them.
        #[arg(long)]
        max: Option<u32>,
        /// What each replica needs.
        #[command(flatten)]
        needs: NeedFlags,
        /// More of the command line of each replica's `loquat serve`.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Try a new version on a share of the requests. It becomes live if it does well, and goes if it fails or is slow.
    Canary {
        model: String,
        source: String,
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=99))]
        percent: u32,
    },
    /// Make the version on trial live now.
    Promote {
        model: String,
    },
    /// End the trial.
    Rollback {
        model: String,
    },
    /// Any engine with an OpenAI API becomes a replica of the model.
    Add {
        model: String,
        /// http://host:port or https://host:port
        url: String,
        /// The environment variable that holds the key it wants.
        #[arg(long)]
        key_env: Option<String>,
    },
    List,
    /// Stop serving a model by replicas, or forget one engine elsewhere.
    Remove {
        model: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum PromoteCommand {
    /// Declare a pipeline; whichever controller leads carries it out, also when others die.
    Start {
        /// A .toml or .json file: model; train.args or source; evaluate.tasks and .args; gates, each a metric with at_least or
        /// at_most; canary.percent and .minutes; serve.replicas and .args.
        file: PathBuf,
        /// Tell what happens until it is over; exit with 1 where the model does not go live.
        #[arg(long, short = 'f')]
        follow: bool,
    },
    List,
    /// Every stage of one, and why it came to it.
    Show {
        id: i64,
        #[arg(long, short = 'f')]
        follow: bool,
    },
    /// End one: its job is cancelled, its trial rolled back.
    Cancel {
        id: i64,
    },
}
