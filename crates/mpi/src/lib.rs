//! The MPI library of this machine, loaded when a run is started by it.
//!
//! What this is: the few functions of MPI that ranks need, as safe Rust, found with `dlopen` at run time. So the one
//! binary needs no MPI to be built or to run, and joins whichever one has started it (docs/decisions/0014).
//! What this is not: collectives. Their order of sums is ours, see the crate `comm`.
//! Where to start: [`World`].
//!
//! This crate exists because it talks to a C library: it and `tensor` are the only ones that may be unsafe.

mod library;
mod world;

pub use library::Error;
pub use world::{Request, Test, World};
