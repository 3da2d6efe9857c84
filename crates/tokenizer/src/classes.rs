//! The four classes of characters that split patterns speak of: letters, numbers, white space, and the rest.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

pub(crate) const OTHER: u8 = 0;
/// `\p{L}`
pub(crate) const LETTER: u8 = 1;
/// `\p{N}`
pub(crate) const NUMBER: u8 = 2;
/// `\s`, which is Unicode's White_Space
pub(crate) const SPACE: u8 = 3;

const PAGE: usize = 256;

/// Class of every code point: two levels, pages shared, about 20 KiB.
pub(crate) struct Classes {
    ascii: [u8; 128],
    page_of: Vec<u8>,
    pages: Vec<[u8; PAGE]>,
}

pub(crate) fn classes() -> &'static Classes {
    static CLASSES: LazyLock<Classes> = LazyLock::new(Classes::new);
    &CLASSES
}

impl Classes {
    fn new() -> Classes {
        let mut flat = vec![OTHER; 0x110000];
        fill(&mut flat, r"\p{L}", LETTER);
        fill(&mut flat, r"\p{N}", NUMBER);
        fill(&mut flat, r"\p{White_Space}", SPACE);
        let mut pages: Vec<[u8; PAGE]> = Vec::new();
        let mut page_of = Vec::with_capacity(flat.len() / PAGE);
        for chunk in flat.chunks_exact(PAGE) {
            let known = pages.iter().position(|page| page[..] == *chunk).unwrap_or_else(|| {
                pages.push(std::array::from_fn(|i| chunk[i]));
                pages.len() - 1
            });
            page_of.push(u8::try_from(known).expect("Unicode has fewer than 256 distinct pages of classes"));
        }
        Classes { ascii: std::array::from_fn(|i| flat[i]), page_of, pages }
    }

    /// Class and length in bytes of the character that starts at `text[at]`, which must be a character boundary of
    /// valid UTF-8.
    #[inline(always)]
    pub(crate) fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let first = text[at];
        if first < 0x80 { (self.ascii[first as usize & 127], 1) } else { self.multibyte(text, at) }
    }

    #[inline(never)]
    fn multibyte(&self, text: &[u8], at: usize) -> (u8, usize) {
        let continuation = |i: usize| text.get(at + i).map_or(0, |&b| b as usize & 0x3F);
        let first = text[at] as usize;
        let (code, len) = match first {
            0..0xE0 => ((first & 0x1F) << 6 | continuation(1), 2),
            0xE0..0xF0 => ((first & 0x0F) << 12 | continuation(1) << 6 | continuation(2), 3),
            _ => ((first & 0x07) << 18 | continuation(1) << 12 | continuation(2) << 6 | continuation(3), 4),
        };
        let page = self.page_of.get(code / PAGE).map_or(0, |&p| p as usize);
        (self.pages[page][code % PAGE], len)
    }
}

/// Marks in `flat` the code points of a one-class pattern.
fn fill(flat: &mut [u8], pattern: &str, class: u8) {
    let hir = regex_syntax::parse(pattern).expect("the pattern is a constant of this file");
    if let HirKind::Class(Class::Unicode(ranges)) = hir.kind() {
        for range in ranges.iter() {
            flat[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_agree_with_the_standard_library() {
        let classes = classes();
        let mut buffer = [0; 4];
        for c in (0..=0x10FFFF).filter_map(char::from_u32) {
            let (class, len) = classes.at(c.encode_utf8(&mut buffer).as_bytes(), 0);
            assert_eq!(len, c.len_utf8());
            assert_eq!(class == SPACE, c.is_whitespace(), "{c:?}");
            // The standard library and regex-syntax may be one Unicode version apart: only assigned-in-both counts.
            if class == LETTER {
                assert!(!c.is_numeric() && !c.is_whitespace(), "{c:?}");
            }
            if c.is_ascii() {
                assert_eq!((class == LETTER, class == NUMBER), (c.is_alphabetic(), c.is_numeric()));
            }
        }
        for (c, class) in [('中', LETTER), ('ß', LETTER), ('²', NUMBER), ('Ⅷ', NUMBER), ('\u{301}', OTHER)]
        {
            assert_eq!(classes.at(c.to_string().as_bytes(), 0).0, class, "{c}");
        }
    }
}
