//! Adapters through the engine: who has one and who has not share steps and blocks of memory, and no result.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{Adapter, Engine, EngineLimits, Event, ModelRunner, Request, Sampling, TokenId, Usage};
use model::{KvType, Transformer, load};
use telemetry::Metrics;
use tensor::Pool;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden").join(path)
}

struct Served {
    engine: Engine,
    adapters: [Adapter; 2],
}

fn start() -> Served {
    let pool = Arc::new(Pool::new(2));
    let model = Transformer::new(load(&golden("models/llama")).unwrap().weights, &pool).unwrap();
    let adapters = ["adapters/llama_all", "adapters/llama_qv_rs"]
        .map(|name| Adapter::load(&golden(name), model.config(), &pool).unwrap());
    let runner = ModelRunner::new(model, pool, KvType::F32, 4 << 20, 8).unwrap();
    let engine =
        Engine::start(Box::new(runner), EngineLimits::default(), Metrics::new().engine("adapters", 96));
    Served { engine, adapters }
}

fn submit(served: &Served, adapter: Option<usize>) -> engine::Stream {
    let prompt: Vec<TokenId> = (3..53).collect();
    let mut request = Request::new(prompt, 30, Sampling::greedy());
    request.adapter = adapter.map(|which| served.adapters[which].clone());
    served.engine.submit(request).unwrap()
}

fn read(mut stream: engine::Stream) -> (Vec<TokenId>, Usage) {
    let mut ids = Vec::new();
    loop {
        match stream.recv().expect("a stream ends with Finished") {
            Event::Token { id, .. } => ids.push(id),
            Event::Finished { usage, .. } => return (ids, usage),
            Event::PromptLogprobs(_) => (),
        }
    }
}

/// What the plain model left in the prefix cache is not found under an adapter, nor one adapter's under another; its own is.
#[test]
fn adapters_share_no_cached_prefix() {
    let alone = [None, Some(0), Some(1)].map(|adapter| read(submit(&start(), adapter)).0);
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2], "{alone:?}");
    let served = start();
    for (round, n_cached_least) in [(0, 0), (1, 32)] {
        for (adapter, alone) in [None, Some(0), Some(1)].into_iter().zip(&alone) {
            let (ids, usage) = read(submit(&served, adapter));
            assert_eq!(&ids, alone, "{adapter:?} in round {round}");
            let expected = if round == 0 { usage.cached == 0 } else { usage.cached >= n_cached_least };
            assert!(expected, "{adapter:?} in round {round}: {} cached", usage.cached);
        }
    }
}

#[test]
fn adapters_share_batches() {
    let wanted = [None, Some(0), Some(1), Some(0), None, Some(1)];
    let alone = [None, Some(0), Some(1)].map(|adapter| read(submit(&start(), adapter)).0);
    let served = start();
    let streams = wanted.map(|adapter| submit(&served, adapter));
    for (adapter, stream) in wanted.into_iter().zip(streams) {
        assert_eq!(read(stream).0, alone[adapter.map_or(0, |which| which + 1)], "{adapter:?}");
    }
}
