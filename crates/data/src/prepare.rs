//! The first pass over the documents: what the split rule needs to know of all of them, and a tokenizer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokenizer::{BpeTrainer, ChatTemplate, Tokenizer, TrainProgress};

use crate::input::InputFile;
use crate::split::{SplitRule, document_hash};
use crate::work::Work;
use crate::{Content, Documents, Error, IngestPlan, IngestProgress, IngestStage, Result, TokenizerSource};

const END_OF_TEXT: &str = "<|endoftext|>";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SCAN: &str = "scan.json";
/// Documents between two reports of progress.
const REPORT_DOCUMENTS: u64 = 256;

/// What is known once every document has been seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scan {
    pub(crate) n_documents: u64,
    pub(crate) n_bytes: u64,
    pub(crate) n_rows_skipped: u64,
    hash_min: u64,
    hash_max: u64,
    /// Sum of the documents' hashes: tells whether the second pass saw the same documents.
    pub(crate) hash_sum: u64,
    tokenizer_sha256: String,
}

/// What the second pass needs.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) scan: Scan,
    pub(crate) rule: SplitRule,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) files: [(&'static str, String); 2],
    pub(crate) end_of_text: u32,
    pub(crate) content: Content,
}

/// The result of the first pass: from the record of an earlier one under `work`, or made and recorded.
pub(crate) fn prepare(
    plan: &IngestPlan,
    files: &[InputFile],
    input_bytes: u64,
    work: &Work,
    progress: &mut dyn FnMut(IngestProgress),
) -> Result<Prepared> {
    if let Some((scan, tokenizer_files)) = recorded(work)? {
        return prepared(plan, files, scan, tokenizer_files);
    }
    let (mut scan, sample) = scan(plan, files, input_bytes, progress)?;
    let rule = rule(plan, files, &scan)?;
    let tokenizer = match &plan.tokenizer {
        TokenizerSource::Given(tokenizer) => tokenizer.clone(),
        TokenizerSource::Train { vocab_size } => {
            let texts = sample.into_texts(|hash| !rule.is_validation(hash));
            train(plan, *vocab_size, &texts, progress)?
        }
    };
    let tokenizer_files = [
        tokenizer.to_json(),
        tokenizer.config_json(plan.chat_template.as_ref().and_then(ChatTemplate::own_source)),
    ];
    scan.tokenizer_sha256 = checksum(&tokenizer_files);
    work.put(TOKENIZER, tokenizer_files[0].as_bytes())?;
    work.put(TOKENIZER_CONFIG, tokenizer_files[1].as_bytes())?;
    // Last: it says that the others are there.
    work.put(SCAN, &serde_json::to_vec(&scan).expect("a scan is plain data"))?;
    prepared(plan, files, scan, tokenizer_files)
}

fn recorded(work: &Work) -> Result<Option<(Scan, [String; 2])>> {
    let (scan, json, config) = (work.get(SCAN)?, work.get(TOKENIZER)?, work.get(TOKENIZER_CONFIG)?);
    let (Some(scan), Some(json), Some(config)) = (scan, json, config) else { return Ok(None) };
    // A record that is damaged is no record: the pass is done again.
    let (Ok(scan), Ok(json), Ok(config)) =
        (serde_json::from_slice::<Scan>(&scan), String::from_utf8(json), String::from_utf8(config))
    else {
        return Ok(None);
    };
    let files = [json, config];
    Ok((checksum(&files) == scan.tokenizer_sha256).then_some((scan, files)))
}

/// The tokenizer is read back from the files that the dataset will hold, so that readers of it get the same one.
fn prepared(
    plan: &IngestPlan,
    files: &[InputFile],
    scan: Scan,
    [json, config]: [String; 2],
) -> Result<Prepared> {
    let tokenizer = Tokenizer::from_json_with_config(json.as_bytes(), config.as_bytes())
        .map_err(|source| Error::Tokenizer { name: plan.name.clone(), source })?;
    let end_of_text = tokenizer.eos().or_else(|| tokenizer.id_of(END_OF_TEXT)).ok_or(Error::NoEndOfText)?;
    let rule = rule(plan, files, &scan)?;
    Ok(Prepared {
        scan,
        rule,
        tokenizer,
        files: [(TOKENIZER, json), (TOKENIZER_CONFIG, config)],
        end_of_text,
        content: plan.read.content,
    })
}

fn rule(plan: &IngestPlan, files: &[InputFile], scan: &Scan) -> Result<SplitRule> {
    SplitRule::new(plan.validation_fraction, scan.hash_min, scan.hash_max).ok_or_else(|| {
        let names: Vec<_> = files.iter().take(3).map(|file| file.name.as_str()).collect();
        Error::OneDocument { name: names.join(", ") }
    })
}

fn checksum(files: &[String; 2]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        hash.update((file.len() as u64).to_le_bytes());
        hash.update(file);
    }
    hex::encode(hash.finalize())
}

fn scan(
    plan: &IngestPlan,
    files: &[InputFile],
    input_bytes: u64,
    progress: &mut dyn FnMut(IngestProgress),
) -> Result<(Scan, Sample)> {
    let mut scan = Scan {
        n_documents: 0,
        n_bytes: 0,
        n_rows_skipped: 0,
        hash_min: u64::MAX,
        hash_max: 0,
        hash_sum: 0,
        tokenizer_sha256: String::new(),
    };
    let is_trained = matches!(plan.tokenizer, TokenizerSource::Train { .. });
    let mut sample = Sample::new(if is_trained { plan.sample_bytes } else { 0 });
    let mut documents = Documents::new(files.to_vec(), plan.read.clone());
    for document in &mut documents {
        let text = document?.text;
        let hash = document_hash(&text);
        scan.n_documents += 1;
        scan.n_bytes += text.len() as u64;
        scan.hash_min = scan.hash_min.min(hash);
        scan.hash_max = scan.hash_max.max(hash);
        scan.hash_sum = scan.hash_sum.wrapping_add(hash);
        sample.add(hash, text);
        if scan.n_documents.is_multiple_of(REPORT_DOCUMENTS) {
            progress(scan_progress(&scan, input_bytes));
        }
    }
    progress(scan_progress(&scan, input_bytes));
    scan.n_rows_skipped = documents.n_skipped();
    if scan.n_documents == 0 {
        let names: Vec<_> = files.iter().take(3).map(|file| file.path.display().to_string()).collect();
        return Err(Error::NoDocuments { inputs: names.join(", ") });
    }
    Ok((scan, sample))
}

fn scan_progress(scan: &Scan, input_bytes: u64) -> IngestProgress {
    IngestProgress {
        stage: IngestStage::Scan,
        done: scan.n_bytes,
        total: input_bytes.max(scan.n_bytes),
        n_documents: scan.n_documents,
        n_tokens: 0,
    }
}

/// The different documents with the largest hashes that fit in a bound: a random choice that does not depend on their
/// order, and the opposite end of those that are held out.
#[derive(Debug)]
struct Sample {
    texts: BTreeMap<u64, String>,
    bytes: usize,
    bytes_max: usize,
    /// The largest hash that did not fit. A smaller one must not come in later, where there is room again.
    left_out: Option<u64>,
}

impl Sample {
    fn new(bytes_max: usize) -> Sample {
        Sample { texts: BTreeMap::new(), bytes: 0, bytes_max, left_out: None }
    }

    fn add(&mut self, hash: u64, mut text: String) {
        if self.left_out.is_some_and(|left_out| hash <= left_out) || self.texts.contains_key(&hash) {
            return;
        }
        // A single document that is longer than the sample gives its beginning.
        if text.len() > self.bytes_max {
            text.truncate(text.floor_char_boundary(self.bytes_max));
            text.shrink_to_fit();
        }
        self.bytes += text.len();
        self.texts.insert(hash, text);
        while self.bytes > self.bytes_max
            && let Some((hash, text)) = self.texts.pop_first()
        {
            self.bytes -= text.len();
            self.left_out = Some(hash);
        }
    }

    fn into_texts(self, is_wanted: impl Fn(u64) -> bool) -> Vec<String> {
        self.texts.into_iter().filter(|(hash, _)| is_wanted(*hash)).map(|(_, text)| text).collect()
    }
}

fn train(
    plan: &IngestPlan,
    vocab_size: usize,
    texts: &[String],
    progress: &mut dyn FnMut(IngestProgress),
) -> Result<Tokenizer> {
    let n_documents = texts.len() as u64;
    let mut report = |at: TrainProgress| {
        let (done, total) = (at.n_merges as u64, at.merges_wanted as u64);
        progress(IngestProgress { stage: IngestStage::Tokenizer, done, total, n_documents, n_tokens: 0 });
    };
    let trainer = BpeTrainer {
        special_tokens: vec![END_OF_TEXT.to_string()],
        n_threads: plan.n_threads.max(1),
        ..BpeTrainer::new(vocab_size)
    };
    let trained = trainer.train(texts, &mut report);
    trained.map_err(|source| Error::TrainTokenizer { name: plan.name.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_does_not_depend_on_the_order() {
        let texts: Vec<String> = (0..200).map(|i| format!("document {i} ").repeat(1 + i % 7)).collect();
        let sample = |order: &mut dyn Iterator<Item = &String>| {
            let mut sample = Sample::new(3000);
            order.for_each(|text| sample.add(document_hash(text), text.clone()));
            assert!(sample.bytes <= 3000 && sample.bytes > 2500, "{} bytes", sample.bytes);
            sample.into_texts(|_| true)
        };
        assert_eq!(sample(&mut texts.iter()), sample(&mut texts.iter().rev()));
    }

    #[test]
    fn a_document_longer_than_the_sample_gives_its_beginning() {
        let mut sample = Sample::new(10);
        sample.add(1, "äöüäöüäöü".to_string());
        assert_eq!(sample.into_texts(|_| true), ["äöüäö"]);
    }
}
