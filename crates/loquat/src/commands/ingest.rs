//! `loquat ingest`: text to a dataset, with its progress shown.

use std::process::ExitCode;

use anyhow::{Context, Result};
use data::{
    BadRows, Content, DatasetInfo, Form, IngestPlan, IngestProgress, IngestStage, Split, TokenizerSource,
};
use tokenizer::{ChatTemplate, Tokenizer};

use crate::args;
use crate::home::Home;
use crate::serving;
use crate::view::{bar, progress};

pub(crate) fn run(home: &Home, args: &args::Ingest) -> Result<ExitCode> {
    let trained = TokenizerSource::Train { vocab_size: args.vocab };
    let mut plan = IngestPlan::new(&args.name, args.inputs.clone(), trained);
    plan.validation_fraction = args.validation;
    plan.read.text_field = args.text_field.clone();
    plan.read.separator = args.separator.clone();
    if args.skip_bad_rows {
        plan.read.bad_rows = BadRows::Skip;
    }
    if let Some(model) = &args.tokenizer {
        let (tokenizer, template) = of_model(home, model)?;
        plan.tokenizer = TokenizerSource::Given(tokenizer);
        if let Some(form) = &args.chats {
            plan.read.content = Content::Chats(form_named(form)?);
            plan.chat_template = Some(template);
        }
    }
    ingest(home, &plan)?;
    Ok(ExitCode::SUCCESS)
}

/// The tokenizer of a model and how chats become text for it; base models get a plain dialogue.
fn of_model(home: &Home, model: &str) -> Result<(Tokenizer, ChatTemplate)> {
    let path = super::model::resolve(home, model)?;
    let loaded = model::load(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let tokenizer = serving::tokenizer_of(&path, &loaded)?;
    let template = match &loaded.chat_template {
        Some(source) => serving::chat_template(source, &tokenizer)
            .with_context(|| format!("the chat template of {}", path.display()))?,
        None => ChatTemplate::plain(),
    };
    Ok((tokenizer, template))
}

fn form_named(name: &str) -> Result<Option<Form>> {
    if name == "auto" {
        return Ok(None);
    }
    let known: Vec<&str> = Form::ALL.iter().map(|form| form.name()).collect();
    let form = Form::ALL.into_iter().find(|form| form.name() == name);
    form.map(Some).with_context(|| format!("--chats={name}: known forms are {}", known.join(", ")))
}

/// Ingests with progress on the terminal, and says what came of it.
pub(crate) fn ingest(home: &Home, plan: &IngestPlan) -> Result<()> {
    let store = home.store()?;
    let mut shown = None;
    let info = data::ingest(plan, &store, &mut |so_far| show(&so_far, &mut shown))?;
    progress("");
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
    if let Some(chats) = &info.chats {
        let what = if chats.is_pairs { "pairs of answers" } else { "chats" };
        println!(
            "{what}: {:.1} % of the tokens are learned",
            100.0 * chats.n_learned[0] as f64 / train.n_tokens.max(1) as f64
        );
    }
    if info.n_rows_skipped > 0 {
        println!("{} rows could not be read and were left out", info.n_rows_skipped);
    }
}

/// Draws a stage and its percentage where they are not those that are `shown`.
fn show(so_far: &IngestProgress, shown: &mut Option<(IngestStage, u64)>) {
    let share = so_far.done as f64 / so_far.total.max(1) as f64;
    let now = Some((so_far.stage, (share * 100.0) as u64));
    if now == *shown {
        return;
    }
    *shown = now;
    let doing = match so_far.stage {
        IngestStage::Checksums => "checking the files",
        IngestStage::Scan => "reading documents",
        IngestStage::Tokenizer => "training the tokenizer",
        IngestStage::Tokens => "writing tokens",
        IngestStage::Publish => "publishing",
    };
    progress(&format!("{} {:>3.0} % {doing}", bar(share, 24), share * 100.0));
}
