use std::sync::Arc;

use tensor::Pool;
use tensor::packed::WeightKind;

use super::*;
use crate::{Config, Rope, RopeScaling, Transformer};

/// A GGUF file in the making. What it says need not be true.
#[derive(Clone)]
struct Draft {
    magic: u32,
    version: u32,
    /// Counts to claim instead of the true ones.
    n_tensors: Option<u64>,
    n_pairs: Option<u64>,
    /// Key, type, value as stored.
    pairs: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<DraftTensor>,
    alignment: usize,
}

#[derive(Clone)]
struct DraftTensor {
    name: String,
    /// As GGUF stores them: inputs first.
    dims: Vec<u64>,
    kind: u32,
    bytes: Vec<u8>,
    /// To claim instead of the true one.
    offset: Option<u64>,
}

fn kind_id(kind: WeightKind) -> u32 {
    match kind {
        WeightKind::F32 => 0,
        WeightKind::F16 => 1,
        WeightKind::Q4_0 => 2,
        WeightKind::Q4_1 => 3,
        WeightKind::Q5_0 => 6,
        WeightKind::Q5_1 => 7,
        WeightKind::Q8_0 => 8,
        WeightKind::Q4_K => 12,
        WeightKind::Q5_K => 13,
        WeightKind::Q6_K => 14,
        WeightKind::Bf16 => 30,
    }
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

fn texts(values: &[&str]) -> Vec<u8> {
    let head = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    values.iter().fold(head, |bytes, value| [bytes, text(value)].concat())
}

impl Draft {
    /// One layer, width 32, 2 heads and 1 key/value head of 16, 64 feed-forward, 3 ids; matrices of `kind`.
    fn tiny(kind: WeightKind) -> Self {
        let mut draft = Self {
            magic: MAGIC,
            version: 3,
            n_tensors: None,
            n_pairs: None,
            pairs: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        };
        draft.set("general.architecture", 8, text("llama"));
        for (key, value) in [
            ("block_count", 1u32),
            ("context_length", 40),
            ("embedding_length", 32),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("rope.dimension_count", 16),
        ] {
            draft.set(&format!("llama.{key}"), 4, value.to_le_bytes().to_vec());
        }
        draft.set("llama.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec());
        draft.set("tokenizer.ggml.model", 8, text("gpt2"));
        draft.set("tokenizer.ggml.tokens", 9, texts(&["a", "b", "ab"]));
        draft.set("tokenizer.ggml.merges", 9, texts(&["a b"]));
        draft.set("tokenizer.ggml.eos_token_id", 4, 2u32.to_le_bytes().to_vec());
        draft.set("tokenizer.ggml.add_bos_token", 7, vec![0]);
        draft.set("tokenizer.chat_template", 8, text("{{ messages }}"));
        for (name, dims) in [
            ("token_embd", &[32, 3][..]),
            ("output_norm", &[32]),
            ("blk.0.attn_norm", &[32]),
            ("blk.0.attn_q", &[32, 32]),
            ("blk.0.attn_k", &[32, 16]),
            ("blk.0.attn_v", &[32, 16]),
            ("blk.0.attn_output", &[32, 32]),
            ("blk.0.ffn_norm", &[32]),
            ("blk.0.ffn_gate", &[32, 64]),
            ("blk.0.ffn_up", &[32, 64]),
            ("blk.0.ffn_down", &[64, 32]),
        ] {
            draft.push(&format!("{name}.weight"), dims, if dims.len() == 1 { WeightKind::F32 } else { kind });
        }
        draft
    }

    fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) {
        self.pairs.retain(|(other, ..)| other != key);
        self.pairs.push((key.to_owned(), kind, value));
    }

    fn set_u32(&mut self, key: &str, value: u32) {
        self.set(key, 4, value.to_le_bytes().to_vec());
    }

    /// Adds a tensor of numbers that differ.
    fn push(&mut self, name: &str, dims: &[u64], kind: WeightKind) {
        let n: u64 = dims.iter().product();
        let values: Vec<f32> = (0..n).map(|i| ((i * 37 + n) % 101) as f32 / 101.0 - 0.5).collect();
        let (dims, bytes) = (dims.to_vec(), kind.quantize(&values));
        self.tensors.push(DraftTensor { name: name.into(), dims, kind: kind_id(kind), bytes, offset: None });
    }

    fn tensor(&mut self, name: &str) -> &mut DraftTensor {
        self.tensors.iter_mut().find(|t| t.name == name).expect("a tensor of the draft")
    }

    fn bytes(&self) -> Vec<u8> {
        let mut file = [self.magic.to_le_bytes(), self.version.to_le_bytes()].concat();
        file.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        file.extend(self.n_pairs.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.pairs {
            file.extend(text(key));
            file.extend(kind.to_le_bytes());
            file.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            file.extend(text(&tensor.name));
            file.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        file.resize(file.len().next_multiple_of(self.alignment), 0);
        [file, data].concat()
    }
}

fn parse(bytes: &[u8]) -> Result<Gguf> {
    read_from(&Source::Memory(Arc::new(bytes.to_vec())))
}

#[test]
fn a_file_is_read_whole() {
    // Rows of 32 weights hold no block of 256.
    let kinds = WeightKind::ALL.into_iter().filter(|kind| kind.block_elems() <= 32);
    for (kind, version) in kinds.zip([2, 3].into_iter().cycle()) {
        let draft = Draft { version, ..Draft::tiny(kind) };
        let Gguf { weights, vocab, chat_template } = parse(&draft.bytes()).unwrap();
        let config = &weights.config;
        assert_eq!((config.n_layers, config.width, config.ff_width, config.vocab), (1, 32, 64, 3));
        assert_eq!((config.n_heads, config.n_kv_heads, config.head_width), (2, 1, 16));
        assert_eq!((config.norm_eps, config.rope.theta, config.context_max), (1e-5, 10_000.0, 40));
        assert!(config.tied_embeddings && config.bos.is_none() && config.eos == [2]);
        let vocab = vocab.unwrap();
        assert_eq!(
            (vocab.tokens, vocab.merges),
            (vec!["a".into(), "b".into(), "ab".into()], vec!["a b".into()])
        );
        assert_eq!((vocab.model.as_str(), vocab.add_bos, vocab.eos), ("gpt2", Some(false), Some(2)));
        assert_eq!(chat_template.as_deref(), Some("{{ messages }}"));
        assert_eq!(weights.tensors.len(), 11);
        let down = &weights.tensors["model.layers.0.mlp.down_proj.weight"];
        assert_eq!((down.kind, &down.dims[..]), (kind, &[32, 64][..]));
        assert_eq!(*down.bytes().unwrap(), *draft.clone().tensor("blk.0.ffn_down.weight").bytes);
        Transformer::new(weights, &Pool::new(1)).unwrap();
    }
}

#[test]
fn rows_of_q_and_k_come_in_rotate_half_order() {
    let mut draft = Draft::tiny(WeightKind::F32);
    let row_numbers: Vec<f32> = (0..32 * 32).map(|i| (i / 32) as f32).collect();
    draft.tensor("blk.0.attn_q.weight").bytes = WeightKind::F32.quantize(&row_numbers);
    let weights = parse(&draft.bytes()).unwrap().weights;
    let q = weights.tensors["model.layers.0.self_attn.q_proj.weight"].to_f32().unwrap();
    let order: Vec<usize> = q.iter().step_by(32).map(|&row| row as usize).collect();
    let head: Vec<usize> = (0..16).step_by(2).chain((1..16).step_by(2)).collect();
    assert_eq!(order, [head.clone(), head.iter().map(|row| row + 16).collect()].concat());
}

/// Divisors that are Llama 3's become its scaling, which `config.json` can say; others stay as they are.
#[test]
fn divisors_of_frequencies_are_read() {
    let llama3 = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let plain = Rope::plain(10_000.0).frequencies(16);
    let scaled = Rope { theta: 10_000.0, scaling: llama3.clone() }.frequencies(16);
    let divisors: Vec<f32> =
        plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect();
    let others: Vec<f32> = divisors.iter().map(|x| x * 1.5).collect();
    for (divisors, expected) in [(divisors, llama3), (others.clone(), RopeScaling::Divisors(others))] {
        let mut draft = Draft::tiny(WeightKind::F32);
        draft.push("rope_freqs.weight", &[8], WeightKind::F32);
        draft.tensor("rope_freqs.weight").bytes = WeightKind::F32.quantize(&divisors);
        let config = parse(&draft.bytes()).unwrap().weights.config;
        assert_eq!(config.rope.scaling, expected);
        assert_eq!(Config::from_json(config.to_json("float32").as_bytes()).unwrap(), config);
    }
}

#[test]
fn an_output_matrix_unties_the_embedding() {
    let mut draft = Draft::tiny(WeightKind::Q8_0);
    draft.push("output.weight", &[32, 3], WeightKind::Q8_0);
    let weights = parse(&draft.bytes()).unwrap().weights;
    assert!(!weights.config.tied_embeddings);
    Transformer::new(weights, &Pool::new(1)).unwrap();
}

/// Changes a good file; reading it, or building the model of it, must fail with an error that names the culprit.
fn refused(culprit: &str, change: impl FnOnce(&mut Draft)) {
    let mut draft = Draft::tiny(WeightKind::Q4_1);
    change(&mut draft);
    let built = parse(&draft.bytes()).and_then(|gguf| Transformer::new(gguf.weights, &Pool::new(1)));
    let Err(error) = built else { panic!("{culprit}: the lie was believed") };
    let message = error.to_string();
    assert!(message.contains(culprit) && message.len() < 400, "{culprit}: {message}");
}

#[test]
fn lying_heads_are_refused() {
    refused("magic", |d| d.magic = 0x1234_5678);
    refused("version", |d| d.version = 1);
    refused("version", |d| d.version = 4);
    refused("big-endian", |d| d.version = 3u32.swap_bytes());
    for n in [12, 1 << 20, 1 << 63, u64::MAX] {
        refused("", |d| d.n_tensors = Some(n));
        refused("", |d| d.n_pairs = Some(n));
    }
    refused("tensor count", |d| d.n_tensors = Some(1 << 40));
    refused("metadata count", |d| d.n_pairs = Some(u64::MAX));
}

#[test]
fn lying_metadata_is_refused() {
    const ARCHITECTURE: &str = "general.architecture";
    refused(ARCHITECTURE, |d| d.set(ARCHITECTURE, 8, text("mamba")));
    refused("qwen3.attention.head_count", |d| d.set(ARCHITECTURE, 8, text("qwen3")));
    refused(ARCHITECTURE, |d| d.set(ARCHITECTURE, 8, u64::MAX.to_le_bytes().to_vec()));
    refused(ARCHITECTURE, |d| d.set(ARCHITECTURE, 8, [&4u64.to_le_bytes()[..], &[0xff; 4]].concat()));
    refused(ARCHITECTURE, |d| d.pairs.retain(|(key, ..)| key != ARCHITECTURE));
    refused("is there twice", |d| d.pairs.push((ARCHITECTURE.into(), 8, text("llama"))));
    refused("unknown type 13", |d| d.set("x", 13, vec![0; 8]));
    refused("2 is not a bool", |d| d.set("x", 7, vec![2]));
    let array = |kind: u32, n: u64| [&kind.to_le_bytes()[..], &n.to_le_bytes()].concat();
    for (kind, n) in [(4, u64::MAX), (8, 1 << 60), (0, 1 << 40), (12, 1 << 20)] {
        refused("x: ", |d| d.set("x", 9, array(kind, n)));
    }
    refused("array of arrays", |d| d.set("x", 9, array(9, 1)));
    for key in
        ["block_count", "embedding_length", "attention.head_count", "context_length", "feed_forward_length"]
    {
        let key = format!("llama.{key}");
        refused(&key, |d| d.pairs.retain(|(other, ..)| *other != key));
        refused(&key, |d| d.set(&key, 8, text("7")));
        refused(&key, |d| d.set(&key, 11, (-1i64).to_le_bytes().to_vec()));
        refused("", |d| d.set_u32(&key, 0));
        refused("", |d| d.set_u32(&key, u32::MAX));
    }
    refused("num_key_value_heads", |d| d.set_u32("llama.attention.head_count_kv", 3));
    refused("llama.rope.dimension_count", |d| d.set_u32("llama.attention.key_length", 8));
    refused("llama.expert_count", |d| d.set_u32("llama.expert_count", 8));
    refused("llama.rope.scaling.type", |d| d.set("llama.rope.scaling.type", 8, text("longrope")));
    refused("llama.rope.scaling.factor", |d| d.set("llama.rope.scaling.type", 8, text("yarn")));
    refused("llama.attention.sliding_window", |d| d.set_u32("llama.attention.sliding_window", 8));
    refused("llama.final_logit_softcapping", |d| {
        d.set("llama.final_logit_softcapping", 6, 30f32.to_le_bytes().to_vec());
    });
    refused("rms_norm_eps", |d| {
        d.set("llama.attention.layer_norm_rms_epsilon", 6, f32::NAN.to_le_bytes().to_vec());
    });
    refused("general.alignment", |d| d.set_u32("general.alignment", 0));
    refused("general.alignment", |d| d.set_u32("general.alignment", 48));
    refused("eos_token_id", |d| d.set_u32("tokenizer.ggml.eos_token_id", 3));
    refused("tokenizer.ggml.tokens", |d| d.set("tokenizer.ggml.tokens", 9, texts(&["a"])));
    refused("tokenizer.ggml.scores", |d| {
        d.set("tokenizer.ggml.scores", 9, [array(6, 1), vec![0; 4]].concat())
    });
}

#[test]
fn lying_tensors_are_refused() {
    const Q: &str = "blk.0.attn_q.weight";
    const UP: &str = "blk.0.ffn_up.weight";
    refused("has 0 dimensions", |d| d.tensor(Q).dims = vec![]);
    refused("has 5 dimensions", |d| d.tensor(Q).dims = vec![32, 1, 1, 1, 32]);
    refused(Q, |d| d.tensor(Q).dims = vec![0, 32]);
    refused(Q, |d| d.tensor(Q).dims = vec![1 << 32, 1 << 32]);
    refused(Q, |d| d.tensor(Q).dims = vec![u64::MAX, 32]);
    refused(Q, |d| d.tensor(Q).dims = vec![16, 64]);
    refused("past the end", |d| d.tensor(Q).dims = vec![32, 1 << 40]);
    refused("past the end", |d| d.tensor(UP).offset = Some(1 << 40));
    refused(UP, |d| d.tensor(UP).offset = Some(u64::MAX - 31));
    refused("not aligned", |d| d.tensor(UP).offset = Some(8));
    refused("overlaps", |d| d.tensor(UP).offset = Some(0));
    refused("Q2_K", |d| d.tensor(Q).kind = 10);
    refused("not whole blocks of Q6_K", |d| d.tensor(Q).kind = 14);
    refused("kind 77", |d| d.tensor(Q).kind = 77);
    refused("blk.0.attn_q.bias", |d| d.push("blk.0.attn_q.bias", &[32], WeightKind::F32));
    refused("blk.1.attn_q.weight", |d| d.push("blk.1.attn_q.weight", &[32, 32], WeightKind::F32));
    refused("rope_freqs.weight", |d| d.push("rope_freqs.weight", &[7], WeightKind::F32));
    refused("rope_freqs.weight", |d| {
        d.push("rope_freqs.weight", &[8], WeightKind::F32);
        d.tensor("rope_freqs.weight").bytes = WeightKind::F32.quantize(&[-1.0; 8]);
    });
    refused("is there twice", |d| d.push(Q, &[32, 32], WeightKind::F32));
    refused("token_embd.weight", |d| d.tensors.retain(|t| t.name != "token_embd.weight"));
    refused("self_attn.q_proj", |d| d.tensors.retain(|t| t.name != Q));
    refused("mlp.up_proj", |d| d.tensor(UP).dims = vec![64, 32]);
    refused("model.norm", |d| d.tensor("output_norm.weight").dims = vec![32, 1]);
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let bytes = Draft::tiny(WeightKind::Q4_0).bytes();
    assert!(parse(&bytes).is_ok());
    for n in 0..bytes.len() {
        assert!(parse(&bytes[..n]).is_err(), "the first {n} of {} bytes were believed", bytes.len());
    }
    assert!(read(Path::new("/nonexistent.gguf")).unwrap_err().to_string().contains("/nonexistent.gguf"));
}

/// Whatever bit is wrong, reading ends without a panic and holds no more than the file did.
#[test]
fn flipped_bits_do_no_harm() {
    let bytes = Draft::tiny(WeightKind::Q8_0).bytes();
    let pool = Pool::new(1);
    let mut n_read = 0;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let Ok(Gguf { weights, .. }) = parse(&flipped) else { continue };
            n_read += 1;
            let held: usize = weights.tensors.values().map(|t| t.n_bytes()).sum();
            assert!(held <= bytes.len(), "byte {at} bit {bit}: {held} bytes of tensors");
            // Building the model costs more; bits of the data change nothing about it.
            if n_read % 64 == 0 {
                drop(Transformer::new(weights, &pool));
            }
        }
    }
    assert!(n_read > 8 * bytes.len() / 2, "most bits are data, yet only {n_read} files were read");
}
