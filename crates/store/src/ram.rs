use std::collections::BTreeMap;
use std::io::Read;
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::contract::{check_put_if_absent_bytes, check_range, parse_prefix};
use crate::{Error, LIST_MAX, ObjectMeta, ObjectName, Put, Result, Store};

/// Objects in this process's memory: for tests and throw-away runs.
#[derive(Debug, Default)]
pub struct Ram {
    objects: Mutex<BTreeMap<ObjectName, Arc<[u8]>>>,
}

impl Ram {
    pub fn new() -> Ram {
        Ram::default()
    }

    /// The map is right after every single statement that changes it, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectName, Arc<[u8]>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &ObjectName) -> Result<Arc<[u8]>> {
        self.lock()
            .get(name)
            .cloned()
            .ok_or_else(|| Error::NotFound { name: name.clone(), store: self.url() })
    }

    /// An object above or below `name` in the tree of names.
    fn check_nesting(&self, objects: &BTreeMap<ObjectName, Arc<[u8]>>, name: &ObjectName) -> Result<()> {
        let above = name.as_str().match_indices('/').map(|(at, _)| &name.as_str()[..at]);
        let above =
            above.filter_map(|part| ObjectName::parse(part).ok()).find(|above| objects.contains_key(above));
        let below = || under(objects, Some(name)).next().map(|(below, _)| below.clone());
        match above.or_else(below) {
            None => Ok(()),
            Some(existing) => {
                Err(Error::Nested { name: name.clone(), existing: existing.to_string(), store: self.url() })
            }
        }
    }
}

impl Store for Ram {
    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<()> {
        let mut objects = self.lock();
        self.check_nesting(&objects, name)?;
        objects.insert(name.clone(), bytes.into());
        Ok(())
    }

    fn put_reader(&self, name: &ObjectName, reader: &mut dyn Read, bytes: u64) -> Result<()> {
        let mut all = Vec::new();
        reader.take(bytes.saturating_add(1)).read_to_end(&mut all).map_err(|source| Error::Object {
            operation: "put",
            name: name.clone(),
            store: self.url(),
            source: source.into(),
        })?;
        if all.len() as u64 != bytes {
            return Err(Error::SourceLength { name: name.clone(), expected: bytes, got: all.len() as u64 });
        }
        self.put(name, &all)
    }

    fn put_if_absent(&self, name: &ObjectName, bytes: &[u8]) -> Result<Put> {
        check_put_if_absent_bytes(name, bytes)?;
        let mut objects = self.lock();
        if objects.contains_key(name) {
            return Ok(Put::Exists);
        }
        self.check_nesting(&objects, name)?;
        objects.insert(name.clone(), bytes.into());
        Ok(Put::Created)
    }

    fn get(&self, name: &ObjectName) -> Result<Vec<u8>> {
        Ok(self.find(name)?.to_vec())
    }

    fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let bytes = self.find(name)?;
        check_range(self, name, &range, bytes.len() as u64)?;
        Ok(bytes[range.start as usize..range.end as usize].to_vec())
    }

    fn head(&self, name: &ObjectName) -> Result<Option<ObjectMeta>> {
        let bytes = self.lock().get(name).map(|bytes| bytes.len() as u64);
        Ok(bytes.map(|bytes| ObjectMeta { name: name.clone(), bytes }))
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        let parsed = parse_prefix(prefix)?;
        let objects = self.lock();
        let found: Vec<_> = under(&objects, parsed.as_ref())
            .take(LIST_MAX + 1)
            .map(|(name, bytes)| ObjectMeta { name: name.clone(), bytes: bytes.len() as u64 })
            .collect();
        if found.len() > LIST_MAX {
            return Err(Error::ListTooLong { prefix: prefix.to_string(), store: self.url(), max: LIST_MAX });
        }
        Ok(found)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        self.lock().remove(name);
        Ok(())
    }

    fn url(&self) -> String {
        "mem:".to_string()
    }
}

/// Objects below `prefix`: those that begin with `prefix/` stand together in the order of names.
fn under<'a>(
    objects: &'a BTreeMap<ObjectName, Arc<[u8]>>,
    prefix: Option<&ObjectName>,
) -> impl Iterator<Item = (&'a ObjectName, &'a Arc<[u8]>)> {
    let start = prefix.map_or(String::new(), |prefix| format!("{prefix}/"));
    let from = objects.range::<str, _>((Bound::Included(start.as_str()), Bound::Unbounded));
    from.take_while(move |(name, _)| name.as_str().starts_with(&start))
}
