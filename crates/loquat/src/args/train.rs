//! The flags of `loquat train`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

#[derive(Args)]
pub(crate) struct Train {
    /// Name of the run; one that exists goes on where it was.
    #[arg(long, required_unless_present = "resume")]
    run: Option<String>,
    /// Go on with this run as it was planned.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["run", "dataset", "config", "preset", "init", "dry_run"])]
    pub(crate) resume: Option<String>,
    /// Name of the dataset; several are mixed by weight: books=3 chats=1. One of weight 0 is only validated on.
    #[arg(long, required_unless_present = "resume", num_args = 1.., value_name = "NAME[=WEIGHT]")]
    pub(crate) dataset: Vec<String>,
    /// Publish the finished model under this name.
    #[arg(long)]
    pub(crate) publish: Option<String>,
    /// Optimizer steps.
    #[arg(long, conflicts_with = "minutes")]
    pub(crate) steps: Option<u64>,
    /// Plan so many steps as this machine does in this time.
    #[arg(long)]
    pub(crate) minutes: Option<f64>,
    /// The model's shape: a Hugging Face config.json. Default: the preset tiny.
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// A known shape, with the dataset's vocabulary.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["config", "init"], value_parser = crate::commands::presets::names())]
    pub(crate) preset: Option<String>,
    /// Print what the run would be and take, and do nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// With --dry-run: plan for the machines that this TOML file describes instead of this one.
    #[arg(long, value_name = "FILE", requires = "dry_run")]
    pub(crate) cluster: Option<PathBuf>,
    /// Rows of one micro-batch.
    #[arg(long, default_value_t = 4)]
    pub(crate) rows: usize,
    /// Micro-batches of one step.
    #[arg(long, default_value_t = 4)]
    pub(crate) micro_batches: usize,
    /// Tokens of one row.
    #[arg(long, default_value_t = 256)]
    pub(crate) context: usize,
    #[command(flatten)]
    pub(crate) method: Method,
    /// Peak learning rate. Default: 3e-3 from random weights, 2e-4 with LoRA, 2e-5 from a model; less with --dpo.
    #[arg(long)]
    pub(crate) lr: Option<f32>,
    /// How the learning rate falls after its warm-up.
    #[arg(long, value_enum, default_value_t = DecayName::Wsd)]
    pub(crate) decay: DecayName,
    /// Steps in which the learning rate rises. Default: a twentieth of all, at most 200.
    #[arg(long, value_name = "STEPS")]
    pub(crate) warmup: Option<u64>,
    /// Train the layers' matrices with Muon (the rest stays with AdamW); its peak learning rate.
    #[arg(long, value_name = "LR", num_args = 0..=1, default_missing_value = "0.02", conflicts_with = "lora_rank")]
    pub(crate) muon: Option<f32>,
    /// For slow links: workers that train by themselves and meet every so many steps (DiLoCo), for that many times fewer
    /// bytes: workers=2,every=100,lr=0.7,momentum=0.9. The result depends on it, but not on the ranks that the workers share.
    /// Where they meet a few times only, less momentum is better: lr=0.9,momentum=0.5.
    #[arg(long, value_name = "SETTINGS", value_parser = diloco)]
    pub(crate) diloco: Option<train::Diloco>,
    /// Keep logits from drifting: the weight of the square of their logarithmic sum.
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0)]
    pub(crate) z_loss: f32,
    /// Skip steps whose loss lies so many standard deviations above the last ones; those that are no number always are.
    #[arg(long, value_name = "SIGMAS")]
    pub(crate) skip_spikes: Option<f32>,
    /// Documents of text that share a row do not see each other, as those of chats never do.
    #[arg(long)]
    pub(crate) isolate: bool,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 25)]
    pub(crate) checkpoint_every: u64,
    /// Seed of the first weights and of the data's order.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Text that the model is asked to continue as it learns.
    #[arg(long, default_value = "My fellow Americans")]
    pub(crate) prompt: String,
    /// Keep of every layer only what goes in, and compute it again for its gradient: less memory, a third more work, the
    /// same result.
    #[arg(long)]
    pub(crate) recompute: bool,
    /// Tasks to ask the model as it learns: files as `loquat eval tasks` takes them. They are kept in the run.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    pub(crate) eval_tasks: Vec<PathBuf>,
    /// Steps between two times of asking. Default: a sixth of all.
    #[arg(long, value_name = "STEPS", requires = "eval_tasks")]
    pub(crate) eval_every: Option<u64>,
    /// Worked examples before each item.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "eval_tasks")]
    pub(crate) eval_shots: usize,
    /// The first so many items of each file are asked.
    #[arg(long, value_name = "ITEMS", default_value_t = 500, requires = "eval_tasks")]
    pub(crate) eval_limit: usize,
    /// Ranks: threads that each train on their share of a step. The result does not depend on it.
    #[arg(long, default_value_t = 1)]
    pub(crate) ranks: usize,
    #[command(flatten)]
    pub(crate) distributed: Distributed,
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Report as JSON lines instead of the live view.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `workers=2,every=100,lr=0.7,momentum=0.9`, of which all but the workers may be left out.
fn diloco(text: &str) -> Result<train::Diloco, String> {
    let (mut diloco, mut has_workers) = (train::Diloco::DEFAULT, false);
    for setting in text.split(',') {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        let wrong = |what: &str| format!("{name}={value}: {value:?} is not {what}");
        match name {
            "workers" => {
                diloco.workers = value.parse().map_err(|_| wrong("a number of workers"))?;
                has_workers = true;
            }
            "every" => diloco.every_steps = value.parse().map_err(|_| wrong("a number of steps"))?,
            "lr" => diloco.lr = value.parse().map_err(|_| wrong("a learning rate"))?,
            "momentum" => diloco.momentum = value.parse().map_err(|_| wrong("a momentum"))?,
            _ => return Err(format!("{name:?} is none of workers, every, lr, momentum")),
        }
    }
    if has_workers {
        Ok(diloco)
    } else {
        Err("workers=N is missing: the result depends on their number".into())
    }
}

/// How ranks are started and held together.
#[derive(Args)]
pub(crate) struct Distributed {
    /// Start the ranks as processes, with mpirun, and start them again when some are lost. (Processes that mpirun or srun
    /// has started find each other without this.)
    #[arg(long, value_enum)]
    pub(crate) launch: Option<Launcher>,
    /// With --launch: start again at most so often.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "launch")]
    pub(crate) restarts: u32,
    /// With --launch: what happens when ranks are lost. Those that are left can go on from the last step, in the same processes,
    /// where mpirun can do that (Open MPI 5 with ULFM), all are on this machine and each has the whole model. The result does
    /// not depend on it.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = OnLoss::GoOn, requires = "launch")]
    pub(crate) on_loss: OnLoss,
    /// With --launch: machines to start ranks on, separated by commas. Those that do not answer are left out.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "launch", env = "LOQUAT_HOSTS")]
    pub(crate) hosts: Vec<String>,
    /// With --hosts: what runs a command on a machine, called as ssh is; may have options of its own.
    #[arg(
        long,
        value_name = "PROGRAM",
        default_value = "ssh",
        requires = "launch",
        env = "LOQUAT_REMOTE_SHELL"
    )]
    pub(crate) remote_shell: String,
    /// With --launch: an option for mpirun; may be given often. --mpirun-option="--mca btl tcp,self"
    #[arg(long, value_name = "OPTION", requires = "launch", allow_hyphen_values = true)]
    pub(crate) mpirun_option: Vec<String>,
    /// The MPI library, where it is not the one of the mpirun that is found first.
    #[arg(long, value_name = "FILE")]
    pub(crate) mpi_library: Option<PathBuf>,
    /// Divide among the ranks instead of copying: the optimizer's state (1), gradients, too (2), and the parameters (3). The
    /// result does not depend on it. A number of ranks that is no power of two dividing the micro-batches takes 2 at least.
    #[arg(long, value_name = "STAGE", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub(crate) zero: u8,
    /// Ranks that compute one model together, each with some of its heads and of its feed-forward columns (tensor parallel): a
    /// power of two that divides --ranks. Losses are those of one rank but for roundings.
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = power_of_two)]
    pub(crate) tp: usize,
    /// Stages of neighbouring layers, of as much work each, of which ranks form pipelines (1F1B): a power of two that divides
    /// --ranks, and at most as many as there are layers. The result does not depend on it. With few micro-batches a step
    /// stages wait for each other: (stages - 1) of (micro-batches of a pipeline + stages - 1).
    #[arg(long, value_name = "STAGES", default_value_t = 1, value_parser = power_of_two)]
    pub(crate) pp: usize,
    /// Seconds without any progress after which a rank gives the others up.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    rank_limit: u64,
}

fn power_of_two(text: &str) -> Result<usize, String> {
    let n = text.parse().ok().filter(|n: &usize| n.is_power_of_two());
    n.ok_or_else(|| format!("{text:?} is not a power of two"))
}

impl Distributed {
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.rank_limit)
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Launcher {
    Mpi,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum OnLoss {
    /// Those that are left go on, where they can; else as below.
    GoOn,
    /// All are started again, from the last checkpoint.
    StartAgain,
}

/// What to start from, what of it to train, and to what end.
#[derive(Args)]
pub(crate) struct Method {
    /// Start from this model: a Hugging Face directory, a .gguf file, or the name of a model kept here. The dataset must
    /// have been made with its tokenizer.
    #[arg(long, value_name = "MODEL", conflicts_with = "config")]
    pub(crate) init: Option<String>,
    /// Train low-rank changes (LoRA) of this rank instead of all parameters.
    #[arg(long, value_name = "R", requires = "init")]
    pub(crate) lora_rank: Option<usize>,
    /// Changes count alpha / rank times. Default: twice the rank.
    #[arg(long, value_name = "ALPHA", requires = "lora_rank")]
    pub(crate) lora_alpha: Option<f32>,
    /// Matrices to change, by the ends of their names: q_proj,v_proj.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "all-linear",
        requires = "lora_rank"
    )]
    pub(crate) lora_targets: Vec<String>,
    /// Publish the whole model with the changes in it, not an adapter.
    #[arg(long, requires = "lora_rank")]
    pub(crate) merge: bool,
    /// Learn preferences (DPO) from a dataset of pairs; BETA small lets the model go far from where it started.
    #[arg(long, value_name = "BETA", num_args = 0..=1, default_missing_value = "0.1", requires = "init")]
    pub(crate) dpo: Option<f32>,
    /// Learn from the probabilities of this model, too: named as in --init, with the same vocabulary.
    #[arg(long, value_name = "MODEL", conflicts_with = "dpo")]
    pub(crate) distill: Option<String>,
    /// The teacher's share of the loss: 1 learns from it alone.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, requires = "distill")]
    pub(crate) distill_weight: f32,
    /// Probabilities are compared at this temperature: above 1 unlikely tokens count more.
    #[arg(long, value_name = "T", default_value_t = 1.0, requires = "distill")]
    pub(crate) distill_temperature: f32,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DecayName {
    Wsd,
    Cosine,
    Linear,
    Constant,
}

/// A dataset and its weight, as `--dataset` names them.
pub(crate) struct DataChoice {
    pub(crate) name: String,
    pub(crate) weight: f64,
}

impl Train {
    pub(crate) fn run_name(&self) -> &str {
        self.resume.as_ref().or(self.run.as_ref()).map_or("", String::as_str)
    }

    pub(crate) fn datasets(&self) -> Result<Vec<DataChoice>, String> {
        let choice = |text: &String| match text.split_once('=') {
            None => Ok(DataChoice { name: text.clone(), weight: 1.0 }),
            Some((name, weight)) => {
                let number = weight.parse().ok().filter(|w: &f64| w.is_finite() && *w >= 0.0);
                let weight = number
                    .ok_or_else(|| format!("--dataset {text}: {weight:?} is not a weight, 0 or more"))?;
                Ok(DataChoice { name: name.to_owned(), weight })
            }
        };
        self.dataset.iter().map(choice).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diloco_is_told_as_settings() {
        let all = train::Diloco { workers: 4, every_steps: 50, lr: 0.5, momentum: 0.8 };
        assert_eq!(diloco("workers=4,every=50,lr=0.5,momentum=0.8"), Ok(all));
        let short = diloco("every=7,workers=8").unwrap();
        assert_eq!(short, train::Diloco { workers: 8, every_steps: 7, ..train::Diloco::DEFAULT });
        for (text, words) in [
            ("every=50", "workers=N is missing"),
            ("", "is none of workers, every, lr, momentum"),
            ("workers=2,evry=3", "\"evry\" is none of"),
            ("workers=-1", "\"-1\" is not a number of workers"),
            ("workers", "\"\" is not a number of workers"),
            ("workers=2,lr=fast", "\"fast\" is not a learning rate"),
        ] {
            let error = diloco(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
