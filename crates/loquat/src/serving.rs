//! From a model's files to something the API can serve.

use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::args::Listen;
use crate::embedder::{ModelEmbedder, TextTokenizer};
use anyhow::{Context, Result, bail};
use api::{AppState, LoadAdapter, ServedEmbedder, ServedModel};
use engine::{Engine, EngineLimits, ModelRunner, Speculation};
use model::{Adapter, Config, KvType, Loaded, TokenizerFiles, Transformer};
use telemetry::Metrics;
use tensor::Pool;
use tokenizer::{ChatTemplate, GgufVocab, Tokenizer, WordPiece};

/// What serving one model may take of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Share {
    pub(crate) n_threads: usize,
    kv_bytes: usize,
    kv_type: KvType,
    max_running: usize,
    speculation: Speculation,
}

impl Share {
    pub(crate) fn of(listen: &Listen) -> Share {
        let n_threads = listen.threads.unwrap_or_else(crate::n_threads);
        let speculation = match listen.prompt_lookup {
            0 => Speculation::Off,
            k_max => Speculation::PromptLookup { k_max: k_max as usize },
        };
        Share {
            n_threads,
            kv_bytes: listen.kv_mib << 20,
            kv_type: listen.kv_cache_dtype.kv_type(),
            max_running: listen.max_num_seqs as usize,
            speculation,
        }
    }
}

/// One model, ready: every model embeds, all but encoders generate.
pub(crate) struct Served {
    generator: Option<ServedModel>,
    embedder: ServedEmbedder,
}

impl Served {
    /// Lets requests reach the model.
    pub(crate) fn publish(self, state: &AppState) {
        state.embedders.insert(self.embedder);
        if let Some(model) = self.generator {
            state.models.insert(model);
        }
    }
}

/// Loads a .gguf file or a Hugging Face directory and starts its engine.
pub(crate) fn load(id: &str, path: &Path, share: Share, metrics: &Metrics) -> Result<Served> {
    let loaded = model::load(path).with_context(|| format!("cannot load the model {}", path.display()))?;
    let pool = Arc::new(Pool::new(share.n_threads));
    let text = || format!("cannot load the tokenizer of {}", path.display());
    let (generator, model, tokenizer) = if loaded.weights.config.block().causal {
        let tokenizer = tokenizer(&loaded.tokenizer).with_context(text)?;
        check_vocab(path, tokenizer.vocab_size(), &loaded)?;
        let template = match &loaded.chat_template {
            Some(source) => Some(chat_template(source, &tokenizer).context("its chat template")?),
            None => None,
        };
        let model = Arc::new(Transformer::new(loaded.weights, &pool)?);
        let adapters = load_adapter(model.config().clone(), pool.clone());
        let engine = start_engine(id, model.clone(), pool.clone(), share, metrics)?;
        let served = ServedModel::new(id, crate::now_unix_s(), engine, tokenizer.clone(), template);
        (Some(served.with_adapters(adapters)), model, TextTokenizer::Merges(tokenizer))
    } else {
        let TokenizerFiles::Json { tokenizer, .. } = &loaded.tokenizer else {
            bail!("there is no tokenizer.json beside it");
        };
        let tokenizer = WordPiece::from_json(tokenizer).with_context(text)?;
        check_vocab(path, tokenizer.vocab_size(), &loaded)?;
        (None, Arc::new(Transformer::new(loaded.weights, &pool)?), TextTokenizer::Pieces(tokenizer))
    };
    let embedder = Box::new(ModelEmbedder { model, pool, tokenizer, scratch: Mutex::default() });
    let embedder = ServedEmbedder { id: id.to_owned(), created: crate::now_unix_s(), embedder };
    Ok(Served { generator, embedder })
}

fn check_vocab(path: &Path, n_ids: usize, loaded: &Loaded) -> Result<()> {
    let vocab = loaded.weights.config.vocab;
    if n_ids > vocab {
        bail!("{}: the tokenizer has {n_ids} ids, the model {vocab}", path.display());
    }
    Ok(())
}

/// How adapters of a model of this shape are read.
fn load_adapter(config: Config, pool: Arc<Pool>) -> Arc<LoadAdapter> {
    Arc::new(move |dir| {
        Adapter::load(dir, &config, &pool).map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    })
}

fn start_engine(
    id: &str,
    model: Arc<Transformer>,
    pool: Arc<Pool>,
    share: Share,
    metrics: &Metrics,
) -> Result<Engine> {
    let Share { kv_bytes, kv_type, max_running, speculation, .. } = share;
    let limits = EngineLimits { max_running, speculation, ..EngineLimits::default() };
    let context_max = model.context_max();
    let runner = ModelRunner::new(model, pool, kv_type, kv_bytes, max_running)?;
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
