//! Buffers and ops, forward and backward, on CPUs.
//!
//! What it is: a dozen coarse operations a Llama-type model is made of, each one file with the formula, a plain
//! reference, fast versions chosen at run time, the backward and the tests; and what they stand on: a thread pool,
//! aligned buffers, SIMD primitives. It is the only crate that may use `unsafe`.
//!
//! What it is not: it knows no layers, no configurations, no optimizer state beyond flat slices, and nothing async.
//!
//! Where to start reading: [`matmul()`] shows what an op looks like from outside, [`simd`] how a kernel is written once
//! for every instruction set, [`Pool`] how work reaches the threads.
//!
//! # Axis key
//! Every flat slice carries its axes as a suffix (`q_nhd`), a gradient is the name with a `d` (`dq_nhd`).
//!
//! | axis | meaning | axis | meaning |
//! |---|---|---|---|
//! | `n` | packed tokens | `g` | key/value heads |
//! | `b` | rows of a batch | `d` | head width |
//! | `t` | positions in a row | `f` | feed-forward width |
//! | `s` | cached positions | `v` | vocabulary |
//! | `c` | model width | `l` | layers |
//! | `h` | query heads | `o`, `i` | outputs and inputs of one linear map |
//!
//! Inside [`matmul()`] alone, `m`, `n` and `k` have their BLAS meaning: `c_mn = a_mk · b_kn`.
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod adamw;
pub mod attention;
pub mod buf;
pub mod cpu;
pub mod cross_entropy;
pub mod distill;
pub mod embedding;
pub mod gelu;
pub mod head_norm;
pub mod heap;
pub mod layernorm;
pub mod limits;
pub mod logits;
pub mod matmul;
pub mod muon;
pub mod packed;
pub mod paged_attention;
pub mod pool;
pub mod rmsnorm;
pub mod rope;
pub mod rows;
pub mod simd;
mod split;
pub mod swiglu;
#[cfg(test)]
mod testing;

pub use buf::Buf;
pub use half::{bf16, f16};
pub use matmul::{Accumulate, Elems, Mat, Precision, matmul};
pub use pool::Pool;
