//! Models: configuration, weights, forward, backward, cached forward; Hugging Face and GGUF formats.
//!
//! What it is not: it knows no optimizer and no request, and encodes no text: of tokenizers it has what model files say.
//! `train` and `engine` meet here, in the format of a model.
//!
//! Where to start: [`Block`] (what all architectures are instances of) and [`Config`] (the shape), then `forward` (the
//! cached pass over a batch of sequences), `embed` or `train` (forward and backward over one flat vector of what is
//! trained, a [`Trainable`]). `hf`, `gguf` and `llama2c` are the formats; `load` picks one.

#![forbid(unsafe_code)]

mod adapter;
mod config;
mod convert;
mod embed;
mod error;
mod forward;
pub mod gguf;
pub mod hf;
pub mod llama2c;
mod load;
mod lora;
mod names;
mod params;
mod source;
mod step;
mod stripes;
mod train;
mod trainable;
mod transformer;
mod weights;

pub use adapter::Adapter;
pub use config::{
    Activation, Architecture, Block, Config, ConfigError, FORMAT_VERSION, Rope, RopeScaling, Window,
};
pub use convert::Conversion;
pub use error::{Error, Result};
pub use forward::Scratch;
pub use load::{Loaded, TokenizerFiles, load};
pub use lora::Lora;
pub use params::{ParamSpec, ParamTable};
pub use step::{BlockCopy, StepInput, StepRow};
pub use stripes::{Stripe, Stripes};
pub use train::{
    ActivationBytes, Division, Keeper, Kept, LossSum, MicroBatch, Neighbor, Objective, Stage, Teacher,
    TrainModel,
};
pub use trainable::{Files, Trainable};
pub use transformer::{BLOCK_TOKENS, KvCache, KvType, Transformer};
pub use weights::{WeightTensor, Weights};
