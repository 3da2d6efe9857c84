//! From a description to a grammar over a model's vocabulary, compiled once and kept for a while.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use engine::Constraint;
use llguidance::api::ParserLimits;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use tokenizer::{TokenId, Tokenizer};

use crate::cache::Cache;
use crate::source::Source;
use crate::state::{State, plain};
use crate::vocabulary;

/// Grammars kept for the next request that asks for the same.
const CACHED_MAX: usize = 64;
/// Compiling is recursive in places, and what it recurses over comes from outside. Only pages that are touched count.
const STACK_BYTES: usize = 256 << 20;

/// Why a description is not usable. The text is for whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    #[error("{0}")]
    Invalid(String),
    /// Our own failure, e.g. no thread to be had.
    #[error("compiling a grammar failed: {0}")]
    Internal(String),
}

/// The grammars of one model. Threads share it.
pub struct Grammars {
    tokenizer: Tokenizer,
    n_ids: usize,
    stop_ids: Vec<TokenId>,
    /// Made when first needed: a tenth of a second, and some MB, that most models never spend.
    factory: OnceLock<Result<ParserFactory, String>>,
    cache: Mutex<Cache>,
}

impl Grammars {
    /// `n_ids` is the width of the model's logits; `stop_ids` end an output, where its grammar is complete.
    pub fn new(tokenizer: &Tokenizer, n_ids: usize, stop_ids: &[TokenId]) -> Grammars {
        Grammars {
            tokenizer: tokenizer.clone(),
            n_ids,
            stop_ids: stop_ids.to_vec(),
            factory: OnceLock::new(),
            cache: Mutex::default(),
        }
    }

    /// A constraint at its beginning, if this grammar was compiled lately. Takes microseconds.
    pub fn cached(&self, source: &Source) -> Option<Box<dyn Constraint>> {
        let state = self.cache().get(&source.key())?;
        Some(Constraint::fork(&*state))
    }

    /// A constraint at its beginning. Takes milliseconds, for the most complex descriptions that are allowed up to
    /// seconds: not for a thread that others wait for.
    pub fn compile(&self, source: &Source) -> Result<Box<dyn Constraint>, CompileError> {
        if let Some(constraint) = self.cached(source) {
            return Ok(constraint);
        }
        let state = Arc::new(self.compile_apart(source)?);
        self.cache().insert(source.key(), state.clone(), CACHED_MAX);
        Ok(Constraint::fork(&*state))
    }

    /// Grammars in the cache.
    pub fn n_cached(&self) -> usize {
        self.cache().len()
    }

    fn compile_apart(&self, source: &Source) -> Result<State, CompileError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
            let compiling = thread.spawn_scoped(scope, || self.compile_here(source));
            let compiling = compiling.map_err(|e| CompileError::Internal(e.to_string()))?;
            compiling.join().unwrap_or_else(|_| Err(CompileError::Internal("it panicked".into())))
        })
    }

    fn compile_here(&self, source: &Source) -> Result<State, CompileError> {
        let grammar = source.grammar(&|spelled| self.token(spelled))?;
        let factory = self.factory.get_or_init(|| self.new_factory());
        let factory = factory.as_ref().map_err(|why| CompileError::Internal(why.clone()))?;
        let invalid = |why: &str| CompileError::Invalid(plain(why));
        let parser = factory.create_parser(grammar).map_err(|e| invalid(&e.to_string()))?;
        State::new(Matcher::new(Ok(parser))).map_err(|e| invalid(&e))
    }

    /// The token that a grammar names, by its text or by its number: `<think>`, `<[1000]>`.
    fn token(&self, spelled: &str) -> Option<TokenId> {
        match spelled.strip_prefix("<[").and_then(|rest| rest.strip_suffix("]>")) {
            Some(number) => number.parse().ok().filter(|id| (*id as usize) < self.tokenizer.vocab_size()),
            None => self.tokenizer.id_of(spelled),
        }
    }

    fn new_factory(&self) -> Result<ParserFactory, String> {
        let environment = vocabulary::environment(&self.tokenizer, self.n_ids, &self.stop_ids);
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| e.to_string())?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(factory)
    }

    /// Every critical section leaves the cache valid, so poison carries no news.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a grammar may cost. llguidance counts work, not time; the times are its own figures.
fn limits() -> ParserLimits {
    ParserLimits {
        // 20 ms at 50,000 a millisecond, once.
        initial_lexer_fuel: 1_000_000,
        // 4 ms at 14,000 and 1 ms at 20,000 a millisecond: what one token of one output may add to a step.
        step_lexer_fuel: 60_000,
        step_max_items: 20_000,
        // 1 to 2 kB each.
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}
