//! Models that other processes serve: who they are, and one router a model that picks among them.
//!
//! `forward.rs` is a request's way to a replica and back, `probe.rs` looks whether replicas are well. Which one is picked,
//! and what a failure means, is decided by the crate `gateway`, which knows neither HTTP nor time.

mod forward;
mod probe;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use gateway::{Endpoint, Policy, ReplicaStatus, Router, Window};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::{Value, json};
use telemetry::chain;
use tokio::time::Instant;

use crate::state::AppState;
use crate::tls::{TlsError, Trust};

pub(crate) use forward::forward;
pub(crate) use probe::watch;

/// A replica is in the same building: who does not accept by then is not there.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// A host that acknowledges nothing for so long is gone, also in the middle of a stream.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Connections kept open to one replica without a request.
const IDLE_CONNECTIONS_MAX: usize = 512;

/// A replica, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub endpoint: Endpoint,
    /// `http://host:port` or `https://host:port`, without `/v1`.
    pub url: String,
    pub key: TargetKey,
}

/// How a replica knows that it is we who ask.
#[derive(Clone, PartialEq, Eq)]
pub enum TargetKey {
    Nobody,
    /// An engine of somebody else's, with a key of its own.
    Theirs(String),
    /// The cluster's key; whose request it is goes with it, so that tenants share no cache there either.
    Cluster(String),
}

impl std::fmt::Debug for TargetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TargetKey")
    }
}

impl TargetKey {
    fn bearer(&self, tenant: &str) -> Option<String> {
        match self {
            TargetKey::Nobody => None,
            TargetKey::Theirs(key) => Some(format!("Bearer {key}")),
            TargetKey::Cluster(key) => Some(format!("Bearer {key}.{tenant}")),
        }
    }
}

/// The models served elsewhere, by name. Clones share them.
#[derive(Clone)]
pub struct Replicas(Arc<Inner>);

struct Inner {
    routes: RwLock<BTreeMap<String, Arc<Route>>>,
    client: RwLock<HttpClient>,
    trust: Mutex<Trust>,
    started: Instant,
}

/// One model's replicas.
pub(crate) struct Route {
    model: String,
    created: u64,
    router: Mutex<Router>,
    targets: RwLock<Vec<Arc<Known>>>,
    /// Requests that wait for a replica to be there at all.
    n_waiting: AtomicUsize,
    last_asked_ms: AtomicU64,
}

/// A target, and when it was last heard of.
pub(crate) struct Known {
    target: Target,
    last_well_ms: AtomicU64,
    next_probe_ms: AtomicU64,
}

/// How one model's replicas are doing.
#[derive(Clone, Debug)]
pub struct RouteStatus {
    pub replicas: Vec<ReplicaStatus>,
    /// Requests at replicas, and waiting for one.
    pub in_flight: usize,
    /// Since anybody asked.
    pub idle_ms: u64,
}

type HttpClient = Client<HttpsConnector<HttpConnector>, Body>;

impl Default for Replicas {
    /// Of addresses with https:// those are believed that browsers believe.
    fn default() -> Replicas {
        let trust = Trust::default();
        let client =
            client(&trust).unwrap_or_else(|e| panic!("the authorities of this build are usable: {e}"));
        let (client, trust, started) = (RwLock::new(client), Mutex::new(trust), Instant::now());
        Replicas(Arc::new(Inner { routes: RwLock::default(), client, trust, started }))
    }
}

fn client(trust: &Trust) -> Result<HttpClient, TlsError> {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_MAX));
    // Tokens are small packets.
    connector.set_nodelay(true);
    connector.set_keepalive(Some(SILENCE_MAX / 2));
    connector.set_keepalive_interval(Some(SILENCE_MAX / 4));
    connector.set_tcp_user_timeout(Some(SILENCE_MAX));
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(20))
        .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
        .build(trust.connector(connector)?))
}

impl Replicas {
    /// From now on those are believed to be replicas whose certificate an authority of this file has signed, and only those.
    pub fn trust(&self, ca: &Path) -> Result<(), TlsError> {
        self.set_trust(Trust::open(ca)?)
    }

    /// Reads that file again if it has changed; whether it had.
    pub(crate) fn trust_again(&self) -> Result<bool, TlsError> {
        let changed = self.0.trust.lock().unwrap_or_else(PoisonError::into_inner).changed()?;
        changed.map_or(Ok(false), |trust| self.set_trust(trust).map(|()| true))
    }

    fn set_trust(&self, trust: Trust) -> Result<(), TlsError> {
        let client = client(&trust);
        // One that cannot be used is told of once.
        *self.0.trust.lock().unwrap_or_else(PoisonError::into_inner) = trust;
        *self.0.client.write().unwrap_or_else(PoisonError::into_inner) = client?;
        Ok(())
    }

    /// Asks a replica, over TLS where its address says so.
    async fn ask(&self, request: Request<Body>) -> Result<Response<Incoming>, String> {
        let client = self.0.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        client.request(request).await.map_err(|error| {
            let why = chain(&error);
            let hint = if why.contains("invalid peer certificate") {
                " (--tls-ca says who is believed)"
            } else {
                ""
            };
            why + hint
        })
    }

    /// From now on `model` is served by these, of which those of version `canary.0` get the share `canary.1` of the
    /// requests. Requests under way go on, also at replicas that are not named any more.
    pub fn set(&self, model: &str, created: u64, targets: Vec<Target>, canary: Option<(String, f64)>) {
        let route = self.route(model).unwrap_or_else(|| {
            let router = Mutex::new(Router::new(Policy::default(), seed(model)));
            let route = Arc::new(Route {
                model: model.to_owned(),
                created,
                router,
                targets: RwLock::default(),
                n_waiting: AtomicUsize::new(0),
                last_asked_ms: AtomicU64::new(self.now_ms()),
            });
            self.routes_mut().insert(model.to_owned(), route.clone());
            route
        });
        let mut known = route.targets.write().unwrap_or_else(PoisonError::into_inner);
        let endpoints: Vec<Endpoint> = targets.iter().map(|target| target.endpoint.clone()).collect();
        // A replica that moved is another one: it must be seen at its new place first.
        let moved = |endpoint: &Endpoint| {
            let before = known.iter().find(|k| k.target.endpoint.name == endpoint.name);
            let after = targets.iter().find(|t| t.endpoint.name == endpoint.name);
            before.zip(after).is_some_and(|(before, after)| before.target.url != after.url)
        };
        let unmoved: Vec<Endpoint> = endpoints.iter().filter(|e| !moved(e)).cloned().collect();
        let mut router = route.router();
        if unmoved.len() < endpoints.len() {
            router.set(&unmoved);
        }
        router.set(&endpoints);
        router.set_canary(canary);
        drop(router);
        let keep = |target: Target| {
            let same = known.iter().find(|k| k.target == target).cloned();
            same.unwrap_or_else(|| {
                Arc::new(Known { target, last_well_ms: 0.into(), next_probe_ms: 0.into() })
            })
        };
        let targets = targets.into_iter().map(keep).collect();
        *known = targets;
    }

    /// `model` is not served elsewhere any more.
    pub fn remove(&self, model: &str) {
        self.routes_mut().remove(model);
    }

    pub fn status(&self, model: &str) -> Option<RouteStatus> {
        let route = self.route(model)?;
        let (replicas, at_replicas) = {
            let router = route.router();
            (router.status(), router.in_flight() as usize)
        };
        let idle_ms = self.now_ms().saturating_sub(route.last_asked_ms.load(Ordering::Relaxed));
        Some(RouteStatus {
            replicas,
            in_flight: at_replicas + route.n_waiting.load(Ordering::Relaxed),
            idle_ms,
        })
    }

    /// How requests to one version of a model ended lately.
    pub fn window(&self, model: &str, version: &str) -> Window {
        self.route(model).map(|route| route.router().window(version)).unwrap_or_default()
    }

    /// Names of all models served elsewhere.
    pub fn models(&self) -> Vec<String> {
        self.routes().iter().map(|route| route.model.clone()).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.routes.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Name and creation time of one, for `GET /v1/models`.
    pub(crate) fn created(&self, model: &str) -> Option<u64> {
        self.route(model).map(|route| route.created)
    }

    fn route(&self, model: &str) -> Option<Arc<Route>> {
        self.0.routes.read().unwrap_or_else(PoisonError::into_inner).get(model).cloned()
    }

    fn routes(&self) -> Vec<Arc<Route>> {
        self.0.routes.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn routes_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Route>>> {
        self.0.routes.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.0.started.elapsed().as_millis() as u64
    }
}

impl Route {
    fn router(&self) -> MutexGuard<'_, Router> {
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, name: &str) -> Option<Arc<Known>> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets.iter().find(|known| known.target.endpoint.name == name).cloned()
    }
}

/// Gateways need not agree, and a test should not change from run to run: the model's name is chance enough.
fn seed(model: &str) -> u64 {
    model
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// `GET /v1/replicas`: who serves what from where, and how they are.
pub(crate) async fn list(State(state): State<AppState>) -> Json<Value> {
    let mut data = Vec::new();
    for route in state.replicas.routes() {
        let statuses = route.router().status();
        for status in statuses {
            let url = route.known(&status.name).map(|known| known.target.url.clone());
            data.push(json!({
                "id": status.name,
                "object": "replica",
                "model": route.model,
                "version": status.version,
                "url": url,
                "state": match status {
                    ReplicaStatus { draining: true, .. } => "draining",
                    ReplicaStatus { well: false, .. } => "down",
                    ReplicaStatus { resting: true, .. } => "resting",
                    _ => "well",
                },
                "in_flight": status.in_flight,
                "answered": status.n_answered,
                "failed": status.n_failed,
            }));
        }
    }
    Json(json!({"object": "list", "data": data}))
}
