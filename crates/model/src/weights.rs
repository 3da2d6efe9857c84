//! [`Weights`]: a model's tensors under their Hugging Face names, in the bits they are stored in.

use std::collections::BTreeMap;

use tensor::packed::WeightKind;

use crate::{Config, Error, Result};

/// A model as read from any format, before it is packed for inference or widened for training.
pub struct Weights {
    /// Shape; checked.
    pub config: Config,
    /// By Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`. Rows of q and k are in rotate-half order
    /// whatever the file had.
    pub tensors: BTreeMap<String, WeightTensor>,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightTensor {
    /// How the weights are stored.
    pub kind: WeightKind,
    /// Row-major; a linear map is `[outputs, inputs]`.
    pub dims: Vec<usize>,
    /// Little-endian; rows one after another, each a whole number of the kind's blocks.
    pub bytes: Vec<u8>,
}

impl WeightTensor {
    /// A tensor of f32.
    ///
    /// # Panics
    /// If `values` is not what `dims` says.
    pub fn from_f32(dims: &[usize], values: &[f32]) -> Self {
        assert_eq!(values.len(), dims.iter().product::<usize>(), "{dims:?}");
        Self { kind: WeightKind::F32, dims: dims.to_vec(), bytes: WeightKind::F32.quantize(values) }
    }

    /// Widened to f32, exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.dims.iter().product()];
        self.kind.dequantize(&self.bytes, &mut values);
        values
    }

    /// Whether the bytes are what kind and shape say.
    fn check(&self, name: &str) -> Result<()> {
        let n_elems = self.dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let whole_rows = self.dims.last().is_some_and(|n_in| n_in.is_multiple_of(self.kind.block_elems()));
        let bytes = n_elems.and_then(|n| self.kind.bytes(n)).filter(|_| whole_rows);
        if bytes == Some(self.bytes.len()) {
            return Ok(());
        }
        let problem = format!(
            "{} bytes do not hold {:?} weights of kind {}",
            self.bytes.len(),
            self.dims,
            self.kind.name()
        );
        Err(Error::Tensor { name: name.to_owned(), problem })
    }
}

impl Weights {
    /// Takes out the tensor `name`, which must have the shape `dims`.
    pub fn take(&mut self, name: &str, dims: &[usize]) -> Result<WeightTensor> {
        let tensor = self.tensors.remove(name).ok_or_else(|| Error::MissingTensor(name.to_owned()))?;
        if tensor.dims != dims {
            return Err(Error::TensorShape {
                name: name.to_owned(),
                found: tensor.dims,
                expected: dims.to_vec(),
            });
        }
        tensor.check(name)?;
        Ok(tensor)
    }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({} tensors, {:?})", self.tensors.len(), self.config)
    }
}

/// GGUF and llama2.c keep the two numbers that RoPE turns together side by side (2i, 2i + 1); Hugging Face keeps them
/// half a head apart (i, i + d/2). Moves the rows.
pub(crate) fn rotate_half_order(bytes: &[u8], n_rows: usize, d: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / n_rows;
    let source = |row: usize| {
        let (head, i) = (row / d, row % d);
        head * d + 2 * (i % (d / 2)) + i / (d / 2)
    };
    (0..n_rows).flat_map(|row| &bytes[source(row) * row_bytes..][..row_bytes]).copied().collect()
}
