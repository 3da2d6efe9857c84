//! Which parts of a grammar become lexemes.
//!
//! First the largest parts that are not recursive. Then, as long as there is a text of one lexeme that could end where
//! another one allowed in its place goes on, and what comes behind the first may begin with the same byte: the other is
//! taken apart. Single characters have no such texts, so it ends.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::expr::{Expr, ExprId, Grammar, RuleId};
use super::facts::Facts;
use super::positions::{Bytes, Meeting, Positions};
use crate::CompileError;

/// Classes in a lexeme whose automaton we look at.
const CHARACTERS_MAX: usize = 1000;
/// Steps of this analysis, each far below a microsecond. Grammars that people write need some thousands.
const WORK_MAX: usize = 3_000_000;

#[derive(Debug)]
pub(super) struct Lexemes {
    split: HashSet<ExprId>,
    root: Option<ExprId>,
}

impl Lexemes {
    /// The lexeme that an expression is, which may be that of a rule it names; `None` if its parts are.
    pub(super) fn of(&self, grammar: &Grammar, facts: &Facts, id: ExprId) -> Option<ExprId> {
        let n_characters = facts.n_characters(id)?;
        let id = resolve(grammar, id);
        let is_whole = Some(id) == self.root || n_characters <= CHARACTERS_MAX;
        (n_characters > 0 && is_whole && !self.split.contains(&id)).then_some(id)
    }
}

/// What a name that is not recursive stands for.
fn resolve(grammar: &Grammar, mut id: ExprId) -> ExprId {
    while let Expr::Rule(rule) = grammar.exprs.get(id) {
        id = grammar.body(*rule);
    }
    id
}

pub(super) fn choose(grammar: &Grammar, facts: &Facts) -> Result<Lexemes, CompileError> {
    let mut lexemes = Lexemes { split: HashSet::new(), root: None };
    let root = grammar.body(grammar.root);
    if facts.n_characters(root).is_some() {
        // Nothing comes behind a lexeme that is everything.
        lexemes.root = Some(resolve(grammar, root));
        return Ok(lexemes);
    }
    let mut choice = Choice {
        grammar,
        facts,
        lexemes,
        automata: HashMap::new(),
        meetings: HashMap::new(),
        n_left: WORK_MAX,
    };
    while choice.split()? {}
    Ok(choice.lexemes)
}

type Set = BTreeSet<ExprId>;

struct Choice<'g> {
    grammar: &'g Grammar,
    facts: &'g Facts,
    lexemes: Lexemes,
    automata: HashMap<ExprId, Positions<'g>>,
    meetings: HashMap<(ExprId, ExprId), Meeting>,
    n_left: usize,
}

impl Choice<'_> {
    /// Takes apart what has to be, once; whether there was anything.
    fn split(&mut self) -> Result<bool, CompileError> {
        let neighbours = Neighbours::find(self)?;
        let mut behind = HashMap::new();
        for (lexeme, next) in &neighbours.next {
            let bytes: &mut Bytes = behind.entry(*lexeme).or_default();
            for next in next {
                bytes.extend(self.automaton(*next)?.first_bytes());
            }
        }
        let mut split = HashSet::new();
        for (ended, extended) in self.together(&neighbours)? {
            if self.meeting(ended, extended)?.extensions.meets(behind[&ended]) {
                split.insert(extended);
            }
        }
        self.lexemes.split.extend(&split);
        Ok(!split.is_empty())
    }

    /// The pairs of lexemes that may be allowed at one place: at the beginning, or behind two that are and can be the same
    /// text.
    fn together(&mut self, neighbours: &Neighbours) -> Result<HashSet<(ExprId, ExprId)>, CompileError> {
        let (mut pairs, mut open) = (HashSet::new(), Vec::new());
        let mut add = |some: &Set, others: &Set, open: &mut Vec<_>| {
            let all = some.iter().flat_map(|a| others.iter().map(move |b| (*a, *b)));
            open.extend(all.filter(|pair| pairs.insert(*pair)));
        };
        add(&neighbours.starts, &neighbours.starts, &mut open);
        while let Some((a, b)) = open.pop() {
            if self.meeting(a, b)?.is_shared {
                let (some, others) = (&neighbours.next[&a], &neighbours.next[&b]);
                self.spend(some.len() * others.len())?;
                add(some, others, &mut open);
            }
        }
        Ok(pairs)
    }

    fn meeting(&mut self, ended: ExprId, extended: ExprId) -> Result<Meeting, CompileError> {
        self.spend(1)?;
        if let Some(known) = self.meetings.get(&(ended, extended)) {
            return Ok(*known);
        }
        self.automaton(ended)?;
        self.automaton(extended)?;
        let (automata, n_left) = (&self.automata, &mut self.n_left);
        let meeting = automata[&ended].meet(&automata[&extended], n_left).ok_or_else(too_complex)?;
        self.meetings.insert((ended, extended), meeting);
        Ok(meeting)
    }

    fn automaton(&mut self, id: ExprId) -> Result<&Positions<'_>, CompileError> {
        self.spend(1)?;
        if !self.automata.contains_key(&id) {
            let positions = Positions::of(self.grammar, id);
            self.spend(positions.n_steps())?;
            self.automata.insert(id, positions);
        }
        Ok(&self.automata[&id])
    }

    fn lexeme(&self, id: ExprId) -> Option<ExprId> {
        self.lexemes.of(self.grammar, self.facts, id)
    }

    fn spend(&mut self, n: usize) -> Result<(), CompileError> {
        self.n_left = self.n_left.checked_sub(n).ok_or_else(too_complex)?;
        Ok(())
    }
}

fn too_complex() -> CompileError {
    CompileError::Invalid("the grammar is too complex".into())
}

/// Which lexemes texts begin with, and which can come behind which.
#[derive(Default)]
struct Neighbours {
    starts: Set,
    next: BTreeMap<ExprId, Set>,
    /// What can come behind a rule.
    behind: HashMap<RuleId, Set>,
    /// Rules whose `behind` has grown since their bodies were looked at.
    open: Vec<RuleId>,
    first: HashMap<ExprId, Set>,
}

impl Neighbours {
    fn find(choice: &mut Choice) -> Result<Neighbours, CompileError> {
        let mut this = Neighbours::default();
        let (grammar, root) = (choice.grammar, choice.grammar.root);
        this.starts = this.first(choice, grammar.body(root))?;
        this.behind.insert(root, Set::new());
        this.open.push(root);
        while let Some(rule) = this.open.pop() {
            let behind = this.behind[&rule].clone();
            this.place(choice, grammar.body(rule), &behind)?;
        }
        Ok(this)
    }

    /// Notes what comes behind the lexemes of an expression, which itself is before `behind`.
    fn place(&mut self, choice: &mut Choice, id: ExprId, behind: &Set) -> Result<(), CompileError> {
        choice.spend(1 + behind.len())?;
        if let Some(lexeme) = choice.lexeme(id) {
            self.next.entry(lexeme).or_default().extend(behind);
            return Ok(());
        }
        match choice.grammar.exprs.get(id) {
            Expr::Class(_) | Expr::Token(_) => Ok(()),
            Expr::Rule(rule) => {
                let is_new = !self.behind.contains_key(rule);
                let known = self.behind.entry(*rule).or_default();
                let n_before = known.len();
                known.extend(behind);
                if is_new || known.len() > n_before {
                    self.open.push(*rule);
                }
                Ok(())
            }
            Expr::Either(parts) => parts.iter().try_for_each(|part| self.place(choice, *part, behind)),
            Expr::Sequence(parts) => {
                let mut behind = behind.clone();
                for part in parts.iter().rev() {
                    self.place(choice, *part, &behind)?;
                    let first = self.first(choice, *part)?;
                    if !choice.facts.is_nullable(*part) {
                        behind.clear();
                    }
                    behind.extend(first);
                }
                Ok(())
            }
            Expr::Repeat(part, _, Some(1)) => self.place(choice, *part, behind),
            Expr::Repeat(part, ..) => {
                let mut behind = behind.clone();
                behind.extend(self.first(choice, *part)?);
                self.place(choice, *part, &behind)
            }
        }
    }

    /// The lexemes that an expression begins with. It ends, because no rule begins with itself.
    fn first(&mut self, choice: &mut Choice, id: ExprId) -> Result<Set, CompileError> {
        if let Some(known) = self.first.get(&id) {
            choice.spend(1 + known.len())?;
            return Ok(known.clone());
        }
        choice.spend(1)?;
        let first = match choice.lexeme(id) {
            Some(lexeme) => Set::from([lexeme]),
            None => self.first_of_parts(choice, id)?,
        };
        self.first.insert(id, first.clone());
        Ok(first)
    }

    fn first_of_parts(&mut self, choice: &mut Choice, id: ExprId) -> Result<Set, CompileError> {
        let mut first = Set::new();
        let grammar = choice.grammar;
        match grammar.exprs.get(id) {
            Expr::Rule(rule) => first = self.first(choice, grammar.body(*rule))?,
            Expr::Class(_) | Expr::Token(_) => (),
            Expr::Sequence(parts) => {
                for part in parts {
                    first.extend(self.first(choice, *part)?);
                    if !choice.facts.is_nullable(*part) {
                        break;
                    }
                }
            }
            Expr::Either(_) | Expr::Repeat(..) => {
                for part in grammar.exprs.parts(id) {
                    first.extend(self.first(choice, *part)?);
                }
            }
        }
        Ok(first)
    }
}
