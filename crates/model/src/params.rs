//! [`ParamTable`]: where every parameter lies in the one flat vector that training works on.
//!
//! One vector, so that the optimizer, the exchange of gradients between ranks and checkpoints need not know the model.
//! Matrices that multiply the same input lie side by side (q, k, v; gate, up): one product computes them together.

use std::ops::Range;

use tensor::Buf;
use tensor::packed::WeightKind;

use crate::weights::unreadable;
use crate::{Config, Result, WeightTensor, Weights};

/// One tensor's place in the flat vector.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Hugging Face's name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major; a linear map is `[outputs, inputs]`.
    pub dims: Vec<usize>,
    /// Its elements in the flat vector.
    pub range: Range<usize>,
    /// Weight decay applies: matrices yes, norms no.
    pub decay: bool,
    init: Init,
}

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Init {
    Ones,
    Normal { std: f64 },
}

/// Standard deviation of the first weights (GPT-2's).
const INIT_STD: f64 = 0.02;

/// The layout of all parameters of a [`Config`]. Ranges are adjacent, in order, and cover `0..n_params`.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamTable {
    specs: Vec<ParamSpec>,
    pub(crate) embedding: Range<usize>,
    pub(crate) layers: Vec<LayerRanges>,
    pub(crate) final_norm: Range<usize>,
    /// The output projection: its own, or the embedding's range when tied.
    pub(crate) head: Range<usize>,
}

/// Ranges of one layer as the model multiplies with them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LayerRanges {
    pub(crate) attention_norm: Range<usize>,
    /// `[(h + 2g)·d, c]`
    pub(crate) qkv: Range<usize>,
    /// `[c, h·d]`
    pub(crate) output: Range<usize>,
    pub(crate) ff_norm: Range<usize>,
    /// `[2f, c]`
    pub(crate) gate_up: Range<usize>,
    /// `[c, f]`
    pub(crate) down: Range<usize>,
}

impl ParamTable {
    /// Lays out the parameters of a checked configuration.
    pub fn new(config: &Config) -> Self {
        let c = config.width;
        let normal = Init::Normal { std: INIT_STD };
        // Two additions to the residual stream per layer: their variance is kept from growing with depth.
        let residual = Init::Normal { std: INIT_STD / (2.0 * config.n_layers as f64).sqrt() };
        let mut layout = Layout::default();
        let embedding = layout.push("model.embed_tokens", &[config.vocab, c], normal);
        let layers = (0..config.n_layers).map(|l| layout.layer(config, l, [normal, residual])).collect();
        let final_norm = layout.push("model.norm", &[c], Init::Ones);
        let head = if config.tied_embeddings {
            embedding.clone()
        } else {
            layout.push("lm_head", &[config.vocab, c], normal)
        };
        let table = Self { specs: layout.specs, embedding, layers, final_norm, head };
        assert_eq!(table.n_params(), config.n_params(), "the layout and the count disagree");
        table
    }

    /// All tensors, in the order of the flat vector.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Length of the flat vector.
    pub fn n_params(&self) -> usize {
        self.specs.last().map_or(0, |spec| spec.range.end)
    }

    /// Ranges with weight decay, sorted, adjacent ones joined.
    pub fn decayed(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for spec in self.specs.iter().filter(|spec| spec.decay) {
            match ranges.last_mut() {
                Some(last) if last.end == spec.range.start => last.end = spec.range.end,
                _ => ranges.push(spec.range.clone()),
            }
        }
        ranges
    }

    /// First parameters: a pure function of `seed`; parameter i depends on nothing but (seed, i).
    pub fn init(&self, seed: u64) -> Buf<f32> {
        let mut params = Buf::zeroed(self.n_params());
        for spec in &self.specs {
            match spec.init {
                Init::Ones => params[spec.range.clone()].fill(1.0),
                Init::Normal { std } => {
                    for (i, param) in spec.range.clone().zip(&mut params[spec.range.clone()]) {
                        *param = (std * normal(seed, i as u64)) as f32;
                    }
                }
            }
        }
        params
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

/// Tensors laid out so far.
#[derive(Default)]
struct Layout {
    specs: Vec<ParamSpec>,
}

impl Layout {
    fn push(&mut self, module: &str, dims: &[usize], init: Init) -> Range<usize> {
        let start = self.specs.last().map_or(0, |spec| spec.range.end);
        let range = start..start + dims.iter().product::<usize>();
        let name = format!("{module}.weight");
        self.specs.push(ParamSpec {
            name,
            dims: dims.to_vec(),
            range: range.clone(),
            decay: dims.len() > 1,
            init,
        });
        range
    }

    fn layer(&mut self, config: &Config, layer: usize, [normal, residual]: [Init; 2]) -> LayerRanges {
        let (c, f) = (config.width, config.ff_width);
        let (q, kv) = (config.q_width(), config.kv_width());
        let mut push = |module: &str, dims: &[usize], init| {
            self.push(&format!("model.layers.{layer}.{module}"), dims, init)
        };
        let attention_norm = push("input_layernorm", &[c], Init::Ones);
        let q_proj = push("self_attn.q_proj", &[q, c], normal);
        push("self_attn.k_proj", &[kv, c], normal);
        let v_proj = push("self_attn.v_proj", &[kv, c], normal);
        let output = push("self_attn.o_proj", &[c, q], residual);
        let ff_norm = push("post_attention_layernorm", &[c], Init::Ones);
        let gate_proj = push("mlp.gate_proj", &[f, c], normal);
        let up_proj = push("mlp.up_proj", &[f, c], normal);
        let down = push("mlp.down_proj", &[c, f], residual);
        LayerRanges {
            attention_norm,
            qkv: q_proj.start..v_proj.end,
            output,
            ff_norm,
            gate_up: gate_proj.start..up_proj.end,
            down,
        }
    }
}

/// A standard normal number, a function of (seed, index): Box-Muller on two uniform numbers.
fn normal(seed: u64, index: u64) -> f64 {
    let key = mix(seed);
    let unit = |counter: u64| (mix(key ^ counter) >> 11) as f64 / (1_u64 << 53) as f64;
    let (u, angle) = (1.0 - unit(2 * index), std::f64::consts::TAU * unit(2 * index + 1));
    (-2.0 * u.ln()).sqrt() * angle.cos()
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
