//! Hand-coded scanners for the split patterns that nearly all byte-level tokenizers use.
//!
//! Each `next_*` function returns where the match that starts at `at` ends. The patterns always match at least one
//! character, so walking them covers a text without gaps; `tests/suite/golden.rs` and a property test hold them to the regular
//! expressions they stand for.

use crate::classes::{Classes, LETTER, NUMBER, OTHER, SPACE};

/// The patterns, as they are written in `tokenizer.json` files.
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(crate) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(crate) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A pattern with a scanner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scanner {
    Gpt2,
    /// Every number character apart first, then GPT-2's pattern (SmolLM2, StarCoder).
    DigitsGpt2,
    /// Llama 3 groups up to 3 number characters, Qwen 2 takes them one by one.
    Llama3 {
        digits_max: usize,
    },
}

impl Scanner {
    pub(crate) fn of_pattern(pattern: &str) -> Option<Scanner> {
        match pattern {
            GPT2 => Some(Scanner::Gpt2),
            LLAMA3 => Some(Scanner::Llama3 { digits_max: 3 }),
            QWEN2 => Some(Scanner::Llama3 { digits_max: 1 }),
            _ => None,
        }
    }

    /// Calls `piece(start, end)` for every match, in order.
    #[inline(always)]
    pub(crate) fn scan(self, classes: &Classes, text: &[u8], mut piece: impl FnMut(usize, usize)) {
        match self {
            Scanner::Gpt2 => walk(text, |at| next_gpt2::<false>(classes, text, at), &mut piece),
            Scanner::DigitsGpt2 => walk(text, |at| next_gpt2::<true>(classes, text, at), &mut piece),
            Scanner::Llama3 { digits_max } => {
                walk(text, |at| next_llama3(classes, text, at, digits_max), &mut piece);
            }
        }
    }
}

#[inline(always)]
fn walk(text: &[u8], next: impl Fn(usize) -> usize, piece: &mut impl FnMut(usize, usize)) {
    let mut at = 0;
    while at < text.len() {
        let end = next(at);
        piece(at, end);
        at = end;
    }
}

/// [`GPT2`]. With `DIGITS_APART`, number characters were cut out before: each is a piece, and ends the text for what
/// stands before it.
#[inline(always)]
fn next_gpt2<const DIGITS_APART: bool>(classes: &Classes, text: &[u8], at: usize) -> usize {
    let first = text[at];
    if first == b'\''
        && let Some(end) = contraction(text, at, |byte| byte)
    {
        return end;
    }
    let (class, len) = classes.at(text, at);
    if class == SPACE {
        if first == b' ' && at + 1 < text.len() {
            let (next_class, next_len) = classes.at(text, at + 1);
            if next_class != SPACE && !(DIGITS_APART && next_class == NUMBER) {
                return run(classes, text, at + 1 + next_len, next_class);
            }
        }
        return white_space::<DIGITS_APART>(classes, text, at);
    }
    if DIGITS_APART && class == NUMBER {
        return at + len;
    }
    run(classes, text, at + len, class)
}

/// [`LLAMA3`] and [`QWEN2`].
#[inline(always)]
fn next_llama3(classes: &Classes, text: &[u8], at: usize, digits_max: usize) -> usize {
    let first = text[at];
    if first == b'\''
        && let Some(end) =
            contraction(text, at, |byte| byte.to_ascii_lowercase()).or_else(|| long_s(text, at))
    {
        return end;
    }
    let (class, len) = classes.at(text, at);
    match class {
        LETTER => return run(classes, text, at + len, LETTER),
        NUMBER => return digits(classes, text, at + len, digits_max - 1),
        _ => {}
    }
    let after = at + len;
    let is_newline = first == b'\r' || first == b'\n';
    if after < text.len() && !is_newline {
        let (next_class, next_len) = classes.at(text, after);
        if next_class == LETTER {
            return run(classes, text, after + next_len, LETTER);
        }
        if first == b' ' && next_class == OTHER {
            return newlines(text, run(classes, text, after + next_len, OTHER));
        }
    }
    if class == OTHER {
        return newlines(text, run(classes, text, after, OTHER));
    }
    // White space: up to its last line break if it has one.
    let end = run(classes, text, at, SPACE);
    match text[at..end].iter().rposition(|&b| b == b'\r' || b == b'\n') {
        Some(last) => at + last + 1,
        None => white_space::<false>(classes, text, at),
    }
}

/// `'s 't 're 've 'm 'll 'd` at `at`, where the apostrophe stands.
#[inline(always)]
fn contraction(text: &[u8], at: usize, fold: impl Fn(u8) -> u8) -> Option<usize> {
    let first = fold(*text.get(at + 1)?);
    if matches!(first, b's' | b't' | b'm' | b'd') {
        return Some(at + 2);
    }
    let second = fold(*text.get(at + 2)?);
    matches!((first, second), (b'r', b'e') | (b'v', b'e') | (b'l', b'l')).then_some(at + 3)
}

/// U+017F, the long s, folds to `s`: `(?i:'s)` matches it.
fn long_s(text: &[u8], at: usize) -> Option<usize> {
    text[at + 1..].starts_with("\u{17F}".as_bytes()).then_some(at + 3)
}

/// `\s+(?!\S)|\s+`: a run of white space leaves its last character to what follows, if anything does.
#[inline(always)]
fn white_space<const DIGITS_APART: bool>(classes: &Classes, text: &[u8], at: usize) -> usize {
    let mut last = at;
    let mut end = at;
    while end < text.len() {
        let (class, len) = classes.at(text, end);
        if class != SPACE {
            let at_end_of_part = DIGITS_APART && class == NUMBER;
            return if at_end_of_part || last == at { end } else { last };
        }
        last = end;
        end += len;
    }
    end
}

/// End of the run of `class` that goes on at `at`.
#[inline(always)]
fn run(classes: &Classes, text: &[u8], mut at: usize, class: u8) -> usize {
    while at < text.len() {
        let (next_class, len) = classes.at(text, at);
        if next_class != class {
            break;
        }
        at += len;
    }
    at
}

#[inline(always)]
fn digits(classes: &Classes, text: &[u8], mut at: usize, mut left: usize) -> usize {
    while left > 0 && at < text.len() {
        let (class, len) = classes.at(text, at);
        if class != NUMBER {
            break;
        }
        at += len;
        left -= 1;
    }
    at
}

#[inline(always)]
fn newlines(text: &[u8], mut at: usize) -> usize {
    while at < text.len() && (text[at] == b'\r' || text[at] == b'\n') {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::classes::classes;

    fn scanned(scanner: Scanner, text: &str) -> Vec<&str> {
        let mut pieces = Vec::new();
        scanner.scan(classes(), text.as_bytes(), |start, end| pieces.push(&text[start..end]));
        pieces
    }

    /// Compiled once: the property test would spend its time on nothing else.
    static PATTERNS: LazyLock<[(Scanner, fancy_regex::Regex); 3]> = LazyLock::new(|| {
        let compile = |pattern| fancy_regex::Regex::new(pattern).expect("a constant");
        [
            (Scanner::Gpt2, compile(GPT2)),
            (Scanner::Llama3 { digits_max: 3 }, compile(LLAMA3)),
            (Scanner::Llama3 { digits_max: 1 }, compile(QWEN2)),
        ]
    });

    fn matched<'a>(pattern: &fancy_regex::Regex, text: &'a str) -> Vec<&'a str> {
        pattern.find_iter(text).map(|m| m.expect("these patterns do not backtrack far").as_str()).collect()
    }

    fn check(text: &str) {
        for (scanner, pattern) in &*PATTERNS {
            assert_eq!(scanned(*scanner, text), matched(pattern, text), "{scanner:?} {text:?}");
        }
        let gpt2 = &PATTERNS[0].1;
        let number = |c: char| c.is_numeric();
        let parts = text.split_inclusive(number).flat_map(|part| match part.chars().next_back() {
            Some(c) if number(c) => part.split_at(part.len() - c.len_utf8()).into(),
            _ => [part, ""],
        });
        let expected: Vec<&str> = parts.flat_map(|part| matched(gpt2, part)).collect();
        assert_eq!(scanned(Scanner::DigitsGpt2, text), expected, "{text:?}");
    }

    #[test]
    fn scanners_match_their_patterns_on_corner_cases() {
        for text in [
            "",
            "'",
            "''",
            "'s",
            "'S",
            "'ſ",
            "'\u{17F}x",
            "'re'VE'll'lL'x",
            "don't  I'm",
            " 's",
            "a  b",
            "a \n b",
            "\n\n a",
            "a \r\n\r\n",
            "  12345 67",
            " \t12",
            "x²Ⅷ½ 3",
            "...\n\n..",
            " ...\r\nx",
            "\u{a0}x\u{a0}\u{a0}y",
            "\u{3000}中文 字",
            "e\u{301} \u{301}",
            "👍🏽 👍",
            "\tif x:\n\t\treturn",
            "   ",
            "a   ",
            "_a_ $b",
            "\u{85}\u{2028}x",
            " \u{a0}\u{a0}1",
        ] {
            check(text);
        }
    }

    proptest! {
        #[test]
        fn scanners_match_their_patterns(text in r"([ \n\r\t'\u{a0}\u{3000}]|[a-z]|[0-9²]|[SLVEſ]|[.!_\u{301}]|中|👍|'(s|ll|RE|d)){0,24}") {
            check(&text);
        }
    }
}
