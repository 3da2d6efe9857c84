//! Writes a grammar whose lexemes are chosen.
//!
//! Names are `r` and a rule's number, `e` and an expression's; of terminals `X` and the expression's, and `N` where the empty
//! text is taken out, which no lexeme may be.

use std::collections::HashSet;
use std::fmt::Write as _;

use serde_json::Value;
use tokenizer::TokenId;

use super::expr::{Expr, ExprId, Grammar, RuleId};
use super::facts::Facts;
use super::lexemes::Lexemes;

pub(super) fn write(grammar: &Grammar, facts: &Facts, lexemes: &Lexemes) -> String {
    let mut writer =
        Writer { grammar, facts, lexemes, text: String::new(), known: HashSet::new(), open: Vec::new() };
    let root = grammar.body(grammar.root);
    let start = writer.part(root);
    writer.line("start", &start);
    while let Some(name) = writer.open.pop() {
        writer.define(name);
    }
    writer.text
}

/// What a line defines.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Name {
    Rule(RuleId),
    Expr(ExprId),
    Terminal(ExprId),
    NonEmpty(ExprId),
}

struct Writer<'g> {
    grammar: &'g Grammar,
    facts: &'g Facts,
    lexemes: &'g Lexemes,
    text: String,
    /// Defined, or about to be.
    known: HashSet<Name>,
    open: Vec<Name>,
}

impl Writer<'_> {
    fn define(&mut self, name: Name) {
        let definition = match name {
            Name::Rule(rule) => self.part(self.grammar.body(rule)),
            Name::Expr(id) => self.expr(id, Writer::part),
            Name::Terminal(id) => self.expr(id, Writer::terminal_part),
            Name::NonEmpty(id) => format!("{} & ~\"\"", self.terminal_part(id)),
        };
        let name = spell(name);
        self.line(&name, &definition);
    }

    fn line(&mut self, name: &str, definition: &str) {
        writeln!(self.text, "{name}: {definition}").expect("a string takes all");
    }

    /// An expression as a part of a rule.
    fn part(&mut self, id: ExprId) -> String {
        if let Some(lexeme) = self.lexemes.of(self.grammar, self.facts, id) {
            return match self.grammar.exprs.get(lexeme) {
                _ if self.facts.is_nullable(lexeme) => self.name(Name::NonEmpty(lexeme)) + "?",
                Expr::Class(ranges) => class(ranges),
                _ => self.name(Name::Terminal(lexeme)),
            };
        }
        match self.grammar.exprs.get(id) {
            Expr::Rule(rule) => self.name(Name::Rule(*rule)),
            Expr::Token(id) => token(*id),
            Expr::Sequence(parts) if parts.is_empty() => "\"\"".into(),
            _ => self.name(Name::Expr(id)),
        }
    }

    /// An expression as a part of a terminal.
    fn terminal_part(&mut self, id: ExprId) -> String {
        match self.grammar.exprs.get(id) {
            Expr::Class(ranges) => class(ranges),
            Expr::Rule(rule) => self.terminal_part(self.grammar.body(*rule)),
            _ => self.name(Name::Terminal(id)),
        }
    }

    fn expr(&mut self, id: ExprId, part: fn(&mut Self, ExprId) -> String) -> String {
        let grammar = self.grammar;
        let mut all = |parts: &[ExprId], between: &str| {
            parts.iter().map(|id| part(self, *id)).collect::<Vec<_>>().join(between)
        };
        match grammar.exprs.get(id) {
            Expr::Class(ranges) => class(ranges),
            Expr::Sequence(parts) if parts.is_empty() => "\"\"".into(),
            Expr::Sequence(parts) => all(parts, " "),
            Expr::Either(parts) => all(parts, " | "),
            Expr::Repeat(part, n_min, n_max) => {
                let n_max = n_max.map_or(String::new(), |n| n.to_string());
                format!("({}){{{n_min},{n_max}}}", all(&[*part], ""))
            }
            Expr::Rule(rule) => all(&[grammar.body(*rule)], ""),
            Expr::Token(id) => token(*id),
        }
    }

    fn name(&mut self, name: Name) -> String {
        if self.known.insert(name) {
            self.open.push(name);
        }
        spell(name)
    }
}

fn spell(name: Name) -> String {
    match name {
        Name::Rule(rule) => format!("r{}", rule.index()),
        Name::Expr(id) => format!("e{}", id.index()),
        Name::Terminal(id) => format!("X{}", id.index()),
        Name::NonEmpty(id) => format!("N{}", id.index()),
    }
}

/// By its number: llguidance knows only special tokens by their names.
fn token(id: TokenId) -> String {
    format!("<[{id}]>")
}

/// A class; single characters as strings, which Lark spells as JSON does.
fn class(ranges: &[(char, char)]) -> String {
    if let [(first, last)] = ranges
        && first == last
    {
        return Value::from(first.to_string()).to_string().replace('\x7f', "\\u007f");
    }
    let ranges = ranges.iter().map(|(first, last)| {
        let (first, last) = (u32::from(*first), u32::from(*last));
        format!("\\x{{{first:x}}}-\\x{{{last:x}}}")
    });
    format!("/[{}]/", ranges.collect::<String>())
}
