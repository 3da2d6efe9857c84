//! The training loop: from a dataset and a plan to a published model.
//!
//! What this is: steps of AdamW over micro-batches whose gradients are summed in one fixed tree, checkpoints, exact
//! resume, evaluation on held-out documents, metrics and samples as it learns.
//! What this is not: it knows no HTTP and no engine; a trained model meets the engine as files.
//!
//! Where to start: [`Plan`] determines a run; [`run`] carries it out; `rank.rs` is the step loop.
//!
//! Invariant: the weights after step k are a pure function of the plan and the dataset. Killing the run, resuming it,
//! and the numbers of ranks and threads change no bit (held by `tests/exact/`).
#![forbid(unsafe_code)]

mod agree;
mod budget;
mod checkpoint;
mod curve;
mod diloco;
mod early;
mod error;
mod evaluate;
mod event;
mod exchange;
mod guard;
mod layout;
mod loader;
mod metrics_log;
mod optimizer;
mod part;
mod pipeline;
mod plan;
mod plans;
mod publish;
mod rank;
mod run;
mod sample;
mod saver;
mod schedule;
mod sources;
mod start;
mod state;
mod survive;
mod tasks;
mod tensorboard;

pub use budget::RankBytes;
pub use curve::Curve;
pub use diloco::Diloco;
pub use error::{Error, Result};
pub use event::{BadBatch, EvalPart, Event, Link, Ranks, Round, Score, Started, Step, TaskScores};
pub use guard::Wrong;
pub use layout::Zero;
pub use metrics_log::read_metrics;
pub use pipeline::{bubble, in_flight};
pub use plan::{
    AdamW, CheckpointPolicy, DataPart, Evaluate, Guard, Method, Muon, PLAN_VERSION, Plan, Sample, Start,
    TaskFile, Tasks, Teacher,
};
pub use plans::{create, plan_sha256, read_plan};
pub use run::{Context, Outcome, run, run_rank};
pub use schedule::{Decay, Schedule};
pub use start::{keep_teacher, start_files};
pub use tasks::keep_tasks;
