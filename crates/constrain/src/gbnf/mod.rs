//! llama.cpp's grammars (GBNF), as the dialect of Lark that llguidance reads.
//!
//! GBNF has no tokens of its own: its rules go down to single characters. llguidance wants lexemes, and takes the longest
//! one that matches. So that both mean the same texts, parts of a grammar become lexemes only where the longest match is the
//! only one that can go on (`lexemes.rs`); what is left are single characters, where longest and shortest are one, and
//! tokens that the grammar names as such, which are no text.
//!
//! The way of a grammar: `parse.rs` reads it into expressions (`expr.rs`), `facts.rs` finds what is recursive and refuses
//! what has no meaning, `lexemes.rs` chooses, with the automata of `positions.rs`, and `lark.rs` writes.

mod expr;
mod facts;
mod lark;
mod lexemes;
mod parse;
mod positions;

#[cfg(test)]
mod tests;

use tokenizer::TokenId;

use crate::CompileError;

/// Finds the id of a token that a grammar spells: `<think>`, or `<[1000]>` by its number.
pub(crate) type FindToken<'t> = &'t dyn Fn(&str) -> Option<TokenId>;

/// The same language in Lark. Errors name the line and column.
pub(crate) fn to_lark(text: &str, find_token: FindToken<'_>) -> Result<String, CompileError> {
    let mut grammar = parse::parse(text, find_token)?;
    let facts = facts::find(&mut grammar, text)?;
    let lexemes = lexemes::choose(&grammar, &facts)?;
    Ok(lark::write(&grammar, &facts, &lexemes))
}

/// Whether a grammar is in GBNF: its first rule is defined by `::=`, which no text in Lark has behind a name.
pub(crate) fn is_gbnf(text: &str) -> bool {
    let lines = text.lines().map(str::trim_start);
    let first = lines.skip_while(|line| line.is_empty() || line.starts_with('#')).take(2).collect::<Vec<_>>();
    let name_end = |line: &str| line.find(|c| !parse::is_name(c)).unwrap_or(line.len());
    let Some(line) = first.first() else { return false };
    let (name, rest) = line.split_at(name_end(line));
    // The sign may stand on the next line.
    let rest = if rest.trim().is_empty() { first.get(1).unwrap_or(&"") } else { rest };
    !name.is_empty() && rest.trim_start().starts_with("::=")
}

/// An error at a byte of the text. Lines and columns count from 1, columns in characters.
fn invalid(text: &str, at: usize, what: &str) -> CompileError {
    let before = &text[..at];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    CompileError::Invalid(format!("line {line}, column {column}: {what}"))
}
