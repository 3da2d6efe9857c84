//! Starting the real binary and talking to it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longer than anything here takes on a busy machine with two cores.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

pub(crate) fn speeches() -> PathBuf {
    root().join("fixtures/text")
}

/// The chat model that `./test` fetches; a test that needs it says so when it is missing.
pub(crate) fn chat_model() -> Option<PathBuf> {
    let path = root().join("var/cache/smollm2-135m-instruct-q4_1.gguf");
    if !path.exists() {
        eprintln!("SKIPPED IN PART: {} is missing (./test fetches it)", path.display());
        return None;
    }
    Some(path)
}

pub(crate) fn loquat(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loquat"));
    command
        .arg("--home")
        .arg(home)
        .env_remove("LOQUAT_HOME")
        .env_remove("LOQUAT_STORE")
        .env_remove("LOQUAT_DATABASE");
    command
}

/// Runs a command to its end.
pub(crate) fn output(home: &Path, args: &[&str]) -> Output {
    loquat(home).args(args).output().unwrap()
}

/// Runs a command that must succeed.
pub(crate) fn succeed(home: &Path, args: &[&str]) -> String {
    let output = output(home, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A `loquat` that serves, and what it printed.
pub(crate) struct Running {
    pub(crate) child: Child,
    lines: Receiver<String>,
    pub(crate) printed: Vec<String>,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, lines, printed: Vec::new() }
    }

    /// The first line that begins with `start`, without it.
    pub(crate) fn wait_for(&mut self, start: &str) -> String {
        if let Some(found) = self.find(start) {
            return found;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.printed.push(line),
                Err(_) => panic!("no line '{start}…' came; printed:\n{}", self.printed.join("\n")),
            }
            if let Some(found) = self.find(start) {
                return found;
            }
        }
    }

    fn find(&self, start: &str) -> Option<String> {
        self.printed.iter().find_map(|l| l.strip_prefix(start)).map(|rest| rest.trim().to_owned())
    }

    /// Waits until it serves and returns a client for it.
    pub(crate) fn client(&mut self) -> Client {
        self.wait_for("serving");
        let key = self.wait_for("API key");
        let console = self.wait_for("console");
        let base = console.split("/#").next().unwrap().to_owned();
        Client { base, key }
    }

    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success(), "kill {signal}");
    }

    /// Asks it to stop and waits; returns its exit code.
    pub(crate) fn stop(mut self) -> Option<i32> {
        self.signal("-INT");
        wait_exit(&mut self.child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed must not leave a server behind; one that has ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn wait_exit(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("process {} does not end", child.id());
}

/// Speaks HTTP to a running server.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) base: String,
    pub(crate) key: String,
}

impl Client {
    fn agent() -> ureq::Agent {
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .into()
    }

    /// The same server for another client.
    pub(crate) fn with_key(&self, key: &str) -> Client {
        Client { base: self.base.clone(), key: key.to_owned() }
    }

    /// Status and body.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let bearer = format!("Bearer {}", self.key);
        let url = format!("{}{path}", self.base);
        let mut response = Self::agent().get(&url).header("Authorization", &bearer).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    pub(crate) fn get_json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, String) {
        let bearer = format!("Bearer {}", self.key);
        let request = Self::agent()
            .post(format!("{}{path}", self.base))
            .header("Authorization", &bearer)
            .header("Content-Type", "application/json");
        let mut response = request.send(body.to_string().as_bytes()).unwrap();
        let mut text = String::new();
        response.body_mut().as_reader().read_to_string(&mut text).unwrap();
        (response.status().as_u16(), text)
    }

    /// As `post`, where the connection may break.
    pub(crate) fn try_post(&self, path: &str, body: &Value) -> Result<(u16, String), String> {
        let request = Self::agent()
            .post(format!("{}{path}", self.base))
            .header("Authorization", &format!("Bearer {}", self.key))
            .header("Content-Type", "application/json");
        let mut response = request.send(body.to_string().as_bytes()).map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok((status, text))
    }

    pub(crate) fn post_json(&self, path: &str, body: &Value) -> Value {
        let (status, text) = self.post(path, body);
        assert_eq!(status, 200, "{path} {body}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The data of a stream's events, without the final `[DONE]`.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, text) = self.post(path, body);
        assert_eq!(status, 200, "{path} {body}: {text}");
        let mut events: Vec<&str> = text.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }
}
