//! [`Transformer`]: a model packed for inference. [`crate::Config`] and its [`crate::Block`] say what it is made of.

use tensor::Pool;
use tensor::packed::Packed;
use tensor::paged_attention::AttentionSpec;
use tensor::rope::RopeTable;

pub use tensor::paged_attention::{BLOCK_TOKENS, KvCache, KvType};

use crate::config::N_TOKEN_TYPES;
use crate::names::{LayerPart, Part};
use crate::weights::unreadable;
use crate::{Config, Error, Result, Weights};

/// Positions a model is served with at most, whatever its configuration says: the table of rotations is made for all of
/// them. 2^17 positions · 32 frequencies · 2 · 4 B = 32 MiB.
const CONTEXT_MAX: usize = 1 << 17;

/// A model packed for inference.
pub struct Transformer {
    pub(crate) config: Config,
    pub(crate) embedding_vc: Packed,
    /// Learned positions, `[t, c]`; empty where positions are turned in.
    pub(crate) positions_tc: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Norm,
    /// `None` when the embedding serves as the output projection.
    head_vc: Option<Packed>,
    /// Angles of layers that see everything, and of those with a window of their own frequencies.
    ropes: [Option<RopeTable>; 2],
}

/// The weights of one layer, and what its attention is.
pub(crate) struct Layer {
    /// Its place in the model.
    pub(crate) l: usize,
    pub(crate) attention: AttentionSpec,
    /// Which of the angles it uses.
    rope_idx: usize,
    pub(crate) attention_norm: Norm,
    /// q, k, v, or all in one: one stack.
    pub(crate) qkv: Linear,
    /// Norms of the heads of q and k.
    pub(crate) head_norms_d: Option<[Vec<f32>; 2]>,
    pub(crate) output: Linear,
    pub(crate) attention_post_norm: Option<Norm>,
    pub(crate) ff_norm: Norm,
    /// gate and up, or up alone: one stack.
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) ff_post_norm: Option<Norm>,
}

/// Matrices that share their input, and one bias for all their outputs.
pub(crate) struct Linear {
    pub(crate) stack: Vec<Packed>,
    pub(crate) bias_o: Option<Vec<f32>>,
}

/// Where in a layer a stack of matrices stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    Qkv,
    Output,
    Up,
    Down,
}

impl Site {
    pub(crate) const ALL: [Site; 4] = [Self::Qkv, Self::Output, Self::Up, Self::Down];
}

/// The stacks of every layer: roles and outputs of their matrices.
pub(crate) struct Linears([Stack; Site::ALL.len()]);

pub(crate) struct Stack {
    pub(crate) parts: Vec<(LayerPart, usize)>,
    pub(crate) n_in: usize,
    pub(crate) bias: bool,
}

impl Linears {
    pub(crate) fn of(config: &Config) -> Self {
        use LayerPart as L;
        let block = config.block();
        let (c, q, kv, f) = (config.width, config.q_width(), config.kv_width(), config.ff_width);
        let qkv = match block.fused_qkv {
            true => vec![(L::Qkv, q + 2 * kv)],
            false => vec![(L::Q, q), (L::K, kv), (L::V, kv)],
        };
        let up = match block.activation.is_gated() {
            true => vec![(L::Gate, f), (L::Up, f)],
            false => vec![(L::Up, f)],
        };
        let stack = |parts, n_in, bias| Stack { parts, n_in, bias };
        Self([
            stack(qkv, c, block.qkv_bias),
            stack(vec![(L::Output, c)], q, block.bias),
            stack(up, c, block.bias),
            stack(vec![(L::Down, c)], f, block.bias),
        ])
    }
}

impl std::ops::Index<Site> for Linears {
    type Output = Stack;

    fn index(&self, site: Site) -> &Stack {
        &self.0[site as usize]
    }
}

/// RMSNorm, or with a bias LayerNorm.
pub(crate) struct Norm {
    pub(crate) w_c: Vec<f32>,
    pub(crate) bias_c: Option<Vec<f32>>,
}

impl Transformer {
    /// Packs `weights`, each tensor read from its file piece by piece: hardly more than one copy is ever in memory.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape than the configuration says, or is left over.
    pub fn new(mut weights: Weights, pool: &Pool) -> Result<Self> {
        let config = weights.config.clone();
        config.check()?;
        let mut loader = Loader { weights: &mut weights, config: &config, pool };
        let embedding_vc = loader.matrix(Part::Embedding, 0, [config.vocab, config.width])?;
        let positions_tc = loader.positions()?;
        let layers = (0..config.n_layers).map(|l| loader.layer(l)).collect::<Result<_>>()?;
        let norm = match config.block().normed_stream {
            true => loader.norm(Part::Layer(LayerPart::FfPostNorm), config.n_layers - 1)?,
            false => loader.norm(Part::FinalNorm, 0)?,
        };
        let head_vc = loader.head()?;
        if let Some(name) = weights.tensors.into_keys().next() {
            return Err(Error::Tensor { name, problem: "is not part of this architecture".into() });
        }
        let ropes = config.rope_tables(config.context_max.min(CONTEXT_MAX));
        Ok(Self { config, embedding_vc, positions_tc, layers, norm, head_vc, ropes })
    }

    /// Shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Positions a sequence may have.
    pub fn context_max(&self) -> usize {
        self.config.context_max.min(CONTEXT_MAX)
    }

    /// Bytes of all packed matrices in memory.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            [&layer.qkv, &layer.output, &layer.up, &layer.down].into_iter().flat_map(|linear| &linear.stack)
        });
        layers.chain([&self.embedding_vc]).chain(&self.head_vc).map(Packed::bytes).sum()
    }

    /// Bytes of weights that computing one token reads: all but an embedding that is only looked up.
    pub fn bytes_per_token(&self) -> usize {
        self.weight_bytes() - self.head_vc.as_ref().map_or(0, |_| self.embedding_vc.bytes())
    }

    /// A cache of `n_blocks` blocks of [`BLOCK_TOKENS`] positions for this model.
    pub fn new_kv(&self, n_blocks: usize, kv_type: KvType) -> KvCache {
        KvCache::new(self.config.kv_dims(), kv_type, n_blocks)
    }

    /// Bytes of one block of the cache.
    pub fn kv_block_bytes(&self, kv_type: KvType) -> usize {
        self.config.kv_block_bytes(kv_type)
    }

    /// The output projection.
    pub(crate) fn head(&self) -> &Packed {
        self.head_vc.as_ref().unwrap_or(&self.embedding_vc)
    }

    /// What is multiplied after the last product of `layer`.
    pub(crate) fn after(&self, layer: &Layer) -> &[Packed] {
        match self.layers.get(layer.l + 1) {
            Some(next) => &next.qkv.stack,
            None => std::slice::from_ref(self.head()),
        }
    }

    /// The angles of a layer; `None` where positions are learned.
    pub(crate) fn rope_of(&self, layer: &Layer) -> Option<&RopeTable> {
        self.ropes[layer.rope_idx].as_ref()
    }
}

/// Takes tensors by their roles and packs them.
struct Loader<'a> {
    weights: &'a mut Weights,
    config: &'a Config,
    pool: &'a Pool,
}

impl Loader<'_> {
    fn layer(&mut self, l: usize) -> Result<Layer> {
        use LayerPart as L;
        let config = self.config;
        let block = config.block();
        let linears = Linears::of(config);
        let head_norms_d = match block.head_norms {
            true => Some([self.head_norm(L::QNorm, l)?, self.head_norm(L::KNorm, l)?]),
            false => None,
        };
        let [attention_norm, ff_norm] = self.norms(l)?;
        let (attention_post_norm, ff_post_norm) = match block.post_norms {
            true => (
                Some(self.norm(Part::Layer(L::AttentionPostNorm), l)?),
                Some(self.norm(Part::Layer(L::FfPostNorm), l)?),
            ),
            false => (None, None),
        };
        let window = config.window_of(l);
        Ok(Layer {
            l,
            attention: AttentionSpec { scale: config.score_scale(), window, causal: block.causal },
            rope_idx: config.rope_idx(l),
            attention_norm,
            qkv: self.linear(l, &linears[Site::Qkv])?,
            head_norms_d,
            output: self.linear(l, &linears[Site::Output])?,
            attention_post_norm,
            ff_norm,
            up: self.linear(l, &linears[Site::Up])?,
            down: self.linear(l, &linears[Site::Down])?,
            ff_post_norm,
        })
    }

    /// Norms before attention and before feed-forward. Where norms follow the sums, the one before attention is the one
    /// after the layer before, or after the embedding.
    fn norms(&mut self, l: usize) -> Result<[Norm; 2]> {
        use LayerPart as L;
        if !self.config.block().normed_stream {
            return Ok([self.norm(Part::Layer(L::AttentionNorm), l)?, self.norm(Part::Layer(L::FfNorm), l)?]);
        }
        let before = match l {
            0 => self.norm(Part::EmbeddingNorm, 0)?,
            _ => self.norm(Part::Layer(L::FfPostNorm), l - 1)?,
        };
        Ok([before, self.norm(Part::Layer(L::AttentionPostNorm), l)?])
    }

    fn linear(&mut self, l: usize, stack: &Stack) -> Result<Linear> {
        let n_in = stack.n_in;
        let matrix = |(part, n_out): &(LayerPart, usize)| self.matrix(Part::Layer(*part), l, [*n_out, n_in]);
        let matrices = stack.parts.iter().map(matrix).collect::<Result<_>>()?;
        let mut bias_o = stack.bias.then(Vec::new);
        for (part, n_out) in &stack.parts {
            if let Some(bias_o) = &mut bias_o {
                let module = self.config.architecture.hf_module(Part::Layer(*part), l);
                bias_o.extend(self.weights.take_f32(&format!("{module}.bias"), &[*n_out])?);
            }
        }
        Ok(Linear { stack: matrices, bias_o })
    }

    fn matrix(&mut self, part: Part, l: usize, dims: [usize; 2]) -> Result<Packed> {
        let name = format!("{}.weight", self.config.architecture.hf_module(part, l));
        self.weights.take(&name, &dims)?.pack(self.pool, dims).map_err(|err| unreadable(&name, &err))
    }

    fn norm(&mut self, part: Part, l: usize) -> Result<Norm> {
        let c = self.config.width;
        let module = self.config.architecture.hf_module(part, l);
        let mut take = |suffix| self.weights.take_f32(&format!("{module}{suffix}"), &[c]);
        let w_c = take(".weight")?;
        let bias_c = if self.config.block().layer_norm { Some(take(".bias")?) } else { None };
        Ok(Norm { w_c, bias_c })
    }

    fn head_norm(&mut self, part: LayerPart, l: usize) -> Result<Vec<f32>> {
        let module = self.config.architecture.hf_module(Part::Layer(part), l);
        self.weights.take_f32(&format!("{module}.weight"), &[self.config.head_width])
    }

    /// Learned positions, if the model has some, with what is added to every token.
    fn positions(&mut self) -> Result<Vec<f32>> {
        let Config { width: c, context_max: t, architecture, .. } = *self.config;
        let block = self.config.block();
        if block.rotary {
            return Ok(Vec::new());
        }
        let mut take = |part, dims: &[usize]| {
            self.weights.take_f32(&format!("{}.weight", architecture.hf_module(part, 0)), dims)
        };
        let mut positions_tc = take(Part::Positions, &[t, c])?;
        if !block.causal {
            // A text that stands alone is of the first type.
            let types = take(Part::TokenTypes, &[N_TOKEN_TYPES, c])?;
            for position_c in positions_tc.chunks_exact_mut(c) {
                position_c.iter_mut().zip(&types).for_each(|(x, y)| *x += y);
            }
        }
        Ok(positions_tc)
    }

    /// The output projection where it is a matrix of its own.
    fn head(&mut self) -> Result<Option<Packed>> {
        let Config { width: c, vocab: v, architecture, tied_embeddings, .. } = *self.config;
        if !self.config.block().causal {
            return Ok(None);
        }
        if tied_embeddings {
            // Some files name the tied matrix twice; the second is the same.
            self.weights.tensors.remove(&format!("{}.weight", architecture.hf_module(Part::Head, 0)));
            return Ok(None);
        }
        self.matrix(Part::Head, 0, [v, c]).map(Some)
    }
}
