//! The cluster seen and steered, and by whom.

use std::sync::Arc;
use std::time::Duration;

use api::{Call, CanaryAsk, JobAsk, Limits, NeedsAsk, NodeOrder, QuotaAsk, app};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::{Value, json};

use crate::client::{Answer, get, post, send};
use crate::fake::{OneCluster, state};

fn server() -> (Router, Arc<OneCluster>) {
    let cluster = Arc::new(OneCluster::default());
    let mut state = state(Limits::default(), Duration::ZERO);
    state.cluster = cluster.clone();
    (app(state), cluster)
}

async fn with_key(app: &Router, key: &str, method: &str, path: &str, body: Option<Value>) -> Answer {
    let request = Request::builder().method(method).uri(path);
    let request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    let request = match body {
        Some(body) => {
            request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body.to_string()))
        }
        None => request.body(Body::empty()),
    };
    send(app, request.unwrap()).await
}

#[tokio::test]
async fn each_route_asks_the_control_plane_for_what_it_says() {
    let (app, cluster) = server();
    let check = async |method: &str, path: &str, body: Option<Value>, expected: Call| {
        let answer = with_key(&app, crate::fake::KEY, method, path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{method} {path}: {}", answer.json());
        assert_eq!(cluster.0.lock().unwrap().pop(), Some(expected), "{method} {path}");
    };
    let job = JobAsk {
        name: "a".to_owned(),
        args: vec!["train".to_owned()],
        max_restarts: 0,
        needs: NeedsAsk { cores: 2, ranks: 4, ..NeedsAsk::default() },
        priority: -3,
        project: Some("p".to_owned()),
    };
    let ask = json!({"name": "a", "args": ["train"], "needs": {"cores": 2, "ranks": 4}, "priority": -3, "project": "p"});
    check("POST", "/v1/jobs", Some(ask), Call::SubmitJob(job)).await;
    check("GET", "/v1/jobs", None, Call::Jobs).await;
    check("GET", "/v1/jobs/job-1", None, Call::Job("job-1".to_owned())).await;
    check("POST", "/v1/jobs/job-1/cancel", None, Call::CancelJob("job-1".to_owned())).await;
    check("GET", "/v1/nodes", None, Call::Nodes).await;
    for (word, order) in [
        ("drain", NodeOrder::Drain),
        ("cordon", NodeOrder::Cordon),
        ("uncordon", NodeOrder::Uncordon),
        ("forget", NodeOrder::Forget),
    ] {
        let expected = Call::SetNode { name: "n1".to_owned(), order };
        check("POST", &format!("/v1/nodes/n1/{word}"), None, expected).await;
    }
    check("GET", "/v1/deployments", None, Call::Deployments).await;
    check("GET", "/v1/deployments/m", None, Call::Deployment("m".to_owned())).await;
    let ask = api::DeployAsk { replicas: Some(3), ..api::DeployAsk::default() };
    let expected = Call::Deploy { model: "a/m".to_owned(), ask };
    check("POST", "/v1/deployments/a%2Fm", Some(json!({"replicas": 3})), expected).await;
    let ask = CanaryAsk { source: "m2".to_owned(), percent: 10 };
    let expected = Call::Canary { model: "m".to_owned(), ask };
    check("POST", "/v1/deployments/m/canary", Some(json!({"source": "m2", "percent": 10})), expected).await;
    for (word, promote) in [("promote", true), ("rollback", false)] {
        let expected = Call::EndTrial { model: "m".to_owned(), promote };
        check("POST", &format!("/v1/deployments/m/{word}"), None, expected).await;
    }
    check("GET", "/v1/projects", None, Call::Projects).await;
    check("GET", "/v1/promotions", None, Call::Promotions).await;
    let expected =
        Call::SetProject { name: "p".to_owned(), quota: QuotaAsk { cores: Some(4), ..QuotaAsk::default() } };
    check("POST", "/v1/projects/p", Some(json!({"cores": 4})), expected).await;
    check("DELETE", "/v1/projects/p", None, Call::DeleteProject("p".to_owned())).await;
}

#[tokio::test]
async fn a_key_may_do_what_its_role_allows_and_is_told_what_it_takes() {
    let (app, cluster) = server();
    let check = async |key: &str, method: &str, path: &str, takes: Option<&str>| {
        let body = (method == "POST" && path == "/v1/jobs").then(|| json!({"name": "a", "args": []}));
        let before = cluster.0.lock().unwrap().len();
        let answer = with_key(&app, key, method, path, body).await;
        match takes {
            None => assert_eq!(answer.status, StatusCode::OK, "{key} {method} {path}"),
            Some(role) => {
                assert_eq!(answer.status, StatusCode::FORBIDDEN, "{key} {method} {path}");
                let error = &answer.json()["error"];
                assert_eq!(error["code"], "insufficient_role");
                let message = error["message"].as_str().unwrap();
                assert!(message.contains(&format!("takes the role `{role}`")), "{message}");
                assert_eq!(cluster.0.lock().unwrap().len(), before, "it was done nevertheless");
            }
        }
    };
    for path in
        ["/v1/jobs", "/v1/nodes", "/v1/deployments", "/v1/projects", "/v1/promotions", "/v1/jobs/job-1/logs"]
    {
        check("sk-use", "GET", path, Some("member")).await;
        check("sk-member", "GET", path, None).await;
    }
    check("sk-use", "POST", "/v1/jobs/job-1/cancel", Some("member")).await;
    check("sk-member", "POST", "/v1/jobs/job-1/cancel", None).await;
    for (method, path) in [
        ("POST", "/v1/nodes/n1/drain"),
        ("POST", "/v1/jobs"),
        ("POST", "/v1/deployments/m/promote"),
        ("DELETE", "/v1/projects/p"),
    ] {
        check("sk-use", method, path, Some("admin")).await;
        check("sk-member", method, path, Some("admin")).await;
        check(crate::fake::KEY, method, path, None).await;
    }
    check("sk-use", "GET", "/v1/models", None).await;
    let drain = with_key(&app, "sk-use", "POST", "/v1/nodes/n1/drain", None).await;
    let message = drain.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("may not drain a node") && message.contains("`use`"), "{message}");
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let (app, _) = server();
    let check = async |path: &str, body: Value, status: StatusCode, param: Value, words: &str| {
        let answer = post(&app, path, body).await;
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["param"]), (status, &param), "{path}: {error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    };
    use StatusCode as S;
    let big = json!({"name": "a", "args": [], "needs": {"cores": 64}});
    check("/v1/jobs", big, S::BAD_REQUEST, json!("needs.cores"), "With cores 8 it would fit").await;
    check("/v1/jobs", json!({"args": []}), S::BAD_REQUEST, json!("name"), "missing field").await;
    let typo = json!({"name": "a", "args": [], "prioritty": 1});
    check("/v1/jobs", typo, S::BAD_REQUEST, json!("prioritty"), "unknown field").await;
    let wrong = json!({"cores": "many"});
    check("/v1/projects/p", wrong, S::BAD_REQUEST, json!("cores"), "invalid type").await;
    check("/v1/jobs/job-9/cancel", json!({}), S::NOT_FOUND, Value::Null, "no job `job-9`").await;
    check("/v1/jobs/job-1/explode", json!({}), S::NOT_FOUND, Value::Null, "explode").await;
    check("/v1/nodes/n1/explode", json!({}), S::NOT_FOUND, Value::Null, "explode").await;
    check("/v1/jobs/job-1/retry", json!({}), S::CONFLICT, Value::Null, "Job-1 is running").await;
    let failed = with_key(&app, crate::fake::KEY, "DELETE", "/v1/deployments/m", None).await;
    assert_eq!(failed.status, S::INTERNAL_SERVER_ERROR);
    assert!(!failed.json().to_string().contains("secret detail"));
    assert_eq!(get(&app, "/v1/jobs/job-1/logs?follow=maybe").await.status, S::BAD_REQUEST);
}

#[tokio::test]
async fn a_log_is_followed_to_its_end_line_by_line_and_taken_up_where_it_broke_off() {
    let (app, _) = server();
    let text = "one\ntwo\nthr\u{e9}\u{e9}\n";
    let answer = get(&app, "/v1/jobs/job-1/logs?follow=true").await;
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    let body = String::from_utf8(answer.body.to_vec()).unwrap();
    let events: Vec<&str> = body.split("\n\n").filter(|event| !event.is_empty()).collect();
    assert_eq!(events.last(), Some(&"data: [DONE]"));
    let mut said = String::new();
    let mut ids = Vec::new();
    for event in &events[..events.len() - 1] {
        let (id, data) = event.split_once('\n').unwrap();
        ids.push(id.strip_prefix("id: ").unwrap().to_owned());
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        let piece = data["text"].as_str().unwrap().to_owned();
        assert!(piece.ends_with('\n') && !piece.contains('\u{fffd}'), "{piece:?}");
        said += &piece;
    }
    assert_eq!(said, text);
    assert!(ids.len() > 1, "it came in one piece: {body}");
    // A client that was cut off after the first event goes on behind it.
    let request = crate::client::authorized("/v1/jobs/job-1/logs?follow=true");
    let request = request.header("last-event-id", &ids[0]).body(Body::empty()).unwrap();
    let again = String::from_utf8(send(&app, request).await.body.to_vec()).unwrap();
    assert!(!again.contains("one") && again.contains("two"), "{again}");
}
