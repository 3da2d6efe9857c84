//! Llama-type models: configuration, weights, forward, backward, cached forward; Hugging Face and GGUF formats.
//!
//! What it is not: it knows no optimizer, no request and no tokenizer. `train` and `engine` meet here, in the
//! format of a model.
//!
//! Where to start: [`config`] (the shape), then `train` (forward and backward over one flat parameter vector) or
//! `infer` (cached forward over a batch of sequences). `hf`, `gguf` and `llama2c` are the formats; `load` picks one.

#![forbid(unsafe_code)]

mod config;
mod error;
pub mod gguf;
pub mod hf;
mod infer;
pub mod llama2c;
mod load;
mod params;
mod step;
mod train;
mod weights;

pub use config::{Config, ConfigError, FORMAT_VERSION};
pub use error::{Error, Result};
pub use infer::{BLOCK_TOKENS, KvCache, KvType, Llama, Scratch};
pub use load::{Loaded, TokenizerFiles, load};
pub use params::{ParamSpec, ParamTable};
pub use step::{BlockCopy, StepInput, StepRow};
pub use train::{LossSum, TrainModel};
pub use weights::{WeightTensor, Weights};
