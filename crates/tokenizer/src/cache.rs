//! Words seen lately and their ids: most words of a text are repeats, and merging one costs a hundred look-ups.

/// Slots: 2^15 × 32 B = 1 MiB, so that it lives in the second-level cache with room for the rest.
const SLOTS: usize = 1 << 15;
/// Bytes of word that fit in a slot, beside their length.
pub(crate) const WORD_BYTES_MAX: usize = 15;
/// Ids that fit in a slot.
const IDS_MAX: usize = 4;
/// Ends a slot's ids before [`IDS_MAX`]; no vocabulary reaches it.
const NONE: u32 = u32::MAX;

/// Word → ids, direct-mapped: a new word takes the place of the old one in its slot. Bounded by construction.
pub(crate) struct WordCache {
    slots: Vec<Slot>,
}

#[derive(Clone, Copy)]
struct Slot {
    /// 0 is free: a key holds the word's length, which is at least 1.
    key: u128,
    ids: [u32; IDS_MAX],
}

impl WordCache {
    pub(crate) fn new() -> WordCache {
        WordCache { slots: vec![Slot { key: 0, ids: [NONE; IDS_MAX] }; SLOTS] }
    }

    /// Appends the word's ids and returns true if it is here.
    #[inline(always)]
    pub(crate) fn get(&self, key: u128, ids: &mut Vec<u32>) -> bool {
        let slot = &self.slots[slot_of(key)];
        if slot.key != key {
            return false;
        }
        ids.push(slot.ids[0]);
        for &id in &slot.ids[1..] {
            if id == NONE {
                break;
            }
            ids.push(id);
        }
        true
    }

    pub(crate) fn put(&mut self, key: u128, ids: &[u32]) {
        if ids.is_empty() || ids.len() > IDS_MAX {
            return;
        }
        let mut slot = Slot { key, ids: [NONE; IDS_MAX] };
        slot.ids[..ids.len()].copy_from_slice(ids);
        self.slots[slot_of(key)] = slot;
    }
}

/// The key of `text[start..end]`, of 1 to [`WORD_BYTES_MAX`] bytes: the bytes, then zeros, then the length.
#[inline(always)]
pub(crate) fn key_of(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    debug_assert!((1..=WORD_BYTES_MAX).contains(&len));
    let word = match text.get(start..start + 16).and_then(|bytes| bytes.try_into().ok()) {
        // One load, and the bytes after the word masked off.
        Some(bytes) => u128::from_le_bytes(bytes) & (u128::MAX >> (128 - 8 * len)),
        None => {
            let mut bytes = [0; 16];
            bytes[..len].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(bytes)
        }
    };
    word | (len as u128) << 120
}

#[inline(always)]
fn slot_of(key: u128) -> usize {
    // Two odd constants (from the golden ratio and from SplitMix64); the product's high bits depend on every byte.
    let mixed = (key as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ ((key >> 64) as u64).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (mixed.wrapping_mul(0x94D0_49BB_1331_11EB) >> 40) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_not_see_what_follows_the_word() {
        let text = b"abcdefghijklmnopqrstuvwxyz";
        assert_eq!(key_of(text, 2, 5), key_of(b"cde", 0, 3));
        assert_ne!(key_of(text, 2, 5), key_of(b"cde\0", 0, 4));
        assert_eq!(key_of(text, 0, 15), key_of(&text[..15], 0, 15));
    }

    #[test]
    fn holds_what_fits_and_nothing_else() {
        let mut cache = WordCache::new();
        let mut ids = Vec::new();
        cache.put(key_of(b"a", 0, 1), &[1, 2, 3, 4]);
        cache.put(key_of(b"b", 0, 1), &[1, 2, 3, 4, 5]);
        cache.put(key_of(b"c", 0, 1), &[]);
        assert!(cache.get(key_of(b"a", 0, 1), &mut ids));
        assert!(!cache.get(key_of(b"b", 0, 1), &mut ids));
        assert!(!cache.get(key_of(b"c", 0, 1), &mut ids));
        assert_eq!(ids, [1, 2, 3, 4]);
    }
}
