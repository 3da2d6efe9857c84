//! The table of routes. What each is for stands in `openapi.rs`.

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::error::ApiError;
use crate::state::AppState;
use crate::{
    adapters, auth, chat, cluster, completions, console, edge, embeddings, models, openapi, probes, replicas,
    runs, tokenize,
};

/// The whole HTTP surface over one state.
pub fn app(state: AppState) -> Router {
    // What a replica may do in this server's place.
    let generating = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route_layer(from_fn_with_state(state.clone(), replicas::forward));
    let guarded = Router::new()
        .merge(generating)
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/runs", get(runs::list))
        .route("/v1/runs/{name}", get(runs::get))
        .route("/v1/jobs", get(cluster::jobs).post(cluster::submit_job))
        .route("/v1/jobs/{name}", get(cluster::job))
        .route("/v1/jobs/{name}/logs", get(cluster::logs))
        .route("/v1/jobs/{name}/{order}", post(cluster::steer_job))
        .route("/v1/nodes", get(cluster::nodes))
        .route("/v1/nodes/{name}/{order}", post(cluster::steer_node))
        .route("/v1/deployments", get(cluster::deployments))
        .route(
            "/v1/deployments/{model}",
            get(cluster::deployment).post(cluster::deploy).delete(cluster::undeploy),
        )
        .route("/v1/deployments/{model}/{order}", post(cluster::steer_deployment))
        .route("/v1/promotions", get(cluster::promotions))
        .route("/v1/projects", get(cluster::projects))
        .route("/v1/projects/{name}", post(cluster::set_project).delete(cluster::delete_project))
        .route("/v1/replicas", get(replicas::list))
        .route("/metrics", get(probes::metrics))
        .route_layer(from_fn_with_state(state.clone(), auth::require_key))
        .fallback(fallback)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), edge::check_host));
    let open = Router::new()
        .route("/health", get(probes::health))
        .route("/health/live", get(probes::live))
        .route("/health/ready", get(probes::health))
        .route("/healthz", get(probes::live))
        .route("/readyz", get(probes::health))
        .route("/ping", get(probes::live))
        .route("/version", get(probes::version))
        .route("/openapi.json", get(openapi::describe))
        .method_not_allowed_fallback(wrong_method);
    guarded
        .merge(open)
        .layer(from_fn_with_state(state.clone(), edge::allow_origins))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(uncached))
        .layer(from_fn_with_state(state.clone(), edge::account))
        .with_state(state)
}

/// The console's files, and a clear answer for everything else.
async fn fallback(request: Request) -> Response {
    let path = request.uri().path();
    let reads = [Method::GET, Method::HEAD].contains(request.method());
    let file = (reads && !path.starts_with("/v1/")).then(|| console::file(path, request.headers())).flatten();
    file.unwrap_or_else(|| ApiError::NoRoute(path.to_owned()).into_response())
}

async fn wrong_method(method: Method) -> ApiError {
    ApiError::Method(method.to_string())
}

/// Answers are for whoever asked, so nobody keeps them, unless a handler said otherwise.
async fn uncached(request: Request, next: axum::middleware::Next) -> Response {
    use axum::http::{HeaderValue, header};
    let mut response = next.run(request).await;
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// A bug of ours: the client gets a 500 in the usual form, the log gets the text, the next request is served.
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
    let response = ApiError::internal(format!("a handler panicked: {text}")).into_response();
    debug_assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    response
}
