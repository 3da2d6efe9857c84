//! Random grammars: what they can derive is accepted, and of texts near to that, exactly those that a recognizer of a few
//! lines accepts as well.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use constrain::Source;

use crate::walk::{Model, Random};

const RULES: usize = 4;
/// Few characters, so that lexemes get in each other's way; two of them share a first byte.
const ALPHABET: [char; 5] = ['a', 'b', 'c', 'é', 'ê'];
const LENGTH_MAX: usize = 14;

enum Node {
    Class(Vec<char>, bool),
    Literal(String),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    Repeat(Box<Node>, usize, Option<usize>),
    Rule(usize),
}

struct Grammar(Vec<Node>);

impl Grammar {
    fn draw(random: &mut Random) -> Grammar {
        Grammar((0..RULES).map(|_| draw(random, 3)).collect())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (i, body) in self.0.iter().enumerate() {
            let name = if i == 0 { "root".into() } else { format!("rule-{i}") };
            write!(text, "{name} ::= ").unwrap();
            print(body, &mut text);
            text.push('\n');
        }
        text
    }

    /// A text that it can derive, if chance does not go too deep.
    fn derive(&self, random: &mut Random) -> Option<String> {
        let mut text = String::new();
        self.derive_from(&self.0[0], random, 12, &mut text)?;
        (text.chars().count() <= LENGTH_MAX).then_some(text)
    }

    fn derive_from(&self, node: &Node, random: &mut Random, depth: usize, text: &mut String) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match node {
            Node::Class(members, is_negated) => {
                let fitting: Vec<char> =
                    ALPHABET.into_iter().filter(|c| members.contains(c) != *is_negated).collect();
                text.push(*fitting.get(random.below(fitting.len().max(1)))?);
            }
            Node::Literal(literal) => text.push_str(literal),
            Node::Sequence(parts) => {
                parts.iter().try_for_each(|part| self.derive_from(part, random, depth, text))?;
            }
            Node::Either(parts) => {
                self.derive_from(&parts[random.below(parts.len())], random, depth, text)?;
            }
            Node::Repeat(part, n_min, n_max) => {
                let n = n_min + random.below(n_max.map_or(3, |n_max| n_max - n_min + 1));
                (0..n).try_for_each(|_| self.derive_from(part, random, depth, text))?;
            }
            Node::Rule(rule) => self.derive_from(&self.0[*rule], random, depth, text)?,
        }
        Some(())
    }

    fn accepts(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        self.ends(&self.0[0], &text, 0).contains(&text.len())
    }

    /// Where texts of a node can end that begin at `at`. Rules that begin with themselves would never answer.
    fn ends(&self, node: &Node, text: &[char], at: usize) -> BTreeSet<usize> {
        let behind = |node: &Node, starts: &BTreeSet<usize>| -> BTreeSet<usize> {
            starts.iter().flat_map(|at| self.ends(node, text, *at)).collect()
        };
        match node {
            Node::Class(members, is_negated) => {
                let fits = text.get(at).is_some_and(|c| members.contains(c) != *is_negated);
                if fits { [at + 1].into() } else { [].into() }
            }
            Node::Literal(literal) => {
                let literal: Vec<char> = literal.chars().collect();
                if text[at..].starts_with(&literal) { [at + literal.len()].into() } else { [].into() }
            }
            Node::Sequence(parts) => {
                // Not further than needed: what comes behind nothing may begin with this rule.
                parts.iter().fold([at].into(), |starts, part| behind(part, &starts))
            }
            Node::Either(parts) => parts.iter().flat_map(|part| self.ends(part, text, at)).collect(),
            Node::Repeat(part, n_min, n_max) => {
                let mut starts: BTreeSet<usize> = [at].into();
                let mut ends = if *n_min == 0 { starts.clone() } else { [].into() };
                // Past the length of the text nothing but empty parts can come.
                for n in 1..=n_max.unwrap_or(n_min + text.len()) {
                    starts = behind(part, &starts);
                    if n >= *n_min {
                        ends.extend(&starts);
                    }
                }
                ends
            }
            Node::Rule(rule) => self.ends(&self.0[*rule], text, at),
        }
    }
}

fn draw(random: &mut Random, depth: usize) -> Node {
    let n = 2 + random.below(2);
    let character = |random: &mut Random| ALPHABET[random.below(ALPHABET.len())];
    match random.below(if depth == 0 { 4 } else { 9 }) {
        0 => Node::Class((0..n).map(|_| character(random)).collect(), random.below(3) == 0),
        1 | 2 => Node::Literal((0..random.below(4)).map(|_| character(random)).collect()),
        3 => Node::Rule(random.below(RULES)),
        4 | 5 => Node::Sequence((0..n).map(|_| draw(random, depth - 1)).collect()),
        6 => Node::Either((0..n).map(|_| draw(random, depth - 1)).collect()),
        7 => {
            let n_min = random.below(3);
            let n_max = (random.below(2) == 0).then(|| n_min + 1 + random.below(2));
            Node::Repeat(Box::new(draw(random, depth - 1)), n_min, n_max)
        }
        // What most recursive rules of real grammars look like.
        _ => Node::Sequence(vec![
            Node::Literal(character(random).into()),
            Node::Repeat(Box::new(Node::Rule(random.below(RULES))), 0, Some(1)),
            draw(random, depth - 1),
        ]),
    }
}

fn print(node: &Node, text: &mut String) {
    let mut group = |parts: &[Node], between: &str| {
        text.push('(');
        for (i, part) in parts.iter().enumerate() {
            text.push_str(if i > 0 { between } else { "" });
            print(part, text);
        }
        text.push(')');
    };
    match node {
        Node::Class(members, is_negated) => {
            let sign = if *is_negated { "^" } else { "" };
            write!(text, "[{sign}{}]", members.iter().collect::<String>()).unwrap();
        }
        Node::Literal(literal) => write!(text, "\"{literal}\"").unwrap(),
        Node::Sequence(parts) => group(parts, " "),
        Node::Either(parts) => group(parts, " | "),
        Node::Repeat(part, n_min, n_max) => {
            group(std::slice::from_ref(part), "");
            let n_max = n_max.map_or(String::new(), |n| n.to_string());
            write!(text, "{{{n_min},{n_max}}}").unwrap();
        }
        Node::Rule(0) => text.push_str("root"),
        Node::Rule(rule) => write!(text, "rule-{rule}").unwrap(),
    }
}

/// One character less, more, or another.
fn change(text: &str, random: &mut Random) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    let at = random.below(chars.len() + 1);
    let other = ALPHABET[random.below(ALPHABET.len())];
    match random.below(3) {
        0 if at < chars.len() => drop(chars.remove(at)),
        1 if at < chars.len() => chars[at] = other,
        _ => chars.insert(at, other),
    }
    chars.into_iter().collect()
}

#[test]
fn random_grammars_mean_the_same_to_everyone() {
    let model = Model::new();
    let (mut n_grammars, mut n_recursive, mut n_fitting, mut n_others) = (0, 0, 0, 0);
    for seed in 0..600 {
        let mut random = Random(seed);
        let grammar = Grammar::draw(&mut random);
        let text = grammar.text();
        let constraint = match model.grammars.compile(&Source::Gbnf(text.clone())) {
            Ok(constraint) => constraint,
            Err(why) => {
                let why = why.to_string();
                // Left recursion, and grammars without a finite text.
                assert!(
                    why.contains("begins with itself") || why.contains("no possible"),
                    "seed {seed}: {why}\n{text}"
                );
                continue;
            }
        };
        n_grammars += 1;
        n_recursive += usize::from(text.contains("root)") || text.contains("(root"));
        for _ in 0..12 {
            let Some(derived) = grammar.derive(&mut random) else { continue };
            assert!(model.says(&*constraint, &derived), "seed {seed}: {derived:?} is refused by\n{text}");
            n_fitting += 1;
            let changed = change(&derived, &mut random);
            let expected = grammar.accepts(&changed);
            assert_eq!(model.says(&*constraint, &changed), expected, "seed {seed}: {changed:?} by\n{text}");
            n_others += usize::from(!expected);
        }
    }
    eprintln!(
        "{n_grammars} grammars, {n_recursive} recursive, {n_fitting} texts that fit, {n_others} that do not"
    );
    assert!(n_grammars > 200 && n_recursive > 20 && n_fitting > 1500 && n_others > 500);
}
