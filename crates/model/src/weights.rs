//! [`Weights`]: a model's tensors under their Hugging Face names, in the bits they are stored in.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tensor::Pool;
use tensor::packed::{Packed, WeightKind};

use crate::source::Source;
use crate::{Config, Error, Result};

/// A model as read from any format, before it is packed for inference or widened for training.
#[derive(Clone)]
pub struct Weights {
    /// Shape; checked.
    pub config: Config,
    /// By Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`. Whatever the file had: rows of q and k are in
    /// rotate-half order, linear maps are `[outputs, inputs]` and scales of norms are the factors themselves.
    pub tensors: BTreeMap<String, WeightTensor>,
}

/// One tensor, in memory or still in its file.
#[derive(Clone)]
pub struct WeightTensor {
    /// How the weights are stored.
    pub kind: WeightKind,
    /// Row-major; a linear map is `[outputs, inputs]`.
    pub dims: Vec<usize>,
    data: Data,
}

#[derive(Clone)]
enum Data {
    Memory(Vec<u8>),
    /// Read, and brought into our order, each time it is wanted.
    Stored {
        source: Source,
        at: u64,
        order: Order,
    },
    /// Made of another tensor each time it is wanted.
    Converted {
        from: Box<WeightTensor>,
        pool: Arc<Pool>,
    },
}

/// How a file's bytes become ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    AsStored,
    /// Rows of heads of this width, interleaved in the file: see [`rotate_half_order`].
    Interleaved(usize),
    /// `[inputs, outputs]` in the file.
    Transposed,
}

/// Bytes of one piece of a tensor that is packed piece by piece: two of them stay in a core's cache.
const PIECE_BYTES: usize = 1 << 20;

impl WeightTensor {
    /// A tensor in memory: little-endian, rows one after another, each a whole number of the kind's blocks.
    pub fn new(kind: WeightKind, dims: Vec<usize>, bytes: Vec<u8>) -> Self {
        Self { kind, dims, data: Data::Memory(bytes) }
    }

    /// A tensor whose bytes are in `source` from `at` on, as many as kind and shape say: the reader has checked that.
    pub(crate) fn stored(kind: WeightKind, dims: Vec<usize>, source: Source, at: u64) -> Self {
        Self { kind, dims, data: Data::Stored { source, at, order: Order::AsStored } }
    }

    /// The same numbers, as well as `kind` can hold them, once they are wanted: nothing is computed yet.
    ///
    /// # Panics
    /// If rows are no whole number of the kind's blocks.
    pub fn converted(self, kind: WeightKind, pool: Arc<Pool>) -> Self {
        let n_in = self.dims.last().copied().unwrap_or(0);
        assert!(n_in.is_multiple_of(kind.block_elems()), "rows of {n_in} as {}", kind.name());
        let dims = self.dims.clone();
        Self { kind, dims, data: Data::Converted { from: Box::new(self), pool } }
    }

    /// The same numbers, to be brought from a file's order into ours (or back: a matrix transposed twice is itself).
    pub(crate) fn reordered(self, order: Order) -> std::io::Result<Self> {
        let mut dims = self.dims.clone();
        if order == Order::Transposed {
            dims.reverse();
        }
        let kind = self.kind;
        let data = match self.data {
            Data::Stored { source, at, order: Order::AsStored } => Data::Stored { source, at, order },
            _ => Data::Memory(order.apply(kind, &dims, self.bytes()?.into_owned())),
        };
        Ok(Self { kind, dims, data })
    }

    /// A tensor of f32.
    ///
    /// # Panics
    /// If `values` is not what `dims` says.
    pub fn from_f32(dims: &[usize], values: &[f32]) -> Self {
        assert_eq!(values.len(), dims.iter().product::<usize>(), "{dims:?}");
        Self::new(WeightKind::F32, dims.to_vec(), WeightKind::F32.quantize(values))
    }

    /// All bytes, from memory or from the file.
    ///
    /// # Errors
    /// If the file cannot be read any more.
    pub fn bytes(&self) -> std::io::Result<Cow<'_, [u8]>> {
        match &self.data {
            Data::Memory(bytes) => Ok(Cow::Borrowed(bytes)),
            Data::Stored { source, at, order } => {
                let mut bytes = vec![0; self.n_bytes()];
                source.read_at(&mut bytes, *at)?;
                Ok(Cow::Owned(order.apply(self.kind, &self.dims, bytes)))
            }
            Data::Converted { from, pool } => Ok(Cow::Owned(from.bytes_as(self.kind, pool)?)),
        }
    }

    /// Widened to f32, exactly.
    ///
    /// # Errors
    /// As [`WeightTensor::bytes`].
    pub fn to_f32(&self) -> std::io::Result<Vec<f32>> {
        let mut values = vec![0.0; self.dims.iter().product()];
        self.kind.dequantize(&self.bytes()?, &mut values);
        Ok(values)
    }

    /// Packs a matrix, a piece at a time, so that it is never in memory twice.
    ///
    /// # Errors
    /// As [`WeightTensor::bytes`].
    pub(crate) fn pack(&self, pool: &Pool, dims: [usize; 2]) -> std::io::Result<Packed> {
        assert_eq!(self.dims, dims, "checked when it was taken");
        let mut packed = Packed::zeroed(self.kind, dims);
        let piece_rows = self.piece_rows();
        for first in (0..dims[0]).step_by(piece_rows) {
            packed.set_rows(pool, first, &self.piece(first..(first + piece_rows).min(dims[0]))?);
        }
        Ok(packed)
    }

    /// Rows a piece has: whole tiles of packed weights and whole heads; all rows where they are scattered in the file.
    fn piece_rows(&self) -> usize {
        let unit = match self.data {
            Data::Stored { order: Order::Transposed, .. } | Data::Converted { .. } => return self.n_rows(),
            Data::Stored { order: Order::Interleaved(d), .. } => d * Packed::ROWS_STEP,
            _ => Packed::ROWS_STEP,
        };
        (PIECE_BYTES / self.row_bytes()).max(1).next_multiple_of(unit)
    }

    fn piece(&self, rows: Range<usize>) -> std::io::Result<Cow<'_, [u8]>> {
        let row_bytes = self.row_bytes();
        let bytes = rows.start * row_bytes..rows.end * row_bytes;
        match &self.data {
            Data::Memory(memory) => Ok(Cow::Borrowed(&memory[bytes])),
            Data::Stored { order: Order::Transposed, .. } | Data::Converted { .. } => self.bytes(),
            Data::Stored { source, at, order } => {
                let mut piece = vec![0; bytes.len()];
                source.read_at(&mut piece, at + bytes.start as u64)?;
                Ok(Cow::Owned(order.apply(self.kind, &[rows.len(), 1], piece)))
            }
        }
    }

    fn n_rows(&self) -> usize {
        self.dims.iter().rev().skip(1).product()
    }

    fn row_bytes(&self) -> usize {
        self.n_bytes() / self.n_rows().max(1)
    }

    /// Numbers in it.
    pub fn n_elems(&self) -> usize {
        self.dims.iter().product()
    }

    /// Bytes that kind and shape need, here as in the file.
    pub fn n_bytes(&self) -> usize {
        self.kind.bytes(self.dims.iter().product()).expect("checked when it was read or taken")
    }

    /// Whether the bytes are what kind and shape say.
    fn check(&self, name: &str) -> Result<()> {
        let n_elems = self.dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let whole_rows = self.dims.last().is_some_and(|n_in| n_in.is_multiple_of(self.kind.block_elems()));
        let needed = n_elems.and_then(|n| self.kind.bytes(n)).filter(|_| whole_rows);
        let fits = match &self.data {
            Data::Memory(bytes) => needed == Some(bytes.len()),
            Data::Stored { .. } | Data::Converted { .. } => needed.is_some(),
        };
        if fits {
            return Ok(());
        }
        let problem = format!("{:?} weights of kind {} do not fit its bytes", self.dims, self.kind.name());
        Err(Error::Tensor { name: name.to_owned(), problem })
    }
}

impl Order {
    /// Brings bytes into our order; `dims` are those afterwards.
    pub(crate) fn apply(self, kind: WeightKind, dims: &[usize], bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Self::AsStored => bytes,
            Self::Interleaved(d) => rotate_half_order(&bytes, dims[0], d),
            Self::Transposed => transposed(&bytes, dims[1], kind.block_bytes()),
        }
    }
}

impl std::fmt::Debug for WeightTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightTensor({} {:?})", self.kind.name(), self.dims)
    }
}

impl Weights {
    /// Numbers in all tensors.
    pub fn n_params(&self) -> usize {
        self.tensors.values().map(WeightTensor::n_elems).sum()
    }

    /// Bytes of all tensors, as they are stored.
    pub fn n_bytes(&self) -> usize {
        self.tensors.values().map(WeightTensor::n_bytes).sum()
    }

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

    /// As [`Weights::take`], widened to f32.
    pub fn take_f32(&mut self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        self.take(name, dims)?.to_f32().map_err(|err| unreadable(name, &err))
    }
}

/// A tensor whose file can no longer be read.
pub(crate) fn unreadable(name: &str, err: &std::io::Error) -> Error {
    Error::Tensor { name: name.to_owned(), problem: format!("cannot be read: {err}") }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({} tensors, {:?})", self.tensors.len(), self.config)
    }
}

/// Columns become rows: `n` elements of `elem_bytes` a row of the input.
fn transposed(bytes: &[u8], n: usize, elem_bytes: usize) -> Vec<u8> {
    let (n_in, n_out) = (n, bytes.len() / elem_bytes / n.max(1));
    let element = |o: usize, i: usize| &bytes[(i * n_out + o) * elem_bytes..][..elem_bytes];
    (0..n_out).flat_map(|o| (0..n_in).flat_map(move |i| element(o, i))).copied().collect()
}

/// GGUF and llama2.c keep the two numbers that RoPE turns together side by side (2i, 2i + 1); Hugging Face keeps them
/// half a head apart (i, i + d/2). Moves the rows.
fn rotate_half_order(bytes: &[u8], n_rows: usize, d: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / n_rows;
    let source = |row: usize| {
        let (head, i) = (row / d, row % d);
        head * d + 2 * (i % (d / 2)) + i / (d / 2)
    };
    (0..n_rows).flat_map(|row| &bytes[source(row) * row_bytes..][..row_bytes]).copied().collect()
}
