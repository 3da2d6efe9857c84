//! `GET /v1/models`, `GET /v1/models/{id}`, and finding the model a request names.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;
use serde_json::{Value, json};

use crate::embeddings::ServedEmbedder;
use crate::error::{ApiError, Result};
use crate::json::Fields;
use crate::state::{AppState, Models, ServedModel};

/// OpenAI's four fields, then what vLLM adds and clients have come to use, then `is_base` and
/// `embeds_only` for the console.
#[derive(Serialize)]
pub(crate) struct ModelBody {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<usize>,
    is_base: bool,
    embeds_only: bool,
}

impl ModelBody {
    fn new(model: &ServedModel) -> ModelBody {
        ModelBody {
            id: model.id.clone(),
            object: "model",
            created: model.created,
            owned_by: "loquat",
            root: model.parent.clone().unwrap_or_else(|| model.id.clone()),
            parent: model.parent.clone(),
            max_model_len: Some(model.context_max()),
            is_base: model.is_base,
            embeds_only: false,
        }
    }

    /// One that other processes serve; they know its context.
    fn of_replicas(state: &AppState, id: String) -> Option<ModelBody> {
        let created = state.replicas.created(&id)?;
        Some(ModelBody {
            root: id.clone(),
            id,
            object: "model",
            created,
            owned_by: "loquat",
            parent: None,
            max_model_len: None,
            is_base: false,
            embeds_only: false,
        })
    }

    /// One that embeds and does nothing else.
    fn of_embedder(model: &ServedEmbedder) -> ModelBody {
        ModelBody {
            id: model.id.clone(),
            object: "model",
            created: model.created,
            owned_by: "loquat",
            root: model.id.clone(),
            parent: None,
            max_model_len: Some(model.embedder.context_max()),
            is_base: false,
            embeds_only: true,
        }
    }
}

pub(crate) async fn list(State(state): State<AppState>) -> Json<Value> {
    let mut data: Vec<ModelBody> = state.models.list().iter().map(|model| ModelBody::new(model)).collect();
    // A model that generates may embed as well, under the same name.
    let others = state.embedders.list().into_iter().filter(|model| state.models.get(&model.id).is_none());
    data.extend(others.map(|model| ModelBody::of_embedder(&model)));
    let elsewhere = state.replicas.models().into_iter().filter(|id| data.iter().all(|model| model.id != *id));
    let elsewhere: Vec<String> = elsewhere.collect();
    data.extend(elsewhere.into_iter().filter_map(|id| ModelBody::of_replicas(&state, id)));
    Json(json!({"object": "list", "data": data}))
}

/// The id may hold slashes, as in `owner/name`.
pub(crate) async fn get(
    State(state): State<AppState>,
    id: std::result::Result<Path<String>, PathRejection>,
) -> Result<Json<ModelBody>> {
    // A name that is not UTF-8 names no model.
    let Path(id) = id.map_err(|e| ApiError::ModelNotFound(e.body_text()))?;
    if let Some(model) = state.models.get(&id) {
        return Ok(Json(ModelBody::new(&model)));
    }
    if let Some(model) = state.embedders.get(&id) {
        return Ok(Json(ModelBody::of_embedder(&model)));
    }
    ModelBody::of_replicas(&state, id.clone()).map(Json).ok_or(ApiError::ModelNotFound(id))
}

/// The model the field `model` names.
pub(crate) fn named(models: &Models, fields: Fields) -> Result<Arc<ServedModel>> {
    let id = fields.text("model")?.ok_or_else(|| ApiError::invalid("model", "it is required"))?;
    models.get(id).ok_or_else(|| ApiError::ModelNotFound(id.to_owned()))
}

/// The same, for routes whose clients may leave the field out: the only model there is then, adapters aside.
pub(crate) fn named_or_only(models: &Models, fields: Fields) -> Result<Arc<ServedModel>> {
    if fields.get("model").is_some() {
        return named(models, fields);
    }
    let mut all = models.list().into_iter().filter(|model| model.parent.is_none());
    match (all.next(), all.next()) {
        (Some(only), None) => Ok(only),
        _ => Err(ApiError::invalid("model", "it is required, because this server does not have exactly one")),
    }
}
