//! [`Adapter`]: low-rank changes to a model's matrices, y = W x + s · B (A x), in the files PEFT writes.
//!
//! LoRA (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>). s is alpha / rank, or alpha / √rank where the adapter says
//! so. Sequences of one step may have different adapters, or none: the model's own products are shared.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Deserialize;
use serde_json::Value;
use tensor::packed::{Packed, PackedScratch, project};
use tensor::{Buf, Pool};

use crate::names::Part;
use crate::transformer::{Linears, Site};
use crate::weights::unreadable;
use crate::{Config, Error, Result, StepInput, WeightTensor, hf};

/// PEFT's settings.
pub(crate) const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// PEFT's tensors.
pub(crate) const ADAPTER_TENSORS_FILE: &str = "adapter_model.safetensors";

/// Before every tensor's name.
pub(crate) const PREFIX: &str = "base_model.model.";
pub(crate) const RANK_MAX: usize = 1 << 12;

/// Changes to one model's matrices. Clones share them, and two are equal if they do.
#[derive(Clone)]
pub struct Adapter(Arc<Inner>);

struct Inner {
    id: u64,
    /// Of the model it was made for.
    shape: [usize; 5],
    /// By layer and site.
    layers: Vec<[Vec<Change>; Site::ALL.len()]>,
    bytes: usize,
}

/// Ids are never used twice, so what was cached under an adapter that is gone is never found again.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The change to one matrix of a stack.
struct Change {
    /// Where the matrix's outputs begin among those of the stack.
    first: usize,
    /// `[r, i]`
    a: Packed,
    /// `[o, r]`, with s in it.
    b: Packed,
}

/// The settings that are read.
#[derive(Deserialize)]
struct RawConfig {
    peft_type: Option<String>,
    bias: Option<String>,
    lora_alpha: Option<f64>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// Settings that would change the mathematics in ways that are not computed here, unless they are off.
const UNSUPPORTED: &[&str] = &[
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
];

impl Adapter {
    /// Reads an adapter for a model of this shape from the directory that PEFT's `save_pretrained` made.
    ///
    /// # Errors
    /// If a file is missing or damaged, a tensor does not fit the model, or the adapter is of a kind that is not
    /// computed here.
    pub fn load(dir: &Path, config: &Config, pool: &Pool) -> Result<Adapter> {
        let raw = hf::read_json(&dir.join(ADAPTER_CONFIG_FILE))?;
        let raw: RawConfig = serde_json::from_slice(&raw).map_err(|err| bad(err.to_string()))?;
        raw.refuse_unsupported()?;
        let mut tensors = hf::read_tensors(dir, ADAPTER_TENSORS_FILE)?;
        let linears = Linears::of(config);
        let mut layers = Vec::with_capacity(config.n_layers);
        for l in 0..config.n_layers {
            let mut loader = Loader { tensors: &mut tensors, config, raw: &raw, pool };
            let mut changes = Site::ALL.map(|_| Vec::new());
            for site in Site::ALL {
                changes[site as usize] = loader.changes(l, &linears, site)?;
            }
            layers.push(changes);
        }
        if let Some(name) = tensors.into_keys().next() {
            let problem = "changes nothing that this model has as a matrix of a layer".to_owned();
            return Err(Error::Tensor { name, problem });
        }
        let all = layers.iter().flatten().flatten();
        let bytes = all.map(|change| change.a.bytes() + change.b.bytes()).sum();
        match bytes {
            0 => Err(bad(format!("{ADAPTER_TENSORS_FILE} changes nothing"))),
            _ => {
                let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
                Ok(Adapter(Arc::new(Inner { id, shape: shape(config), layers, bytes })))
            }
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// A number that no other adapter of this process has or had: keeps cached prefixes apart.
    pub fn id(&self) -> u64 {
        self.0.id
    }
}

impl PartialEq for Adapter {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for Adapter {}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Adapter({} layers, {} bytes)", self.0.layers.len(), self.0.bytes)
    }
}

impl RawConfig {
    fn refuse_unsupported(&self) -> Result<()> {
        let refuse = |field: &str, value: &str| {
            let value: String = value.chars().take(80).collect();
            Err(bad(format!("{ADAPTER_CONFIG_FILE}: {field} = {value} is not supported")))
        };
        match &self.peft_type {
            Some(kind) if kind == "LORA" => (),
            other => return refuse("peft_type", other.as_deref().unwrap_or("(missing)")),
        }
        if let Some(bias) = self.bias.as_deref().filter(|bias| *bias != "none") {
            return refuse("bias", bias);
        }
        let is_on = |field: &&&str| match self.others.get(**field) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(values)) => !values.is_empty(),
            Some(Value::Object(values)) => !values.is_empty(),
            Some(_) => true,
        };
        if let Some(field) = UNSUPPORTED.iter().find(is_on) {
            return refuse(field, &self.others[*field].to_string());
        }
        Ok(())
    }

    /// s
    fn factor(&self, rank: usize) -> Result<f32> {
        let alpha = self.lora_alpha.filter(|alpha| alpha.is_finite());
        let alpha = alpha.ok_or_else(|| bad(format!("{ADAPTER_CONFIG_FILE}: lora_alpha is missing")))?;
        let rank = rank as f64;
        Ok((alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32)
    }
}

/// What the dimensions of an adapter's matrices depend on.
fn shape(config: &Config) -> [usize; 5] {
    [config.n_layers, config.width, config.q_width(), config.kv_width(), config.ff_width]
}

fn bad(problem: String) -> Error {
    Error::Adapter(problem)
}

struct Loader<'a> {
    tensors: &'a mut BTreeMap<String, WeightTensor>,
    config: &'a Config,
    raw: &'a RawConfig,
    pool: &'a Pool,
}

impl Loader<'_> {
    fn changes(&mut self, l: usize, linears: &Linears, site: Site) -> Result<Vec<Change>> {
        let stack = &linears[site];
        let (mut changes, mut first) = (Vec::new(), 0);
        for &(part, n_out) in &stack.parts {
            let module = self.config.architecture.hf_module(Part::Layer(part), l);
            if let Some((a, b)) = self.matrices(&format!("{PREFIX}{module}"), n_out, stack.n_in)? {
                changes.push(Change { first, a, b });
            }
            first += n_out;
        }
        Ok(changes)
    }

    /// A and B of a module, if the adapter changes it.
    fn matrices(&mut self, module: &str, n_out: usize, n_in: usize) -> Result<Option<(Packed, Packed)>> {
        let [name_a, name_b] = ["A", "B"].map(|which| format!("{module}.lora_{which}.weight"));
        let (a, b) = match (self.tensors.remove(&name_a), self.tensors.remove(&name_b)) {
            (None, None) => return Ok(None),
            (Some(a), Some(b)) => (a, b),
            (None, Some(_)) => return Err(Error::MissingTensor(name_a)),
            (Some(_), None) => return Err(Error::MissingTensor(name_b)),
        };
        let rank = a.dims.first().copied().unwrap_or(0);
        if !(1..=RANK_MAX).contains(&rank) {
            let problem = format!("has rank {rank}, allowed is 1..={RANK_MAX}");
            return Err(Error::Tensor { name: name_a, problem });
        }
        let a_ri = values(&name_a, &a, [rank, n_in])?;
        let factor = self.raw.factor(rank)?;
        let mut b_or = values(&name_b, &b, [n_out, rank])?;
        b_or.iter_mut().for_each(|b| *b *= factor);
        let pack = |values: &[f32], dims| Packed::from_f32(self.pool, values, dims);
        Ok(Some((pack(&a_ri, [rank, n_in]), pack(&b_or, [n_out, rank]))))
    }
}

fn values(name: &str, tensor: &WeightTensor, dims: [usize; 2]) -> Result<Vec<f32>> {
    if tensor.dims != dims {
        let (name, found) = (name.to_owned(), tensor.dims.clone());
        return Err(Error::TensorShape { name, found, expected: dims.to_vec() });
    }
    tensor.to_f32().map_err(|err| unreadable(name, &err))
}

/// Which tokens of a step have which adapter.
pub(crate) struct Adapted<'a> {
    spans: Vec<(Range<usize>, &'a Adapter)>,
}

/// Memory for the changes of one matrix.
#[derive(Default)]
pub(crate) struct AdapterScratch {
    low_nr: Buf<f32>,
    change_no: Buf<f32>,
    packed: PackedScratch,
}

impl<'a> Adapted<'a> {
    /// Neighbouring rows of one adapter become one span. Rows of one adapter that are apart are computed apart: with
    /// hundreds of streams it would pay to sort the rows of a step by adapter.
    pub(crate) fn new(step: &'a StepInput) -> Self {
        let mut spans: Vec<(Range<usize>, &Adapter)> = Vec::new();
        let mut first = 0;
        for row in &step.rows {
            let tokens = first..first + row.n_tokens;
            first = tokens.end;
            let Some(adapter) = &row.adapter else { continue };
            match spans.last_mut() {
                Some((span, last)) if span.end == tokens.start && *last == adapter => span.end = tokens.end,
                _ => spans.push((tokens, adapter)),
            }
        }
        Self { spans }
    }

    /// Whether every adapter of the step was made for a model of this shape.
    pub(crate) fn fits(&self, config: &Config) -> bool {
        self.spans.iter().all(|(_, adapter)| adapter.0.shape == shape(config))
    }

    /// Adds the changes to what the matrices at (layer, site) made of `x_ni`.
    pub(crate) fn add(
        &self,
        pool: &Pool,
        (l, site): (usize, Site),
        y_no: &mut [f32],
        x_ni: &[f32],
        scratch: &mut AdapterScratch,
    ) {
        for (tokens, adapter) in &self.spans {
            for change in &adapter.0.layers[l][site as usize] {
                change.add(pool, tokens.clone(), y_no, x_ni, scratch);
            }
        }
    }
}

impl Change {
    /// Rows `tokens` of `y_no` += B (A x).
    fn add(
        &self,
        pool: &Pool,
        tokens: Range<usize>,
        y_no: &mut [f32],
        x_ni: &[f32],
        scratch: &mut AdapterScratch,
    ) {
        let ([r, n_in], [n_out, _]) = (self.a.dims(), self.b.dims());
        let n = tokens.len();
        let width = y_no.len() / (x_ni.len() / n_in);
        scratch.low_nr.reserve_scratch(n * r);
        scratch.change_no.reserve_scratch(n * n_out);
        let (low_nr, change_no) = (&mut scratch.low_nr[..n * r], &mut scratch.change_no[..n * n_out]);
        let x_ni = &x_ni[tokens.start * n_in..tokens.end * n_in];
        project(pool, low_nr, &[&self.a], x_ni, &mut scratch.packed);
        project(pool, change_no, &[&self.b], low_nr, &mut scratch.packed);
        let rows = y_no[tokens.start * width..tokens.end * width].chunks_exact_mut(width);
        for (y_o, change_o) in rows.zip(change_no.chunks_exact(n_out)) {
            let y_o = &mut y_o[self.first..self.first + n_out];
            y_o.iter_mut().zip(change_o).for_each(|(y, change)| *y += change);
        }
    }
}
