//! Histogram buckets, as vLLM exports them: dashboards and alert rules are written against these bounds.

/// Upper bounds of `vllm:time_to_first_token_seconds`.
pub(crate) const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];

/// Upper bounds of `vllm:inter_token_latency_seconds` and `vllm:request_time_per_output_token_seconds`.
pub(crate) const TOKEN_GAP_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// Upper bounds of the `vllm:request_*_time_seconds` and `vllm:e2e_request_latency_seconds` histograms.
pub(crate) const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// Upper bounds of `vllm:iteration_tokens_total`.
pub(crate) const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Upper bounds of `vllm:request_params_n`.
pub(crate) const PARAMS_N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Upper bounds of `http_request_duration_seconds`, as prometheus-fastapi-instrumentator has them.
pub(crate) const HTTP_SECONDS: &[f64] = &[0.1, 0.5, 1.0];

/// Upper bounds of `http_request_duration_highr_seconds`, which has no labels and therefore affords more buckets.
pub(crate) const HTTP_HIGHR_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
];

/// Upper bounds of `loquat_store_operation_seconds`: a local file answers in 100 µs, a slow bucket in seconds.
pub(crate) const STORE_SECONDS: &[f64] =
    &[0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0];

/// Upper bounds of `loquat_job_reconcile_seconds`.
pub(crate) const RECONCILE_SECONDS: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0];

/// 1, 2, 5, 10, 20, 50, ... up to and including the last that is at most `tokens_max`, as vLLM builds them from the
/// longest context of the model.
pub(crate) fn token_counts(tokens_max: usize) -> Vec<f64> {
    let mut bounds = Vec::new();
    let mut decade = 1_usize;
    loop {
        for step in [1, 2, 5] {
            match decade.checked_mul(step) {
                Some(bound) if bound <= tokens_max => bounds.push(bound as f64),
                _ => return bounds,
            }
        }
        match decade.checked_mul(10) {
            Some(next) => decade = next,
            None => return bounds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::token_counts;

    #[test]
    fn token_buckets_stop_at_the_context_length() {
        assert_eq!(
            token_counts(8192),
            [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0]
        );
        assert_eq!(token_counts(10), [1.0, 2.0, 5.0, 10.0]);
        assert!(token_counts(0).is_empty());
        // Must end instead of overflowing.
        assert!(token_counts(usize::MAX).len() > 50);
    }
}
