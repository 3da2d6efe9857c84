//! The HTTP side of the stand-in: routes, checks and answers of the API server.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::{NAMESPACE, Objects, Shared, TOKEN, life};

struct Request {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    content_type: String,
    authorization: String,
    body: Value,
}

/// Status and body.
type Answer = (u16, Body);

enum Body {
    Json(Value),
    Text(String),
}

pub(super) fn start(state: &Arc<Shared>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let state = state.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            std::thread::spawn(move || serve(&stream, &state));
        }
    });
    address
}

fn serve(stream: &TcpStream, state: &Shared) {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader) {
        let (status, body) = answer(&request, state);
        let (kind, text) = match body {
            Body::Json(json) => ("application/json", json.to_string()),
            Body::Text(text) => ("text/plain", text),
        };
        let head =
            format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", text.len());
        let mut stream = stream;
        if stream.write_all(format!("{head}{text}").as_bytes()).is_err() {
            return;
        }
    }
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut n_bytes, mut content_type, mut authorization) = (0, String::new(), String::new());
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "content-length" => n_bytes = value.parse().ok()?,
            "content-type" => content_type = value.to_owned(),
            "authorization" => authorization = value.to_owned(),
            "transfer-encoding" => panic!("the stand-in reads bodies of known length"),
            _ => {}
        }
    }
    let mut body = vec![0; n_bytes];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let pair = |pair: &str| pair.split_once('=').map(|(name, value)| (name.to_owned(), unescaped(value)));
    Some(Request {
        method,
        path: path.to_owned(),
        query: query.split('&').filter_map(pair).collect(),
        content_type,
        authorization,
        body: serde_json::from_slice(&body).unwrap_or_default(),
    })
}

fn unescaped(text: &str) -> String {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = rest {
        match first {
            b'%' => {
                let digits = std::str::from_utf8(&after[..2]).unwrap();
                out.push(u8::from_str_radix(digits, 16).unwrap());
                rest = &after[2..];
            }
            byte => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8(out).unwrap()
}

fn refusal(status: u16, message: &str) -> Answer {
    (status, Body::Json(json!({"kind": "Status", "status": "Failure", "code": status, "message": message})))
}

fn answer(request: &Request, state: &Shared) -> Answer {
    if state.down.load(Ordering::SeqCst) {
        return refusal(503, "the server is starting");
    }
    if request.authorization != format!("Bearer {TOKEN}") {
        return refusal(401, "Unauthorized");
    }
    let (jobs, pods) = (
        format!("/apis/batch/v1/namespaces/{NAMESPACE}/jobs"),
        format!("/api/v1/namespaces/{NAMESPACE}/pods"),
    );
    let objects = &mut *state.objects.lock().unwrap();
    let under = |collection: &str| {
        let rest = request.path.strip_prefix(collection)?;
        (rest.is_empty() || rest.starts_with('/')).then(|| rest.trim_start_matches('/').to_owned())
    };
    match (request.method.as_str(), under(&jobs), under(&pods)) {
        ("GET", Some(name), _) if name.is_empty() => list(request, objects.jobs.values()),
        ("GET", _, Some(name)) if name.is_empty() => {
            list(request, objects.pods.values().map(|pod| &pod.object))
        }
        ("POST", Some(name), _) if name.is_empty() => create(request, objects),
        (method, Some(name), _) => match (method, objects.jobs.get(&name)) {
            (_, None) => refusal(404, &format!("jobs.batch {name:?} not found")),
            ("GET", Some(job)) => (200, Body::Json(job.clone())),
            ("PATCH", Some(_)) => patch(request, objects, &name),
            ("DELETE", Some(_)) => delete_job(request, objects, &name),
            _ => refusal(405, "method not allowed"),
        },
        (method, _, Some(name)) => {
            let (name, log) = name.split_once('/').map_or((name.as_str(), ""), |(name, log)| (name, log));
            match (method, log, objects.pods.get_mut(name)) {
                (_, _, None) => refusal(404, &format!("pods {name:?} not found")),
                ("GET", "log", Some(pod)) => log_of(request, pod),
                ("DELETE", "", Some(pod)) => delete_pod(request, pod),
                _ => refusal(405, "method not allowed"),
            }
        }
        _ => refusal(404, "the server could not find the requested resource"),
    }
}

fn list<'a>(request: &Request, all: impl Iterator<Item = &'a Value>) -> Answer {
    let value =
        |name: &str| request.query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let selects = |object: &&Value| match value("labelSelector").and_then(|text| text.split_once('=')) {
        Some((label, wanted)) => object["metadata"]["labels"][label] == wanted,
        None => true,
    };
    // Pages of two, so that clients must turn them.
    let from: usize = value("continue").map_or(0, |token| token.parse().unwrap());
    let found: Vec<&Value> = all.filter(selects).collect();
    let page: Vec<&&Value> = found.iter().skip(from).take(2).collect();
    let next = if found.len() > from + 2 { (from + 2).to_string() } else { String::new() };
    (200, Body::Json(json!({"kind": "List", "metadata": {"continue": next}, "items": page})))
}

fn create(request: &Request, objects: &mut Objects) -> Answer {
    let mut job = request.body.clone();
    let name = job["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let is_name = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let labels = job["metadata"]["labels"].as_object().into_iter().flatten();
    let is_label = |value: &Value| value.as_str().is_some_and(|text| text.len() <= 63);
    if job["kind"] != "Job" || job["apiVersion"] != "batch/v1" || job["metadata"]["namespace"] != NAMESPACE {
        return refusal(400, "no Job of this namespace");
    }
    if !is_name || !labels.map(|(_, value)| value).all(is_label) {
        return refusal(422, "a name or a label is invalid");
    }
    if objects.jobs.contains_key(&name) {
        return refusal(409, &format!("jobs.batch {name:?} already exists"));
    }
    objects.accepted.push(request.body.clone());
    job["metadata"]["uid"] = format!("uid-{}", objects.version).into();
    Objects::touch(&mut objects.version, &mut job);
    objects.jobs.insert(name, job.clone());
    (201, Body::Json(job))
}

/// Whether what a request demands of the object's identity is true of it.
fn is_same(object: &Value, demanded: &Value) -> bool {
    let same = |field: &str| demanded[field].is_null() || demanded[field] == object["metadata"][field];
    same("uid") && same("resourceVersion")
}

fn patch(request: &Request, objects: &mut Objects, name: &str) -> Answer {
    let Objects { version, jobs, .. } = objects;
    let job = jobs.get_mut(name).unwrap();
    if request.content_type != "application/merge-patch+json" {
        return refusal(415, "unsupported media type");
    }
    if !is_same(job, &request.body["metadata"]) {
        return refusal(409, "the object has been modified");
    }
    if !request.body["spec"]["template"].is_null() {
        return refusal(422, "spec.template: field is immutable");
    }
    merge(job, &request.body);
    Objects::touch(version, job);
    (200, Body::Json(job.clone()))
}

fn merge(into: &mut Value, from: &Value) {
    match from {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| merge(&mut into[name.as_str()], value))
        }
        value => *into = value.clone(),
    }
}

fn delete_job(request: &Request, objects: &mut Objects, name: &str) -> Answer {
    if !is_same(&objects.jobs[name], &request.body["preconditions"]) {
        return refusal(409, "the precondition does not hold");
    }
    objects.jobs.remove(name);
    // In the background: pods without an owner are ended.
    for pod in objects.pods.values_mut().filter(|pod| pod.object["metadata"]["labels"]["job-name"] == name) {
        pod.end(Duration::from_secs(120));
    }
    (200, Body::Json(json!({"kind": "Status", "status": "Success"})))
}

fn delete_pod(request: &Request, pod: &mut life::Pod) -> Answer {
    if !is_same(&pod.object, &request.body["preconditions"]) {
        return refusal(409, "the precondition does not hold");
    }
    let seconds = request.body["gracePeriodSeconds"].as_u64().unwrap_or(120);
    assert!(seconds > 0, "a pod deleted by force may run on where nobody sees it");
    pod.end(Duration::from_secs(seconds));
    (202, Body::Json(pod.object.clone()))
}

/// Lines since a time, which counts in seconds.
fn log_of(request: &Request, pod: &life::Pod) -> Answer {
    let value =
        |name: &str| request.query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    if value("container") != Some("loquat") || value("timestamps") != Some("true") {
        return refusal(400, "no such container");
    }
    let since = value("sinceTime").and_then(|time| time.split_once('.')).map_or("", |(second, _)| second);
    let lines = pod.log.lock().unwrap();
    let text = lines.iter().filter(|(at, _)| at.as_str() >= since).map(|(at, line)| format!("{at} {line}\n"));
    (200, Body::Text(text.collect()))
}
