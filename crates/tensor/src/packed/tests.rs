use super::kind::BLOCK;
use super::*;
use crate::testing::{every_pool, numbers};

/// Products in f64 of the dequantized weights and the inputs as the kind takes them, and the sum of magnitudes that bounds
/// the rounding.
fn reference(
    (kind, level): (WeightKind, Level),
    bytes: &[u8],
    [n_out, n_in]: [usize; 2],
    x_ni: &[f32],
) -> Vec<(f64, f64)> {
    let mut w_oi = vec![0.0; n_out * n_in];
    kind.dequantize(bytes, &mut w_oi);
    let dot = |x: &[f64], w: &[f32]| {
        let products = x.iter().zip(w).map(|(&x, &w)| x * f64::from(w));
        products.fold((0.0, 0.0), |(sum, magnitude), p| (sum + p, magnitude + p.abs()))
    };
    let x_ni: Vec<f64> = match kind {
        WeightKind::Bf16 if uses_pairs(level) => {
            x_ni.iter().map(|&x| half::bf16::from_f32(x).to_f64()).collect()
        }
        WeightKind::F32 | WeightKind::F16 | WeightKind::Bf16 => x_ni.iter().map(|&x| x.into()).collect(),
        _ => x_ni.chunks(BLOCK).flat_map(to_16_bits).collect(),
    };
    x_ni.chunks(n_in).flat_map(|x| w_oi.chunks(n_in).map(move |w| dot(x, w))).collect()
}

/// Whole multiples of the block's largest input over 32,639.
fn to_16_bits(x: &[f32]) -> Vec<f64> {
    let amax = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let q = |x: f32| f64::from((x * (dot::X_MAX / amax)).round_ties_even());
    x.iter().map(|&x| if amax == 0.0 { 0.0 } else { q(x) * f64::from(amax / dot::X_MAX) }).collect()
}

/// Stored weights whose quantized blocks use every value: f16 scales of either sign, all nibbles and bytes.
fn stored(kind: WeightKind, seed: u64, n: usize) -> Vec<u8> {
    kind.quantize(&numbers(seed, n))
}

#[test]
fn products_match_the_reference() {
    let shapes = [
        ([1, 32], 1),
        ([16, 64], 1),
        ([33, 96], 2),
        ([80, 32], 7),
        ([31, 160], 13),
        ([64, 64], 61),
        ([17, 32], 98),
        ([70, 33], 13),
    ];
    for pool in every_pool() {
        let mut scratch = PackedScratch::default();
        for kind in WeightKind::ALL {
            for (seed, ([n_out, n_in], n)) in shapes.into_iter().enumerate() {
                let dims @ [_, n_in] = [n_out, usize::next_multiple_of(n_in, kind.block_elems())];
                let bytes = stored(kind, seed as u64, n_out * n_in);
                let x_ni = numbers(100 + seed as u64, n * n_in);
                let packed = Packed::from_bytes(&pool, kind, &bytes, dims);
                let mut y_no = vec![f32::NAN; n * n_out];
                project(&pool, &mut y_no, &[&packed], &x_ni, &mut scratch);
                for (i, (y, (expected, magnitude))) in
                    y_no.iter().zip(reference((kind, pool.level()), &bytes, dims, &x_ni)).enumerate()
                {
                    let error = (f64::from(*y) - expected).abs();
                    // Some rounding steps of f32.
                    let close = error <= 1e-6 * magnitude;
                    assert!(close, "{kind:?} {dims:?} n {n} {:?} [{i}]: {y} is not {expected}", pool.level());
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for kind in WeightKind::ALL {
        let dims @ [n_out, n_in] = [50, 192_usize.next_multiple_of(kind.block_elems())];
        let x_ni = numbers(7, 101 * n_in);
        let bytes = stored(kind, 3, n_out * n_in);
        for pool in every_pool() {
            let single = Pool::with_level(1, pool.level());
            let packed = Packed::from_bytes(&pool, kind, &bytes, dims);
            let mut scratch = PackedScratch::default();
            let mut alone = vec![0.0; 101 * n_out];
            for (y, x) in alone.chunks_mut(n_out).zip(x_ni.chunks(n_in)) {
                project(&single, y, &[&packed], x, &mut scratch);
            }
            for n in [2, 3, 4, 5, 6, 8, 12, 13, 25, 48, 49, 61, 101] {
                let mut together = vec![0.0; n * n_out];
                project(&pool, &mut together, &[&packed], &x_ni[..n * n_in], &mut scratch);
                assert_eq!(together, alone[..n * n_out], "{kind:?}, n {n}, {:?}", pool.level());
            }
        }
    }
}

#[test]
fn a_stack_is_its_matrices_side_by_side() {
    let n_in = 64;
    for pool in every_pool() {
        let of = |kind, n_out: usize| {
            Packed::from_bytes(&pool, kind, &stored(kind, n_out as u64, n_out * n_in), [n_out, n_in])
        };
        let stack = [
            of(WeightKind::Q4_1, 40),
            of(WeightKind::F32, 7),
            of(WeightKind::Q8_0, 130),
            of(WeightKind::Bf16, 96),
        ];
        let mut scratch = PackedScratch::default();
        for n in [1, 5] {
            let x_ni = numbers(1, n * n_in);
            let mut stacked = vec![0.0; n * 273];
            project(&pool, &mut stacked, &stack.iter().collect::<Vec<_>>(), &x_ni, &mut scratch);
            let mut o = 0;
            for w in &stack {
                let mut y = vec![0.0; n * w.n_out];
                project(&pool, &mut y, &[w], &x_ni, &mut scratch);
                for (stacked, y) in stacked.chunks(273).zip(y.chunks(w.n_out)) {
                    assert_eq!(&stacked[o..o + w.n_out], y, "{w:?}");
                }
                o += w.n_out;
            }
        }
    }
}

#[test]
fn rows_come_back_as_they_were_stored() {
    let pool = Pool::new(2);
    for kind in WeightKind::ALL {
        let dims @ [n_out, n_in] = [21, 96_usize.next_multiple_of(kind.block_elems())];
        let bytes = stored(kind, 5, n_out * n_in);
        let packed = Packed::from_bytes(&pool, kind, &bytes, dims);
        // Whole tiles of two rows' worth of what the file has, parts in whole cache lines, scales in whole bytes.
        let stored = bytes.len() / n_out * 32;
        let found = packed.bytes();
        assert!(
            (stored..=stored * 103 / 100 + 4 * 64).contains(&found),
            "{kind:?}: {found} of {stored} bytes"
        );
        let mut w_oi = vec![0.0; n_out * n_in];
        kind.dequantize(&bytes, &mut w_oi);
        let mut row = vec![0.0; n_in];
        for (i, expected) in w_oi.chunks(n_in).enumerate() {
            packed.row_f32(i, &mut row);
            assert_eq!(row, expected, "{kind:?} row {i}");
        }
    }
}

/// The largest magnitudes of every part at once: the int32 sums must not wrap.
#[test]
fn extreme_values_do_not_overflow() {
    let one = half::f16::from_f32(1.0).to_le_bytes();
    let cases = [
        (WeightKind::Q4_0, [&one[..], &[0x00; 16]].concat(), -8.0),
        (WeightKind::Q4_0, [&one[..], &[0xff; 16]].concat(), 7.0),
        (WeightKind::Q4_1, [&one[..], &one[..], &[0xff; 16]].concat(), 16.0),
        (WeightKind::Q8_0, [&one[..], &[0x80; 32]].concat(), -128.0),
        (WeightKind::Q8_0, [&one[..], &[0x7f; 32]].concat(), 127.0),
    ];
    for pool in every_pool() {
        for (kind, block, weight) in &cases {
            let packed = Packed::from_bytes(&pool, *kind, block, [1, BLOCK]);
            for (n, x) in [(1, 3e4f32), (1, -3e4), (9, 3e4), (9, -3e4), (1, 0.0), (9, 0.0), (1, 1e-35)] {
                let mut y = vec![f32::NAN; n];
                project(&pool, &mut y, &[&packed], &vec![x; n * BLOCK], &mut PackedScratch::default());
                let expected = if x.abs() < 1e-30 { 0.0 } else { weight * x * 32.0 };
                assert!(
                    y.iter().all(|y| (y - expected).abs() <= expected.abs() * 1e-6),
                    "{kind:?} {x}: {y:?}"
                );
            }
        }
    }
}

#[test]
#[should_panic(expected = "share their input")]
fn a_stack_of_different_inputs_is_refused() {
    let pool = Pool::new(1);
    let (a, b) = (Packed::from_f32(&pool, &[1.0; 4], [2, 2]), Packed::from_f32(&pool, &[1.0; 3], [1, 3]));
    project(&pool, &mut [0.0; 3], &[&a, &b], &[1.0; 2], &mut PackedScratch::default());
}

#[test]
fn known_blocks_dequantize_as_ggml_documents() {
    let check = |kind: WeightKind, block: &[u8], expected: &[(usize, f32)]| {
        let mut w = [0.0; BLOCK];
        kind.dequantize(block, &mut w);
        expected.iter().for_each(|&(k, value)| assert_eq!(w[k], value, "{kind:?} weight {k}"));
    };
    // 0x3800 is 0.5, 0xc000 is -2 in f16; byte i holds weight i (low nibble) and i + 16 (high).
    let nibbles: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    check(
        WeightKind::Q4_0,
        &[&[0x00, 0x38], &nibbles[..]].concat(),
        &[(0, -4.0), (15, 3.5), (16, 3.5), (31, -4.0)],
    );
    check(
        WeightKind::Q4_1,
        &[&[0x00, 0x38, 0x00, 0xc0], &nibbles[..]].concat(),
        &[(0, -2.0), (3, -0.5), (16, 5.5)],
    );
    let bytes: Vec<u8> = (0..32u8).map(|i| 240u8.wrapping_add(i)).collect();
    check(WeightKind::Q8_0, &[&[0x00, 0x38], &bytes[..]].concat(), &[(0, -8.0), (15, -0.5)]);
}

/// `fixtures/ggml_blocks.py`: random blocks, and what the `gguf` package makes of them, to the bit.
#[test]
fn blocks_widen_as_ggml_widens_them() {
    let golden = include_str!("../../../../fixtures/golden/ggml_blocks.json");
    let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
    let hex = |value: &serde_json::Value| -> Vec<u8> {
        let text = value.as_str().unwrap();
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    };
    for kind in WeightKind::ALL.into_iter().filter(|kind| kind.is_quantized()) {
        let (blocks, expected) = (hex(&golden[kind.name()]["blocks"]), hex(&golden[kind.name()]["weights"]));
        let mut w = vec![0.0; 2 * kind.block_elems()];
        kind.dequantize(&blocks, &mut w);
        for (i, (w, bytes)) in w.iter().zip(expected.chunks_exact(4)).enumerate() {
            let expected = f32::from_le_bytes(bytes.try_into().unwrap());
            assert_eq!(*w, expected, "{kind:?} weight {i}");
        }
    }
}

/// A stored weight is at most half a step away, give or take the rounding of the scales; what is representable comes
/// back as it was.
#[test]
fn quantizing_rounds_to_the_grid() {
    for (kind, worst, rms) in [
        (WeightKind::Q8_0, 0.005, 0.0025),
        (WeightKind::Q4_0, 0.13, 0.04),
        (WeightKind::Q4_1, 0.07, 0.04),
        (WeightKind::Q5_0, 0.07, 0.02),
        (WeightKind::Q5_1, 0.035, 0.02),
        (WeightKind::Q4_K, 0.13, 0.04),
        (WeightKind::Q5_K, 0.07, 0.02),
        (WeightKind::Q6_K, 0.04, 0.01),
    ] {
        let n = 8 * kind.block_elems();
        let w = numbers(11, n);
        let mut again = vec![0.0; n];
        kind.dequantize(&kind.quantize(&w), &mut again);
        let errors = || w.iter().zip(&again).map(|(w, again)| (w - again).abs());
        let found_rms = (errors().map(|e| e * e).sum::<f32>() / n as f32).sqrt();
        let found_worst = errors().fold(0.0, f32::max);
        assert!(found_worst < worst && found_rms < rms, "{kind:?}: worst {found_worst}, rms {found_rms}");
        for edge in [0.0, 0.25, -3.0] {
            kind.dequantize(&kind.quantize(&vec![edge; n]), &mut again);
            assert!(
                again.iter().all(|w| (w - edge).abs() <= 2e-3 * edge.abs()),
                "{kind:?} {edge}: {again:?}"
            );
        }
    }
}
