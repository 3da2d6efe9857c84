//! State of the cluster and its reconciler: models, jobs, keys, leases.
//!
//! **What it is.** [`Control`] keeps what was asked for and what was seen in one database, SQLite's or PostgreSQL's, that survives
//! kill −9 at any instant. [`Reconciler`] holds the lease, compares the two and starts, stops and restarts jobs through a [`Launcher`].
//! A job *is* a command line of this binary, so whatever the reconciler runs, a person can run by hand.
//!
//! **What it is not.** It knows no HTTP and no tensors, and it is synchronous: calls are short, an async caller wraps them
//! in `spawn_blocking`.
//!
//! **Where to start.** `reconcile.rs` decides and is pure; `reconciler.rs` does what was decided; `local.rs` starts child
//! processes, `slurm.rs` batch jobs, `kubernetes.rs` Jobs; `database.rs` opens, checks and migrates the file; `keys.rs`, `models.rs`, `jobs.rs` and `leases.rs` are
//! one table each, `deployments.rs` two; `nodes.rs` says who looks after what, `place.rs` what starts
//! where and is pure. `rollout.rs` decides about the replicas of a model,
//! `promotion.rs` how a model comes to be live; both are pure, too. `tables.rs` is all of it as plain data, for backups.
//!
//! Exit codes of a job: 0 is success, [`EXIT_INTERRUPTED`] (75) means "stopped cleanly, run me again to go on", everything
//! else is a failure and counts against the job's `max_restarts`.
#![forbid(unsafe_code)]

mod cgroup;
mod clock;
mod database;
mod deployments;
mod error;
mod job;
mod jobs;
mod keys;
mod kubernetes;
mod launcher;
mod leases;
mod local;
mod log;
mod meter;
mod models;
mod nodes;
mod place;
mod process;
mod projects;
mod promotion;
mod promotions;
mod reconcile;
mod reconciler;
mod rollout;
mod room;
mod slurm;
mod sql;
mod tables;
#[cfg(test)]
mod testing;

pub use clock::{Clock, UnixMs};
pub use database::{Control, Vacant};
pub use deployments::{Ask, Canary, Deployment, REPLICAS_MAX, Replica, is_address};
pub use error::{Error, Result};
pub use job::{Desired, Ending, Job, JobId, JobSpec, JobState, Needs, PRIORITY_MAX, Submitted};
pub use jobs::End;
pub use keys::{KeyId, KeyInfo, Role, SecretKey};
pub use kubernetes::{KubernetesLauncher, KubernetesOptions};
pub use launcher::{Launcher, Observed, Prepared, StopHow};
pub use leases::{Lease, LeaseInfo};
pub use local::LocalLauncher;
pub use meter::disk_bytes;
pub use models::{Model, ModelKind};
pub use nodes::{JobLoad, NODE_SILENT_MAX, Node, NodeLoad, NodeMode, NodeSpec};
pub use place::{Cluster, Placement, Share, Wait, place};
pub use process::ProcessRef;
pub use projects::{DEFAULT_PROJECT, Project, Quota};
pub use promotion::{
    CanaryStage, Effect, EvaluateStage, Happening, Move, Pipeline, Promotion, PromotionId, Seen, ServeStage,
    Stage, Threshold, TrainStage, advance,
};
pub use reconcile::{Action, EXIT_INTERRUPTED, Policy, reconcile};
pub use reconciler::{Reconciler, ReconcilerOptions, Shutdown};
pub use rollout::{Running, Step, rollout};
pub use slurm::{SlurmLauncher, SlurmOptions};
pub use sql::Fault;
pub use tables::Tables;
