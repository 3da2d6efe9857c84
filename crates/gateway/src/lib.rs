//! Where a request goes: replicas, their health, prefixes, canaries, as plain data.
//!
//! **What it is.** [`Router`] picks the replica for each request to one model and learns from how it ended; [`judge`] says
//! whether a canary may live; [`scale`] says how many replicas a load needs. Time and seed are arguments, so a simulation
//! runs hours of traffic in milliseconds, and `loquat plan` asks the same code about clusters that are not there.
//!
//! **What it is not.** It opens no connection and knows no HTTP: `api` does, and tells it what happened.
//!
//! **Where to start.** `router.rs`; `prefix.rs` remembers who has computed which prompt's beginning, `breaker.rs` keeps
//! requests from a replica that fails, `canary.rs` and `scale.rs` decide about replicas as a whole.
#![forbid(unsafe_code)]

mod breaker;
mod canary;
mod prefix;
mod random;
mod router;
mod scale;

pub use canary::{CanaryPolicy, Sample, Verdict, Window, judge};
pub use prefix::{BLOCK_BYTES, Prefix};
pub use random::Random;
pub use router::{Endpoint, Outcome, Policy, ReplicaStatus, Router, Ticket};
pub use scale::{Load, ScalePolicy, scale};
