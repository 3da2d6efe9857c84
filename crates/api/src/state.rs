//! What the handlers share: the models being served, and narrow views of what other parts of the system know.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use constrain::Grammars;
use engine::{Adapter, Engine};
use telemetry::Metrics;
use tokenizer::{ChatTemplate, Tokenizer};
use tokio::sync::Semaphore;

use crate::cluster::Cluster;
use crate::embeddings::Embedders;
use crate::limits::Limits;
use crate::replicas::Replicas;
use crate::runs::Runs;

/// Everything a handler can reach. Clones share it.
#[derive(Clone)]
pub struct AppState {
    pub models: Models,
    pub embedders: Embedders,
    /// Models that other processes serve.
    pub replicas: Replicas,
    pub keys: Arc<dyn KeyChecker>,
    pub runs: Arc<dyn Runs>,
    pub cluster: Arc<dyn Cluster>,
    pub metrics: Metrics,
    pub limits: Arc<Limits>,
    pub lifecycle: Lifecycle,
    /// Seconds since 1970, for `created` stamps. The binary passes the system's clock.
    pub now_unix_s: fn() -> u64,
    /// One permit per large body in memory, and one per large body in work.
    pub(crate) large_bodies: Arc<Semaphore>,
    pub(crate) heavy: Arc<Semaphore>,
    /// One permit per grammar being compiled.
    pub(crate) compiling: Arc<Semaphore>,
}

/// What the binary hands over.
pub struct Parts {
    pub keys: Arc<dyn KeyChecker>,
    pub runs: Arc<dyn Runs>,
    pub cluster: Arc<dyn Cluster>,
    pub metrics: Metrics,
    pub limits: Limits,
    pub now_unix_s: fn() -> u64,
}

impl AppState {
    /// No models yet, and not ready.
    pub fn new(parts: Parts) -> AppState {
        AppState {
            models: Models::default(),
            embedders: Embedders::default(),
            replicas: Replicas::default(),
            keys: parts.keys,
            runs: parts.runs,
            cluster: parts.cluster,
            metrics: parts.metrics,
            large_bodies: Arc::new(Semaphore::new(parts.limits.n_large_bodies)),
            heavy: Arc::new(Semaphore::new(parts.limits.n_heavy)),
            compiling: Arc::new(Semaphore::new(parts.limits.n_compiling)),
            limits: Arc::new(parts.limits),
            lifecycle: Lifecycle::default(),
            now_unix_s: parts.now_unix_s,
        }
    }
}

/// Another part of the system could not answer; the text goes to the log only.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Says whether a key is valid. Asked once per request, so that a revoked key stops at once.
pub trait KeyChecker: Send + Sync {
    /// Called on a blocking thread, where [`KeyChecker::known`] has no answer.
    fn check(&self, key: &str) -> Result<Option<KeyOwner>, Cause>;

    /// What can be said at once, from memory: handing a request to another thread and back costs more than the look.
    fn known(&self, _key: &str) -> Option<Option<KeyOwner>> {
        None
    }

    /// Whom a request without any key belongs to; `None` refuses it. For a server that is open on purpose.
    fn nobody(&self) -> Option<KeyOwner> {
        None
    }
}

/// Whom a key belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyOwner {
    /// Stable; keeps the prefix caches of different keys apart.
    pub id: String,
    /// For the log.
    pub name: String,
    pub role: Role,
}

/// What a key may do; each may what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Ask models.
    Use,
    /// See the cluster; cancel jobs and run them again.
    Member,
    /// Everything.
    Admin,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Use => "use",
            Role::Member => "member",
            Role::Admin => "admin",
        }
    }
}

/// The models being served, by name. They come and go while the server runs.
#[derive(Clone, Default)]
pub struct Models(Arc<RwLock<BTreeMap<String, Arc<ServedModel>>>>);

/// Reads the adapter in a directory for one model. The error is for the client to read.
pub type LoadAdapter = dyn Fn(&Path) -> Result<Adapter, String> + Send + Sync;

/// One model with everything needed to turn text into text.
pub struct ServedModel {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub engine: Engine,
    pub tokenizer: Tokenizer,
    pub template: ChatTemplate,
    /// The model that `adapter` changes, if this is one with an adapter.
    pub parent: Option<String>,
    pub adapter: Option<Adapter>,
    adapters: Option<Arc<LoadAdapter>>,
    /// Ids that end an answer.
    pub stop_ids: Vec<u32>,
    /// Trained on plain text only: the console offers to continue a text instead of a chat.
    pub is_base: bool,
    /// What clients ask answers to look like, compiled for this vocabulary.
    pub(crate) grammars: Arc<Grammars>,
    /// Bytes of the longest token: a text longer than this times the context cannot fit.
    pub(crate) token_bytes_max: usize,
}

impl ServedModel {
    /// The end-of-text id and whatever of [`END_OF_TURN`] the vocabulary has become the stop ids.
    /// A model without a template is a base model and chats through the plain one.
    pub fn new(
        id: &str,
        created: u64,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
    ) -> ServedModel {
        let mut stop_ids: Vec<u32> = tokenizer.eos().into_iter().collect();
        let ends = END_OF_TURN.iter().filter_map(|name| tokenizer.id_of(name));
        stop_ids.extend(ends.filter(|&id| tokenizer.is_special(id)));
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let ids = 0..tokenizer.vocab_size() as u32;
        let token_bytes_max = ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(1).max(1);
        let is_base = template.is_none();
        let grammars = Arc::new(Grammars::new(&tokenizer, engine.vocab(), &stop_ids));
        let template = template.unwrap_or_else(ChatTemplate::plain);
        ServedModel {
            id: id.to_owned(),
            created,
            engine,
            tokenizer,
            template,
            parent: None,
            adapter: None,
            adapters: None,
            stop_ids,
            is_base,
            grammars,
            token_bytes_max,
        }
    }

    /// The same, with a way to load adapters for it.
    #[must_use]
    pub fn with_adapters(self, load: Arc<LoadAdapter>) -> ServedModel {
        ServedModel { adapters: Some(load), ..self }
    }

    /// This model, changed by the adapter in the directory `dir`; the engine is shared. Blocks. The error is for the
    /// client to read.
    pub fn adapted(&self, id: &str, created: u64, dir: &Path) -> Result<ServedModel, String> {
        let load = self.adapters.as_ref().ok_or_else(|| format!("{} takes no adapters", self.id))?;
        Ok(ServedModel {
            id: id.to_owned(),
            created,
            engine: self.engine.clone(),
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            parent: Some(self.id.clone()),
            adapter: Some(load(dir)?),
            adapters: None,
            stop_ids: self.stop_ids.clone(),
            is_base: self.is_base,
            grammars: self.grammars.clone(),
            token_bytes_max: self.token_bytes_max,
        })
    }

    /// Prompt and answer together, in tokens.
    pub fn context_max(&self) -> usize {
        self.engine.context_max()
    }
}

/// Names under which chat models of today end a turn; only special tokens count.
const END_OF_TURN: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "</s>",
];

impl Models {
    /// Serves `model` from now on, in place of an older one of the same name and that one's adapters; running requests go
    /// on.
    pub fn insert(&self, model: ServedModel) {
        let mut models = self.0.write().unwrap_or_else(PoisonError::into_inner);
        models.retain(|_, other| other.parent.as_ref() != Some(&model.id));
        models.insert(model.id.clone(), Arc::new(model));
    }

    /// Serves `model`, unless its name is taken.
    pub fn insert_new(&self, model: ServedModel) -> bool {
        let mut models = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match models.entry(model.id.clone()) {
            Entry::Vacant(place) => {
                place.insert(Arc::new(model));
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    /// The model that was served under this name. It lives until its last request has ended.
    /// Its adapters go with it.
    pub fn remove(&self, id: &str) -> Option<Arc<ServedModel>> {
        let mut models = self.0.write().unwrap_or_else(PoisonError::into_inner);
        models.retain(|_, model| model.parent.as_deref() != Some(id));
        models.remove(id)
    }

    pub fn get(&self, id: &str) -> Option<Arc<ServedModel>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Arc<ServedModel>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// Where the server is in its life, and how much it has to finish. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle(Arc<LifecycleInner>);

#[derive(Debug, Default)]
struct LifecycleInner {
    ready: AtomicBool,
    draining: AtomicBool,
    n_in_flight: AtomicUsize,
}

impl Lifecycle {
    /// Everything that should be served is loaded: `/health/ready` says yes from now on.
    pub fn set_ready(&self) {
        self.0.ready.store(true, Ordering::Release);
    }

    /// New requests are refused with 503 from now on; running ones go on.
    pub fn start_draining(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    pub fn is_ready(&self) -> bool {
        self.0.ready.load(Ordering::Acquire) && !self.is_draining()
    }

    /// Requests whose answer is not wholly sent, probes aside.
    pub fn n_in_flight(&self) -> usize {
        self.0.n_in_flight.load(Ordering::Acquire)
    }

    /// Counts one request until the guard is dropped.
    pub(crate) fn enter(&self) -> InFlight {
        self.0.n_in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight(self.clone())
    }
}

#[derive(Debug)]
pub(crate) struct InFlight(Lifecycle);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.0.n_in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
