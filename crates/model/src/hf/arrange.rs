//! Between the tensors of Hugging Face files and ours: other prefixes, transposed matrices, scales kept as differences
//! from one, and leftovers of old versions.

use std::collections::BTreeMap;

use crate::names::{LayerPart as L, Part, split_suffix};
use crate::weights::{Order, unreadable};
use crate::{Architecture, Result, WeightTensor};

type Tensors = BTreeMap<String, WeightTensor>;

/// Buffers that some versions of transformers saved with the weights; the configuration says the same.
const LEFTOVERS: [&str; 3] = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];
/// Where models keep what is not needed for text, or not for embedding it: eyes, and a head for training.
const UNUSED: [&str; 6] = [
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "pooler.",
    "bert.pooler.",
];
/// Where it keeps its language model, and what that is called alone.
const LANGUAGE: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
];

/// Tensors as files have them become ours.
pub(super) fn from_files(architecture: Architecture, files: Tensors) -> Result<Tensors> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in files {
        if LEFTOVERS.iter().any(|end| name.ends_with(end))
            || UNUSED.iter().any(|start| name.starts_with(start))
        {
            continue;
        }
        let name = our_name(architecture, &name);
        let failed = |err: std::io::Error| unreadable(&name, &err);
        let tensor = match stored(architecture, &name) {
            Stored::Plain => tensor,
            Stored::Transposed if tensor.dims.len() == 2 => {
                tensor.reordered(Order::Transposed).map_err(failed)?
            }
            Stored::Transposed => tensor,
            Stored::LessOne => shifted(&tensor, 1.0).map_err(failed)?,
        };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// Our tensors as files have them.
pub(super) fn to_files(architecture: Architecture, tensors: &Tensors) -> Result<Tensors> {
    let mut files = BTreeMap::new();
    for (name, tensor) in tensors {
        let failed = |err: std::io::Error| unreadable(name, &err);
        let tensor = match stored(architecture, name) {
            Stored::Plain => tensor.clone(),
            Stored::Transposed => tensor.clone().reordered(Order::Transposed).map_err(failed)?,
            Stored::LessOne => shifted(tensor, -1.0).map_err(failed)?,
        };
        files.insert(name.clone(), tensor);
    }
    Ok(files)
}

/// How Hugging Face's files have a tensor.
enum Stored {
    Plain,
    /// GPT-2's matrices are `[inputs, outputs]`.
    Transposed,
    /// Gemma's scales of norms are what is added to one.
    LessOne,
}

fn stored(architecture: Architecture, name: &str) -> Stored {
    let part = split_suffix(name)
        .filter(|(_, suffix)| *suffix == ".weight")
        .and_then(|(module, _)| architecture.part_of_hf(module));
    match (architecture, part) {
        (Architecture::Gpt2, Some(Part::Layer(L::Qkv | L::Output | L::Up | L::Down))) => Stored::Transposed,
        (Architecture::Gemma3, Some(Part::FinalNorm)) => Stored::LessOne,
        (
            Architecture::Gemma3,
            Some(Part::Layer(
                L::AttentionNorm | L::AttentionPostNorm | L::FfNorm | L::FfPostNorm | L::QNorm | L::KNorm,
            )),
        ) => Stored::LessOne,
        _ => Stored::Plain,
    }
}

/// The numbers plus `by`, in f32: there is no rounding to be seen beside the 8 bits of a bfloat16.
fn shifted(tensor: &WeightTensor, by: f32) -> std::io::Result<WeightTensor> {
    let values: Vec<f32> = tensor.to_f32()?.into_iter().map(|x| x + by).collect();
    Ok(WeightTensor::from_f32(&tensor.dims, &values))
}

fn our_name(architecture: Architecture, name: &str) -> String {
    let inner =
        LANGUAGE.iter().find_map(|(start, ours)| Some(format!("{ours}{}", name.strip_prefix(start)?)));
    match architecture {
        Architecture::Gemma3 => inner.unwrap_or_else(|| name.to_owned()),
        // The published file is of the model without its head, where nothing has a prefix.
        Architecture::Gpt2 if !name.starts_with("transformer.") && !name.starts_with("lm_head.") => {
            format!("transformer.{name}")
        }
        Architecture::Bert => name.strip_prefix("bert.").unwrap_or(name).to_owned(),
        _ => name.to_owned(),
    }
}
