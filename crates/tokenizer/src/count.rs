//! How often each word occurs in a text: the first half of training, on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use rustc_hash::FxHashMap;

use crate::cache::{self, key_of};
use crate::classes::classes;
use crate::scan::Scanner;

/// Text that is handed to the threads at once.
const BATCH_BYTES: usize = 16 << 20;

/// Word → how often. Short words are kept by value: no allocation, no pointer to follow.
#[derive(Default)]
struct Counts {
    short: FxHashMap<u128, u64>,
    long: FxHashMap<Box<[u8]>, u64>,
}

/// The words of `documents` with their counts, in an order that depends on nothing but the text: most frequent first,
/// then by bytes. `read` is told after each batch how many bytes have been counted.
pub(crate) fn count_words<S: AsRef<str> + Sync>(
    documents: impl IntoIterator<Item = S>,
    scanner: Scanner,
    n_threads: usize,
    text_bytes_max: u64,
    read: &mut dyn FnMut(u64),
) -> Vec<(Box<[u8]>, u64)> {
    let mut counts: Vec<Counts> = (0..n_threads.max(1)).map(|_| Counts::default()).collect();
    let mut documents = documents.into_iter();
    let mut bytes_read = 0;
    loop {
        let mut batch = Vec::new();
        let mut batch_bytes = 0;
        while batch_bytes < BATCH_BYTES && bytes_read + (batch_bytes as u64) < text_bytes_max {
            let Some(document) = documents.next() else { break };
            batch_bytes += document.as_ref().len();
            batch.push(document);
        }
        if batch.is_empty() {
            break;
        }
        count_batch(&mut counts, &batch, scanner);
        bytes_read += batch_bytes as u64;
        read(bytes_read);
    }
    sorted(counts)
}

fn count_batch<S: AsRef<str> + Sync>(counts: &mut [Counts], batch: &[S], scanner: Scanner) {
    let next = AtomicUsize::new(0);
    let work = |counts: &mut Counts| {
        while let Some(document) = batch.get(next.fetch_add(1, Ordering::Relaxed)) {
            counts.add(document.as_ref(), scanner);
        }
    };
    let Some((mine, others)) = counts.split_first_mut() else { return };
    std::thread::scope(|scope| {
        for counts in others.iter_mut().take(batch.len() - 1) {
            scope.spawn(|| work(counts));
        }
        work(mine);
    });
}

impl Counts {
    fn add(&mut self, text: &str, scanner: Scanner) {
        let text = text.as_bytes();
        scanner.scan(classes(), text, |start, end| {
            if end - start <= cache::WORD_BYTES_MAX {
                *self.short.entry(key_of(text, start, end)).or_default() += 1;
            } else if let Some(count) = self.long.get_mut(&text[start..end]) {
                *count += 1;
            } else {
                self.long.insert(text[start..end].into(), 1);
            }
        });
    }
}

fn sorted(counts: Vec<Counts>) -> Vec<(Box<[u8]>, u64)> {
    let mut counts = counts.into_iter();
    let mut all = counts.next().unwrap_or_default();
    for other in counts {
        for (key, count) in other.short {
            *all.short.entry(key).or_default() += count;
        }
        for (word, count) in other.long {
            *all.long.entry(word).or_default() += count;
        }
    }
    let short = all.short.into_iter().map(|(key, count)| {
        let len = (key >> 120) as usize;
        (key.to_le_bytes()[..len].into(), count)
    });
    let mut words: Vec<(Box<[u8]>, u64)> = short.chain(all.long).collect();
    words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    words
}
