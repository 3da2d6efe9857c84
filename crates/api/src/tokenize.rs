//! `POST /tokenize` and `POST /detokenize`, as llama-server and vLLM have them: one request may be in either's words,
//! and one answer serves both.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::body;
use crate::error::{ApiError, Result};
use crate::json::Fields;
use crate::models;
use crate::prompt;
use crate::sampling::read_token_id;
use crate::state::{AppState, ServedModel};
use crate::tools;

/// Bytes of a text, and tokens of a list. What is longer than the context may still be counted, but an answer takes up
/// to a hundred bytes a token: 1 Mi · 100 B = 100 MiB while it is written.
const LEN_MAX: usize = 1 << 20;

#[derive(Serialize)]
struct TokensBody<'a> {
    count: usize,
    max_model_len: usize,
    tokens: Tokens<'a>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Tokens<'a> {
    Ids(&'a [u32]),
    Pieces(Vec<PieceBody<'a>>),
}

#[derive(Serialize)]
struct PieceBody<'a> {
    id: u32,
    piece: PieceText<'a>,
}

/// A token's text, or its bytes if they are only part of a character.
#[derive(Serialize)]
#[serde(untagged)]
enum PieceText<'a> {
    Text(&'a str),
    Bytes(&'a [u8]),
}

pub(crate) async fn tokenize(State(state): State<AppState>, request: Request) -> Result<Response> {
    let models = state.models.clone();
    let work = move |map| {
        let fields = Fields(&map);
        let model = models::named_or_only(&models, fields)?;
        let tokens = read_tokens(fields, &model)?;
        let text = |&id: &u32| String::from_utf8_lossy(model.tokenizer.token_bytes(id)).into_owned();
        let with_strings = fields.flag("return_token_strs")?;
        let body = TokensBody {
            count: tokens.len(),
            max_model_len: model.context_max(),
            tokens: match fields.flag("with_pieces")? {
                true => Tokens::Pieces(tokens.iter().map(|&id| piece(&model, id)).collect()),
                false => Tokens::Ids(&tokens),
            },
            token_strs: with_strings.then(|| tokens.iter().map(text).collect()),
        };
        // Written here, because a long answer is work for a blocking thread as well.
        serde_json::to_vec(&body).map_err(ApiError::internal)
    };
    let bytes = body::read(&state, request, work).await?;
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], bytes).into_response())
}

fn piece(model: &ServedModel, id: u32) -> PieceBody<'_> {
    let bytes = model.tokenizer.token_bytes(id);
    PieceBody { id, piece: std::str::from_utf8(bytes).map_or(PieceText::Bytes(bytes), PieceText::Text) }
}

/// The ids of `content` (llama-server), `prompt` or `messages` (vLLM).
fn read_tokens(fields: Fields, model: &ServedModel) -> Result<Vec<u32>> {
    if fields.get("messages").is_some() {
        let tools = tools::read(fields)?.map(|(tools, _)| tools);
        return Ok(prompt::read_messages(fields, model, tools.as_ref())?.tokens);
    }
    let (content, prompt) = (fields.text("content")?, fields.text("prompt")?);
    let text = match (content, prompt) {
        (Some(text), None) | (None, Some(text)) => text,
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("prompt", "`content` is the same, send one of them"));
        }
        (None, None) => {
            return Err(ApiError::invalid("content", "it is required, or `prompt` or `messages`"));
        }
    };
    if text.len() > LEN_MAX {
        let param = if content.is_some() { "content" } else { "prompt" };
        return Err(ApiError::invalid(param, format!("at most {LEN_MAX} bytes are tokenized at a time")));
    }
    // llama-server adds the beginning of a text only when asked, vLLM unless asked not to.
    let asked = if content.is_some() { "add_special" } else { "add_special_tokens" };
    let begins = fields.flag_or(asked, content.is_none())?;
    let tokenizer = &model.tokenizer;
    let bos = tokenizer.bos().filter(|_| begins && tokenizer.add_bos());
    let ids = match fields.flag_or("parse_special", true)? {
        true => tokenizer.encode_special(text),
        false => tokenizer.encode(text),
    };
    Ok(bos.into_iter().chain(ids).collect())
}

pub(crate) async fn detokenize(State(state): State<AppState>, request: Request) -> Result<Json<Value>> {
    let models = state.models.clone();
    let work = move |map| {
        let fields = Fields(&map);
        let model = models::named_or_only(&models, fields)?;
        let ids = fields.list("tokens")?.ok_or_else(|| ApiError::invalid("tokens", "it is required"))?;
        if ids.len() > LEN_MAX {
            return Err(ApiError::invalid("tokens", format!("at most {LEN_MAX} ids are allowed")));
        }
        let vocab = model.engine.vocab();
        let ids = ids.iter().map(|id| read_token_id("tokens", id, vocab)).collect::<Result<Vec<u32>>>()?;
        Ok(model.tokenizer.decode_special(&ids))
    };
    let text = body::read(&state, request, work).await?;
    Ok(Json(json!({"content": text, "prompt": text})))
}
