//! From a model's files to something the API can serve.

use std::path::Path;
use std::sync::Arc;

use crate::args::Listen;
use anyhow::{Context, Result, bail};
use api::{LoadAdapter, ServedModel};
use engine::{Engine, EngineLimits, ModelRunner};
use model::{Adapter, Config, KvType, Loaded, TokenizerFiles, Transformer};
use telemetry::Metrics;
use tensor::Pool;
use tokenizer::{ChatTemplate, GgufVocab, Tokenizer};

/// What serving one model may take of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Share {
    pub(crate) n_threads: usize,
    pub(crate) kv_bytes: usize,
}

impl Share {
    pub(crate) fn of(listen: &Listen) -> Share {
        let n_threads = listen.threads.unwrap_or_else(crate::n_threads);
        Share { n_threads, kv_bytes: listen.kv_mib << 20 }
    }
}

/// Loads a .gguf file or a Hugging Face directory and starts its engine.
pub(crate) fn load(id: &str, path: &Path, share: Share, metrics: &Metrics) -> Result<ServedModel> {
    let loaded = model::load(path).with_context(|| format!("cannot load the model {}", path.display()))?;
    let tokenizer = tokenizer(&loaded.tokenizer)
        .with_context(|| format!("cannot load the tokenizer of {}", path.display()))?;
    let vocab = loaded.weights.config.vocab;
    if tokenizer.vocab_size() > vocab {
        bail!("{}: the tokenizer has {} ids, the model {vocab}", path.display(), tokenizer.vocab_size());
    }
    let template = match &loaded.chat_template {
        Some(source) => Some(chat_template(source, &tokenizer).context("its chat template")?),
        None => None,
    };
    let pool = Arc::new(Pool::new(share.n_threads));
    let adapters = load_adapter(loaded.weights.config.clone(), pool.clone());
    let engine = start_engine(id, loaded, (pool, share), metrics)?;
    Ok(ServedModel::new(id, crate::now_unix_s(), engine, tokenizer, template).with_adapters(adapters))
}

/// How adapters of a model of this shape are read.
fn load_adapter(config: Config, pool: Arc<Pool>) -> Arc<LoadAdapter> {
    Arc::new(move |dir| {
        Adapter::load(dir, &config, &pool).map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    })
}

fn start_engine(
    id: &str,
    loaded: Loaded,
    (pool, share): (Arc<Pool>, Share),
    metrics: &Metrics,
) -> Result<Engine> {
    let limits = EngineLimits::default();
    // Each matrix's bytes are dropped as soon as it is packed: the file and the packed copy never stand side by side.
    let llama = Transformer::new(loaded.weights, &pool)?;
    let context_max = llama.context_max();
    let runner = ModelRunner::new(llama, pool, KvType::Bf16, share.kv_bytes, limits.max_running)?;
    Ok(Engine::start(Box::new(runner), limits, metrics.engine(id, context_max)))
}

/// Builds the tokenizer that lies beside a model's weights.
pub(crate) fn tokenizer(files: &TokenizerFiles) -> Result<Tokenizer> {
    match files {
        TokenizerFiles::Json { tokenizer, config: Some(config) } => {
            Ok(Tokenizer::from_json_with_config(tokenizer, config)?)
        }
        TokenizerFiles::Json { tokenizer, config: None } => Ok(Tokenizer::from_json(tokenizer)?),
        TokenizerFiles::Gguf(vocab) => Ok(Tokenizer::from_gguf(GgufVocab {
            model: vocab.model.clone(),
            pre: vocab.pre.clone(),
            tokens: vocab.tokens.clone(),
            scores: vocab.scores.clone(),
            token_types: vocab.token_types.clone(),
            merges: vocab.merges.clone(),
            bos: vocab.bos,
            eos: vocab.eos,
            unk: vocab.unk,
            add_bos: vocab.add_bos,
            add_space_prefix: vocab.add_space_prefix,
        })?),
        TokenizerFiles::None => bail!("there is no tokenizer.json beside it"),
    }
}

/// Compiles a template for a tokenizer's special tokens.
pub(crate) fn chat_template(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let text = |id: Option<u32>| id.map_or(String::new(), |id| tokenizer.decode_special(&[id]));
    Ok(ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()))?)
}
