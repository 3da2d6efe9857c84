//! The second pass: documents to tokens to shards, in parts, with a record after each.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use store::{BundleWriter, FileEntry, Store};

use crate::encode::{Encoded, LEARNED, encode, ids_of, marks_of};
use crate::info::{decode_tokens, encode_tokens, token_bytes};
use crate::input::InputFile;
use crate::prepare::Prepared;
use crate::read::row_of;
use crate::work::Work;
use crate::{
    BadRows, Document, Documents, Error, IngestPlan, IngestProgress, IngestStage, ReadOptions, Result, Split,
    SplitInfo,
};

const RECORD: &str = "tokens";

/// How far the second pass is: all that the next part needs to know of those before it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tokens {
    cursor: Cursor,
    /// See [`Scan`](crate::prepare::Scan).
    pub(crate) hash_sum: u64,
    /// Rows read; a row of chats may give several documents.
    pub(crate) n_rows: u64,
    /// Rows that the chat template refused, left out.
    pub(crate) n_rows_refused: u64,
    /// Whether the rows are pairs of answers, once one has been seen.
    pub(crate) is_pairs: Option<bool>,
    pub(crate) train: SplitTokens,
    pub(crate) validation: SplitTokens,
}

/// The next document to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Cursor {
    file_idx: usize,
    document_idx: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SplitTokens {
    pub(crate) info: SplitInfo,
    pub(crate) shards: Vec<FileEntry>,
    /// Of chats, what the tokens of each shard are.
    pub(crate) marks: Vec<FileEntry>,
    pub(crate) n_learned: u64,
    /// Tokens that do not fill a shard yet, with their marks: `n_tail` of them. In the record they follow the JSON as
    /// bytes.
    #[serde(skip)]
    tail: Vec<u32>,
    n_tail: usize,
}

/// Turns the documents into shards, stored but not published, from where the last record left off. Returns the
/// totals, and the writer that knows the shards.
pub(crate) fn tokenize(
    plan: &IngestPlan,
    files: &[InputFile],
    prepared: &Prepared,
    (store, work): (&Arc<dyn Store>, &Work),
    progress: &mut dyn FnMut(IngestProgress),
) -> Result<(Tokens, BundleWriter)> {
    let new_writer = || new_writer(plan, store);
    let (mut tokens, mut writer) = match recall(work, new_writer()?)? {
        Some(recalled) => recalled,
        None => (Tokens::default(), new_writer()?),
    };
    let mut reader = Reader { files, options: &plan.read, cursor: tokens.cursor, open: None };
    loop {
        progress(tokens.progress(prepared.scan.n_bytes));
        let part = reader.next_part(plan.part_bytes)?;
        let is_last = part.is_empty();
        let encoded = encode(prepared, plan.chat_template.as_ref(), &part, plan.n_threads);
        for (document, encoded) in part.iter().zip(encoded) {
            tokens.take(document, encoded, plan, prepared)?;
        }
        for split in Split::BOTH {
            tokens.split_mut(split).store_shards(split, plan, prepared, is_last, &mut writer)?;
        }
        if is_last {
            return Ok((tokens, writer));
        }
        tokens.cursor = reader.cursor;
        work.put(RECORD, &tokens.record())?;
    }
}

fn new_writer(plan: &IngestPlan, store: &Arc<dyn Store>) -> Result<BundleWriter> {
    BundleWriter::new(store, &format!("datasets/{}", plan.name)).map_err(Error::store(&plan.name))
}

/// The last record, if there is a whole one and all shards that it names are stored.
fn recall(work: &Work, mut writer: BundleWriter) -> Result<Option<(Tokens, BundleWriter)>> {
    let Some(tokens) = work.get(RECORD)?.and_then(|record| Tokens::from_record(&record)) else {
        return Ok(None);
    };
    let [train, validation] = [&tokens.train, &tokens.validation];
    for shard in [&train.shards, &train.marks, &validation.shards, &validation.marks].into_iter().flatten() {
        if !writer.add_stored(shard).map_err(Error::store(work.dataset()))? {
            return Ok(None);
        }
    }
    Ok(Some((tokens, writer)))
}

impl Tokens {
    fn split_mut(&mut self, split: Split) -> &mut SplitTokens {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
        }
    }

    fn take(
        &mut self,
        document: &Document,
        encoded: Encoded,
        plan: &IngestPlan,
        prepared: &Prepared,
    ) -> Result<()> {
        let Encoded { hash, documents, is_pair } = encoded;
        self.hash_sum = self.hash_sum.wrapping_add(hash);
        self.n_rows += 1;
        let path = Path::new(&document.source.path);
        let fail = |why: String| Error::row(path, row_of(path, document.source.index), why);
        let documents = match documents {
            Ok(documents) => documents,
            Err(_) if plan.read.bad_rows == BadRows::Skip => {
                self.n_rows_refused += 1;
                return Ok(());
            }
            Err(why) => return Err(fail(why)),
        };
        if *self.is_pairs.get_or_insert(is_pair) != is_pair {
            let why =
                "some rows are pairs of answers (chosen, rejected) and some are not: name the form to read";
            return Err(fail(why.into()));
        }
        let is_validation = prepared.rule.is_validation(hash);
        let split = self.split_mut(if is_validation { Split::Validation } else { Split::Train });
        for ids in &documents {
            split.tail.extend_from_slice(ids);
            split.info.n_tokens += ids.len() as u64;
            split.n_learned += ids.iter().filter(|id| **id & LEARNED != 0).count() as u64;
        }
        split.info.n_documents += documents.len() as u64;
        split.info.n_bytes += document.text.len() as u64;
        Ok(())
    }

    pub(crate) fn n_documents(&self) -> u64 {
        self.train.info.n_documents + self.validation.info.n_documents
    }

    fn progress(&self, total: u64) -> IngestProgress {
        IngestProgress {
            stage: IngestStage::Tokens,
            done: self.train.info.n_bytes + self.validation.info.n_bytes,
            total,
            n_documents: self.n_documents(),
            n_tokens: self.train.info.n_tokens + self.validation.info.n_tokens,
        }
    }

    /// A line with the SHA-256 of the rest, a line of JSON, and the tails.
    fn record(&mut self) -> Vec<u8> {
        for split in Split::BOTH {
            let split = self.split_mut(split);
            split.n_tail = split.tail.len();
        }
        let mut body = serde_json::to_vec(self).expect("a record is plain data");
        body.push(b'\n');
        body.extend(encode_tokens(&self.train.tail, 4));
        body.extend(encode_tokens(&self.validation.tail, 4));
        let mut record = hex::encode(Sha256::digest(&body)).into_bytes();
        record.push(b'\n');
        record.extend(body);
        record
    }

    /// `None` for a record that is damaged: the pass begins anew.
    fn from_record(record: &[u8]) -> Option<Tokens> {
        let (sha256, body) = record.split_at_checked(65)?;
        if hex::encode(Sha256::digest(body)).as_bytes() != sha256.strip_suffix(b"\n")? {
            return None;
        }
        let json_bytes = body.iter().position(|&b| b == b'\n')?;
        let mut tokens: Tokens = serde_json::from_slice(&body[..json_bytes]).ok()?;
        let mut tails = decode_tokens(&body[json_bytes + 1..], 4);
        for split in Split::BOTH {
            let split = tokens.split_mut(split);
            split.tail = tails.by_ref().take(split.n_tail).collect();
            if split.tail.len() != split.n_tail {
                return None;
            }
        }
        Some(tokens)
    }
}

impl SplitTokens {
    /// Stores the shards that are full, and at the end the one that is not.
    fn store_shards(
        &mut self,
        split: Split,
        plan: &IngestPlan,
        prepared: &Prepared,
        is_last: bool,
        writer: &mut BundleWriter,
    ) -> Result<()> {
        let token_bytes = token_bytes(prepared.tokenizer.vocab_size());
        let n_full = self.tail.len() - self.tail.len() % plan.shard_tokens;
        let n_stored = if is_last { self.tail.len() } else { n_full };
        for shard in self.tail[..n_stored].chunks(plan.shard_tokens) {
            let mut add =
                |file: &str, bytes: &[u8]| writer.add(file, bytes).map_err(Error::store(&plan.name));
            let at = self.shards.len();
            self.shards.push(add(&split.shard_file(at), &encode_tokens(&ids_of(shard), token_bytes))?);
            if plan.chat_template.is_some() {
                self.marks.push(add(&split.marks_file(at), &marks_of(shard))?);
            }
        }
        self.tail.drain(..n_stored);
        Ok(())
    }
}

/// Reads documents in parts from a cursor on.
struct Reader<'a> {
    files: &'a [InputFile],
    options: &'a ReadOptions,
    cursor: Cursor,
    open: Option<Documents>,
}

impl Reader<'_> {
    /// Documents of `part_bytes` of text or a little more; none at the end of the inputs.
    fn next_part(&mut self, part_bytes: usize) -> Result<Vec<Document>> {
        let (mut part, mut n_bytes) = (Vec::new(), 0);
        while part.is_empty() || n_bytes < part_bytes {
            let Some(document) = self.next()? else { break };
            n_bytes += document.text.len();
            part.push(document);
        }
        Ok(part)
    }

    fn next(&mut self) -> Result<Option<Document>> {
        while let Some(file) = self.files.get(self.cursor.file_idx) {
            if self.open.is_none() {
                let mut documents = Documents::new(vec![file.clone()], self.options.clone());
                for _ in 0..self.cursor.document_idx {
                    documents.next().transpose()?;
                }
                self.open = Some(documents);
            }
            match self.open.as_mut().and_then(Iterator::next) {
                Some(document) => {
                    self.cursor.document_idx += 1;
                    return document.map(Some);
                }
                None => {
                    self.open = None;
                    self.cursor = Cursor { file_idx: self.cursor.file_idx + 1, document_idx: 0 };
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_or_not_at_all() {
        let mut tokens =
            Tokens { hash_sum: 7, cursor: Cursor { file_idx: 3, document_idx: 9 }, ..Tokens::default() };
        tokens.train.tail = vec![1, 70_000, u32::MAX];
        tokens.validation.tail = vec![10, 0];
        tokens.train.shards.push(FileEntry::of("train-00000.bin", b"abc"));
        let record = tokens.record();
        assert_eq!(Tokens::from_record(&record), Some(tokens));
        for at in 0..record.len() {
            let mut flipped = record.clone();
            flipped[at] ^= 4;
            assert_eq!(Tokens::from_record(&flipped), None, "byte {at} flipped");
            assert_eq!(Tokens::from_record(&record[..at]), None, "cut at byte {at}");
        }
    }
}
