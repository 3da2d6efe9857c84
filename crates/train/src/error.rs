use crate::BadBatch;

/// Why a run could not begin, go on or end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the plan is not valid JSON of the expected fields")]
    PlanJson(#[source] serde_json::Error),
    #[error("the plan has version {found}; this build reads up to {}", crate::plan::PLAN_VERSION)]
    PlanVersion { found: u64 },
    #[error("plan: {field} {must}")]
    PlanField { field: &'static str, must: &'static str },
    #[error(
        "the run {run} was planned with another {field}; resume it unchanged or start a run of another name"
    )]
    PlanChanged { run: String, field: String },
    #[error("{micro_batches} micro-batches a step cannot be shared by {n_ranks} ranks: at least one each")]
    Ranks { n_ranks: usize, micro_batches: usize },
    #[error(
        "{workers} workers of DiLoCo cannot be shared by {n_ranks} ranks: a power of two that divides them"
    )]
    Workers { n_ranks: usize, workers: usize },
    #[error("every worker of DiLoCo keeps its optimizer's state whole: it cannot be divided among ranks")]
    DilocoDivided,
    #[error("step {step}: what the workers have moved is not a number")]
    WorkersNotANumber { step: u64 },
    #[error("cannot read what a rank reports")]
    Report(#[source] serde_json::Error),
    #[error("{n_ranks} ranks are no whole number of teams of {n_team}")]
    Teams { n_ranks: usize, n_team: usize },
    #[error("ranks that compute one model together (--tp {n_team}) exclude {what}")]
    Team { n_team: usize, what: &'static str },
    #[error("{n_ranks} ranks are no whole number of pipelines of {n_stages} stages of {n_team} ranks each")]
    Pipelines { n_ranks: usize, n_stages: usize, n_team: usize },
    #[error("ranks that form a pipeline (--pp {n_stages}) exclude {what}")]
    Pipeline { n_stages: usize, what: &'static str },
    #[error(
        "Muon needs whole matrices: its state cannot be divided among ranks, as --zero does and any number of ranks but a \
         power of two that divides the micro-batches"
    )]
    MuonDivided,
    #[error("low-rank changes are small: their numbers are not divided among ranks (--zero 2 at most)")]
    LoraDivided,
    #[error("rank 0 goes on from step {step}, which this rank does not find in its store")]
    CheckpointMissing { step: u64 },
    #[error("the run {run} does not exist")]
    NoRun { run: String },
    #[error(
        "the dataset {name} is not the one that the run was planned with (sha256 {found}, planned {planned})"
    )]
    DatasetChanged { name: String, found: String, planned: String },
    #[error("the model has {model} token ids where the dataset's tokenizer has {dataset}")]
    Vocabulary { model: usize, dataset: usize },
    #[error("the datasets {a} and {b} were made with different tokenizers")]
    Tokenizers { a: String, b: String },
    #[error(
        "the data cannot be mixed: a weight gives some dataset no place among 4096 rows, or only some are pairs of answers"
    )]
    Mixture,
    #[error("step {step} went wrong, {n} in a row: {what} ({bad})")]
    StepsWentWrong { n: u64, step: u64, what: &'static str, bad: BadBatch },
    #[error("the thread that loads rows stopped")]
    LoaderStopped,
    #[error(
        "the run {run} has no model to start from, or another than its plan names; start a run of another name"
    )]
    StartChanged { run: String },
    #[error(
        "the run {run} has no teacher to learn from, or another than its plan names; start a run of another name"
    )]
    TeacherChanged { run: String },
    #[error(
        "the teacher has {teacher} token ids where the model has {model}: they must have the same vocabulary"
    )]
    TeacherVocabulary { teacher: usize, model: usize },
    #[error(
        "the run {run} lacks the task {name}, or has another than its plan names; start a run of another name"
    )]
    TaskChanged { run: String, name: String },
    #[error("the model {model} has a weight that is not a number: {tensor}, element {at}")]
    StartNotANumber { model: String, tensor: String, at: usize },
    #[error("cannot read {tensor} of the model {model}")]
    StartRead {
        model: String,
        tensor: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the dataset {name} holds {found}, the objective needs {needed}")]
    Pairs { name: String, found: &'static str, needed: &'static str },
    #[error("checkpoint {prefix}: {what}")]
    Checkpoint { prefix: String, what: String },
    #[error("no checkpoint of run {run} could be read")]
    NoCheckpoint {
        run: String,
        #[source]
        last: Box<Error>,
    },
    #[error("rank {rank} does not say where it is as this version does")]
    RankUnclear { rank: usize },
    #[error("rank {rank} panicked")]
    RankPanicked { rank: usize },
    #[error(transparent)]
    Config(#[from] model::ConfigError),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Eval(#[from] eval::Error),
    #[error(transparent)]
    Comm(#[from] comm::CommError),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Data(#[from] data::Error),
}

pub type Result<T> = std::result::Result<T, Error>;
