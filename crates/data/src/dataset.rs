use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use store::{Bundle, Store};
use tokenizer::Tokenizer;

use crate::info::decode_tokens;
use crate::ingest::KIND;
use crate::prepare::{TOKENIZER, TOKENIZER_CONFIG};
use crate::{DatasetInfo, Error, Result, Split};

/// Shards kept in memory: 256 MiB are 128 shards of 2^20 two-byte tokens, more than 100 million tokens. A larger
/// dataset is read again and again, a shard (about a millisecond from a warm disk) for a window.
const CACHE_BYTES: usize = 256 << 20;

/// A published dataset. Clones share the shards in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    info: DatasetInfo,
    bundle: Bundle,
    tokenizer: Tokenizer,
    cache: Mutex<Cache>,
}

impl Dataset {
    /// Opens `datasets/<name>` and checks that its manifest, tokenizer and shards belong together. The contents of a
    /// shard are checked when it is read.
    pub fn open(store: &Arc<dyn Store>, name: &str) -> Result<Dataset> {
        let store_error = Error::store(name);
        let bundle = Bundle::open(store, &format!("datasets/{name}")).map_err(&store_error)?;
        let bundle = bundle.ok_or_else(|| Error::NoDataset { name: name.to_string(), store: store.url() })?;
        let damaged = |reason: String| Error::Damaged { name: name.to_string(), reason };
        if bundle.manifest().kind != KIND {
            return Err(damaged(format!("it is a {}", bundle.manifest().kind)));
        }
        let info = DatasetInfo::parse(name, &bundle.manifest().meta)?;
        let json = bundle.read(TOKENIZER).map_err(&store_error)?;
        let config = bundle.read(TOKENIZER_CONFIG).map_err(&store_error)?;
        let tokenizer = Tokenizer::from_json_with_config(&json, &config)
            .map_err(|source| Error::Tokenizer { name: name.to_string(), source })?;
        if tokenizer.fingerprint() != info.tokenizer_fingerprint || tokenizer.vocab_size() != info.vocab_size
        {
            return Err(damaged("its tokenizer is not the one that it was made with".to_string()));
        }
        check_shards(&info, &bundle)?;
        let cache = Mutex::new(Cache::new(CACHE_BYTES));
        Ok(Dataset { inner: Arc::new(Inner { info, bundle, tokenizer, cache }) })
    }

    pub fn info(&self) -> &DatasetInfo {
        &self.inner.info
    }

    pub fn tokenizer(&self) -> Tokenizer {
        self.inner.tokenizer.clone()
    }

    /// Tokens `range` of a split's stream: all its documents, each followed by the end-of-text id.
    pub fn tokens(&self, split: Split, range: Range<u64>) -> Result<Vec<u32>> {
        let info = self.info();
        let n_tokens = info.split(split).n_tokens;
        if range.start > range.end || range.end > n_tokens {
            let (name, split, Range { start, end }) = (info.name.clone(), split.name(), range);
            return Err(Error::OutOfRange { name, split, start, end, n_tokens });
        }
        let mut tokens = Vec::with_capacity((range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let shard_idx = at / info.shard_tokens as u64;
            let shard_start = shard_idx * info.shard_tokens as u64;
            let end = range.end.min(shard_start + info.shard_tokens as u64);
            let bytes = self.shard(&split.shard_file(shard_idx as usize))?;
            let place = |token: u64| (token - shard_start) as usize * info.token_bytes;
            tokens.extend(decode_tokens(&bytes[place(at)..place(end)], info.token_bytes));
            at = end;
        }
        match tokens.iter().find(|&&token| token as usize >= info.vocab_size) {
            None => Ok(tokens),
            Some(token) => {
                let reason = format!("token {token} in a vocabulary of {}", info.vocab_size);
                Err(Error::Damaged { name: info.name.clone(), reason })
            }
        }
    }

    /// What tokens `range` of a split of chats are, a byte each: see [`DatasetInfo`].
    pub(crate) fn marks(&self, split: Split, range: Range<u64>) -> Result<Vec<u8>> {
        let shard_tokens = self.info().shard_tokens as u64;
        let mut marks = Vec::with_capacity((range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let shard_idx = at / shard_tokens;
            let end = range.end.min((shard_idx + 1) * shard_tokens);
            let bytes = self.shard(&split.marks_file(shard_idx as usize))?;
            let place = |token: u64| (token - shard_idx * shard_tokens) as usize;
            marks.extend_from_slice(&bytes[place(at)..place(end)]);
            at = end;
        }
        Ok(marks)
    }

    /// The files that make the dataset's tokenizer, with its chat template if it has one: names and bytes.
    pub fn tokenizer_files(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        let read = |file| self.inner.bundle.read(file).map_err(Error::store(&self.info().name));
        Ok([(TOKENIZER, read(TOKENIZER)?), (TOKENIZER_CONFIG, read(TOKENIZER_CONFIG)?)])
    }

    /// Refuses a model that was trained on another tokenizer's ids. `model` is what the error calls it.
    pub fn check_tokenizer(&self, model: &str, tokenizer: &Tokenizer) -> Result<()> {
        let (found, expected) = (self.info().tokenizer_fingerprint.clone(), tokenizer.fingerprint());
        if found == expected {
            return Ok(());
        }
        let name = self.info().name.clone();
        Err(Error::OtherTokenizer { name, model: model.to_string(), found, expected })
    }

    /// A shard from memory, or from the store with its checksum verified. The lock is not held while it is read: two
    /// threads may read the same one, but none waits for another's.
    fn shard(&self, file: &str) -> Result<Arc<[u8]>> {
        let lock = || self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = lock().get(file) {
            return Ok(bytes);
        }
        let bytes = self.inner.bundle.read(file).map_err(Error::store(&self.info().name))?;
        let bytes: Arc<[u8]> = bytes.into();
        lock().insert(file, bytes.clone());
        Ok(bytes)
    }
}

/// Every shard that the counts call for is in the bundle and has the length that they give it.
fn check_shards(info: &DatasetInfo, bundle: &Bundle) -> Result<()> {
    for split in Split::BOTH {
        let n_tokens = info.split(split).n_tokens;
        let n_shards = n_tokens.div_ceil(info.shard_tokens as u64);
        let prefix = format!("{}-", split.name());
        let files = || bundle.manifest().files.iter().filter(|file| file.name.starts_with(&prefix));
        // Counted first: a number of tokens that lies must not make for a long search.
        let marks_fit = |shard_idx: u64, shard_tokens: u64| {
            let name = split.marks_file(shard_idx as usize);
            let marks = bundle.manifest().files.iter().find(|file| file.name == name);
            info.chats.is_none() || marks.is_some_and(|file| file.bytes == shard_tokens)
        };
        let is_whole = files().count() as u64 == n_shards
            && (0..n_shards).zip(files()).all(|(shard_idx, file)| {
                let left = n_tokens - shard_idx * info.shard_tokens as u64;
                let shard_tokens = left.min(info.shard_tokens as u64);
                file.name == split.shard_file(shard_idx as usize)
                    && Some(file.bytes) == shard_tokens.checked_mul(info.token_bytes as u64)
                    && marks_fit(shard_idx, shard_tokens)
            });
        if !is_whole {
            let reason = format!("its {} shards do not hold {n_tokens} tokens", split.name());
            return Err(Error::Damaged { name: info.name.clone(), reason });
        }
    }
    Ok(())
}

/// Least recently used shards go first. A handful of entries: a scan costs less than a map.
#[derive(Debug)]
struct Cache {
    /// Most recently used last.
    shards: VecDeque<(String, Arc<[u8]>)>,
    bytes: usize,
    bytes_max: usize,
}

impl Cache {
    fn new(bytes_max: usize) -> Cache {
        Cache { shards: VecDeque::new(), bytes: 0, bytes_max }
    }

    fn get(&mut self, file: &str) -> Option<Arc<[u8]>> {
        let at = self.shards.iter().position(|(f, _)| f == file)?;
        let entry = self.shards.remove(at)?;
        let bytes = entry.1.clone();
        self.shards.push_back(entry);
        Some(bytes)
    }

    fn insert(&mut self, file: &str, shard: Arc<[u8]>) {
        if self.get(file).is_some() {
            return;
        }
        self.bytes += shard.len();
        self.shards.push_back((file.to_string(), shard));
        while self.bytes > self.bytes_max {
            let Some((_, shard)) = self.shards.pop_front() else { return };
            self.bytes -= shard.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_its_bound() {
        let mut cache = Cache::new(100);
        for i in 0..50 {
            cache.insert(&Split::Train.shard_file(i), vec![0; 30].into());
            assert!(cache.get(&Split::Train.shard_file(0)).is_some(), "the most used shard was dropped");
            assert!(cache.bytes <= 100 && cache.bytes == 30 * cache.shards.len());
        }
        cache.insert(&Split::Validation.shard_file(0), vec![0; 101].into());
        assert_eq!((cache.bytes, cache.shards.len()), (0, 0));
    }
}
