//! [`Lora`]: which matrices get low-rank changes, and [`LoraTable`]: where the numbers of the changes lie.
//!
//! LoRA (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>): W becomes W + (alpha / rank)·B·A. What is trained here is
//! published as the files that PEFT reads, see [`crate::Adapter`] for how they are served.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tensor::matmul::changed;
use tensor::rows::scale;
use tensor::{Buf, Mat, Pool};

use crate::adapter::{ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE, PREFIX, RANK_MAX};
use crate::names::Part;
use crate::params::{Init, ParamSpec};
use crate::trainable::Files;
use crate::transformer::{Linears, Site};
use crate::{Architecture, Config, Error, Result, WeightTensor, hf};

/// The target that means every matrix of every layer.
const ALL_LINEAR: &str = "all-linear";
const ALPHA_MAX: f32 = 1e6;
const N_TARGETS_MAX: usize = 64;

/// The settings of a LoRA fine-tune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// r
    pub rank: usize,
    /// Changes count alpha / rank times.
    pub alpha: f32,
    /// Names of modules as Hugging Face has them, or their ends (`q_proj`); or the one name `all-linear`.
    pub targets: Vec<String>,
}

/// The layout of all A and B. Those A that share their input lie side by side.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LoraTable {
    specs: Vec<ParamSpec>,
    settings: Lora,
    layers: Vec<[Option<SiteChanges>; Site::ALL.len()]>,
}

/// What changes at one place of a layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SiteChanges {
    /// Every A, `[changes · rank, n_in]`.
    pub(crate) a: Range<usize>,
    pub(crate) changes: Vec<LowRank>,
}

/// The change of one matrix of a stack.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LowRank {
    /// Where the matrix's outputs begin among those of the stack.
    pub(crate) first: usize,
    pub(crate) n_out: usize,
    /// `[rank, n_in]`
    pub(crate) a: Range<usize>,
    /// `[n_out, rank]`
    pub(crate) b: Range<usize>,
}

impl LoraTable {
    /// # Errors
    /// If a number is out of range, or a target is no matrix of a layer of this model.
    pub(crate) fn new(config: &Config, settings: &Lora) -> Result<Self> {
        settings.check()?;
        let mut table = Self { specs: Vec::new(), settings: settings.clone(), layers: Vec::new() };
        let mut unused: Vec<&String> = settings.targets.iter().filter(|t| *t != ALL_LINEAR).collect();
        for l in 0..config.n_layers {
            let sites = Site::ALL.map(|site| table.place(config, (l, site), &mut unused));
            table.layers.push(sites);
        }
        match unused.first() {
            Some(target) => Err(bad(format!("no matrix of a layer is called {target}; {}", known(config)))),
            None => Ok(table),
        }
    }

    /// Lays out the changes of one place; targets that name one of its matrices are no longer unused.
    fn place(
        &mut self,
        config: &Config,
        (l, site): (usize, Site),
        unused: &mut Vec<&String>,
    ) -> Option<SiteChanges> {
        let (linears, rank) = (Linears::of(config), self.settings.rank);
        let stack = &linears[site];
        let (mut first, mut chosen) = (0, Vec::new());
        for (part, n_out) in &stack.parts {
            let module = config.architecture.hf_module(Part::Layer(*part), l);
            if self.settings.targets.iter().any(|target| is_target(target, &module)) {
                unused.retain(|target| !is_target(target, &module));
                chosen.push((module, first, *n_out));
            }
            first += n_out;
        }
        // PyTorch's first weights of a linear map, as PEFT has them for A. B is zero: the model starts as it was.
        let init = Init::Uniform { bound: 1.0 / (stack.n_in as f64).sqrt() };
        let mut a = Vec::new();
        for (module, ..) in &chosen {
            a.push(self.push(format!("{module}.lora_A.weight"), [rank, stack.n_in], init));
        }
        let mut changes = Vec::new();
        for ((module, first, n_out), a) in chosen.into_iter().zip(a) {
            let b = self.push(format!("{module}.lora_B.weight"), [n_out, rank], Init::Zeros);
            changes.push(LowRank { first, n_out, a, b });
        }
        let a = changes.first()?.a.start..changes.last()?.a.end;
        Some(SiteChanges { a, changes })
    }

    fn push(&mut self, name: String, dims: [usize; 2], init: Init) -> Range<usize> {
        let spec = ParamSpec::after(&self.specs, format!("{PREFIX}{name}"), &dims, init);
        let range = spec.range.clone();
        self.specs.push(spec);
        range
    }

    /// Tensors under PEFT's names.
    pub(crate) fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// alpha / rank
    pub(crate) fn scale(&self) -> f32 {
        self.settings.alpha / self.settings.rank as f32
    }

    pub(crate) fn at(&self, l: usize, site: Site) -> Option<&SiteChanges> {
        self.layers[l][site as usize].as_ref()
    }

    /// The files PEFT would write: settings and tensors.
    pub(crate) fn files(&self, config: &Config, params: &[f32], base: &str) -> Result<Files> {
        let tensor = |spec: &ParamSpec| {
            (spec.name.clone(), WeightTensor::from_f32(&spec.dims, &params[spec.range.clone()]))
        };
        let tensors: BTreeMap<String, WeightTensor> = self.specs.iter().map(tensor).collect();
        let settings = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "target_modules": self.target_modules(config),
            "fan_in_fan_out": config.architecture == Architecture::Gpt2,
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": false,
            "inference_mode": true,
        });
        let settings = format!("{settings:#}\n").into_bytes();
        Ok(vec![(ADAPTER_CONFIG_FILE, settings), (ADAPTER_TENSORS_FILE, hf::tensor_bytes(&tensors)?)])
    }

    /// PEFT takes `all-linear` only as a word of its own; matrices are named here, which every version reads.
    fn target_modules(&self, config: &Config) -> Vec<String> {
        match self.settings.targets.iter().any(|target| target == ALL_LINEAR) {
            true => module_ends(config),
            false => self.settings.targets.clone(),
        }
    }
}

impl LowRank {
    /// `out = W + s·B·A`, of the rows of this change. `scaled` is kept between calls. Rounded to f32 alone: what is learned in
    /// small steps must not be lost before the sum.
    pub(crate) fn change(
        &self,
        pool: &Pool,
        values: &[f32],
        (out, w): (&mut [f32], &[f32]),
        (s, scaled): (f32, &mut Buf<f32>),
    ) {
        let rank = self.b.len() / self.n_out;
        let n_in = self.a.len() / rank;
        scaled.reserve_scratch(self.a.len());
        let scaled = &mut scaled[..self.a.len()];
        scaled.copy_from_slice(&values[self.a.clone()]);
        scale(pool, scaled, s);
        let (b, a) = (Mat::new(&values[self.b.clone()], self.n_out, rank), Mat::new(&*scaled, rank, n_in));
        changed(pool, out, w, [b, a]);
    }
}

impl Lora {
    fn check(&self) -> Result<()> {
        if !(1..=RANK_MAX).contains(&self.rank) {
            return Err(bad(format!("the rank is {}, allowed is 1..={RANK_MAX}", self.rank)));
        }
        // Written so that NaN fails.
        if !(self.alpha > 0.0 && self.alpha <= ALPHA_MAX) {
            return Err(bad(format!("alpha is {}, allowed is above 0 and up to {ALPHA_MAX}", self.alpha)));
        }
        if !(1..=N_TARGETS_MAX).contains(&self.targets.len()) {
            return Err(bad(format!("{} targets, allowed are 1..={N_TARGETS_MAX}", self.targets.len())));
        }
        Ok(())
    }
}

fn is_target(target: &str, module: &str) -> bool {
    target == ALL_LINEAR || module == target || module.ends_with(&format!(".{target}"))
}

/// The matrices of a layer by the ends of their names.
fn module_ends(config: &Config) -> Vec<String> {
    let linears = Linears::of(config);
    let parts = Site::ALL.into_iter().flat_map(|site| linears[site].parts.iter().map(|(part, _)| *part));
    let mut ends: Vec<String> = parts
        .map(|part| config.architecture.hf_module(Part::Layer(part), 0))
        .map(|module| module.rsplit('.').next().unwrap_or_default().to_owned())
        .collect();
    ends.sort();
    ends.dedup();
    ends
}

fn known(config: &Config) -> String {
    format!("there are {}", module_ends(config).join(", "))
}

fn bad(problem: String) -> Error {
    Error::Adapter(problem)
}
