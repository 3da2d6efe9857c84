//! What the tests of the ops share.

use crate::Pool;
use crate::cpu::Level;

/// Pools of every level of this machine with one to three threads.
pub(crate) fn every_pool() -> impl Iterator<Item = Pool> {
    Level::all_available().into_iter().flat_map(|level| [1, 2, 3].map(|n| Pool::with_level(n, level)))
}

/// `len` numbers in -1..1 from a counter-based generator (the finalizer of SplitMix64).
pub(crate) fn numbers(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let mut z = (seed << 40 | i).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Every element within `tolerance`, absolute below 1 and relative above.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * e.abs().max(1.0), "element {i}: found {f}, expected {e}");
    }
}

/// Compares `gradient` with central differences of `loss` at about 25 elements of `x`.
#[track_caller]
pub(crate) fn check_gradient(x: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    assert_eq!(x.len(), gradient.len());
    let mut x = x.to_vec();
    for i in (0..x.len()).step_by(x.len().div_ceil(25)) {
        let (old, h) = (x[i], 1e-2);
        x[i] = old + h;
        let (up, high) = (x[i], loss(&x));
        x[i] = old - h;
        let (down, low) = (x[i], loss(&x));
        x[i] = old;
        let slope = (high - low) / f64::from(up - down);
        let found = f64::from(gradient[i]);
        assert!(
            (found - slope).abs() <= 4e-3 * slope.abs().max(1.0),
            "element {i}: {found}, differences say {slope}"
        );
    }
}
