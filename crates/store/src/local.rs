use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::contract::{check_put_if_absent_bytes, check_range, parse_prefix};
use crate::{Error, LIST_MAX, ObjectMeta, ObjectName, Put, Result, Store};

/// Where objects are written before they get their name. No object name begins with a dot.
const TEMP_DIR: &str = ".tmp";
/// How often a put goes on although a directory or its temporary file vanished under it.
const PUT_TRIES: usize = 64;

/// Objects as files below a directory; several processes may use it at once.
///
/// An object is written to a temporary file, synced, and only then linked or renamed to its name, so no reader ever
/// sees a part of it. A writer holds a lock on its temporary file; the kernel drops the lock of a killed writer, which
/// is how `open` tells its leavings from a file that is being written.
#[derive(Debug)]
pub struct Local {
    root: PathBuf,
}

/// Makes names of temporary files differ within this process, whichever `Local` writes them.
static TEMP_SERIAL: AtomicU64 = AtomicU64::new(0);

impl Local {
    /// Opens (and if need be creates) the directory, and removes what killed writers left.
    pub fn open(root: &Path) -> Result<Local> {
        let fail =
            |source: io::Error| Error::Open { store: root.display().to_string(), source: source.into() };
        let root = std::path::absolute(root).map_err(fail)?;
        let there = root.ancestors().find(|dir| dir.is_dir()).unwrap_or(&root).to_path_buf();
        create_dirs(&root.join(TEMP_DIR)).map_err(fail)?;
        sync_dirs(&root, &there).map_err(fail)?;
        sweep(&root.join(TEMP_DIR)).map_err(fail)?;
        Ok(Local { root })
    }

    fn path(&self, name: &ObjectName) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// Writes a temporary file and gives it its name with `publish`, which says false where the name is taken.
    ///
    /// A `delete` may get in between and remove the directory that it emptied. That shows as `NotFound`, and the
    /// directory is made again. Once the file has its name its directories cannot vanish, so they are synced after it:
    /// all of them, because whoever made one may not have come to its sync yet.
    fn publish(
        &self,
        name: &ObjectName,
        write: &mut dyn FnMut(&mut File) -> Result<()>,
        publish: &dyn Fn(&Path, &Path) -> io::Result<bool>,
    ) -> Result<Put> {
        let path = self.path(name);
        let parent = path.parent().unwrap_or(&self.root);
        let mut temp =
            Temp::create(&self.root.join(TEMP_DIR)).map_err(|error| self.fail("put", name, error))?;
        write(&mut temp.file)?;
        temp.file.sync_all().map_err(|error| self.fail("put", name, error))?;
        let mut tries = PUT_TRIES;
        loop {
            let done = create_dirs(parent).and_then(|()| publish(&temp.path, &path));
            match done {
                Ok(false) => return Ok(Put::Exists),
                Ok(true) => break,
                Err(error) if error.kind() == ErrorKind::NotFound && tries > 1 => tries -= 1,
                Err(error) => return Err(self.fail("put", name, error)),
            }
        }
        sync_dirs(parent, &self.root).map_err(|error| self.fail("put", name, error))?;
        Ok(Put::Created)
    }

    fn write_bytes<'a>(
        &'a self,
        name: &'a ObjectName,
        bytes: &'a [u8],
    ) -> impl FnMut(&mut File) -> Result<()> + 'a {
        move |file| file.write_all(bytes).map_err(|error| self.fail("put", name, error))
    }

    /// The opened object and its length; a directory is not an object.
    fn open_object(&self, operation: &'static str, name: &ObjectName) -> Result<(File, u64)> {
        let file = File::open(self.path(name)).map_err(|error| self.fail(operation, name, error))?;
        let meta = file.metadata().map_err(|error| self.fail(operation, name, error))?;
        if !meta.is_file() {
            return Err(Error::NotFound { name: name.clone(), store: self.url() });
        }
        Ok((file, meta.len()))
    }

    fn fail(&self, operation: &'static str, name: &ObjectName, source: io::Error) -> Error {
        let (name, store) = (name.clone(), self.url());
        match source.kind() {
            ErrorKind::NotFound if operation != "put" => Error::NotFound { name, store },
            ErrorKind::NotADirectory if operation != "put" => Error::NotFound { name, store },
            ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::DirectoryNotEmpty => {
                let existing = self.nested_in(&name);
                Error::Nested { name, existing, store }
            }
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::DiskFull { operation, name, store },
            _ => Error::Object { operation, name, store, source: source.into() },
        }
    }

    /// For the message: the object that stands where `name` wants a directory, or `name/...` itself.
    fn nested_in(&self, name: &ObjectName) -> String {
        let above = name.as_str().match_indices('/').map(|(at, _)| &name.as_str()[..at]);
        let file_above = above.into_iter().find(|above| self.root.join(above).is_file());
        file_above.map_or_else(|| format!("{name}/..."), str::to_string)
    }

    /// Removes the directories that a delete left empty; stops at the first that is not.
    fn prune(&self, mut dir: &Path) {
        while dir != self.root && dir.starts_with(&self.root) {
            // Not empty, or gone already, or in use: in every case there is nothing to do here.
            if fs::remove_dir(dir).is_err() {
                return;
            }
            match dir.parent() {
                Some(parent) => dir = parent,
                None => return,
            }
        }
    }
}

impl Store for Local {
    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<()> {
        let _: Put = self.publish(name, &mut self.write_bytes(name, bytes), &rename)?;
        Ok(())
    }

    fn put_reader(&self, name: &ObjectName, reader: &mut dyn Read, bytes: u64) -> Result<()> {
        let mut write = |file: &mut File| {
            let got = io::copy(&mut (&mut *reader).take(bytes.saturating_add(1)), file)
                .map_err(|error| self.fail("put", name, error))?;
            if got != bytes {
                return Err(Error::SourceLength { name: name.clone(), expected: bytes, got });
            }
            Ok(())
        };
        let _: Put = self.publish(name, &mut write, &rename)?;
        Ok(())
    }

    fn put_if_absent(&self, name: &ObjectName, bytes: &[u8]) -> Result<Put> {
        check_put_if_absent_bytes(name, bytes)?;
        // Spares the write in the common case; the link below decides.
        if self.head(name)?.is_some() {
            return Ok(Put::Exists);
        }
        self.publish(name, &mut self.write_bytes(name, bytes), &link)
    }

    fn get(&self, name: &ObjectName) -> Result<Vec<u8>> {
        let (mut file, n_bytes) = self.open_object("get", name)?;
        let mut bytes = Vec::with_capacity(usize::try_from(n_bytes).unwrap_or(0));
        file.read_to_end(&mut bytes).map_err(|error| self.fail("get", name, error))?;
        Ok(bytes)
    }

    fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let (mut file, n_bytes) = self.open_object("get", name)?;
        check_range(self, name, &range, n_bytes)?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.seek(SeekFrom::Start(range.start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| self.fail("get", name, error))?;
        Ok(bytes)
    }

    fn head(&self, name: &ObjectName) -> Result<Option<ObjectMeta>> {
        match fs::metadata(self.path(name)) {
            Ok(meta) if meta.is_file() => Ok(Some(ObjectMeta { name: name.clone(), bytes: meta.len() })),
            Ok(_) => Ok(None),
            Err(error) => match self.fail("head", name, error) {
                Error::NotFound { .. } => Ok(None),
                error => Err(error),
            },
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        let start = parse_prefix(prefix)?;
        let fail = |source: io::Error| Error::List {
            prefix: prefix.to_string(),
            store: self.url(),
            source: source.into(),
        };
        let mut found = Vec::new();
        let mut dirs = vec![start];
        while let Some(dir) = dirs.pop() {
            visit(&self.root, dir.as_ref(), &mut found, &mut dirs).map_err(fail)?;
            if found.len() > LIST_MAX {
                return Err(Error::ListTooLong {
                    prefix: prefix.to_string(),
                    store: self.url(),
                    max: LIST_MAX,
                });
            }
        }
        found.sort_by(|a: &ObjectMeta, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        let path = self.path(name);
        let parent = path.parent().unwrap_or(&self.root);
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(parent).map_err(|error| self.fail("delete", name, error))?,
            // A directory of this name is not an object, so the object is absent.
            Err(_) if path.is_dir() => return Ok(()),
            Err(error) => match self.fail("delete", name, error) {
                Error::NotFound { .. } => return Ok(()),
                error => return Err(error),
            },
        }
        self.prune(parent);
        Ok(())
    }

    fn url(&self) -> String {
        format!("file:{}", self.root.display())
    }
}

/// A locked temporary file; its path is removed when this is dropped, unless it was renamed away.
struct Temp {
    path: PathBuf,
    file: File,
}

impl Temp {
    fn create(dir: &Path) -> io::Result<Temp> {
        for _ in 0..PUT_TRIES {
            let serial = TEMP_SERIAL.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!("{}-{serial}", std::process::id()));
            let file = match File::create_new(&path) {
                Ok(file) => file,
                // Left by a killed process whose id came round again, or written by one in another container.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            let temp = Temp { path, file };
            match temp.file.lock() {
                // No locks here (some cluster file systems): then nothing is swept either.
                Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(temp),
                locked => locked?,
            }
            // Swept between its creation and its lock? Then it has lost its name and another is tried.
            if temp.path.try_exists()? {
                return Ok(temp);
            }
        }
        Err(io::Error::new(
            ErrorKind::AlreadyExists,
            format!("no free name for a temporary file in {}", dir.display()),
        ))
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        // After a rename it is gone; where it cannot be removed the next `open` sweeps it.
        let _ = fs::remove_file(&self.path);
    }
}

fn rename(temp: &Path, path: &Path) -> io::Result<bool> {
    fs::rename(temp, path).map(|()| true)
}

/// A hard link fails where the name is taken: the file system's own put-if-absent.
fn link(temp: &Path, path: &Path) -> io::Result<bool> {
    match fs::hard_link(temp, path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => {
            Err(io::Error::from(ErrorKind::IsADirectory))
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Creates a directory and its parents; `NotFound` where one is removed meanwhile.
fn create_dirs(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => match dir.parent() {
            Some(parent) => create_dirs(parent).and_then(|()| fs::create_dir(dir)),
            None => Err(error),
        },
        made => made,
    }
    .or_else(|error| match error.kind() {
        ErrorKind::AlreadyExists if fs::metadata(dir)?.is_dir() => Ok(()),
        ErrorKind::AlreadyExists => Err(io::Error::from(ErrorKind::NotADirectory)),
        _ => Err(error),
    })
}

/// Makes the entries durable that lead from `root` to what lies in `dir`.
fn sync_dirs(dir: &Path, root: &Path) -> io::Result<()> {
    dir.ancestors().take_while(|dir| dir.starts_with(root)).try_for_each(sync_dir)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir).and_then(|dir| dir.sync_all()) {
        // Removed by a `delete` that emptied it: then there is no entry left to make durable.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Removes temporary files that nobody holds a lock on.
fn sweep(temp_dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(temp_dir)? {
        let path = entry?.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match file.try_lock() {
            Ok(()) => match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            },
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(())
}

/// Adds the objects that lie directly in a directory to `found` and its directories to `dirs`.
fn visit(
    root: &Path,
    dir: Option<&ObjectName>,
    found: &mut Vec<ObjectMeta>,
    dirs: &mut Vec<Option<ObjectName>>,
) -> io::Result<()> {
    let path = dir.map_or(root.to_path_buf(), |dir| root.join(dir.as_str()));
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        // No such directory, or removed by a `delete` meanwhile, or an object: nothing is under it.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let file_name = entry.file_name();
        let part = file_name.to_str();
        let name =
            part.and_then(|part| dir.map_or_else(|| ObjectName::parse(part), |dir| dir.join(part)).ok());
        let Some(name) = name else { continue };
        let meta = match entry.metadata() {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if meta.is_dir() {
            dirs.push(Some(name));
        } else if meta.is_file() {
            found.push(ObjectMeta { name, bytes: meta.len() });
        }
    }
    Ok(())
}
