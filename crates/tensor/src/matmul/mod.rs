//! Matrix product: `c_mn = a_mk · b_kn`, each operand f32 or bf16, each perhaps read transposed.
//!
//! # Formula and numerics
//! k is cut into blocks of [`DEPTH_BLOCK`]. The sum of a block is one chain of fused multiply-adds in the order of k, from
//! zero; the sums of the blocks are added to c one after the other. That order is all that decides the bits of an element:
//! not the number of threads, not the number of rows, not the position in a tile, and on AVX2 and AVX-512 not the
//! instruction set (the portable levels round products and sums separately).
//!
//! [`Precision::Bf16`] rounds the operands to bf16 (to nearest even) while packing. Where `vdpbf16ps` is the faster way
//! ([`crate::cpu::Features::bf16_fast`]) it forms the products, elsewhere f32 FMA does. Products of bf16 are exact in f32 and the order of the sum is the same, so
//! both give the same bits as long as nothing is denormal (`vdpbf16ps` takes denormals as zero).
//!
//! # How it is fast
//! After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): a tile of c stays in
//! registers ([`tile`]) while packed panels stream by ([`pack`]): a block of a from L2, a panel of b from L1.
//! What is used by many tasks is packed once, together; what only one task uses is packed by it, into memory that its
//! core has near:
//! - many rows: b is packed first (one run of the pool), then tasks of about 144 rows pack their own blocks of a. What a
//!   core reads once per task comes from L3 or memory, ten times further than L2: while the tiles of a panel of b are
//!   computed, the lines of the next are asked for, a few with each word of depth, and so are those of a when it is packed;
//! - few rows: a is packed first, then tasks of some columns pack panels of b as they use them, so that a product with
//!   one row reads the weights once and writes them nowhere but to L1.
//!
//! On 128 cores: two runs per 16 Mi elements of b, the tasks cut smaller until there are some for every thread; threads
//! write tiles whose columns begin at multiples of a cache line. The next thing to hurt there is memory on two sockets
//! (b is packed once, on all nodes' threads, and read by all).

use std::cell::RefCell;

use crate::cpu::{Level, features};
use crate::pool::Disjoint;
use crate::{Buf, Pool};
pub use changed::changed;
use half::bf16;
pub use narrow::{narrow, narrow_sum};
use pack::{Format, Source};
use tasks::Job;

mod changed;
mod narrow;
mod pack;
mod tasks;
#[cfg(test)]
mod tests;
mod tile;

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

    /// The element at (row, col) of the operand, widened.
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
    /// Operands rounded to bf16, products summed in f32. Up to twice as fast as F32 where `vdpbf16ps` pays, as fast
    /// elsewhere.
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

/// Products are summed in blocks of this many, see the [module](self). Part of the numerics: the same everywhere.
/// 256 · 16 columns · 4 B = 16 KiB of b, half of a 32 KiB L1, beside 6 KiB of a.
pub const DEPTH_BLOCK: usize = 256;

/// Most rows of a task: 144 · 256 · 4 B = 147 KB of packed a, a fraction of any L2 (Zen 3: 512 KiB).
const ROWS_BLOCK: usize = 144;

/// Most of k that a task packs of its own operand at once: 144 · 1024 · 4 B = 590 KB of an L2 of 1 to 2 MiB.
const OWN_DEPTH_MAX: usize = 4 * DEPTH_BLOCK;

/// Most words of an operand packed at once: 16 MiB, half of the L3 of a Zen 3 complex.
const SHARED_WORDS_MAX: usize = 4 << 20;

/// Most of k packed at once, so that the columns packed at once are not too few.
const SHARED_DEPTH_MAX: usize = 16 * DEPTH_BLOCK;

/// Tasks wanted per thread: enough that a thread which loses its core leaves little to wait for.
const TASKS_PER_THREAD: usize = 4;

/// The plain version: what every fast version is checked against, to the bit. `fused` is false for the portable levels.
pub fn reference(
    c_mn: &mut [f32],
    a: Mat,
    b: Mat,
    precision: Precision,
    accumulate: Accumulate,
    fused: bool,
) {
    let ([m, k], [_, n]) = (a.dims(), b.dims());
    let round = |x: f32| if precision == Precision::Bf16 { bf16::from_f32(x).to_f32() } else { x };
    let mul_add = |x: f32, y: f32, z: f32| if fused { x.mul_add(y, z) } else { x * y + z };
    for i in 0..m {
        for j in 0..n {
            let c = &mut c_mn[i * n + j];
            for start in (0..k.max(1)).step_by(DEPTH_BLOCK) {
                let block = start..k.min(start + DEPTH_BLOCK);
                let sum = block.fold(0.0, |sum, l| mul_add(round(a.at(i, l)), round(b.at(l, j)), sum));
                *c = if start == 0 && accumulate == Accumulate::Overwrite { sum } else { *c + sum };
            }
        }
    }
}

/// `c_mn = a_mk · b_kn` or `c_mn += a_mk · b_kn`. The forward of a linear map with weights `w_oi` is
/// `matmul(y_no, x_ni, w_oi.t())`, its backward `matmul(dx_ni, dy_no, w_oi)` and `matmul(dw_oi, dy_no.t(), x_ni)`.
///
/// Memory for packing is kept by the threads: at most 16 MiB by the caller and some 600 KB by each, allocated once.
///
/// # Panics
/// If the dimensions do not fit each other.
pub fn matmul(pool: &Pool, c_mn: &mut [f32], a: Mat, b: Mat, precision: Precision, accumulate: Accumulate) {
    let ([m, k], [k_b, n]) = (a.dims(), b.dims());
    assert_eq!(k, k_b, "a has {k} columns, b has {k_b} rows");
    assert_eq!(c_mn.len(), m * n, "c has {} elements, not {m}x{n}", c_mn.len());
    if c_mn.is_empty() {
        return;
    }
    if k == 0 {
        if accumulate == Accumulate::Overwrite {
            c_mn.fill(0.0);
        }
        return;
    }
    multiply(pool, c_mn, [a, b], format(pool.level(), precision), accumulate);
}

/// [`matmul()`] of operands that are not empty, packed as told.
fn multiply(pool: &Pool, c_mn: &mut [f32], [a, b]: [Mat; 2], format: Format, accumulate: Accumulate) {
    let [m, k] = a.dims();
    let (a, b) = (Source::rows_of(a), Source::cols_of(b));
    let c = Disjoint::new(c_mn);
    let job = Job { level: pool.level(), a, b, c, k, format, accumulate };
    SHARED.with_borrow_mut(|shared| {
        if m <= ROWS_BLOCK { job.run_few_rows(pool, shared) } else { job.run_many_rows(pool, shared) }
    });
}

/// How operands are packed for `precision`.
fn format(level: Level, precision: Precision) -> Format {
    match (precision, level) {
        (Precision::F32, _) => Format::F32,
        (Precision::Bf16, Level::Avx512) if features().bf16_fast => Format::Pairs,
        // Slow, but it runs the code that `vdpbf16ps` will run.
        (Precision::Bf16, Level::Scalar16) => Format::Pairs,
        (Precision::Bf16, _) => Format::Rounded,
    }
}

thread_local! {
/// The packed operand that all tasks of a product read; kept by the thread that calls [`matmul()`].
static SHARED: RefCell<Buf<f32>> = RefCell::new(Buf::default());}
