//! Training speed: tokens/s of whole steps (forward, backward, clipping, AdamW) and their share of the measured peak.
//! `fixtures/torch/bench_train.py` prints the same for PyTorch. Usage: `bench_train [SHAPE] [f32|bf16] [SECONDS]
//! [parts]`, the shapes being those of [`Case::all`]; one alone, in one precision, says what memory it needs. `parts` shows
//! where the time goes. Lines of JSON are for `cargo xtask bench train`, which prints ratios.
//!
//! Where other processes hold the cores, wall time says little; beside it stands the processor time this process used,
//! divided by its threads: what the wall time would be without neighbours.

mod parts;

use std::time::Instant;

use model::{Architecture, Config, Lora, LossSum, MicroBatch, Objective, Rope, TrainModel, Trainable};
use tensor::adamw::{AdamW, AdamWState, adamw, sum_squares};
use tensor::packed::WeightKind;
use tensor::{Buf, Pool, Precision, cpu, limits};

use parts::Parts;

const CLIP: f64 = 1.0;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let named = |names: &[&str]| args.iter().any(|arg| names.contains(&arg.as_str()));
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
    let cases = Case::all();
    let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
    for case in cases.iter().filter(|case| !named(&names) || named(&[case.name])) {
        for (label, precision, peak) in
            [("f32", Precision::F32, limits.f32_per_s), ("bf16", Precision::Bf16, limits.bf16_per_s)]
        {
            if !named(&["f32", "bf16"]) || named(&[label]) {
                print!("{:12} {label:4} ", case.name);
                let step_s = case.bench(&pool, (label, precision, peak), seconds);
                if named(&["parts"]) {
                    let parts_s = case.parts(precision).print(&limits);
                    println!("all parts {:.0} ms, a step {:.0} ms", 1e3 * parts_s, 1e3 * step_s);
                }
            }
        }
    }
}

/// A model, what of it is trained, and the rows of a step.
struct Case {
    name: &'static str,
    config: Config,
    lora: Option<Lora>,
    rows: usize,
    positions: usize,
}

impl Case {
    fn all() -> [Case; 4] {
        let lora = Lora { rank: 16, alpha: 32.0, targets: vec!["all-linear".to_owned()] };
        let case =
            |name, config, [rows, positions]: [usize; 2]| Case { name, config, lora: None, rows, positions };
        [
            case("demo", llama(6, 192, [6, 2, 32], [512, 4096]), [16, 256]),
            case("peers", llama(6, 384, [6, 6, 64], [1024, 4096]), [16, 256]),
            case("gpt2-124m", gpt2(), [4, 512]),
            // SmolLM2-135M's shape.
            Case {
                lora: Some(lora),
                ..case("lora-135m", llama(30, 576, [9, 3, 64], [1536, 49_152]), [4, 512])
            },
        ]
    }

    fn trainable(&self, pool: &Pool) -> Trainable {
        let random = Trainable::new(&self.config);
        let Some(lora) = &self.lora else { return random };
        let weights = random.to_weights(pool, &random.init(1), WeightKind::Bf16);
        Trainable::lora(weights, lora).expect("the settings fit a Llama")
    }
}

fn llama(n_layers: usize, width: usize, [h, g, d]: [usize; 3], [ff_width, vocab]: [usize; 2]) -> Config {
    Config {
        architecture: Architecture::Llama,
        n_layers,
        width,
        n_heads: h,
        n_kv_heads: g,
        head_width: d,
        ff_width,
        vocab,
        norm_eps: 1e-5,
        rope: Rope::plain(10_000.0),
        query_scalar: None,
        window: None,
        tied_embeddings: true,
        context_max: 1024,
        bos: None,
        eos: Vec::new(),
    }
}

fn gpt2() -> Config {
    Config { architecture: Architecture::Gpt2, ..llama(12, 768, [12, 12, 64], [3072, 50_257]) }
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
    fn new(trainable: Trainable, [rows, positions]: [usize; 2], precision: Precision) -> Self {
        let model = TrainModel::new(trainable, rows, positions, precision);
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
        let settings = settings(self.n_steps, (mean * (CLIP / norm).min(1.0)) as f32);
        let state = AdamWState { params: &mut self.params, m: &mut self.m, v: &mut self.v };
        adamw(pool, state, &self.dparams, &self.model.trainable().decayed(), &settings);
        loss
    }
}

fn settings(step: u64, grad_scale: f32) -> AdamW {
    AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale }
}

impl Case {
    fn parts(&self, precision: Precision) -> Parts<'_> {
        Parts {
            config: &self.config,
            rank: self.lora.as_ref().map(|lora| lora.rank),
            rows: self.rows,
            positions: self.positions,
            precision,
        }
    }

    /// Gives the seconds of the fastest step.
    fn bench(
        &self,
        pool: &Pool,
        (label, precision, peak_per_s): (&str, Precision, f64),
        seconds: f64,
    ) -> f64 {
        let mut run = Run::new(self.trainable(pool), [self.rows, self.positions], precision);
        let vocab = self.config.vocab as u64;
        let ids = |salt: u32| -> Vec<u32> {
            let hash = |i: u32| u64::from((i + salt).wrapping_mul(2_654_435_761));
            (0..(self.rows * self.positions) as u32).map(|i| ((hash(i) * vocab) >> 32) as u32).collect()
        };
        let (tokens, targets) = (ids(0), ids(1));
        let first = run.step(pool, &tokens, &targets);
        // Validated first: untrained, every id is about as likely.
        let mean = first.nats / first.n_tokens as f64;
        assert!((mean - (vocab as f64).ln()).abs() < 0.3, "the first loss is {mean}");
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
        let flops = run.model.trainable().flops_per_token(self.positions);
        let share = |s: f64| 100.0 * n * flops / s / peak_per_s;
        let peak_mib = peak_mib();
        println!(
            "{:6.2} M of {:6.2} M parameters: {:6.0} tokens/s best ({:.1} % of peak), {:6.0} median, {:6.0} by processor time ({:.1} %), {} MiB",
            run.params.len() as f64 / 1e6,
            self.config.n_params() as f64 / 1e6,
            n / wall[0],
            share(wall[0]),
            n / wall[wall.len() / 2],
            n / cpu[0],
            share(cpu[0]),
            peak_mib
        );
        let line = serde_json::json!({
            "shape": self.name, "precision": label, "mode": "loquat", "peak_mib": peak_mib,
            "tokens_per_s": (n / wall[0]).round(), "tokens_per_s_by_cpu_time": (n / cpu[0]).round(),
        });
        println!("{line}");
        wall[0]
    }
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
