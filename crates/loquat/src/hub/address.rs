//! Addresses, and what headers say of them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use ureq::http::HeaderMap;

/// The longest wait that a server's `Retry-After` is granted.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// Percent-encodes a part of a path.
pub(super) fn escape(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    part.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Scheme and host with port, in lower case.
fn origin(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    Some(format!("{scheme}://{authority}").to_lowercase())
}

pub(super) fn same_host(url: &str, other: &str) -> bool {
    origin(url).is_some() && origin(url) == origin(other)
}

/// A URL without what may be a secret: signed addresses carry their signature after the question mark.
pub(super) fn shown(url: &str) -> String {
    url.split('?').next().unwrap_or_default().chars().take(200).collect()
}

pub(super) fn redirect(from: &str, headers: &HeaderMap) -> Result<String> {
    let target = headers.get("location").and_then(|value| value.to_str().ok());
    let target = target.with_context(|| format!("{} redirects to nowhere", shown(from)))?;
    let from_origin = origin(from).with_context(|| format!("{} is no URL", shown(from)))?;
    let url = match target {
        absolute if absolute.contains("://") => absolute.to_owned(),
        path if path.starts_with('/') && !path.starts_with("//") => format!("{from_origin}{path}"),
        _ => bail!("{} redirects to {}, which is no address", shown(from), shown(target)),
    };
    let is_web = url.starts_with("https://") || url.starts_with("http://");
    if !is_web || (from.starts_with("https://") && !url.starts_with("https://")) {
        bail!("{} redirects to {}, which is refused", shown(from), shown(&url));
    }
    Ok(url)
}

/// The first byte of a partial answer.
pub(super) fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get("content-range")?.to_str().ok()?.strip_prefix("bytes ")?;
    range.split('-').next()?.parse().ok()
}

pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get("retry-after")?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_goes_to_the_hub_alone() {
        assert!(same_host("https://hub.example/a/b", "https://HUB.example"));
        for other in ["https://cdn.example/a", "http://hub.example/a", "https://hub.example:444/", "junk"] {
            assert!(!same_host(other, "https://hub.example"), "{other}");
        }
        // What stands before an @ is a user's name, and the host is another.
        assert!(!same_host("https://hub.example@evil.example/", "https://hub.example"));
    }

    #[test]
    fn redirects_stay_on_the_web_and_encrypted() {
        let to = |target: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("location", target.parse().unwrap());
            redirect("https://hub.example/a/b", &headers)
        };
        assert_eq!(to("/c").unwrap(), "https://hub.example/c");
        assert_eq!(to("https://cdn.example/x?sig=1").unwrap(), "https://cdn.example/x?sig=1");
        for bad in ["http://hub.example/c", "file:///etc/passwd", "//evil/x", "c"] {
            assert!(to(bad).is_err(), "{bad}");
        }
        let error = to("http://x/y?secret").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
