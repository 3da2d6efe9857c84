//! Whether an answer in words is the expected one, as lm-evaluation-harness compares.

use crate::item::Expected;

/// Where the answers of GSM8K begin.
const MARK: &str = "#### ";

/// The ways in which an answer may be right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Verdict {
    /// In the form that was shown.
    pub(crate) strict: bool,
    /// In any form: the last number there is.
    pub(crate) flexible: bool,
}

pub(crate) fn judge(said: &str, expected: &Expected) -> Verdict {
    match expected {
        Expected::Number(number) => {
            let number = bare(number);
            let is_it = |found: Option<&str>| found.is_some_and(|found| bare(found) == number);
            let marked = said.find(MARK).map(|at| &said[at + MARK.len()..]);
            let strict = marked.map(|rest| &rest[..rest.find(|c| !in_number(c)).unwrap_or(rest.len())]);
            Verdict { strict: is_it(strict), flexible: is_it(last_number(said)) }
        }
        Expected::AnyOf(accepted) => {
            let said = plain(said);
            let right = accepted.iter().any(|accepted| plain(accepted) == said);
            Verdict { strict: right, flexible: right }
        }
    }
}

fn in_number(c: char) -> bool {
    c.is_ascii_digit() || ['-', '.', ','].contains(&c)
}

/// Without what people write into numbers.
fn bare(number: &str) -> String {
    let number: String = number.chars().filter(|&c| c != ',' && c != '$').collect();
    number.strip_suffix('.').map_or(number.clone(), str::to_owned)
}

fn last_number(text: &str) -> Option<&str> {
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let inside = |c: char| c.is_ascii_digit() || ['$', '.', ','].contains(&c);
    let mut start = text[..end]
        .rfind(|c| !inside(c))
        .map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
    if text[..start].ends_with('-') {
        start -= 1;
    }
    Some(&text[start..end])
}

/// Without case and punctuation.
fn plain(text: &str) -> String {
    let letters = text.trim().chars().filter(|c| !c.is_ascii_punctuation());
    letters.flat_map(char::to_lowercase).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_where_they_are_expected() {
        for (said, expected, strict, flexible) in [
            ("2 + 2 = 4\n#### 4", "4", true, true),
            ("#### 1,234.", "1234", true, true),
            ("#### $12", "12", false, true),
            ("It is 5, so -7.", "-7", false, true),
            ("The answer is 3 apples and 4 pears", "4", false, true),
            ("#### 5 or 6", "5", true, false),
            ("no idea", "4", false, false),
            ("", "4", false, false),
            ("é7", "7", false, true),
        ] {
            let verdict = judge(said, &Expected::Number(expected.into()));
            assert_eq!(verdict, Verdict { strict, flexible }, "{said:?} for {expected}");
        }
    }

    #[test]
    fn texts_are_compared_without_case_and_punctuation() {
        let expected = Expected::AnyOf(vec!["Onion".into(), "Bulb-onion".into()]);
        for (said, right) in
            [(" onion!", true), ("Bulb onion", false), ("bulbonion", true), ("an onion", false)]
        {
            assert_eq!(judge(said, &expected).strict, right, "{said}");
        }
    }
}
