//! Metrics of training runs.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::metrics::registered;

type GaugeF64 = Gauge<f64, AtomicU64>;
type GaugeFamily = Family<RunLabels, GaugeF64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RunLabels {
    run: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct TaskLabels {
    run: String,
    task: String,
    metric: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabels {
    run: String,
    cause: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct LinkLabels {
    run: String,
    from: String,
    to: String,
}

/// What a run's time can be lost to.
const CAUSES: [&str; 6] = ["lost_ranks", "slowest_rank", "exchange", "data", "checkpoints", "other"];
/// Links of a run that have series of their own.
const LINKS_MAX: usize = 256;

/// One optimizer step in numbers.
#[derive(Clone, Copy, Debug)]
pub struct TrainStep {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens this step trained on.
    pub n_tokens: u64,
    /// Mean loss over those tokens.
    pub loss_nats: f64,
    pub learning_rate: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
}

/// One step in numbers of its ranks.
#[derive(Clone, Copy, Debug)]
pub struct TrainRanks {
    /// The rank that computed longest.
    pub slowest: usize,
    pub slowest_seconds: f64,
    pub median_seconds: f64,
    /// Of waiting for gradients on their way.
    pub exchange_seconds: f64,
    /// Of gradients on their way, waited for or not.
    pub travel_seconds: f64,
    /// Sent by all ranks.
    pub n_bytes: u64,
}

/// The state of one training run. Clones share the same series.
#[derive(Clone, Debug)]
pub struct TrainMetrics {
    step: Gauge,
    tokens: Counter,
    tokens_per_second: GaugeF64,
    loss: GaugeF64,
    learning_rate: GaugeF64,
    grad_norm: GaugeF64,
    peak_share: GaugeF64,
    families: TrainFamilies,
    labels: RunLabels,
}

impl TrainMetrics {
    /// One optimizer step is done.
    pub fn step(&self, done: &TrainStep) {
        self.step.set(i64::try_from(done.step).unwrap_or(i64::MAX));
        self.tokens.inc_by(done.n_tokens);
        self.loss.set(done.loss_nats);
        self.learning_rate.set(done.learning_rate);
        self.grad_norm.set(done.grad_norm);
    }

    /// Smoothed speed, and the share (0 to 1) of this machine's measured peak that it is.
    pub fn speed(&self, tokens_per_second: f64, peak_share: f64) {
        self.tokens_per_second.set(tokens_per_second);
        self.peak_share.set(peak_share);
    }

    /// How the ranks that share a step went through it; the series appear with the first such step.
    pub fn ranks(&self, ranks: &TrainRanks) {
        let set = |family: &GaugeFamily, value: f64| family.get_or_create_owned(&self.labels).set(value);
        set(&self.families.slowest_rank, ranks.slowest as f64);
        set(&self.families.slowest_rank_seconds, ranks.slowest_seconds);
        set(&self.families.median_rank_seconds, ranks.median_seconds);
        set(&self.families.exchange_seconds, ranks.exchange_seconds);
        set(&self.families.travel_seconds, ranks.travel_seconds);
        self.families.exchange_bytes.get_or_create_owned(&self.labels).inc_by(ranks.n_bytes);
    }

    /// The share (0 to 1) of the run's time in which its ranks computed what was kept, and seconds lost by cause, which is
    /// one of [`CAUSES`].
    pub fn goodput(&self, share: f64, lost: &[(&str, f64)]) {
        self.families.goodput.get_or_create_owned(&self.labels).set(share);
        for cause in CAUSES {
            let seconds = lost.iter().filter(|(of, _)| *of == cause).map(|(_, seconds)| seconds).sum();
            let labels = CauseLabels { run: self.labels.run.clone(), cause: cause.to_owned() };
            self.families.lost_seconds.get_or_create_owned(&labels).set(seconds);
        }
    }

    /// So many bytes went from one machine or rank to another.
    pub fn link(&self, from: &str, to: &str, n_bytes: u64) {
        let labels = LinkLabels { run: self.labels.run.clone(), from: from.to_owned(), to: to.to_owned() };
        let mut links = self.families.links.lock().unwrap_or_else(PoisonError::into_inner);
        if links.iter().filter(|link| link.run == labels.run).count() < LINKS_MAX || links.contains(&labels) {
            self.families.link_bytes.get_or_create_owned(&labels).inc_by(n_bytes);
            links.insert(labels);
        }
    }

    /// A validation pass is done: bits per byte of held-out text. Appears with the first pass.
    pub fn validated(&self, bits_per_byte: f64) {
        self.families.validation_bits_per_byte.get_or_create_owned(&self.labels).set(bits_per_byte);
    }

    /// A task was asked: what came out of it, and the standard error of that.
    pub fn scored(&self, task: &str, metric: &str, value: f64, stderr: f64) {
        let (task, metric) = (task.to_owned(), metric.to_owned());
        let labels = TaskLabels { run: self.labels.run.clone(), task, metric };
        self.families.task_score.get_or_create_owned(&labels).set(value);
        self.families.task_stderr.get_or_create_owned(&labels).set(stderr);
        self.families.tasks.lock().unwrap_or_else(PoisonError::into_inner).insert(labels);
    }

    /// A checkpoint of `n_bytes` became visible after `seconds`.
    pub fn checkpointed(&self, n_bytes: u64, seconds: f64) {
        let families = &self.families;
        families.checkpoints.get_or_create_owned(&self.labels).inc();
        families.checkpoint_bytes.get_or_create_owned(&self.labels).set(n_bytes as f64);
        families.checkpoint_seconds.get_or_create_owned(&self.labels).set(seconds);
    }
}

/// The families behind [`TrainMetrics`], one member per run.
#[derive(Clone, Debug)]
pub(crate) struct TrainFamilies {
    step: Family<RunLabels, Gauge>,
    tokens: Family<RunLabels, Counter>,
    tokens_per_second: GaugeFamily,
    loss: GaugeFamily,
    learning_rate: GaugeFamily,
    grad_norm: GaugeFamily,
    peak_share: GaugeFamily,
    validation_bits_per_byte: GaugeFamily,
    checkpoints: Family<RunLabels, Counter>,
    checkpoint_bytes: GaugeFamily,
    checkpoint_seconds: GaugeFamily,
    task_score: Family<TaskLabels, GaugeF64>,
    task_stderr: Family<TaskLabels, GaugeF64>,
    /// What the last two have members for.
    tasks: Arc<Mutex<BTreeSet<TaskLabels>>>,
    slowest_rank: GaugeFamily,
    slowest_rank_seconds: GaugeFamily,
    median_rank_seconds: GaugeFamily,
    exchange_seconds: GaugeFamily,
    travel_seconds: GaugeFamily,
    exchange_bytes: Family<RunLabels, Counter>,
    goodput: GaugeFamily,
    lost_seconds: Family<CauseLabels, GaugeF64>,
    link_bytes: Family<LinkLabels, Counter>,
    /// What the last has members for.
    links: Arc<Mutex<BTreeSet<LinkLabels>>>,
}

impl TrainFamilies {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let r = registry;
        Self {
            step: registered(r, "loquat_train_step", "Optimizer steps done", Family::default()),
            tokens: registered(r, "loquat_train_tokens", "Tokens trained on", Family::default()),
            tokens_per_second: gauge(r, "tokens_per_second", "Smoothed training speed"),
            loss: gauge(r, "loss_nats", "Mean loss per token of the last step"),
            learning_rate: gauge(r, "learning_rate", "Learning rate of the last step"),
            grad_norm: gauge(r, "grad_norm", "Gradient norm before clipping, last step"),
            peak_share: gauge(r, "peak_share_ratio", "Share of this machine's measured peak, 0 to 1"),
            validation_bits_per_byte: gauge(
                r,
                "validation_bits_per_byte",
                "Loss on held-out documents in bits per byte of text",
            ),
            checkpoints: registered(
                r,
                "loquat_train_checkpoints",
                "Checkpoints published",
                Family::default(),
            ),
            checkpoint_bytes: gauge(r, "checkpoint_bytes", "Size of the last checkpoint"),
            checkpoint_seconds: gauge(r, "checkpoint_seconds", "Time the last checkpoint took"),
            task_score: registered(r, "loquat_train_task_score", "Score of a task", Family::default()),
            task_stderr: registered(
                r,
                "loquat_train_task_stderr",
                "Standard error of a task's score",
                Family::default(),
            ),
            tasks: Arc::default(),
            slowest_rank: gauge(r, "slowest_rank", "The rank that computed longest in the last step"),
            slowest_rank_seconds: gauge(r, "slowest_rank_seconds", "How long it computed"),
            median_rank_seconds: gauge(r, "median_rank_seconds", "How long the rank in the middle computed"),
            exchange_seconds: gauge(r, "exchange_seconds", "How long the last step waited for gradients"),
            travel_seconds: gauge(r, "travel_seconds", "How long the last step's gradients travelled"),
            exchange_bytes: registered(
                r,
                "loquat_train_exchange_bytes",
                "Bytes that ranks have sent to each other",
                Family::default(),
            ),
            goodput: gauge(
                r,
                "goodput_ratio",
                "Share of the time in which ranks computed what was kept, 0 to 1",
            ),
            lost_seconds: registered(
                r,
                "loquat_train_lost_seconds",
                "The rest of the time, by what took it",
                Family::default(),
            ),
            link_bytes: registered(
                r,
                "loquat_train_link_bytes",
                "Bytes sent from one machine to another",
                Family::default(),
            ),
            links: Arc::default(),
        }
    }

    pub(crate) fn handles(&self, run: &str) -> TrainMetrics {
        let labels = RunLabels { run: run.to_owned() };
        TrainMetrics {
            step: self.step.get_or_create_owned(&labels),
            tokens: self.tokens.get_or_create_owned(&labels),
            tokens_per_second: self.tokens_per_second.get_or_create_owned(&labels),
            loss: self.loss.get_or_create_owned(&labels),
            learning_rate: self.learning_rate.get_or_create_owned(&labels),
            grad_norm: self.grad_norm.get_or_create_owned(&labels),
            peak_share: self.peak_share.get_or_create_owned(&labels),
            families: self.clone(),
            labels,
        }
    }

    pub(crate) fn forget(&self, run: &str) {
        let labels = RunLabels { run: run.to_owned() };
        self.step.remove(&labels);
        self.tokens.remove(&labels);
        self.checkpoints.remove(&labels);
        self.exchange_bytes.remove(&labels);
        for cause in CAUSES {
            self.lost_seconds.remove(&CauseLabels { run: run.to_owned(), cause: cause.to_owned() });
        }
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| {
            let goes = link.run == run;
            if goes {
                self.link_bytes.remove(link);
            }
            !goes
        });
        drop(links);
        for family in [
            &self.tokens_per_second,
            &self.loss,
            &self.learning_rate,
            &self.grad_norm,
            &self.peak_share,
            &self.validation_bits_per_byte,
            &self.checkpoint_bytes,
            &self.checkpoint_seconds,
            &self.slowest_rank,
            &self.slowest_rank_seconds,
            &self.median_rank_seconds,
            &self.exchange_seconds,
            &self.goodput,
            &self.travel_seconds,
        ] {
            family.remove(&labels);
        }
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|labels| {
            let goes = labels.run == run;
            if goes {
                self.task_score.remove(labels);
                self.task_stderr.remove(labels);
            }
            !goes
        });
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> GaugeFamily {
    registered(registry, &format!("loquat_train_{name}"), help, GaugeFamily::default())
}
