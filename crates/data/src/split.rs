use sha2::{Digest, Sha256};

/// The hash that decides what is held out: the first 8 bytes of the text's SHA-256. Equal texts have equal hashes, so
/// a repeated document never stands on both sides.
pub(crate) fn document_hash(text: &str) -> u64 {
    let digest = Sha256::digest(text.as_bytes());
    u64::from_be_bytes(std::array::from_fn(|i| digest[i]))
}

/// Which documents are held out for validation: a pure rule of a document's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SplitRule {
    /// Documents with a hash below this are held out.
    end: u64,
}

impl SplitRule {
    /// Holds out about `fraction` of the documents: of two or more different ones at least one, and never all.
    /// `None` if one is to be held out and all documents are the same text. Hashes are the smallest and the largest.
    pub(crate) fn new(fraction: f64, hash_min: u64, hash_max: u64) -> Option<SplitRule> {
        if fraction <= 0.0 {
            return Some(SplitRule { end: 0 });
        }
        if hash_min == hash_max {
            return None;
        }
        // 2^64 * fraction; a float that is too large becomes u64::MAX.
        let end = (fraction * 2f64.powi(64)) as u64;
        Some(SplitRule { end: end.clamp(hash_min + 1, hash_max) })
    }

    pub(crate) fn is_validation(self, hash: u64) -> bool {
        hash < self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_held_out_and_some_are_not() {
        for fraction in [1e-9, 0.01, 0.5, 0.999, 1.0, 1e300] {
            for (min, max) in [(0, 1), (5, 6), (0, u64::MAX), (u64::MAX - 1, u64::MAX), (1 << 40, 1 << 63)] {
                let rule = SplitRule::new(fraction, min, max).unwrap();
                assert!(rule.is_validation(min), "{fraction} {min} {max}: nothing is held out");
                assert!(!rule.is_validation(max), "{fraction} {min} {max}: everything is held out");
            }
        }
        assert_eq!(SplitRule::new(0.1, 7, 7), None);
        assert!(!SplitRule::new(0.0, 7, 7).unwrap().is_validation(7));
    }

    #[test]
    fn the_fraction_is_about_right() {
        let hashes: Vec<u64> = (0..10_000).map(|i| document_hash(&format!("document {i}"))).collect();
        let (min, max) = (*hashes.iter().min().unwrap(), *hashes.iter().max().unwrap());
        for (fraction, expected) in [(0.05, 500.0), (0.3, 3000.0)] {
            let rule = SplitRule::new(fraction, min, max).unwrap();
            let held_out = hashes.iter().filter(|&&hash| rule.is_validation(hash)).count() as f64;
            // The standard deviations are 22 and 46.
            assert!((held_out - expected).abs() < 200.0, "{held_out} of 10000 at {fraction}");
        }
    }

    #[test]
    fn the_hash_is_the_head_of_sha256() {
        // FIPS 180-4, example "abc": ba7816bf 8f01cfea ...
        assert_eq!(document_hash("abc"), 0xba78_16bf_8f01_cfea);
    }
}
