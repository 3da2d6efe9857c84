//! The automaton of a lexeme, and where its longest match might be the wrong one.
//!
//! The states are the places of classes in an expression (Glushkov's construction). Bounded repetitions count as unbounded:
//! more texts than the lexeme has can only make us more careful.

use std::collections::HashSet;

use super::expr::{Expr, ExprId, Grammar};

/// First bytes of characters in UTF-8: what llguidance's lexer sees when it decides whether a lexeme goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bytes([u64; 4]);

impl Bytes {
    pub(super) fn meets(self, other: Bytes) -> bool {
        self.0.iter().zip(other.0).any(|(a, b)| a & b != 0)
    }

    pub(super) fn extend(&mut self, other: Bytes) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a |= b);
    }

    fn of_class(ranges: &[(char, char)]) -> Bytes {
        let mut bytes = Bytes::default();
        for (first, last) in ranges {
            for byte in first_byte(*first)..=first_byte(*last) {
                bytes.0[usize::from(byte) / 64] |= 1 << (byte % 64);
            }
        }
        bytes
    }
}

fn first_byte(c: char) -> u8 {
    c.encode_utf8(&mut [0; 4]).as_bytes()[0]
}

#[derive(Debug)]
pub(super) struct Positions<'g> {
    classes: Vec<&'g [(char, char)]>,
    first: Vec<usize>,
    is_last: Vec<bool>,
    next: Vec<Vec<usize>>,
}

/// What a part of a lexeme begins and ends with.
struct Ends {
    is_nullable: bool,
    first: Vec<usize>,
    last: Vec<usize>,
}

impl<'g> Positions<'g> {
    /// Of an expression that names no recursive rule and no token.
    pub(super) fn of(grammar: &'g Grammar, id: ExprId) -> Positions<'g> {
        let mut positions =
            Positions { classes: Vec::new(), first: Vec::new(), is_last: Vec::new(), next: Vec::new() };
        let ends = positions.add(grammar, id);
        positions.is_last = vec![false; positions.classes.len()];
        ends.last.iter().for_each(|at| positions.is_last[*at] = true);
        positions.first = ends.first;
        positions.next.iter_mut().for_each(|next| {
            next.sort_unstable();
            next.dedup();
        });
        positions
    }

    fn add(&mut self, grammar: &'g Grammar, id: ExprId) -> Ends {
        match grammar.exprs.get(id) {
            Expr::Class(ranges) => {
                let at = self.classes.len();
                self.classes.push(ranges);
                self.next.push(Vec::new());
                Ends { is_nullable: false, first: vec![at], last: vec![at] }
            }
            Expr::Rule(rule) => self.add(grammar, grammar.body(*rule)),
            Expr::Token(_) => unreachable!("a lexeme has no tokens"),
            Expr::Sequence(parts) => {
                let empty = Ends { is_nullable: true, first: Vec::new(), last: Vec::new() };
                parts.iter().fold(empty, |before, part| {
                    let ends = self.add(grammar, *part);
                    self.follow(before, ends)
                })
            }
            Expr::Either(parts) => {
                let mut all = Ends { is_nullable: false, first: Vec::new(), last: Vec::new() };
                for part in parts {
                    let ends = self.add(grammar, *part);
                    all.is_nullable |= ends.is_nullable;
                    all.first.extend(ends.first);
                    all.last.extend(ends.last);
                }
                all
            }
            Expr::Repeat(part, n_min, n_max) => {
                let mut ends = self.add(grammar, *part);
                ends.is_nullable |= *n_min == 0;
                if *n_max != Some(1) {
                    self.link(&ends.last, &ends.first);
                }
                ends
            }
        }
    }

    fn follow(&mut self, before: Ends, mut ends: Ends) -> Ends {
        self.link(&before.last, &ends.first);
        let mut first = before.first;
        if before.is_nullable {
            first.append(&mut ends.first);
        }
        if ends.is_nullable {
            ends.last.extend(before.last);
        }
        Ends { is_nullable: before.is_nullable && ends.is_nullable, first, last: ends.last }
    }

    fn link(&mut self, from: &[usize], to: &[usize]) {
        from.iter().for_each(|at| self.next[*at].extend(to));
    }

    /// What its texts begin with.
    pub(super) fn first_bytes(&self) -> Bytes {
        let mut bytes = Bytes::default();
        self.first.iter().for_each(|at| bytes.extend(Bytes::of_class(self.classes[*at])));
        bytes
    }

    /// Steps between positions.
    pub(super) fn n_steps(&self) -> usize {
        self.next.iter().map(Vec::len).sum()
    }

    /// `None` where finding out takes more than `n_left` comparisons.
    pub(super) fn meet(&self, other: &Positions, n_left: &mut usize) -> Option<Meeting> {
        let mut meeting = Meeting::default();
        let mut pairs = Pairs { mine: self, other, n_left, seen: HashSet::new(), open: Vec::new() };
        pairs.meet(&self.first, &other.first)?;
        while let Some((a, b)) = pairs.open.pop() {
            if self.is_last[a] {
                meeting.is_shared |= other.is_last[b];
                let next = other.next[b].iter();
                next.for_each(|at| meeting.extensions.extend(Bytes::of_class(other.classes[*at])));
            }
            pairs.meet(&self.next[a], &other.next[b])?;
        }
        Some(meeting)
    }
}

/// Of two lexemes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Meeting {
    /// Whether a text is both.
    pub(super) is_shared: bool,
    /// With what a text of the first can go on and become more of the second: there the longest match looks further.
    pub(super) extensions: Bytes,
}

/// Positions that two automata can be in after the same text.
struct Pairs<'a> {
    mine: &'a Positions<'a>,
    other: &'a Positions<'a>,
    n_left: &'a mut usize,
    seen: HashSet<(usize, usize)>,
    open: Vec<(usize, usize)>,
}

impl Pairs<'_> {
    fn meet(&mut self, mine: &[usize], others: &[usize]) -> Option<()> {
        for (a, b) in mine.iter().flat_map(|a| others.iter().map(move |b| (*a, *b))) {
            let (class, other) = (self.mine.classes[a], self.other.classes[b]);
            *self.n_left = self.n_left.checked_sub(class.len() + other.len())?;
            if overlap(class, other) && self.seen.insert((a, b)) {
                self.open.push((a, b));
            }
        }
        Some(())
    }
}

fn overlap(a: &[(char, char)], b: &[(char, char)]) -> bool {
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        if a[i].0 <= b[j].1 && b[j].0 <= a[i].1 {
            return true;
        }
        if a[i].1 < b[j].1 { i += 1 } else { j += 1 }
    }
    false
}
