//! The command lines of the tools around a model: chat, bench, eval, and the care of model files.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use model::KvType;

#[derive(Args)]
pub(crate) struct Chat {
    /// A .gguf file, a Hugging Face directory, the name of a model kept here, or the URL of a server (http://…).
    pub(crate) model: String,
    /// What the model is told before the first message.
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// 0 always takes the most likely token; 1 draws as the model was trained.
    #[arg(long, default_value_t = 0.7)]
    pub(crate) temperature: f32,
    /// Keep the smallest set of tokens with this probability together.
    #[arg(long, default_value_t = 0.95)]
    pub(crate) top_p: f32,
    /// Tokens of one answer at most.
    #[arg(long, default_value_t = 1024)]
    pub(crate) max_tokens: usize,
    /// Draws the same answers again; default is another seed for each.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// The key of a server.
    #[arg(long, env = "LOQUAT_API_KEY")]
    pub(crate) api_key: Option<String>,
    /// Which of a server's models; default is its first.
    #[arg(long)]
    pub(crate) server_model: Option<String>,
    #[arg(short, long)]
    pub(crate) threads: Option<usize>,
    /// Memory for keys and values, in MiB.
    #[arg(long, default_value_t = 512)]
    pub(crate) kv_mib: usize,
}

/// Types of the key/value cache by the names that llama.cpp and vLLM give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvName {
    #[value(aliases = ["auto", "bfloat16"])]
    Bf16,
    #[value(alias = "float32")]
    F32,
    /// 8 bits, and a scale for each position and head.
    #[value(aliases = ["q8_0", "fp8"])]
    Int8,
}

impl KvName {
    pub(crate) fn kv_type(self) -> KvType {
        match self {
            KvName::Bf16 => KvType::Bf16,
            KvName::F32 => KvType::F32,
            KvName::Int8 => KvType::Int8,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Text,
    #[value(alias = "md")]
    Markdown,
    Jsonl,
}

#[derive(Args)]
pub(crate) struct Bench {
    /// .gguf files, Hugging Face directories or names of models kept here.
    #[arg(required = true)]
    pub(crate) models: Vec<String>,
    /// Prompt lengths to compute in one go (pp); 0 leaves the test out. Lists are separated by commas.
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512")]
    pub(crate) prompt: Vec<usize>,
    /// Numbers of tokens to generate one after another (tg); 0 leaves the test out.
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "128")]
    pub(crate) generate: Vec<usize>,
    /// Streams that generate side by side.
    #[arg(short = 'b', long, value_delimiter = ',', default_value = "1")]
    pub(crate) batch: Vec<usize>,
    /// Tokens that every stream has behind it already.
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0")]
    pub(crate) depth: Vec<usize>,
    /// Threads; default is one for each core.
    #[arg(short = 't', long, value_delimiter = ',')]
    pub(crate) threads: Vec<usize>,
    /// How often each test is repeated.
    #[arg(short = 'r', long, default_value_t = 5)]
    pub(crate) repetitions: usize,
    #[arg(long, value_enum, default_value_t = KvName::Bf16)]
    pub(crate) kv: KvName,
    #[arg(short = 'o', long, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,
}

#[derive(Subcommand)]
pub(crate) enum EvalCommand {
    /// How well a model foretells a text: e to the mean surprise a token. Counted as llama-perplexity counts it: the
    /// text is cut into contexts, and the second half of each is scored.
    Perplexity(Perplexity),
    /// How a model does the tasks of JSONL files, counted as lm-evaluation-harness counts: multiple choice (HellaSwag,
    /// ARC, BoolQ, MMLU, Winograd, …), continuations (Jeopardy, LAMBADA), answers (GSM8K, TriviaQA).
    Tasks(Tasks),
}

#[derive(Args)]
pub(crate) struct Tasks {
    /// A .gguf file, a Hugging Face directory or the name of a model kept here.
    pub(crate) model: String,
    /// Files of one item a line: .jsonl or .jsonl.gz; bundle:NAME is all files of a bundle of the store.
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Also keep the scores in the store, as this object.
    #[arg(long, value_name = "OBJECT")]
    pub(crate) report: Option<String>,
    /// Worked examples before each item, drawn from the others of its file.
    #[arg(long, alias = "num-fewshot", default_value_t = 0)]
    pub(crate) shots: usize,
    /// Of the examples that are drawn.
    #[arg(long, default_value_t = 1234)]
    pub(crate) seed: u64,
    /// The first so many items of each file.
    #[arg(long)]
    pub(crate) limit: Option<usize>,
    /// Between a question and its answer. Default: a space, or `\nAnswer: ` where texts begin with `Question:`.
    #[arg(long)]
    pub(crate) delimiter: Option<String>,
    #[arg(short, long)]
    pub(crate) threads: Option<usize>,
    /// Memory for keys and values, in MiB.
    #[arg(long, default_value_t = 256)]
    pub(crate) kv_mib: usize,
    #[arg(long, value_enum, default_value_t = KvName::Bf16)]
    pub(crate) kv: KvName,
    /// One line of JSON for each file.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Perplexity {
    /// A .gguf file, a Hugging Face directory or the name of a model kept here.
    pub(crate) model: String,
    /// A text file.
    pub(crate) file: PathBuf,
    /// Tokens of one context; even.
    #[arg(short = 'c', long, alias = "ctx-size", default_value_t = 512)]
    pub(crate) context: usize,
    /// Contexts to score; default is the whole text.
    #[arg(long)]
    pub(crate) chunks: Option<usize>,
    #[arg(short, long)]
    pub(crate) threads: Option<usize>,
    #[arg(long, value_enum, default_value_t = KvName::Bf16)]
    pub(crate) kv: KvName,
    /// The result as one line of JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
pub(crate) enum ModelCommand {
    /// The models that `up` serves.
    List,
    /// What a model is and what serving it here would take, before anything large is read.
    Show {
        /// A .gguf file, a Hugging Face directory or the name of a model kept here.
        model: String,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Serve a .gguf file or a Hugging Face directory from where it lies, under a name.
    Add { name: String, path: PathBuf },
    /// Fetch a model from the Hugging Face hub into the store: OWNER/NAME, OWNER/NAME@REVISION,
    /// OWNER/NAME:Q4_K_M (the GGUF file of that kind) or OWNER/NAME:FILE.gguf. Interrupted, it goes on where it was.
    ///
    /// HF_ENDPOINT names another hub, HF_TOKEN a key for models that need one.
    Pull {
        model: String,
        /// What it is called here; default is the repository's name.
        #[arg(long)]
        name: Option<String>,
    },
    /// Copy a .gguf file or a Hugging Face directory into the store, under a name.
    Import {
        path: PathBuf,
        /// Default is the file's own name.
        #[arg(long)]
        name: Option<String>,
    },
    /// Write a model as a GGUF file or a Hugging Face directory, with its tokenizer and chat template.
    Export(Export),
    /// Write a model as a smaller GGUF file. Norms stay exact, embeddings and head keep 8 bits where the rest has fewer.
    Quantize(Quantize),
    /// Forget a model; one that lies in the store is deleted there.
    Rm { name: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// One file.
    Gguf,
    /// A Hugging Face directory.
    Safetensors,
}

#[derive(Args)]
pub(crate) struct Export {
    /// A .gguf file, a Hugging Face directory or the name of a model or adapter kept here.
    pub(crate) model: String,
    /// The file or directory to write; it must not be there yet.
    pub(crate) out: PathBuf,
    /// Default: gguf for a path that ends so, else safetensors.
    #[arg(long, value_enum)]
    pub(crate) format: Option<ExportFormat>,
    /// F32, F16 or BF16. Default: weights stay as they are, and for safetensors become BF16 where they are quantized.
    #[arg(long = "type")]
    pub(crate) kind: Option<String>,
}

#[derive(Args)]
pub(crate) struct Quantize {
    /// A .gguf file, a Hugging Face directory or the name of a model kept here.
    pub(crate) model: String,
    /// What the weights become: Q8_0, Q4_0, Q4_1, …
    pub(crate) kind: String,
    /// The .gguf file to write; it must not be there yet.
    pub(crate) out: PathBuf,
    /// Embeddings and head get the same type as the rest.
    #[arg(long)]
    pub(crate) pure: bool,
}
