//! Hugging Face model directories: `config.json` and `model.safetensors`, whole or in shards with an index.
//!
//! What is written here loads in transformers, vLLM and llama.cpp. Tokenizer files are the tokenizer's.

mod arrange;
mod safetensors;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tensor::packed::WeightKind;

use crate::source::Source;
use crate::{Config, Error, Result, WeightTensor, Weights};

/// The shape.
pub const CONFIG_FILE: &str = "config.json";
/// How the model's authors want it sampled; of it, the ids that end an answer are read.
const GENERATION_FILE: &str = "generation_config.json";
/// All tensors.
pub const TENSORS_FILE: &str = "model.safetensors";
/// Which shard has which tensor, when there is more than one.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

const JSON_BYTES_MAX: u64 = 64 << 20;
const N_SHARDS_MAX: usize = 1000;

/// The part of the index that is read.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads a directory.
pub fn read_dir(dir: &Path) -> Result<Weights> {
    let mut config = Config::from_json(&read_json(&dir.join(CONFIG_FILE))?)?;
    let generation_path = dir.join(GENERATION_FILE);
    if generation_path.exists() {
        config.add_eos(&read_json(&generation_path)?)?;
    }
    let index_path = dir.join(INDEX_FILE);
    let tensors = if dir.join(TENSORS_FILE).exists() || !index_path.exists() {
        read_tensors(dir, TENSORS_FILE)?
    } else {
        read_shards(dir, &read_json(&index_path)?)?
    };
    Ok(Weights { tensors: arrange::from_files(config.architecture, tensors)?, config })
}

/// Reads what [`files`] gave.
///
/// # Errors
/// If they are damaged or of a kind that is not supported.
pub fn from_files(config: &[u8], tensors: Vec<u8>) -> Result<Weights> {
    let config = Config::from_json(config)?;
    let tensors = safetensors::read(&Source::Memory(Arc::new(tensors)), TENSORS_FILE)?;
    Ok(Weights { tensors: arrange::from_files(config.architecture, tensors)?, config })
}

/// The directory's files, by name: `config.json` and `model.safetensors`.
pub fn files(weights: &Weights) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let tensors = safetensors::write(&arrange::to_files(weights.config.architecture, &weights.tensors)?)?;
    Ok(vec![(CONFIG_FILE, config_json(weights).into_bytes()), (TENSORS_FILE, tensors)])
}

/// What `config.json` says.
pub fn config_json(weights: &Weights) -> String {
    let kind = weights.tensors.values().map(|tensor| tensor.kind).find(|kind| *kind != WeightKind::F32);
    let dtype = match kind {
        None => "float32",
        Some(WeightKind::F16) => "float16",
        Some(_) => "bfloat16",
    };
    weights.config.to_json(dtype)
}

/// Writes what `model.safetensors` holds, one tensor after the other.
pub fn write_tensors(out: &mut dyn Write, weights: &Weights) -> Result<()> {
    safetensors::write_to(out, &arrange::to_files(weights.config.architecture, &weights.tensors)?)
}

/// Writes a directory, which is made if it is not there.
pub fn write_dir(weights: &Weights, dir: &Path) -> Result<()> {
    let failed = |path: &Path, source| Error::Write { path: path.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(|source| failed(dir, source))?;
    for (name, bytes) in files(weights)? {
        let path = dir.join(name);
        std::fs::write(&path, bytes).map_err(|source| failed(&path, source))?;
    }
    Ok(())
}

fn read_shards(dir: &Path, index: &[u8]) -> Result<BTreeMap<String, WeightTensor>> {
    let bad = |problem: String| Error::Safetensors { file: INDEX_FILE.to_owned(), problem };
    let index: Index = serde_json::from_slice(index).map_err(|err| bad(err.to_string()))?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    if shards.len() > N_SHARDS_MAX {
        return Err(bad(format!("{} shards, allowed are {N_SHARDS_MAX}", shards.len())));
    }
    let mut tensors = BTreeMap::new();
    for shard in shards {
        // A name that is a path could point out of the directory.
        let plain = shard.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !plain || !shard.ends_with(".safetensors") {
            return Err(bad(format!("shard {shard:?} is not a plain name ending in .safetensors")));
        }
        for (name, tensor) in read_tensors(dir, shard)? {
            if index.weight_map.get(&name) != Some(shard) {
                return Err(Error::Tensor {
                    name,
                    problem: format!("is in {shard}, not where the index has it"),
                });
            }
            tensors.insert(name, tensor);
        }
    }
    match index.weight_map.keys().find(|name| !tensors.contains_key(*name)) {
        Some(name) => Err(Error::MissingTensor(name.clone())),
        None => Ok(tensors),
    }
}

pub(crate) fn read_tensors(dir: &Path, file: &str) -> Result<BTreeMap<String, WeightTensor>> {
    safetensors::read(&Source::open(&dir.join(file))?, file)
}

/// The bytes of a file with these tensors.
pub(crate) fn tensor_bytes(tensors: &BTreeMap<String, WeightTensor>) -> Result<Vec<u8>> {
    safetensors::write(tensors)
}

pub(crate) fn read_json(path: &Path) -> Result<Vec<u8>> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > JSON_BYTES_MAX {
        return Err(failed(std::io::Error::other(format!("{bytes} bytes, allowed are {JSON_BYTES_MAX}"))));
    }
    std::fs::read(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParamTable;
    use crate::config::tests::tiny;

    #[test]
    fn parameters_come_back_bit_for_bit() {
        for tied_embeddings in [true, false] {
            let config = Config { tied_embeddings, ..tiny() };
            let table = ParamTable::new(&config);
            let params = table.init(3);
            let dir = tempfile::tempdir().unwrap();
            write_dir(&table.to_weights(&config, &params, WeightKind::F32), dir.path()).unwrap();
            let weights = read_dir(dir.path()).unwrap();
            assert_eq!(weights.config, config);
            assert_eq!(&*table.from_weights(weights).unwrap(), &*params);
            let mut files = files(&table.to_weights(&config, &params, WeightKind::F32)).unwrap();
            let (tensors, json) = (files.pop().unwrap().1, files.pop().unwrap().1);
            let weights = from_files(&json, tensors).unwrap();
            assert_eq!(&*table.from_weights(weights).unwrap(), &*params);
        }
    }

    #[test]
    fn bf16_rounds_once() {
        let config = tiny();
        let table = ParamTable::new(&config);
        let params = table.init(3);
        let weights = table.to_weights(&config, &params, WeightKind::Bf16);
        let files = files(&weights).unwrap();
        assert!(String::from_utf8(files[0].1.clone()).unwrap().contains("\"bfloat16\""));
        assert!(files[1].1.len() < 2 * table.n_params() + 4096);
        let back = table.from_weights(weights).unwrap();
        for (back, param) in back.iter().zip(params.iter()) {
            assert_eq!(*back, half::bf16::from_f32(*param).to_f32());
        }
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_named() {
        let config = tiny();
        let table = ParamTable::new(&config);
        let weights = || table.to_weights(&config, &table.init(3), WeightKind::F32);
        let name = "model.layers.1.mlp.up_proj.weight";
        let mut missing = weights();
        missing.tensors.remove(name);
        let mut misshapen = weights();
        misshapen.tensors.get_mut(name).unwrap().dims.reverse();
        for weights in [missing, misshapen] {
            let err = table.from_weights(weights).unwrap_err().to_string();
            assert!(err.contains(name), "{err}");
        }
    }

    /// Puts the tiny model into two shards with this index.
    fn sharded(index: &str) -> Result<Weights> {
        let config = tiny();
        let table = ParamTable::new(&config);
        let mut weights = table.to_weights(&config, &table.init(3), WeightKind::F32);
        let second = weights.tensors.split_off("model.layers.1");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), config.to_json("float32")).unwrap();
        let mut weight_map = serde_json::Map::new();
        for (shard, tensors) in [("a.safetensors", &weights.tensors), ("b.safetensors", &second)] {
            std::fs::write(dir.path().join(shard), safetensors::write(tensors).unwrap()).unwrap();
            weight_map.extend(tensors.keys().map(|name| (name.clone(), shard.into())));
        }
        let right = serde_json::json!({"weight_map": weight_map}).to_string();
        let index = if index.is_empty() { right } else { index.replace("RIGHT", &right[1..right.len() - 1]) };
        std::fs::write(dir.path().join(INDEX_FILE), index).unwrap();
        read_dir(dir.path())
    }

    #[test]
    fn shards_are_put_together() {
        let config = tiny();
        let table = ParamTable::new(&config);
        assert_eq!(&*table.from_weights(sharded("").unwrap()).unwrap(), &*table.init(3));
    }

    #[test]
    fn bad_indexes_are_refused() {
        for (index, expected) in [
            ("{", INDEX_FILE),
            ("{}", "weight_map"),
            (r#"{"weight_map":{"x":"../a.safetensors"}}"#, "../a.safetensors"),
            (r#"{"weight_map":{"x":"/etc/passwd"}}"#, "/etc/passwd"),
            (r#"{"weight_map":{"x":"c.safetensors"}}"#, "c.safetensors"),
            (r#"{"weight_map":{"x":"a.safetensors"}}"#, "not where the index has it"),
        ] {
            let err = sharded(index).unwrap_err().to_string();
            assert!(err.contains(expected), "{index}: {err}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_dir(dir.path()).unwrap_err().to_string().contains(CONFIG_FILE));
        std::fs::write(dir.path().join(CONFIG_FILE), tiny().to_json("float32")).unwrap();
        assert!(read_dir(dir.path()).unwrap_err().to_string().contains(TENSORS_FILE));
    }
}
