//! Low-rank adapters that come and go while their model is served: `POST /v1/load_lora_adapter` and
//! `POST /v1/unload_lora_adapter`, vLLM's routes. A loaded adapter is a model of its own, with its base as `parent`.
//!
//! A path on the server's disk is named by the client, so the routes exist only where the server was told to trust whoever
//! has a key ([`crate::Limits::runtime_adapters`]).

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use crate::body;
use crate::error::{ApiError, Result};
use crate::json::Fields;
use crate::state::{AppState, ServedModel};

/// Adapters beside all models. Each holds memory: some MB at rank 16.
const ADAPTERS_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 256;
const PATH_BYTES_MAX: usize = 4096;

struct Wanted {
    name: String,
    path: PathBuf,
    base: Arc<ServedModel>,
}

pub(crate) async fn load(State(state): State<AppState>, request: Request) -> Result<Json<Value>> {
    allowed(&state, "/v1/load_lora_adapter")?;
    let served = state.clone();
    let wanted = body::read(&state, request, move |map| read(&served, Fields(&map))).await?;
    let Wanted { name, path, base } = wanted;
    let created = (state.now_unix_s)();
    let model = tokio::task::spawn_blocking(move || base.adapted(&name, created, &path));
    let model = model.await.map_err(ApiError::internal)?;
    let model = model.map_err(|why| ApiError::invalid("lora_path", why))?;
    let answer = json!({"id": model.id, "object": "model", "parent": model.parent});
    if !state.models.insert_new(model) {
        return Err(taken());
    }
    Ok(Json(answer))
}

pub(crate) async fn unload(State(state): State<AppState>, request: Request) -> Result<Json<Value>> {
    allowed(&state, "/v1/unload_lora_adapter")?;
    let name = body::read(&state, request, |map| name(Fields(&map))).await?;
    match state.models.get(&name) {
        Some(model) if model.parent.is_some() => {
            state.models.remove(&name);
            Ok(Json(json!({"id": name, "object": "model", "deleted": true})))
        }
        Some(_) => Err(ApiError::invalid("lora_name", "it is a model, not an adapter")),
        None => Err(ApiError::ModelNotFound(name)),
    }
}

fn allowed(state: &AppState, route: &str) -> Result<()> {
    if state.limits.runtime_adapters { Ok(()) } else { Err(ApiError::NoRoute(route.to_owned())) }
}

fn read(state: &AppState, fields: Fields) -> Result<Wanted> {
    let name = name(fields)?;
    let path = fields.text("lora_path")?.ok_or_else(|| ApiError::invalid("lora_path", "it is required"))?;
    if path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains('\0') {
        return Err(ApiError::invalid("lora_path", "it is not a path"));
    }
    let models = state.models.list();
    if models.iter().filter(|model| model.parent.is_some()).count() >= ADAPTERS_MAX {
        return Err(ApiError::invalid(
            "lora_name",
            format!("{ADAPTERS_MAX} adapters are loaded, unload one"),
        ));
    }
    if models.iter().any(|model| model.id == name) {
        return Err(taken());
    }
    let mut bases = models.iter().filter(|model| model.parent.is_none());
    let base = match (fields.text("base_model_name")?, bases.next(), bases.next()) {
        (Some(id), ..) => {
            let model = state.models.get(id).ok_or_else(|| ApiError::ModelNotFound(id.to_owned()))?;
            if model.parent.is_some() {
                return Err(ApiError::invalid("base_model_name", "it is an adapter itself"));
            }
            model
        }
        (None, Some(only), None) => only.clone(),
        (None, ..) => {
            return Err(ApiError::invalid("base_model_name", "it is required, several models are served"));
        }
    };
    Ok(Wanted { name, path: PathBuf::from(path), base })
}

fn taken() -> ApiError {
    ApiError::invalid("lora_name", "a model of this name is served already")
}

fn name(fields: Fields) -> Result<String> {
    let name = fields.text("lora_name")?.ok_or_else(|| ApiError::invalid("lora_name", "it is required"))?;
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        let why = format!("it must have 1 to {NAME_BYTES_MAX} bytes and no control characters");
        return Err(ApiError::invalid("lora_name", why));
    }
    Ok(name.to_owned())
}
