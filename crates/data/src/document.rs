use std::path::{Path, PathBuf};

use crate::error::Place;
use crate::input::{InputFile, input_files};
use crate::read::{self, Rows};
use crate::{Error, Form, Result};

/// The longest document, decompressed; also the longest JSONL line. It bounds the memory of every reader.
const DOCUMENT_BYTES_MAX: usize = 64 << 20;

/// A text and where it came from. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub text: String,
    pub source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The input file as the dataset records it: relative to the folder that the named input lies in.
    pub path: String,
    /// Line (text, JSONL) or row (JSON, Parquet) at which the document begins, from 1.
    pub index: u64,
}

/// What to do with a row that cannot be read (bad JSON, no text field, not UTF-8, too long).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadRows {
    /// Stop with an error that names file and row.
    #[default]
    Refuse,
    /// Leave it out and count it. A file that breaks off (truncated gzip) is an error all the same.
    Skip,
}

/// What rows hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    #[default]
    Text,
    /// Chats in JSON: the document's text is the row as it stands, checked. Of a named form, or of that which each
    /// row's fields tell.
    Chats(Option<Form>),
}

/// How files become documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    pub content: Content,
    /// The field (JSON) or column (Parquet) that holds the text.
    pub text_field: String,
    /// In text files, a line that stands between documents, such as `<|endoftext|>`. `None`: a file is a document.
    pub separator: Option<String>,
    pub bad_rows: BadRows,
    pub document_bytes_max: usize,
}

impl Default for ReadOptions {
    fn default() -> ReadOptions {
        ReadOptions {
            content: Content::Text,
            text_field: "text".to_string(),
            separator: None,
            bad_rows: BadRows::Refuse,
            document_bytes_max: DOCUMENT_BYTES_MAX,
        }
    }
}

/// The documents of a file, or of a directory (its files at any depth, sorted by path), in order.
///
/// Rows whose text is empty or white space are no documents. A file that gives none is an error.
pub fn documents(path: &Path, options: &ReadOptions) -> Result<Documents> {
    let files = input_files(&[path.to_path_buf()])?.files;
    Ok(Documents::new(files, options.clone()))
}

/// See [`documents`]. After an error it ends.
pub struct Documents {
    files: std::vec::IntoIter<InputFile>,
    options: ReadOptions,
    /// The file being read.
    open: Option<OpenFile>,
    n_skipped: u64,
}

struct OpenFile {
    file: InputFile,
    rows: Box<dyn Rows>,
    n_documents: u64,
}

impl Documents {
    pub(crate) fn new(files: Vec<InputFile>, options: ReadOptions) -> Documents {
        Documents { files: files.into_iter(), options, open: None, n_skipped: 0 }
    }

    /// Rows left out so far under [`BadRows::Skip`].
    pub fn n_skipped(&self) -> u64 {
        self.n_skipped
    }

    /// The file that the last document came from is done, as far as is known.
    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            let open = match &mut self.open {
                Some(open) => open,
                None => match self.files.next() {
                    None => return Ok(None),
                    Some(file) => {
                        let rows = read::open(&file.path, &self.options)?;
                        self.open.insert(OpenFile { file, rows, n_documents: 0 })
                    }
                },
            };
            match open.rows.next_row() {
                Some(Ok((_, text))) if text.trim().is_empty() => {}
                Some(Ok((index, text))) => {
                    open.n_documents += 1;
                    let source = Source { path: open.file.name.clone(), index };
                    return Ok(Some(Document { text, source }));
                }
                Some(Err(Error::Row { .. })) if self.options.bad_rows == BadRows::Skip => self.n_skipped += 1,
                Some(Err(error)) => return Err(error),
                None if open.n_documents == 0 && self.options.bad_rows == BadRows::Refuse => {
                    return Err(Error::Empty { path: open.file.path.clone() });
                }
                None => self.open = None,
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Result<Document>> {
        let next = self.advance();
        if next.is_err() {
            self.files = Vec::new().into_iter();
            self.open = None;
        }
        next.transpose()
    }
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open: Option<&PathBuf> = self.open.as_ref().map(|open| &open.file.path);
        f.debug_struct("Documents").field("open", &open).field("n_files_left", &self.files.len()).finish()
    }
}

/// UTF-8 without NUL, or why it is not text. `first_line` is the number of the line that `bytes` begins with.
pub(crate) fn text_of(path: &Path, first_line: u64, bytes: Vec<u8>) -> Result<String> {
    let line_at =
        |at: usize, bytes: &[u8]| first_line + bytes[..at].iter().filter(|&&b| b == b'\n').count() as u64;
    if let Some(at) = bytes.iter().position(|&b| b == 0) {
        let line = Place::Line(line_at(at, &bytes));
        return Err(Error::row(path, line, "a zero byte: this is a binary file, not text"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = Place::Line(line_at(at, error.as_bytes()));
        Error::row(path, line, "not UTF-8")
    })
}
