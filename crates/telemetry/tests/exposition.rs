//! The exported text against what dashboards and scrapers of vLLM expect: names, types, labels and buckets.
//!
//! The expectations are written out here from vLLM's `vllm/v1/metrics/loggers.py` and its Grafana dashboard, not taken from
//! the crate's own constants, and the text is read by a small parser of its own (text format 0.0.4).

use std::collections::BTreeMap;
use std::time::Duration;

use telemetry::{FinishReason, Metrics, RequestEnd, TrainStep};

type Labels = BTreeMap<String, String>;

struct Exposition {
    types: BTreeMap<String, String>,
    samples: Vec<(String, Labels, f64)>,
}

impl Exposition {
    /// Strict where scrapers are strict: a family is announced once, its samples follow directly, every line ends.
    fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'));
        let mut types = BTreeMap::new();
        let mut samples = Vec::new();
        let mut family = (String::new(), String::new());
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                family.0 = help.split(' ').next().unwrap().to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(name, family.0, "HELP and TYPE must name the same family");
                let old = types.insert(name.to_owned(), kind.to_owned());
                assert!(old.is_none(), "{name} is announced twice");
                family.1 = kind.to_owned();
            } else {
                assert!(!line.starts_with('#'), "unknown comment {line:?}");
                let sample = parse_sample(line);
                let suffixes: &[&str] = match family.1.as_str() {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                assert!(
                    suffixes.iter().any(|s| sample.0 == format!("{}{s}", family.0)),
                    "{line:?} is not a sample of {family:?}"
                );
                samples.push(sample);
            }
        }
        Self { types, samples }
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found: Vec<f64> = self.matching(name, labels).map(|s| s.2).collect();
        assert_eq!(found.len(), 1, "{name}{labels:?} has {} samples", found.len());
        found[0]
    }

    fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&str, &str)],
    ) -> impl Iterator<Item = &'a (String, Labels, f64)> {
        self.samples.iter().filter(move |(n, have, _)| {
            n == name && labels.iter().all(|(k, v)| have.get(*k).map(String::as_str) == Some(*v))
        })
    }

    /// The finite bounds of a histogram; checks that the counts never fall and that `+Inf` equals `_count`.
    fn bounds(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let bucket = format!("{name}_bucket");
        let mut last = 0.0;
        let mut bounds = Vec::new();
        for (_, labels, n) in self.matching(&bucket, labels) {
            assert!(*n >= last, "{name} counts fall");
            last = *n;
            bounds.push(labels["le"].parse::<f64>().unwrap());
        }
        assert_eq!(bounds.pop(), Some(f64::INFINITY), "{name} has no +Inf bucket");
        assert_eq!(last, self.value(&format!("{name}_count"), labels));
        self.value(&format!("{name}_sum"), labels);
        bounds
    }
}

fn parse_sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let mut labels = Labels::new();
    let name = match series.split_once('{') {
        None => series,
        Some((name, rest)) => {
            let mut rest = rest.strip_suffix('}').unwrap();
            while !rest.is_empty() {
                let (key, after) = rest.split_once("=\"").unwrap();
                let (value, after) = unescape(after);
                let old = labels.insert(key.to_owned(), value);
                assert!(old.is_none(), "label {key} twice in {line:?}");
                rest = after.strip_prefix(',').unwrap_or(after);
            }
            name
        }
    };
    (name.to_owned(), labels, value.parse().unwrap())
}

/// Reads up to the closing quote; returns the value and what follows the quote.
fn unescape(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => match chars.next().unwrap().1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            _ => value.push(c),
        }
    }
    panic!("label value without an end: {text:?}");
}

const MODEL: &[(&str, &str)] = &[("model_name", "tiny"), ("engine", "0")];

/// A served model after one finished and one aborted request.
fn served() -> Exposition {
    let metrics = Metrics::new();
    let engine = metrics.engine("tiny", 2048);
    engine.set_running(3);
    engine.set_waiting(4, 1);
    engine.set_kv_usage(0.25);
    engine.set_cache_config(16, 512, true);
    engine.step(70);
    engine.step(3);
    engine.prefix_lookup(64, 48);
    engine.prompt_done(64, 48);
    engine.preempted();
    engine.asked_n(1);
    engine.first_token(Duration::from_millis(70));
    engine.token_gap(Duration::from_millis(90));
    engine.token_gap(Duration::from_millis(110));
    let end = RequestEnd {
        reason: FinishReason::Stop,
        n_prompt_tokens: 64,
        n_cached_tokens: 48,
        n_generated_tokens: 3,
        max_tokens: 100,
        queue: Duration::from_millis(10),
        prefill: Duration::from_millis(60),
        decode: Duration::from_millis(200),
        total: Duration::from_millis(270),
    };
    engine.drafted(4, 2);
    engine.finished(&end);
    engine.finished(&RequestEnd { reason: FinishReason::Abort, n_generated_tokens: 0, ..end });
    Exposition::parse(&metrics.render())
}

#[test]
fn names_and_types_are_those_the_grafana_dashboard_reads() {
    let exposition = served();
    let expected = [
        ("vllm:num_requests_running", "gauge"),
        ("vllm:num_requests_waiting", "gauge"),
        ("vllm:num_requests_waiting_by_reason", "gauge"),
        ("vllm:kv_cache_usage_perc", "gauge"),
        ("vllm:cache_config_info", "gauge"),
        ("vllm:prefix_cache_queries_total", "counter"),
        ("vllm:prefix_cache_hits_total", "counter"),
        ("vllm:num_preemptions_total", "counter"),
        ("vllm:spec_decode_num_drafts_total", "counter"),
        ("vllm:spec_decode_num_draft_tokens_total", "counter"),
        ("vllm:spec_decode_num_accepted_tokens_total", "counter"),
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter"),
        ("vllm:prompt_tokens_total", "counter"),
        ("vllm:prompt_tokens_by_source_total", "counter"),
        ("vllm:prompt_tokens_cached_total", "counter"),
        ("vllm:generation_tokens_total", "counter"),
        ("vllm:request_success_total", "counter"),
        ("vllm:request_prompt_tokens", "histogram"),
        ("vllm:request_generation_tokens", "histogram"),
        ("vllm:request_max_num_generation_tokens", "histogram"),
        ("vllm:request_params_n", "histogram"),
        ("vllm:request_params_max_tokens", "histogram"),
        ("vllm:request_prefill_kv_computed_tokens", "histogram"),
        ("vllm:iteration_tokens_total", "histogram"),
        ("vllm:time_to_first_token_seconds", "histogram"),
        ("vllm:inter_token_latency_seconds", "histogram"),
        ("vllm:request_time_per_output_token_seconds", "histogram"),
        ("vllm:e2e_request_latency_seconds", "histogram"),
        ("vllm:request_queue_time_seconds", "histogram"),
        ("vllm:request_inference_time_seconds", "histogram"),
        ("vllm:request_prefill_time_seconds", "histogram"),
        ("vllm:request_decode_time_seconds", "histogram"),
    ];
    let vllm: BTreeMap<_, _> = exposition
        .types
        .iter()
        .filter(|(name, _)| name.starts_with("vllm:"))
        .map(|(name, kind)| (name.as_str(), kind.as_str()))
        .collect();
    assert_eq!(vllm, BTreeMap::from(expected));
    for (name, labels, _) in &exposition.samples {
        if name.starts_with("vllm:") {
            assert_eq!(labels["model_name"], "tiny", "{name}");
            assert_eq!(labels["engine"], "0", "{name}");
        }
    }
}

#[test]
fn buckets_are_vllms() {
    let exposition = served();
    let first_token = [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1., 2.5, 5., 7.5, 10., 20., 40.,
        80., 160., 640., 2560.,
    ];
    let gap =
        [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1., 2.5, 5., 7.5, 10., 20., 40., 80.];
    let request = [
        0.3, 0.5, 0.8, 1., 1.5, 2., 2.5, 5., 10., 15., 20., 30., 40., 50., 60., 120., 240., 480., 960.,
        1920., 7680.,
    ];
    let step = [1., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096., 8192., 16384.];
    let tokens = [1., 2., 5., 10., 20., 50., 100., 200., 500., 1000., 2000.];
    let check = |name: &str, expected: &[f64]| {
        assert_eq!(exposition.bounds(&format!("vllm:{name}"), MODEL), expected, "{name}");
    };
    check("time_to_first_token_seconds", &first_token);
    check("inter_token_latency_seconds", &gap);
    check("request_time_per_output_token_seconds", &gap);
    for name in [
        "request_queue_time",
        "request_inference_time",
        "request_prefill_time",
        "request_decode_time",
        "e2e_request_latency",
    ] {
        check(&format!("{name}_seconds"), &request);
    }
    check("iteration_tokens_total", &step);
    check("request_params_n", &[1., 2., 5., 10., 20.]);
    for name in [
        "prompt_tokens",
        "generation_tokens",
        "max_num_generation_tokens",
        "params_max_tokens",
        "prefill_kv_computed_tokens",
    ] {
        check(&format!("request_{name}"), &tokens);
    }
}

#[test]
fn values_are_what_happened() {
    let exposition = served();
    let value = |name: &str, labels: &[(&str, &str)]| exposition.value(&format!("vllm:{name}"), labels);
    assert_eq!(value("num_requests_running", MODEL), 3.0);
    assert_eq!(value("num_requests_waiting", MODEL), 5.0);
    assert_eq!(value("num_requests_waiting_by_reason", &[("reason", "capacity")]), 4.0);
    assert_eq!(value("num_requests_waiting_by_reason", &[("reason", "deferred")]), 1.0);
    assert_eq!(value("kv_cache_usage_perc", MODEL), 0.25);
    assert_eq!(value("cache_config_info", &[("block_size", "16"), ("num_gpu_blocks", "512")]), 1.0);
    assert_eq!(value("prefix_cache_queries_total", MODEL), 64.0);
    assert_eq!(value("prefix_cache_hits_total", MODEL), 48.0);
    assert_eq!(value("prompt_tokens_total", MODEL), 64.0);
    assert_eq!(value("prompt_tokens_by_source_total", &[("source", "local_compute")]), 16.0);
    assert_eq!(value("prompt_tokens_by_source_total", &[("source", "local_cache_hit")]), 48.0);
    assert_eq!(value("generation_tokens_total", MODEL), 3.0);
    assert_eq!(value("num_preemptions_total", MODEL), 1.0);
    assert_eq!(value("spec_decode_num_drafts_total", MODEL), 1.0);
    assert_eq!(value("spec_decode_num_draft_tokens_total", MODEL), 4.0);
    assert_eq!(value("spec_decode_num_accepted_tokens_total", MODEL), 2.0);
    for position in ["0", "1"] {
        assert_eq!(value("spec_decode_num_accepted_tokens_per_pos_total", &[("position", position)]), 1.0);
    }
    for (reason, n) in [("stop", 1.0), ("length", 0.0), ("abort", 1.0), ("error", 0.0)] {
        assert_eq!(value("request_success_total", &[("finished_reason", reason)]), n);
    }
    assert_eq!(value("iteration_tokens_total_sum", MODEL), 73.0);
    assert_eq!(value("time_to_first_token_seconds_bucket", &[("le", "0.06")]), 0.0);
    assert_eq!(value("time_to_first_token_seconds_bucket", &[("le", "0.08")]), 1.0);
    // Two gaps of 90 ms and 110 ms; the aborted request generated nothing and has no mean gap.
    assert_eq!(value("request_time_per_output_token_seconds_count", MODEL), 1.0);
    assert_eq!(value("request_time_per_output_token_seconds_sum", MODEL), 0.1);
    assert_eq!(value("request_inference_time_seconds_count", MODEL), 2.0);
}

#[test]
fn two_models_share_families_and_keep_their_own_buckets() {
    let metrics = Metrics::new();
    metrics.engine("short", 100).set_running(1);
    metrics.engine("long", 5000).set_running(2);
    // The same model again is the same series, not a second one.
    metrics.engine("short", 100).set_waiting(7, 0);
    let exposition = Exposition::parse(&metrics.render());
    let bounds = |model| exposition.bounds("vllm:request_prompt_tokens", &[("model_name", model)]);
    assert_eq!(bounds("short").last(), Some(&100.0));
    assert_eq!(bounds("long").last(), Some(&5000.0));
    let short: &[(&str, &str)] = &[("model_name", "short")];
    assert_eq!(exposition.value("vllm:num_requests_running", short), 1.0);
    assert_eq!(exposition.value("vllm:num_requests_waiting", short), 7.0);
}

#[test]
fn http_labels_never_hold_what_a_client_sent() {
    let metrics = Metrics::new();
    let http = metrics.http();
    http.answered("/v1/models/{id}", "GET", 200, Duration::from_millis(20));
    http.answered("/v1/models/{id}", "GET", 204, Duration::from_millis(20));
    http.answered("/v1/models/{id}", "BREW\"\n", 405, Duration::from_secs(2));
    let exposition = Exposition::parse(&metrics.render());
    let ok = [("handler", "/v1/models/{id}"), ("method", "GET"), ("status", "2xx")];
    assert_eq!(exposition.value("http_requests_total", &ok), 2.0);
    let odd = [("method", "other"), ("status", "4xx")];
    assert_eq!(exposition.value("http_requests_total", &odd), 1.0);
    assert_eq!(exposition.bounds("http_request_duration_seconds", &[("method", "GET")]), [0.1, 0.5, 1.0]);
    assert_eq!(exposition.bounds("http_request_duration_highr_seconds", &[]).len(), 21);
    assert_eq!(exposition.value("http_request_duration_highr_seconds_count", &[]), 3.0);
}

#[test]
fn training_storage_and_jobs_have_names_with_units() {
    let metrics = Metrics::new();
    let train = metrics.train("run \"1\"\\");
    train.step(&TrainStep { step: 9, n_tokens: 4096, loss_nats: 3.5, learning_rate: 1e-3, grad_norm: 0.5 });
    train.speed(12_000.0, 0.4);
    train.validated(1.75);
    train.scored("copa", "acc", 0.6, 0.05);
    train.checkpointed(1 << 20, 0.25);
    metrics.store().operation("put", 512, Duration::from_millis(3), true);
    metrics.store().operation("put", 512, Duration::from_millis(3), false);
    metrics.job().set_jobs("running", 2);
    metrics.job().started(false);
    metrics.job().started(true);
    let exposition = Exposition::parse(&metrics.render());
    let run: &[(&str, &str)] = &[("run", "run \"1\"\\")];
    for (name, expected) in [
        ("step", 9.0),
        ("tokens_total", 4096.0),
        ("loss_nats", 3.5),
        ("learning_rate", 1e-3),
        ("grad_norm", 0.5),
        ("tokens_per_second", 12_000.0),
        ("peak_share_ratio", 0.4),
        ("validation_bits_per_byte", 1.75),
        ("checkpoints_total", 1.0),
        ("checkpoint_bytes", 1_048_576.0),
        ("checkpoint_seconds", 0.25),
    ] {
        assert_eq!(exposition.value(&format!("loquat_train_{name}"), run), expected, "{name}");
    }
    let score: &[(&str, &str)] = &[run[0], ("task", "copa"), ("metric", "acc")];
    assert_eq!(exposition.value("loquat_train_task_score", score), 0.6);
    assert_eq!(exposition.value("loquat_train_task_stderr", score), 0.05);
    let put: &[(&str, &str)] = &[("operation", "put")];
    assert_eq!(exposition.value("loquat_store_bytes_total", put), 512.0);
    let failed = [("operation", "put"), ("outcome", "error")];
    assert_eq!(exposition.value("loquat_store_operations_total", &failed), 1.0);
    assert_eq!(exposition.value("loquat_store_operation_seconds_count", put), 2.0);
    assert_eq!(exposition.value("loquat_job_count", &[("state", "running")]), 2.0);
    assert_eq!(exposition.value("loquat_job_starts_total", &[]), 2.0);
    assert_eq!(exposition.value("loquat_job_restarts_total", &[]), 1.0);

    metrics.forget_train("run \"1\"\\");
    assert!(!metrics.render().contains("loquat_train_"), "a forgotten run leaves no series");
}

#[test]
fn the_process_reports_itself() {
    let exposition = Exposition::parse(&Metrics::new().render());
    assert_eq!(exposition.types["process_cpu_seconds_total"], "counter");
    let value = |name: &str| exposition.value(&format!("process_{name}"), &[]);
    let resident = value("resident_memory_bytes");
    assert!((1e5..1e11).contains(&resident), "{resident}");
    assert!(value("virtual_memory_bytes") >= resident);
    assert!(value("open_fds") >= 3.0);
    assert!(value("max_fds") >= value("open_fds"));
    assert!(value("threads") >= 1.0);
    // Started after 2020 and before now, in seconds.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let start = value("start_time_seconds");
    assert!(start > 1.577e9 && start <= now + 2.0, "{start} against {now}");
    assert!(now - start < 3600.0, "{start} against {now}");
}
