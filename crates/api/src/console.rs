//! The console's files, embedded in the binary, and the headers that keep the page to itself.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rust_embed::{EmbeddedFile, RustEmbed};

#[derive(RustEmbed)]
#[folder = "$CARGO_MANIFEST_DIR/../../console/dist"]
struct Files;

/// The page may load only from us and be framed by nobody. Model output that slips through every other guard still
/// can neither run nor phone home.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The file at `path`, if there is one. Vite builds a compressed twin `*.gz` beside each text file.
pub(crate) fn file(path: &str, request: &HeaderMap) -> Option<Response> {
    let name = if path == "/" { "index.html" } else { path.strip_prefix('/')? };
    let plain = Files::get(name)?;
    let gzip = accepts_gzip(request).then(|| Files::get(&format!("{name}.gz"))).flatten();
    let etag = format!("\"{}\"", hex::encode(&plain.metadata.sha256_hash()[..12]));
    let known = request.get(header::IF_NONE_MATCH).is_some_and(|seen| seen.as_bytes() == etag.as_bytes());
    let encoded = gzip.is_some();
    let mut response =
        if known { StatusCode::NOT_MODIFIED.into_response() } else { content(gzip.unwrap_or(plain)) };
    let headers = response.headers_mut();
    let mut set = |key: HeaderName, value: &'static str| headers.insert(key, HeaderValue::from_static(value));
    set(header::CONTENT_TYPE, content_type(name));
    set(header::CONTENT_SECURITY_POLICY, POLICY);
    set(header::REFERRER_POLICY, "no-referrer");
    set(HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
    set(header::VARY, "accept-encoding");
    // Names under assets/ carry a hash of what is in them.
    let hashed = name.starts_with("assets/");
    set(header::CACHE_CONTROL, if hashed { "public, max-age=31536000, immutable" } else { "no-cache" });
    if encoded && !known {
        set(header::CONTENT_ENCODING, "gzip");
    }
    headers.insert(header::ETAG, HeaderValue::from_str(&etag).expect("hexadecimal"));
    Some(response)
}

fn content(file: EmbeddedFile) -> Response {
    Body::from(file.data.into_owned()).into_response()
}

fn accepts_gzip(request: &HeaderMap) -> bool {
    let accepted =
        request.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accepted.split(',').any(|coding| {
        let mut parts = coding.trim().split(';').map(str::trim);
        parts.next() == Some("gzip") && !parts.any(|weight| weight == "q=0" || weight == "q=0.0")
    })
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next().unwrap_or_default() {
        "html" => "text/html; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "svg" => "image/svg+xml",
        "json" | "webmanifest" => "application/json",
        "png" => "image/png",
        "woff2" => "font/woff2",
        _ => "application/octet-stream",
    }
}
