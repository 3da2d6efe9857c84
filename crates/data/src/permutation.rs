/// Rounds of the Feistel network. Three make a random permutation of good round functions (Luby and Rackoff, 1988);
/// ours are one multiplication deep, so it has a few more.
const ROUNDS: u64 = 6;

/// A permutation of `0..n`, chosen by a key, evaluated at any point without building a table.
///
/// A balanced Feistel network permutes the numbers of an even count of bits, the fewest that hold `n`; a result that
/// is not below `n` is put through again until one is (cycle walking: fewer than four times on average). Both are
/// described by Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// # Panics
    /// If `n` is 0.
    pub fn new(n: u64, seed: u64, epoch: u64) -> Permutation {
        assert!(n > 0, "a permutation of nothing");
        let bits = u64::BITS - (n - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        Permutation { n, half_bits, key: mix(mix(seed) ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15)) }
    }

    /// Where position `i` is sent.
    ///
    /// # Panics
    /// If `i` is not below `n`.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "position {i} of {}", self.n);
        let mut x = self.network(i);
        while x >= self.n {
            x = self.network(x);
        }
        x
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            let f = mix(right ^ self.key.rotate_left(11 * round as u32) ^ (round << 56));
            (left, right) = (right, (left ^ f) & mask);
        }
        left << self.half_bits | right
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(n: u64, seed: u64, epoch: u64) {
        let permutation = Permutation::new(n, seed, epoch);
        let mut seen = vec![false; n as usize];
        for i in 0..n {
            let to = permutation.at(i) as usize;
            assert!(
                !std::mem::replace(&mut seen[to], true),
                "{n}: {to} comes twice (seed {seed}, epoch {epoch})"
            );
        }
    }

    #[test]
    fn every_size_is_permuted() {
        for n in 1..600 {
            check(n, n ^ 7, n % 5);
        }
        for n in [1023, 1024, 1025, 4095, 4097, 65_535, 65_536, 65_537, 100_003, 262_145] {
            check(n, 42, 3);
        }
    }

    #[test]
    fn huge_sizes_stay_inside_and_apart() {
        for n in [1 << 40, (1 << 40) + 1, u64::MAX / 2 + 2, u64::MAX] {
            let permutation = Permutation::new(n, 1, 2);
            let mut to: Vec<u64> = (0..1000).map(|i| permutation.at(i * (n / 1000))).collect();
            to.sort_unstable();
            to.dedup();
            assert_eq!(to.len(), 1000);
            assert!(to.iter().all(|&x| x < n));
        }
    }

    /// The order of the data is part of what a resumed run relies on: it must never change. The numbers are those of the
    /// same formulas written once more in Python; SplitMix64's first output for seed 0 is a published value.
    #[test]
    fn the_order_is_pinned() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        let of = |n, seed, epoch, positions: &[u64]| {
            positions.iter().map(|&i| Permutation::new(n, seed, epoch).at(i)).collect::<Vec<_>>()
        };
        assert_eq!(of(10, 0, 0, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), [8, 4, 6, 7, 5, 2, 9, 3, 1, 0]);
        assert_eq!(of(10_589, 42, 3, &[0, 1, 2, 3, 4, 5]), [6767, 2069, 2163, 2331, 8767, 2704]);
        let large = of((1 << 40) + 1, u64::MAX, 1 << 33, &[0, 1, 1 << 40]);
        assert_eq!(large, [429_959_563_472, 458_183_798_093, 556_272_495_079]);
    }

    /// Positions land evenly, neighbours do not stay neighbours, and epochs do not resemble each other.
    #[test]
    fn it_looks_random() {
        let n = 10_000;
        let of = |seed, epoch| (0..n).map(|i| Permutation::new(n, seed, epoch).at(i)).collect::<Vec<_>>();
        let base = of(1, 0);
        // Chi-square over 10 x 10 cells of (where from, where to): 81 degrees of freedom, 99.99 % lie below 136.
        let mut cells = [[0f64; 10]; 10];
        for (i, &to) in base.iter().enumerate() {
            cells[i / 1000][to as usize / 1000] += 1.0;
        }
        let chi2: f64 = cells.iter().flatten().map(|count| (count - 100.0).powi(2) / 100.0).sum();
        assert!(chi2 < 136.0, "chi-square {chi2}");
        let neighbours = base.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(neighbours < 15, "{neighbours} neighbours stay together; 2 are expected");
        for other in [of(1, 1), of(2, 0), of(1 << 63, 0), of(1, 1 << 40)] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 15, "{same} positions agree with another key; 1 is expected");
        }
    }
}
