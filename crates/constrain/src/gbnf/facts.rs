//! What is true of a grammar's expressions, and what makes it meaningless.

use super::expr::{Expr, ExprId, Exprs, Grammar, RuleId};
use super::invalid;
use crate::CompileError;

#[derive(Debug)]
pub(super) struct Facts {
    nullable: Vec<bool>,
    n_characters: Vec<Option<usize>>,
}

impl Facts {
    /// Whether the empty text fits.
    pub(super) fn is_nullable(&self, id: ExprId) -> bool {
        self.nullable[id.index()]
    }

    /// Classes in it and in the rules it names; `None` where one of those is recursive, so that no automaton of
    /// finitely many states can follow, and where a token is named, which is no text.
    pub(super) fn n_characters(&self, id: ExprId) -> Option<usize> {
        self.n_characters[id.index()]
    }
}

/// Rules that only repeat themselves at their end become repetitions.
pub(super) fn find(grammar: &mut Grammar, text: &str) -> Result<Facts, CompileError> {
    let nullable_rules = Nullability::of_rules(grammar, text)?;
    for rule in grammar.rule_ids() {
        unroll(grammar, rule);
    }
    let sizes = Sizes::of_rules(grammar);
    let mut facts = Facts { nullable: Vec::new(), n_characters: Vec::new() };
    // What an expression is made of comes before it.
    for id in grammar.exprs.ids() {
        let nullable = match grammar.exprs.get(id) {
            Expr::Class(_) | Expr::Token(_) => false,
            Expr::Sequence(parts) => parts.iter().all(|part| facts.is_nullable(*part)),
            Expr::Either(parts) => parts.iter().any(|part| facts.is_nullable(*part)),
            Expr::Repeat(part, n_min, _) => *n_min == 0 || facts.is_nullable(*part),
            Expr::Rule(rule) => nullable_rules[rule.index()],
        };
        facts.nullable.push(nullable);
        facts.n_characters.push(size(&grammar.exprs, id, &sizes));
    }
    Ok(facts)
}

/// Whether rules may be empty. A rule that can come first in itself has no end, so it is refused.
struct Nullability<'g> {
    grammar: &'g Grammar,
    text: &'g str,
    known: Vec<Option<bool>>,
    is_open: Vec<bool>,
}

impl Nullability<'_> {
    fn of_rules(grammar: &Grammar, text: &str) -> Result<Vec<bool>, CompileError> {
        let n = grammar.rules.len();
        let mut this = Nullability { grammar, text, known: vec![None; n], is_open: vec![false; n] };
        grammar.rule_ids().map(|rule| this.rule(rule)).collect()
    }

    fn rule(&mut self, rule: RuleId) -> Result<bool, CompileError> {
        if let Some(known) = self.known[rule.index()] {
            return Ok(known);
        }
        self.is_open[rule.index()] = true;
        let nullable = self.expr(self.grammar.body(rule), rule)?;
        self.is_open[rule.index()] = false;
        self.known[rule.index()] = Some(nullable);
        Ok(nullable)
    }

    /// Looks at all that can come first, and at nothing else.
    fn expr(&mut self, id: ExprId, within: RuleId) -> Result<bool, CompileError> {
        match self.grammar.exprs.get(id) {
            Expr::Class(_) | Expr::Token(_) => Ok(false),
            Expr::Sequence(parts) => {
                for part in parts {
                    if !self.expr(*part, within)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            Expr::Either(parts) => {
                let mut any = false;
                for part in parts {
                    any |= self.expr(*part, within)?;
                }
                Ok(any)
            }
            Expr::Repeat(part, n_min, _) => Ok(self.expr(*part, within)? || *n_min == 0),
            Expr::Rule(rule) if self.is_open[rule.index()] => Err(self.left_recursive(*rule, within)),
            Expr::Rule(rule) => self.rule(*rule),
        }
    }

    fn left_recursive(&self, rule: RuleId, within: RuleId) -> CompileError {
        let mentions = &self.grammar.mentions;
        let at = mentions.iter().find(|mention| mention.within == within && mention.named == rule);
        let what = format!("the rule `{}` begins with itself", self.grammar.rules[rule.index()].name);
        invalid(self.text, at.map_or(0, |mention| mention.at), &what)
    }
}

/// `a ::= x a | y` says the same as `a ::= x* y`, and that is not recursive.
fn unroll(grammar: &mut Grammar, rule: RuleId) {
    let body = grammar.body(rule);
    if !names(&grammar.exprs, body, rule) {
        return;
    }
    // Of a rule that has no end nothing would be left.
    let tails = tails(&mut grammar.exprs, body, rule).filter(|tails| !tails.done.is_empty());
    if let Some(Tails { again, done }) = tails {
        let exprs = &mut grammar.exprs;
        let again = exprs.either(again);
        let again = exprs.repeat(again, 0, None);
        let done = exprs.either(done);
        grammar.rules[rule.index()].body = exprs.sequence(vec![again, done]);
    }
}

/// An expression as `again rule | done`.
struct Tails {
    again: Vec<ExprId>,
    done: Vec<ExprId>,
}

/// `None` if the rule is named anywhere but at the end.
fn tails(exprs: &mut Exprs, id: ExprId, rule: RuleId) -> Option<Tails> {
    if !names(exprs, id, rule) {
        return Some(Tails { again: Vec::new(), done: vec![id] });
    }
    let empty = exprs.sequence(Vec::new());
    match exprs.get(id).clone() {
        Expr::Rule(_) => Some(Tails { again: vec![empty], done: Vec::new() }),
        Expr::Either(parts) => {
            let mut all = Tails { again: Vec::new(), done: Vec::new() };
            for part in parts {
                let tails = tails(exprs, part, rule)?;
                all.again.extend(tails.again);
                all.done.extend(tails.done);
            }
            Some(all)
        }
        Expr::Sequence(parts) => {
            let (last, front) = parts.split_last()?;
            if front.iter().any(|part| names(exprs, *part, rule)) {
                return None;
            }
            let mut all = tails(exprs, *last, rule)?;
            for end in all.again.iter_mut().chain(&mut all.done) {
                *end = exprs.sequence([front, &[*end]].concat());
            }
            Some(all)
        }
        Expr::Repeat(part, 0, Some(1)) => {
            let mut all = tails(exprs, part, rule)?;
            all.done.push(empty);
            Some(all)
        }
        Expr::Repeat(..) | Expr::Class(_) | Expr::Token(_) => None,
    }
}

fn names(exprs: &Exprs, id: ExprId, rule: RuleId) -> bool {
    *exprs.get(id) == Expr::Rule(rule) || exprs.parts(id).iter().any(|part| names(exprs, *part, rule))
}

/// The sizes of rules that are not recursive, found from those that name no other upwards.
struct Sizes<'g> {
    grammar: &'g Grammar,
    known: Vec<Option<usize>>,
}

impl Sizes<'_> {
    fn of_rules(grammar: &Grammar) -> Vec<Option<usize>> {
        let mut named_by = vec![Vec::new(); grammar.rules.len()];
        let mut n_open = vec![0usize; grammar.rules.len()];
        for rule in grammar.rule_ids() {
            let mut named = Vec::new();
            collect_names(&grammar.exprs, grammar.body(rule), &mut named);
            named.sort_unstable();
            named.dedup();
            n_open[rule.index()] = named.len();
            named.iter().for_each(|name| named_by[name.index()].push(rule));
        }
        let mut this = Sizes { grammar, known: vec![None; grammar.rules.len()] };
        let mut ready: Vec<RuleId> = grammar.rule_ids().filter(|rule| n_open[rule.index()] == 0).collect();
        while let Some(rule) = ready.pop() {
            this.known[rule.index()] = size(&this.grammar.exprs, this.grammar.body(rule), &this.known);
            for user in &named_by[rule.index()] {
                n_open[user.index()] -= 1;
                if n_open[user.index()] == 0 {
                    ready.push(*user);
                }
            }
        }
        this.known
    }
}

fn collect_names(exprs: &Exprs, id: ExprId, named: &mut Vec<RuleId>) {
    if let Expr::Rule(rule) = exprs.get(id) {
        named.push(*rule);
    }
    exprs.parts(id).iter().for_each(|part| collect_names(exprs, *part, named));
}

fn size(exprs: &Exprs, id: ExprId, rules: &[Option<usize>]) -> Option<usize> {
    match exprs.get(id) {
        Expr::Class(_) => Some(1),
        Expr::Token(_) => None,
        Expr::Rule(rule) => rules[rule.index()],
        _ => exprs
            .parts(id)
            .iter()
            .try_fold(0usize, |sum, part| Some(sum.saturating_add(size(exprs, *part, rules)?))),
    }
}
