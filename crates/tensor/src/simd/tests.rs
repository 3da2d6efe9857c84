//! Every primitive at every level this machine has, against plain arithmetic.

use super::*;
use crate::cpu::Level;

/// Results of all primitives on the same inputs, as plain numbers.
#[inline(always)]
fn all_simd<S: Simd>(s: S, x: &[f32], out: &mut Vec<f64>) {
    let a = s.load(&x[..S::LANES]);
    let b = s.load(&x[16..16 + S::LANES]);
    let mut push = |v: S::F| out.extend(s.lanes(v)[..8].iter().map(|&x| x as f64));
    push(s.add(a, b));
    push(s.sub(a, b));
    push(s.mul(a, b));
    push(s.div(a, b));
    push(s.max(a, b));
    push(s.min(a, b));
    push(s.sqrt(s.abs(a)));
    push(s.neg(a));
    push(s.to_f(s.to_i(s.mul(a, s.splat(10.0)))));
    push(s.bits_to_f(s.bits_to_i(a)));
    push(s.to_f(s.shl_i::<3>(s.to_i(a))));
    push(s.to_f(s.mul_i(s.to_i(a), s.splat_i(-7))));
    push(s.to_f(s.sub_i(s.to_i(a), s.to_i(b))));
    push(s.load(&x[..3]));
    let h: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
    push(s.load_f16(&h));
    push(s.load_f16(&h[..5]));
    let h: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
    push(s.load_bf16(&h));
    push(s.load_bf16(&h[..5]));
    let bytes: Vec<i8> = (0..32).map(|i| (i * 37 % 256) as u8 as i8).collect();
    let words: Vec<i16> = (0..32).map(|i| (i * 7919 - 99_999) as i16).collect();
    // SAFETY: 32 elements are readable at each pointer, the most any level reads.
    let (i8s, u8s, h) = unsafe {
        (
            s.load_h_from_i8_ptr(bytes.as_ptr()),
            s.load_h_from_u8_ptr(bytes.as_ptr().cast()),
            s.load_h_ptr(words.as_ptr()),
        )
    };
    // SAFETY: as above.
    push(unsafe { s.load_i8_ptr(bytes.as_ptr()) });
    push(s.round_bf16(a));
    push(s.to_f(s.or_i(s.and_i(s.to_i(a), s.splat_i(6)), s.splat_i(1))));
    push(s.to_f(s.shr_i::<28>(s.bits_to_i(a))));
    let (pa, pb) =
        (s.pair_bf16(s.round_bf16(a), s.round_bf16(b)), s.pair_bf16(s.round_bf16(b), s.round_bf16(a)));
    if S::LANES == 8 || std::any::TypeId::of::<S>() == std::any::TypeId::of::<Portable<16>>() {
        push(s.dot_bf16(pa, pb, s.add(a, b)));
    } else {
        // AVX512-BF16 needs its own dispatch; matmul's tests cover it where the processor has it.
        push(s.fma(s.round_bf16(a), s.round_bf16(b), s.fma(s.round_bf16(a), s.round_bf16(b), s.add(a, b))));
    }
    let acc = s.splat_i(1000);
    push(s.to_f(s.madd(acc, i8s, s.splat_pair([3, -5]))));
    push(s.to_f(s.madd(acc, s.shr_h::<4>(u8s), s.splat_h(11))));
    push(s.to_f(s.madd(acc, s.and_h(u8s, s.splat_h(15)), h)));
    push(s.to_f(s.madd(acc, s.sub_h(u8s, s.splat_h(8)), s.add_h(h, i8s))));
}
dispatch!(fn all(x: &[f32], out: &mut Vec<f64>) = all_simd);

#[test]
fn primitives_agree_at_every_level() {
    let x: Vec<f32> = (0..64).map(|i| ((i * 29 % 17) as f32 - 8.0) * 1.37 + 0.1).collect();
    let mut expected = Vec::new();
    all(Level::Scalar, &x, &mut expected);
    for level in Level::all_available() {
        let mut got = Vec::new();
        all(level, &x, &mut got);
        assert_eq!(got, expected, "{level:?}");
    }
}

#[inline(always)]
fn transpose_simd<S: Simd>(s: S, x: &[f32], n_lanes: usize) -> Vec<f32> {
    let x16: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
    let mut out = vec![-1.0; 2 * 80];
    // SAFETY: x has 8 rows of stride 9, each half of out 8 rows of stride 10.
    unsafe {
        s.transpose8_ptr(x.as_ptr(), 9, n_lanes, out.as_mut_ptr(), 10);
        s.transpose8_bf16_ptr(x16.as_ptr(), 9, n_lanes, out.as_mut_ptr().add(80), 10);
    }
    out
}
dispatch!(fn transpose(x: &[f32], n_lanes: usize) -> Vec<f32> = transpose_simd);

#[test]
fn transposes() {
    let x: Vec<f32> = (0..72).map(|i| i as f32).collect();
    for level in Level::all_available() {
        for n_lanes in 0..=8 {
            let out = transpose(level, &x, n_lanes);
            for (i, &got) in out.iter().enumerate() {
                let (k, lane) = (i % 80 / 10, i % 10);
                let expected = match lane {
                    8.. => -1.0,
                    _ if lane < n_lanes => x[lane * 9 + k],
                    _ => 0.0,
                };
                assert_eq!(got, expected, "{level:?}, {n_lanes} lanes, at {i}");
            }
        }
    }
}

#[inline(always)]
fn round_all_simd<S: Simd>(s: S, x: &[f32]) -> Vec<u32> {
    let mut bits = Vec::new();
    for x in x.chunks(S::LANES) {
        let rounded = s.lanes(s.round_bf16(s.load(x)));
        bits.extend(rounded[..x.len()].iter().map(|x| x.to_bits()));
    }
    bits
}
dispatch!(fn round_all(x: &[f32]) -> Vec<u32> = round_all_simd);

#[test]
fn rounding_to_bf16_is_that_of_half() {
    let mut x: Vec<f32> = (0..40_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
    x.extend([
        f32::NAN,
        -f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffff_ffff),
        f32::INFINITY,
        -0.0,
    ]);
    x.extend([f32::MAX, f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000), f32::from_bits(1)]);
    let expected: Vec<u32> = x.iter().map(|&x| (bf16::from_f32(x).to_bits() as u32) << 16).collect();
    for level in Level::all_available() {
        assert_eq!(round_all(level, &x), expected, "{level:?}");
    }
}

#[inline(always)]
fn reduce_simd<S: Simd>(s: S, x: &[f32]) -> (f32, f32, f32) {
    let v = s.load(x);
    let mut out = vec![0.0; S::LANES - 1];
    s.store(&mut out, v);
    (s.sum(v), s.max_lane(v), out.iter().sum())
}
dispatch!(fn reduce(x: &[f32]) -> (f32, f32, f32) = reduce_simd);

#[test]
fn reductions_and_partial_stores() {
    let x: Vec<f32> = (0..16).map(|i| (i * 7 % 16) as f32).collect();
    for level in Level::all_available() {
        let lanes = if matches!(level, Level::Scalar | Level::Avx2) { 8 } else { 16 };
        let max = x[..lanes].iter().copied().fold(0.0, f32::max);
        assert_eq!(
            reduce(level, &x),
            (x[..lanes].iter().sum(), max, x[..lanes - 1].iter().sum()),
            "{level:?}"
        );
    }
}

#[inline(always)]
fn exp_all_simd<S: Simd>(s: S, y: &mut [f32], x: &[f32]) {
    for (y, x) in y.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
        s.store(y, s.exp(s.load(x)));
    }
}
dispatch!(fn exp_all(y: &mut [f32], x: &[f32]) = exp_all_simd);

#[test]
fn exp_is_accurate_and_saturates() {
    let x: Vec<f32> = (0..100_000).map(|i| -87.0 + 175.0 * i as f32 / 100_000.0).collect();
    for level in Level::all_available() {
        let mut y = vec![0.0; x.len()];
        exp_all(level, &mut y, &x);
        for (&x, &y) in x.iter().zip(&y) {
            let exact = (x as f64).exp();
            assert!((y as f64 - exact).abs() <= 2.4e-7 * exact, "{level:?}: exp({x}) = {y}, not {exact}");
        }
        let mut y = [0.0; 5];
        exp_all(level, &mut y, &[f32::NEG_INFINITY, -1e30, -100.0, 1e30, 0.0]);
        assert!(
            y[0] < 2e-38 && y[1] < 2e-38 && y[2] < 2e-38 && y[3].is_finite() && y[3] > 1e38 && y[4] == 1.0
        );
    }
}

#[inline(always)]
fn exp_or_zero_all_simd<S: Simd>(s: S, y: &mut [f32], x: &[f32]) {
    for (y, x) in y.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
        s.store(y, s.exp_or_zero(s.load(x)));
    }
}
dispatch!(fn exp_or_zero_all(y: &mut [f32], x: &[f32]) = exp_or_zero_all_simd);

/// A gradient of 1e-5 times any of them is nothing or a normal number.
#[test]
fn small_probabilities_are_nothing() {
    let x: Vec<f32> = (0..100_000).map(|i| -110.0 + 110.0 * i as f32 / 100_000.0).collect();
    for level in Level::all_available() {
        let mut y = vec![0.0; x.len()];
        exp_or_zero_all(level, &mut y, &x);
        for (&x, &y) in x.iter().zip(&y) {
            assert!(y == 0.0 || y * 1e-5 >= f32::MIN_POSITIVE, "{level:?}: {y} for {x}");
            assert!((f64::from(y) - f64::from(x).exp()).abs() <= 1e-24 + 2.4e-7 * f64::from(x).exp());
        }
    }
}

/// An intrinsic is an instruction where it is inlined, and a call elsewhere: in a closure that the compiler made a function,
/// say. The products of BF16 weights took 100 times as long that way at one level of four, and were right.
#[cfg(target_arch = "x86_64")]
#[test]
fn every_intrinsic_is_inlined() {
    let binary = std::env::current_exe().expect("a test is a file");
    let Ok(nm) = std::process::Command::new("nm").arg("--demangle").arg(&binary).output() else {
        eprintln!("SKIPPED: there is no nm");
        return;
    };
    let symbols = String::from_utf8_lossy(&nm.stdout);
    assert!(symbols.contains("tensor::packed::kernels::batch_tiles::avx2"), "no symbols: {:?}", nm.status);
    // Those of SSE2 are right anywhere, and XGETBV is asked once.
    let called: Vec<_> = symbols
        .lines()
        .filter(|line| {
            ["::avx", "::fma::", "::f16c::"].iter().any(|set| line.contains(&format!("core_arch::x86{set}")))
        })
        .collect();
    assert!(called.is_empty(), "called instead of inlined: {called:#?}");
}
