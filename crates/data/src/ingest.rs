use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use store::{Bundle, Store};

use crate::input::{InputFile, Inputs, input_files};
use crate::parts::{Tokens, tokenize};
use crate::prepare::{Prepared, prepare};
use crate::work::Work;
use crate::{
    ChatsInfo, DatasetInfo, Error, IngestPlan, IngestProgress, IngestStage, Result, info::InputInfo,
    info::token_bytes,
};

pub(crate) const KIND: &str = "dataset";
const BUFFER_BYTES: usize = 1 << 20;

/// Makes the dataset `datasets/<name>` in the store: a bundle, published last, in place of an earlier one.
///
/// Two passes over the inputs: one to choose what is held out and to train the tokenizer, one to make tokens, a part at
/// a time. After each part its shards and a record are in the store. Killed at any instant and called again with the
/// same plan and inputs, it goes on after the last record, and the result is the same bytes. Where the dataset was
/// made by the same plan from the same inputs already, it only says so.
///
/// Memory is bounded by the plan (sample, part, longest document), not by the inputs.
pub fn ingest(
    plan: &IngestPlan,
    store: &Arc<dyn Store>,
    progress: &mut dyn FnMut(IngestProgress),
) -> Result<DatasetInfo> {
    plan.check()?;
    let Inputs { files, n_ignored } = input_files(&plan.inputs)?;
    let inputs = checksums(&files, progress)?;
    let plan_sha256 = plan.sha256(&inputs);
    let work = Work::new(store, &plan.name, &plan_sha256)?;
    if let Some(info) = published(plan, store, &plan_sha256)? {
        work.clear()?;
        return Ok(info);
    }
    let input_bytes = inputs.iter().map(|input| input.bytes).sum();
    let prepared = prepare(plan, &files, input_bytes, &work, progress)?;
    let (tokens, mut writer) = tokenize(plan, &files, &prepared, (store, &work), progress)?;
    if tokens.n_rows != prepared.scan.n_documents || tokens.hash_sum != prepared.scan.hash_sum {
        work.clear()?;
        return Err(Error::InputsChanged { name: plan.name.clone() });
    }
    if plan.chat_template.is_some() && tokens.train.n_learned == 0 {
        work.clear()?;
        return Err(Error::NothingToLearn { name: plan.name.clone(), split: "train", window_tokens: None });
    }
    let info =
        DatasetInfo { n_files_ignored: n_ignored, ..info(plan, inputs, plan_sha256, &prepared, &tokens) };
    progress(IngestProgress {
        stage: IngestStage::Publish,
        done: 0,
        total: 1,
        n_documents: tokens.n_documents(),
        n_tokens: info.train.n_tokens + info.validation.n_tokens,
    });
    for (file, text) in &prepared.files {
        writer.add(file, text.as_bytes()).map_err(Error::store(&plan.name))?;
    }
    let meta = serde_json::to_value(&info).expect("dataset info is plain data");
    writer.publish(KIND, meta).map_err(Error::store(&plan.name))?;
    work.clear()?;
    Ok(info)
}

/// The dataset as it is, if this very plan made it from these inputs.
fn published(plan: &IngestPlan, store: &Arc<dyn Store>, plan_sha256: &str) -> Result<Option<DatasetInfo>> {
    let bundle = Bundle::open(store, &format!("datasets/{}", plan.name)).map_err(Error::store(&plan.name))?;
    let Some(bundle) = bundle else { return Ok(None) };
    let info = DatasetInfo::parse(&plan.name, &bundle.manifest().meta)?;
    Ok((info.plan_sha256 == plan_sha256).then_some(info))
}

fn info(
    plan: &IngestPlan,
    inputs: Vec<InputInfo>,
    plan_sha256: String,
    prepared: &Prepared,
    tokens: &Tokens,
) -> DatasetInfo {
    let vocab_size = prepared.tokenizer.vocab_size();
    DatasetInfo {
        format_version: plan.format_version(),
        name: plan.name.clone(),
        vocab_size,
        tokenizer_fingerprint: prepared.tokenizer.fingerprint(),
        end_of_text: prepared.end_of_text,
        token_bytes: token_bytes(vocab_size),
        shard_tokens: plan.shard_tokens,
        train: tokens.train.info,
        validation: tokens.validation.info,
        validation_fraction: plan.validation_fraction,
        n_files_ignored: 0,
        n_rows_skipped: prepared.scan.n_rows_skipped + tokens.n_rows_refused,
        plan_sha256,
        inputs,
        chats: plan.chat_template.as_ref().map(|template| ChatsInfo {
            is_pairs: tokens.is_pairs == Some(true),
            chat_template_sha256: hex::encode(Sha256::digest(template.source())),
            n_learned: [tokens.train.n_learned, tokens.validation.n_learned],
        }),
    }
}

fn checksums(files: &[InputFile], progress: &mut dyn FnMut(IngestProgress)) -> Result<Vec<InputInfo>> {
    let size =
        |file: &InputFile| std::fs::metadata(&file.path).map_err(|error| Error::open(&file.path, error));
    let total = files.iter().map(|file| Ok(size(file)?.len())).sum::<Result<u64>>()?;
    let mut done = 0;
    let mut inputs = Vec::with_capacity(files.len());
    for file in files {
        let (bytes, sha256) = checksum(&file.path).map_err(|error| Error::read(&file.path, error))?;
        done += bytes;
        inputs.push(InputInfo { path: file.name.clone(), bytes, sha256 });
        let stage = IngestStage::Checksums;
        progress(IngestProgress { stage, done, total, n_documents: 0, n_tokens: 0 });
    }
    Ok(inputs)
}

fn checksum(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut n_bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((n_bytes, hex::encode(hash.finalize()))),
            n => {
                hash.update(&buffer[..n]);
                n_bytes += n as u64;
            }
        }
    }
}
