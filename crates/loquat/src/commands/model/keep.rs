//! Models that are kept: rows that name a path, and bundles in the store.

use std::path::Path;

use anyhow::{Context, Result, bail};
use control::ModelKind;
use model::Loaded;
use store::{Bundle, BundleWriter};

use super::name_of;
use crate::home::Home;
use crate::machine::bytes_text;
use crate::service::BUNDLE;
use crate::serving;

/// What a GGUF file is called inside a bundle, whatever it was called before.
pub(super) const GGUF_FILE: &str = "model.gguf";
/// Files of a Hugging Face directory that a model needs, beside its tensors.
pub(super) const BESIDE: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

pub(super) fn add(home: &Home, name: &str, path: &Path) -> Result<()> {
    let path = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
    let loaded = check(&path)?;
    home.control()?.put_model(name, kind(&loaded), &path.display().to_string())?;
    Ok(())
}

/// Copies a model into the store.
pub(super) fn import(home: &Home, path: &Path, name: Option<&str>) -> Result<()> {
    let path = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
    let name = name.map_or_else(|| name_of(&path.display().to_string()), str::to_owned);
    let bytes = keep(home, &path, &name)?;
    println!("{name}: {} kept in the store", bytes_text(bytes));
    Ok(())
}

/// Makes a model's files a bundle and a row; returns their size. The model is checked first: what is kept can be served.
pub(super) fn keep(home: &Home, path: &Path, name: &str) -> Result<u64> {
    let loaded = check(path)?;
    let (store, control) = (home.store()?, home.control()?);
    let prefix = format!("models/{name}");
    let mut writer = BundleWriter::new(&store, &prefix).with_context(|| format!("bad name {name:?}"))?;
    let mut bytes = 0;
    for (file, source) in files(path)? {
        bytes += writer.add_path(&file, &source)?.bytes;
    }
    writer.publish(
        "model",
        serde_json::json!({"architecture": loaded.weights.config.architecture.gguf_name()}),
    )?;
    control.put_model(name, kind(&loaded), &format!("{BUNDLE}{prefix}"))?;
    Ok(bytes)
}

/// The files that make up a model, with their names in a bundle.
fn files(path: &Path) -> Result<Vec<(String, std::path::PathBuf)>> {
    if path.is_file() {
        return Ok(vec![(GGUF_FILE.to_owned(), path.to_owned())]);
    }
    let mut files = Vec::new();
    for entry in path.read_dir().with_context(|| format!("cannot list {}", path.display()))? {
        let entry = entry.with_context(|| format!("cannot list {}", path.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if BESIDE.contains(&name.as_str()) || name.ends_with(".safetensors") {
            files.push((name, entry.path()));
        }
    }
    files.sort();
    Ok(files)
}

/// A model whose header is damaged, or whose tokenizer or template cannot be used, is refused before it is kept.
fn check(path: &Path) -> Result<Loaded> {
    let loaded = model::load(path).with_context(|| format!("cannot read {}", path.display()))?;
    let tokenizer = serving::tokenizer_of(path, &loaded)?;
    if let Some(source) = &loaded.chat_template {
        serving::chat_template(source, &tokenizer)
            .with_context(|| format!("cannot use the chat template of {}", path.display()))?;
    }
    Ok(loaded)
}

fn kind(loaded: &Loaded) -> ModelKind {
    if loaded.chat_template.is_some() { ModelKind::Chat } else { ModelKind::Base }
}

/// Removes a model. One that was published here goes from the store as well, its manifest first: what is in the store is
/// served, so that the row alone would come back.
pub(super) fn remove(home: &Home, name: &str) -> Result<()> {
    let control = home.control()?;
    let store = home.store()?;
    let prefix = format!("models/{name}");
    let row = control.get_model(name)?;
    // One that was imported while nothing was up has no row yet.
    let is_stored = store::ObjectName::parse(&prefix).is_ok() && Bundle::open(&store, &prefix)?.is_some();
    let prefix = match &row {
        Some(model) => model.source.strip_prefix(BUNDLE).map(str::to_owned),
        None if is_stored => Some(prefix),
        None => bail!("there is no model {name}"),
    };
    if let Some(prefix) = prefix {
        let mut objects = store.list(&prefix)?;
        objects.sort_by_key(|o| o.name.file_name() != "manifest.json");
        objects.iter().try_for_each(|o| store.delete(&o.name))?;
    }
    if row.is_some() {
        control.delete_model(name)?;
    }
    Ok(())
}
