use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, ObjectName, Put, Result, Store};

/// The newest manifest this program writes and the newest it reads.
pub const MANIFEST_VERSION: u32 = 1;
const MANIFEST: &str = "manifest.json";
/// A part of a name has at most 255 bytes; 64 digits and a dash come first.
const FILE_NAME_BYTES_MAX: usize = 180;
/// How much of a file is in memory while it is downloaded or hashed.
const CHUNK_BYTES: usize = 4 << 20;
/// What is hashed or written between two pauses: some 0.2 ms of work.
const PACED_BYTES: usize = 256 << 10;
/// Stands in the manifest where its own checksum will be while that is computed.
const NO_CHECKSUM: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// One file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub bytes: u64,
    /// 64 lower-case hex digits.
    pub sha256: String,
}

impl FileEntry {
    /// What a file of these bytes is recorded as.
    pub fn of(name: &str, bytes: &[u8]) -> FileEntry {
        FileEntry {
            name: name.to_string(),
            bytes: bytes.len() as u64,
            sha256: hex::encode(Sha256::digest(bytes)),
        }
    }
}

/// What a bundle holds. It is stored as JSON whose `sha256` is that of the same bytes with the 64 digits set to 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format_version: u32,
    sha256: String,
    /// What the files are together: `dataset`, `model`, `checkpoint`.
    pub kind: String,
    /// Sorted by name.
    pub files: Vec<FileEntry>,
    /// What the owner of the kind wants to know before it reads a file.
    pub meta: serde_json::Value,
}

/// Files that become visible together.
///
/// Under `prefix` lie the objects `<sha256>-<file>` and, written last, `manifest.json`, which makes them a bundle.
/// Publishing again under the same prefix replaces the manifest in one step; what the old one alone named is then
/// removed, so a reader that is slower than that gets an error and opens the bundle again.
#[derive(Clone, Debug)]
pub struct Bundle {
    store: Arc<dyn Store>,
    prefix: ObjectName,
    manifest: Manifest,
}

impl Bundle {
    /// The bundle published under `prefix`, or `None`. A damaged manifest, or one of a newer version, is an error.
    pub fn open(store: &Arc<dyn Store>, prefix: &str) -> Result<Option<Bundle>> {
        let prefix = ObjectName::parse(prefix)?;
        let name = prefix.join(MANIFEST)?;
        let bytes = match store.get(&name) {
            Ok(bytes) => bytes,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let manifest = parse_manifest(store.as_ref(), &name, &bytes)?;
        Ok(Some(Bundle { store: store.clone(), prefix, manifest }))
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn prefix(&self) -> &ObjectName {
        &self.prefix
    }

    /// A whole file, its checksum verified.
    pub fn read(&self, file: &str) -> Result<Vec<u8>> {
        let (entry, name) = self.find(file)?;
        let bytes = self.store.get(&name)?;
        self.check(entry, &name, bytes.len() as u64, &hex::encode(Sha256::digest(&bytes)))?;
        Ok(bytes)
    }

    /// A file from its beginning to its end in chunks of a few MiB, which `take` gets before the checksum of all of them is
    /// verified: what it made of them is worth nothing where this is an error.
    pub fn read_each(&self, file: &str, take: &mut dyn FnMut(&[u8])) -> Result<()> {
        let (entry, name) = self.find(file)?;
        self.read_chunks(entry, &name, &mut |chunk| {
            take(chunk);
            Ok(())
        })
    }

    fn read_chunks(
        &self,
        entry: &FileEntry,
        name: &ObjectName,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (mut hash, mut at) = (Sha256::new(), 0);
        while at < entry.bytes {
            let end = entry.bytes.min(at + CHUNK_BYTES as u64);
            let chunk = match self.store.get_range(name, at..end) {
                Err(Error::OutOfRange { bytes, .. }) => return Err(self.truncated(entry, name, bytes)),
                chunk => chunk?,
            };
            hash.update(&chunk);
            take(&chunk)?;
            at = end;
        }
        self.check(entry, name, at, &hex::encode(hash.finalize()))
    }

    /// Brings every file into `dir` (created if need be), checksums verified; files that are right there already stay.
    /// A file gets its name only when it is whole.
    pub fn download_to(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).map_err(|source| download_error(dir, source))?;
        for entry in &self.manifest.files {
            let path = dir.join(&entry.name);
            let is_right = path.is_file()
                && hash_file(&path).map_err(|source| download_error(&path, source))?
                    == (entry.bytes, entry.sha256.clone());
            if !is_right {
                self.download(entry, &path)?;
            }
        }
        Ok(())
    }

    fn download(&self, entry: &FileEntry, path: &Path) -> Result<()> {
        let name = object_name(&self.prefix, entry)?;
        let temp = path.with_file_name(format!(".{}.part", entry.name));
        let fail = |source| download_error(path, source);
        let mut file = File::create(&temp).map_err(fail)?;
        self.read_chunks(entry, &name, &mut |chunk| file.write_all(chunk).map_err(fail))?;
        file.sync_all().and_then(|()| fs::rename(&temp, path)).map_err(fail)
    }

    fn find(&self, file: &str) -> Result<(&FileEntry, ObjectName)> {
        let entry =
            self.manifest.files.iter().find(|entry| entry.name == file).ok_or_else(|| Error::NoFile {
                bundle: self.prefix.to_string(),
                store: self.store.url(),
                file: file.chars().take(100).collect(),
            })?;
        Ok((entry, object_name(&self.prefix, entry)?))
    }

    fn check(&self, entry: &FileEntry, name: &ObjectName, bytes: u64, sha256: &str) -> Result<()> {
        if bytes != entry.bytes {
            return Err(self.truncated(entry, name, bytes));
        }
        if sha256 != entry.sha256 {
            let reason = format!("its checksum is {sha256}, the manifest says {}", entry.sha256);
            return Err(damaged(self.store.as_ref(), name, reason));
        }
        Ok(())
    }

    fn truncated(&self, entry: &FileEntry, name: &ObjectName, bytes: u64) -> Error {
        damaged(self.store.as_ref(), name, format!("it has {bytes} bytes, the manifest says {}", entry.bytes))
    }
}

/// Writes the files of a bundle; nothing of it can be seen through [`Bundle::open`] before `publish`.
///
/// One writer per prefix at a time: whoever may write there is for a lease to decide.
#[derive(Debug)]
pub struct BundleWriter {
    store: Arc<dyn Store>,
    prefix: ObjectName,
    files: Vec<FileEntry>,
}

/// Reads a slice with pauses: as many for a reader of large pieces as for one of small ones.
struct Paced<'a> {
    bytes: &'a [u8],
    /// Since the last pause.
    n_read: usize,
    pace: &'a mut dyn FnMut(),
}

impl Read for Paced<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = buffer.len().min(self.bytes.len()).min(PACED_BYTES - self.n_read);
        let (now, later) = self.bytes.split_at(n);
        buffer[..n].copy_from_slice(now);
        self.bytes = later;
        self.n_read += n;
        if self.n_read == PACED_BYTES {
            self.n_read = 0;
            (self.pace)();
        }
        Ok(n)
    }
}

impl BundleWriter {
    pub fn new(store: &Arc<dyn Store>, prefix: &str) -> Result<BundleWriter> {
        Ok(BundleWriter { store: store.clone(), prefix: ObjectName::parse(prefix)?, files: Vec::new() })
    }

    /// Stores a file.
    pub fn add(&mut self, file: &str, bytes: &[u8]) -> Result<FileEntry> {
        let entry = FileEntry::of(file, bytes);
        let name = self.admit(&entry)?;
        self.store.put(&name, bytes)?;
        self.files.push(entry.clone());
        Ok(entry)
    }

    /// Stores a file bit by bit, calling `pace` between the bits, which may sleep there: for a writer that others on the
    /// machine should not notice.
    pub fn add_paced(&mut self, file: &str, bytes: &[u8], pace: &mut dyn FnMut()) -> Result<FileEntry> {
        let mut hash = Sha256::new();
        for bit in bytes.chunks(PACED_BYTES) {
            hash.update(bit);
            pace();
        }
        let sha256 = hex::encode(hash.finalize());
        let entry = FileEntry { name: file.to_string(), bytes: bytes.len() as u64, sha256 };
        let name = self.admit(&entry)?;
        self.store.put_reader(&name, &mut Paced { bytes, n_read: 0, pace }, entry.bytes)?;
        self.files.push(entry.clone());
        Ok(entry)
    }

    /// Stores a file that may be larger than memory. One that changes while it is read is an error.
    pub fn add_path(&mut self, file: &str, path: &Path) -> Result<FileEntry> {
        let fail =
            |source| Error::SourceFile { path: path.display().to_string(), name: file.to_string(), source };
        let (bytes, sha256) = hash_file(path).map_err(fail)?;
        let entry = FileEntry { name: file.to_string(), bytes, sha256 };
        let name = self.admit(&entry)?;
        let source = File::open(path).map_err(fail)?;
        let mut reader = Verified { source, hash: Some(Sha256::new()), entry: &entry };
        self.store.put_reader(&name, &mut reader, bytes)?;
        self.files.push(entry.clone());
        Ok(entry)
    }

    /// Takes a file that an earlier, interrupted writer stored under this prefix; false if it is not there.
    pub fn add_stored(&mut self, entry: &FileEntry) -> Result<bool> {
        let name = self.admit(entry)?;
        let is_stored = self.store.head(&name)?.is_some_and(|meta| meta.bytes == entry.bytes);
        if is_stored {
            self.files.push(entry.clone());
        }
        Ok(is_stored)
    }

    /// Makes the files visible as one bundle, in place of an earlier one, and removes what that left.
    pub fn publish(self, kind: &str, meta: serde_json::Value) -> Result<Manifest> {
        let (manifest, bytes) = self.manifest(kind, meta);
        self.store.put(&self.prefix.join(MANIFEST)?, &bytes)?;
        self.remove_strays()?;
        Ok(manifest)
    }

    /// [`publish`](Self::publish) unless a bundle is there: of racing writers one gets its manifest, the others `None`
    /// (and what they stored is removed by the next `publish`).
    pub fn publish_if_absent(self, kind: &str, meta: serde_json::Value) -> Result<Option<Manifest>> {
        let (manifest, bytes) = self.manifest(kind, meta);
        match self.store.put_if_absent(&self.prefix.join(MANIFEST)?, &bytes)? {
            Put::Created => Ok(Some(manifest)),
            Put::Exists => Ok(None),
        }
    }

    /// The same files and meta give the same bytes, in whatever order the files were added.
    fn manifest(&self, kind: &str, meta: serde_json::Value) -> (Manifest, Vec<u8>) {
        let mut files = self.files.clone();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut manifest = Manifest {
            format_version: MANIFEST_VERSION,
            sha256: NO_CHECKSUM.to_string(),
            kind: kind.to_string(),
            files,
            meta,
        };
        manifest.sha256 = hex::encode(Sha256::digest(manifest_json(&manifest)));
        let bytes = manifest_json(&manifest);
        (manifest, bytes)
    }

    /// The object for a file that may join the bundle.
    fn admit(&self, entry: &FileEntry) -> Result<ObjectName> {
        let taken = self.files.iter().any(|file| file.name == entry.name);
        if let Some(reason) =
            file_name_refusal(&entry.name).or(taken.then_some("the bundle has a file of that name"))
        {
            let file = entry.name.chars().take(100).collect();
            return Err(Error::FileName { bundle: self.prefix.to_string(), file, reason });
        }
        object_name(&self.prefix, entry)
    }

    /// Removes files of earlier publications, and of writers that were killed before theirs.
    fn remove_strays(&self) -> Result<()> {
        let mut kept: Vec<ObjectName> =
            self.files.iter().map(|entry| object_name(&self.prefix, entry)).collect::<Result<_>>()?;
        kept.sort();
        let depth = self.prefix.as_str().len() + 1;
        for meta in self.store.list(self.prefix.as_str())? {
            if is_bundle_file(&meta.name.as_str()[depth..]) && kept.binary_search(&meta.name).is_err() {
                self.store.delete(&meta.name)?;
            }
        }
        Ok(())
    }
}

/// Fails at the end of a source that is not what it was when it was hashed, so that the put leaves nothing.
struct Verified<'a> {
    source: File,
    hash: Option<Sha256>,
    entry: &'a FileEntry,
}

impl Read for Verified<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buffer)?;
        if n > 0 {
            if let Some(hash) = &mut self.hash {
                hash.update(&buffer[..n]);
            }
        } else if !buffer.is_empty()
            && let Some(hash) = self.hash.take()
            && hex::encode(hash.finalize()) != self.entry.sha256
        {
            return Err(io::Error::other(format!("{} changed while it was read", self.entry.name)));
        }
        Ok(n)
    }
}

/// File names become paths in `download_to`, so one that could lead elsewhere must neither be written nor believed.
fn file_name_refusal(file: &str) -> Option<&'static str> {
    if file.len() > FILE_NAME_BYTES_MAX {
        Some("it is longer than 180 bytes")
    } else if file.contains('/') || ObjectName::parse(file).is_err() {
        Some("it is not one part of an object name")
    } else {
        None
    }
}

pub(crate) fn object_name(prefix: &ObjectName, entry: &FileEntry) -> Result<ObjectName> {
    prefix.join(&format!("{}-{}", entry.sha256, entry.name))
}

/// `<64 hex digits>-<file>`, directly under the prefix.
pub(crate) fn is_bundle_file(rest: &str) -> bool {
    let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    !rest.contains('/')
        && rest.split_once('-').is_some_and(|(sha256, _)| sha256.len() == 64 && sha256.bytes().all(is_digit))
}

fn manifest_json(manifest: &Manifest) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(manifest).expect("a manifest has string keys only");
    bytes.push(b'\n');
    bytes
}

pub(crate) fn parse_manifest(store: &dyn Store, name: &ObjectName, bytes: &[u8]) -> Result<Manifest> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let not_json = |error: serde_json::Error| damaged(store, name, error.to_string());
    // The version first: a newer manifest may have fields that this program does not know.
    let Version { format_version: version } = serde_json::from_slice(bytes).map_err(not_json)?;
    if version > MANIFEST_VERSION {
        let (bundle, store) = (name.to_string(), store.url());
        return Err(Error::NewerFormat { bundle, store, version, known: MANIFEST_VERSION });
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(not_json)?;
    let blanked = String::from_utf8_lossy(bytes).replacen(&manifest.sha256, NO_CHECKSUM, 1);
    if manifest.sha256.len() != 64 || hex::encode(Sha256::digest(blanked.as_bytes())) != manifest.sha256 {
        return Err(damaged(store, name, "its checksum is wrong".to_string()));
    }
    if let Some((file, reason)) = manifest.files.iter().find_map(|f| Some((f, file_name_refusal(&f.name)?))) {
        return Err(damaged(store, name, format!("the file name {:?} is refused: {reason}", file.name)));
    }
    Ok(manifest)
}

fn damaged(store: &dyn Store, name: &ObjectName, reason: String) -> Error {
    Error::Damaged { name: name.clone(), store: store.url(), reason }
}

fn download_error(path: &Path, source: io::Error) -> Error {
    Error::Download { path: path.display().to_string(), source }
}

/// Length and checksum of a file, in bounded memory.
fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut n_bytes = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((n_bytes, hex::encode(hash.finalize())));
        }
        hash.update(&buffer[..n]);
        n_bytes += n as u64;
    }
}
