//! Weights of one kind to weights of another.

use std::sync::Arc;

use tensor::Pool;
use tensor::packed::WeightKind;

use crate::{WeightTensor, Weights};

/// Rows converted by one task.
const TASK_ROWS: usize = 64;
/// What embeddings and head become beside weights of fewer bits: their errors are felt by every token. The second is for
/// rows that are no whole blocks of the first.
const EMBEDDING_KINDS: [WeightKind; 2] = [WeightKind::Q6_K, WeightKind::Q8_0];

/// How to convert a whole model.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// Of the matrices. One whose rows are no whole number of its blocks gets the next finer kind that fits, see `fitting`.
    pub kind: WeightKind,
    /// Embeddings and head get the same kind, too.
    pub pure: bool,
    /// Vectors get it as well, unless it is quantized; else they become F32.
    pub vectors: bool,
}

impl Conversion {
    fn kind_of(&self, name: &str, tensor: &WeightTensor) -> WeightKind {
        let [_, n_in] = tensor.dims[..] else {
            return if self.vectors && !self.kind.is_quantized() { self.kind } else { WeightKind::F32 };
        };
        let is_embedding =
            ["embed_tokens.", "lm_head.", "wte.", "wpe."].iter().any(|part| name.contains(part));
        let fits = |kind: &&WeightKind| n_in.is_multiple_of(kind.block_elems());
        let finer = EMBEDDING_KINDS.iter().find(fits).filter(|finer| bits(self.kind) < bits(**finer));
        match finer {
            Some(finer) if is_embedding && !self.pure => *finer,
            _ => fitting(self.kind, n_in),
        }
    }
}

/// The kind itself, or one of at least as many bits whose blocks make up a row.
fn fitting(kind: WeightKind, n_in: usize) -> WeightKind {
    let instead = match kind {
        _ if n_in.is_multiple_of(kind.block_elems()) => kind,
        WeightKind::Q4_K => WeightKind::Q5_0,
        WeightKind::Q5_K => WeightKind::Q5_1,
        WeightKind::Q6_K => WeightKind::Q8_0,
        _ => WeightKind::F16,
    };
    if n_in.is_multiple_of(instead.block_elems()) { instead } else { WeightKind::F16 }
}

/// Bits a weight takes, rounded down.
fn bits(kind: WeightKind) -> usize {
    8 * kind.block_bytes() / kind.block_elems()
}

impl Weights {
    /// Every tensor becomes one that is converted when it is wanted, so that whoever writes them one after the other has
    /// little more than one in memory.
    pub fn convert(&mut self, conversion: Conversion, pool: &Arc<Pool>) {
        let tensors = std::mem::take(&mut self.tensors);
        let convert = |(name, tensor): (String, WeightTensor)| {
            let kind = conversion.kind_of(&name, &tensor);
            let tensor = if kind == tensor.kind { tensor } else { tensor.converted(kind, pool.clone()) };
            (name, tensor)
        };
        self.tensors = tensors.into_iter().map(convert).collect();
    }
}

impl WeightTensor {
    /// The bytes of the same numbers in another kind, whose blocks make up rows.
    pub(crate) fn bytes_as(&self, kind: WeightKind, pool: &Pool) -> std::io::Result<Vec<u8>> {
        let n_in = self.dims.last().copied().unwrap_or(0);
        let row_bytes = kind.bytes(n_in).expect("rows are whole blocks");
        let n_rows = self.n_elems() / n_in.max(1);
        let source = self.bytes()?;
        let mut bytes = vec![0; n_rows * row_bytes];
        let source_row_bytes = source.len() / n_rows.max(1);
        pool.run_chunks(&mut bytes, TASK_ROWS * row_bytes, |task, out| {
            let rows = out.len() / row_bytes;
            let source = &source[task * TASK_ROWS * source_row_bytes..][..rows * source_row_bytes];
            let mut values = vec![0.0; rows * n_in];
            self.kind.dequantize(source, &mut values);
            out.copy_from_slice(&kind.quantize(&values));
        });
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converting_is_what_quantizing_the_whole_is() {
        let values: Vec<f32> = (0..150 * 64).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        let tensor = WeightTensor::from_f32(&[150, 64], &values);
        for kind in [WeightKind::Q4_1, WeightKind::Q8_0, WeightKind::Bf16] {
            let converted = tensor.clone().converted(kind, Arc::new(Pool::new(2)));
            assert_eq!(*converted.bytes().unwrap(), *kind.quantize(&values));
            assert_eq!((converted.kind, &converted.dims), (kind, &tensor.dims));
        }
    }

    #[test]
    fn what_matters_most_keeps_more_bits() {
        let matrix = WeightTensor::from_f32(&[2, 64], &[0.0; 128]);
        let uneven = WeightTensor::from_f32(&[2, 40], &[0.0; 80]);
        let vector = WeightTensor::from_f32(&[64], &[0.0; 64]);
        let kind = |kind, pure, name: &str, tensor: &WeightTensor| {
            Conversion { kind, pure, vectors: false }.kind_of(name, tensor)
        };
        let (embedding, other) = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight");
        assert_eq!(kind(WeightKind::Q4_0, false, other, &matrix), WeightKind::Q4_0);
        assert_eq!(kind(WeightKind::Q4_0, false, embedding, &matrix), WeightKind::Q8_0);
        assert_eq!(kind(WeightKind::Q4_0, true, embedding, &matrix), WeightKind::Q4_0);
        assert_eq!(kind(WeightKind::Q4_K, false, other, &matrix), WeightKind::Q5_0);
        let wide = WeightTensor::from_f32(&[2, 256], &[0.0; 512]);
        assert_eq!(kind(WeightKind::Q4_K, false, other, &wide), WeightKind::Q4_K);
        assert_eq!(kind(WeightKind::Q4_K, false, embedding, &wide), WeightKind::Q6_K);
        assert_eq!(kind(WeightKind::F16, false, embedding, &matrix), WeightKind::F16);
        assert_eq!(kind(WeightKind::Q4_0, false, other, &uneven), WeightKind::F16);
        assert_eq!(kind(WeightKind::Q4_0, false, "model.norm.weight", &vector), WeightKind::F32);
        let all = Conversion { kind: WeightKind::Bf16, pure: false, vectors: true };
        assert_eq!(all.kind_of("model.norm.weight", &vector), WeightKind::Bf16);
    }
}
