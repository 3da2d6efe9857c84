//! Every bound of the HTTP surface, by name.

use std::time::Duration;

/// What one server takes from its clients. The binary fills it from flags; the defaults suit one machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Bytes of a request body; one more is answered with 413.
    pub body_bytes_max: usize,
    /// Time from a request's head to the end of its body; then 408.
    pub body_time_max: Duration,
    /// Bodies above this are parsed and tokenized off the async threads, at most `n_heavy` at a time, so that
    /// probes and running streams never wait for them. 16 KiB tokenize in about a millisecond.
    pub heavy_body_bytes: usize,
    pub n_heavy: usize,
    /// Such bodies in memory at the same time; one more is answered with 429. 16 * 8 MiB = 128 MiB.
    pub n_large_bodies: usize,
    /// Bytes of a request's head; more is answered with 431 by hyper.
    pub head_bytes_max: usize,
    /// Time for a request's head to arrive, and for which a kept connection may idle.
    pub head_time_max: Duration,
    /// A client that takes no byte of its answer for this long is cut off.
    pub write_stall_max: Duration,
    /// Open connections; at the limit the longest idle one makes room for a new one. An idle one
    /// takes 14 kB.
    pub connections_max: usize,
    /// Sequences one request may ask for: prompts times `n`.
    pub sequences_max: usize,
    /// Grammars compiled at the same time, and how long a request waits for its turn and for its grammar.
    pub n_compiling: usize,
    pub compile_time_max: Duration,
    /// A stream that is silent for this long gets a comment, so that proxies do not close it.
    pub keep_alive: Duration,
    /// How long running requests may finish after the shutdown signal.
    pub drain_time_max: Duration,
    /// Host names clients may call this server by, besides `localhost` and IP addresses, which DNS rebinding cannot
    /// use. `*` allows all.
    pub hosts: Vec<String>,
    /// Whoever has a key may have adapters loaded from the server's disk, and unloaded.
    pub runtime_adapters: bool,
    /// Origins of other pages that may call the API from a browser. Empty: none.
    pub cors_origins: Vec<String>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes_max: 8 << 20,
            body_time_max: Duration::from_secs(30),
            heavy_body_bytes: 16 << 10,
            n_heavy: 2,
            n_large_bodies: 16,
            head_bytes_max: 64 << 10,
            head_time_max: Duration::from_secs(30),
            write_stall_max: Duration::from_secs(60),
            connections_max: 16_384,
            sequences_max: 256,
            n_compiling: 2,
            compile_time_max: Duration::from_secs(5),
            keep_alive: Duration::from_secs(15),
            drain_time_max: Duration::from_secs(30),
            hosts: Vec::new(),
            runtime_adapters: false,
            cors_origins: Vec::new(),
        }
    }
}
