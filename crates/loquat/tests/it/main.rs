//! The whole program, as processes: from text to an answer over HTTP, killed with signal 9 on the way, fed with bad input,
//! and used by real clients.

mod backup;
mod bad_input;
mod chaos;
mod clients;
mod cluster;
mod demo;
mod evals;
mod full_disk;
mod fuzz;
mod hub;
mod kill;
#[cfg(feature = "long")]
mod peers;
mod placement;
#[path = "../../../control/tests/support/postgres.rs"]
mod postgres;
mod promote;
mod ranks;
mod serve;
#[path = "../../../control/tests/control/slurm.rs"]
mod slurm;
mod support;
mod tiny;
mod tls;
mod tools;
mod train;
mod tune;
