//! Outputs drawn at random from what a constraint allows.

use constrain::Grammars;
use engine::{Constraint, Continuation};
use tokenizer::{BpeTrainer, Tokenizer};

/// The ids of a small vocabulary: all bytes, some longer tokens, an end.
pub(crate) struct Model {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) end: u32,
    pub(crate) grammars: Grammars,
}

/// Logits may be wider than the vocabulary; these ids stand for nothing.
const N_UNUSED: usize = 70;

impl Model {
    pub(crate) fn new() -> Model {
        let tokenizer = trained();
        let end = tokenizer.eos().expect("it has an end");
        let grammars = Grammars::new(&tokenizer, tokenizer.vocab_size() + N_UNUSED, &[end]);
        Model { tokenizer, end, grammars }
    }

    /// The text of a random way through the grammar; `None` if it has no end within `n_max` tokens.
    pub(crate) fn walk(&self, constraint: &mut dyn Constraint, seed: u64, n_max: usize) -> Option<String> {
        let mut random = Random(seed);
        let mut ids = Vec::new();
        while ids.len() < n_max {
            let allowed = ids_of(constraint.allowed());
            assert!(!allowed.is_empty(), "nothing may follow {:?}", self.tokenizer.decode(&ids));
            assert!(allowed.iter().all(|&id| (id as usize) < self.tokenizer.vocab_size()), "{allowed:?}");
            // An end is taken where it is offered, or texts would be long.
            let id =
                if allowed.contains(&self.end) { self.end } else { allowed[random.below(allowed.len())] };
            if id == self.end {
                return Some(self.tokenizer.decode(&ids));
            }
            ids.push(id);
            if constraint.commit(id).expect("an allowed id is taken") == Continuation::Complete {
                return Some(self.tokenizer.decode(&ids));
            }
        }
        None
    }
}

impl Model {
    /// Whether this text can be said to its end. At every step the longest token that is allowed and goes on with the text
    /// is taken: in a text that fits, what is left behind any of them fits, too.
    pub(crate) fn says(&self, constraint: &dyn Constraint, text: &str) -> bool {
        let mut constraint = constraint.fork();
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let fits = |id: &u32| {
                let bytes = self.tokenizer.token_bytes(*id);
                !bytes.is_empty() && *id != self.end && rest.starts_with(bytes)
            };
            let allowed = ids_of(constraint.allowed()).into_iter().filter(fits);
            let Some(id) = allowed.max_by_key(|id| self.tokenizer.token_bytes(*id).len()) else {
                return false;
            };
            rest = &rest[self.tokenizer.token_bytes(id).len()..];
            if constraint.commit(id).expect("an allowed id is taken") == Continuation::Complete {
                return rest.is_empty();
            }
        }
        ids_of(constraint.allowed()).contains(&self.end)
    }
}

fn trained() -> Tokenizer {
    let text = include_str!("../../../../fixtures/text/1790_george_washington_n.txt");
    let special_tokens = ["<|endoftext|>", "<|im_start|>"].map(str::to_owned).into();
    let trainer = BpeTrainer { special_tokens, ..BpeTrainer::new(700) };
    let trained = trainer.train([text], &mut |_| {});
    trained.expect("a text trains a tokenizer")
}

/// The indices of the bits that are set.
pub(crate) fn ids_of(bits: &[u32]) -> Vec<u32> {
    (0..bits.len() as u32 * 32).filter(|id| bits[*id as usize / 32] >> (id % 32) & 1 == 1).collect()
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}
