use std::fmt;
use std::future::Future;
use std::io::Read;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path as Key;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt,
    PutMode, PutPayload, RetryConfig,
};

use crate::contract::{check_put_if_absent_bytes, check_range, parse_prefix};
use crate::{Error, LIST_MAX, ObjectMeta, ObjectName, Put, Result, Store};

/// One request carries at most this much, both ways: it bounds memory, and how much a retry repeats.
const PART_BYTES: u64 = 16 << 20;
/// Parts of one object that travel at once. 4 * 16 MiB = 64 MiB of memory for a transfer.
const PARTS_IN_FLIGHT: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one request with its body: 16 MiB in 60 s is 280 kB/s, below which a link is as good as cut.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
const RETRIES_MAX: usize = 5;
const RETRY_TIMEOUT: Duration = Duration::from_secs(120);
/// What the put-if-absent probe writes. It begins with a dot, so it is no object.
const PROBE: &str = ".loquat-probe";

/// What an S3 address does not say.
#[derive(Clone, Default)]
pub struct S3Options {
    /// `https://host:port`; empty means AWS itself.
    pub endpoint: String,
    /// Empty means `us-east-1`, which servers that have no regions expect.
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
    /// Of temporary credentials; else empty.
    pub session_token: String,
    /// Allows an endpoint that begins with `http://`: requests are still signed, but anyone between can read them.
    pub allow_http: bool,
}

impl fmt::Debug for S3Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let S3Options { endpoint, region, access_key, allow_http, .. } = self;
        write!(f, "S3Options {{ endpoint: {endpoint:?}, region: {region:?}, access_key: {access_key:?}, ")?;
        write!(f, "secret_key: hidden, allow_http: {allow_http} }}")
    }
}

/// Objects in an S3 bucket below a prefix.
///
/// Runs its requests on threads of its own, so it may be called from anywhere that may block.
pub struct S3 {
    client: Arc<AmazonS3>,
    /// Empty, or ends with a slash.
    prefix: String,
    url: String,
    /// `Some` until dropped.
    runtime: Option<tokio::runtime::Runtime>,
}

impl S3 {
    /// Opens `s3://BUCKET/PREFIX` and makes sure that the bucket honours put-if-absent, by writing a probe twice.
    pub fn open(url: &str, options: &S3Options) -> Result<S3> {
        let (bucket, prefix) = parse_url(url)?;
        check_options(url, options)?;
        // Fails where a provider is installed already, and then that one serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = format!("s3://{bucket}/{prefix}");
        let open_error = |source| Error::Open { store: store.clone(), source };
        let client = client(&bucket, options).map_err(|error| open_error(error.into()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("store-s3")
            .enable_all()
            .build()
            .map_err(|error| open_error(error.into()))?;
        let s3 = S3 { client: Arc::new(client), prefix, url: store.clone(), runtime: Some(runtime) };
        s3.probe()?;
        Ok(s3)
    }

    /// A bucket that ignores `If-None-Match` takes the second write, and would let two writers both win.
    fn probe(&self) -> Result<()> {
        let key = Key::from(format!("{}{PROBE}", self.prefix));
        for _ in 0..2 {
            let client = self.client.clone();
            let key = key.clone();
            let put = self.wait(async move { put_create(&client, &key, Bytes::from_static(b"probe")).await });
            match put {
                Ok(Put::Exists) => return Ok(()),
                Ok(Put::Created) => {}
                Err(error) => return Err(Error::Open { store: self.url(), source: error.into() }),
            }
        }
        Err(Error::NoPutIfAbsent { store: self.url() })
    }

    /// Runs a future on the inner runtime and blocks this thread for it. (Not `Runtime::block_on`, which panics when
    /// called on a thread of an async runtime.)
    fn wait<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T, object_store::Error>> + Send + 'static,
    ) -> Result<T, object_store::Error> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let runtime = self.runtime.as_ref().expect("the runtime lives until drop");
        runtime.spawn(async move {
            // The receiver waits below; it cannot be gone.
            let _ = sender.send(future.await);
        });
        receiver.recv().unwrap_or_else(|_| {
            Err(object_store::Error::Generic { store: "S3", source: "the request was dropped".into() })
        })
    }

    fn key(&self, name: &ObjectName) -> Key {
        Key::from(format!("{}{name}", self.prefix))
    }

    fn fail(&self, operation: &'static str, name: &ObjectName, error: object_store::Error) -> Error {
        let (name, store) = (name.clone(), self.url());
        match error {
            object_store::Error::NotFound { .. } => Error::NotFound { name, store },
            error => Error::Object { operation, name, store, source: error.into() },
        }
    }

    fn put_whole(&self, name: &ObjectName, bytes: Vec<u8>) -> Result<()> {
        let (client, key) = (self.client.clone(), self.key(name));
        let put = async move { client.put(&key, PutPayload::from(bytes)).await };
        self.wait(put).map(|_| ()).map_err(|error| self.fail("put", name, error))
    }

    /// Sends `reader` in parts, a few in flight; on any error the upload is aborted and nothing is visible.
    fn put_parts(&self, name: &ObjectName, reader: &mut dyn Read, bytes: u64) -> Result<()> {
        let (client, key) = (self.client.clone(), self.key(name));
        let begin = async move { client.put_multipart(&key).await };
        let mut upload = self.wait(begin).map_err(|error| self.fail("put", name, error))?;
        let sent = self.send_parts(name, reader, bytes, upload.as_mut());
        let end = async move {
            match sent {
                Ok(()) => upload.complete().await.map(|_| Ok(())),
                // The caller hears why it was aborted. Parts that an abort cannot remove are never visible.
                Err(error) => {
                    let _ = upload.abort().await;
                    Ok(Err(error))
                }
            }
        };
        self.wait(end).map_err(|error| self.fail("put", name, error))?
    }

    fn send_parts(
        &self,
        name: &ObjectName,
        reader: &mut dyn Read,
        bytes: u64,
        upload: &mut dyn MultipartUpload,
    ) -> Result<()> {
        let mut sent_bytes = 0;
        while sent_bytes < bytes {
            let mut window = Vec::new();
            while sent_bytes < bytes && window.len() < PARTS_IN_FLIGHT {
                let part_bytes = PART_BYTES.min(bytes - sent_bytes);
                let part = self.read_part(name, reader, part_bytes)?;
                sent_bytes += part.len() as u64;
                if (part.len() as u64) < part_bytes {
                    return Err(Error::SourceLength { name: name.clone(), expected: bytes, got: sent_bytes });
                }
                window.push(upload.put_part(PutPayload::from(part)));
            }
            let parts = async move { futures::future::try_join_all(window).await };
            self.wait(parts).map_err(|error| self.fail("put", name, error))?;
        }
        match self.read_part(name, reader, 1)?.len() as u64 {
            0 => Ok(()),
            more => Err(Error::SourceLength { name: name.clone(), expected: bytes, got: bytes + more }),
        }
    }

    /// At most `bytes_max` bytes of the source; fewer at its end.
    fn read_part(&self, name: &ObjectName, reader: &mut dyn Read, bytes_max: u64) -> Result<Vec<u8>> {
        let mut part = Vec::with_capacity(bytes_max as usize);
        match reader.take(bytes_max).read_to_end(&mut part) {
            Ok(_) => Ok(part),
            Err(error) => {
                let (name, store) = (name.clone(), self.url());
                Err(Error::Object { operation: "put", name, store, source: error.into() })
            }
        }
    }
}

impl Store for S3 {
    fn put(&self, name: &ObjectName, mut bytes: &[u8]) -> Result<()> {
        let n_bytes = bytes.len() as u64;
        self.put_reader(name, &mut bytes, n_bytes)
    }

    fn put_reader(&self, name: &ObjectName, reader: &mut dyn Read, bytes: u64) -> Result<()> {
        if bytes > PART_BYTES {
            return self.put_parts(name, reader, bytes);
        }
        let all = self.read_part(name, reader, bytes + 1)?;
        if all.len() as u64 != bytes {
            return Err(Error::SourceLength { name: name.clone(), expected: bytes, got: all.len() as u64 });
        }
        self.put_whole(name, all)
    }

    fn put_if_absent(&self, name: &ObjectName, bytes: &[u8]) -> Result<Put> {
        check_put_if_absent_bytes(name, bytes)?;
        let (client, key, bytes) = (self.client.clone(), self.key(name), Bytes::copy_from_slice(bytes));
        let put = async move { put_create(&client, &key, bytes).await };
        self.wait(put).map_err(|error| self.fail("put", name, error))
    }

    fn get(&self, name: &ObjectName) -> Result<Vec<u8>> {
        let (client, key) = (self.client.clone(), self.key(name));
        let get = async move {
            let found = client.get(&key).await?;
            let (n_bytes, etag) = (found.meta.size, found.meta.e_tag.clone());
            if n_bytes <= PART_BYTES {
                return Ok(found.bytes().await?.to_vec());
            }
            drop(found);
            get_parts(&client, &key, 0..n_bytes, etag).await
        };
        self.wait(get).map_err(|error| self.fail("get", name, error))
    }

    fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let (client, key) = (self.client.clone(), self.key(name));
        let head = async move { client.head(&key).await };
        let meta = self.wait(head).map_err(|error| self.fail("get", name, error))?;
        check_range(self, name, &range, meta.size)?;
        let (client, key) = (self.client.clone(), self.key(name));
        let get = async move { get_parts(&client, &key, range, meta.e_tag).await };
        self.wait(get).map_err(|error| self.fail("get", name, error))
    }

    fn head(&self, name: &ObjectName) -> Result<Option<ObjectMeta>> {
        let (client, key) = (self.client.clone(), self.key(name));
        match self.wait(async move { client.head(&key).await }) {
            Ok(meta) => Ok(Some(ObjectMeta { name: name.clone(), bytes: meta.size })),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.fail("head", name, error)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        let under = parse_prefix(prefix)?;
        let key =
            Key::from(under.map_or_else(|| self.prefix.clone(), |under| format!("{}{under}", self.prefix)));
        let client = self.client.clone();
        // One more than allowed, so that a list that is too long is seen and not cut.
        let list = async move { client.list(Some(&key)).take(LIST_MAX + 1).try_collect::<Vec<_>>().await };
        let metas = self.wait(list).map_err(|error| Error::List {
            prefix: prefix.to_string(),
            store: self.url(),
            source: error.into(),
        })?;
        if metas.len() > LIST_MAX {
            return Err(Error::ListTooLong { prefix: prefix.to_string(), store: self.url(), max: LIST_MAX });
        }
        let object = |meta: object_store::ObjectMeta| {
            let name = meta.location.as_ref().strip_prefix(&self.prefix)?;
            ObjectName::parse(name).ok().map(|name| ObjectMeta { name, bytes: meta.size })
        };
        let mut found: Vec<_> = metas.into_iter().filter_map(object).collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        let (client, key) = (self.client.clone(), self.key(name));
        match self.wait(async move { client.delete(&key).await }) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.fail("delete", name, error)),
        }
    }

    fn url(&self) -> String {
        self.url.clone()
    }
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3({})", self.url)
    }
}

impl Drop for S3 {
    /// A runtime must not be dropped on a thread of another one, as an `Arc<dyn Store>` in async code may be.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn put_create(client: &AmazonS3, key: &Key, bytes: Bytes) -> Result<Put, object_store::Error> {
    match client.put_opts(key, PutPayload::from_bytes(bytes), PutMode::Create.into()).await {
        Ok(_) => Ok(Put::Created),
        Err(object_store::Error::AlreadyExists { .. }) => Ok(Put::Exists),
        Err(error) => Err(error),
    }
}

/// A range in parts, a few in flight, all of one version of the object.
async fn get_parts(
    client: &AmazonS3,
    key: &Key,
    range: Range<u64>,
    etag: Option<String>,
) -> Result<Vec<u8>, object_store::Error> {
    let n_bytes = range.end - range.start;
    let starts = (range.start..range.end).step_by(PART_BYTES as usize);
    let parts = starts.map(|start| {
        let part = start..range.end.min(start + PART_BYTES);
        let options = GetOptions {
            range: Some(GetRange::Bounded(part)),
            if_match: etag.clone(),
            ..GetOptions::default()
        };
        async move { client.get_opts(key, options).await?.bytes().await }
    });
    let mut parts = futures::stream::iter(parts).buffered(PARTS_IN_FLIGHT);
    let mut all = Vec::with_capacity(usize::try_from(n_bytes).unwrap_or(0));
    while let Some(part) = parts.try_next().await? {
        all.extend_from_slice(&part);
    }
    if all.len() as u64 != n_bytes {
        let source = format!("{} bytes came of {n_bytes}", all.len()).into();
        return Err(object_store::Error::Generic { store: "S3", source });
    }
    Ok(all)
}

/// Bucket and prefix of `s3://BUCKET/PREFIX`; the prefix is empty or ends with a slash.
fn parse_url(url: &str) -> Result<(String, String)> {
    let refuse = |reason: String| Error::Address { url: url.to_string(), reason };
    let rest = url.strip_prefix("s3://").unwrap_or(url);
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(allowed) {
        return Err(refuse("a bucket has 3 to 63 characters of a-z, 0-9, '-' and '.'".to_string()));
    }
    match prefix.trim_end_matches('/') {
        "" => Ok((bucket.to_string(), String::new())),
        prefix => match ObjectName::parse(prefix) {
            Ok(prefix) => Ok((bucket.to_string(), format!("{prefix}/"))),
            Err(error) => Err(refuse(error.to_string())),
        },
    }
}

fn check_options(url: &str, options: &S3Options) -> Result<()> {
    let refuse = |reason: String| Err(Error::Address { url: url.to_string(), reason });
    if options.access_key.is_empty() || options.secret_key.is_empty() {
        return refuse("it needs an access key and a secret key".to_string());
    }
    let endpoint = &options.endpoint;
    if endpoint.starts_with("http://") && !options.allow_http {
        return refuse(format!("its endpoint {endpoint} is plain http, which has to be allowed explicitly"));
    }
    if !endpoint.is_empty() && !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
        return refuse(format!("its endpoint {endpoint:?} does not begin with http:// or https://"));
    }
    Ok(())
}

fn client(bucket: &str, options: &S3Options) -> Result<AmazonS3, object_store::Error> {
    let client_options = ClientOptions::new()
        .with_allow_http(options.allow_http)
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(REQUEST_TIMEOUT);
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(5),
        base: 2.0,
    };
    let retry = RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_TIMEOUT };
    let region = if options.region.is_empty() { "us-east-1" } else { &options.region };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(region)
        .with_access_key_id(&options.access_key)
        .with_secret_access_key(&options.secret_key)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_client_options(client_options)
        .with_retry(retry);
    if !options.endpoint.is_empty() {
        builder = builder.with_endpoint(&options.endpoint);
    }
    if !options.session_token.is_empty() {
        builder = builder.with_token(&options.session_token);
    }
    builder.build()
}
