//! API keys: 256 random bits, shown once, kept as SHA-256.
//!
//! The keys are random, not chosen by people, so a fast hash is enough: there is nothing to guess (no salt, no argon2).

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::clock::UnixMs;
use crate::database::{Control, Stop, random_hex};
use crate::error::{Error, Result};
use crate::sql::{Fault, Row, values};

const PREFIX: &str = "sk-loquat-";

/// Keys that are valid at once.
const KEYS_MAX: usize = 10_000;

/// How long a change made by another process may stay unseen.
const CACHE_FRESH: Duration = Duration::from_secs(1);

/// What is not among the keys that were read may just have been made elsewhere, so it is asked for: so many times a second
/// at once, and beyond that only where what was read is older than this. Wrong keys thus cause 20 reads a second at most.
const ASKS_MAX: u32 = 10;
const UNKNOWN_FRESH: Duration = Duration::from_millis(100);

/// How long keys are still checked from memory when the database cannot be read.
const CACHE_STALE_MAX: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub i64);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "key-{}", self.0)
    }
}

/// What a key may do; each may what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Ask models.
    Use,
    /// See the cluster; cancel jobs and run them again.
    Member,
    /// Everything.
    Admin,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Use, Self::Member, Self::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Member => "member",
            Self::Admin => "admin",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// What may be known about a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    pub id: KeyId,
    /// Chosen by who created it; need not be unique.
    pub name: String,
    pub role: Role,
    pub created_at: UnixMs,
    pub revoked_at: Option<UnixMs>,
}

/// A key that was just created. This is the only moment its text exists.
#[derive(Clone)]
pub struct SecretKey {
    pub info: KeyInfo,
    text: String,
}

impl SecretKey {
    /// `sk-loquat-` and 64 hexadecimal digits.
    pub fn expose(&self) -> &str {
        &self.text
    }
}

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretKey").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Reads that keys which nobody knew have caused since then, within a second of it.
#[derive(Debug, Default)]
pub(crate) struct Asks {
    since: UnixMs,
    n: u32,
}

impl Asks {
    fn is_one_left(&self, now: UnixMs) -> bool {
        self.n < ASKS_MAX || now < self.since || now.since(self.since) >= Duration::from_secs(1)
    }

    fn take(&mut self, now: UnixMs) -> bool {
        let is_one_left = self.is_one_left(now);
        if now < self.since || now.since(self.since) >= Duration::from_secs(1) {
            *self = Asks { since: now, n: 0 };
        }
        self.n = self.n.saturating_add(1);
        is_one_left
    }
}

/// The valid keys as of `read_at`, by the first bytes of their hash.
#[derive(Debug)]
pub(crate) struct KeyCache {
    read_at: UnixMs,
    keys: HashMap<[u8; 8], Vec<([u8; 32], KeyInfo)>>,
}

impl KeyCache {
    /// The index leaks at most a few bits of the hash of what was sent, which its sender knows; the rest is compared in
    /// constant time.
    fn find(&self, hash: &[u8; 32]) -> Option<&KeyInfo> {
        let candidates = self.keys.get(&head(hash))?;
        let found = candidates.iter().find(|(known, _)| bool::from(known.ct_eq(hash)));
        found.map(|(_, info)| info)
    }

    /// Age, or `None` when the clock was set back and the age cannot be told.
    fn age(&self, now: UnixMs) -> Option<Duration> {
        (now >= self.read_at).then(|| now.since(self.read_at))
    }
}

impl Control {
    /// A new key. Errors: an empty, overlong or unprintable name, too many keys, the database.
    pub fn create_key(&self, name: &str, role: Role) -> Result<SecretKey> {
        if name.is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
            return Err(Error::Invalid {
                what: "key name",
                why: "it must have 1 to 128 bytes and no control characters".to_owned(),
            });
        }
        let text = format!("{PREFIX}{}", random_hex::<32>()?);
        let hash = hash(&text);
        let created_at = self.now();
        let id = self.write("create a key", |transaction| {
            let n_valid = transaction.number("SELECT count(*) FROM keys WHERE revoked_ms IS NULL", &[])?;
            if usize::try_from(n_valid).is_ok_and(|n| n >= KEYS_MAX) {
                return Err(Stop::Refused(Error::TooMany { what: "keys", max: KEYS_MAX }));
            }
            let id = transaction.number(
                "INSERT INTO keys (name, hash, created_ms, role) VALUES (?1, ?2, ?3, ?4) RETURNING id",
                values![name, &hash, created_at.0, role.as_str()],
            )?;
            Ok(KeyId(id))
        })?;
        self.drop_key_cache();
        let info = KeyInfo { id, name: name.to_owned(), role, created_at, revoked_at: None };
        Ok(SecretKey { info, text })
    }

    /// Whose key `text` is; `None` when it is nobody's or was revoked.
    ///
    /// Usually answered from memory. A key revoked in this process is refused at once, one revoked by another process within
    /// a second; one made by another process is known at once, or within a tenth of a second while wrong ones are tried by
    /// the dozen. While the database cannot be read, keys known within the last five minutes go on working.
    pub fn check_key(&self, text: &str) -> Result<Option<KeyInfo>> {
        let hash = hash(text);
        let now = self.now();
        match self.cached_key(&hash, now, (CACHE_FRESH, UNKNOWN_FRESH)) {
            Some(Some(owner)) => return Ok(Some(owner)),
            Some(None) if !self.asks().take(now) => return Ok(None),
            _ => {}
        }
        match self.refresh_key_cache(now, |cache| cache.find(&hash).cloned()) {
            Ok(answer) => Ok(answer),
            Err(error) => match self.cached_key(&hash, now, (CACHE_STALE_MAX, CACHE_STALE_MAX)) {
                Some(answer) => {
                    tracing::warn!(%error, "keys are checked from memory");
                    Ok(answer)
                }
                None => Err(error),
            },
        }
    }

    /// As [`Control::check_key`], but only from memory and without waiting: `None` where the database has to be asked.
    pub fn known_key(&self, text: &str) -> Option<Option<KeyInfo>> {
        let now = self.now();
        let answer = self.cached_key(&hash(text), now, (CACHE_FRESH, UNKNOWN_FRESH))?;
        (answer.is_some() || !self.asks().is_one_left(now)).then_some(answer)
    }

    fn asks(&self) -> MutexGuard<'_, Asks> {
        self.0.key_asks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the keys again before they are too old to be checked from memory. Called often enough, it spares requests
    /// the wait for the database, which others use, too.
    pub fn freshen_keys(&self) -> Result<()> {
        let now = self.now();
        let is_fresh = {
            let cache = self.0.keys.read().unwrap_or_else(PoisonError::into_inner);
            cache.as_ref().and_then(|cache| cache.age(now)).is_some_and(|age| age < CACHE_FRESH / 2)
        };
        if is_fresh { Ok(()) } else { self.refresh_key_cache(now, |_| ()) }
    }

    /// The keys' word about one, if it is not older than the first time for one that is valid, and the second for another.
    fn cached_key(
        &self,
        hash: &[u8; 32],
        now: UnixMs,
        (known_max, unknown_max): (Duration, Duration),
    ) -> Option<Option<KeyInfo>> {
        let cache = self.0.keys.read().unwrap_or_else(PoisonError::into_inner);
        let cache = cache.as_ref()?;
        let (age, found) = (cache.age(now)?, cache.find(hash));
        let age_max = if found.is_some() { known_max } else { unknown_max };
        (age < age_max).then(|| found.cloned())
    }

    /// All keys ever created, revoked ones included, newest last.
    pub fn list_keys(&self) -> Result<Vec<KeyInfo>> {
        self.read("list keys", |transaction| {
            let rows = transaction
                .rows("SELECT id, name, created_ms, revoked_ms, role FROM keys ORDER BY id", &[])?;
            Ok(rows.iter().map(key_info).collect::<Result<_, _>>()?)
        })
    }

    /// Makes a key invalid from now on. `false` when there is no such valid key.
    pub fn revoke_key(&self, id: KeyId) -> Result<bool> {
        let now = self.now();
        let n_revoked = self.write("revoke a key", |transaction| {
            let sql = "UPDATE keys SET revoked_ms = ?2 WHERE id = ?1 AND revoked_ms IS NULL";
            Ok(transaction.execute(sql, values![id.0, now.0])?)
        })?;
        self.drop_key_cache();
        Ok(n_revoked == 1)
    }

    /// Reads the keys, looks at them, and stores them while the connection is held, so that a cache read before a
    /// revocation can never replace one read after it.
    fn refresh_key_cache<T>(&self, now: UnixMs, look: impl FnOnce(&KeyCache) -> T) -> Result<T> {
        self.read("read the keys", |transaction| {
            let sql =
                "SELECT id, name, created_ms, revoked_ms, role, hash FROM keys WHERE revoked_ms IS NULL";
            let mut keys = HashMap::<_, Vec<_>>::new();
            for row in transaction.rows(sql, &[])? {
                let hash = row.hash(5)?;
                keys.entry(head(&hash)).or_default().push((hash, key_info(&row)?));
            }
            let cache = KeyCache { read_at: now, keys };
            let answer = look(&cache);
            *self.0.keys.write().unwrap_or_else(PoisonError::into_inner) = Some(cache);
            Ok(answer)
        })
    }

    fn drop_key_cache(&self) {
        *self.0.keys.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

fn head(hash: &[u8; 32]) -> [u8; 8] {
    hash[..8].try_into().expect("8 of 32 bytes")
}

fn key_info(row: &Row) -> Result<KeyInfo, Fault> {
    let word = row.text(4)?;
    Ok(KeyInfo {
        role: Role::named(word).ok_or_else(|| Fault::unknown_word(4, word))?,
        id: KeyId(row.int(0)?),
        name: row.text(1)?.to_owned(),
        created_at: UnixMs(row.int(2)?),
        revoked_at: row.int_or_null(3)?.map(UnixMs),
    })
}
