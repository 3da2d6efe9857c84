//! `loquat model`: the models that `up` serves.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use control::{Control, ModelKind};
use store::Bundle;

use crate::args::ModelCommand;
use crate::home::Home;
use crate::service::BUNDLE;

pub(crate) fn run(home: &Home, command: &ModelCommand) -> Result<ExitCode> {
    let control = Control::open(&home.database())?;
    match command {
        ModelCommand::List => {
            for model in control.list_models()? {
                println!("{:<32} {:<5} {}", model.name, model.kind.as_str(), model.source);
            }
        }
        ModelCommand::Add { name, path } => {
            let path = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
            let loaded = model::load(&path).with_context(|| format!("cannot load {}", path.display()))?;
            let kind = if loaded.chat_template.is_some() { ModelKind::Chat } else { ModelKind::Base };
            control.put_model(name, kind, &path.display().to_string())?;
        }
        ModelCommand::Rm { name } => remove(home, &control, name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes a model. One that was published here goes from the store as well, its manifest first: what is in the store is
/// served, so that the row alone would come back.
fn remove(home: &Home, control: &Control, name: &str) -> Result<()> {
    let Some(model) = control.get_model(name)? else { bail!("there is no model {name}") };
    if let Some(prefix) = model.source.strip_prefix(BUNDLE) {
        let store = home.store()?;
        let mut objects = store.list(prefix)?;
        objects.sort_by_key(|o| o.name.file_name() != "manifest.json");
        objects.iter().try_for_each(|o| store.delete(&o.name))?;
    }
    control.delete_model(name)?;
    Ok(())
}

/// The files of a model named on the command line: a path, or a model published to the store.
pub(crate) fn resolve(home: &Home, model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let bundle = Bundle::open(&home.store()?, &format!("models/{model}"))
        .ok()
        .flatten()
        .with_context(|| format!("{model} is neither a file, a directory nor a model in the store"))?;
    let dir = home.models().join(model);
    bundle.download_to(&dir)?;
    Ok(dir)
}

/// What a model is called when nobody has said: its file's name without the ending, in lower case.
pub(crate) fn name_of(model: &str) -> String {
    let path = Path::new(model);
    let stem = path.file_name().and_then(|n| n.to_str()).unwrap_or(model);
    stem.strip_suffix(".gguf").unwrap_or(stem).to_lowercase()
}
