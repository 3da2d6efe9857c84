//! The one authentication function, for all routes but the probes, the API's description and the console's files.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::error::{ApiError, Result};
use crate::state::{AppState, KeyOwner};

/// Longer than any key there is.
const KEY_BYTES_MAX: usize = 512;

/// Lets a request pass whose key is valid, and tells the handlers whose it is.
pub(crate) async fn require_key(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Result<Response> {
    let owner = match (presented_key(request.headers()), state.keys.nobody()) {
        (Err(ApiError::KeyMissing), Some(nobody)) => nobody,
        (key, _) => check(&state, key?).await?,
    };
    tracing::debug!(key = owner.name, "authenticated");
    request.extensions_mut().insert(owner);
    Ok(next.run(request).await)
}

/// The key in `Authorization: Bearer` or `x-api-key`. More than one, even if equal, is refused: a proxy before us
/// might have looked at the other.
fn presented_key(headers: &HeaderMap) -> Result<String> {
    let bearers = headers.get_all(header::AUTHORIZATION).iter().map(|value| (value, true));
    let plain = headers.get_all("x-api-key").iter().map(|value| (value, false));
    let mut all = bearers.chain(plain);
    let (value, is_bearer) = all.next().ok_or(ApiError::KeyMissing)?;
    if all.next().is_some() {
        return Err(ApiError::KeyWrong);
    }
    let text = value.to_str().map_err(|_| ApiError::KeyWrong)?;
    let key = if is_bearer { bearer(text).ok_or(ApiError::KeyWrong)? } else { text };
    let key = key.trim();
    match key.len() {
        0 => Err(ApiError::KeyMissing),
        1..=KEY_BYTES_MAX => Ok(key.to_owned()),
        _ => Err(ApiError::KeyWrong),
    }
}

fn bearer(text: &str) -> Option<&str> {
    let (scheme, key) = text.split_once(' ').unwrap_or((text, ""));
    scheme.eq_ignore_ascii_case("bearer").then_some(key)
}

async fn check(state: &AppState, key: String) -> Result<KeyOwner> {
    if let Some(owner) = state.keys.known(&key) {
        return owner.ok_or(ApiError::KeyWrong);
    }
    let keys = state.keys.clone();
    let checked = tokio::task::spawn_blocking(move || keys.check(&key)).await.map_err(ApiError::internal)?;
    let owner = checked.map_err(|e| ApiError::internal(format!("cannot check keys: {e}")))?;
    owner.ok_or(ApiError::KeyWrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};

    fn check(headers: &[(&str, &[u8])], expected: std::result::Result<&str, &str>) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            map.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        let got = presented_key(&map)
            .map_err(|e| if matches!(e, ApiError::KeyMissing) { "missing" } else { "wrong" });
        assert_eq!(got.as_deref(), expected.as_ref().map(|s| *s), "{headers:?}");
    }

    #[test]
    fn keys_are_read_from_either_header_but_only_one() {
        check(&[], Err("missing"));
        check(&[("authorization", b"Bearer sk-1")], Ok("sk-1"));
        check(&[("authorization", b"bearer  sk-1 ")], Ok("sk-1"));
        check(&[("x-api-key", b"sk-1")], Ok("sk-1"));
        check(&[("authorization", b"Bearer")], Err("missing"));
        check(&[("authorization", b"Basic c2s=")], Err("wrong"));
        check(&[("authorization", b"sk-1")], Err("wrong"));
        check(&[("authorization", b"Bearer \xff\xfe")], Err("wrong"));
        check(&[("authorization", "x".repeat(10_000).as_bytes())], Err("wrong"));
        check(&[("x-api-key", "x".repeat(513).as_bytes())], Err("wrong"));
        check(&[("authorization", b"Bearer sk-1"), ("x-api-key", b"sk-1")], Err("wrong"));
        check(&[("authorization", b"Bearer sk-1"), ("authorization", b"Bearer sk-2")], Err("wrong"));
        check(&[("authorization", b"Bearer ' OR 1=1 --")], Ok("' OR 1=1 --"));
    }
}
