//! Every way a request can fail, and the one place that decides what HTTP says about it.
//!
//! The body follows OpenAI: `{"error":{"message","type","param","code"}}`, all four keys always there. What the client
//! reads and what the log keeps are separate texts: the detail of our own failures goes only to the log.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::state::Role;

/// The longest piece of a client's own text that an error repeats.
const ECHO_CHARS_MAX: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("{message}")]
    Invalid { param: String, message: String },
    #[error("The body is not valid JSON: {0}.")]
    Json(String),
    #[error("{message}")]
    ContextLength { param: &'static str, message: String },
    #[error("The model `{}` does not exist.", echo(.0))]
    ModelNotFound(String),
    #[error("There is no {what} `{}`.", echo(.name))]
    NotFound { what: &'static str, name: String },
    #[error("There is no route {}.", echo(.0))]
    NoRoute(String),
    #[error("This route does not take the method {}.", echo(.0))]
    Method(String),
    #[error("No API key was given. Send it as `Authorization: Bearer <key>`.")]
    KeyMissing,
    #[error("Incorrect API key provided.")]
    KeyWrong,
    #[error(
        "This key may not {what}: it has the role `{}`, and that takes the role `{}`.",
        .has.as_str(),
        .needs.as_str()
    )]
    Forbidden { what: &'static str, has: Role, needs: Role },
    #[error("{0}")]
    Conflict(String),
    #[error(
        "The host name `{}` is not one of this server's. Allow it in the server's configuration if it should be.",
        echo(.0)
    )]
    Host(String),
    #[error("The body is larger than {limit} bytes.")]
    BodyTooLarge { limit: usize },
    #[error("The body did not arrive within {} s.", .0.as_secs())]
    BodyTimeout(Duration),
    #[error("The body broke off before its end.")]
    BodyBroken,
    #[error("The content type must be application/json, got `{}`.", echo(.0))]
    ContentType(String),
    #[error("The content encoding `{}` is not supported, send the body as it is.", echo(.0))]
    ContentEncoding(String),
    #[error("The queue is full. Try again in {} s.", seconds(.retry_after))]
    QueueFull { retry_after: Duration },
    #[error("The server is shutting down and takes no new requests.")]
    Draining,
    #[error("The model is not available at the moment.")]
    EngineDown(String),
    #[error("{why} Nothing was changed; models are served as before. Try again later.")]
    StateDown { why: &'static str, detail: String },
    #[error("The server had an error while processing the request.")]
    Internal(String),
}

pub(crate) type Result<T> = std::result::Result<T, ApiError>;

impl ApiError {
    /// A field with a value it cannot have. `why` completes the sentence "Invalid value for `field`: …".
    pub(crate) fn invalid(param: impl Into<String>, why: impl std::fmt::Display) -> ApiError {
        let param = param.into();
        let message = format!("Invalid value for `{param}`: {why}.");
        ApiError::Invalid { param, message }
    }

    pub(crate) fn internal(detail: impl std::fmt::Display) -> ApiError {
        ApiError::Internal(detail.to_string())
    }

    pub fn status(&self) -> StatusCode {
        use ApiError::*;
        match self {
            Invalid { .. } | Json(_) | ContextLength { .. } | BodyBroken => StatusCode::BAD_REQUEST,
            KeyMissing | KeyWrong => StatusCode::UNAUTHORIZED,
            Forbidden { .. } => StatusCode::FORBIDDEN,
            Conflict(_) => StatusCode::CONFLICT,
            ModelNotFound(_) | NotFound { .. } | NoRoute(_) => StatusCode::NOT_FOUND,
            Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ContentType(_) | ContentEncoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Host(_) => StatusCode::MISDIRECTED_REQUEST,
            QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
            Draining | EngineDown(_) | StateDown { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            StatusCode::INTERNAL_SERVER_ERROR => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn code(&self) -> Option<&'static str> {
        use ApiError::*;
        match self {
            Invalid { .. } => Some("invalid_value"),
            Json(_) => Some("json_parse_error"),
            ContextLength { .. } => Some("context_length_exceeded"),
            ModelNotFound(_) => Some("model_not_found"),
            NotFound { .. } | NoRoute(_) => Some("not_found"),
            KeyMissing | KeyWrong => Some("invalid_api_key"),
            Forbidden { .. } => Some("insufficient_role"),
            Conflict(_) => Some("conflict"),
            QueueFull { .. } => Some("rate_limit_exceeded"),
            Draining | EngineDown(_) => Some("server_is_overloaded"),
            StateDown { .. } => Some("state_unavailable"),
            _ => None,
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            ApiError::Invalid { param, .. } => Some(param),
            ApiError::ContextLength { param, .. } => Some(param),
            ApiError::ModelNotFound(_) => Some("model"),
            _ => None,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            ApiError::QueueFull { retry_after } => Some(*retry_after),
            ApiError::Draining | ApiError::EngineDown(_) | ApiError::StateDown { .. } => {
                Some(Duration::from_secs(5))
            }
            _ => None,
        }
    }

    /// The body, also sent as an event of a stream that fails half way.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.to_string(),
            "type": self.kind(),
            "param": self.param(),
            "code": self.code(),
        }})
    }

    /// Keeps what the client must not read. Call it where the request's span is current.
    pub(crate) fn log(&self) {
        match self {
            ApiError::Internal(detail) => tracing::error!(detail, "the request failed"),
            ApiError::StateDown { detail, .. } => {
                tracing::error!(detail, "the cluster's state is not available")
            }
            ApiError::EngineDown(detail) => tracing::error!(detail, "the engine is not available"),
            _ => tracing::debug!(error = %self, status = self.status().as_u16(), "the request was refused"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        let mut response = (self.status(), Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds(&wait)));
        }
        if matches!(self, ApiError::KeyMissing | ApiError::KeyWrong) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(retry) = self.should_retry() {
            let name = HeaderName::from_static("x-should-retry");
            headers.insert(name, HeaderValue::from_static(if retry { "true" } else { "false" }));
        }
        response
    }
}

impl ApiError {
    /// What the SDKs should do where the status alone would mislead them: a body that came too slowly will again.
    fn should_retry(&self) -> Option<bool> {
        match self {
            ApiError::QueueFull { .. }
            | ApiError::Draining
            | ApiError::EngineDown(_)
            | ApiError::StateDown { .. } => Some(true),
            ApiError::BodyTimeout(_) => Some(false),
            _ => None,
        }
    }
}

fn seconds(wait: &Duration) -> u64 {
    wait.as_secs_f64().ceil().max(1.0) as u64
}

/// A client's text, safe to repeat: short, no control characters.
pub(crate) fn echo(text: &str) -> String {
    let mut out: String =
        text.chars().take(ECHO_CHARS_MAX).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(ECHO_CHARS_MAX).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_keys_are_always_there() {
        for error in [ApiError::KeyMissing, ApiError::invalid("n", "x"), ApiError::internal("secret")] {
            let body = error.body();
            let keys: Vec<_> = body["error"].as_object().unwrap().keys().cloned().collect();
            assert_eq!(keys, ["message", "type", "param", "code"]);
            assert!(!body.to_string().contains("secret"));
        }
    }

    #[test]
    fn a_clients_text_is_repeated_short_and_clean() {
        let message = ApiError::ModelNotFound(format!("a\n{}", "x".repeat(1_000_000))).to_string();
        assert!(message.len() < 200 && message.contains("a?x"), "{message}");
    }
}
