//! The HTTP surface: OpenAI's endpoints, keys, limits, the console's files.
//!
//! **What it is.** Text in, text out: JSON is checked, chats are laid out by the model's template, ids go to the
//! engine, what comes back becomes text, chunk by chunk. Everything a client can get wrong is refused here, by name.
//!
//! **What it is not.** It knows no kernels and no scheduling, and it keeps no state: models, keys, runs and jobs are
//! handed to it in [`AppState`].
//!
//! **Where to start.** `routes.rs` is the table of routes. A chat's way: `edge.rs` (id, host, accounting), `auth.rs`,
//! `body.rs`, `chat.rs` (fields), `prompt.rs` (ids), `generate.rs` (submit, answer), `choice.rs` (ids back to text).
//! `cluster.rs` shows and steers jobs, nodes and deployments, by the role of the key.
//! `replicas/` sends requests for models that other processes serve there. `error.rs` alone decides HTTP statuses, `limits.rs` names every bound, `serve.rs` is the accept loop, `tls.rs` what
//! it shows and whom the gateway believes.
#![forbid(unsafe_code)]

mod adapters;
mod auth;
mod body;
mod calls;
mod chat;
mod choice;
mod cluster;
mod completions;
mod connections;
mod console;
mod edge;
mod embeddings;
mod error;
mod generate;
mod json;
mod limits;
mod logprobs;
mod models;
mod openapi;
mod probes;
mod prompt;
mod replicas;
mod routes;
mod runs;
mod sampling;
mod serve;
mod stall;
mod state;
mod stop;
mod structured;
mod tls;
mod tokenize;
mod tools;

pub use cluster::{
    Call, CanaryAsk, Cluster, DeployAsk, JobAsk, LogPiece, NeedsAsk, NodeOrder, QuotaAsk, Refusal,
};
pub use embeddings::{Embedder, Embedders, ServedEmbedder};
pub use error::ApiError;
pub use limits::Limits;
pub use replicas::{Replicas, RouteStatus, Target, TargetKey};
pub use routes::app;
pub use runs::{Curve, Eval, Point, Runs};
pub use serve::{serve, serve_tls};
pub use state::{
    AppState, Cause, KeyChecker, KeyOwner, Lifecycle, LoadAdapter, Models, Parts, Role, ServedModel,
};
pub use tls::{ServerTls, TlsError};
