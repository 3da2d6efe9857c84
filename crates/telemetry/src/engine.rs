//! Metrics of one served model, with vLLM's names (vLLM, `vllm/v1/metrics/loggers.py`).

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::buckets;
use crate::metrics::registered;
use crate::series::Series;
use crate::speculation::{SpeculationFamilies, SpeculationMetrics};

type GaugeF64 = Gauge<f64, AtomicU64>;
type Histograms = Family<EngineLabels, Histogram, fn() -> Histogram>;
type TokenHistograms = Series<EngineLabels, Histogram>;

/// Why a sequence ended; vLLM's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop string, a stop token or the end-of-text token.
    Stop,
    /// The token limit of the request or of the context.
    Length,
    /// The client went away or the request was cancelled.
    Abort,
    /// The engine failed.
    Error,
}

/// One finished request, in the engine's own measure. The times do not overlap: total = queue + prefill + decode, up to
/// the time spent outside the engine.
#[derive(Clone, Copy, Debug)]
pub struct RequestEnd {
    pub reason: FinishReason,
    pub n_prompt_tokens: usize,
    /// Prompt tokens whose keys and values came from the prefix cache; at most `n_prompt_tokens`.
    pub n_cached_tokens: usize,
    pub n_generated_tokens: usize,
    /// The limit the request was run with.
    pub max_tokens: usize,
    /// Arrival to the first step it was part of.
    pub queue: Duration,
    /// First step to first token.
    pub prefill: Duration,
    /// First token to last token.
    pub decode: Duration,
    /// Arrival to end.
    pub total: Duration,
}

/// Handles for one served model. Clones share the same series; every call is a few atomic operations.
#[derive(Clone, Debug)]
pub struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    waiting_capacity: Gauge,
    waiting_deferred: Gauge,
    kv_usage: GaugeF64,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prompt_tokens: Counter,
    prompt_tokens_cached: Counter,
    prompt_tokens_computed: Counter,
    prompt_tokens_hit: Counter,
    generation_tokens: Counter,
    success: [Counter; 4],
    step_tokens: Histogram,
    first_token_seconds: Histogram,
    token_gap_seconds: Histogram,
    speculation: SpeculationMetrics,
    end: EndHistograms,
    cache_config: Family<CacheConfigLabels, Gauge>,
    labels: EngineLabels,
}

/// What is observed once, when a request ends.
#[derive(Clone, Debug)]
struct EndHistograms {
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    max_generation_tokens: Histogram,
    max_tokens_param: Histogram,
    prefill_computed_tokens: Histogram,
    n_param: Histogram,
    per_output_token_seconds: Histogram,
    total_seconds: Histogram,
    queue_seconds: Histogram,
    inference_seconds: Histogram,
    prefill_seconds: Histogram,
    decode_seconds: Histogram,
}

impl EngineMetrics {
    /// Sequences in the running batch.
    pub fn set_running(&self, n: usize) {
        self.running.set(count(n));
    }

    /// Sequences accepted and not running: `n_capacity` for want of room, `n_deferred` held back for another reason.
    pub fn set_waiting(&self, n_capacity: usize, n_deferred: usize) {
        self.waiting.set(count(n_capacity + n_deferred));
        self.waiting_capacity.set(count(n_capacity));
        self.waiting_deferred.set(count(n_deferred));
    }

    /// Share of the KV blocks in use, 0 to 1.
    pub fn set_kv_usage(&self, share: f64) {
        self.kv_usage.set(share);
    }

    /// The shape of the KV cache, once at start. vLLM calls blocks "GPU blocks" wherever they lie.
    pub fn set_cache_config(&self, block_tokens: usize, n_blocks: usize, prefix_caching: bool) {
        let labels = CacheConfigLabels {
            model_name: self.labels.model_name.clone(),
            engine: self.labels.engine,
            block_size: block_tokens.to_string(),
            num_gpu_blocks: n_blocks.to_string(),
            enable_prefix_caching: if prefix_caching { "True" } else { "False" },
        };
        self.cache_config.get_or_create_owned(&labels).set(1);
    }

    /// One forward pass over `n_tokens` tokens, prompt and generated together.
    pub fn step(&self, n_tokens: usize) {
        self.step_tokens.observe(n_tokens as f64);
    }

    /// A sequence lost its blocks and goes back to the queue.
    pub fn preempted(&self) {
        self.preemptions.inc();
    }

    /// Of a draft of `n_draft` guessed tokens the first `n_accepted` were right.
    pub fn drafted(&self, n_draft: usize, n_accepted: usize) {
        self.speculation.drafted(n_draft, n_accepted);
    }

    /// The prefix cache was asked for `n_tokens` tokens and had `n_hits` of them.
    pub fn prefix_lookup(&self, n_tokens: usize, n_hits: usize) {
        self.prefix_queries.inc_by(n_tokens as u64);
        self.prefix_hits.inc_by(n_hits as u64);
    }

    /// A prompt is in the cache whole: `n_tokens` long, `n_cached` of them without computing.
    pub fn prompt_done(&self, n_tokens: usize, n_cached: usize) {
        self.prompt_tokens.inc_by(n_tokens as u64);
        self.prompt_tokens_cached.inc_by(n_cached as u64);
        self.prompt_tokens_hit.inc_by(n_cached as u64);
        self.prompt_tokens_computed.inc_by(n_tokens.saturating_sub(n_cached) as u64);
    }

    /// The first token of a sequence, `since_arrival` after its request came in.
    pub fn first_token(&self, since_arrival: Duration) {
        self.generation_tokens.inc();
        self.first_token_seconds.observe(since_arrival.as_secs_f64());
    }

    /// A later token of a sequence, `gap` after the one before.
    pub fn token_gap(&self, gap: Duration) {
        self.generation_tokens.inc();
        self.token_gap_seconds.observe(gap.as_secs_f64());
    }

    /// A request asked for `n` answers to its prompt.
    pub fn asked_n(&self, n: usize) {
        self.end.n_param.observe(n as f64);
    }

    /// A request is over, for whatever reason.
    pub fn finished(&self, end: &RequestEnd) {
        self.success[end.reason as usize].inc();
        let to = &self.end;
        to.prompt_tokens.observe(end.n_prompt_tokens as f64);
        to.generation_tokens.observe(end.n_generated_tokens as f64);
        to.max_generation_tokens.observe(end.n_generated_tokens as f64);
        to.max_tokens_param.observe(end.max_tokens as f64);
        to.prefill_computed_tokens.observe(end.n_prompt_tokens.saturating_sub(end.n_cached_tokens) as f64);
        to.total_seconds.observe(end.total.as_secs_f64());
        to.queue_seconds.observe(end.queue.as_secs_f64());
        to.prefill_seconds.observe(end.prefill.as_secs_f64());
        to.decode_seconds.observe(end.decode.as_secs_f64());
        to.inference_seconds.observe((end.prefill + end.decode).as_secs_f64());
        if end.n_generated_tokens > 1 {
            let n_gaps = (end.n_generated_tokens - 1) as f64;
            to.per_output_token_seconds.observe(end.decode.as_secs_f64() / n_gaps);
        }
    }
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct EngineLabels {
    pub(crate) model_name: String,
    pub(crate) engine: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheConfigLabels {
    model_name: String,
    engine: &'static str,
    block_size: String,
    num_gpu_blocks: String,
    enable_prefix_caching: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    model_name: String,
    engine: &'static str,
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    model_name: String,
    engine: &'static str,
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    model_name: String,
    engine: &'static str,
    reason: &'static str,
}

/// The families behind [`EngineMetrics`], one member per served model.
#[derive(Debug)]
pub(crate) struct EngineFamilies {
    running: Family<EngineLabels, Gauge>,
    waiting: Family<EngineLabels, Gauge>,
    waiting_by_reason: Family<ReasonLabels, Gauge>,
    kv_usage: Family<EngineLabels, GaugeF64>,
    preemptions: Family<EngineLabels, Counter>,
    prefix_queries: Family<EngineLabels, Counter>,
    prefix_hits: Family<EngineLabels, Counter>,
    prompt_tokens: Family<EngineLabels, Counter>,
    prompt_tokens_cached: Family<EngineLabels, Counter>,
    prompt_tokens_by_source: Family<SourceLabels, Counter>,
    generation_tokens: Family<EngineLabels, Counter>,
    success: Family<FinishLabels, Counter>,
    step_tokens: Histograms,
    first_token_seconds: Histograms,
    token_gap_seconds: Histograms,
    speculation: SpeculationFamilies,
    end: EndFamilies,
    cache_config: Family<CacheConfigLabels, Gauge>,
}

#[derive(Debug)]
struct EndFamilies {
    prompt_tokens: TokenHistograms,
    generation_tokens: TokenHistograms,
    max_generation_tokens: TokenHistograms,
    max_tokens_param: TokenHistograms,
    prefill_computed_tokens: TokenHistograms,
    n_param: Histograms,
    per_output_token_seconds: Histograms,
    total_seconds: Histograms,
    queue_seconds: Histograms,
    inference_seconds: Histograms,
    prefill_seconds: Histograms,
    decode_seconds: Histograms,
}

impl EngineFamilies {
    /// Registers every name; a name appears in the text with its first model.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let r = registry;
        Self {
            running: plain(r, "num_requests_running", "Sequences in the running batch"),
            waiting: plain(r, "num_requests_waiting", "Sequences waiting to run"),
            waiting_by_reason: plain(
                r,
                "num_requests_waiting_by_reason",
                "Sequences waiting to run, for want of room (capacity) or held back (deferred)",
            ),
            kv_usage: plain(r, "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
            preemptions: plain(r, "num_preemptions", "Sequences that lost their KV blocks"),
            prefix_queries: plain(r, "prefix_cache_queries", "Tokens looked up in the prefix cache"),
            prefix_hits: plain(r, "prefix_cache_hits", "Tokens found in the prefix cache"),
            prompt_tokens: plain(r, "prompt_tokens", "Prompt tokens of sequences past prefill"),
            prompt_tokens_cached: plain(
                r,
                "prompt_tokens_cached",
                "Prompt tokens that were not computed again",
            ),
            prompt_tokens_by_source: plain(
                r,
                "prompt_tokens_by_source",
                "Prompt tokens by where their keys and values came from",
            ),
            generation_tokens: plain(r, "generation_tokens", "Tokens generated"),
            success: plain(r, "request_success", "Requests finished, by reason"),
            step_tokens: histogram(r, "iteration_tokens_total", "Tokens of one forward pass", || {
                Histogram::new(buckets::STEP_TOKENS.iter().copied())
            }),
            first_token_seconds: histogram(
                r,
                "time_to_first_token_seconds",
                "Arrival to first token",
                || Histogram::new(buckets::FIRST_TOKEN_SECONDS.iter().copied()),
            ),
            token_gap_seconds: histogram(
                r,
                "inter_token_latency_seconds",
                "Time between two tokens of a sequence",
                token_gap_histogram,
            ),
            speculation: SpeculationFamilies::register(r),
            end: EndFamilies::register(r),
            cache_config: plain(r, "cache_config_info", "Shape of the KV cache"),
        }
    }

    pub(crate) fn handles(&self, model_name: &str, context_max: usize) -> EngineMetrics {
        let labels = EngineLabels { model_name: model_name.to_owned(), engine: "0" };
        let success = ["stop", "length", "abort", "error"].map(|finished_reason| {
            let EngineLabels { model_name, engine } = labels.clone();
            self.success.get_or_create_owned(&FinishLabels { model_name, engine, finished_reason })
        });
        let source = |source| {
            let EngineLabels { model_name, engine } = labels.clone();
            self.prompt_tokens_by_source.get_or_create_owned(&SourceLabels { model_name, engine, source })
        };
        let waiting = |reason| {
            let EngineLabels { model_name, engine } = labels.clone();
            self.waiting_by_reason.get_or_create_owned(&ReasonLabels { model_name, engine, reason })
        };
        EngineMetrics {
            running: self.running.get_or_create_owned(&labels),
            waiting: self.waiting.get_or_create_owned(&labels),
            waiting_capacity: waiting("capacity"),
            waiting_deferred: waiting("deferred"),
            kv_usage: self.kv_usage.get_or_create_owned(&labels),
            preemptions: self.preemptions.get_or_create_owned(&labels),
            prefix_queries: self.prefix_queries.get_or_create_owned(&labels),
            prefix_hits: self.prefix_hits.get_or_create_owned(&labels),
            prompt_tokens: self.prompt_tokens.get_or_create_owned(&labels),
            prompt_tokens_cached: self.prompt_tokens_cached.get_or_create_owned(&labels),
            prompt_tokens_computed: source("local_compute"),
            prompt_tokens_hit: source("local_cache_hit"),
            generation_tokens: self.generation_tokens.get_or_create_owned(&labels),
            success,
            step_tokens: self.step_tokens.get_or_create_owned(&labels),
            first_token_seconds: self.first_token_seconds.get_or_create_owned(&labels),
            token_gap_seconds: self.token_gap_seconds.get_or_create_owned(&labels),
            speculation: self.speculation.handles(&labels),
            end: self.end.handles(&labels, context_max),
            cache_config: self.cache_config.clone(),
            labels,
        }
    }
}

impl EndFamilies {
    fn register(r: &mut Registry) -> Self {
        let seconds: fn() -> Histogram = || Histogram::new(buckets::REQUEST_SECONDS.iter().copied());
        Self {
            prompt_tokens: plain(r, "request_prompt_tokens", "Prompt tokens of a request"),
            generation_tokens: plain(r, "request_generation_tokens", "Tokens a request generated"),
            max_generation_tokens: plain(
                r,
                "request_max_num_generation_tokens",
                "Most tokens any of a request's sequences generated",
            ),
            max_tokens_param: plain(r, "request_params_max_tokens", "Token limit of a request"),
            prefill_computed_tokens: plain(
                r,
                "request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that were computed, not found in the cache",
            ),
            n_param: histogram(r, "request_params_n", "Answers a request asked for", || {
                Histogram::new(buckets::PARAMS_N.iter().copied())
            }),
            per_output_token_seconds: histogram(
                r,
                "request_time_per_output_token_seconds",
                "Mean time between a request's tokens",
                token_gap_histogram,
            ),
            total_seconds: histogram(r, "e2e_request_latency_seconds", "Arrival to end", seconds),
            queue_seconds: histogram(r, "request_queue_time_seconds", "Time waiting", seconds),
            inference_seconds: histogram(
                r,
                "request_inference_time_seconds",
                "Time running: prefill and decode",
                seconds,
            ),
            prefill_seconds: histogram(
                r,
                "request_prefill_time_seconds",
                "First step to first token",
                seconds,
            ),
            decode_seconds: histogram(r, "request_decode_time_seconds", "First token to last token", seconds),
        }
    }

    fn handles(&self, labels: &EngineLabels, context_max: usize) -> EndHistograms {
        let tokens = |series: &TokenHistograms| {
            series.get_or_insert(labels, || Histogram::new(buckets::token_counts(context_max)))
        };
        EndHistograms {
            prompt_tokens: tokens(&self.prompt_tokens),
            generation_tokens: tokens(&self.generation_tokens),
            max_generation_tokens: tokens(&self.max_generation_tokens),
            max_tokens_param: tokens(&self.max_tokens_param),
            prefill_computed_tokens: tokens(&self.prefill_computed_tokens),
            n_param: self.n_param.get_or_create_owned(labels),
            per_output_token_seconds: self.per_output_token_seconds.get_or_create_owned(labels),
            total_seconds: self.total_seconds.get_or_create_owned(labels),
            queue_seconds: self.queue_seconds.get_or_create_owned(labels),
            inference_seconds: self.inference_seconds.get_or_create_owned(labels),
            prefill_seconds: self.prefill_seconds.get_or_create_owned(labels),
            decode_seconds: self.decode_seconds.get_or_create_owned(labels),
        }
    }
}

fn token_gap_histogram() -> Histogram {
    Histogram::new(buckets::TOKEN_GAP_SECONDS.iter().copied())
}

/// A family whose members need no arguments to be built.
pub(crate) fn plain<F>(registry: &mut Registry, name: &str, help: &str) -> F
where
    F: prometheus_client::registry::Metric + Clone + Default,
{
    registered(registry, &format!("vllm:{name}"), help, F::default())
}

fn histogram(registry: &mut Registry, name: &str, help: &str, make: fn() -> Histogram) -> Histograms {
    registered(registry, &format!("vllm:{name}"), help, Histograms::new_with_constructor(make))
}
