//! A model from a path, whatever its format.

use std::path::Path;

use tokenizer::GgufVocab;

use crate::{Error, Result, Weights, gguf, hf};

/// The longest tokenizer.json or template that is read: the largest published ones are some 35 MB.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Everything a directory or file says that is needed to serve it.
#[derive(Debug)]
pub struct Loaded {
    /// Shape and tensors.
    pub weights: Weights,
    /// What a tokenizer can be built of.
    pub tokenizer: TokenizerFiles,
    /// Jinja source of the chat template; base models have none.
    pub chat_template: Option<String>,
}

/// A tokenizer as it lies beside the weights; this crate reads none.
#[derive(Debug)]
pub enum TokenizerFiles {
    /// `tokenizer.json`, and `tokenizer_config.json` where there is one.
    Json {
        /// Hugging Face `tokenizer.json`.
        tokenizer: Vec<u8>,
        /// Hugging Face `tokenizer_config.json`.
        config: Option<Vec<u8>>,
    },
    /// Metadata of a GGUF file.
    Gguf(GgufVocab),
    /// None was found.
    None,
}

/// Reads a `.gguf` file or a Hugging Face directory.
///
/// # Errors
/// If the path is neither, or its files are damaged, cut short, of a newer format or of another architecture.
pub fn load(path: &Path) -> Result<Loaded> {
    if path.is_dir() {
        return load_dir(path);
    }
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        let gguf::Gguf { weights, vocab, chat_template } = gguf::read(path)?;
        let tokenizer = vocab.map_or(TokenizerFiles::None, TokenizerFiles::Gguf);
        return Ok(Loaded { weights, tokenizer, chat_template });
    }
    Err(Error::NotAModel(path.to_owned()))
}

fn load_dir(dir: &Path) -> Result<Loaded> {
    if !dir.join("config.json").exists() {
        return Err(Error::NotAModel(dir.to_owned()));
    }
    let weights = hf::read_dir(dir)?;
    let config = read_optional(&dir.join("tokenizer_config.json"))?;
    let template = match read_optional(&dir.join("chat_template.jinja"))? {
        Some(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        None => config.as_deref().and_then(template_of),
    };
    let tokenizer = match read_optional(&dir.join("tokenizer.json"))? {
        Some(tokenizer) => TokenizerFiles::Json { tokenizer, config },
        None => TokenizerFiles::None,
    };
    Ok(Loaded { weights, tokenizer, chat_template: template })
}

/// The template inside a `tokenizer_config.json`: a text, or a list of named ones of which "default" counts.
fn template_of(config: &[u8]) -> Option<String> {
    let config: serde_json::Value = serde_json::from_slice(config).ok()?;
    match &config["chat_template"] {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > TEXT_BYTES_MAX => Err(failed(std::io::Error::other(format!(
            "it has {} bytes, at most {TEXT_BYTES_MAX} are read",
            meta.len()
        )))),
        Ok(_) => std::fs::read(path).map(Some).map_err(failed),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(e)),
    }
}
