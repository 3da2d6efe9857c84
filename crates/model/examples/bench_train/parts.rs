//! Where the time of a step goes: every op of it alone, at the shapes of the model, as often as a step has it. Beside the time
//! stands what the op computes and the least it reads and writes, and the share of the limit which of both comes first.
//!
//! The last column is the speed of all threads over that of one, each thread's share of it: what is missing to 100 % is
//! waiting for each other, and memory that they share.

use std::time::Instant;

use model::Config;
use tensor::adamw::{AdamWState, adamw, sum_squares};
use tensor::attention::{Attended, AttentionDims, Mask, attention_backward, attention_forward};
use tensor::cross_entropy::cross_entropy_forward_backward;
use tensor::embedding::{embedding_backward, embedding_forward};
use tensor::gelu::{gelu_backward, gelu_into};
use tensor::layernorm::{LayerNorm, layernorm_backward, layernorm_forward, residual_layernorm_forward};
use tensor::limits::Limits;
use tensor::matmul::{changed, narrow, narrow_sum};
use tensor::rmsnorm::{Normed, Residual, residual_rmsnorm_forward, rmsnorm_again, rmsnorm_backward};
use tensor::rope::{RopeDims, RopeTable, Turn, rope};
use tensor::rows::{add_bias, bias_backward};
use tensor::swiglu::{swiglu_backward, swiglu_forward};
use tensor::{Accumulate, Buf, Mat, Pool, Precision, matmul};

/// Each op repeats for this long, and three times at least; the best counts.
const MEASURE_S: f64 = 0.15;

/// Rows that have logits at a time, as in the model.
const HEAD_ROWS: usize = 512;

/// Bytes of a number.
const F32: f64 = 4.0;

/// A step to be looked at.
pub(crate) struct Parts<'a> {
    pub(crate) config: &'a Config,
    /// Rank of the changes, if they alone are trained.
    pub(crate) rank: Option<usize>,
    pub(crate) rows: usize,
    pub(crate) positions: usize,
    pub(crate) precision: Precision,
}

/// What one call of an op costs at least.
struct Cost {
    flops: f64,
    bytes: f64,
}

/// All threads, one, and the lines so far.
struct Table {
    pools: [Pool; 2],
    flops_per_s: f64,
    bytes_per_s: f64,
    total_s: f64,
}

impl Table {
    /// Measures `op`, of which a step has `n`.
    fn line(&mut self, name: &str, n: usize, cost: Cost, mut op: impl FnMut(&Pool)) {
        if n == 0 {
            return;
        }
        let [s, alone_s] = [0, 1].map(|i| best_s(|| op(&self.pools[i])));
        let limit_s = (cost.flops / self.flops_per_s).max(cost.bytes / self.bytes_per_s);
        let n_f = n as f64;
        self.total_s += n_f * s;
        println!(
            "| {name} | {n} | {:.1} | {:.2} | {:.0} | {:.0} % | {:.0} % |",
            1e3 * n_f * s,
            n_f * cost.flops / 1e9,
            n_f * cost.bytes / 1e6,
            100.0 * limit_s / s,
            100.0 * alone_s / s / self.pools[0].n_threads() as f64
        );
    }
}

fn best_s(mut op: impl FnMut()) -> f64 {
    let (started, mut best, mut n) = (Instant::now(), f64::INFINITY, 0);
    while n < 3 || started.elapsed().as_secs_f64() < MEASURE_S {
        let at = Instant::now();
        op();
        best = best.min(at.elapsed().as_secs_f64());
        n += 1;
    }
    best
}

/// Numbers between -1 and 1.
fn values(n: usize) -> Buf<f32> {
    let mut values = Buf::zeroed(n);
    for (i, x) in (0u32..).zip(values.iter_mut()) {
        *x = (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
    }
    values
}

impl Parts<'_> {
    /// Prints the table; gives the seconds of all parts together.
    pub(crate) fn print(&self, limits: &Limits) -> f64 {
        let flops_per_s = match self.precision {
            Precision::F32 => limits.f32_per_s,
            Precision::Bf16 => limits.bf16_per_s,
        };
        let pools = [Pool::new(limits.n_threads), Pool::new(1)];
        let mut table = Table { pools, flops_per_s, bytes_per_s: limits.memory_bytes_per_s, total_s: 0.0 };
        println!("| part | in a step | ms | GFLOP | MB | of the limit | each thread's, of one's alone |");
        println!("|---|---|---|---|---|---|---|");
        self.embedding(&mut table);
        self.norms(&mut table);
        self.attention(&mut table);
        self.activation(&mut table);
        for (name, [i, o], n_changes) in self.sites() {
            self.site(&mut table, (name, self.config.n_layers), [self.n(), i, o]);
            self.changes(&mut table, name, [i, o], n_changes);
        }
        self.head(&mut table);
        self.optimizer(&mut table);
        table.total_s
    }

    fn n(&self) -> usize {
        self.rows * self.positions
    }

    fn is_gated(&self) -> bool {
        self.config.block().activation.is_gated()
    }

    /// Inputs and outputs of the matrices of a layer, and how many changes each has with LoRA.
    fn sites(&self) -> [(&'static str, [usize; 2], usize); 4] {
        let Config { width, n_heads, n_kv_heads, head_width, ff_width, .. } = *self.config;
        let (up, n_up) = if self.is_gated() { (2 * ff_width, 2) } else { (ff_width, 1) };
        [
            ("q, k, v", [width, (n_heads + 2 * n_kv_heads) * head_width], 3),
            ("output", [n_heads * head_width, width], 1),
            ("up", [width, up], n_up),
            ("down", [ff_width, width], 1),
        ]
    }

    fn embedding(&self, table: &mut Table) {
        let (n, c, v) = (self.n(), self.config.width, self.config.vocab);
        let (mut x_nc, mut weights) = (values(n * c), values(v * c));
        let tokens: Vec<u32> = (0..n).map(|i| (i * 7919 % v) as u32).collect();
        let bytes = F32 * (n * c) as f64;
        table.line("embedding", 1, Cost { flops: 0.0, bytes: 2.0 * bytes }, |pool| {
            embedding_forward(pool, &mut x_nc, &tokens, &weights, c);
        });
        let n_backward = usize::from(self.rank.is_none());
        table.line("embedding, backward", n_backward, Cost { flops: 0.0, bytes: 3.0 * bytes }, |pool| {
            embedding_backward(pool, &mut weights, &x_nc, &tokens, c);
        });
    }

    fn norms(&self, table: &mut Table) {
        let (n, c) = (self.n(), self.config.width);
        let [x_nc, delta_nc] = [(); 2].map(|()| values(n * c));
        let [mut sum_nc, mut y_nc] = [(); 2].map(|()| values(n * c));
        let (w_c, b_c, mut dw_c, mut db_c) = (values(c), values(c), values(c), values(c));
        let (mut rstd_n, mut scratch) = (values(n), Buf::default());
        let n_norms = 2 * self.config.n_layers;
        let of = |passes: f64| Cost { flops: 0.0, bytes: passes * F32 * (n * c) as f64 };
        let layer_norm = self.config.block().layer_norm;
        let norm = LayerNorm { w_c: &w_c, b_c: &b_c, eps: 1e-5 };
        table.line("sum and norm", n_norms + 1, of(4.0), |pool| {
            let (out, input) =
                ([&mut sum_nc[..], &mut y_nc[..]], Residual { x_nc: &x_nc, delta_nc: &delta_nc });
            match layer_norm {
                true => residual_layernorm_forward(pool, out, input, norm),
                false => residual_rmsnorm_forward(pool, out, &mut rstd_n, input, &w_c, 1e-5),
            }
        });
        let normed = Normed { x_nc: &x_nc, rstd_n: &rstd_n, w_c: &w_c };
        table.line("norm again", n_norms, of(2.0), |pool| match layer_norm {
            true => layernorm_forward(pool, &mut y_nc, &x_nc, norm),
            false => rmsnorm_again(pool, &mut y_nc, normed),
        });
        table.line("norm, backward", n_norms + 1, of(4.0), |pool| match layer_norm {
            true => {
                let dnorm = [&mut dw_c[..], &mut db_c[..]];
                layernorm_backward(pool, &mut sum_nc, dnorm, (&delta_nc, &x_nc), norm, &mut scratch);
            }
            false => rmsnorm_backward(pool, &mut sum_nc, &mut dw_c, &delta_nc, normed, &mut scratch),
        });
    }

    fn attention(&self, table: &mut Table) {
        let Config { n_heads, n_kv_heads, head_width, n_layers, .. } = *self.config;
        let scale = self.config.score_scale();
        let (n_rows, n_positions) = (self.rows, self.positions);
        let dims = AttentionDims { n_rows, n_positions, n_heads, n_kv_heads, head_width, scale };
        let n = self.n();
        let (mut qkv, mut dqkv) = (values(n * dims.qkv_width()), values(n * dims.qkv_width()));
        let (mut out_nhd, dout_nhd) = (values(n * dims.out_width()), values(n * dims.out_width()));
        let mut lse_bht = values(n * n_heads);
        // Of two products, causal: 2 · 2 · t²/2 · d.
        let flops = 2.0 * (n * n_positions * dims.out_width()) as f64;
        let rows = |width: usize| F32 * (n * width) as f64;
        let (qkv_bytes, out_bytes) = (rows(dims.qkv_width()), rows(dims.out_width()));
        if self.config.block().rotary {
            let angles = RopeTable::new(n_positions, head_width, 1e4);
            let n_rope_heads = n_heads + n_kv_heads;
            let rope_dims = RopeDims { n_positions, n_heads: n_rope_heads, stride: dims.qkv_width() };
            let cost = Cost { flops: 0.0, bytes: 2.0 * rows(n_rope_heads * head_width) };
            table.line("rope", 2 * n_layers, cost, |pool| {
                rope(pool, &mut qkv, rope_dims, &angles, Turn::Forward);
            });
        }
        let cost = Cost { flops, bytes: qkv_bytes + out_bytes };
        table.line("attention", n_layers, cost, |pool| {
            attention_forward(pool, (dims, Mask::default()), &mut out_nhd, &mut lse_bht, &qkv);
        });
        let attended = Attended { qkv: &qkv, out_nhd: &out_nhd, lse_bht: &lse_bht };
        let cost = Cost { flops: 2.5 * flops, bytes: 2.0 * (qkv_bytes + out_bytes) };
        table.line("attention, backward", n_layers, cost, |pool| {
            attention_backward(pool, (dims, Mask::default()), &mut dqkv, attended, &dout_nhd);
        });
    }

    fn activation(&self, table: &mut Table) {
        let (n, f, is_gated) = (self.n(), self.config.ff_width, self.is_gated());
        let n_up = if is_gated { 2.0 } else { 1.0 };
        let (mut up, mut act_nf) = (values(n_up as usize * n * f), values(n * f));
        let of = |passes: f64| Cost { flops: 0.0, bytes: passes * F32 * (n * f) as f64 };
        let n_layers = self.config.n_layers;
        table.line("activation", n_layers, of(n_up + 1.0), |pool| match is_gated {
            true => swiglu_forward(pool, &mut act_nf, &up, f),
            false => gelu_into(pool, &mut act_nf, &up),
        });
        // In place; begun anew from its own gradient each time, which is a number like any other.
        table.line("activation, backward", n_layers, of(2.0 * n_up + 2.0), |pool| match is_gated {
            true => swiglu_backward(pool, &mut up, &mut act_nf, f),
            false => gelu_backward(pool, &mut up, &mut act_nf),
        });
    }

    /// The three products of a linear map, or two where only its change is trained, and its bias.
    fn site(&self, table: &mut Table, (name, n_times): (&str, usize), [n, i, o]: [usize; 3]) {
        let (mut x_ni, mut w_oi, mut y_no) = (values(n * i), values(o * i), values(n * o));
        let (flops, bytes) = (2.0 * (n * i * o) as f64, F32 * (n * i + o * i + n * o) as f64);
        let cost = || Cost { flops, bytes };
        let (precision, overwrite) = (self.precision, Accumulate::Overwrite);
        table.line(&format!("{name}: x·Wᵀ"), n_times, cost(), |pool| {
            let (x, w) = (Mat::new(&x_ni[..], n, i), Mat::new(&w_oi[..], o, i));
            matmul(pool, &mut y_no, x, w.t(), precision, overwrite);
        });
        table.line(&format!("{name}: dy·W"), n_times, cost(), |pool| {
            let (dy, w) = (Mat::new(&y_no[..], n, o), Mat::new(&w_oi[..], o, i));
            matmul(pool, &mut x_ni, dy, w, precision, overwrite);
        });
        if self.rank.is_some() {
            return;
        }
        // Chunks of the head add to the gradient of those before.
        let accumulate = if n < self.n() { Accumulate::Add } else { overwrite };
        let added = if n < self.n() { F32 * (o * i) as f64 } else { 0.0 };
        table.line(&format!("{name}: dyᵀ·x"), n_times, Cost { flops, bytes: bytes + added }, |pool| {
            let (dy, x) = (Mat::new(&y_no[..], n, o), Mat::new(&x_ni[..], n, i));
            matmul(pool, &mut w_oi, dy.t(), x, precision, accumulate);
        });
        if self.config.block().layer_norm && n == self.n() {
            let (mut b_o, mut scratch, bytes) = (values(o), Buf::default(), F32 * (n * o) as f64);
            let line = |times: f64| Cost { flops: 0.0, bytes: times * bytes };
            table.line(&format!("{name}: bias"), n_times, line(2.0), |pool| add_bias(pool, &mut y_no, &b_o));
            table.line(&format!("{name}: bias, backward"), n_times, line(1.0), |pool| {
                bias_backward(pool, &mut b_o, &y_no, &mut scratch);
            });
        }
    }

    /// W + s·B·A, forward and backward, and the products of rank r.
    fn changes(&self, table: &mut Table, name: &str, [i, o]: [usize; 2], n_changes: usize) {
        let Some(r) = self.rank else { return };
        let (n, n_layers, ranks) = (self.n(), self.config.n_layers, r * n_changes);
        let (w_oi, mut changed_oi) = (values(o * i), values(o * i));
        let (x_ni, dy_no, mut low_nr) = (values(n * i), values(n * o), values(n * ranks));
        let (mut a_ri, mut b_or) = (values(ranks * i), values(o * r));
        // The parts of a stack have changes of their own, and o outputs together.
        let cost = Cost { flops: 2.0 * (o * i * r) as f64, bytes: 2.0 * F32 * (o * i) as f64 };
        table.line(&format!("{name}: W + s·B·A"), 2 * n_layers, cost, |pool| {
            let (b, a) = (Mat::new(&b_or[..], o, r), Mat::new(&a_ri[..r * i], r, i));
            changed(pool, &mut changed_oi, &w_oi, [b, a]);
        });
        let of = |width: usize, r: usize| Cost {
            flops: 2.0 * (n * width * r) as f64,
            bytes: F32 * (n * width) as f64,
        };
        table.line(&format!("{name}: x·Aᵀ"), n_layers, of(i, ranks), |pool| {
            let (x, a) = (Mat::new(&x_ni[..], n, i), Mat::new(&a_ri[..], ranks, i));
            narrow(pool, (&mut low_nr, ranks), x, a.t(), 1.0);
        });
        table.line(&format!("{name}: dA"), n_layers, of(i, ranks), |pool| {
            let (low, x) = (Mat::new(&low_nr[..], n, ranks), Mat::new(&x_ni[..], n, i));
            narrow_sum(pool, (&mut a_ri, [i, 1]), low, x);
        });
        table.line(&format!("{name}: dy·B"), n_layers, of(o, r), |pool| {
            let (dy, b) = (Mat::new(&dy_no[..], n, o), Mat::new(&b_or[..], o, r));
            narrow(pool, (&mut low_nr[..n * r], r), dy, b, 1.0);
        });
        table.line(&format!("{name}: dB"), n_layers, of(o, r), |pool| {
            let (low, dy) = (Mat::new(&low_nr[..n * r], n, r), Mat::new(&dy_no[..], n, o));
            narrow_sum(pool, (&mut b_or, [1, r]), low, dy);
        });
    }

    fn head(&self, table: &mut Table) {
        let (rows, v) = (HEAD_ROWS.min(self.n()), self.config.vocab);
        let n_chunks = self.n().div_ceil(rows);
        self.site(table, ("head", n_chunks), [rows, self.config.width, v]);
        let (mut logits_nv, mut losses_n) = (values(rows * v), vec![0.0; rows]);
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % v) as u32).collect();
        let cost = Cost { flops: 0.0, bytes: 2.0 * F32 * (rows * v) as f64 };
        table.line("head: softmax and loss", n_chunks, cost, |pool| {
            cross_entropy_forward_backward(pool, &mut losses_n, &mut logits_nv, &targets, 0.0);
        });
    }

    fn optimizer(&self, table: &mut Table) {
        let n = match self.rank {
            Some(r) => {
                self.config.n_layers
                    * self.sites().iter().map(|(_, [i, o], n)| r * (n * i + o)).sum::<usize>()
            }
            None => self.config.n_params(),
        };
        let [mut params, dparams, mut m, mut v] = [(); 4].map(|()| values(n));
        v.fill(1.0);
        let mut scratch = Vec::new();
        let of = |passes: f64| Cost { flops: 0.0, bytes: passes * F32 * n as f64 };
        table.line("size of the gradient", 1, of(1.0), |pool| _ = sum_squares(pool, &dparams, &mut scratch));
        let settings = super::settings(1, 1.0);
        table.line("AdamW", 1, of(7.0), |pool| {
            let state = AdamWState { params: &mut params, m: &mut m, v: &mut v };
            adamw(pool, state, &dparams, &[], &settings);
        });
    }
}
