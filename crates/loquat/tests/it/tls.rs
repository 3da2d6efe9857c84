//! A gateway and its replica that both speak TLS, with a private authority.

use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::support::{Client, PATIENCE, Running, loquat, output, succeed};
use crate::tiny;

/// Writes an authority and what it has signed for 127.0.0.1.
fn certificates(dir: &Path) -> [String; 3] {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let own = KeyPair::generate().unwrap();
    let cert = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let cert = cert.signed_by(&own, &issuer).unwrap().pem();
    [("ca", ca), ("cert", cert), ("key", own.serialize_pem())].map(|(name, text)| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    })
}

fn agent(ca: &str) -> ureq::Agent {
    let ca = Certificate::from_pem(&std::fs::read(ca).unwrap()).unwrap();
    let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&[ca])).build();
    let config = ureq::Agent::config_builder().http_status_as_error(false).tls_config(tls);
    config.timeout_global(Some(PATIENCE)).build().into()
}

fn ask(agent: &ureq::Agent, client: &Client, path: &str, body: Option<&Value>) -> (u16, String) {
    let (url, bearer) = (format!("{}{path}", client.base), format!("Bearer {}", client.key));
    let answer = match body {
        None => agent.get(url).header("Authorization", bearer).call(),
        Some(body) => {
            let request = agent.post(url).header("Authorization", bearer);
            request.header("Content-Type", "application/json").send(body.to_string().as_bytes())
        }
    };
    let mut answer = answer.unwrap();
    (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
}

#[test]
fn a_chat_goes_over_tls_all_the_way_to_a_replica() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let [ca, cert, key] = certificates(dir.path());
    let model = tiny::directory(dir.path(), "one").display().to_string();
    let mut up = loquat(&home);
    up.args(["up", "--port", "0", "--kv-mib", "8", "--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &ca]);
    let mut gateway = Running::start(&mut up);
    let client = gateway.client();
    assert!(client.base.starts_with("https://127.0.0.1:"), "{}", client.base);
    let agent = agent(&ca);
    assert!(client.try_post("/v1/models", &json!({})).is_err(), "an authority of nobody's was believed");

    let flags = ["--", "--threads", "1", "--kv-mib", "8"];
    succeed(&home, &[&["deploy", "set", "m", "--source", &model, "--replicas", "1"], &flags[..]].concat());
    let deadline = Instant::now() + PATIENCE;
    let listed = loop {
        let listed = ask(&agent, &client, "/v1/replicas", None).1;
        if listed.contains("\"well\"") {
            break listed;
        }
        assert!(Instant::now() < deadline, "{listed}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(listed.contains("https://127.0.0.1:"), "{listed}");
    // The replica knows its gateways and nobody else, whatever they may do elsewhere.
    let base = listed.split('"').find(|text| text.starts_with("https://")).unwrap().to_owned();
    for key in [client.key.as_str(), "", "sk-loquat-wrong", "wrong.tenant"] {
        let stranger = Client { base: base.clone(), key: key.to_owned() };
        let (status, text) = ask(&agent, &stranger, "/v1/models", None);
        assert_eq!(status, 401, "{key}: {text}");
    }
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": true, "max_tokens": 8});
    let (status, text) = ask(&agent, &client, "/v1/chat/completions", Some(&chat));
    assert!(
        status == 200 && text.contains("chat.completion.chunk") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    assert_eq!(gateway.stop(), Some(0));
}

#[test]
fn files_that_cannot_be_used_are_refused_by_flag() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let [ca, cert, key] = certificates(dir.path());
    for (flags, words) in [
        (["--tls-cert", &cert, "--tls-key", &ca, "--tls-ca", &ca], "--tls-key"),
        (["--tls-cert", "nowhere", "--tls-key", &key, "--tls-ca", &ca], "--tls-cert: cannot read nowhere"),
        (["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &key], "--tls-ca"),
    ] {
        let refused = output(&home, &[&["up", "--port", "0"], &flags[..]].concat());
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains(words), "{flags:?}: {text}");
    }
    let refused = output(&home, &["up", "--port", "0", "--tls-cert", &cert]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--tls-key"));
}
