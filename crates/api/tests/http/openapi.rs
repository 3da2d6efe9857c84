//! The description of the API says what the router does, and all of it.

use std::collections::BTreeSet;
use std::time::Duration;

use api::{Limits, app};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use serde_json::Value;

use crate::client::send;
use crate::fake::state;

#[tokio::test]
async fn what_is_described_is_there_and_nothing_else() {
    let app = app(state(Limits::default(), Duration::ZERO));
    let ask = async |method: Method, path: &str| {
        send(&app, Request::builder().method(method).uri(path).body(Body::empty()).unwrap()).await
    };
    // Without a key: it is no secret.
    let described = ask(Method::GET, "/openapi.json").await;
    assert_eq!(described.status, StatusCode::OK);
    let described = described.json();
    assert_eq!(described["openapi"], "3.1.0");
    let paths = described["paths"].as_object().unwrap();
    for (path, operations) in paths {
        let example = path.replace(['{', '}'], "");
        for method in [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
            let operation = operations.get(method.as_str().to_lowercase());
            let answer = ask(method.clone(), &example).await;
            let is_there = answer.status != StatusCode::METHOD_NOT_ALLOWED;
            assert_eq!(is_there, operation.is_some(), "{method} {path}: {}", answer.status);
            let Some(operation) = operation else { continue };
            // Who needs no key is answered, who needs one is told so.
            let needs_key = operation["security"] != Value::Array(Vec::new());
            assert_eq!(
                answer.status == StatusCode::UNAUTHORIZED,
                needs_key,
                "{method} {path}: {}",
                answer.status
            );
            let named = operation["parameters"].as_array().unwrap().len();
            assert_eq!(named, path.matches('{').count(), "{method} {path}");
        }
    }
    // And every route of the table is among them.
    let table = include_str!("../../src/routes.rs");
    let pieces = table.split(".route(").skip(1).filter_map(|piece| piece.trim_start().strip_prefix('"'));
    let routes: BTreeSet<String> =
        pieces.map(|piece| piece.split('"').next().unwrap().replace('*', "")).collect();
    assert!(routes.len() > 30, "{routes:?}");
    assert_eq!(routes, paths.keys().cloned().collect::<BTreeSet<_>>());
}
