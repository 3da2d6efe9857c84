//! `POST /v1/embeddings`, and the models behind it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Json;
use axum::extract::{Extension, Request, State};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::body;
use crate::error::{ApiError, Result};
use crate::json::{Fields, expected};
use crate::sampling::read_token_id;
use crate::state::{AppState, Cause, KeyOwner};

/// Inputs of one request; OpenAI's limit.
const INPUTS_MAX: usize = 2048;
/// Tokens of one request, all inputs together. OpenAI's limit is 300,000.
const TOKENS_MAX: usize = 1 << 18;

/// Turns texts into vectors of length one. Called on a blocking thread.
pub trait Embedder: Send + Sync {
    /// Numbers of a vector.
    fn width(&self) -> usize;
    /// Tokens a text may have.
    fn context_max(&self) -> usize;
    /// Ids are below this.
    fn vocab(&self) -> usize;
    /// Ids of a text, with those that begin and end it.
    fn encode(&self, text: &str) -> Vec<u32>;
    /// One vector a text. Texts are not empty, not too long, and have only known ids.
    fn embed(&self, texts: &[Vec<u32>]) -> std::result::Result<Vec<Vec<f32>>, Cause>;
}

/// A model that embeds, under the name it is served as.
pub struct ServedEmbedder {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub embedder: Box<dyn Embedder>,
}

/// The models that embed, by name. They come and go while the server runs.
#[derive(Clone, Default)]
pub struct Embedders(Arc<RwLock<BTreeMap<String, Arc<ServedEmbedder>>>>);

impl Embedders {
    /// Serves `model` from now on, in place of an older one of the same name.
    pub fn insert(&self, model: ServedEmbedder) {
        let mut models = self.0.write().unwrap_or_else(PoisonError::into_inner);
        models.insert(model.id.clone(), Arc::new(model));
    }

    /// The model that was served under this name. It lives until its last request has ended.
    pub fn remove(&self, id: &str) -> Option<Arc<ServedEmbedder>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(id)
    }

    pub fn get(&self, id: &str) -> Option<Arc<ServedEmbedder>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Arc<ServedEmbedder>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

struct Work {
    model: Arc<ServedEmbedder>,
    texts: Vec<Vec<u32>>,
    base64: bool,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    Extension(_owner): Extension<KeyOwner>,
    request: Request,
) -> Result<Json<Value>> {
    let embedders = state.embedders.clone();
    let Work { model, texts, base64 } =
        body::read(&state, request, move |map| read(Fields(&map), &embedders)).await?;
    let n_tokens: usize = texts.iter().map(Vec::len).sum();
    // As many at a time as large bodies: a batch of texts is computed on all cores anyway.
    let turn = state.heavy.clone().acquire_owned().await.map_err(ApiError::internal)?;
    let id = model.id.clone();
    let done = tokio::task::spawn_blocking(move || {
        let vectors = model.embedder.embed(&texts);
        drop(turn);
        vectors
    });
    let vectors = done.await.map_err(|e| ApiError::internal(format!("embedding failed: {e}")))?;
    let vectors = vectors.map_err(ApiError::internal)?;
    let entry = |(index, vector): (usize, &Vec<f32>)| json!({"object": "embedding", "index": index, "embedding": written(vector, base64)});
    let data: Vec<Value> = vectors.iter().enumerate().map(entry).collect();
    let usage = json!({"prompt_tokens": n_tokens, "total_tokens": n_tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": id, "usage": usage})))
}

/// Numbers, or the base64 of their little-endian f32: what OpenAI's own client asks for.
fn written(vector: &[f32], base64: bool) -> Value {
    if !base64 {
        return vector.into();
    }
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    BASE64_STANDARD.encode(bytes).into()
}

fn read(fields: Fields, embedders: &Embedders) -> Result<Work> {
    let id = fields.text("model")?.ok_or_else(|| ApiError::invalid("model", "it is required"))?;
    let model = embedders.get(id).ok_or_else(|| ApiError::ModelNotFound(id.to_owned()))?;
    let base64 = match fields.text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::invalid("encoding_format", "expected `float` or `base64`")),
    };
    let width = model.embedder.width();
    if fields.count("dimensions", 1..=usize::MAX)?.is_some_and(|n| n != width) {
        let why = format!("vectors of this model have {width} dimensions and cannot be shortened");
        return Err(ApiError::invalid("dimensions", why));
    }
    let texts = read_inputs(fields, model.embedder.as_ref())?;
    Ok(Work { model, texts, base64 })
}

fn read_inputs(fields: Fields, embedder: &dyn Embedder) -> Result<Vec<Vec<u32>>> {
    let what = "a string, an array of strings or token ids";
    let inputs = match fields.get("input") {
        None => return Err(ApiError::invalid("input", "it is required")),
        Some(text @ Value::String(_)) => std::slice::from_ref(text),
        Some(ids @ Value::Array(items)) if items.first().is_some_and(Value::is_number) => {
            std::slice::from_ref(ids)
        }
        Some(Value::Array(items)) => items,
        Some(other) => return Err(expected("input", what, other)),
    };
    if inputs.is_empty() || inputs.len() > INPUTS_MAX {
        return Err(ApiError::invalid("input", format!("expected 1 to {INPUTS_MAX} inputs")));
    }
    let mut texts = Vec::with_capacity(inputs.len());
    let mut n_tokens = 0;
    for input in inputs {
        let text = read_input(input, embedder)?;
        n_tokens += text.len();
        if n_tokens > TOKENS_MAX {
            let why = format!("all inputs together have more than {TOKENS_MAX} tokens");
            return Err(ApiError::invalid("input", why));
        }
        texts.push(text);
    }
    Ok(texts)
}

fn read_input(input: &Value, embedder: &dyn Embedder) -> Result<Vec<u32>> {
    let ids = match input {
        Value::String(text) if text.is_empty() => Vec::new(),
        Value::String(text) => embedder.encode(text),
        Value::Array(ids) => {
            ids.iter().map(|id| read_token_id("input", id, embedder.vocab())).collect::<Result<Vec<u32>>>()?
        }
        other => return Err(expected("input", "strings or arrays of token ids", other)),
    };
    let context_max = embedder.context_max();
    if ids.is_empty() {
        return Err(ApiError::invalid("input", "it must not be empty"));
    }
    if ids.len() > context_max {
        let message = format!(
            "This model's context is {context_max} tokens. An input has {} tokens: shorten or split it.",
            ids.len()
        );
        return Err(ApiError::ContextLength { param: "input", message });
    }
    Ok(ids)
}
