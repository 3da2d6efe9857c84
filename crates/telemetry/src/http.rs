//! HTTP metrics with the names of prometheus-fastapi-instrumentator, which vLLM uses.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::buckets;
use crate::metrics::registered;

/// Counts and times answers. Clones share the same series.
#[derive(Clone, Debug)]
pub struct HttpMetrics {
    requests: Family<RequestLabels, Counter>,
    duration: Family<RouteLabels, Histogram, fn() -> Histogram>,
    duration_highr: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    handler: &'static str,
    method: &'static str,
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    handler: &'static str,
    method: &'static str,
}

impl HttpMetrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        Self {
            requests: registered(
                registry,
                "http_requests",
                "Requests answered, by route, method and status class",
                Family::default(),
            ),
            duration: registered(
                registry,
                "http_request_duration_seconds",
                "Time from the request's head to the end of the answer, by route and method",
                Family::new_with_constructor(|| Histogram::new(buckets::HTTP_SECONDS.iter().copied())),
            ),
            duration_highr: registered(
                registry,
                "http_request_duration_highr_seconds",
                "Time from the request's head to the end of the answer, all routes, many buckets",
                Histogram::new(buckets::HTTP_HIGHR_SECONDS.iter().copied()),
            ),
        }
    }

    /// One answer. `handler` is the route's template (`/v1/models/{id}`), never the path a client sent; `method` may be
    /// anything a client sent and is reduced to a known word.
    pub fn answered(&self, handler: &'static str, method: &str, status: u16, took: Duration) {
        let method = method_word(method);
        let status = status_class(status);
        self.requests.get_or_create_owned(&RequestLabels { handler, method, status }).inc();
        self.duration.get_or_create_owned(&RouteLabels { handler, method }).observe(took.as_secs_f64());
        self.duration_highr.observe(took.as_secs_f64());
    }
}

fn method_word(method: &str) -> &'static str {
    match method {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

fn status_class(status: u16) -> &'static str {
    match status {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}
