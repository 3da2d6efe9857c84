//! `loquat ingest`: text to a dataset, with its progress shown.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Result;
use data::{DatasetInfo, IngestPlan, IngestProgress, IngestStage, Split, TokenizerSource};

use crate::args;
use crate::home::Home;
use crate::view::bar;

pub(crate) fn run(home: &Home, args: &args::Ingest) -> Result<ExitCode> {
    let mut plan =
        IngestPlan::new(&args.name, args.inputs.clone(), TokenizerSource::Train { vocab_size: args.vocab });
    plan.validation_fraction = args.validation;
    plan.read.text_field = args.text_field.clone();
    ingest(home, &plan)?;
    Ok(ExitCode::SUCCESS)
}

/// Ingests with progress on the terminal, and says what came of it.
pub(crate) fn ingest(home: &Home, plan: &IngestPlan) -> Result<()> {
    let store = home.store()?;
    let mut shown = Shown { terminal: std::io::stdout().is_terminal(), percent: None };
    let info = data::ingest(plan, &store, &mut |progress| shown.show(&progress))?;
    shown.end();
    tell(&plan.name, &info);
    Ok(())
}

fn tell(name: &str, info: &DatasetInfo) {
    let (train, held_out) = (info.split(Split::Train), info.split(Split::Validation));
    println!(
        "dataset {name}: {} documents, {:.2} million tokens of {} ids ({:.2} bytes a token); \
         {} documents held out for validation",
        train.n_documents,
        train.n_tokens as f64 / 1e6,
        info.vocab_size,
        train.n_bytes as f64 / train.n_tokens.max(1) as f64,
        held_out.n_documents,
    );
}

struct Shown {
    terminal: bool,
    percent: Option<(IngestStage, u64)>,
}

impl Shown {
    fn show(&mut self, progress: &IngestProgress) {
        let share = progress.done as f64 / progress.total.max(1) as f64;
        let now = Some((progress.stage, (share * 100.0) as u64));
        if self.terminal && now != self.percent {
            let doing = match progress.stage {
                IngestStage::Checksums => "checking the files",
                IngestStage::Scan => "reading documents",
                IngestStage::Tokenizer => "training the tokenizer",
                IngestStage::Tokens => "writing tokens",
                IngestStage::Publish => "publishing",
            };
            print!("\r\x1b[K{} {:>3.0} % {doing}", bar(share, 24), share * 100.0);
            // Progress is only for looking at.
            let _ = std::io::stdout().flush();
        }
        self.percent = now;
    }

    fn end(&self) {
        if self.terminal && self.percent.is_some() {
            print!("\r\x1b[K");
        }
    }
}
