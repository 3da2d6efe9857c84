use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use store::{Bundle, BundleWriter, Error, S3Options, Store, open_with};

use crate::suite::{self, name};
use crate::weed::{ACCESS_KEY, Weed};

/// One server for all that needs it: starting it takes longer than using it.
#[test]
fn s3_keeps_the_contract() {
    let Some(weed) = Weed::start() else { return };
    let options = weed.options();
    let store = open_with("s3://bucket/some/prefix", &options).unwrap();
    suite::store_suite(&store);
    prefixes_are_apart(&options);
    bundles_work(&store);
    a_wrong_key_is_refused(&options);
    let place = |prefix: &str| open_with(&format!("s3://bucket/{prefix}"), &options).unwrap();
    crate::backup::there_and_back(&place("from"), &place("backup"), &place("target"));
}

fn prefixes_are_apart(options: &S3Options) {
    let one = open_with("s3://bucket/one", options).unwrap();
    let one_more = open_with("s3://bucket/one-more/", options).unwrap();
    let whole = open_with("s3://bucket", options).unwrap();
    one.put(&name("x"), b"1").unwrap();
    one_more.put(&name("x"), b"2").unwrap();
    assert_eq!(one.get(&name("x")).unwrap(), b"1");
    assert_eq!(one.list("").unwrap().len(), 1, "the probe, or another prefix, is listed: {:?}", one.list(""));
    assert_eq!(whole.get(&name("one-more/x")).unwrap(), b"2");
    assert_eq!(one.url(), "s3://bucket/one/");
}

fn bundles_work(store: &Arc<dyn Store>) {
    let mut writer = BundleWriter::new(store, "models/x").unwrap();
    writer.add("a.bin", b"first").unwrap();
    writer.publish("test", serde_json::json!({})).unwrap();
    let bundle = Bundle::open(store, "models/x").unwrap().unwrap();
    assert_eq!(bundle.read("a.bin").unwrap(), b"first");
    assert!(Bundle::open(store, "models/y").unwrap().is_none());
}

fn a_wrong_key_is_refused(options: &S3Options) {
    let secret_key = "not-the-key".to_string();
    let error = open_with("s3://bucket/x", &S3Options { secret_key, ..options.clone() }).unwrap_err();
    assert!(matches!(error, Error::Open { .. }) && error.to_string().contains("s3://bucket/x"), "{error}");
    let text = format!("{error:?}");
    assert!(!text.contains("not-the-key"), "the error shows the key: {text}");
    assert!(text.contains("SignatureDoesNotMatch") || text.contains("403"), "the reason is lost: {text}");
}

/// A server that takes every write, as some do: `open` must find out.
#[test]
fn a_bucket_that_ignores_put_if_absent_is_refused() {
    let error = open_with("s3://bucket/x", &answering("200 OK", "")).unwrap_err();
    assert!(matches!(error, Error::NoPutIfAbsent { .. }), "{error:?}");
    assert!(error.to_string().contains("s3://bucket/x/ ignores put-if-absent"), "{error}");
}

#[test]
fn a_server_that_refuses_is_quoted() {
    let body = "<Error><Code>NoSuchBucket</Code></Error>";
    let error = open_with("s3://bucket/x", &answering("404 Not Found", body)).unwrap_err();
    let Error::Open { source, .. } = &error else { panic!("{error:?}") };
    assert!(format!("{source:?}").contains("NoSuchBucket"), "{source:?}");
}

/// TLS has a provider (a missing one panics), and a server that does not speak it is an error.
#[test]
fn https_works_without_a_provider_of_the_program() {
    let options = answering("200 OK", "");
    let endpoint = options.endpoint.replace("http://", "https://");
    let error = open_with("s3://bucket/x", &S3Options { endpoint, ..options }).unwrap_err();
    assert!(matches!(error, Error::Open { .. }), "{error:?}");
}

/// An S3 server that gives one answer to everything, until the test process ends.
fn answering(status: &'static str, body: &'static str) -> S3Options {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let mut request = [0; 4096];
            if stream.read(&mut request).is_ok() {
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\nETag: \"e\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
                // A client that hung up has its answer.
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    S3Options {
        endpoint,
        access_key: ACCESS_KEY.to_string(),
        secret_key: "any".to_string(),
        allow_http: true,
        ..S3Options::default()
    }
}
