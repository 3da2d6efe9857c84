//! Metric names with units, Prometheus text, structured logs.
//!
//! **What it is.** The one place where a metric gets its name, its unit, its buckets and its labels. Serving metrics carry
//! vLLM's names (`vllm:*`), so the dashboards and the benchmark tools people already have read Loquat unchanged; what vLLM
//! has no word for (training, storage, jobs) is `loquat_*`.
//!
//! **What it is not.** It knows no other crate: callers say what happened in plain numbers. It opens no port: `api` serves
//! [`Metrics::render`]. Nothing a client sends ever becomes a label; label values are fixed words, route templates, or
//! names an operator chose.
//!
//! **Where to start.** [`Metrics`] is created once by the binary and hands out one handle per part: [`EngineMetrics`],
//! [`HttpMetrics`], [`StoreMetrics`], [`TrainMetrics`], [`JobMetrics`]. Handles are cheap to clone and lock-free to use.
//! [`init_logs`] installs the log writer.
#![forbid(unsafe_code)]

mod buckets;
mod engine;
mod http;
mod job;
mod logs;
mod metrics;
mod process;
mod series;
mod speculation;
mod store;
mod text;
mod train;

pub use engine::{EngineMetrics, FinishReason, RequestEnd};
pub use http::HttpMetrics;
pub use job::{JobMetrics, Utilisation};
pub use logs::{LogError, LogFormat, chain, init_logs, request_span};
pub use metrics::Metrics;
pub use store::StoreMetrics;
pub use text::CONTENT_TYPE;
pub use train::{TrainMetrics, TrainRanks, TrainStep};
