//! [`Trainable`]: what of a model is trained, as one flat vector.

use std::ops::Range;
use std::sync::Arc;

use tensor::packed::WeightKind;
use tensor::{Buf, Pool};

use crate::lora::LoraTable;
use crate::params::{decayed, init, init_part, n_params};
use crate::transformer::Site;
use crate::{Config, Lora, ParamSpec, ParamTable, Result, Stage, WeightTensor, Weights};

/// Files by name.
pub type Files = Vec<(&'static str, Vec<u8>)>;

/// All parameters of a model, or low-rank changes to a model that stays as it is. Optimizer, exchange of gradients and
/// checkpoints see a flat vector of what is trained and nothing else. Clones share the model they start from.
#[derive(Clone)]
pub struct Trainable {
    config: Config,
    table: ParamTable,
    lora: Option<LoraTable>,
    /// All parameters of the model that training starts from, in the order of `table`.
    start: Option<Arc<Buf<f32>>>,
}

impl Trainable {
    /// All parameters, starting from random ones.
    ///
    /// # Panics
    /// If the configuration does not pass its checks.
    pub fn new(config: &Config) -> Self {
        config
            .check()
            .and_then(|()| config.check_trainable())
            .expect("only checked configurations are trained");
        Self { config: config.clone(), table: ParamTable::new(config), lora: None, start: None }
    }

    /// All parameters of a stage of a model. Its first parameters are of no use: those of the whole are.
    ///
    /// # Panics
    /// As [`Trainable::new`], or if it is a stage of another model.
    pub fn of_stage(config: &Config, stage: &Stage) -> Self {
        let config = stage.config(config);
        let table = ParamTable::of_stage(&config, stage);
        Self { config, table, lora: None, start: None }
    }

    /// All parameters, starting from a model's. The start is kept: some objectives compare with it.
    ///
    /// # Errors
    /// If a tensor is missing, or the model is none that can be trained.
    pub fn from_weights(weights: Weights) -> Result<Self> {
        let config = weights.config.clone();
        config.check()?;
        config.check_trainable()?;
        let table = ParamTable::new(&config);
        let start = Some(Arc::new(table.from_weights(weights)?));
        Ok(Self { config, table, lora: None, start })
    }

    /// Low-rank changes to a model.
    ///
    /// # Errors
    /// As [`Trainable::from_weights`], or if the settings do not fit the model.
    pub fn lora(weights: Weights, settings: &Lora) -> Result<Self> {
        let lora = LoraTable::new(&weights.config, settings)?;
        Ok(Self { lora: Some(lora), ..Self::from_weights(weights)? })
    }

    /// How many numbers are trained of a model of this shape: all, or what low-rank changes have.
    ///
    /// # Errors
    /// If the settings do not fit the shape.
    pub fn n_trained(config: &Config, lora: Option<&Lora>) -> Result<usize> {
        Ok(match lora {
            None => config.n_params(),
            Some(settings) => n_params(LoraTable::new(config, settings)?.specs()),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What is trained, in the order of the flat vector.
    pub fn specs(&self) -> &[ParamSpec] {
        self.lora.as_ref().map_or(self.table.specs(), LoraTable::specs)
    }

    /// Length of the flat vector.
    pub fn n_params(&self) -> usize {
        n_params(self.specs())
    }

    /// Where all parameters lie, whether or not they are trained.
    pub fn params(&self) -> &ParamTable {
        &self.table
    }

    /// How many numbers a pass computes with: where this is the last stage of a model whose embedding is the head as well,
    /// a copy of that lies behind the flat vector.
    pub fn n_values(&self) -> usize {
        if self.lora.is_some() { self.n_params() } else { self.table.n_values() }
    }

    /// The flat vector in units, as a [`crate::Keeper`] is told of them.
    pub fn units(&self) -> Vec<Range<usize>> {
        match &self.lora {
            None => self.table.units(),
            Some(_) => std::iter::once(0..self.n_params()).collect(),
        }
    }

    /// Ranges with weight decay, sorted, adjacent ones joined.
    pub fn decayed(&self) -> Vec<Range<usize>> {
        decayed(self.specs())
    }

    /// What is trained before the first step: the start, or a pure function of `seed`.
    pub fn init(&self, seed: u64) -> Buf<f32> {
        match &self.start {
            Some(start) if self.lora.is_none() => Buf::from_slice(start),
            _ => init(self.specs(), seed),
        }
    }

    /// A part of [`Trainable::init`], alone.
    ///
    /// # Panics
    /// If the part is not as long as `out`.
    pub fn init_part(&self, seed: u64, part: Range<usize>, out: &mut [f32]) {
        assert_eq!(part.len(), out.len(), "a part of the first parameters");
        match &self.start {
            Some(start) if self.lora.is_none() => out.copy_from_slice(&start[part]),
            _ => init_part(self.specs(), seed, part.start, out),
        }
    }

    /// Frees the start where only objectives that compare with it would need it.
    pub fn forget_start(&mut self) {
        if self.lora.is_none() {
            self.start = None;
        }
    }

    /// Floating-point operations of the model itself for one token, forward and backward, in rows of `t` tokens.
    pub fn flops_per_token(&self, t: usize) -> f64 {
        match self.lora {
            None => self.config.flops_per_token_train(t),
            Some(_) => self.config.flops_per_token_frozen(t),
        }
    }

    /// The whole model, with changes merged.
    ///
    /// # Panics
    /// If `params` has another length than the flat vector.
    pub fn to_weights(&self, pool: &Pool, params: &[f32], kind: WeightKind) -> Weights {
        assert_eq!(params.len(), self.n_params(), "parameters");
        let Some((lora, start)) = self.lora.as_ref().zip(self.start.as_ref()) else {
            return self.table.to_weights(&self.config, params, kind);
        };
        let (mut merged, mut scaled) = (Buf::from_slice(start), Buf::default());
        for (l, layer) in self.table.layers.iter().enumerate() {
            for site in Site::ALL {
                let range = &layer.linears[site as usize];
                for change in lora.at(l, site).iter().flat_map(|site| &site.changes) {
                    let first = range.weight.start + change.first * range.n_in;
                    let rows = first..first + change.n_out * range.n_in;
                    let of = (&mut merged[rows.clone()], &start[rows]);
                    change.change(pool, params, of, (lora.scale(), &mut scaled));
                }
            }
        }
        self.table.to_weights(&self.config, &merged, kind)
    }

    /// The whole model, its parameters brought tensor by tensor: `bring` fills in what lies in a range of the flat vector.
    ///
    /// # Errors
    /// Those of `bring`.
    ///
    /// # Panics
    /// With LoRA, whose base is not in the flat vector.
    pub fn bring_weights<E>(
        &self,
        kind: WeightKind,
        mut bring: impl FnMut(Range<usize>, &mut [f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<Weights, E> {
        assert!(self.lora.is_none(), "the base of low-rank changes is not brought");
        let mut weights = Weights { config: self.config.clone(), tensors: Default::default() };
        for spec in self.specs() {
            let mut values = Buf::zeroed(spec.range.len());
            bring(spec.range.clone(), &mut values)?;
            let tensor = WeightTensor::new(kind, spec.dims.clone(), kind.quantize(&values));
            weights.tensors.insert(spec.name.clone(), tensor);
        }
        Ok(weights)
    }

    /// The changes as files of a PEFT adapter of the model called `base`; `None` where all parameters are trained.
    ///
    /// # Errors
    /// If the tensors are more than a file can hold.
    pub fn adapter_files(&self, params: &[f32], base: &str) -> Option<Result<Files>> {
        Some(self.lora.as_ref()?.files(&self.config, params, base))
    }

    pub(crate) fn table(&self) -> &ParamTable {
        &self.table
    }

    pub(crate) fn lora_table(&self) -> Option<&LoraTable> {
        self.lora.as_ref()
    }

    pub(crate) fn start(&self) -> Option<&[f32]> {
        self.start.as_ref().map(|start| &start[..])
    }
}
