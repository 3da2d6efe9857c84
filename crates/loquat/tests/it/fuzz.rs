//! Files that somebody else made, damaged at random: every reader must answer with an error or a value, in bounded memory.
//!
//! Each target mutates the files of `fixtures/fuzz/<target>/` and what it can build itself. A failure prints the seed of
//! the input, which is written to the temporary directory; fixed, it belongs into the corpus. `./test --long` runs each for
//! a minute, every other run a few hundred inputs.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use constrain::{Grammars, Source};
use gateway::Random;
use model::{Config, gguf};
use serde_json::json;
use tokenizer::{ChatTemplate, GgufVocab, Tokenizer};

use crate::support::root;
use crate::tiny;

const ITERATIONS: u64 = 300;
const LONG: Duration = Duration::from_secs(60);
/// One input may not take longer: a server that loads a bad file must not hang.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);
/// What reading any input may add to the process: the inputs have some 100 kB.
const MEMORY_MAX: u64 = 512 << 20;

/// Numbers that readers get wrong.
const EDGES: [u64; 12] =
    [0, 1, 2, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX];

/// One to four damages, most of them near the front, where headers are.
fn mutate(bytes: &mut Vec<u8>, words: &[&str], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let len = bytes.len();
        let front = if random.below(4) > 0 { len.min(2000) } else { len };
        let at = random.below(front.max(1));
        match random.below(8) {
            0 if len > 0 => bytes[at] ^= 1 << random.below(8),
            1 if len > 0 => bytes[at] = random.next_u64() as u8,
            2 => bytes.truncate(at),
            3 if len >= 8 => {
                let (at, width) = (at.min(len - 8), [1, 2, 4, 8][random.below(4)]);
                let number = EDGES[random.below(EDGES.len())].to_le_bytes();
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            4 => {
                let end = (at + random.below(64)).min(len);
                let piece = bytes[at..end].to_vec();
                let to = random.below(len + 1);
                bytes.splice(to..to, piece);
            }
            5 => drop(bytes.drain(at..(at + random.below(64)).min(len))),
            6 => {
                let word = words[random.below(words.len())];
                bytes.splice(at..at, word.bytes());
            }
            _ => replace_number(bytes, random),
        }
    }
}

/// Replaces a decimal number of a text by one that readers get wrong.
fn replace_number(bytes: &mut Vec<u8>, random: &mut Random) {
    let digits: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i].is_ascii_digit()).take(4000).collect();
    let Some(&start) = digits.get(random.below(digits.len().max(1))) else { return };
    let n = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    let number = EDGES[random.below(EDGES.len())].to_string();
    bytes.splice(start..start + n, number.bytes());
}

/// Bytes of memory that this process has had at most.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Runs `read` on damaged copies of the corpus; it may return whatever it likes, but must return.
fn fuzz(target: &str, mut corpus: Vec<Vec<u8>>, words: &[&str], read: impl Fn(&[u8])) {
    let dir = root().join("fixtures/fuzz").join(target);
    let mut files: Vec<_> =
        fs::read_dir(&dir).map_or(Vec::new(), |files| files.map(|f| f.unwrap().path()).collect());
    files.sort();
    corpus.extend(files.iter().map(|path| fs::read(path).unwrap()));
    assert!(!corpus.is_empty(), "{target} has no corpus");
    corpus.iter().for_each(|bytes| check(target, "the corpus", bytes, &read));
    let before = peak_memory();
    let started = Instant::now();
    let mut seed = 0;
    while if cfg!(feature = "long") { started.elapsed() < LONG } else { seed < ITERATIONS } {
        let mut random = Random::new(seed);
        let mut bytes = corpus[random.below(corpus.len())].clone();
        mutate(&mut bytes, words, &mut random);
        check(target, &format!("seed {seed}"), &bytes, &read);
        // The kernel counts in batches, so that the peak may even fall a little.
        let grown = peak_memory().saturating_sub(before);
        assert!(
            grown < MEMORY_MAX,
            "{target}, seed {seed}: {grown} bytes of memory; {}",
            keep(target, &bytes)
        );
        seed += 1;
    }
    eprintln!("{target}: {seed} inputs in {:.1} s", started.elapsed().as_secs_f64());
}

fn check(target: &str, what: &str, bytes: &[u8], read: &impl Fn(&[u8])) {
    let started = Instant::now();
    if catch_unwind(AssertUnwindSafe(|| read(bytes))).is_err() {
        panic!("{target}, {what}: panicked; {}", keep(target, bytes));
    }
    let took = started.elapsed();
    assert!(took < INPUT_TIME_MAX, "{target}, {what}: took {took:?}; {}", keep(target, bytes));
}

/// Keeps an input that broke something.
fn keep(target: &str, bytes: &[u8]) -> String {
    let path = std::env::temp_dir().join(format!("loquat-fuzz-{target}-{}", std::process::id()));
    fs::write(&path, bytes).unwrap();
    format!("the input is {}", path.display())
}

#[test]
fn damaged_gguf_files_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::directory(dir.path(), "tiny");
    let loaded = model::load(&model).unwrap();
    let words: Vec<String> = ["a", "b", "ab", "<|im_end|>"].map(str::to_owned).into();
    let n_ids = loaded.weights.config.vocab;
    let tokens = words.into_iter().chain((4..n_ids).map(|i| format!("t{i}"))).collect();
    let vocab =
        GgufVocab { model: "gpt2".into(), tokens, merges: vec!["a b".into()], ..GgufVocab::default() };
    let mut file = Vec::new();
    let extras = gguf::Extras { name: "tiny", vocab: Some(&vocab), chat_template: Some(tiny::TEMPLATE) };
    gguf::write(&mut file, &loaded.weights, extras).unwrap();
    let path = dir.path().join("damaged.gguf");
    fuzz("gguf", vec![file], &["llama", "gemma3", "gpt2", "\u{0}", "blk.0.", ".weight"], |bytes| {
        fs::write(&path, bytes).unwrap();
        if let Ok(gguf) = gguf::read(&path) {
            let pool = tensor::Pool::new(1);
            // What is read must also be packed or refused.
            if let Ok(model) = model::Transformer::new(gguf.weights, &pool) {
                assert!(model.weight_bytes() > 0);
            }
            if let Some(Ok(tokenizer)) = gguf.vocab.as_ref().map(Tokenizer::from_gguf) {
                use_tokenizer(&tokenizer);
            }
        }
    });
}

/// What a tokenizer encodes, it can decode.
fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["Hello, wörld! 123\n\n  <|im_end|> ▁x", "", "日本語 e\u{301}"] {
        let ids = tokenizer.encode_special(text);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{text:?} gives {ids:?}");
        tokenizer.decode_special(&ids);
    }
}

#[test]
fn damaged_directories_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::directory(dir.path(), "tiny");
    let tensors = fs::read(model.join("model.safetensors")).unwrap();
    let path = model.join("model.safetensors");
    fuzz("safetensors", vec![tensors.clone()], &["F64", "BF16", "[", "\"", "-1"], |bytes| {
        fs::write(&path, bytes).unwrap();
        read_directory(&model);
    });
    fs::write(&path, tensors).unwrap();
    let config = model.join("config.json");
    let original = fs::read(&config).unwrap();
    fuzz("config", vec![original], &["null", "{}", "[]", "\"gelu\"", "1e400", "-3"], |bytes| {
        fs::write(&config, bytes).unwrap();
        let Ok(config) = Config::from_json(bytes) else { return };
        config.check().unwrap();
        read_directory(&model);
    });
}

#[test]
fn damaged_grammars_are_compiled_or_refused() {
    let tokenizer = Tokenizer::from_json(&tiny::tokenizer_json()).unwrap();
    let grammars = Grammars::new(&tokenizer, tokenizer.vocab_size(), &[0]);
    let corpus = [
        "root ::= value\nvalue ::= \"[\" (value (\",\" value)*)? \"]\" | text\ntext ::= \"'\" [^'\\x00-\\x1f]{0,9} \"'\"\n",
        "root ::= (sum \"\\n\")+ # lines\nsum ::= part ([-+*/] part)*\npart ::= [0-9]+ | \"(\" sum \")\"\n",
        "root ::= \"\\u00e9\\U0001F600\" . [\\]a-] end\nend ::= ([ \\t] end)?\n",
    ];
    let words = [
        "root",
        "::=",
        "(",
        ")*",
        "{9999,}",
        "{0,3}",
        "[^a-z]",
        "\"\\xff\"",
        " | ",
        "#",
        "value",
        "end?",
        ".",
    ];
    fuzz("grammar", corpus.map(|text| text.as_bytes().to_vec()).into(), &words, |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        // What it says in Lark must be Lark.
        if let Err(why) = grammars.compile(&Source::Gbnf(text.into())) {
            let why = why.to_string();
            let ours = ["line ", "a grammar needs", "too ", "no possible", "limit"];
            assert!(ours.iter().any(|known| why.contains(known)), "{why}");
        }
    });
}

fn read_directory(dir: &Path) {
    if let Ok(loaded) = model::load(dir)
        && let Ok(model) = model::Transformer::new(loaded.weights, &tensor::Pool::new(1))
    {
        assert!(model.weight_bytes() > 0);
    }
}

#[test]
fn damaged_tokenizers_are_read_or_refused() {
    let golden = |name: &str| {
        fs::read(root().join(format!("fixtures/golden/tokenizer/{name}.tokenizer.json"))).unwrap()
    };
    let corpus = ["gpt2", "smollm2", "llama3", "llama2"].map(golden).into();
    let words = ["null", "\"Regex\": \"(a+)+$\"", "\"type\": \"Split\"", "[[", "\\u0000", "\"id\": 99999999"];
    fuzz("tokenizer", corpus, &words, |bytes| {
        if let Ok(tokenizer) = Tokenizer::from_json(bytes) {
            use_tokenizer(&tokenizer);
        }
    });
}

#[test]
fn damaged_chat_templates_are_used_or_refused() {
    let tokenizer = Tokenizer::from_json(&tiny::tokenizer_json()).unwrap();
    let messages = [
        json!({"role": "system", "content": "be brief"}),
        json!({"role": "user", "content": "<|im_end|>{{ x }}"}),
    ];
    let words = [
        "{{ ",
        " }}",
        "{% for i in range(999999999) %}",
        "{% endfor %}",
        "{% if ",
        "[0]",
        " * 99999999",
        "~ x",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "'a' * 100000000",
        "| join",
        "|tojson",
        "namespace(",
    ];
    fuzz("template", vec![tiny::TEMPLATE.as_bytes().to_vec()], &words, |bytes| {
        let Ok(source) = std::str::from_utf8(bytes) else { return };
        if let Ok(template) = ChatTemplate::new(source, "<s>", "</s>")
            && let Ok(ids) = template.encode(&tokenizer, &messages, true)
        {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        }
    });
}
