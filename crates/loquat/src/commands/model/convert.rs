//! `loquat model export` and `quantize`: a model in another format or with other weights.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use model::gguf::{self, Extras};
use model::{Conversion, Loaded, TokenizerFiles, Weights, hf};
use store::{Bundle, ObjectName};
use tensor::Pool;
use tensor::packed::WeightKind;
use tokenizer::GgufVocab;

use super::{name_of, resolve};
use crate::args::{Export, ExportFormat, Quantize};
use crate::home::Home;
use crate::machine::bytes_text;
use crate::serving;
use crate::view::{bar, progress};

pub(super) fn export(home: &Home, args: &Export) -> Result<()> {
    let kind = args.kind.as_deref().map(|name| kind_named(name, false)).transpose()?;
    let is_gguf = args.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let format = args.format.unwrap_or(if is_gguf { ExportFormat::Gguf } else { ExportFormat::Safetensors });
    refuse_existing(&args.out)?;
    if let Some(adapter) = adapter(home, &args.model)? {
        if args.kind.is_some() || format == ExportFormat::Gguf {
            bail!("{} is an adapter: it is written as PEFT reads it, in no other format or type", args.model);
        }
        adapter.download_to(&args.out)?;
        println!("{}: an adapter, as PEFT reads it", args.out.display());
        return Ok(());
    }
    let mut loaded = load(home, &args.model)?;
    let has_quantized = loaded.weights.tensors.values().any(|t| t.kind.is_quantized());
    let conversion = match (kind, format) {
        (Some(kind), _) => Some(kind),
        // Exact: no 16-bit float holds scale times integer without rounding.
        (None, ExportFormat::Safetensors) if has_quantized => Some(WeightKind::F32),
        _ => None,
    };
    if let Some(kind) = conversion {
        let conversion = Conversion { kind, pure: true, vectors: format == ExportFormat::Safetensors };
        convert(&mut loaded, conversion);
    }
    let bytes = match format {
        ExportFormat::Gguf => write_gguf(&loaded, &name_of(&args.model), &args.out)?,
        ExportFormat::Safetensors => write_directory(&loaded, &args.out)?,
    };
    println!("{}: {}", args.out.display(), bytes_text(bytes));
    Ok(())
}

/// An adapter that a run published; a model of that name comes first.
fn adapter(home: &Home, name: &str) -> Result<Option<Bundle>> {
    let prefix = format!("adapters/{name}");
    if Path::new(name).exists() || ObjectName::parse(&prefix).is_err() {
        return Ok(None);
    }
    let store = home.store()?;
    match Bundle::open(&store, &format!("models/{name}"))? {
        Some(_) => Ok(None),
        None => Ok(Bundle::open(&store, &prefix)?),
    }
}

pub(super) fn quantize(home: &Home, args: &Quantize) -> Result<()> {
    let kind = kind_named(&args.kind, true)?;
    refuse_existing(&args.out)?;
    if args.out.extension().is_none_or(|e| !e.eq_ignore_ascii_case("gguf")) {
        bail!("{} does not end in .gguf", args.out.display());
    }
    let mut loaded = load(home, &args.model)?;
    let before: usize = loaded.weights.tensors.values().map(|t| t.n_bytes()).sum();
    convert(&mut loaded, Conversion { kind, pure: args.pure, vectors: false });
    let bytes = write_gguf(&loaded, &name_of(&args.model), &args.out)?;
    println!("{}: {}, was {}", args.out.display(), bytes_text(bytes), bytes_text(before as u64));
    println!("compare them: loquat eval perplexity {} TEXT", args.out.display());
    Ok(())
}

fn kind_named(name: &str, quantized_too: bool) -> Result<WeightKind> {
    let kinds = || WeightKind::ALL.into_iter().filter(|kind| quantized_too || !kind.is_quantized());
    let found = kinds().find(|kind| kind.name().eq_ignore_ascii_case(name));
    found.with_context(|| {
        let names: Vec<&str> = kinds().map(WeightKind::name).collect();
        format!("there is no type {name} here, but {}", names.join(", "))
    })
}

/// What is there may be somebody's only copy.
fn refuse_existing(out: &Path) -> Result<()> {
    if out.exists() {
        bail!("{} is there already", out.display());
    }
    Ok(())
}

fn load(home: &Home, model: &str) -> Result<Loaded> {
    let path = resolve(home, model)?;
    model::load(&path).with_context(|| format!("cannot load {}", path.display()))
}

/// Nothing is computed before it is written, so that a model larger than memory can be converted.
fn convert(loaded: &mut Loaded, conversion: Conversion) {
    loaded.weights.convert(conversion, &Arc::new(Pool::new(crate::n_threads())));
}

/// A file, and how much of it there is.
struct Shown {
    file: BufWriter<File>,
    n_written: u64,
    /// About as much as there will be.
    n_total: u64,
    percent: u64,
}

impl Shown {
    fn create(path: &Path, weights: &Weights) -> std::io::Result<Shown> {
        let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        Ok(Shown { file, n_written: 0, n_total: weights.n_bytes().max(1) as u64, percent: 0 })
    }

    fn finish(self) -> std::io::Result<()> {
        progress("");
        self.file.into_inner().map_err(|error| error.into_error())?.sync_all()
    }
}

impl Write for Shown {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.n_written += n as u64;
        let percent = (100 * self.n_written / self.n_total).min(100);
        if percent > self.percent {
            self.percent = percent;
            progress(&format!("{} {percent} %", bar(percent as f64 / 100.0, 24)));
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Writes the file under another name first, so that it is there whole or not at all.
fn write_gguf(loaded: &Loaded, name: &str, out: &Path) -> Result<u64> {
    let vocab = gguf_vocab(&loaded.tokenizer)?;
    let extras = Extras { name, vocab: vocab.as_ref(), chat_template: loaded.chat_template.as_deref() };
    let part = part_of(out);
    let written = Shown::create(&part, &loaded.weights).map_err(anyhow::Error::from).and_then(|mut file| {
        gguf::write(&mut file, &loaded.weights, extras)?;
        file.finish()?;
        fs::rename(&part, out)?;
        Ok(out.metadata()?.len())
    });
    if written.is_err() {
        // Half a file is of no use; that it cannot be removed changes nothing about the error.
        let _ = fs::remove_file(&part);
    }
    written.with_context(|| format!("cannot write {}", out.display()))
}

fn part_of(out: &Path) -> PathBuf {
    let name = out.file_name().map_or_else(Default::default, |n| n.to_string_lossy().into_owned());
    out.with_file_name(format!(".{name}.part"))
}

/// The tokenizer as GGUF metadata: a GGUF file's own, or built from `tokenizer.json`.
fn gguf_vocab(files: &TokenizerFiles) -> Result<Option<GgufVocab>> {
    match files {
        TokenizerFiles::Gguf(vocab) => Ok(Some(vocab.clone())),
        TokenizerFiles::None => Ok(None),
        TokenizerFiles::Json { .. } => {
            Ok(Some(serving::tokenizer(files)?.to_gguf().context("the tokenizer")?))
        }
    }
}

/// Writes a Hugging Face directory; like a file, it gets its name when it is whole.
fn write_directory(loaded: &Loaded, out: &Path) -> Result<u64> {
    let failed = || format!("cannot write {}", out.display());
    let mut files = vec![(hf::CONFIG_FILE, hf::config_json(&loaded.weights).into_bytes())];
    let template = loaded.chat_template.as_deref();
    match &loaded.tokenizer {
        TokenizerFiles::Json { tokenizer, config } => {
            files.push(("tokenizer.json", tokenizer.clone()));
            files.extend(config.clone().map(|config| ("tokenizer_config.json", config)));
            files.extend(template.map(|text| ("chat_template.jinja", text.as_bytes().to_vec())));
        }
        gguf @ TokenizerFiles::Gguf(_) => {
            let tokenizer = serving::tokenizer(gguf)?;
            files.push(("tokenizer.json", tokenizer.to_json().into_bytes()));
            files.push(("tokenizer_config.json", tokenizer.config_json(template).into_bytes()));
        }
        TokenizerFiles::None => {}
    }
    let part = part_of(out);
    let written = write_files(&part, &files, &loaded.weights).and_then(|bytes| {
        fs::rename(&part, out)?;
        Ok(bytes)
    });
    if written.is_err() {
        // As above.
        let _ = fs::remove_dir_all(&part);
    }
    written.with_context(failed)
}

fn write_files(dir: &Path, files: &[(&str, Vec<u8>)], weights: &Weights) -> Result<u64> {
    if dir.exists() {
        // Left by one that was killed.
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir_all(dir)?;
    for (name, bytes) in files {
        let mut file = File::create(dir.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    let path = dir.join(hf::TENSORS_FILE);
    let mut file = Shown::create(&path, weights)?;
    hf::write_tensors(&mut file, weights)?;
    file.finish()?;
    let others: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    Ok(others + path.metadata()?.len())
}
