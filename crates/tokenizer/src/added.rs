//! Finding added tokens in a text: leftmost first, and of those that start at one place the longest.

use std::ops::Range;

use crate::spec::AddedToken;
use crate::tokenizer::TokenId;

/// Which added tokens a search looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All: text that may name special tokens.
    All,
    /// Those that are not special: text from users.
    NotSpecial,
}

/// The added tokens to look for in the raw text, and those to look for after normalization.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    pub(crate) raw: Finder,
    pub(crate) normalized: Finder,
}

impl AddedTokens {
    pub(crate) fn new(tokens: &[AddedToken], wanted: Wanted) -> AddedTokens {
        let of = |normalized: bool| {
            tokens.iter().filter(move |token| {
                token.normalized == normalized && (wanted == Wanted::All || !token.special)
            })
        };
        AddedTokens { raw: Finder::new(of(false)), normalized: Finder::new(of(true)) }
    }
}

/// A trie over the bytes of the tokens' contents.
#[derive(Debug)]
pub(crate) struct Finder {
    /// Whether some token starts with this byte: what the scan over ordinary text looks at.
    starts: Box<[bool; 256]>,
    nodes: Vec<Node>,
    tokens: Vec<AddedToken>,
}

#[derive(Debug, Default)]
struct Node {
    /// Sorted by byte.
    children: Vec<(u8, u32)>,
    /// Index of the token that ends here.
    token: Option<u32>,
}

/// A part of a text that was searched.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    Text(&'a str),
    Token(TokenId),
}

impl Finder {
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = &'a AddedToken>) -> Finder {
        let mut finder =
            Finder { starts: Box::new([false; 256]), nodes: vec![Node::default()], tokens: Vec::new() };
        for token in tokens {
            finder.insert(token);
        }
        finder
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub(crate) fn first_chars(&self) -> impl Iterator<Item = char> {
        self.tokens.iter().filter_map(|token| token.content.chars().next())
    }

    /// Calls `part` for the tokens in `text` and for the text between them, in order, without empty texts.
    pub(crate) fn split<'a>(&self, text: &'a str, mut part: impl FnMut(Part<'a>)) {
        let mut done = 0;
        let mut at = 0;
        while !self.is_empty() && at < text.len() {
            let Some(start) = self.next_start(text.as_bytes(), at) else { break };
            match self.match_at(text, start, done) {
                Some((range, id)) => {
                    if done < range.start {
                        part(Part::Text(&text[done..range.start]));
                    }
                    part(Part::Token(id));
                    done = range.end;
                    at = done;
                }
                None => at = start + 1,
            }
        }
        if done < text.len() {
            part(Part::Text(&text[done..]));
        }
    }

    /// Whether a token starts at the beginning of `text`, or might if more text followed.
    pub(crate) fn may_start(&self, text: &str) -> bool {
        let mut node = 0;
        for &byte in text.as_bytes() {
            match self.child(node, byte) {
                Some(child) => node = child,
                None => return false,
            }
            if self.nodes[node].token.is_some() {
                return true;
            }
        }
        node != 0
    }

    /// Whether `text` is the beginning of a token and not a whole one.
    pub(crate) fn is_beginning(&self, text: &str) -> bool {
        let mut node = 0;
        for &byte in text.as_bytes() {
            match self.child(node, byte) {
                Some(child) if self.nodes[child].token.is_none() => node = child,
                _ => return false,
            }
        }
        node != 0
    }

    fn insert(&mut self, token: &AddedToken) {
        let mut node = 0;
        for &byte in token.content.as_bytes() {
            node = match self.nodes[node].children.binary_search_by_key(&byte, |child| child.0) {
                Ok(i) => self.nodes[node].children[i].1 as usize,
                Err(i) => {
                    let new = self.nodes.len();
                    self.nodes[node].children.insert(i, (byte, new as u32));
                    self.nodes.push(Node::default());
                    new
                }
            };
        }
        if let Some(&first) = token.content.as_bytes().first() {
            self.starts[first as usize] = true;
            self.nodes[node].token = Some(self.tokens.len() as u32);
            self.tokens.push(token.clone());
        }
    }

    fn child(&self, node: usize, byte: u8) -> Option<usize> {
        let children = &self.nodes[node].children;
        children.binary_search_by_key(&byte, |child| child.0).ok().map(|i| children[i].1 as usize)
    }

    fn next_start(&self, text: &[u8], at: usize) -> Option<usize> {
        text[at..].iter().position(|&byte| self.starts[byte as usize]).map(|i| at + i)
    }

    /// The longest token that starts at `start`, with the white space it swallows; nothing before `done` is touched.
    fn match_at(&self, text: &str, start: usize, done: usize) -> Option<(Range<usize>, TokenId)> {
        let mut node = 0;
        let mut longest = None;
        for (i, &byte) in text.as_bytes()[start..].iter().enumerate() {
            let Some(child) = self.child(node, byte) else { break };
            node = child;
            if let Some(token) = self.nodes[node].token {
                longest = Some((start + i + 1, &self.tokens[token as usize]));
            }
        }
        let (mut end, token) = longest?;
        let mut start = start;
        if token.single_word && touches_word(text, start, end) {
            return None;
        }
        if token.lstrip {
            start = done + text[done..start].trim_end().len();
        }
        if token.rstrip {
            end = text.len() - text[end..].trim_start().len();
        }
        Some((start..end, token.id))
    }
}

fn touches_word(text: &str, start: usize, end: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text[..start].chars().next_back().is_some_and(is_word) || text[end..].chars().next().is_some_and(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finder(tokens: &[AddedToken]) -> Finder {
        Finder::new(tokens.iter())
    }

    fn split<'a>(finder: &Finder, text: &'a str) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        finder.split(text, |part| parts.push(part));
        parts
    }

    #[test]
    fn leftmost_then_longest() {
        let finder = finder(&[
            AddedToken::special(1, "<a>"),
            AddedToken::special(2, "<a><b>"),
            AddedToken::special(3, "b>c"),
        ]);
        use Part::{Text, Token};
        assert_eq!(split(&finder, "x<a><b>c"), [Text("x"), Token(2), Text("c")]);
        assert_eq!(split(&finder, "<a><bb>c"), [Token(1), Text("<b"), Token(3)]);
        assert_eq!(split(&finder, "<a"), [Text("<a")]);
        assert_eq!(split(&finder, ""), []);
    }

    #[test]
    fn strips_and_single_words() {
        let mask = AddedToken { lstrip: true, rstrip: true, ..AddedToken::special(1, "<m>") };
        let word = AddedToken { single_word: true, ..AddedToken::special(2, "hi") };
        let finder = finder(&[mask, word]);
        use Part::{Text, Token};
        assert_eq!(split(&finder, "a <m> <m>\n b"), [Text("a"), Token(1), Token(1), Text("b")]);
        assert_eq!(split(&finder, "hi this _hi hi"), [Token(2), Text(" this _hi "), Token(2)]);
    }

    #[test]
    fn may_start_sees_tokens_cut_short() {
        let finder = finder(&[AddedToken::special(1, "<|end|>")]);
        for (text, expected) in
            [("<|", true), ("<|end|>x", true), ("<|enx", false), ("x", false), ("", false)]
        {
            assert_eq!(finder.may_start(text), expected, "{text}");
        }
    }
}
