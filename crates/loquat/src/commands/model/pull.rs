//! `loquat model pull`: from the Hugging Face hub into the store.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::keep::{self, BESIDE};
use crate::home::Home;
use crate::hub::{Hub, RemoteFile, Repo, check_repo_name};
use crate::machine::bytes_text;
use crate::view::{bar, progress};

const ENDPOINT: &str = "https://huggingface.co";
/// Kinds in the order in which one is taken when a repository has several GGUF files and none is named.
const PREFERRED: [&str; 5] = ["Q4_K_M", "Q4_1", "Q4_0", "Q8_0", "F16"];

/// What is asked for: `OWNER/NAME[@REVISION][:FILE]`.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    repo: String,
    revision: String,
    file: Option<String>,
}

impl Wanted {
    fn parse(text: &str) -> Result<Wanted> {
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) if !file.is_empty() => (rest, Some(file.to_owned())),
            Some(_) => bail!("{text:?} names no file after its colon"),
            None => (text, None),
        };
        let (repo, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        check_repo_name(repo)?;
        if revision.is_empty() {
            bail!("{text:?} names no revision after its @");
        }
        Ok(Wanted { repo: repo.to_owned(), revision: revision.to_owned(), file })
    }
}

pub(super) fn pull(home: &Home, model: &str, name: Option<&str>) -> Result<()> {
    let wanted = Wanted::parse(model)?;
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let hub = Hub::new(&var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()), var("HF_TOKEN"));
    let repo = hub.repo(&wanted.repo, &wanted.revision)?;
    let files = choose(&repo, wanted.file.as_deref())?;
    let name = name.map_or_else(|| default_name(&wanted, &files), str::to_owned);
    let dir = home.downloads().join(format!("{}-{}", wanted.repo.replace('/', "--"), repo.commit));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    fetch_all(&hub, &repo, &files, &dir)?;
    let bytes = keep::keep(home, &model_path(&dir, &files), &name)?;
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    println!("{name}: {} from {} at {}", bytes_text(bytes), wanted.repo, &repo.commit[..12]);
    Ok(())
}

fn default_name(wanted: &Wanted, files: &[RemoteFile]) -> String {
    let name = match files {
        [one] => one.name.as_str(),
        _ => wanted.repo.as_str(),
    };
    super::name_of(name)
}

/// The files to fetch: one GGUF file, or what makes up a directory.
fn choose(repo: &Repo, file: Option<&str>) -> Result<Vec<RemoteFile>> {
    let ggufs: Vec<&RemoteFile> = repo.files.iter().filter(|f| f.name.ends_with(".gguf")).collect();
    let tensors: Vec<&RemoteFile> =
        repo.files.iter().filter(|f| f.name.ends_with(".safetensors") && !f.name.contains('/')).collect();
    if file.is_none() && !tensors.is_empty() {
        let beside = repo.files.iter().filter(|f| BESIDE.contains(&f.name.as_str()));
        return Ok(beside.chain(tensors).cloned().collect());
    }
    let names = || ggufs.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ");
    let matches = |wanted: &str| -> Vec<&RemoteFile> {
        let exact: Vec<_> = ggufs.iter().copied().filter(|f| f.name == wanted).collect();
        if !exact.is_empty() {
            exact
        } else {
            ggufs.iter().copied().filter(|f| has_kind(&f.name, wanted)).collect()
        }
    };
    let found = match file {
        Some(file) => matches(file),
        None if ggufs.len() == 1 => ggufs.clone(),
        None => PREFERRED.iter().map(|kind| matches(kind)).find(|found| found.len() == 1).unwrap_or_default(),
    };
    match (&found[..], file) {
        ([one], _) if one.name.contains("-of-") => {
            bail!("{} is a part of a split file, which cannot be read", one.name)
        }
        ([one], _) => Ok(vec![(*one).clone()]),
        (_, _) if ggufs.is_empty() => bail!("{} has neither safetensors nor GGUF files", repo.name),
        ([], Some(file)) => bail!("{} has no GGUF file {file}, but {}", repo.name, names()),
        _ => bail!("name one of the GGUF files of {} after a colon: {}", repo.name, names()),
    }
}

/// Whether a file's name says this kind of weights, whole: `Q4_K` is not `Q4_K_M`.
fn has_kind(name: &str, kind: &str) -> bool {
    let stem = name.strip_suffix(".gguf").unwrap_or(name);
    stem.split(['.', '-', '/']).any(|word| word.eq_ignore_ascii_case(kind))
}

fn fetch_all(hub: &Hub, repo: &Repo, files: &[RemoteFile], dir: &Path) -> Result<()> {
    let total: u64 = files.iter().map(|f| f.bytes).sum();
    let mut shown = Shown { total, before: 0, started: None, percent: None };
    for file in files {
        let path = local_path(dir, file);
        hub.fetch(repo, file, &path, &mut |have| shown.show(&file.name, have))?;
        shown.before += file.bytes;
    }
    progress("");
    Ok(())
}

/// Folders are left out: of a directory only files at the top are fetched, and a GGUF file is alone.
fn local_path(dir: &Path, file: &RemoteFile) -> PathBuf {
    dir.join(file.name.rsplit('/').next().unwrap_or(&file.name))
}

fn model_path(dir: &Path, files: &[RemoteFile]) -> PathBuf {
    match files {
        [one] if one.name.ends_with(".gguf") => local_path(dir, one),
        _ => dir.to_owned(),
    }
}

struct Shown {
    total: u64,
    /// Of the files that are done.
    before: u64,
    /// When, and with how many bytes there already.
    started: Option<(Instant, u64)>,
    percent: Option<u64>,
}

impl Shown {
    fn show(&mut self, name: &str, have: u64) {
        let done = self.before + have;
        let (since, first) = *self.started.get_or_insert((Instant::now(), done));
        let share = done as f64 / self.total.max(1) as f64;
        let percent = Some((share * 100.0) as u64);
        if percent != self.percent {
            let speed = (done.saturating_sub(first)) as f64 / since.elapsed().as_secs_f64().max(1e-3);
            let (done, total) = (bytes_text(done), bytes_text(self.total));
            progress(&format!(
                "{} {done} of {total}, {}/s  {name}",
                bar(share, 24),
                bytes_text(speed as u64)
            ));
        }
        self.percent = percent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_understood() {
        let wanted = |repo: &str, revision: &str, file: Option<&str>| Wanted {
            repo: repo.into(),
            revision: revision.into(),
            file: file.map(str::to_owned),
        };
        assert_eq!(Wanted::parse("a/b").unwrap(), wanted("a/b", "main", None));
        assert_eq!(Wanted::parse("a/b@v1:Q4_K_M").unwrap(), wanted("a/b", "v1", Some("Q4_K_M")));
        assert_eq!(Wanted::parse("gpt2:x.gguf").unwrap(), wanted("gpt2", "main", Some("x.gguf")));
        for bad in ["", "a/b/c", "a/b:", "a/b@", "../b", "a b"] {
            assert!(Wanted::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_kind_is_a_whole_word_of_a_name() {
        assert!(has_kind("SmolLM2.Q4_K_M.gguf", "q4_k_m") && has_kind("gemma-3-270m-Q8_0.gguf", "Q8_0"));
        assert!(!has_kind("SmolLM2.Q4_K_M.gguf", "Q4_K") && !has_kind("m-Q8_0.gguf", "8_0"));
    }
}
