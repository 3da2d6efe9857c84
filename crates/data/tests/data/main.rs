//! From files to documents to a dataset and back, and what can go wrong on the way.

mod batches;
mod chats;
mod ingest;
mod killed;
mod parquet_file;
mod read;

use std::path::{Path, PathBuf};

/// A folder of input files that is gone at the end of the test.
pub(crate) struct Inputs(tempfile::TempDir);

impl Inputs {
    pub(crate) fn new() -> Inputs {
        Inputs(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Text that looks a little like text: words of a small vocabulary, the same for the same number.
pub(crate) fn text(number: u64, n_words: usize) -> String {
    const WORDS: [&str; 24] = [
        "the",
        "people",
        "of",
        "these",
        "states",
        "and",
        "their",
        "government",
        "have",
        "peace",
        "with",
        "all",
        "nations",
        "commerce",
        "revenue",
        "Congress",
        "treaty",
        "public",
        "welfare",
        "ä",
        "été",
        "日本",
        "1845",
        "to",
    ];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut words = Vec::with_capacity(n_words);
    for _ in 0..n_words {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words.push(WORDS[(state >> 40) as usize % WORDS.len()]);
    }
    format!("Document {number}. {}.\n", words.join(" "))
}
