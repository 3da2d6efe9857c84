//! Steady requests, and how each ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::Client;

/// Clients of each gateway, and the pause between two requests of one.
pub(super) const CLIENTS: usize = 2;
const PAUSE: Duration = Duration::from_millis(150);

#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) at: Instant,
    /// Of the gateway.
    pub(super) address: String,
    pub(super) took: Duration,
    end: End,
}

#[derive(Clone, Debug, PartialEq)]
enum End {
    Whole,
    /// It failed and said so: a refusal, an error event, a connection that broke.
    Failed(String),
    /// It looks whole and is not.
    Lost(String),
}

impl Asked {
    pub(super) fn is_whole(&self) -> bool {
        self.end == End::Whole
    }

    pub(super) fn is_lost(&self) -> bool {
        matches!(self.end, End::Lost(_))
    }

    pub(super) fn is_well(&self, bound: Duration) -> bool {
        self.is_whole() && self.took <= bound
    }

    /// Of a client's time what this request had.
    pub(super) fn time(&self) -> Duration {
        self.took + PAUSE
    }
}

pub(super) struct Traffic {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub(super) fn start(gateways: &[Client]) -> Traffic {
        let mut traffic = Traffic { stop: Arc::default(), asked: Arc::default(), clients: Vec::new() };
        for (i, client) in gateways.iter().flat_map(|client| [client; CLIENTS]).enumerate() {
            let (client, stop, asked) = (client.clone(), traffic.stop.clone(), traffic.asked.clone());
            traffic.clients.push(std::thread::spawn(move || {
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let one = ask(&client, &format!("client {i} asks for the {round}th time"));
                    asked.lock().unwrap().push(one);
                    std::thread::sleep(PAUSE);
                }
            }));
        }
        traffic
    }

    pub(super) fn so_far(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(super) fn end(self) -> Vec<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
        Arc::into_inner(self.asked).unwrap().into_inner().unwrap()
    }
}

fn ask(client: &Client, prompt: &str) -> Asked {
    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 12, "ignore_eos": true, "stream": true});
    let at = Instant::now();
    let end = match client.try_post("/v1/completions", &body) {
        Ok((200, text)) if text.contains("\"error\"") => End::Failed(text),
        Ok((200, text)) if text.trim_end().ends_with("[DONE]") => End::Whole,
        Ok((200, text)) => End::Lost(text),
        Ok((status, text)) => End::Failed(format!("{status} {text}")),
        Err(error) => End::Failed(error),
    };
    Asked { at, address: client.base.clone(), took: at.elapsed(), end }
}

/// Of what was asked from `from` on for so long; a failure takes for ever, and so does nothing at all.
pub(super) fn p99(asked: &[Asked], from: Instant, length: Duration) -> Duration {
    let within = asked.iter().filter(|one| one.at >= from && one.at < from + length);
    let mut took: Vec<Duration> =
        within.map(|one| if one.is_whole() { one.took } else { Duration::MAX }).collect();
    took.sort();
    took.get(took.len() * 99 / 100).copied().unwrap_or(Duration::MAX)
}
