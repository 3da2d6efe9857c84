//! The part of the API server's REST interface that jobs need: plain requests, plain JSON.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::KubernetesOptions;
use crate::error::{Error, Result};

/// One request, from its name's lookup to the last byte.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// A page of a list, or a piece of a log.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Objects of one page.
const PAGE: usize = 500;
/// What of a refusal is told.
const WHY_CHARS: usize = 300;

pub(super) struct Api {
    agent: Agent,
    server: String,
    namespace: String,
    token_file: Option<PathBuf>,
}

/// What the server said to a request that it understood or refused.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

impl Api {
    /// Errors: the certificate cannot be read, or is none.
    pub(super) fn new(options: &KubernetesOptions) -> Result<Api> {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(REQUEST_MAX));
        if let Some(path) = &options.ca_file {
            let invalid = |why: String| Error::Invalid { what: "certificate of Kubernetes", why };
            let pem = fs::read(path).map_err(|error| invalid(format!("{}: {error}", path.display())))?;
            let found = Certificate::from_pem(&pem);
            let found = found.map_err(|error| invalid(format!("{}: {error}", path.display())))?;
            let roots = RootCerts::new_with_certs(&[found]);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Api {
            agent: config.build().into(),
            server: options.server.trim_end_matches('/').to_owned(),
            namespace: options.namespace.clone(),
            token_file: options.token_file.clone(),
        })
    }

    /// The path of the Jobs, or of one.
    pub(super) fn jobs(&self, name: &str) -> String {
        format!("/apis/batch/v1/namespaces/{}/jobs{}{name}", self.namespace, slash(name))
    }

    /// The path of the Pods, or of one.
    pub(super) fn pods(&self, name: &str) -> String {
        format!("/api/v1/namespaces/{}/pods{}{name}", self.namespace, slash(name))
    }

    pub(super) fn get(&self, path: &str) -> Result<Answer> {
        self.finish("read", path, self.authorized(self.agent.get(self.url(path)))?.call())
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        let request = self.authorized(self.agent.post(self.url(path)))?;
        self.finish("create", path, request.content_type("application/json").send(body.to_string()))
    }

    /// Changes the named fields alone (RFC 7396).
    pub(super) fn patch(&self, path: &str, body: &Value) -> Result<Answer> {
        let request = self.authorized(self.agent.patch(self.url(path)))?;
        self.finish(
            "change",
            path,
            request.content_type("application/merge-patch+json").send(body.to_string()),
        )
    }

    /// With DeleteOptions: what must still be true of the object, and how it goes.
    pub(super) fn delete(&self, path: &str, body: &Value) -> Result<Answer> {
        let request = self.authorized(self.agent.delete(self.url(path)))?.force_send_body();
        self.finish("delete", path, request.content_type("application/json").send(body.to_string()))
    }

    /// All objects of a collection with a label, page by page.
    pub(super) fn list(&self, path: &str, selector: &str) -> Result<Vec<Value>> {
        let mut items = Vec::new();
        let mut next = String::new();
        loop {
            let url = format!("{path}?labelSelector={}&limit={PAGE}{next}", escaped(selector));
            let page = self.get(&url)?.expect("list", path, 200)?;
            let Some(found) = page["items"].as_array() else {
                return Err(refused("list", path, "the answer has no items"));
            };
            items.extend(found.iter().cloned());
            match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => next = format!("&continue={}", escaped(token)),
                None => return Ok(items),
            }
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server)
    }

    /// The token is read each time: a pod's is replaced every hour.
    fn authorized<Any>(&self, request: ureq::RequestBuilder<Any>) -> Result<ureq::RequestBuilder<Any>> {
        let Some(path) = &self.token_file else { return Ok(request) };
        let token = fs::read_to_string(path).map_err(|error| Error::Invalid {
            what: "token of Kubernetes",
            why: format!("{}: {error}", path.display()),
        })?;
        Ok(request.header("Authorization", format!("Bearer {}", token.trim())))
    }

    fn finish(
        &self,
        doing: &'static str,
        path: &str,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Answer> {
        let unreachable = |source| Error::KubernetesUnreachable { server: self.server.clone(), source };
        let mut answer = answer.map_err(|source| unreachable(Box::new(source)))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        let body = body.map_err(|source| unreachable(Box::new(source)))?;
        // Too many requests, or a server that is starting or going: later it will know.
        if matches!(status, 429 | 500..) {
            let why = format!("{status} {}", told(&body));
            return Err(Error::KubernetesBusy { doing, path: path.to_owned(), why });
        }
        Ok(Answer { status, body })
    }
}

impl Answer {
    /// The object, of an answer with this status.
    pub(super) fn expect(self, doing: &'static str, path: &str, status: u16) -> Result<Value> {
        if self.status != status {
            return Err(refused(doing, path, &format!("{} {}", self.status, told(&self.body))));
        }
        serde_json::from_slice(&self.body).map_err(|error| refused(doing, path, &error.to_string()))
    }
}

pub(super) fn refused(doing: &'static str, path: &str, why: &str) -> Error {
    Error::Kubernetes { doing, path: path.to_owned(), why: why.chars().take(WHY_CHARS).collect() }
}

/// The message of a Status object, or what there is.
fn told(body: &[u8]) -> String {
    let status: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = status["message"].as_str().map(str::to_owned);
    message.unwrap_or_else(|| String::from_utf8_lossy(body).chars().take(WHY_CHARS).collect())
}

fn slash(name: &str) -> &'static str {
    if name.is_empty() { "" } else { "/" }
}

/// For a query: everything but letters, digits and what never means anything.
pub(super) fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}
