//! Cutting a normalized text into the pieces that are merged one by one.

use std::ops::Range;
use std::sync::Arc;

use crate::classes::{Classes, NUMBER, classes};
use crate::scan::Scanner;
use crate::spec::SPACE_MARK;
use crate::{Error, Result};

/// Bytes a split pattern may have. The longest known one has about 400.
const PATTERN_BYTES_MAX: usize = 16 << 10;
/// Split steps a tokenizer may have. DeepSeek's has 4.
const STEPS_MAX: usize = 16;

/// One `pre_tokenizer` of a `tokenizer.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SplitStep {
    /// GPT-2's pattern, or nothing if `use_regex` is off; that symbols are bytes is said by `Spec::symbols`.
    ByteLevel { add_prefix_space: bool, use_regex: bool },
    /// Number characters one by one, or in runs.
    Digits { individual: bool },
    /// A regular expression, or a plain string if `literal`.
    Pattern { pattern: String, literal: bool, behavior: Behavior, invert: bool },
    /// Spaces become `▁`, and pieces start at it if `split`.
    Metaspace { prepend: PrependMark, split: bool },
}

/// What becomes of the matches of a pattern; with `invert`, of what lies between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behavior {
    Removed,
    Isolated,
    MergedWithPrevious,
    MergedWithNext,
    Contiguous,
}

/// Which pieces get a `▁` put before them, unless they have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrependMark {
    First,
    Always,
    Never,
}

/// The steps, compiled.
#[derive(Debug)]
pub(crate) enum Splitter {
    /// No step: the whole text is one piece.
    Whole,
    /// Steps that one of our scanners does in one go.
    Scanner(Scanner),
    Steps(Vec<Step>),
}

#[derive(Debug)]
pub(crate) enum Step {
    Scanner(Scanner),
    PrefixSpace,
    DigitRuns,
    Pattern { pattern: Arc<fancy_regex::Regex>, behavior: Behavior, invert: bool },
    Metaspace { prepend: PrependMark, split: bool },
}

impl Splitter {
    pub(crate) fn new(steps: &[SplitStep]) -> Result<Splitter> {
        if steps.len() > STEPS_MAX {
            return Err(Error::field("pre_tokenizer", format!("has more than {STEPS_MAX} steps")));
        }
        let mut compiled = Vec::new();
        for step in steps {
            compile(step, &mut compiled)?;
        }
        // Digits apart and then GPT-2's pattern is common enough to have a scanner of its own.
        if let [Step::Pattern { .. }, Step::Scanner(Scanner::Gpt2)] = compiled[..]
            && matches!(steps[0], SplitStep::Digits { individual: true })
        {
            return Ok(Splitter::Scanner(Scanner::DigitsGpt2));
        }
        Ok(match compiled[..] {
            [] => Splitter::Whole,
            [Step::Scanner(scanner)] => Splitter::Scanner(scanner),
            _ => Splitter::Steps(compiled),
        })
    }

    /// Calls `piece(text, start, end)` for every piece, in order; `text` is `whole` itself or a changed copy of a part.
    #[inline(always)]
    pub(crate) fn split(&self, whole: &str, is_first: bool, mut piece: impl FnMut(&str, usize, usize)) {
        match self {
            Splitter::Whole => piece(whole, 0, whole.len()),
            Splitter::Scanner(scanner) => {
                scanner.scan(classes(), whole.as_bytes(), |start, end| piece(whole, start, end));
            }
            Splitter::Steps(steps) => split_by_steps(steps, whole, is_first, &mut |part| {
                piece(part, 0, part.len());
            }),
        }
    }
}

fn compile(step: &SplitStep, compiled: &mut Vec<Step>) -> Result<()> {
    match step {
        SplitStep::ByteLevel { add_prefix_space, use_regex } => {
            compiled.extend(add_prefix_space.then_some(Step::PrefixSpace));
            compiled.extend(use_regex.then_some(Step::Scanner(Scanner::Gpt2)));
        }
        SplitStep::Digits { individual: true } => {
            let pattern = compile_pattern(r"\p{N}")?;
            compiled.push(Step::Pattern { pattern, behavior: Behavior::Isolated, invert: false });
        }
        SplitStep::Digits { individual: false } => compiled.push(Step::DigitRuns),
        SplitStep::Pattern { pattern, literal, behavior, invert } => {
            let scanner = Scanner::of_pattern(pattern);
            // These patterns cover every text: what lies between matches is nothing.
            let keeps_matches =
                matches!((behavior, invert), (Behavior::Isolated, _) | (Behavior::Removed, true));
            compiled.push(match scanner {
                Some(scanner) if keeps_matches && !literal => Step::Scanner(scanner),
                _ => {
                    let source = if *literal { fancy_regex::escape(pattern) } else { pattern.into() };
                    Step::Pattern { pattern: compile_pattern(&source)?, behavior: *behavior, invert: *invert }
                }
            });
        }
        SplitStep::Metaspace { prepend, split } => {
            compiled.push(Step::Metaspace { prepend: *prepend, split: *split });
        }
    }
    Ok(())
}

fn compile_pattern(pattern: &str) -> Result<Arc<fancy_regex::Regex>> {
    let field = "pre_tokenizer.pattern";
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(Error::field(field, format!("has more than {PATTERN_BYTES_MAX} bytes")));
    }
    let regex = fancy_regex::RegexBuilder::new(pattern).backtrack_limit(1_000_000).build();
    regex.map(Arc::new).map_err(|source| Error::Pattern { field: field.into(), source: Box::new(source) })
}

/// Applies the first step and hands each of its pieces to the rest.
fn split_by_steps(steps: &[Step], text: &str, is_first: bool, piece: &mut dyn FnMut(&str)) {
    let Some((step, rest)) = steps.split_first() else {
        return piece(text);
    };
    let mut part_is_first = is_first;
    let mut next = |part: &str| {
        if !part.is_empty() {
            split_by_steps(rest, part, part_is_first, piece);
            part_is_first = false;
        }
    };
    match step {
        Step::Scanner(scanner) => {
            scanner.scan(classes(), text.as_bytes(), |start, end| next(&text[start..end]));
        }
        Step::PrefixSpace if text.starts_with(' ') => next(text),
        Step::PrefixSpace => next(&format!(" {text}")),
        Step::DigitRuns => {
            let parts = cover(text.len(), number_runs(classes(), text.as_bytes()));
            behave(Behavior::Contiguous, parts).into_iter().for_each(|range| next(&text[range]));
        }
        Step::Pattern { pattern, behavior, invert } => {
            let mut parts = cover(text.len(), matches_of(pattern, text));
            parts.iter_mut().for_each(|part| part.1 ^= invert);
            behave(*behavior, parts).into_iter().for_each(|range| next(&text[range]));
        }
        Step::Metaspace { prepend, split } => {
            let marked = mark_spaces(text, *prepend, is_first);
            let parts = match split {
                true => cover(marked.len(), marked.match_indices(SPACE_MARK).map(|(i, m)| i..i + m.len())),
                false => vec![(0..marked.len(), false)],
            };
            behave(Behavior::MergedWithNext, parts).into_iter().for_each(|range| next(&marked[range]));
        }
    }
}

fn mark_spaces(text: &str, prepend: PrependMark, is_first: bool) -> String {
    let marked = text.replace(' ', SPACE_MARK);
    let wants = match prepend {
        PrependMark::First => is_first,
        PrependMark::Always => true,
        PrependMark::Never => false,
    };
    if wants && !marked.starts_with(SPACE_MARK) { format!("{SPACE_MARK}{marked}") } else { marked }
}

/// The matches of a pattern. A pattern that backtracks too far finds nothing more in this text: what is left of it stays
/// one piece, which is slow to spell but loses nothing.
fn matches_of<'a>(pattern: &'a fancy_regex::Regex, text: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
    pattern.find_iter(text).map_while(|found| found.ok()).map(|found| found.range())
}

fn number_runs<'a>(classes: &'a Classes, text: &'a [u8]) -> impl Iterator<Item = Range<usize>> + 'a {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < text.len() {
            let (class, len) = classes.at(text, at);
            at += len;
            if class == NUMBER {
                return Some(at - len..at);
            }
        }
        None
    })
}

/// The matches and the gaps between them, each with whether it is a match.
fn cover(len: usize, matches: impl Iterator<Item = Range<usize>>) -> Vec<(Range<usize>, bool)> {
    let mut parts = Vec::new();
    let mut done = 0;
    for found in matches.filter(|found| !found.is_empty()) {
        if done < found.start {
            parts.push((done..found.start, false));
        }
        done = found.end;
        parts.push((found, true));
    }
    if done < len {
        parts.push((done..len, false));
    }
    parts
}

/// Pieces as Hugging Face's `SplitDelimiterBehavior` makes them.
fn behave(behavior: Behavior, parts: Vec<(Range<usize>, bool)>) -> Vec<Range<usize>> {
    let joins = |before: bool, after: bool| match behavior {
        Behavior::Removed | Behavior::Isolated => false,
        Behavior::MergedWithPrevious => !before && after,
        Behavior::MergedWithNext => before && !after,
        Behavior::Contiguous => before == after,
    };
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut before = None;
    for (range, is_match) in parts {
        if behavior == Behavior::Removed && is_match {
            continue;
        }
        match (pieces.last_mut(), before) {
            (Some(piece), Some(before)) if joins(before, is_match) => piece.end = range.end,
            _ => pieces.push(range),
        }
        before = Some(is_match);
    }
    pieces
}

/// Whether steps are those of a byte-level tokenizer.
pub(crate) fn is_byte_level(steps: &[SplitStep]) -> bool {
    steps.iter().any(|step| matches!(step, SplitStep::ByteLevel { .. }))
}

/// The step that most byte-level tokenizers have: GPT-2's pattern.
pub(crate) fn gpt2() -> SplitStep {
    SplitStep::ByteLevel { add_prefix_space: false, use_regex: true }
}

/// A pattern's matches apart, as Llama 3 and Qwen 2 write it.
pub(crate) fn pattern_then_bytes(pattern: &str) -> Vec<SplitStep> {
    vec![
        SplitStep::Pattern {
            pattern: pattern.into(),
            literal: false,
            behavior: Behavior::Isolated,
            invert: false,
        },
        SplitStep::ByteLevel { add_prefix_space: false, use_regex: false },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan;

    fn pieces(steps: &[SplitStep], text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        let splitter = Splitter::new(steps).expect("these steps are right");
        splitter.split(text, true, |text, start, end| pieces.push(text[start..end].to_owned()));
        pieces
    }

    fn pattern(pattern: &str, behavior: Behavior) -> SplitStep {
        SplitStep::Pattern { pattern: pattern.into(), literal: false, behavior, invert: false }
    }

    #[test]
    fn behaviors_are_those_documented_by_hugging_face() {
        // The example of `SplitDelimiterBehavior`'s documentation.
        let text = "the-final--countdown";
        for (behavior, expected) in [
            (Behavior::Removed, "the|final|countdown"),
            (Behavior::Isolated, "the|-|final|-|-|countdown"),
            (Behavior::MergedWithPrevious, "the-|final-|-|countdown"),
            (Behavior::MergedWithNext, "the|-final|-|-countdown"),
            (Behavior::Contiguous, "the|-|final|--|countdown"),
        ] {
            assert_eq!(pieces(&[pattern("-", behavior)], text).join("|"), expected, "{behavior:?}");
        }
    }

    #[test]
    fn steps_compose() {
        let digits = SplitStep::Digits { individual: true };
        let runs = SplitStep::Digits { individual: false };
        assert_eq!(pieces(&[digits.clone(), gpt2()], "a  12"), ["a", "  ", "1", "2"]);
        assert_eq!(pieces(&[runs, gpt2()], "a  12 b"), ["a", "  ", "12", " b"]);
        let prefix = SplitStep::ByteLevel { add_prefix_space: true, use_regex: true };
        assert_eq!(pieces(&[digits, prefix], "a1"), [" a", " 1"]);
        let metaspace = SplitStep::Metaspace { prepend: PrependMark::First, split: true };
        assert_eq!(pieces(&[metaspace], "a  bc d"), ["▁a", "▁", "▁bc", "▁d"]);
    }

    #[test]
    fn hostile_patterns_end() {
        let text = "a".repeat(64) + "b";
        assert_eq!(pieces(&[pattern("(?=(a+)+$)x", Behavior::Isolated)], &text).concat(), text);
        assert!(Splitter::new(&[pattern("(a", Behavior::Isolated)]).is_err());
        assert!(Splitter::new(&[pattern(&"a".repeat(20_000), Behavior::Isolated)]).is_err());
        assert!(Splitter::new(&[pattern("(a{1000}){1000}", Behavior::Isolated)]).is_err());
    }

    #[test]
    fn known_patterns_get_scanners() {
        for (steps, expected) in [
            (vec![gpt2()], Scanner::Gpt2),
            (vec![SplitStep::Digits { individual: true }, gpt2()], Scanner::DigitsGpt2),
            (pattern_then_bytes(scan::LLAMA3), Scanner::Llama3 { digits_max: 3 }),
            (pattern_then_bytes(scan::QWEN2), Scanner::Llama3 { digits_max: 1 }),
        ] {
            assert!(matches!(Splitter::new(&steps), Ok(Splitter::Scanner(scanner)) if scanner == expected));
        }
    }
}
