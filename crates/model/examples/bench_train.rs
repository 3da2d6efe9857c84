//! Training speed: tokens/s of whole steps (forward, backward, clipping, AdamW) and their share of the measured peak.
//! `fixtures/torch/bench_train.py` prints the same for PyTorch. Usage: `bench_train [demo|peers] [f32|bf16] [SECONDS]`.
//!
//! Where other processes hold the cores, wall time says little; beside it stands the processor time this process used,
//! divided by its threads: what the wall time would be without neighbours.

use std::time::Instant;

use model::{Architecture, Config, LossSum, MicroBatch, Objective, Rope, TrainModel, Trainable};
use tensor::adamw::{AdamW, AdamWState, adamw, sum_squares};
use tensor::{Buf, Pool, Precision, cpu, limits};

const ROWS: usize = 16;
const POSITIONS: usize = 256;
const CLIP: f64 = 1.0;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let wants = |name: &str, others: [&str; 2]| {
        args.iter().any(|arg| arg == name) || !others.iter().any(|other| args.iter().any(|arg| arg == other))
    };
    let seconds = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(8.0);
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, |n| n.get()));
    let limits = limits::measure(&pool);
    println!(
        "cpu: {}, {} threads, peak f32 {:.1} bf16 {:.1} GFLOP/s",
        cpu::describe(),
        pool.n_threads(),
        limits.f32_per_s / 1e9,
        limits.bf16_per_s / 1e9
    );
    for (name, config) in [("demo", shape(192, 2, 32, 512)), ("peers", shape(384, 6, 64, 1024))] {
        if !wants(name, ["demo", "peers"]) {
            continue;
        }
        for (label, precision, peak) in
            [("f32", Precision::F32, limits.f32_per_s), ("bf16", Precision::Bf16, limits.bf16_per_s)]
        {
            if wants(label, ["f32", "bf16"]) {
                print!("{name:5} {label:4} ");
                bench(&pool, &config, precision, peak, seconds);
            }
        }
    }
}

/// Six layers of six heads over 4,096 ids.
fn shape(width: usize, n_kv_heads: usize, head_width: usize, ff_width: usize) -> Config {
    Config {
        architecture: Architecture::Llama,
        n_layers: 6,
        width,
        n_heads: 6,
        n_kv_heads,
        head_width,
        ff_width,
        vocab: 4096,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        query_scalar: None,
        window: None,
        tied_embeddings: true,
        context_max: POSITIONS,
        bos: None,
        eos: Vec::new(),
    }
}

/// The state of a training run.
struct Run {
    model: TrainModel,
    params: Buf<f32>,
    dparams: Buf<f32>,
    m: Buf<f32>,
    v: Buf<f32>,
    scratch: Vec<f64>,
    n_steps: u64,
}

impl Run {
    fn new(config: &Config, precision: Precision) -> Self {
        let model = TrainModel::new(Trainable::new(config), ROWS, POSITIONS, precision);
        let params = model.trainable().init(1);
        let [dparams, m, v] = [(); 3].map(|()| Buf::zeroed(params.len()));
        Self { model, params, dparams, m, v, scratch: Vec::new(), n_steps: 0 }
    }

    fn step(&mut self, pool: &Pool, tokens: &[u32], targets: &[u32]) -> LossSum {
        let of = (MicroBatch::plain(tokens, targets), Objective::CrossEntropy);
        let loss = self.model.loss_and_grads(pool, &self.params, of, &mut self.dparams);
        let mean = 1.0 / loss.n_tokens as f64;
        let norm = sum_squares(pool, &self.dparams, &mut self.scratch).sqrt() * mean;
        self.n_steps += 1;
        let settings = AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: self.n_steps,
            grad_scale: (mean * (CLIP / norm).min(1.0)) as f32,
        };
        let state = AdamWState { params: &mut self.params, m: &mut self.m, v: &mut self.v };
        adamw(pool, state, &self.dparams, &self.model.trainable().decayed(), &settings);
        loss
    }
}

fn bench(pool: &Pool, config: &Config, precision: Precision, peak_per_s: f64, seconds: f64) {
    let mut run = Run::new(config, precision);
    let ids = |salt: u32| -> Vec<u32> {
        (0..(ROWS * POSITIONS) as u32).map(|i| (i + salt).wrapping_mul(2_654_435_761) >> 20).collect()
    };
    let (tokens, targets) = (ids(0), ids(1));
    let first = run.step(pool, &tokens, &targets);
    // Validated first: untrained, every id is about as likely, ln 4096 = 8.3.
    let mean = first.nats / first.n_tokens as f64;
    assert!((mean - (config.vocab as f64).ln()).abs() < 0.2, "the first loss is {mean}");
    let (mut wall, mut cpu, started) = (Vec::new(), Vec::new(), Instant::now());
    while wall.len() < 3 || started.elapsed().as_secs_f64() < seconds {
        let (at, cpu_at) = (Instant::now(), processor_seconds());
        run.step(pool, &tokens, &targets);
        wall.push(at.elapsed().as_secs_f64());
        cpu.push((processor_seconds() - cpu_at) / pool.n_threads() as f64);
    }
    for times in [&mut wall, &mut cpu] {
        times.sort_by(f64::total_cmp);
    }
    let n = first.n_tokens as f64;
    let share = |s: f64| 100.0 * n * config.flops_per_token_train(POSITIONS) / s / peak_per_s;
    println!(
        "{:5.2} M parameters: {:6.0} tokens/s best ({:.1} % of peak), {:6.0} median, {:6.0} by processor time ({:.1} %), {} MiB",
        config.n_params() as f64 / 1e6,
        n / wall[0],
        share(wall[0]),
        n / wall[wall.len() / 2],
        n / cpu[0],
        share(cpu[0]),
        peak_mib()
    );
}

/// Time on a processor of all threads, from /proc (the first number of schedstat, in ns).
fn processor_seconds() -> f64 {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanoseconds = |path: std::path::PathBuf| -> Option<f64> {
        std::fs::read_to_string(path.join("schedstat")).ok()?.split(' ').next()?.parse().ok()
    };
    threads.flatten().filter_map(|thread| nanoseconds(thread.path())).sum::<f64>() / 1e9
}

/// Most memory this process ever had, shapes measured before included.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
