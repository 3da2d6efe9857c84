//! A grammar as expressions, each stored once.

use std::collections::HashMap;

use tokenizer::TokenId;

/// An expression of the grammar. What it is made of has smaller ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ExprId(u32);

/// A rule, in the order in which names appear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RuleId(u32);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Expr {
    /// One character of these ranges, both ends included. They are sorted, apart, and at least one.
    Class(Vec<(char, char)>),
    /// One after the other. Of none, the empty text.
    Sequence(Vec<ExprId>),
    Either(Vec<ExprId>),
    /// At least so many times, and at most.
    Repeat(ExprId, u32, Option<u32>),
    Rule(RuleId),
    /// A single token of the vocabulary, which is no text: never a part of a lexeme.
    Token(TokenId),
}

#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) body: ExprId,
}

/// Where a rule is named in another one's body, as a byte of the text.
#[derive(Debug)]
pub(super) struct Mention {
    pub(super) within: RuleId,
    pub(super) named: RuleId,
    pub(super) at: usize,
}

#[derive(Debug)]
pub(super) struct Grammar {
    pub(super) exprs: Exprs,
    /// By their ids.
    pub(super) rules: Vec<Rule>,
    pub(super) root: RuleId,
    pub(super) mentions: Vec<Mention>,
}

impl Grammar {
    pub(super) fn rule_ids(&self) -> impl Iterator<Item = RuleId> + use<> {
        (0..self.rules.len() as u32).map(RuleId)
    }

    pub(super) fn body(&self, rule: RuleId) -> ExprId {
        self.rules[rule.index()].body
    }
}

/// Equal expressions have one id.
#[derive(Debug, Default)]
pub(super) struct Exprs {
    all: Vec<Expr>,
    ids: HashMap<Expr, ExprId>,
}

impl ExprId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

impl RuleId {
    pub(super) fn new(index: usize) -> RuleId {
        RuleId(index as u32)
    }

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

impl Exprs {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = ExprId> + use<> {
        (0..self.all.len() as u32).map(ExprId)
    }

    pub(super) fn get(&self, id: ExprId) -> &Expr {
        &self.all[id.index()]
    }

    pub(super) fn add(&mut self, expr: Expr) -> ExprId {
        if let Some(id) = self.ids.get(&expr) {
            return *id;
        }
        let id = ExprId(self.all.len() as u32);
        self.all.push(expr.clone());
        self.ids.insert(expr, id);
        id
    }

    pub(super) fn character(&mut self, c: char) -> ExprId {
        self.add(Expr::Class(vec![(c, c)]))
    }

    pub(super) fn sequence(&mut self, parts: Vec<ExprId>) -> ExprId {
        if parts.len() == 1 { parts[0] } else { self.add(Expr::Sequence(parts)) }
    }

    pub(super) fn either(&mut self, parts: Vec<ExprId>) -> ExprId {
        if parts.len() == 1 { parts[0] } else { self.add(Expr::Either(parts)) }
    }

    pub(super) fn repeat(&mut self, part: ExprId, n_min: u32, n_max: Option<u32>) -> ExprId {
        match (n_min, n_max) {
            (_, Some(0)) => self.sequence(Vec::new()),
            (1, Some(1)) => part,
            _ => self.add(Expr::Repeat(part, n_min, n_max)),
        }
    }

    /// What an expression is made of; not what is in the body of a rule that it names.
    pub(super) fn parts(&self, id: ExprId) -> &[ExprId] {
        match self.get(id) {
            Expr::Class(_) | Expr::Rule(_) | Expr::Token(_) => &[],
            Expr::Sequence(parts) | Expr::Either(parts) => parts,
            Expr::Repeat(part, ..) => std::slice::from_ref(part),
        }
    }
}
