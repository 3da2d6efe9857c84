//! The text of a grammar into expressions.
//!
//! Taken as llama.cpp takes it, and a little more: a rule goes on until the next `name ::=`, whatever the lines, and names
//! may have underscores.

use std::collections::HashMap;

use super::expr::{Expr, ExprId, Exprs, Grammar, Mention, Rule, RuleId};
use super::{FindToken, invalid};
use crate::CompileError;

const RULES_MAX: usize = 2048;
/// Different expressions.
const EXPRS_MAX: usize = 1 << 16;
/// Groups within groups: this parser is recursive.
const NESTING_MAX: usize = 128;
const REPEATS_MAX: u32 = 10_000;
/// Of a token that is named.
const TOKEN_BYTES_MAX: usize = 256;

type Result<T> = std::result::Result<T, CompileError>;

pub(super) fn parse(text: &str, find_token: FindToken<'_>) -> Result<Grammar> {
    let mut parser = Parser {
        text,
        find_token,
        at: 0,
        exprs: Exprs::default(),
        names: HashMap::new(),
        rules: Vec::new(),
        mentions: Vec::new(),
    };
    parser.skip_space();
    while parser.peek().is_some() {
        parser.rule()?;
    }
    parser.finish()
}

pub(super) fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

struct Parser<'t> {
    text: &'t str,
    find_token: FindToken<'t>,
    /// Byte of what comes next.
    at: usize,
    exprs: Exprs,
    names: HashMap<&'t str, RuleId>,
    /// Of every name, and its body once that was read.
    rules: Vec<(&'t str, Option<ExprId>)>,
    mentions: Vec<Mention>,
}

impl<'t> Parser<'t> {
    fn finish(self) -> Result<Grammar> {
        let Some(&root) = self.names.get("root") else {
            return Err(CompileError::Invalid("a grammar needs a rule `root`".into()));
        };
        let undefined = self.mentions.iter().find(|mention| self.rules[mention.named.index()].1.is_none());
        if let Some(mention) = undefined {
            let what = format!("the rule `{}` is not defined", self.rules[mention.named.index()].0);
            return Err(invalid(self.text, mention.at, &what));
        }
        let rules = self.rules.into_iter();
        let rules =
            rules.filter_map(|(name, body)| Some(Rule { name: name.to_owned(), body: body? })).collect();
        Ok(Grammar { exprs: self.exprs, rules, root, mentions: self.mentions })
    }

    fn rule(&mut self) -> Result<()> {
        let start = self.at;
        let name = self.name();
        if name.is_empty() {
            return self.fail("expected the name of a rule");
        }
        let id = self.rule_id(name)?;
        self.skip_space();
        if !self.take("::=") {
            return self.fail("expected `::=`");
        }
        self.skip_space();
        if self.rules[id.index()].1.is_some() {
            return Err(invalid(self.text, start, &format!("the rule `{name}` is defined twice")));
        }
        let body = self.alternatives(id, 0)?;
        self.rules[id.index()].1 = Some(body);
        match self.peek() {
            None => Ok(()),
            Some(_) if self.at_rule() => Ok(()),
            Some(_) => self.fail("expected a literal, a class, a name, a group or an alternative"),
        }
    }

    fn rule_id(&mut self, name: &'t str) -> Result<RuleId> {
        if let Some(id) = self.names.get(name) {
            return Ok(*id);
        }
        if self.rules.len() == RULES_MAX {
            return self.fail(&format!("a grammar can have at most {RULES_MAX} rules"));
        }
        let id = RuleId::new(self.rules.len());
        self.rules.push((name, None));
        self.names.insert(name, id);
        Ok(id)
    }

    fn alternatives(&mut self, within: RuleId, depth: usize) -> Result<ExprId> {
        if depth > NESTING_MAX {
            return self.fail(&format!("groups are nested more than {NESTING_MAX} deep"));
        }
        let mut parts = vec![self.sequence(within, depth)?];
        while self.take("|") {
            self.skip_space();
            parts.push(self.sequence(within, depth)?);
        }
        Ok(self.exprs.either(parts))
    }

    fn sequence(&mut self, within: RuleId, depth: usize) -> Result<ExprId> {
        let mut parts = Vec::new();
        while let Some(mut part) = self.element(within, depth)? {
            self.skip_space();
            while let Some((n_min, n_max)) = self.repetition()? {
                part = self.exprs.repeat(part, n_min, n_max);
                self.skip_space();
            }
            if self.exprs.len() > EXPRS_MAX {
                return self.fail("the grammar is too large");
            }
            parts.push(part);
        }
        Ok(self.exprs.sequence(parts))
    }

    /// What can be repeated; `None` at the end of a sequence.
    fn element(&mut self, within: RuleId, depth: usize) -> Result<Option<ExprId>> {
        let start = self.at;
        let expr = match self.peek() {
            Some('"') => self.literal()?,
            Some('[') => self.class()?,
            Some('.') => {
                self.at += 1;
                self.exprs.add(Expr::Class(vec![('\0', char::MAX)]))
            }
            Some('(') => {
                self.at += 1;
                self.skip_space();
                let inner = self.alternatives(within, depth + 1)?;
                if !self.take(")") {
                    return self.fail("expected `)`");
                }
                inner
            }
            Some('<') => self.token()?,
            Some('!') => return self.fail("all tokens but one are not supported"),
            Some(c) if is_name(c) && !self.at_rule() => {
                let name = self.name();
                let named = self.rule_id(name)?;
                self.mentions.push(Mention { within, named, at: start });
                self.exprs.add(Expr::Rule(named))
            }
            _ => return Ok(None),
        };
        Ok(Some(expr))
    }

    fn literal(&mut self) -> Result<ExprId> {
        self.at += 1;
        let mut parts = Vec::new();
        while !self.take("\"") {
            let c = self.character("expected `\"`")?;
            parts.push(self.exprs.character(c));
        }
        Ok(self.exprs.sequence(parts))
    }

    fn class(&mut self) -> Result<ExprId> {
        let start = self.at;
        self.at += 1;
        let is_negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            let first_at = self.at;
            let first = self.character("expected `]`")?;
            let is_range = self.peek() == Some('-') && !self.rest().starts_with("-]");
            let last = if is_range {
                self.at += 1;
                self.character("expected `]`")?
            } else {
                first
            };
            if last < first {
                return Err(invalid(self.text, first_at, "the range ends before its beginning"));
            }
            ranges.push((first, last));
        }
        let ranges = if is_negated { complement(merge(ranges)) } else { merge(ranges) };
        if ranges.is_empty() {
            return Err(invalid(self.text, start, "no character is in this class"));
        }
        Ok(self.exprs.add(Expr::Class(ranges)))
    }

    /// A token of the vocabulary, by its text or its number.
    fn token(&mut self) -> Result<ExprId> {
        let rest = self.rest();
        let end = rest.find(['>', ' ', '\t', '\r', '\n']).filter(|end| *end <= TOKEN_BYTES_MAX);
        let Some(spelled) = end.filter(|end| rest[*end..].starts_with('>')).map(|end| &rest[..=end]) else {
            return self.fail("expected the name of a token, and `>` behind it");
        };
        let Some(id) = (self.find_token)(spelled) else {
            return self.fail(&format!("`{spelled}` is no token of this model"));
        };
        self.at += spelled.len();
        Ok(self.exprs.add(Expr::Token(id)))
    }

    /// One character of a literal or class.
    fn character(&mut self, at_end: &str) -> Result<char> {
        let Some(c) = self.peek() else { return self.fail(at_end) };
        if c != '\\' {
            self.at += c.len_utf8();
            return Ok(c);
        }
        let escape = self.rest()[1..].chars().next();
        let code = match escape {
            Some('x') => return self.code(2),
            Some('u') => return self.code(4),
            Some('U') => return self.code(8),
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some(c) if c.is_ascii_punctuation() => c,
            _ => return self.fail("this escape is not known"),
        };
        self.at += 2;
        Ok(code)
    }

    /// A character by its number, in so many hexadecimal digits.
    fn code(&mut self, n_digits: usize) -> Result<char> {
        let digits = self.rest().get(2..2 + n_digits).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let Some(digits) = digits else {
            return self.fail(&format!("expected {n_digits} hexadecimal digits"));
        };
        match u32::from_str_radix(digits, 16).ok().and_then(char::from_u32) {
            Some(c) => {
                self.at += 2 + n_digits;
                Ok(c)
            }
            None => self.fail("this number stands for no character"),
        }
    }

    fn repetition(&mut self) -> Result<Option<(u32, Option<u32>)>> {
        let sign = self.peek();
        if let Some('*' | '+' | '?') = sign {
            self.at += 1;
            let n_min = u32::from(sign == Some('+'));
            return Ok(Some((n_min, (sign == Some('?')).then_some(1))));
        }
        let start = self.at;
        if !self.take("{") {
            return Ok(None);
        }
        self.skip_space();
        let n_min = self.number()?;
        let n_max = if self.take(",") {
            self.skip_space();
            if self.peek() == Some('}') { None } else { Some(self.number()?) }
        } else {
            Some(n_min)
        };
        if !self.take("}") {
            return self.fail("expected `}`");
        }
        if n_max.is_some_and(|n_max| n_max < n_min) {
            return Err(invalid(self.text, start, "the most repetitions are fewer than the least"));
        }
        Ok(Some((n_min, n_max)))
    }

    fn number(&mut self) -> Result<u32> {
        let n_digits = self.rest().bytes().take_while(u8::is_ascii_digit).count();
        if n_digits == 0 {
            return self.fail("expected a number of repetitions");
        }
        let number = self.rest()[..n_digits].parse().ok().filter(|n| *n <= REPEATS_MAX);
        let Some(number) = number else {
            return self.fail(&format!("there can be at most {REPEATS_MAX} repetitions"));
        };
        self.at += n_digits;
        self.skip_space();
        Ok(number)
    }

    /// Whether a rule begins here: a name and `::=`.
    fn at_rule(&self) -> bool {
        let behind = self.rest().trim_start_matches(is_name);
        behind.len() < self.rest().len() && skip(behind).starts_with("::=")
    }

    fn name(&mut self) -> &'t str {
        let rest = self.rest();
        let name = &rest[..rest.len() - rest.trim_start_matches(is_name).len()];
        self.at += name.len();
        name
    }

    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self, sign: &str) -> bool {
        let is_there = self.rest().starts_with(sign);
        if is_there {
            self.at += sign.len();
        }
        is_there
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - skip(self.rest()).len();
    }

    fn fail<T>(&self, what: &str) -> Result<T> {
        Err(invalid(self.text, self.at, what))
    }
}

/// A text without the white space and comments at its beginning.
fn skip(text: &str) -> &str {
    let mut rest = text.trim_start_matches([' ', '\t', '\r', '\n']);
    while rest.starts_with('#') {
        rest = rest.trim_start_matches(|c| c != '\n').trim_start_matches([' ', '\t', '\r', '\n']);
    }
    rest
}

/// Sorted, and apart from each other.
fn merge(mut ranges: Vec<(char, char)>) -> Vec<(char, char)> {
    ranges.sort_unstable();
    let mut merged: Vec<(char, char)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1 || after(before.1) == Some(first) => {
                before.1 = before.1.max(last);
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The characters that are in none of these ranges.
fn complement(ranges: Vec<(char, char)>) -> Vec<(char, char)> {
    let mut gaps = Vec::with_capacity(ranges.len() + 1);
    let mut next = Some('\0');
    for (first, last) in ranges {
        if let (Some(start), Some(end)) = (next, before(first))
            && start <= end
        {
            gaps.push((start, end));
        }
        next = after(last);
    }
    gaps.extend(next.map(|start| (start, char::MAX)));
    gaps
}

fn after(c: char) -> Option<char> {
    (c..=char::MAX).nth(1)
}

fn before(c: char) -> Option<char> {
    ('\0'..c).next_back()
}
