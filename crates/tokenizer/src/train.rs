//! Learning a byte-level BPE vocabulary from text (Sennrich et al. 2016, arXiv:1508.07909).
//!
//! The most frequent pair of neighbours becomes a token, again and again. Counts of pairs are kept up to date instead of
//! counted anew: a merge only visits the words in which its pair stands. Ties go to the lowest pair of ids, as in Hugging
//! Face `tokenizers`, whose trainer gives the same vocabulary.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::alphabet;
use crate::count::count_words;
use crate::scan::Scanner;
use crate::spec::{AddedToken, Merge, Spec, Symbols, Token, VOCAB_MAX};
use crate::split::gpt2;
use crate::tokenizer::{TokenId, Tokenizer};
use crate::{Error, Result};

/// Merges between two calls of the progress callback.
const PROGRESS_MERGES: usize = 256;
/// Symbols all distinct words may have together: positions are 32 bits.
const SYMBOLS_MAX: usize = u32::MAX as usize;

/// What to learn. Ids: special tokens first, then the 256 bytes, then merges in the order they were learned.
#[derive(Debug, Clone)]
pub struct BpeTrainer {
    /// Ids wanted, special tokens and bytes included. A short text may give fewer.
    pub vocab_size: usize,
    /// The first is taken for beginning and end of text.
    pub special_tokens: Vec<String>,
    /// Threads that count words. The result does not depend on it.
    pub n_threads: usize,
    /// Text after this many bytes is not read: what bounds memory.
    pub text_bytes_max: u64,
    /// Pairs seen less often are not learned.
    pub count_min: u64,
}

/// How far training is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainProgress {
    pub text_bytes: u64,
    pub n_merges: usize,
    pub merges_wanted: usize,
}

impl BpeTrainer {
    /// `<|endoftext|>` and defaults.
    pub fn new(vocab_size: usize) -> BpeTrainer {
        BpeTrainer {
            vocab_size,
            special_tokens: vec!["<|endoftext|>".into()],
            n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            text_bytes_max: 4 << 30,
            count_min: 2,
        }
    }

    /// Learns from `documents`, split by GPT-2's pattern; special tokens in them are plain text. The same documents in
    /// any order give the same tokenizer (unless there are more than `text_bytes_max`).
    pub fn train<S: AsRef<str> + Sync>(
        &self,
        documents: impl IntoIterator<Item = S>,
        progress: &mut dyn FnMut(TrainProgress),
    ) -> Result<Tokenizer> {
        let merges_wanted = self.check()?;
        let mut at = TrainProgress { text_bytes: 0, n_merges: 0, merges_wanted };
        let words =
            count_words(documents, Scanner::Gpt2, self.n_threads, self.text_bytes_max, &mut |bytes| {
                at.text_bytes = bytes;
                progress(at);
            });
        let mut vocab = Vocab::new(&self.special_tokens);
        let mut pairs = Pairs::new(words, &vocab)?;
        let mut merges = Vec::new();
        while vocab.tokens.len() < self.vocab_size {
            let Some((left, right)) = pairs.take_most_frequent(self.count_min) else { break };
            let result = vocab.join(left, right);
            merges.push(Merge { left, right, result, rank: merges.len() as u32 });
            pairs.merge(left, right, result);
            if merges.len() % PROGRESS_MERGES == 0 {
                at.n_merges = merges.len();
                progress(at);
            }
        }
        at.n_merges = merges.len();
        progress(at);
        self.finish(vocab, merges)
    }

    fn check(&self) -> Result<usize> {
        let n_fixed = self.special_tokens.len() + 256;
        if !(n_fixed..=VOCAB_MAX).contains(&self.vocab_size) {
            let wanted = self.vocab_size;
            return Err(Error::Train(format!(
                "{wanted} ids are wanted, which is not {n_fixed} to {VOCAB_MAX}"
            )));
        }
        for (i, token) in self.special_tokens.iter().enumerate() {
            // One byte is what the alphabet holds already.
            if token.len() < 2 || self.special_tokens[..i].contains(token) {
                return Err(Error::Train(format!("special token {token:?} is too short or listed twice")));
            }
        }
        Ok(self.vocab_size - n_fixed)
    }

    fn finish(&self, vocab: Vocab, merges: Vec<Merge>) -> Result<Tokenizer> {
        let end_of_text = (!self.special_tokens.is_empty()).then_some(0);
        let tokens = vocab.tokens.into_iter().enumerate().map(|(id, bytes)| {
            // A special token that GPT-2's alphabet cannot spell stands for itself.
            let text = self.special_tokens.get(id);
            let literal = text.is_some_and(|text| alphabet::unspell(text).is_none());
            Token { bytes, literal, in_model: true }
        });
        Tokenizer::new(Spec {
            tokens: tokens.collect(),
            symbols: Symbols::Bytes,
            merges,
            added: (0..).zip(&self.special_tokens).map(|(id, text)| AddedToken::special(id, text)).collect(),
            split: vec![gpt2()],
            bos: end_of_text,
            eos: end_of_text,
            ..Spec::default()
        })
    }
}

/// The tokens learned so far.
struct Vocab {
    tokens: Vec<Box<[u8]>>,
    ids: FxHashMap<Box<[u8]>, TokenId>,
}

impl Vocab {
    fn new(special_tokens: &[String]) -> Vocab {
        let special = special_tokens.iter().map(|token| token.as_bytes().into());
        let bytes = alphabet::bytes_in_spelling_order().into_iter().map(|byte| [byte].into());
        let tokens: Vec<Box<[u8]>> = special.chain(bytes).collect();
        let ids = (0..).zip(&tokens).map(|(id, token)| (token.clone(), id)).collect();
        Vocab { tokens, ids }
    }

    /// The token that spells both; two pairs can spell the same.
    fn join(&mut self, left: TokenId, right: TokenId) -> TokenId {
        let joint = [&*self.tokens[left as usize], &*self.tokens[right as usize]].concat().into_boxed_slice();
        let new = self.tokens.len() as TokenId;
        *self.ids.entry(joint).or_insert_with_key(|joint| {
            self.tokens.push(joint.clone());
            new
        })
    }
}

/// The distinct words as symbols, and all pairs of neighbours in them.
struct Pairs {
    /// All words end to end. A word that shrinks leaves room behind it.
    symbols: Vec<TokenId>,
    words: Vec<Word>,
    /// Left in the high, right in the low 32 bits → index in `stats`.
    index: FxHashMap<u64, u32>,
    stats: Vec<PairStat>,
    /// Count when pushed, then the lowest pair first. A pair whose count fell meanwhile is pushed again when it comes up.
    heap: BinaryHeap<(i64, Reverse<u64>)>,
}

struct Word {
    start: u32,
    len: u32,
    count: i64,
}

#[derive(Default)]
struct PairStat {
    count: i64,
    /// Where the pair stood when it was added: a superset of where it stands.
    words: Vec<u32>,
}

impl Pairs {
    fn new(counted: Vec<(Box<[u8]>, u64)>, vocab: &Vocab) -> Result<Pairs> {
        let n_symbols: usize = counted.iter().map(|(word, _)| word.len()).sum();
        if n_symbols > SYMBOLS_MAX {
            return Err(Error::Train("the distinct words of the text have more than 4 GiB".into()));
        }
        let byte_ids: [TokenId; 256] = std::array::from_fn(|byte| vocab.ids[&[byte as u8][..]]);
        let mut pairs = Pairs {
            symbols: Vec::with_capacity(n_symbols),
            words: Vec::with_capacity(counted.len()),
            index: FxHashMap::default(),
            stats: Vec::new(),
            heap: BinaryHeap::new(),
        };
        for (word_idx, (word, count)) in (0..).zip(&counted) {
            let start = pairs.symbols.len();
            pairs.symbols.extend(word.iter().map(|&byte| byte_ids[byte as usize]));
            let count = *count as i64;
            pairs.words.push(Word { start: start as u32, len: word.len() as u32, count });
            for at in start..pairs.symbols.len() - 1 {
                let pair = pack(pairs.symbols[at], pairs.symbols[at + 1]);
                pairs.add(pair, count, word_idx);
            }
        }
        let entries = pairs.index.iter().map(|(&pair, &i)| (pairs.stats[i as usize].count, Reverse(pair)));
        pairs.heap = entries.collect();
        Ok(pairs)
    }

    /// The most frequent pair, lowest ids first among equals.
    fn take_most_frequent(&mut self, count_min: u64) -> Option<(TokenId, TokenId)> {
        loop {
            let (count, Reverse(pair)) = self.heap.pop()?;
            let now = self.index.get(&pair).map_or(0, |&i| self.stats[i as usize].count);
            if now != count {
                if now > 0 {
                    self.heap.push((now, Reverse(pair)));
                }
                continue;
            }
            return (count as u64 >= count_min.max(1)).then_some(((pair >> 32) as TokenId, pair as TokenId));
        }
    }

    /// Joins the pair in all words.
    fn merge(&mut self, left: TokenId, right: TokenId, result: TokenId) {
        let Some(i) = self.index.remove(&pack(left, right)) else { return };
        let PairStat { words, .. } = std::mem::take(&mut self.stats[i as usize]);
        let mut touched = Vec::new();
        for word_idx in words {
            self.merge_in_word(word_idx, left, right, result, &mut touched);
        }
        touched.sort_unstable();
        touched.dedup();
        for pair in touched {
            let count = self.index.get(&pair).map_or(0, |&i| self.stats[i as usize].count);
            if count > 0 {
                self.heap.push((count, Reverse(pair)));
            }
        }
    }

    /// Joins the pair in one word, from the left, and moves the counts of the neighbours; `touched` gets the pairs that
    /// became more frequent.
    fn merge_in_word(
        &mut self,
        word_idx: u32,
        left: TokenId,
        right: TokenId,
        result: TokenId,
        touched: &mut Vec<u64>,
    ) {
        let Word { start, len, count } = self.words[word_idx as usize];
        let (start, end) = (start as usize, (start + len) as usize);
        let mut read = start;
        let mut write = start;
        while read < end {
            let symbol = self.symbols[read];
            if symbol != left || read + 1 == end || self.symbols[read + 1] != right {
                self.symbols[write] = symbol;
                write += 1;
                read += 1;
                continue;
            }
            if write > start {
                let before = self.symbols[write - 1];
                self.subtract(pack(before, left), count);
                self.add(pack(before, result), count, word_idx);
                touched.push(pack(before, result));
            }
            if read + 2 < end {
                let after = self.symbols[read + 2];
                self.subtract(pack(right, after), count);
                self.add(pack(result, after), count, word_idx);
                touched.push(pack(result, after));
            }
            self.symbols[write] = result;
            write += 1;
            read += 2;
        }
        self.words[word_idx as usize].len = (write - start) as u32;
    }

    fn add(&mut self, pair: u64, count: i64, word_idx: u32) {
        let next = self.stats.len() as u32;
        let i = *self.index.entry(pair).or_insert(next);
        if i == next {
            self.stats.push(PairStat::default());
        }
        let stat = &mut self.stats[i as usize];
        stat.count += count;
        if stat.words.last() != Some(&word_idx) {
            stat.words.push(word_idx);
        }
    }

    fn subtract(&mut self, pair: u64, count: i64) {
        // The pair that is being merged has left the index: its count no longer matters.
        if let Some(&i) = self.index.get(&pair) {
            self.stats[i as usize].count -= count;
        }
    }
}

fn pack(left: TokenId, right: TokenId) -> u64 {
    (left as u64) << 32 | right as u64
}
