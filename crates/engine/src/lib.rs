//! Continuous batching over paged KV blocks: ids in, ids out.
//!
//! What it is: one loop that keeps a model busy with many sequences at once. A sequence is a number
//! of computed tokens catching up with a number of known ones; prefill, chunked prefill, prefix
//! hits, resumption after preemption, speculation and decoding are all that one thing.
//!
//! What it is not: it knows no text (stop strings, grammars and chat templates are the API's), no HTTP, no
//! kernels (a [`Runner`] computes).
//!
//! Where to start: [`Engine::submit`] in `engine.rs` is the way in, `worker.rs` is the loop,
//! `scheduler.rs` decides (pure, no clock), `waiting.rs` orders the queue, `blocks.rs` owns the KV blocks
//! and the prefix cache (`prefix.rs`), `pacer.rs` keeps long prompts from stalling streams by what steps cost (`step_cost.rs`), `speculation.rs`
//! guesses ahead, `sampler.rs` turns logits into a token, `stream.rs` is the way out.

#![forbid(unsafe_code)]

mod blocks;
mod clock;
mod constraint;
mod draft;
mod engine;
mod fake;
mod filters;
mod live;
mod model_runner;
mod pacer;
#[cfg(test)]
mod pacing_tests;
mod played;
mod prefix;
mod random;
mod request;
mod runner;
mod sampler;
mod scheduler;
#[cfg(test)]
mod scheduler_tests;
mod sequence;
#[cfg(test)]
mod simulation;
mod speculation;
mod step_cost;
mod stream;
mod tenants;
mod waiting;
mod worker;

pub use constraint::{Constraint, Continuation};
pub use engine::{Engine, EngineLimits, Health, Stats};
pub use fake::FakeRunner;
pub use model::{Adapter, BlockCopy, StepInput, StepRow};
pub use model_runner::ModelRunner;
pub use played::{Played, PlayedToken};
pub use request::{
    Event, FinishReason, Logprobs, Request, STOP_IDS_MAX, Sampling, SubmitError, TOP_LOGPROBS_MAX, TokenId,
    Usage,
};
pub use runner::{Runner, RunnerError, RunnerShape};
pub use speculation::{DRAFT_TOKENS_MAX, Speculation};
pub use step_cost::StepWork;
pub use stream::Stream;
