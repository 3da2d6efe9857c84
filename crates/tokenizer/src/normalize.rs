//! What happens to a text before it is split.

use std::borrow::Cow;

use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NormalizeStep {
    /// Unicode normalization form C (Qwen).
    Nfc,
    /// Before every text that is not empty (Llama 2).
    Prepend(String),
    /// Everywhere.
    Replace { from: String, to: String },
}

pub(crate) fn normalize<'a>(steps: &[NormalizeStep], text: &'a str) -> Cow<'a, str> {
    steps.iter().fold(Cow::Borrowed(text), |text, step| match step {
        NormalizeStep::Nfc if is_nfc_quick(text.chars()) == IsNormalized::Yes => text,
        NormalizeStep::Nfc => Cow::Owned(text.nfc().collect()),
        NormalizeStep::Prepend(_) if text.is_empty() => text,
        NormalizeStep::Prepend(prefix) => Cow::Owned(format!("{prefix}{text}")),
        NormalizeStep::Replace { from, .. } if !text.contains(from.as_str()) => text,
        NormalizeStep::Replace { from, to } => Cow::Owned(text.replace(from.as_str(), to)),
    })
}
