//! Matrix product: `c_mn = a_mk · b_kn`.

use crate::Pool;
use half::bf16;

/// Elements of an operand.
#[derive(Clone, Copy, Debug)]
pub enum Elems<'a> {
    /// 4-byte floats.
    F32(&'a [f32]),
    /// 2-byte floats, widened exactly.
    Bf16(&'a [bf16]),
}

impl<'a> From<&'a [f32]> for Elems<'a> {
    fn from(x: &'a [f32]) -> Self {
        Elems::F32(x)
    }
}

impl<'a> From<&'a [bf16]> for Elems<'a> {
    fn from(x: &'a [bf16]) -> Self {
        Elems::Bf16(x)
    }
}

impl Elems<'_> {
    fn len(&self) -> usize {
        match self {
            Elems::F32(x) => x.len(),
            Elems::Bf16(x) => x.len(),
        }
    }
}

/// An operand: a row-major matrix, perhaps to be read transposed.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    /// The elements; row r starts at `r · stride`.
    pub data: Elems<'a>,
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
    pub cols: usize,
    /// Elements from one stored row to the next, at least `cols`.
    pub stride: usize,
    /// The operand is the transpose of what is stored.
    pub transposed: bool,
}

impl<'a> Mat<'a> {
    /// A dense row-major matrix.
    pub fn new(data: impl Into<Elems<'a>>, rows: usize, cols: usize) -> Self {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows are `stride` elements apart: a block of columns of a wider one.
    pub fn with_stride(data: impl Into<Elems<'a>>, rows: usize, cols: usize, stride: usize) -> Self {
        let data = data.into();
        assert!(stride >= cols, "stride {stride} is shorter than a row of {cols}");
        let needed = if rows == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(data.len() >= needed, "{rows}x{cols} matrix of stride {stride} in {} elements", data.len());
        Self { data, rows, cols, stride, transposed: false }
    }

    /// The transpose; nothing moves.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as an operand.
    pub fn dims(&self) -> [usize; 2] {
        if self.transposed { [self.cols, self.rows] } else { [self.rows, self.cols] }
    }

    fn at(&self, row: usize, col: usize) -> f32 {
        let i = if self.transposed { col * self.stride + row } else { row * self.stride + col };
        match self.data {
            Elems::F32(x) => x[i],
            Elems::Bf16(x) => x[i].to_f32(),
        }
    }
}

/// How products are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// Operands rounded to bf16, products summed in f32.
    Bf16,
}

/// What happens to the values `c` had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// c = a·b
    Overwrite,
    /// c += a·b
    Add,
}

/// `c_mn = a_mk · b_kn` or `c_mn += a_mk · b_kn`.
///
/// # Panics
/// If the dimensions do not fit each other.
pub fn matmul(pool: &Pool, c_mn: &mut [f32], a: Mat, b: Mat, precision: Precision, accumulate: Accumulate) {
    let ([m, k], [k_b, n]) = (a.dims(), b.dims());
    assert_eq!(k, k_b, "a has {k} columns, b has {k_b} rows");
    assert_eq!(c_mn.len(), m * n, "c has {} elements, not {m}x{n}", c_mn.len());
    let _ = pool;
    let round = |x: f32| if precision == Precision::Bf16 { bf16::from_f32(x).to_f32() } else { x };
    for i in 0..m {
        for j in 0..n {
            let sum: f32 = (0..k).map(|l| round(a.at(i, l)) * round(b.at(l, j))).sum();
            let c = &mut c_mn[i * n + j];
            *c = if accumulate == Accumulate::Add { *c + sum } else { sum };
        }
    }
}
