use std::sync::Arc;

use store::{ObjectName, Store};

use crate::{Error, Result};

/// What an ingest keeps for the case that it is killed: objects under `datasets/<name>/ingest/<plan>/`. They belong to
/// one plan and one state of the inputs, so they never have to be checked against others.
pub(crate) struct Work {
    store: Arc<dyn Store>,
    dataset: String,
    /// `datasets/<name>/ingest`
    all: ObjectName,
    /// `datasets/<name>/ingest/<plan>`
    own: ObjectName,
}

impl Work {
    pub(crate) fn new(store: &Arc<dyn Store>, dataset: &str, plan_sha256: &str) -> Result<Work> {
        let fail = Error::store(dataset);
        let all = ObjectName::parse(&format!("datasets/{dataset}/ingest")).map_err(&fail)?;
        let own = all.join(&plan_sha256[..16]).map_err(&fail)?;
        Ok(Work { store: store.clone(), dataset: dataset.to_string(), all, own })
    }

    pub(crate) fn dataset(&self) -> &str {
        &self.dataset
    }

    pub(crate) fn get(&self, file: &str) -> Result<Option<Vec<u8>>> {
        match self.own.join(file).and_then(|name| self.store.get(&name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(Error::store(&self.dataset)(error)),
        }
    }

    pub(crate) fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let put = self.own.join(file).and_then(|name| self.store.put(&name, bytes));
        put.map_err(Error::store(&self.dataset))
    }

    /// Removes what this and every earlier ingest of the dataset kept.
    pub(crate) fn clear(&self) -> Result<()> {
        let clear = || {
            let metas = self.store.list(self.all.as_str())?;
            metas.iter().try_for_each(|meta| self.store.delete(&meta.name))
        };
        clear().map_err(Error::store(&self.dataset))
    }
}
