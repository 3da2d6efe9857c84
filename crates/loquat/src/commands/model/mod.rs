//! `loquat model`: models kept, shown, fetched, converted.

mod convert;
mod keep;
mod pull;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use store::Bundle;

use crate::args::ModelCommand;
use crate::home::Home;

pub(crate) fn run(home: &Home, command: &ModelCommand) -> Result<ExitCode> {
    match command {
        ModelCommand::List => {
            for model in home.control()?.list_models()? {
                println!("{:<32} {:<5} {}", model.name, model.kind.as_str(), model.source);
            }
        }
        ModelCommand::Show { model, json } => show::show(&resolve(home, model)?, *json)?,
        ModelCommand::Add { name, path } => keep::add(home, name, path)?,
        ModelCommand::Pull { model, name } => pull::pull(home, model, name.as_deref())?,
        ModelCommand::Import { path, name } => keep::import(home, path, name.as_deref())?,
        ModelCommand::Export(args) => convert::export(home, args)?,
        ModelCommand::Quantize(args) => convert::quantize(home, args)?,
        ModelCommand::Rm { name } => keep::remove(home, name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The files of a model named on the command line: a path, a model published to the store, or one added by path.
pub(crate) fn resolve(home: &Home, model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let unknown = || format!("{model} is neither a file, a directory nor a model kept here");
    if store::ObjectName::parse(&format!("models/{model}")).is_err() {
        anyhow::bail!(unknown());
    }
    if let Some(bundle) = Bundle::open(&home.store()?, &format!("models/{model}"))? {
        return bring(&bundle, &home.models().join(model));
    }
    let added = home.control()?.get_model(model)?;
    added.map(|model| PathBuf::from(model.source)).with_context(unknown)
}

/// Lays a model of the store out in `dir`; returns where it is: a Hugging Face directory, or one GGUF file in it.
pub(crate) fn bring(bundle: &Bundle, dir: &Path) -> Result<PathBuf> {
    bundle.download_to(dir)?;
    let is_gguf = bundle.manifest().files.iter().any(|file| file.name == keep::GGUF_FILE);
    Ok(if is_gguf { dir.join(keep::GGUF_FILE) } else { dir.to_owned() })
}

/// What a model is called when nobody has said: its file's name without the ending, in lower case.
pub(crate) fn name_of(model: &str) -> String {
    let path = Path::new(model);
    let stem = path.file_name().and_then(|n| n.to_str()).unwrap_or(model);
    stem.strip_suffix(".gguf").unwrap_or(stem).to_lowercase()
}
