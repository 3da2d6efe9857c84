//! Against the plain version, to the bit.

use super::*;

/// A small deterministic generator: tests need no better one.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as f32 / (1u64 << 30) as f32) - 1.0).collect()
    }
}

/// An operand in memory, in one of the four ways it can lie there.
struct Operand {
    values: Vec<f32>,
    rounded: Vec<bf16>,
    dims: [usize; 2],
    stride: usize,
    is_bf16: bool,
    transposed: bool,
}

impl Operand {
    fn random(random: &mut Random, dims: [usize; 2]) -> Self {
        let (is_bf16, transposed) = (random.below(3) == 0, random.below(2) == 0);
        let [rows, cols] = if transposed { [dims[1], dims[0]] } else { dims };
        let stride = cols + random.below(2) * random.below(20);
        let values = random.values(rows * stride);
        let rounded = values.iter().map(|&x| bf16::from_f32(x)).collect();
        Self { values, rounded, dims: [rows, cols], stride, is_bf16, transposed }
    }

    fn mat(&self) -> Mat<'_> {
        let data = if self.is_bf16 { Elems::Bf16(&self.rounded) } else { Elems::F32(&self.values) };
        let mat = Mat::with_stride(data, self.dims[0], self.dims[1], self.stride);
        if self.transposed { mat.t() } else { mat }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// One random product at every level, with some number of threads, must equal the plain version.
fn check(random: &mut Random, [m, n, k]: [usize; 3]) {
    let (a, b) = (Operand::random(random, [m, k]), Operand::random(random, [k, n]));
    let precision = [Precision::F32, Precision::Bf16][random.below(2)];
    let accumulate = [Accumulate::Overwrite, Accumulate::Add][random.below(2)];
    let start = random.values(m * n);
    for level in Level::all_available() {
        let pool = Pool::with_level(1 + random.below(3), level);
        let mut expected = start.clone();
        let fused = level >= Level::Avx2;
        reference(&mut expected, a.mat(), b.mat(), precision, accumulate, fused);
        let mut got = start.clone();
        matmul(&pool, &mut got, a.mat(), b.mat(), precision, accumulate);
        let case = format!(
            "{level:?} {m}x{n}x{k} {precision:?} {accumulate:?} a: bf16 {} t {} b: bf16 {} t {}",
            a.is_bf16, a.transposed, b.is_bf16, b.transposed
        );
        compare(&got, &expected, n, &case);
        // `vdpbf16ps` also where FMA is faster.
        if precision == Precision::Bf16 && level == Level::Avx512 && features().bf16 && m * n * k > 0 {
            let mut got = start.clone();
            multiply(&pool, &mut got, [a.mat(), b.mat()], Format::Pairs, accumulate);
            compare(&got, &expected, n, &format!("vdpbf16ps {case}"));
        }
    }
}

#[track_caller]
fn compare(got: &[f32], expected: &[f32], n: usize, case: &str) {
    if let Some(i) = (0..got.len()).find(|&i| got[i].to_bits() != expected[i].to_bits()) {
        panic!("{case}: c[{}][{}] = {}, not {}", i / n, i % n, got[i], expected[i]);
    }
}

#[test]
fn small_shapes_equal_the_plain_version() {
    let mut random = Random(1);
    let edges = [0, 1, 2, 3, 5, 7, 8, 13, 14, 15, 16, 17, 31, 33];
    for _ in 0..600 {
        let dims = std::array::from_fn(|_| edges[random.below(edges.len())]);
        check(&mut random, dims);
    }
}

#[test]
fn larger_shapes_equal_the_plain_version() {
    let mut random = Random(2);
    // Around the blocks of rows (144), of depths (256) and the groups of columns packed together (256, 512).
    let (rows, cols, depths) =
        ([1, 6, 143, 144, 145, 291], [1, 48, 255, 257, 520], [1, 100, 255, 256, 257, 515]);
    for _ in 0..25 {
        let dims = [rows[random.below(6)], cols[random.below(5)], depths[random.below(6)]];
        check(&mut random, dims);
    }
}

#[test]
fn depths_beyond_what_is_packed_at_once() {
    let mut random = Random(3);
    for dims in [[3, 5, SHARED_DEPTH_MAX + 3], [150, 9, SHARED_DEPTH_MAX + 259]] {
        check(&mut random, dims);
    }
}

/// More columns than are packed at once; too much for the plain version, so a column is compared with a product of its
/// own.
#[test]
fn columns_beyond_what_is_packed_at_once() {
    let mut random = Random(4);
    let (m, n, k) = (145, 1100, SHARED_DEPTH_MAX);
    assert!(n * k > SHARED_WORDS_MAX);
    let (a, b) = (random.values(m * k), random.values(n * k));
    let pool = Pool::new(2);
    let mut c = vec![0.0; m * n];
    matmul(
        &pool,
        &mut c,
        Mat::new(&a[..], m, k),
        Mat::new(&b[..], n, k).t(),
        Precision::F32,
        Accumulate::Overwrite,
    );
    for col in [0, 1, 511, 1023, 1024, 1025, 1099] {
        let mut expected = vec![0.0; m];
        let b_col = Mat::new(&b[col * k..][..k], 1, k).t();
        matmul(&pool, &mut expected, Mat::new(&a[..], m, k), b_col, Precision::F32, Accumulate::Overwrite);
        let got: Vec<f32> = (0..m).map(|row| c[row * n + col]).collect();
        assert_eq!(bits(&got), bits(&expected), "column {col}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let mut random = Random(5);
    for [m, n, k] in [[300, 257, 600], [7, 500, 300], [145, 33, 1000]] {
        let (a, b) = (random.values(m * k), random.values(k * n));
        for precision in [Precision::F32, Precision::Bf16] {
            let run = |n_threads| {
                let mut c = vec![0.0; m * n];
                let (a, b) = (Mat::new(&a[..], m, k), Mat::new(&b[..], k, n));
                matmul(&Pool::new(n_threads), &mut c, a, b, precision, Accumulate::Overwrite);
                bits(&c)
            };
            let one = run(1);
            for n_threads in [2, 3, 5] {
                assert_eq!(run(n_threads), one, "{m}x{n}x{k}, {n_threads} threads");
            }
        }
    }
}

/// What lets the engine put any requests into one batch: a row's result does not know how many rows there are.
#[test]
fn a_row_does_not_depend_on_the_number_of_rows() {
    let mut random = Random(6);
    let (m_max, n, k) = (300, 70, 530);
    let (a, b) = (random.values(m_max * k), random.values(n * k));
    let pool = Pool::new(2);
    let run = |m: usize| {
        let mut c = vec![0.0; m * n];
        let (a, b) = (Mat::new(&a[..m * k], m, k), Mat::new(&b[..], n, k).t());
        matmul(&pool, &mut c, a, b, Precision::F32, Accumulate::Overwrite);
        bits(&c)
    };
    let all = run(m_max);
    for m in [1, 2, 3, 5, 6, 7, 8, 13, 100, 144, 145, 299] {
        assert_eq!(run(m), all[..m * n], "{m} rows");
    }
}

#[test]
fn infinities_and_nans_stay_in_their_row() {
    let (m, n, k) = (9, 19, 40);
    let mut random = Random(7);
    let (mut a, b) = (random.values(m * k), random.values(k * n));
    a[4 * k + 3] = f32::NAN;
    a[5 * k + 3] = f32::INFINITY;
    let mut c = vec![f32::NAN; m * n];
    let (a, b) = (Mat::new(&a[..], m, k), Mat::new(&b[..], k, n));
    matmul(&Pool::new(1), &mut c, a, b, Precision::F32, Accumulate::Overwrite);
    for (row, c) in c.chunks(n).enumerate() {
        assert_eq!(c.iter().all(|x| x.is_finite()), row != 4 && row != 5, "row {row}");
    }
}

#[test]
#[should_panic(expected = "a has 3 columns, b has 4 rows")]
fn dimensions_must_fit() {
    let x = [0.0; 12];
    let (a, b) = (Mat::new(&x[..], 2, 3), Mat::new(&x[..], 4, 3));
    matmul(&Pool::new(1), &mut [0.0; 6], a, b, Precision::F32, Accumulate::Overwrite);
}
