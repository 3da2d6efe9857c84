use std::fs;
use std::path::{Path, PathBuf};

use crate::read::is_known_format;
use crate::{Error, Result};

/// Deeper than this a directory is taken for a loop of links.
const DEPTH_MAX: usize = 32;

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InputFile {
    pub(crate) path: PathBuf,
    /// What the dataset records: the named input's own name and the path below it, so that a dataset does not depend
    /// on where its inputs lay.
    pub(crate) name: String,
}

#[derive(Debug, Default)]
pub(crate) struct Inputs {
    pub(crate) files: Vec<InputFile>,
    /// Files in directories whose format is not known. (A file that was named itself is an error then.)
    pub(crate) n_ignored: u64,
}

/// The files to read for `inputs`, in their order; directories sorted by path, dotted names left out.
pub(crate) fn input_files(inputs: &[PathBuf]) -> Result<Inputs> {
    let mut found = Inputs::default();
    for input in inputs {
        // `data/` and `.` have their names from the real path.
        let real = fs::canonicalize(input).map_err(|error| Error::open(input, error))?;
        let name =
            input.file_name().or(real.file_name()).map_or_else(String::new, |n| n.to_string_lossy().into());
        if real.is_dir() {
            let n_before = found.files.len();
            walk(input, &name, 0, &mut found)?;
            if found.files.len() == n_before {
                return Err(Error::Empty { path: input.clone() });
            }
        } else if !real.is_file() {
            return Err(Error::NotReadable { path: input.clone(), what: "neither a file nor a directory" });
        } else if !is_known_format(input) {
            return Err(Error::UnknownFormat { path: input.clone() });
        } else {
            found.files.push(InputFile { path: input.clone(), name });
        }
    }
    Ok(found)
}

fn walk(dir: &Path, name: &str, depth: usize, found: &mut Inputs) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(Error::NotReadable {
            path: dir.to_path_buf(),
            what: "nested too deep: a loop of links?",
        });
    }
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut entries = entries.map_err(|error| Error::open(dir, error))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, file_name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if file_name.starts_with('.') {
            continue;
        }
        let meta = fs::metadata(&path).map_err(|error| Error::open(&path, error))?;
        let name = format!("{name}/{file_name}");
        if meta.is_dir() {
            walk(&path, &name, depth + 1, found)?;
        } else if meta.is_file() && is_known_format(&path) {
            found.files.push(InputFile { path, name });
        } else {
            found.n_ignored += 1;
        }
    }
    Ok(())
}
