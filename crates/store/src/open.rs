use std::path::Path;
use std::sync::Arc;

use crate::{Error, Local, Ram, Result, S3, S3Options, Store};

/// Opens the store at an address: `mem:`, a path, `file:PATH`, or `s3://BUCKET/PREFIX` (with default [`S3Options`],
/// which hold no credentials; see [`open_with`]).
pub fn open(url: &str) -> Result<Arc<dyn Store>> {
    open_with(url, &S3Options::default())
}

/// [`open`] with what an `s3://` address needs; the other kinds do not look at it.
pub fn open_with(url: &str, s3: &S3Options) -> Result<Arc<dyn Store>> {
    let refuse = |reason: &str| Err(Error::Address { url: url.to_string(), reason: reason.to_string() });
    if url.starts_with("s3://") {
        return Ok(Arc::new(S3::open(url, s3)?));
    }
    if url == "mem:" {
        return Ok(Arc::new(Ram::new()));
    }
    if let Some((scheme, _)) = url.split_once("://")
        && scheme != "file"
    {
        return refuse("only mem:, file: and s3:// (or a plain path) are known");
    }
    // `file:///a` and `file:/a` are the same place.
    let path = match url.strip_prefix("file:") {
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None => url,
    };
    if path.is_empty() {
        return refuse("the path is empty");
    }
    Ok(Arc::new(Local::open(Path::new(path))?))
}
