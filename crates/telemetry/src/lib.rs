//! Metric names with units, Prometheus text, structured logs.
