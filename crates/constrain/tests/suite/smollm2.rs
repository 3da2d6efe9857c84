//! A real model and its tokenizer, held to grammars by the engine. Skipped, loudly, where the file has not been fetched.

use std::path::PathBuf;
use std::sync::Arc;

use constrain::{Grammars, Source};
use engine::{Engine, EngineLimits, Event, FinishReason, ModelRunner, Request, Sampling};
use model::{KvType, TokenizerFiles, Transformer};
use serde_json::Value;
use telemetry::Metrics;
use tensor::Pool;
use tokenizer::Tokenizer;

use crate::gbnf::{ARITHMETIC, CHESS, JSON};

struct Served {
    engine: Engine,
    tokenizer: Tokenizer,
    grammars: Grammars,
}

impl Served {
    fn load() -> Option<Served> {
        let path =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../var/cache/smollm2-135m-instruct-q4_1.gguf");
        if !path.is_file() {
            eprintln!("SKIPPED: {} is missing; `./run` fetches it", path.display());
            return None;
        }
        let loaded = model::load(&path).expect("the model file is good");
        let TokenizerFiles::Gguf(vocab) = &loaded.tokenizer else { panic!("a GGUF file has its vocabulary") };
        let tokenizer = Tokenizer::from_gguf(vocab).expect("the vocabulary is good");
        let pool = Arc::new(Pool::new(2));
        let transformer = Transformer::new(loaded.weights, &pool).expect("the model is good");
        let kv_bytes = 64 * transformer.kv_block_bytes(KvType::Bf16);
        let runner = ModelRunner::new(transformer, pool, KvType::Bf16, kv_bytes, 4).expect("blocks fit");
        let engine =
            Engine::start(Box::new(runner), EngineLimits::default(), Metrics::new().engine("test", 1024));
        let ends: Vec<u32> = tokenizer.eos().into_iter().collect();
        let grammars = Grammars::new(&tokenizer, engine.vocab(), &ends);
        Some(Served { engine, tokenizer, grammars })
    }

    /// An answer, and whether the grammar let it end.
    fn answer(&self, prompt: &str, grammar: &str, seed: u64) -> (String, bool) {
        let prompt = format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n");
        let sampling = Sampling { seed, temperature: 0.8, ..Sampling::default() };
        let mut request = Request::new(self.tokenizer.encode_special(&prompt), 160, sampling);
        request.constraint = Some(self.grammars.compile(&Source::from_grammar(grammar.into())).unwrap());
        request.stop_ids = self.tokenizer.eos().into_iter().collect();
        let (mut ids, mut is_whole) = (Vec::new(), false);
        let mut stream = self.engine.submit(request).unwrap();
        while let Some(event) = stream.recv() {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Finished { reason, .. } => is_whole = reason == FinishReason::Stop,
                _ => (),
            }
        }
        (self.tokenizer.decode(&ids), is_whole)
    }
}

#[test]
fn a_real_model_answers_in_the_grammar() {
    let Some(served) = Served::load() else { return };
    // Four answers to each, and more until some have come to their end: which do is chance, and another processor's chance.
    let mut n_whole = 0;
    for seed in 0..24 {
        if seed >= 4 && n_whole > 2 {
            break;
        }
        let (text, is_whole) = served.answer("Describe Paris as a JSON object.", JSON, seed);
        n_whole += usize::from(is_whole);
        match serde_json::from_str::<Value>(&text) {
            Ok(_) => (),
            Err(e) => assert!(!is_whole && e.is_eof(), "{e}: {text}"),
        }
        let (text, is_whole) = served.answer("What is 2 + 3 * 4?", ARITHMETIC, seed);
        n_whole += usize::from(is_whole);
        assert!(!is_whole || text.ends_with('\n') && text.contains('='), "{text:?}");
        assert!(!text.contains(|c: char| c.is_ascii_uppercase() || c == '.'), "{text:?}");
        let (text, is_whole) = served.answer("Play a game of chess.", CHESS, seed);
        n_whole += usize::from(is_whole);
        assert!(text.starts_with(|c: char| c.is_ascii_digit()) && text.contains(". "), "{text:?}");
        assert!(!is_whole || ["1-0", "0-1", "½-½"].iter().any(|end| text.ends_with(end)), "{text:?}");
    }
    assert!(n_whole > 2, "{n_whole} answers of 72 came to their end");
}
