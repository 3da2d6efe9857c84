//! A server of the OpenAI API, as a chat needs it.

use std::io::{BufRead, BufReader, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// How often a running answer looks whether it should stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// The longest line of a stream, and the longest error.
const LINE_BYTES_MAX: u64 = 4 << 20;
const ERROR_BYTES_MAX: u64 = 64 << 10;

pub(super) struct Server {
    base: String,
    key: Option<String>,
    agent: ureq::Agent,
    pub(super) model: String,
}

/// What is asked for.
pub(super) struct Ask {
    pub(super) messages: Vec<Value>,
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    pub(super) max_tokens: usize,
    pub(super) seed: Option<u64>,
}

/// What came of it.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) text: String,
    /// `None` if the server does not say.
    pub(super) n_prompt: Option<u64>,
    pub(super) n_cached: u64,
    /// Of the answer: tokens, or pieces where the server does not say.
    pub(super) n_tokens: u64,
    pub(super) to_first: Duration,
    pub(super) total: Duration,
    /// Why it ended; `None` when it was stopped from here.
    pub(super) end: Option<String>,
}

impl Server {
    /// `url` with or without `/v1`; `model` or the server's first one.
    pub(super) fn connect(url: &str, key: Option<String>, model: Option<&str>) -> Result<Server> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIME_MAX))
            // The key must not follow a redirect.
            .max_redirects(0)
            .build()
            .into();
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let mut server = Server { base, key, agent, model: String::new() };
        let names = server.models()?;
        server.model = match model {
            Some(model) if !names.iter().any(|name| name == model) => {
                bail!("{url} does not serve {model}, but {}", names.join(", "))
            }
            Some(model) => model.to_owned(),
            None => names.into_iter().next().with_context(|| format!("{url} serves no model"))?,
        };
        Ok(server)
    }

    fn models(&self) -> Result<Vec<String>> {
        let url = format!("{}/v1/models", self.base);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let response = request.call().with_context(|| format!("cannot reach {url}"))?;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        if status != 200 {
            bail!("{url}: {}", refusal(status, &mut body.as_reader()));
        }
        let text = body.read_to_string().with_context(|| format!("cannot read {url}"))?;
        let list: Value = serde_json::from_str(&text).with_context(|| format!("{url} gives no JSON"))?;
        let models = list["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(models.iter().filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    /// Has the messages answered; `show` gets the text as it comes. Setting `stop` ends the answer where it is.
    pub(super) fn ask(&self, ask: &Ask, stop: &AtomicBool, show: &mut dyn FnMut(&str)) -> Result<Answer> {
        let mut body = json!({
            "model": self.model, "messages": ask.messages, "stream": true,
            "stream_options": {"include_usage": true}, "temperature": ask.temperature,
            "top_p": ask.top_p, "max_tokens": ask.max_tokens,
        });
        if let Some(seed) = ask.seed {
            body["seed"] = json!(seed);
        }
        let started = Instant::now();
        let (send, lines) = channel();
        let mut request = self.agent.post(format!("{}/v1/chat/completions", self.base));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let request = request.header("Content-Type", "application/json");
        // Reading blocks, so it has a thread of its own, which ends with the connection when nobody listens any more.
        std::thread::spawn(move || {
            if let Err(error) = read(request, &body, &send) {
                // Nobody listening means that the answer was stopped.
                let _ = send.send(Err(error));
            }
        });
        let mut answer = Answer::default();
        loop {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            match lines.recv_timeout(LOOK_EVERY) {
                Ok(line) => answer.take(&line?, started, show)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        answer.total = started.elapsed();
        if answer.end.is_none() && !stop.load(Ordering::Relaxed) {
            bail!("the server broke off the answer");
        }
        Ok(answer)
    }
}

/// Sends the request and passes on the data of each event.
fn read(
    request: ureq::RequestBuilder<ureq::typestate::WithBody>,
    body: &Value,
    send: &Sender<Result<String>>,
) -> Result<()> {
    let response = request.send(body.to_string().as_bytes()).context("cannot reach the server")?;
    let status = response.status().as_u16();
    let mut body = response.into_body();
    if status != 200 {
        bail!("{}", refusal(status, &mut body.as_reader()));
    }
    let mut reader = BufReader::new(body.into_reader());
    loop {
        let mut line = String::new();
        let n = reader.by_ref().take(LINE_BYTES_MAX).read_line(&mut line).context("the answer broke off")?;
        let data = line.trim_end().strip_prefix("data:").map(str::trim);
        if n == 0 || data == Some("[DONE]") {
            return Ok(());
        }
        if n as u64 == LINE_BYTES_MAX {
            bail!("the server sent a line of more than {LINE_BYTES_MAX} bytes");
        }
        if let Some(data) = data
            && send.send(Ok(data.to_owned())).is_err()
        {
            return Ok(());
        }
    }
}

/// The server's own words for why not.
fn refusal(status: u16, body: &mut dyn Read) -> String {
    let mut bytes = Vec::new();
    let read = body.take(ERROR_BYTES_MAX).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let message = serde_json::from_str::<Value>(&text).ok();
    let message = message.as_ref().and_then(|json| json["error"]["message"].as_str());
    match (message, read) {
        (Some(message), _) => format!("the server refused ({status}): {message}"),
        (None, Ok(_)) if text.len() < 500 && !text.is_empty() => format!("the server said {status}: {text}"),
        _ => format!("the server said {status}"),
    }
}

impl Answer {
    /// One event of the stream.
    fn take(&mut self, data: &str, started: Instant, show: &mut dyn FnMut(&str)) -> Result<()> {
        let event: Value = serde_json::from_str(data).context("the server sent an event that is no JSON")?;
        if let Some(message) = event["error"]["message"].as_str() {
            return Err(anyhow!("the server failed: {message}"));
        }
        let choice = &event["choices"][0];
        if let Some(piece) = choice["delta"]["content"].as_str().filter(|piece| !piece.is_empty()) {
            if self.text.is_empty() {
                self.to_first = started.elapsed();
            }
            self.n_tokens += 1;
            self.text += piece;
            show(piece);
        }
        if let Some(end) = choice["finish_reason"].as_str() {
            self.end = Some(end.to_owned());
        }
        let usage = &event["usage"];
        if let Some(n_tokens) = usage["completion_tokens"].as_u64() {
            self.n_tokens = n_tokens;
            self.n_prompt = usage["prompt_tokens"].as_u64();
            self.n_cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_become_an_answer() {
        let mut answer = Answer::default();
        let mut shown = String::new();
        for data in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"content":"Par"}}]}"#,
            r#"{"choices":[{"delta":{"content":"is"}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}"#,
        ] {
            answer.take(data, Instant::now(), &mut |piece| shown += piece).unwrap();
        }
        assert_eq!((shown.as_str(), answer.text.as_str()), ("Paris", "Paris"));
        assert_eq!((answer.n_prompt, answer.n_cached, answer.n_tokens), (Some(9), 4, 3));
        assert_eq!(answer.end.as_deref(), Some("stop"));
        let failed = answer.take(r#"{"error":{"message":"boom"}}"#, Instant::now(), &mut |_| ());
        assert!(failed.unwrap_err().to_string().contains("boom"));
        assert!(answer.take("{", Instant::now(), &mut |_| ()).is_err());
    }

    #[test]
    fn refusals_are_told_in_the_servers_words() {
        let tell = |text: &str| refusal(400, &mut text.as_bytes());
        assert!(tell(r#"{"error":{"message":"too long"}}"#).contains("too long"));
        assert!(tell("<html>").contains("<html>"));
        assert!(tell(&"x".repeat(1000)).ends_with("400"));
    }
}
