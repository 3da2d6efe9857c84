//! From a model's files to something the API can serve.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use api::{AppState, LoadAdapter, ServedEmbedder, ServedModel};
use engine::{Engine, EngineLimits, ModelRunner, Runner, Speculation};
use model::{Adapter, BLOCK_TOKENS, Config, KvType, Loaded, TokenizerFiles, Transformer};
use telemetry::Metrics;
use tensor::Pool;
use tokenizer::{ChatTemplate, Tokenizer, WordPiece};

use crate::args::{Guess, Listen};
use crate::embedder::{ModelEmbedder, TextTokenizer};
use crate::machine::bytes_text;

/// Bytes of keys and values when nobody says.
const KV_BYTES_DEFAULT: usize = 256 << 20;

/// What serving one model may take of the machine.
#[derive(Clone)]
pub(crate) struct Share {
    pub(crate) n_threads: usize,
    kv_bytes: Option<usize>,
    kv_type: KvType,
    /// Positions of one sequence; `None` is the model's own.
    context: Option<usize>,
    max_running: usize,
    speculation: Speculation,
    draft: Option<PathBuf>,
}

impl Share {
    /// `resolve` finds the files of a draft model.
    pub(crate) fn of(
        listen: &Listen,
        guess: Guess,
        resolve: impl Fn(&str) -> Result<PathBuf>,
    ) -> Result<Share> {
        let (speculation, draft) = match guess {
            Guess::Off => (Speculation::Off, None),
            Guess::Lookup { k_max } => (Speculation::PromptLookup { k_max }, None),
            Guess::Draft { model, k_max } => (Speculation::Draft { k_max }, Some(resolve(&model)?)),
        };
        Ok(Share {
            n_threads: listen.threads.unwrap_or_else(crate::n_threads),
            kv_bytes: listen.kv_mib.map(|mib| mib << 20),
            kv_type: listen.kv_cache_dtype.kv_type(),
            context: Some(listen.ctx_size).filter(|&n| n > 0),
            max_running: listen.max_num_seqs as usize,
            speculation,
            draft,
        })
    }

    /// The model with as much memory for keys and values as it may have. A context that was asked for is refused
    /// where it does not fit, never shortened.
    fn runner(&self, model: Arc<Transformer>, pool: &Arc<Pool>) -> Result<ModelRunner> {
        let block_bytes = model.kv_block_bytes(self.kv_type);
        let mut kv_bytes = self.kv_bytes.unwrap_or(KV_BYTES_DEFAULT);
        let context_max = self.context.unwrap_or(model.context_max());
        if let Some(n) = self.context {
            if n > model.context_max() {
                bail!("--ctx-size {n}: the model was made for {}", model.context_max());
            }
            let need = n.div_ceil(BLOCK_TOKENS) * block_bytes;
            if self.kv_bytes.is_some_and(|bytes| bytes < need) {
                bail!("--ctx-size {n} needs {} of keys and values, see --kv-mib", bytes_text(need as u64));
            }
            kv_bytes = kv_bytes.max(need).min(need.saturating_mul(self.max_running));
        }
        let runner = ModelRunner::new(model, pool.clone(), self.kv_type, kv_bytes, self.max_running)?;
        Ok(runner.with_context_max(context_max))
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
pub(crate) fn load(id: &str, path: &Path, share: &Share, metrics: &Metrics) -> Result<Served> {
    let mut loaded =
        model::load(path).with_context(|| format!("cannot load the model {}", path.display()))?;
    let pool = Arc::new(Pool::new(share.n_threads));
    let (generator, model, tokenizer) = if loaded.weights.config.block().causal {
        let tokenizer = tokenizer_of(path, &loaded)?;
        // Its text is as large as the tables made of it.
        loaded.tokenizer = TokenizerFiles::None;
        check_vocab(path, tokenizer.vocab_size(), &loaded)?;
        let template = match &loaded.chat_template {
            Some(source) => Some(chat_template(source, &tokenizer).context("its chat template")?),
            None => None,
        };
        // The peak of memory is still to come.
        tensor::heap::give_back_freed();
        let model = Arc::new(Transformer::new(loaded.weights, &pool)?);
        let adapters = load_adapter(model.config().clone(), pool.clone());
        let engine = start_engine(
            Starting { id, model: model.clone(), pool: &pool, tokenizer: &tokenizer },
            share,
            metrics,
        )?;
        let served = ServedModel::new(id, crate::now_unix_s(), engine, tokenizer.clone(), template);
        (Some(served.with_adapters(adapters)), model, TextTokenizer::Merges(tokenizer))
    } else {
        let TokenizerFiles::Json { tokenizer, .. } = &loaded.tokenizer else {
            bail!("there is no tokenizer.json beside it");
        };
        let tokenizer = WordPiece::from_json(tokenizer)
            .with_context(|| format!("cannot use the tokenizer of {}", path.display()))?;
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
    Arc::new(move |dir| Adapter::load(dir, &config, &pool).map_err(|error| telemetry::chain(&error)))
}

/// A model on its way into an engine.
struct Starting<'a> {
    id: &'a str,
    model: Arc<Transformer>,
    pool: &'a Arc<Pool>,
    tokenizer: &'a Tokenizer,
}

fn start_engine(starting: Starting, share: &Share, metrics: &Metrics) -> Result<Engine> {
    let speculation = share.speculation;
    let limits = EngineLimits { max_running: share.max_running, speculation, ..EngineLimits::default() };
    let runner = share.runner(starting.model.clone(), starting.pool)?;
    let metrics = metrics.engine(starting.id, runner.shape().context_max);
    let Some(path) = &share.draft else {
        return Ok(Engine::start(Box::new(runner), limits, metrics));
    };
    let draft = draft_runner(path, &starting, share, runner.shape().n_blocks);
    let draft = draft.with_context(|| format!("cannot guess with the model {}", path.display()))?;
    Ok(Engine::start_with_draft(Box::new(runner), Box::new(draft), limits, metrics))
}

/// A draft model with room for every sequence of the model it guesses for.
fn draft_runner(path: &Path, target: &Starting, share: &Share, n_blocks: usize) -> Result<ModelRunner> {
    let loaded = model::load(path)?;
    let (n_ids, vocab) = (loaded.weights.config.vocab, target.model.config().vocab);
    if n_ids != vocab {
        bail!("it has {n_ids} ids, {} has {vocab}", target.id);
    }
    let tokenizer = tokenizer_of(path, &loaded)?;
    let differs = |&id: &u32| tokenizer.token_bytes(id) != target.tokenizer.token_bytes(id);
    if let Some(id) = (0..vocab as u32).find(differs) {
        bail!("its tokenizer is another one: they differ at the id {id}");
    }
    let draft = Transformer::new(loaded.weights, target.pool)?;
    let kv_bytes = n_blocks * draft.kv_block_bytes(share.kv_type);
    Ok(ModelRunner::new(draft, target.pool.clone(), share.kv_type, kv_bytes, share.max_running)?)
}

/// The tokenizer of the model that was loaded from `path`.
pub(crate) fn tokenizer_of(path: &Path, loaded: &Loaded) -> Result<Tokenizer> {
    tokenizer(&loaded.tokenizer).with_context(|| format!("cannot use the tokenizer of {}", path.display()))
}

/// Builds the tokenizer that lies beside a model's weights.
pub(crate) fn tokenizer(files: &TokenizerFiles) -> Result<Tokenizer> {
    match files {
        TokenizerFiles::Json { tokenizer, config: Some(config) } => {
            Ok(Tokenizer::from_json_with_config(tokenizer, config)?)
        }
        TokenizerFiles::Json { tokenizer, config: None } => Ok(Tokenizer::from_json(tokenizer)?),
        TokenizerFiles::Gguf(vocab) => Ok(Tokenizer::from_gguf(vocab)?),
        TokenizerFiles::None => bail!("there is no tokenizer.json beside it"),
    }
}

/// Compiles a template for a tokenizer's special tokens.
pub(crate) fn chat_template(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let text = |id: Option<u32>| id.map_or(String::new(), |id| tokenizer.decode_special(&[id]));
    Ok(ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()))?)
}
