//! Copies of a whole store that go on being taken while others write to it.
//!
//! A backup is a store, too: `content/<2 digits>/<sha256>` holds every content once, whatever it was called, and
//! `snapshots/<id>/` is a bundle with the names that there were, each with its content, and what the owner kept beside them
//! (`state.json`). The bundle's manifest is put last, so a backup that was interrupted is no snapshot, and the next one finds
//! what it had stored.

mod checked;
mod copy;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Bundle, BundleWriter, Error, FileEntry, ObjectName, Put, Result, Store};
use checked::Checked;
pub use copy::Copied;

/// The newest form of a backup that this program writes and the newest it reads.
const FORMAT_VERSION: u32 = 1;
const MARKER: &str = "backup.json";
const CONTENT: &str = "content";
const SNAPSHOTS: &str = "snapshots";
const MANIFEST: &str = "manifest.json";
const OBJECTS: &str = "objects.jsonl";
const STATE: &str = "state.json";
const KIND: &str = "snapshot";

/// Snapshots of one store.
#[derive(Clone, Debug)]
pub struct Backup {
    store: Arc<dyn Store>,
}

/// Says that a place is a backup, and of what.
#[derive(Serialize, Deserialize)]
struct Marker {
    format_version: u32,
    of: String,
}

/// How far copying has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub n_objects: usize,
    pub n_objects_total: usize,
    pub bytes: u64,
    pub bytes_total: u64,
    /// The part of `bytes` that was not there already.
    pub bytes_copied: u64,
}

/// Where progress is told.
pub type OnProgress<'a> = &'a mut dyn FnMut(&Progress);

impl Backup {
    /// The backup at `store` of `from`, which is called `of`; an empty place becomes one. Errors: the place holds something
    /// else, is the backup of another, or lies in what it is to hold.
    pub fn create(store: &Arc<dyn Store>, from: &Arc<dyn Store>, of: &str) -> Result<Backup> {
        copy::check_apart(store, from)?;
        let name = ObjectName::parse(MARKER)?;
        if store.head(&name)?.is_none() && !store.list("")?.is_empty() {
            return Err(Error::NotBackup { store: store.url(), why: "it holds something else".to_string() });
        }
        let marker = Marker { format_version: FORMAT_VERSION, of: of.to_string() };
        let bytes = serde_json::to_vec(&marker).expect("a marker is plain data");
        if store.put_if_absent(&name, &bytes)? == Put::Created {
            return Ok(Backup { store: store.clone() });
        }
        let found = marker_of(store.as_ref())?;
        if found.of != of {
            let (store, own) = (store.url(), of.to_string());
            return Err(Error::OtherBackup { store, of: found.of, own });
        }
        Ok(Backup { store: store.clone() })
    }

    /// The backup that lies at `store`.
    pub fn open(store: &Arc<dyn Store>) -> Result<Backup> {
        marker_of(store.as_ref())?;
        Ok(Backup { store: store.clone() })
    }

    pub fn url(&self) -> String {
        self.store.url()
    }

    /// The ids of all snapshots, the oldest first where ids begin with a time.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        let id = |name: &ObjectName| {
            let id = name.as_str().strip_prefix(SNAPSHOTS)?.strip_prefix('/')?.strip_suffix(MANIFEST)?;
            Some(id.strip_suffix('/').filter(|id| !id.contains('/'))?.to_string())
        };
        Ok(self.store.list(SNAPSHOTS)?.iter().filter_map(|meta| id(&meta.name)).collect())
    }

    /// Makes what was copied a snapshot, together with `state` and whatever else its owner wants to say.
    pub fn publish(
        &self,
        id: &str,
        copied: &Copied,
        state: &[u8],
        meta: serde_json::Value,
    ) -> Result<Snapshot> {
        let mut writer = BundleWriter::new(&self.store, &format!("{SNAPSHOTS}/{id}"))?;
        writer.add(OBJECTS, &copied.lines())?;
        writer.add(STATE, state)?;
        if writer.publish_if_absent(KIND, meta)?.is_none() {
            let name = ObjectName::parse(&format!("{SNAPSHOTS}/{id}"))?;
            return Err(Error::SnapshotTaken { name, store: self.url() });
        }
        self.snapshot(id)
    }

    pub fn snapshot(&self, id: &str) -> Result<Snapshot> {
        let found = Bundle::open(&self.store, &format!("{SNAPSHOTS}/{id}"))?;
        let no_such = || Error::NoSnapshot { id: id.chars().take(100).collect(), store: self.url() };
        Snapshot::read(self.clone(), found.ok_or_else(no_such)?)
    }

    /// Leaves the newest `n_kept` snapshots and removes the others, with the content that only they have. Nobody may write
    /// to the backup meanwhile: what is not in a snapshot yet would go, too. Returns how many snapshots and contents went.
    pub fn prune(&self, n_kept: usize) -> Result<(usize, usize)> {
        let ids = self.snapshots()?;
        let (old, kept) = ids.split_at(ids.len().saturating_sub(n_kept.max(1)));
        for id in old {
            // Its manifest first: what is half removed must not look like a snapshot.
            self.store.delete(&ObjectName::parse(&format!("{SNAPSHOTS}/{id}/{MANIFEST}"))?)?;
        }
        let in_use = |name: &ObjectName| {
            kept.iter().any(|id| name.as_str().starts_with(&format!("{SNAPSHOTS}/{id}/")))
        };
        for meta in self.store.list(SNAPSHOTS)?.iter().filter(|meta| !in_use(&meta.name)) {
            self.store.delete(&meta.name)?;
        }
        let mut wanted = std::collections::HashSet::new();
        for id in kept {
            wanted.extend(self.snapshot(id)?.objects.into_iter().map(|(_, entry)| entry.sha256));
        }
        let mut n_removed = 0;
        for meta in self.store.list(CONTENT)?.iter().filter(|m| !wanted.contains(m.name.file_name())) {
            self.store.delete(&meta.name)?;
            n_removed += 1;
        }
        Ok((old.len(), n_removed))
    }

    /// Every content that is stored, with its length.
    fn held(&self) -> Result<HashMap<String, u64>> {
        let found = self.store.list(CONTENT)?.into_iter();
        Ok(found.map(|meta| (meta.name.file_name().to_string(), meta.bytes)).collect())
    }
}

fn marker_of(store: &dyn Store) -> Result<Marker> {
    let not = |why: String| Error::NotBackup { store: store.url(), why };
    let bytes = match store.get(&ObjectName::parse(MARKER)?) {
        Err(Error::NotFound { .. }) => return Err(not(format!("it has no {MARKER}"))),
        found => found?,
    };
    let marker: Marker =
        serde_json::from_slice(&bytes).map_err(|error| not(format!("its {MARKER} says nothing: {error}")))?;
    if marker.format_version > FORMAT_VERSION {
        let (bundle, store) = (MARKER.to_string(), store.url());
        let (version, known) = (marker.format_version, FORMAT_VERSION);
        return Err(Error::NewerFormat { bundle, store, version, known });
    }
    Ok(marker)
}

fn content_name(sha256: &str) -> Result<ObjectName> {
    ObjectName::parse(&format!("{CONTENT}/{}/{sha256}", sha256.get(..2).unwrap_or("")))
}

/// A store as it was.
#[derive(Clone, Debug)]
pub struct Snapshot {
    backup: Backup,
    bundle: Bundle,
    /// Sorted by name.
    objects: Vec<(ObjectName, FileEntry)>,
}

impl Snapshot {
    fn read(backup: Backup, bundle: Bundle) -> Result<Snapshot> {
        let lines = bundle.read(OBJECTS)?;
        let broken =
            |why: String| Error::Damaged { name: bundle.prefix().clone(), store: backup.url(), reason: why };
        let mut objects = Vec::new();
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let entry: FileEntry = serde_json::from_slice(line).map_err(|error| broken(error.to_string()))?;
            content_name(&entry.sha256)?;
            objects.push((ObjectName::parse(&entry.name)?, entry));
        }
        Ok(Snapshot { backup, bundle, objects })
    }

    /// What its owner said of it.
    pub fn meta(&self) -> &serde_json::Value {
        &self.bundle.manifest().meta
    }

    /// What its owner kept beside the objects.
    pub fn state(&self) -> Result<Vec<u8>> {
        self.bundle.read(STATE)
    }

    pub fn n_objects(&self) -> usize {
        self.objects.len()
    }

    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|(_, entry)| entry.bytes).sum()
    }

    /// Reads all of it; an error names the object that is missing or not as it was.
    pub fn check(&self, on_progress: OnProgress) -> Result<()> {
        self.check_lengths()?;
        let mut progress = self.progress();
        for (name, entry) in &self.objects {
            self.read_object(name, entry, &mut |reader, _| {
                // Where it fails the reader knows better why.
                std::io::copy(reader, &mut std::io::sink()).map(|_| ()).or(Ok(()))
            })?;
            self.advance(&mut progress, entry, entry.bytes);
            on_progress(&progress);
        }
        Ok(())
    }

    /// Brings every object back into `target`, which must be empty; what an interrupted restore left is taken as it is.
    /// Manifests come last, so that no bundle is seen before it is whole.
    pub fn restore_to(&self, target: &dyn Store, on_progress: OnProgress) -> Result<()> {
        let there = self.check_target(target)?;
        self.check_lengths()?;
        let mut progress = self.progress();
        let is_manifest = |(name, _): &&(ObjectName, FileEntry)| name.file_name() == MANIFEST;
        let (last, first): (Vec<_>, Vec<_>) = self.objects.iter().partition(is_manifest);
        for (name, entry) in first.into_iter().chain(last) {
            let is_there = there.contains_key(name);
            if is_there {
                same(target, name, entry)?;
            } else {
                self.read_object(name, entry, &mut |reader, bytes| target.put_reader(name, reader, bytes))?;
            }
            self.advance(&mut progress, entry, if is_there { 0 } else { entry.bytes });
            on_progress(&progress);
        }
        Ok(())
    }

    /// Whatever lies in the target must be of this snapshot.
    fn check_target(&self, target: &dyn Store) -> Result<BTreeMap<ObjectName, u64>> {
        let known: HashMap<&ObjectName, u64> = self.objects.iter().map(|(name, e)| (name, e.bytes)).collect();
        let there: BTreeMap<_, _> =
            target.list("")?.into_iter().map(|meta| (meta.name, meta.bytes)).collect();
        match there.iter().find(|(name, bytes)| known.get(name) != Some(bytes)) {
            Some((name, _)) => Err(Error::NotEmpty { store: target.url(), name: name.clone() }),
            None => Ok(there),
        }
    }

    /// Finds what is missing or cut short before anything is written anywhere.
    fn check_lengths(&self) -> Result<()> {
        let held = self.backup.held()?;
        for (name, entry) in &self.objects {
            let why = match held.get(&entry.sha256) {
                Some(bytes) if *bytes == entry.bytes => continue,
                Some(bytes) => format!("it has {bytes} bytes there and had {}", entry.bytes),
                None => format!("its content {} is missing", content_name(&entry.sha256)?),
            };
            return Err(self.broken(name, why));
        }
        Ok(())
    }

    /// Has `take` read an object that is checked as it is read.
    fn read_object(
        &self,
        name: &ObjectName,
        entry: &FileEntry,
        take: &mut dyn FnMut(&mut dyn std::io::Read, u64) -> Result<()>,
    ) -> Result<()> {
        let content = content_name(&entry.sha256)?;
        let mut reader = Checked::new(self.backup.store.as_ref(), &content, entry);
        let taken = take(&mut reader, entry.bytes);
        match reader.failed() {
            Some(Error::Damaged { reason, .. }) => Err(self.broken(name, reason)),
            Some(Error::NotFound { .. }) => {
                Err(self.broken(name, format!("its content {content} is missing")))
            }
            Some(error) => Err(error),
            None => taken,
        }
    }

    fn broken(&self, name: &ObjectName, why: String) -> Error {
        Error::BrokenBackup { name: name.clone(), backup: self.backup.url(), why }
    }

    fn progress(&self) -> Progress {
        Progress { n_objects_total: self.n_objects(), bytes_total: self.bytes(), ..Progress::default() }
    }

    fn advance(&self, progress: &mut Progress, entry: &FileEntry, bytes_copied: u64) {
        progress.n_objects += 1;
        progress.bytes += entry.bytes;
        progress.bytes_copied += bytes_copied;
    }
}

/// Refuses an object that has the length of ours and is another.
fn same(target: &dyn Store, name: &ObjectName, entry: &FileEntry) -> Result<()> {
    let mut reader = Checked::new(target, name, entry);
    let read = std::io::copy(&mut reader, &mut std::io::sink());
    match (reader.failed(), read) {
        (Some(Error::Damaged { .. }), _) => Err(Error::NotEmpty { store: target.url(), name: name.clone() }),
        (Some(error), _) => Err(error),
        (None, read) => read.map(|_| ()).map_err(|source| Error::Object {
            operation: "get",
            name: name.clone(),
            store: target.url(),
            source: source.into(),
        }),
    }
}
