//! Tensor descriptions and data of a GGUF file.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use tensor::packed::WeightKind;

use super::metadata::Metadata;
use super::reader::{Reader, bad};
use crate::names::{self, LayerPart, Part};
use crate::source::Source;
use crate::weights::Order;
use crate::{Architecture, Config, Result, RopeScaling, WeightTensor, Weights};

/// Tensors a file may have; a thousand layers have nine each.
const N_TENSORS_MAX: u64 = 1 << 16;

/// Divisors of RoPE's frequencies, one a pair.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Where a tensor lies.
pub(super) struct TensorInfo {
    /// GGUF's name.
    pub(super) name: String,
    /// Row-major (GGUF stores them reversed).
    pub(super) dims: Vec<usize>,
    kind: WeightKind,
    /// First byte, in the file.
    at: u64,
    bytes: u64,
}

/// Reads and checks the descriptions, after which every tensor is known to lie in the file, apart from the others.
pub(super) fn read_infos<R: Read + Seek>(
    reader: &mut Reader<R>,
    n_tensors: u64,
    metadata: &Metadata,
) -> Result<Vec<TensorInfo>> {
    if n_tensors > N_TENSORS_MAX {
        return Err(bad("tensor count", format!("{n_tensors}, at most {N_TENSORS_MAX} are allowed")));
    }
    let alignment = metadata.count("general.alignment")?.unwrap_or(32) as u64;
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(bad("general.alignment", format!("{alignment} is no power of two up to 2^20")));
    }
    let mut infos = (0..n_tensors).map(|i| read_info(reader, i)).collect::<Result<Vec<_>>>()?;
    let data_at = reader.at().next_multiple_of(alignment);
    for info in &mut infos {
        if !info.at.is_multiple_of(alignment) {
            return Err(bad(&info.name, format!("offset {} is not aligned to {alignment}", info.at)));
        }
        let end = info.at.checked_add(data_at).and_then(|at| at.checked_add(info.bytes));
        if end.is_none_or(|end| end > reader.len()) {
            let problem = format!(
                "{} bytes at offset {} lie past the end of the file ({} bytes of tensors)",
                info.bytes,
                info.at,
                reader.len().saturating_sub(data_at)
            );
            return Err(bad(&info.name, problem));
        }
        info.at += data_at;
    }
    infos.sort_by_key(|info| info.at);
    for pair in infos.windows(2) {
        if pair[0].at + pair[0].bytes > pair[1].at {
            return Err(bad(&pair[1].name, format!("overlaps {}", pair[0].name)));
        }
    }
    Ok(infos)
}

fn read_info<R: Read + Seek>(reader: &mut Reader<R>, i: u64) -> Result<TensorInfo> {
    let name = reader.string(&format!("name of tensor {i}"))?;
    let n_dims = reader.u32(&name)?;
    if !(1..=4).contains(&n_dims) {
        return Err(bad(&name, format!("has {n_dims} dimensions, 1 to 4 are allowed")));
    }
    let dims = (0..n_dims).map(|_| reader.u64(&name)).collect::<Result<Vec<u64>>>()?;
    let kind = kind(reader.u32(&name)?).map_err(|problem| bad(&name, problem))?;
    let at = reader.u64(&name)?;
    let n_elems = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(usize::try_from(dim).ok()?));
    let n_elems = n_elems.filter(|&n| n > 0).ok_or_else(|| bad(&name, format!("has the shape {dims:?}")))?;
    let whole_rows = dims[0].is_multiple_of(kind.block_elems() as u64);
    let bytes = kind.bytes(n_elems).filter(|_| whole_rows);
    let bytes =
        bytes.ok_or_else(|| bad(&name, format!("shape {dims:?} is not whole blocks of {}", kind.name())))?;
    // Each fits usize, since their product does.
    let dims = dims.iter().rev().map(|&dim| dim as usize).collect();
    Ok(TensorInfo { name, dims, kind, at, bytes: bytes as u64 })
}

/// GGML's number of a kind.
pub(super) fn kind_id(wanted: WeightKind) -> u32 {
    (0..u32::from(u8::MAX)).find(|id| kind(*id) == Ok(wanted)).expect("every kind is read")
}

/// Kinds by GGML's numbers; the error names what is not read.
fn kind(id: u32) -> std::result::Result<WeightKind, String> {
    const OTHERS: [(u32, &str); 6] =
        [(9, "Q8_1"), (10, "Q2_K"), (11, "Q3_K"), (15, "Q8_K"), (20, "IQ4_NL"), (39, "MXFP4")];
    Ok(match id {
        0 => WeightKind::F32,
        1 => WeightKind::F16,
        2 => WeightKind::Q4_0,
        3 => WeightKind::Q4_1,
        6 => WeightKind::Q5_0,
        7 => WeightKind::Q5_1,
        8 => WeightKind::Q8_0,
        12 => WeightKind::Q4_K,
        13 => WeightKind::Q5_K,
        14 => WeightKind::Q6_K,
        30 => WeightKind::Bf16,
        _ => {
            let name = OTHERS.iter().find(|(other, _)| *other == id).map(|(_, name)| *name);
            return Err(format!("weights of kind {} are not supported", name.unwrap_or(&id.to_string())));
        }
    })
}

/// Gives the tensors their Hugging Face names; their numbers are read when they are wanted. Divisors of RoPE's
/// frequencies, which are no weights, go into the configuration.
pub(super) fn tensors(source: &Source, infos: Vec<TensorInfo>, mut config: Config) -> Result<Weights> {
    let mut tensors = BTreeMap::new();
    for TensorInfo { name, dims, kind, at, .. } in infos {
        let tensor = WeightTensor::stored(kind, dims, source.clone(), at);
        let failed = |err: std::io::Error| bad(&name, format!("cannot be read: {err}"));
        if name == ROPE_DIVISORS {
            set_divisors(&mut config, tensor.to_f32().map_err(failed)?)?;
            continue;
        }
        let (hf_name, part) = names::from_gguf(&name, &config).ok_or_else(|| {
            bad(&name, format!("no tensor of a {} is called so", config.architecture.gguf_name()))
        })?;
        let tensor = match interleaved(config.architecture, part) {
            false => tensor,
            true if tensor.dims.len() == 2 && tensor.dims[0].is_multiple_of(config.head_width) => {
                tensor.reordered(Order::Interleaved(config.head_width)).map_err(failed)?
            }
            true => {
                let problem = format!("shape {:?} is not whole heads of {}", tensor.dims, config.head_width);
                return Err(bad(&name, problem));
            }
        };
        if tensors.insert(hf_name, tensor).is_some() {
            return Err(bad(&name, "is there twice"));
        }
    }
    Ok(Weights { config, tensors })
}

/// Whether GGUF files have the rows of this part in interleaved order. The other architectures' are as Hugging Face's.
pub(super) fn interleaved(architecture: Architecture, part: Part) -> bool {
    architecture == Architecture::Llama && matches!(part, Part::Layer(LayerPart::Q | LayerPart::K))
}

fn set_divisors(config: &mut Config, divisors: Vec<f32>) -> Result<()> {
    if config.rope.scaling != RopeScaling::None || divisors.len() != config.head_width / 2 {
        let problem = format!("{} divisors for heads of {}", divisors.len(), config.head_width);
        return Err(bad(ROPE_DIVISORS, problem));
    }
    config.rope.scaling = super::config::scaling_of(divisors, &config.rope);
    config.check().map_err(|err| bad(ROPE_DIVISORS, err.to_string()))
}
