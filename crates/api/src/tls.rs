//! TLS: what this server shows its clients, and whom the gateway believes that it is a replica.
//!
//! Files are read again when they change: certificates live for weeks, servers for longer. What cannot be used then is told,
//! and the one before stays.

mod validity;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use self::validity::Validity;

/// How often files are compared with what was read.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The first byte of a client that speaks TLS: a handshake record (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;
/// What a client is told that does not.
const PLAIN: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 39\r\n\
    connection: close\r\n\r\nThis port speaks TLS: ask at https://.\n";
/// As much of its request is read and forgotten, so that the answer arrives.
const PLAIN_BYTES_MAX: u64 = 64 << 10;

/// Why files cannot be used, by the flag that names them.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{flag}: cannot read {}", path.display())]
    Read {
        flag: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{flag}: {} holds no {what} in PEM", path.display())]
    Pem {
        flag: &'static str,
        path: PathBuf,
        what: &'static str,
        #[source]
        source: pem::Error,
    },
    #[error("--tls-cert: {}: its certificate {why}", path.display())]
    Date { path: PathBuf, why: String },
    #[error("--tls-key: {} does not fit the certificate of --tls-cert", key.display())]
    Key {
        key: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("{flag}: {} cannot be used", path.display())]
    Unusable {
        flag: &'static str,
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
}

/// What this server shows its clients. Clones share it.
#[derive(Clone)]
pub struct ServerTls(Arc<Shown>);

struct Shown {
    cert: PathBuf,
    key: PathBuf,
    config: RwLock<Arc<ServerConfig>>,
    /// What the files held when they were last looked at.
    seen: Mutex<[Vec<u8>; 2]>,
}

impl ServerTls {
    /// A certificate with those between it and its authority, and its key, in PEM.
    pub fn open(cert: &Path, key: &Path, now_unix_s: u64) -> Result<ServerTls, TlsError> {
        let (cert, key) = (cert.to_owned(), key.to_owned());
        let seen = read_both(&cert, &key)?;
        let config = RwLock::new(Arc::new(server_config(&cert, &key, &seen, now_unix_s)?));
        Ok(ServerTls(Arc::new(Shown { cert, key, config, seen: Mutex::new(seen) })))
    }

    /// Reads the files again if they have changed; whether they had.
    pub(crate) fn refresh(&self, now_unix_s: u64) -> Result<bool, TlsError> {
        let Shown { cert, key, config, seen } = &*self.0;
        let found = read_both(cert, key)?;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == found {
            return Ok(false);
        }
        // Told once, if it cannot be used: the second file may come a moment after the first.
        *seen = found;
        let fresh = Arc::new(server_config(cert, key, &seen, now_unix_s)?);
        *config.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(true)
    }

    /// The TLS side of a connection. A client that begins with something else is told so.
    pub(crate) async fn accept(&self, mut stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let mut first = [0];
        stream.peek(&mut first).await?;
        if first[0] != HANDSHAKE {
            stream.write_all(PLAIN).await?;
            stream.shutdown().await?;
            tokio::io::copy(&mut stream.take(PLAIN_BYTES_MAX), &mut tokio::io::sink()).await?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak TLS"));
        }
        let config = self.0.config.read().unwrap_or_else(PoisonError::into_inner).clone();
        TlsAcceptor::from(config).accept(stream).await
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { flag, path: path.to_owned(), source })
}

fn read_both(cert: &Path, key: &Path) -> Result<[Vec<u8>; 2], TlsError> {
    Ok([read("--tls-cert", cert)?, read("--tls-key", key)?])
}

fn certificates(
    flag: &'static str,
    path: &Path,
    bytes: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(bytes).collect();
    let found = found.and_then(|all| if all.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(all) });
    found.map_err(|source| TlsError::Pem { flag, path: path.to_owned(), what: "certificate", source })
}

fn server_config(
    cert: &Path,
    key: &Path,
    [cert_bytes, key_bytes]: &[Vec<u8>; 2],
    now_unix_s: u64,
) -> Result<ServerConfig, TlsError> {
    let chain = certificates("--tls-cert", cert, cert_bytes)?;
    let of_key = |source| TlsError::Pem { flag: "--tls-key", path: key.to_owned(), what: "key", source };
    let private = PrivateKeyDer::from_pem_slice(key_bytes).map_err(of_key)?;
    if let Some(why) = Validity::of(&chain[0]).and_then(|validity| validity.wrong_at(now_unix_s)) {
        return Err(TlsError::Date { path: cert.to_owned(), why });
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unusable = |source| TlsError::Unusable { flag: "--tls-cert", path: cert.to_owned(), source };
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, private);
    let mut config = config.map_err(|source| match source {
        rustls::Error::InconsistentKeys(_) => TlsError::Key { key: key.to_owned(), source },
        _ => unusable(source),
    })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Whom the gateway believes: the authorities of a file, or those that browsers know.
#[derive(Default)]
pub(crate) struct Trust {
    file: Option<(PathBuf, Vec<u8>)>,
}

impl Trust {
    pub(crate) fn open(ca: &Path) -> Result<Trust, TlsError> {
        Ok(Trust { file: Some((ca.to_owned(), read("--tls-ca", ca)?)) })
    }

    /// What the file holds now, if that is something else.
    pub(crate) fn changed(&self) -> Result<Option<Trust>, TlsError> {
        let Some((ca, seen)) = &self.file else { return Ok(None) };
        let now = Trust::open(ca)?;
        Ok(now.file.as_ref().is_some_and(|(_, bytes)| bytes != seen).then_some(now))
    }

    /// `http` over TLS where an address says so.
    pub(crate) fn connector(
        &self,
        mut http: HttpConnector,
    ) -> Result<HttpsConnector<HttpConnector>, TlsError> {
        http.enforce_http(false);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let path = || self.file.as_ref().map(|(path, _)| path.clone()).unwrap_or_default();
        let unusable = |source| TlsError::Unusable { flag: "--tls-ca", path: path(), source };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(self.roots()?)
            .with_no_client_auth();
        let builder = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1();
        Ok(builder.wrap_connector(http))
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        let Some((path, bytes)) = &self.file else {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
            return Ok(roots);
        };
        for authority in certificates("--tls-ca", path, bytes)? {
            let unusable = |source| TlsError::Unusable { flag: "--tls-ca", path: path.clone(), source };
            roots.add(authority).map_err(unusable)?;
        }
        Ok(roots)
    }
}
