//! Copying a store that changes meanwhile.
//!
//! Objects are immutable but for manifests, which are replaced in one step, and small records that their writers put anew.
//! So a bundle is copied as one manifest names it, and where that was replaced on the way, as the new one does. What was
//! listed and is gone when its turn comes may have made way for something that was not listed: then everything is listed
//! again, and what was copied is not copied twice.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::checked::Checked;
use super::{Backup, MANIFEST, OnProgress, Progress, content_name};
use crate::bundle::{is_bundle_file, object_name, parse_manifest};
use crate::{Error, FileEntry, ObjectMeta, ObjectName, Result, Store};

/// Looks at a store that changes faster than it is copied. Each copies only what is new, so the second or third is quick.
const PASSES_MAX: usize = 20;

/// Objects that are read at once; larger ones that no manifest describes are read twice, to know them first.
const WHOLE_BYTES_MAX: u64 = 64 << 20;

/// What a store held at one moment, all of its content being in the backup.
#[derive(Clone, Debug, Default)]
pub struct Copied {
    objects: BTreeMap<ObjectName, FileEntry>,
    /// How far the last pass came, and what all of them copied.
    pub progress: Progress,
}

impl Copied {
    pub fn has(&self, name: &ObjectName) -> bool {
        self.objects.contains_key(name)
    }

    pub fn n_objects(&self) -> usize {
        self.objects.len()
    }

    pub fn bytes(&self) -> u64 {
        self.objects.values().map(|entry| entry.bytes).sum()
    }

    /// One line for each object, by name: the same objects are the same bytes.
    pub(super) fn lines(&self) -> Vec<u8> {
        let mut lines = Vec::new();
        for entry in self.objects.values() {
            serde_json::to_writer(&mut lines, entry).expect("an entry is plain data");
            lines.push(b'\n');
        }
        lines
    }
}

impl Backup {
    /// Copies every object of `from` whose content is not here yet. Errors name an object that is damaged there, or that a
    /// manifest names and that is gone.
    pub fn copy(&self, from: &Arc<dyn Store>, on_progress: OnProgress) -> Result<Copied> {
        check_apart(&self.store, from)?;
        let mut copier = Copier {
            from: from.as_ref(),
            backup: self,
            held: self.held()?,
            listed: HashMap::new(),
            copied: Copied::default(),
            is_whole: true,
            on_progress,
        };
        for _ in 0..PASSES_MAX {
            copier.pass()?;
            if copier.is_whole {
                return Ok(copier.copied);
            }
        }
        Err(Error::Unsettled { store: from.url() })
    }
}

/// A store that held its own copy would grow with every one.
pub(super) fn check_apart(place: &Arc<dyn Store>, from: &Arc<dyn Store>) -> Result<()> {
    let (backup, store) = (place.url(), from.url());
    let is_in = |a: &str, b: &str| a == b || a.starts_with(&format!("{}/", b.trim_end_matches('/')));
    if is_in(&backup, &store) || is_in(&store, &backup) {
        return Err(Error::BackupInside { backup, store });
    }
    Ok(())
}

struct Copier<'a> {
    from: &'a dyn Store,
    backup: &'a Backup,
    /// Content that the backup has.
    held: HashMap<String, u64>,
    /// What this pass found, with its length.
    listed: HashMap<ObjectName, u64>,
    copied: Copied,
    /// Whether nothing was gone that this pass had listed.
    is_whole: bool,
    on_progress: OnProgress<'a>,
}

impl Copier<'_> {
    fn pass(&mut self) -> Result<()> {
        let listed = self.from.list("")?;
        self.listed = listed.iter().map(|meta| (meta.name.clone(), meta.bytes)).collect();
        self.is_whole = true;
        self.copied.objects.clear();
        self.copied.progress = Progress {
            n_objects_total: listed.len(),
            bytes_total: listed.iter().map(|meta| meta.bytes).sum(),
            bytes_copied: self.copied.progress.bytes_copied,
            ..Progress::default()
        };
        let (manifests, others): (Vec<_>, Vec<_>) =
            listed.into_iter().partition(|meta| meta.name.file_name() == MANIFEST);
        for meta in manifests {
            self.bundle(&meta.name)?;
        }
        for meta in others {
            if !self.copied.has(&meta.name) {
                match self.object(&meta) {
                    Err(Error::NotFound { .. }) => self.is_whole = false,
                    done => done?,
                }
            }
        }
        Ok(())
    }

    /// A manifest, and all that it names.
    fn bundle(&mut self, name: &ObjectName) -> Result<()> {
        let mut before = Vec::new();
        for _ in 0..PASSES_MAX {
            let bytes = match self.from.get(name) {
                Err(Error::NotFound { .. }) => break,
                found => found?,
            };
            match self.files(name, &bytes) {
                // Replaced while its files were copied, or on its way out. One that stays as it is has lost something.
                Err(Error::NotFound { name: lost, .. }) if bytes == before => {
                    let reason = format!("it names {lost}, which is not there");
                    return Err(Error::Damaged { name: name.clone(), store: self.from.url(), reason });
                }
                Err(Error::NotFound { .. }) => before = bytes,
                Err(error) => return Err(error),
                Ok(()) => return self.small(name, &bytes),
            }
        }
        self.is_whole = false;
        Ok(())
    }

    fn files(&mut self, manifest: &ObjectName, bytes: &[u8]) -> Result<()> {
        let prefix = manifest.as_str().strip_suffix(MANIFEST).unwrap_or_default();
        let prefix = ObjectName::parse(prefix.trim_end_matches('/'))?;
        let parsed = parse_manifest(self.from, manifest, bytes)?;
        let mut named = Vec::new();
        for file in &parsed.files {
            let name = object_name(&prefix, file)?;
            let entry = FileEntry { name: name.to_string(), ..file.clone() };
            self.content(&name, &entry)?;
            named.push((name, entry));
        }
        for (name, entry) in named {
            self.done(name, entry);
        }
        Ok(())
    }

    /// An object that no manifest describes.
    fn object(&mut self, meta: &ObjectMeta) -> Result<()> {
        let of_bundle = is_bundle_file(meta.name.file_name());
        if !of_bundle && meta.bytes <= WHOLE_BYTES_MAX {
            let bytes = self.from.get(&meta.name)?;
            return self.small(&meta.name, &bytes);
        }
        // A file of a bundle that is not published yet carries its checksum in its name.
        let sha256 = match of_bundle {
            true => meta.name.file_name()[..64].to_string(),
            false => sha256_of(self.from, meta)?,
        };
        let entry = FileEntry { name: meta.name.to_string(), bytes: meta.bytes, sha256 };
        self.content(&meta.name, &entry)?;
        self.done(meta.name.clone(), entry);
        Ok(())
    }

    fn small(&mut self, name: &ObjectName, bytes: &[u8]) -> Result<()> {
        let entry = FileEntry::of(name.as_str(), bytes);
        if self.held.get(&entry.sha256) != Some(&entry.bytes) {
            self.backup.store.put(&content_name(&entry.sha256)?, bytes)?;
            self.hold(&entry);
        }
        self.done(name.clone(), entry);
        Ok(())
    }

    /// Copies an object as it should be, unless its content is there.
    fn content(&mut self, name: &ObjectName, entry: &FileEntry) -> Result<()> {
        if self.held.get(&entry.sha256) == Some(&entry.bytes) {
            // The content is safe; the object itself must be there all the same.
            let listed = self.listed.get(name).copied();
            let bytes = if listed.is_some() { listed } else { self.from.head(name)?.map(|meta| meta.bytes) };
            return match bytes {
                Some(bytes) if bytes == entry.bytes => Ok(()),
                Some(bytes) => {
                    let reason = format!("it has {bytes} bytes and should have {}", entry.bytes);
                    Err(Error::Damaged { name: name.clone(), store: self.from.url(), reason })
                }
                None => Err(Error::NotFound { name: name.clone(), store: self.from.url() }),
            };
        }
        let mut reader = Checked::new(self.from, name, entry);
        let put = self.backup.store.put_reader(&content_name(&entry.sha256)?, &mut reader, entry.bytes);
        match reader.failed() {
            Some(error) => return Err(error),
            None => put?,
        }
        self.hold(entry);
        Ok(())
    }

    fn hold(&mut self, entry: &FileEntry) {
        self.held.insert(entry.sha256.clone(), entry.bytes);
        self.copied.progress.bytes_copied += entry.bytes;
        (self.on_progress)(&self.copied.progress);
    }

    fn done(&mut self, name: ObjectName, entry: FileEntry) {
        let progress = &mut self.copied.progress;
        progress.n_objects += 1;
        progress.bytes += entry.bytes;
        (self.on_progress)(progress);
        self.copied.objects.insert(name, entry);
    }
}

/// The checksum of a large object. One that changes meanwhile fails when it is copied.
fn sha256_of(store: &dyn Store, meta: &ObjectMeta) -> Result<String> {
    use sha2::{Digest, Sha256};
    let (mut hash, mut at) = (Sha256::new(), 0);
    while at < meta.bytes {
        let end = meta.bytes.min(at + (8 << 20));
        hash.update(store.get_range(&meta.name, at..end)?);
        at = end;
    }
    Ok(hex::encode(hash.finalize()))
}
