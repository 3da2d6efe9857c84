//! Real handshakes: the right authority and the wrong one, files that cannot be used, clients that speak no TLS, and
//! certificates that are replaced while the server runs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::{AppState, Limits, ServerTls, Target, TargetKey, serve, serve_tls};
use gateway::Endpoint;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::fake::{self, KEY};

/// 2030-01-01. Certificates here are valid from 2020 to 2040 where nothing else is said.
const NOW: u64 = 1_893_456_000;

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for these names and its key.
    fn sign(&self, name: &str, [from, until]: [i32; 2]) -> [String; 2] {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
        let key = KeyPair::generate().unwrap();
        [params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem()]
    }

    fn signed(&self) -> [String; 2] {
        self.sign("127.0.0.1", [2020, 2040])
    }
}

/// The files that flags name.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new([cert, key]: &[String; 2]) -> Files {
        let files = Files { dir: tempfile::tempdir().unwrap() };
        files.write("cert", cert);
        files.write("key", key);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    fn open(&self) -> Result<ServerTls, String> {
        let opened = ServerTls::open(&self.path("cert"), &self.path("key"), NOW);
        opened.map_err(|error| error.to_string())
    }
}

fn refused(files: &Files, words: &[&str]) {
    let error = files.open().err().expect("it was taken");
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    let good = authority.signed();
    let files = Files::new(&good);
    files.open().unwrap();
    files.write("key", &authority.signed()[1]);
    refused(&files, &["--tls-key", "key does not fit the certificate"]);
    files.write("key", &good[0]);
    refused(&files, &["--tls-key", "holds no key in PEM"]);
    std::fs::remove_file(files.path("key")).unwrap();
    refused(&files, &["--tls-key: cannot read", "key"]);
    for (cert, word) in [("", "holds no certificate"), (&good[1][..], "holds no certificate")] {
        let files = Files::new(&[cert.to_owned(), good[1].clone()]);
        refused(&files, &["--tls-cert", word]);
    }
    let late = Files::new(&authority.sign("127.0.0.1", [2010, 2029]));
    refused(&late, &["--tls-cert", "expired 365 days ago"]);
    let early = Files::new(&authority.sign("127.0.0.1", [2031, 2040]));
    refused(&early, &["--tls-cert", "is valid only 365 days from now"]);
    let torn = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
    refused(&Files::new(&[torn, good[1].clone()]), &["--tls-cert", "cannot be used"]);

    let state = fake::state(Limits::default(), Duration::ZERO);
    for (text, word) in
        [(None, "cannot read"), (Some(""), "holds no certificate"), (Some(&good[1][..]), "holds no")]
    {
        let _ = std::fs::remove_file(files.path("ca"));
        text.into_iter().for_each(|text| drop(files.write("ca", text)));
        let error = state.replicas.trust(&files.path("ca")).unwrap_err().to_string();
        assert!(error.contains("--tls-ca") && error.contains(word), "{error}");
    }
}

/// A server of the fake model that shows these files.
async fn start(files: &Files) -> (SocketAddr, AppState) {
    let mut state = fake::state(Limits::default(), Duration::ZERO);
    state.now_unix_s = || NOW;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Some(files.open().unwrap());
    tokio::spawn(serve_tls(listener, tls, state.clone(), std::future::pending()));
    (address, state)
}

async fn shake(address: SocketAddr, ca: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::from(address.ip());
    timeout(Duration::from_secs(10), TlsConnector::from(Arc::new(config)).connect(name, stream))
        .await
        .unwrap()
}

/// All that comes back for `bytes`, however it ends.
async fn converse(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    bytes: &[u8],
) -> String {
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.expect("it hangs");
    assert!(read.is_ok() || answer.is_empty(), "{read:?}");
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\r\n"
    )
    .into()
}

#[tokio::test]
async fn the_right_authority_passes_and_others_do_not() {
    let (authority, other) = (Authority::new(), Authority::new());
    let files = Files::new(&authority.signed());
    let (address, _) = start(&files).await;
    let answer = converse(shake(address, &authority.pem).await.unwrap(), &get("/v1/models")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let error = shake(address, &other.pem).await.unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
    // A certificate for somebody else.
    let elsewhere = Files::new(&authority.sign("elsewhere.example", [2020, 2040]));
    let (address, _) = start(&elsewhere).await;
    let error = shake(address, &authority.pem).await.unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
}

#[tokio::test]
async fn who_speaks_no_tls_is_told_so_and_noise_ends() {
    let authority = Authority::new();
    let (address, _) = start(&Files::new(&authority.signed())).await;
    let connect = async || TcpStream::connect(address).await.unwrap();
    let told = converse(connect().await, &get("/v1/models")).await;
    assert!(
        told.starts_with("HTTP/1.1 400") && told.ends_with("This port speaks TLS: ask at https://.\n"),
        "{told}"
    );
    // A handshake that is none: an alert (record 21), and the end.
    let told = converse(connect().await, &[[22, 3, 1, 255, 255].as_slice(), &[7; 100]].concat()).await;
    assert!(!told.contains("HTTP"), "{told}");
    let answer = converse(shake(address, &authority.pem).await.unwrap(), &get("/v1/models")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "others are served: {answer}");
}

#[tokio::test]
async fn a_new_certificate_is_shown_while_the_server_runs() {
    let authority = Authority::new();
    let files = Files::new(&authority.signed());
    let (address, _) = start(&files).await;
    let shown = async || {
        let stream = shake(address, &authority.pem).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let first = shown().await;
    // One that cannot be used changes nothing.
    files.write("cert", "");
    sleep(Duration::from_millis(2_500)).await;
    assert_eq!(shown().await, first);
    let [cert, key] = authority.signed();
    files.write("key", &key);
    files.write("cert", &cert);
    let deadline = Instant::now() + Duration::from_secs(15);
    while shown().await == first {
        assert!(Instant::now() < deadline, "the new one does not come");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_gateway_asks_replicas_over_tls_and_only_those_it_believes() {
    let (authority, other) = (Authority::new(), Authority::new());
    let files = Files::new(&authority.signed());
    let (address, _) = start(&files).await;

    let gateway = fake::state(Limits::default(), Duration::ZERO);
    gateway.replicas.trust(&files.write("ca", &other.pem)).unwrap();
    let endpoint = Endpoint { name: "r".to_owned(), version: "v1".to_owned(), draining: false };
    let key = TargetKey::Theirs(KEY.to_owned());
    let target = Target { endpoint, url: format!("https://{address}"), key };
    gateway.replicas.set("base", 7, vec![target], None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, gateway.clone(), std::future::pending()));
    let status = || gateway.replicas.status("base").unwrap().replicas[0].clone();

    sleep(Duration::from_secs(1)).await;
    assert!(!status().well, "whom another authority has signed is nobody: {:?}", status());
    files.write("ca", &authority.pem);
    let deadline = Instant::now() + Duration::from_secs(15);
    while !status().well {
        assert!(Instant::now() < deadline, "{:?}", status());
        sleep(Duration::from_millis(20)).await;
    }
    let body =
        r#"{"model":"base","messages":[{"role":"user","content":"hello"}],"stream":true,"max_tokens":8}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = converse(TcpStream::connect(front).await.unwrap(), request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("text/event-stream"), "{answer}");
    assert!(answer.contains("chat.completion.chunk") && answer.contains("data: [DONE]"), "{answer}");
    assert_eq!(status().n_answered, 1, "it came from the replica: {:?}", status());
}
