//! [`ParamTable`]: where every parameter lies in the one flat vector that training works on.
//!
//! One vector, so that the optimizer, the exchange of gradients between ranks and checkpoints need not know the model.
//! Matrices that multiply the same input lie side by side (q, k, v; gate, up): one product computes them together.

use std::ops::Range;

use tensor::Buf;
use tensor::packed::WeightKind;

use crate::names::{LayerPart, Part};
use crate::transformer::{Linears, Site, Stack};
use crate::weights::unreadable;
use crate::{Config, Result, Stage, WeightTensor, Weights};

/// One tensor's place in the flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Hugging Face's name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major; a linear map is `[outputs, inputs]`.
    pub dims: Vec<usize>,
    /// Its elements in the flat vector.
    pub range: Range<usize>,
    /// Weight decay applies: matrices yes, norms and biases no.
    pub decay: bool,
    init: Init,
}

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    Zeros,
    Ones,
    Normal {
        std: f64,
    },
    /// Between ± bound.
    Uniform {
        bound: f64,
    },
}

/// Standard deviation of the first weights (GPT-2's).
const INIT_STD: f64 = 0.02;

/// The layout of all parameters of a [`Config`]. Ranges are adjacent, in order, and cover `0..n_params`.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamTable {
    specs: Vec<ParamSpec>,
    pub(crate) embedding: Range<usize>,
    /// Learned positions.
    pub(crate) positions: Option<Range<usize>>,
    pub(crate) layers: Vec<LayerRanges>,
    pub(crate) final_norm: NormRange,
    /// The output projection: its own, or the embedding's range when tied. Empty where a stage of a pipeline has none; where
    /// it has a copy of another stage's embedding that lies behind all that is trained.
    pub(crate) head: Range<usize>,
    /// The embedding is the head of another stage.
    pub(crate) is_head_elsewhere: bool,
}

/// A norm's scales, and its shifts right behind them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NormRange {
    pub(crate) weight: Range<usize>,
    pub(crate) bias: Option<Range<usize>>,
}

/// Matrices that share their input as one, `[n_out, n_in]`, and its bias.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LinearRange {
    pub(crate) weight: Range<usize>,
    pub(crate) bias: Option<Range<usize>>,
    pub(crate) n_out: usize,
    pub(crate) n_in: usize,
}

/// Ranges of one layer as the model multiplies with them. What a model lacks is `None`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LayerRanges {
    pub(crate) attention_norm: NormRange,
    /// By [`Site`].
    pub(crate) linears: [LinearRange; Site::ALL.len()],
    /// Scales of the heads of q, then of those of k.
    pub(crate) head_norms: Option<Range<usize>>,
    pub(crate) attention_post_norm: Option<NormRange>,
    pub(crate) ff_norm: NormRange,
    pub(crate) ff_post_norm: Option<NormRange>,
}

impl ParamTable {
    /// Lays out the parameters of a checked configuration.
    ///
    /// # Panics
    /// If the model does not predict, see [`Config::check_trainable`].
    pub fn new(config: &Config) -> Self {
        let table = ParamTable::of_stage(config, &Stage::whole(config));
        assert_eq!(table.n_params(), config.n_params(), "the layout and the count disagree");
        table
    }

    /// Of a stage, whose layers are those of `config`. Names count its layers, and first parameters are not the model's.
    pub(crate) fn of_stage(config: &Config, stage: &Stage) -> Self {
        let (c, v) = (config.width, config.vocab);
        let (is_first, is_last, is_tied) = (stage.is_first(), stage.is_last(), config.tied_embeddings);
        let normal = Init::Normal { std: INIT_STD };
        let mut layout = Layout { config, specs: Vec::new() };
        let embedding = if is_first { layout.push(Part::Embedding, 0, &[v, c], normal) } else { 0..0 };
        let learned = is_first && !config.block().rotary;
        let positions = learned.then(|| layout.push(Part::Positions, 0, &[config.context_max, c], normal));
        let layers = (0..config.n_layers).map(|l| layout.layer(l)).collect();
        let nothing = |n: usize| NormRange { weight: n..n, bias: None };
        let final_norm =
            if is_last { layout.norm(Part::FinalNorm, 0) } else { nothing(n_params(&layout.specs)) };
        let end = n_params(&layout.specs);
        let head = match (is_last, is_tied, is_first) {
            (false, ..) => end..end,
            (true, true, true) => embedding.clone(),
            (true, true, false) => end..end + v * c,
            (true, false, _) => layout.push(Part::Head, 0, &[v, c], normal),
        };
        let is_head_elsewhere = is_first && is_tied && !is_last;
        Self { specs: layout.specs, embedding, positions, layers, final_norm, head, is_head_elsewhere }
    }

    /// All tensors, in the order of the flat vector.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Length of the flat vector.
    pub fn n_params(&self) -> usize {
        n_params(&self.specs)
    }

    /// Numbers of another stage's embedding that lie behind the flat vector.
    pub fn n_copied(&self) -> usize {
        self.n_values() - self.n_params()
    }

    /// Of a flat vector, with a copy of another stage's embedding that may lie behind it.
    pub(crate) fn n_values(&self) -> usize {
        self.n_params().max(self.head.end)
    }

    /// What comes before the layers, every layer, and what comes after them.
    pub(crate) fn units(&self) -> Vec<Range<usize>> {
        let mut borders = vec![0];
        borders.extend(self.layers.iter().map(|layer| layer.attention_norm.weight.start));
        borders.extend([self.final_norm.weight.start, self.n_params()]);
        borders.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    /// Ranges with weight decay, sorted, adjacent ones joined.
    pub fn decayed(&self) -> Vec<Range<usize>> {
        decayed(&self.specs)
    }

    /// First parameters: a pure function of `seed`; parameter i depends on nothing but (seed, i).
    pub fn init(&self, seed: u64) -> Buf<f32> {
        init(&self.specs, seed)
    }

    /// The parameters as named tensors, stored as f32 or rounded to `kind`.
    ///
    /// # Panics
    /// If `config` is not the one the table was made of, or `params` has another length.
    pub fn to_weights(&self, config: &Config, params: &[f32], kind: WeightKind) -> Weights {
        assert_eq!(params.len(), self.n_params());
        assert_eq!(config.n_params(), self.n_params());
        let tensor = |spec: &ParamSpec| {
            let bytes = kind.quantize(&params[spec.range.clone()]);
            (spec.name.clone(), WeightTensor::new(kind, spec.dims.clone(), bytes))
        };
        Weights { config: config.clone(), tensors: self.specs.iter().map(tensor).collect() }
    }

    /// Named tensors, widened to f32, as one vector. Tensors that have no place in it are dropped.
    pub fn from_weights(&self, mut weights: Weights) -> Result<Buf<f32>> {
        let mut params = Buf::zeroed(self.n_params());
        for spec in &self.specs {
            let tensor = weights.take(&spec.name, &spec.dims)?;
            let bytes = tensor.bytes().map_err(|err| unreadable(&spec.name, &err))?;
            tensor.kind.dequantize(&bytes, &mut params[spec.range.clone()]);
        }
        Ok(params)
    }
}

impl ParamSpec {
    /// The tensor that follows `specs`.
    pub(crate) fn after(specs: &[ParamSpec], name: String, dims: &[usize], init: Init) -> Self {
        let start = n_params(specs);
        let range = start..start + dims.iter().product::<usize>();
        Self { name, dims: dims.to_vec(), range, decay: dims.len() > 1, init }
    }
}

pub(crate) fn n_params(specs: &[ParamSpec]) -> usize {
    specs.last().map_or(0, |spec| spec.range.end)
}

/// See [`ParamTable::decayed`].
pub(crate) fn decayed(specs: &[ParamSpec]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for spec in specs.iter().filter(|spec| spec.decay) {
        match ranges.last_mut() {
            Some(last) if last.end == spec.range.start => last.end = spec.range.end,
            _ => ranges.push(spec.range.clone()),
        }
    }
    ranges
}

/// See [`ParamTable::init`].
pub(crate) fn init(specs: &[ParamSpec], seed: u64) -> Buf<f32> {
    let mut params = Buf::zeroed(n_params(specs));
    init_part(specs, seed, 0, &mut params);
    params
}

/// The first parameters from number `first` on.
pub(crate) fn init_part(specs: &[ParamSpec], seed: u64, first: usize, out: &mut [f32]) {
    let end = first + out.len();
    for spec in specs {
        let range = spec.range.start.clamp(first, end)..spec.range.end.clamp(first, end);
        let values = range.clone().zip(&mut out[range.start - first..range.end - first]);
        match spec.init {
            Init::Zeros => {}
            Init::Ones => values.for_each(|(_, param)| *param = 1.0),
            Init::Normal { std } => {
                values.for_each(|(i, param)| *param = (std * normal(seed, i as u64)) as f32);
            }
            Init::Uniform { bound } => {
                let signed = |i: usize| 2.0 * unit(mix(seed), i as u64) - 1.0;
                values.for_each(|(i, param)| *param = (bound * signed(i)) as f32);
            }
        }
    }
}

/// Tensors laid out so far.
struct Layout<'a> {
    config: &'a Config,
    specs: Vec<ParamSpec>,
}

impl Layout<'_> {
    fn push(&mut self, part: Part, l: usize, dims: &[usize], init: Init) -> Range<usize> {
        let name = format!("{}.weight", self.config.architecture.hf_module(part, l));
        self.push_named(name, dims, init)
    }

    fn push_bias(&mut self, part: Part, l: usize, n: usize) -> Range<usize> {
        let name = format!("{}.bias", self.config.architecture.hf_module(part, l));
        self.push_named(name, &[n], Init::Zeros)
    }

    fn push_named(&mut self, name: String, dims: &[usize], init: Init) -> Range<usize> {
        let spec = ParamSpec::after(&self.specs, name, dims, init);
        let range = spec.range.clone();
        self.specs.push(spec);
        range
    }

    fn layer(&mut self, l: usize) -> LayerRanges {
        use LayerPart as L;
        let block = self.config.block();
        let stacks = Linears::of(self.config);
        let attention_norm = self.norm(Part::Layer(L::AttentionNorm), l);
        let qkv = self.linear(&stacks[Site::Qkv], l, INIT_STD);
        let head_norms = block.head_norms.then(|| {
            let mut push = |part| self.push(Part::Layer(part), l, &[self.config.head_width], Init::Ones);
            push(L::QNorm).start..push(L::KNorm).end
        });
        // Two additions to the residual stream per layer: their variance is kept from growing with depth.
        let residual_std = INIT_STD / (2.0 * self.config.n_layers as f64).sqrt();
        let output = self.linear(&stacks[Site::Output], l, residual_std);
        let attention_post_norm = block.post_norms.then(|| self.norm(Part::Layer(L::AttentionPostNorm), l));
        let ff_norm = self.norm(Part::Layer(L::FfNorm), l);
        let up = self.linear(&stacks[Site::Up], l, INIT_STD);
        let down = self.linear(&stacks[Site::Down], l, residual_std);
        let ff_post_norm = block.post_norms.then(|| self.norm(Part::Layer(L::FfPostNorm), l));
        let linears = [qkv, output, up, down];
        LayerRanges { attention_norm, linears, head_norms, attention_post_norm, ff_norm, ff_post_norm }
    }

    fn norm(&mut self, part: Part, l: usize) -> NormRange {
        let c = self.config.width;
        let weight = self.push(part, l, &[c], Init::Ones);
        let bias = self.config.block().layer_norm.then(|| self.push_bias(part, l, c));
        NormRange { weight, bias }
    }

    /// All matrices of a stack, then all its biases.
    fn linear(&mut self, stack: &Stack, l: usize, std: f64) -> LinearRange {
        let n_in = stack.n_in;
        let start = n_params(&self.specs);
        for (part, n_out) in &stack.parts {
            self.push(Part::Layer(*part), l, &[*n_out, n_in], Init::Normal { std });
        }
        let weight = start..n_params(&self.specs);
        if stack.bias {
            for (part, n_out) in &stack.parts {
                self.push_bias(Part::Layer(*part), l, *n_out);
            }
        }
        let bias = stack.bias.then(|| weight.end..n_params(&self.specs));
        let n_out = stack.parts.iter().map(|(_, n_out)| n_out).sum();
        LinearRange { weight, bias, n_out, n_in }
    }
}

/// A standard normal number, a function of (seed, index): Box-Muller on two uniform numbers.
fn normal(seed: u64, index: u64) -> f64 {
    let key = mix(seed);
    let (u, angle) = (1.0 - unit(key, 2 * index), std::f64::consts::TAU * unit(key, 2 * index + 1));
    (-2.0 * u.ln()).sqrt() * angle.cos()
}

/// A uniform number in 0..1.
fn unit(key: u64, counter: u64) -> f64 {
    (mix(key ^ counter) >> 11) as f64 / (1_u64 << 53) as f64
}

/// SplitMix64: the step and the finalizer (Steele, Lea & Flood 2014).
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;

    #[test]
    fn ranges_cover_the_vector_in_order() {
        for tied in [true, false] {
            let config = Config { tied_embeddings: tied, ..tiny() };
            let table = ParamTable::new(&config);
            let mut at = 0;
            for spec in table.specs() {
                assert_eq!(spec.range, at..at + spec.dims.iter().product::<usize>(), "{}", spec.name);
                at = spec.range.end;
            }
            assert_eq!(at, config.n_params());
            assert_eq!(table.head == table.embedding, tied);
            assert_eq!(table.specs().len(), 2 + 9 * config.n_layers + usize::from(!tied));
        }
    }

    #[test]
    fn matrices_decay_and_norms_do_not() {
        let table = ParamTable::new(&tiny());
        let decayed = table.decayed();
        assert!(decayed.windows(2).all(|pair| pair[0].end < pair[1].start));
        for spec in table.specs() {
            let inside =
                decayed.iter().any(|range| range.start <= spec.range.start && spec.range.end <= range.end);
            assert_eq!(inside, !spec.name.contains("norm"), "{}", spec.name);
        }
    }

    #[test]
    fn first_parameters_have_the_promised_moments() {
        let config = Config { vocab: 2000, ..tiny() };
        let table = ParamTable::new(&config);
        let params = table.init(7);
        assert_eq!(&*params, &*table.init(7));
        assert_ne!(&*params, &*table.init(8));
        for spec in table.specs().iter().filter(|spec| spec.dims.len() > 1) {
            let x = &params[spec.range.clone()];
            let n = x.len() as f64;
            let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
            let std = (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n).sqrt();
            let residual = spec.name.contains("o_proj") || spec.name.contains("down_proj");
            let expected = if residual { 0.01 } else { 0.02 }; // two layers: 0.02 / √4
            assert!((std / expected - 1.0).abs() < 4.0 / n.sqrt(), "{}: {std}", spec.name);
            assert!(mean.abs() < 4.0 * expected / n.sqrt(), "{}: {mean}", spec.name);
        }
        let norm = &table.specs()[1];
        assert!(params[norm.range.clone()].iter().all(|x| *x == 1.0));
    }
}
