//! Writes GGUF files, version 3, that llama.cpp loads.

use std::borrow::Cow;
use std::io::Write;

use tensor::packed::WeightKind;
use tokenizer::GgufVocab;

use super::MAGIC;
use super::config::{GEMMA3_GROUP, gemma3_query_scalar};
use super::tensors::{ROPE_DIVISORS, interleaved, kind_id};
use crate::names::{LayerPart, Part, split_suffix, to_gguf};
use crate::weights::unreadable;
use crate::{Architecture, Config, Error, Result, RopeScaling, WeightTensor, Weights, Window};

const VERSION: u32 = 3;
/// The format's default.
const ALIGNMENT: usize = 32;
/// `tokenizer.ggml.token_type` of ids that are never used.
const UNUSED: i32 = 5;

// Types of metadata values.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// What goes into a file beside the weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// What people call the model.
    pub name: &'a str,
    /// Its tokenizer. Ids that the model has and the tokenizer does not are written as unused.
    pub vocab: Option<&'a GgufVocab>,
    /// Jinja source.
    pub chat_template: Option<&'a str>,
}

/// Writes a file. Vectors (norms, biases) become F32, as llama.cpp wants them; matrices stay as they are.
///
/// # Errors
/// If the architecture or a tensor has no name in GGUF, the tokenizer has more ids than the model, or reading or writing
/// fails.
pub fn write(out: &mut dyn Write, weights: &Weights, extras: Extras<'_>) -> Result<()> {
    let config = &weights.config;
    if !config.block().causal {
        let problem = format!("files of {} models are not written", config.architecture.gguf_name());
        return Err(bad("general.architecture", problem));
    }
    if let Some(window) = config.window.as_ref().filter(|_| config.architecture == Architecture::Gemma3)
        && window.layers != Window::full_every(GEMMA3_GROUP, config.n_layers)
    {
        let problem = format!("not every {GEMMA3_GROUP}th layer sees everything, as readers take it to be");
        return Err(bad("gemma3.attention.sliding_window", problem));
    }
    let divisors = divisors(config).map(|values| WeightTensor::from_f32(&[values.len()], &values));
    let mut tensors = weights
        .tensors
        .iter()
        .map(|(name, tensor)| Planned::new(name, tensor, config))
        .collect::<Result<Vec<_>>>()?;
    tensors.extend(divisors.iter().map(Planned::divisors));
    let mut pairs = Pairs::default();
    describe(&mut pairs, weights, extras)?;
    let failed = |source| Error::WriteTo { what: "the GGUF file".to_owned(), source };
    out.write_all(&head(&tensors, &pairs)).map_err(failed)?;
    for tensor in &tensors {
        let bytes = tensor.data(config).map_err(|err| unreadable(&tensor.name, &err))?;
        out.write_all(&bytes).map_err(failed)?;
        let padding = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        out.write_all(&[0; ALIGNMENT][..padding]).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

/// All that comes before the tensors' numbers.
fn head(tensors: &[Planned<'_>], pairs: &Pairs) -> Vec<u8> {
    let mut head = Vec::new();
    head.extend(MAGIC.to_le_bytes());
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((pairs.n as u64).to_le_bytes());
    head.extend(&pairs.bytes);
    let mut at = 0;
    for tensor in tensors {
        tensor.describe(at, &mut head);
        at += tensor.n_bytes().next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    head
}

/// What RoPE's frequencies are divided by, where metadata have no word for the scaling.
fn divisors(config: &Config) -> Option<Vec<f32>> {
    match &config.rope.scaling {
        RopeScaling::Divisors(divisors) => Some(divisors.clone()),
        RopeScaling::Llama3 { .. } => {
            let plain = crate::Rope::plain(config.rope.theta).frequencies(config.head_width);
            let scaled = config.rope.frequencies(config.head_width);
            Some(plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect())
        }
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn { .. } => None,
    }
}

/// A tensor on its way into the file.
struct Planned<'a> {
    /// GGUF's name.
    name: String,
    kind: WeightKind,
    /// llama.cpp turns neighbours (2i, 2i + 1) of its heads together, and not halves.
    in_pairs: bool,
    /// Its numbers are multiplied by this.
    scale: f32,
    tensor: &'a WeightTensor,
}

impl<'a> Planned<'a> {
    fn new(hf_name: &str, tensor: &'a WeightTensor, config: &Config) -> Result<Planned<'a>> {
        let name = to_gguf(hf_name, config).ok_or_else(|| Error::Tensor {
            name: hf_name.to_owned(),
            problem: "GGUF has no name for it in this architecture".to_owned(),
        })?;
        let part = split_suffix(hf_name).and_then(|(module, _)| config.architecture.part_of_hf(module));
        let in_pairs = part.is_some_and(|part| interleaved(config.architecture, part));
        let kind = if tensor.dims.len() == 1 { WeightKind::F32 } else { tensor.kind };
        let scale = if part == Some(Part::Layer(LayerPart::QNorm)) { query_scale(config) } else { 1.0 };
        Ok(Planned { name, kind, in_pairs, scale, tensor })
    }

    fn divisors(tensor: &'a WeightTensor) -> Planned<'a> {
        Planned { name: ROPE_DIVISORS.to_owned(), kind: WeightKind::F32, in_pairs: false, scale: 1.0, tensor }
    }

    fn n_bytes(&self) -> usize {
        self.kind.bytes(self.tensor.n_elems()).expect("vectors become floats, the others keep their kind")
    }

    fn describe(&self, at: usize, head: &mut Vec<u8>) {
        push_text(head, &self.name);
        head.extend((self.tensor.dims.len() as u32).to_le_bytes());
        self.tensor.dims.iter().rev().for_each(|dim| head.extend((*dim as u64).to_le_bytes()));
        head.extend(kind_id(self.kind).to_le_bytes());
        head.extend((at as u64).to_le_bytes());
    }

    fn data(&self, config: &Config) -> std::io::Result<Cow<'a, [u8]>> {
        if self.kind != self.tensor.kind || self.scale != 1.0 {
            let values: Vec<f32> = self.tensor.to_f32()?.into_iter().map(|x| x * self.scale).collect();
            return Ok(self.kind.quantize(&values).into());
        }
        let bytes = self.tensor.bytes()?;
        Ok(match self.in_pairs {
            true => pair_order(&bytes, self.tensor.dims[0], config.head_width).into(),
            false => bytes,
        })
    }
}

/// Files of Gemma 3 do not say what scores are divided by. Where a model has another divisor than readers take it to be,
/// the scales of its queries make up for it.
fn query_scale(config: &Config) -> f32 {
    let Config { n_layers, width, n_heads, head_width, .. } = *config;
    let implied = gemma3_query_scalar(n_layers, width, n_heads, head_width);
    config.query_scalar.map_or(1.0, |actual| (implied / actual).sqrt())
}

fn bad(field: &str, problem: String) -> Error {
    Error::Gguf { field: field.to_owned(), problem }
}

/// The inverse of what reading does to interleaved rows.
fn pair_order(bytes: &[u8], n_rows: usize, d: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / n_rows;
    let source = |row: usize| {
        let (head, i) = (row / d, row % d);
        head * d + i / 2 + i % 2 * (d / 2)
    };
    (0..n_rows).flat_map(|row| &bytes[source(row) * row_bytes..][..row_bytes]).copied().collect()
}

/// All metadata.
fn describe(pairs: &mut Pairs, weights: &Weights, extras: Extras<'_>) -> Result<()> {
    pairs.text("general.architecture", weights.config.architecture.gguf_name());
    pairs.text("general.type", "model");
    if !extras.name.is_empty() {
        pairs.text("general.name", extras.name);
    }
    pairs.u32("general.file_type", file_type(most_bytes(weights)));
    if weights.tensors.values().any(|t| t.kind.is_quantized()) {
        pairs.u32("general.quantization_version", 2);
    }
    describe_config(pairs, &weights.config);
    if let Some(vocab) = extras.vocab {
        describe_vocab(pairs, vocab, &weights.config)?;
    }
    if let Some(template) = extras.chat_template {
        pairs.text("tokenizer.chat_template", template);
    }
    Ok(())
}

/// The shape; what reading takes it from is in `config.rs`.
fn describe_config(pairs: &mut Pairs, config: &Config) {
    let name = config.architecture.gguf_name();
    // Readers know a window for Gemma 3 alone. Others are exact as far as their window reaches.
    let knows_windows = config.architecture == Architecture::Gemma3;
    let window = config.window.as_ref();
    let reach = window.filter(|_| !knows_windows).map_or(config.context_max, |window| window.n_positions);
    for (key, value) in [
        ("block_count", config.n_layers),
        ("context_length", config.context_max.min(reach)),
        ("embedding_length", config.width),
        ("feed_forward_length", config.ff_width),
        ("vocab_size", config.vocab),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
    ] {
        // Every count of a checked configuration fits.
        pairs.u32(&format!("{name}.{key}"), value as u32);
    }
    let eps = if config.block().layer_norm { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
    pairs.f32(&format!("{name}.attention.{eps}"), config.norm_eps);
    if config.block().rotary {
        for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            pairs.u32(&format!("{name}.{key}"), config.head_width as u32);
        }
        pairs.f32(&format!("{name}.rope.freq_base"), config.rope.theta);
        describe_scaling(pairs, config);
    }
    if let Some(window) = window.filter(|_| knows_windows) {
        pairs.u32(&format!("{name}.attention.sliding_window"), window.n_positions as u32);
        if let Some(theta) = window.rope_theta {
            pairs.f32(&format!("{name}.rope.freq_base_swa"), theta);
        }
    }
}

fn describe_scaling(pairs: &mut Pairs, config: &Config) {
    let name = config.architecture.gguf_name();
    let key = |rest: &str| format!("{name}.rope.scaling.{rest}");
    match config.rope.scaling {
        RopeScaling::Linear { factor } => {
            pairs.text(&key("type"), "linear");
            pairs.f32(&key("factor"), factor);
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            pairs.text(&key("type"), "yarn");
            pairs.f32(&key("factor"), factor);
            pairs.u32(&key("original_context_length"), original_context as u32);
            pairs.f32(&key("yarn_beta_fast"), beta_fast);
            pairs.f32(&key("yarn_beta_slow"), beta_slow);
            // Relative to the factor that YaRN itself prescribes.
            pairs.f32(&key("attn_factor"), attention_factor / crate::config::yarn_attention_factor(factor));
        }
        // These are a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => {}
    }
}

fn describe_vocab(pairs: &mut Pairs, vocab: &GgufVocab, config: &Config) -> Result<()> {
    let n_tokens = vocab.tokens.len();
    let n_unused = config.vocab.checked_sub(n_tokens).ok_or_else(|| {
        bad("tokenizer.ggml.tokens", format!("{n_tokens} tokens for a model of {}", config.vocab))
    })?;
    pairs.text("tokenizer.ggml.model", &vocab.model);
    if let Some(pre) = &vocab.pre {
        pairs.text("tokenizer.ggml.pre", pre);
    }
    let unused: Vec<String> = (vocab.tokens.len()..config.vocab).map(|id| format!("[PAD{id}]")).collect();
    pairs.texts("tokenizer.ggml.tokens", vocab.tokens.iter().chain(&unused));
    if !vocab.scores.is_empty() {
        let scores: Vec<f32> = vocab.scores.iter().copied().chain(vec![0.0; n_unused]).collect();
        pairs.numbers("tokenizer.ggml.scores", F32, scores.iter().map(|x| x.to_le_bytes()));
    }
    if !vocab.token_types.is_empty() {
        let types: Vec<i32> = vocab.token_types.iter().copied().chain(vec![UNUSED; n_unused]).collect();
        pairs.numbers("tokenizer.ggml.token_type", I32, types.iter().map(|x| x.to_le_bytes()));
    }
    if !vocab.merges.is_empty() {
        pairs.texts("tokenizer.ggml.merges", vocab.merges.iter());
    }
    let ids = [
        ("bos_token_id", vocab.bos.or(config.bos)),
        ("eos_token_id", vocab.eos.or(config.eos.first().copied())),
        ("unknown_token_id", vocab.unk),
    ];
    for (key, id) in ids {
        id.into_iter().for_each(|id| pairs.u32(&format!("tokenizer.ggml.{key}"), id));
    }
    for (key, flag) in [("add_bos_token", vocab.add_bos), ("add_space_prefix", vocab.add_space_prefix)] {
        flag.into_iter().for_each(|flag| pairs.bool(&format!("tokenizer.ggml.{key}"), flag));
    }
    Ok(())
}

/// The kind that most bytes of the matrices have.
fn most_bytes(weights: &Weights) -> WeightKind {
    let bytes = |kind: WeightKind| {
        weights.tensors.values().filter(|t| t.kind == kind).map(WeightTensor::n_bytes).sum::<usize>()
    };
    WeightKind::ALL.into_iter().max_by_key(|kind| bytes(*kind)).unwrap_or(WeightKind::F32)
}

/// `general.file_type`: llama.cpp's number for files that are mostly of this kind. It is shown, not relied on.
fn file_type(kind: WeightKind) -> u32 {
    let known = [
        ("F32", 0),
        ("F16", 1),
        ("Q4_0", 2),
        ("Q4_1", 3),
        ("Q8_0", 7),
        ("Q5_0", 8),
        ("Q5_1", 9),
        ("Q4_K", 15),
        ("Q5_K", 17),
        ("Q6_K", 18),
        ("BF16", 32),
    ];
    known.iter().find(|(name, _)| *name == kind.name()).map_or(0, |(_, id)| *id)
}

/// Metadata, encoded.
#[derive(Default)]
struct Pairs {
    n: usize,
    bytes: Vec<u8>,
}

impl Pairs {
    fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.n += 1;
        push_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        &mut self.bytes
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, U32).extend(value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, F32).extend(value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, BOOL).push(value.into());
    }

    fn text(&mut self, key: &str, value: &str) {
        push_text(self.key(key, TEXT), value);
    }

    fn texts<'a>(&mut self, key: &str, values: impl Iterator<Item = &'a String> + Clone) {
        let bytes = self.key(key, ARRAY);
        bytes.extend(TEXT.to_le_bytes());
        bytes.extend((values.clone().count() as u64).to_le_bytes());
        values.for_each(|value| push_text(bytes, value));
    }

    fn numbers(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) {
        let bytes = self.key(key, ARRAY);
        bytes.extend(kind.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| bytes.extend(value));
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::read_from;
    use super::*;
    use crate::config::tests::tiny;
    use crate::source::Source;
    use crate::weights::Order;
    use crate::{ParamTable, Rope};

    fn read(bytes: Vec<u8>) -> super::super::Gguf {
        read_from(&Source::Memory(Arc::new(bytes))).unwrap()
    }

    fn vocab() -> GgufVocab {
        GgufVocab {
            model: "gpt2".into(),
            pre: Some("llama-bpe".into()),
            tokens: (0..48).map(|i| format!("t{i}")).collect(),
            scores: Vec::new(),
            token_types: vec![1; 48],
            merges: vec!["t 1".into()],
            bos: Some(1),
            eos: Some(0),
            unk: None,
            add_bos: Some(true),
            add_space_prefix: None,
        }
    }

    #[test]
    fn reading_gives_back_what_was_written() {
        for tied_embeddings in [true, false] {
            let config = Config { tied_embeddings, bos: Some(1), ..tiny() };
            let table = ParamTable::new(&config);
            let weights = table.to_weights(&config, &table.init(3), WeightKind::Bf16);
            let vocab = vocab();
            let extras = Extras { name: "tiny", vocab: Some(&vocab), chat_template: Some("{{ x }}") };
            let mut bytes = Vec::new();
            write(&mut bytes, &weights, extras).unwrap();
            let read = read(bytes);
            assert_eq!(read.weights.config, config);
            assert_eq!(read.weights.tensors.len(), weights.tensors.len());
            for (name, tensor) in &weights.tensors {
                let found = &read.weights.tensors[name];
                let vector = tensor.dims.len() == 1;
                assert_eq!(found.kind, if vector { WeightKind::F32 } else { WeightKind::Bf16 }, "{name}");
                assert_eq!(found.to_f32().unwrap(), tensor.to_f32().unwrap(), "{name}");
            }
            let found = read.vocab.unwrap();
            assert_eq!((found.tokens.len(), found.tokens[49].as_str()), (50, "[PAD49]"));
            assert_eq!(found.token_types[47..], [1, UNUSED, UNUSED]);
            assert_eq!((found.merges, found.bos, found.add_bos), (vocab.merges, Some(1), Some(true)));
            assert_eq!(read.chat_template.as_deref(), Some("{{ x }}"));
        }
    }

    /// Every way to stretch a context comes back as what it does to the frequencies.
    #[test]
    fn scaled_positions_come_back() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.1386294,
        };
        let linear = RopeScaling::Linear { factor: 2.0 };
        let divisors = RopeScaling::Divisors(vec![1.0, 2.0, 3.0, 4.5]);
        for scaling in [linear, yarn, llama3, divisors] {
            let config = Config { rope: Rope { theta: 500_000.0, scaling }, ..tiny() };
            let table = ParamTable::new(&config);
            let weights = table.to_weights(&config, &table.init(3), WeightKind::F32);
            let mut bytes = Vec::new();
            write(&mut bytes, &weights, Extras::default()).unwrap();
            let found = read(bytes).weights.config.rope;
            let pairs = found.frequencies(8).into_iter().zip(config.rope.frequencies(8));
            pairs.for_each(|(a, b)| assert!((a / b - 1.0).abs() < 1e-4, "{found:?} of {config:?}"));
        }
    }

    #[test]
    fn pair_order_undoes_half_order() {
        let rows: Vec<u8> = (0..24).collect();
        let there = pair_order(&rows, 24, 8);
        assert_eq!(there[..8], [0, 4, 1, 5, 2, 6, 3, 7]);
        assert_eq!(Order::Interleaved(8).apply(WeightKind::F32, &[24, 1], there), rows);
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let config = tiny();
        let table = ParamTable::new(&config);
        let mut weights = table.to_weights(&config, &table.init(3), WeightKind::F32);
        let many = GgufVocab { tokens: vec!["x".into(); 51], ..GgufVocab::default() };
        let extras = Extras { vocab: Some(&many), ..Extras::default() };
        let error = write(&mut Vec::new(), &weights, extras).unwrap_err().to_string();
        assert!(error.contains("51 tokens for a model of 50"), "{error}");
        weights.tensors.insert("model.mystery.weight".into(), WeightTensor::from_f32(&[1], &[0.0]));
        let error = write(&mut Vec::new(), &weights, Extras::default()).unwrap_err().to_string();
        assert!(error.contains("model.mystery.weight"), "{error}");
    }
}
