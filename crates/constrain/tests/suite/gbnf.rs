//! Grammars as people write them for llama.cpp: what they say is accepted, what they do not say is refused.

use constrain::Source;
use engine::Continuation;

use crate::walk::{Model, ids_of};

/// Everything that the language has: white space and comments anywhere, escapes, repetitions, rules over many lines.
pub(crate) const JSON: &str = r#"
# A JSON text. White space is bounded, so that it ends.
root   ::= value
value  ::= object | array | string | number
         | ("true" | "false" | "null") ws   # an alternative on a line of its own
object ::=
  "{" ws (
    member ("," ws member)*
  )? "}" ws
member ::= string ":" ws value
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" char* "\"" ws
char   ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" hex{4})
hex    ::= [0-9a-fA-F]
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"#;

/// Space repeats itself at its end, and the rules go in circles.
pub(crate) const ARITHMETIC: &str = r#"
root ::= (sum "=" ws product "\n")+
sum  ::= product ([-+] ws product)*
product ::= factor (("*" | "/") ws factor)*
factor ::= name | number | "(" ws sum ")" ws
name ::= [a-z] [a-z0-9_]* ws
number ::= [0-9]+ ws
ws ::= ([ \t\n] ws)?
"#;

const LIST: &str = "root ::= item{2,4}\nitem ::= \"- \" [^\\n]+ \"\\n\"";

/// The moves of a game, without a look at the board.
pub(crate) const CHESS: &str = r#"
root ::= turn{1,40} result
turn ::= [1-9] [0-9]? ". " move " " move " "
move ::= (pawn | piece | castle) [+#]?
piece ::= [NBKQR] [a-h]? [1-8]? "x"? square
pawn ::= ([a-h] "x")? square ("=" [NBQR])?
square ::= [a-h] [1-8]
castle ::= "O-O" "-O"?
result ::= "1-0" | "0-1" | "\u00BD-\U000000BD"
"#;

/// Blocks within blocks, and text between them that could be their signs.
const MARKUP: &str = r#"
root ::= block+
block ::= "<p>" (text | block)* "</p>" | "<br>"
text ::= [^<>]+
"#;

fn check(grammar: &str, fitting: &[&str], others: &[&str]) {
    let model = Model::new();
    let constraint = model.grammars.compile(&Source::from_grammar(grammar.into())).expect(grammar);
    for text in fitting {
        assert!(model.says(&*constraint, text), "{text:?} is refused by {grammar}");
    }
    for text in others {
        assert!(!model.says(&*constraint, text), "{text:?} is accepted by {grammar}");
    }
}

#[test]
fn json() {
    let deep = format!("{}1{}", "[".repeat(40), "]".repeat(40));
    check(
        JSON,
        &[
            "{}",
            "[]",
            "null",
            "true",
            "-12.5e+10",
            "\"\\u00e9 \\\"née\\\" 日本\\n\"",
            r#"{"name": "Ann", "tags": ["a", "b,]}", {}], "n": [1, -2.5e-3, null], "o": {"p": {"q": false}}}"#,
            "{\n  \"a\": [\n    1,\n    2\n  ]\n}\n",
            &deep,
        ],
        &[
            "",
            "{",
            "}",
            "nul",
            "01",
            "1.",
            "{a: 1}",
            "{\"a\" 1}",
            "[1,]",
            "\"\\x\"",
            "\"\n\"",
            "\"\\u12g4\"",
            "[1]]",
            "[  1]",
            "1 1",
            "12345678901234567890",
        ],
    );
}

#[test]
fn arithmetic() {
    check(
        ARITHMETIC,
        &["1=1\n", "a_1 + (2 * b) \n= 3\n", "1 = 2 * x\n\n \n", "(((1)))=1\nx=y\n", "a-b/c=0\n"],
        &["", "1=1", "1+=1\n", "(1=1\n", "1=1+1\n", "A=1\n", "1 1=1\n", "a b=1\n"],
    );
}

#[test]
fn lists_and_games() {
    check(
        LIST,
        &["- a\n- - b\n", "- é\n- 2\n- 3\n- 4\n"],
        &["- a\n", "- \n- b\n", "- a\n- b\n- c\n- d\n- e\n", "a\n"],
    );
    check(
        CHESS,
        &["1. e4 e5 2. Nf3 Nc6 3. O-O O-O-O+ 1-0", "1. exd8=Q# Ra1xb2 0-1", "9. e4 e5 ½-½"],
        &["1. e4 1-0", "0. e4 e5 1-0", "1. e9 e5 1-0", "1. e4 e5", "1. O-O-O-O e5 1-0", "1. e4 e5 ½-1"],
    );
    check(
        MARKUP,
        &["<br>", "<p>a p /p br<br></p><p></p>", "<p><p>x</p>y<p>z</p></p>"],
        &["", "a", "<p>", "<p></p></p>", "<p><</p>", "<p><p></p>", "<b>"],
    );
}

#[test]
fn signs_and_escapes() {
    check(
        r#"root ::= "\x41\u00e9\U0001F600\t\r\n\\\"\[\]" [\]\-a] [a-] [^\]] . ".*"{2}"#,
        &["Aé😀\t\r\n\\\"[]]-\n日.*.*", "Aé😀\t\r\n\\\"[]-a[].*.*"],
        &[
            "Aé😀\t\r\n\\\"[]b-\n日.*.*",
            "Aé😀\t\r\n\\\"[]]b\n日.*.*",
            "Aé😀\t\r\n\\\"[]]-]日.*.*",
            "Aé😀\t\r\n\\\"[]]-a日xxxx",
        ],
    );
    // Lark reads neither of these as they are.
    check("root ::= \"\\x7f/\\x01\" [/\\x00] \"<a>\"", &["\x7f/\x01/<a>", "\x7f/\x01\0<a>"], &["/\x01/<a>"]);
}

#[test]
fn repetitions() {
    let numbered = |grammar: &str, allowed: &[usize]| {
        let texts: Vec<String> = (0..9).map(|n| "ab".repeat(n)).collect();
        let (fitting, others): (Vec<usize>, Vec<usize>) = (0..9).partition(|n| allowed.contains(n));
        let pick = |at: Vec<usize>| at.into_iter().map(|n| texts[n].as_str()).collect::<Vec<_>>();
        check(grammar, &pick(fitting), &pick(others));
    };
    numbered("root ::= \"ab\"*", &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    numbered("root ::= \"ab\"+", &[1, 2, 3, 4, 5, 6, 7, 8]);
    numbered("root ::= \"ab\"?", &[0, 1]);
    numbered("root ::= (\"a\" \"b\"){3}", &[3]);
    numbered("root ::= \"ab\"{ 6, }", &[6, 7, 8]);
    numbered("root ::= \"ab\"{2,4}", &[2, 3, 4]);
    numbered("root ::= (\"ab\"{2}){2,3} | \"ab\"{0}", &[0, 4, 6]);
    numbered("root ::= \"\" | two\ntwo ::= \"ab\" \"ab\" two | \"abab\"", &[0, 2, 4, 6, 8]);
    // The same from a rule that is recursive for good.
    numbered("root ::= pair{2,3}\npair ::= \"a\" pair? \"b\" | \"ab\"", &[2, 3]);
}

/// Where the longest match is the wrong one.
#[test]
fn no_text_is_lost_to_a_longer_one() {
    // Each is kept from being one expression by a rule that goes on within itself.
    let nested = "\nnest ::= \"(\" nest? \")\"";
    for (grammar, fitting, others) in [
        (
            "root ::= \"a\" \"bc\" | \"ab\" \"d\" | nest",
            &["abc", "abd", "(())"][..],
            &["ab", "abcd", "(()"][..],
        ),
        ("root ::= [a-z]+ \"z\" nest", &["zz()", "az()", "azzz(())"], &["z()", "a()", "az"]),
        ("root ::= \"é\" \"ê\" nest | \"éê\" \"x\"", &["éê()", "éêx"], &["éê", "éx"]),
        ("root ::= ws \"x\" ws nest ws\nws ::= \" \"*", &["x()", "  x  () ", "x ( )"][..2], &["x ( )", " x"]),
        (
            "root ::= (\"a\" | \"aa\" | nest){3}",
            &["aaa", "aaaa", "aaaaaa", "a()aa"],
            &["aa", "aaaaaaa", "a()"],
        ),
        ("root ::= \"a\"* nest \"a\"* \"ab\"", &["a()aab", "()ab"], &["()b", "a()a"]),
    ] {
        check(&format!("{grammar}{nested}"), fitting, others);
    }
}

/// A special token by its name, and one that is text elsewhere by its number: both only where the grammar names them.
#[test]
fn single_tokens() {
    let model = Model::new();
    let id = |text: &str| model.tokenizer.id_of(text).expect("the vocabulary has it");
    let (start, b) = (id("<|im_start|>"), id("b"));
    let grammar = format!("root ::= turn+\nturn ::= <|im_start|> [c-z]+ <[{b}]> (\"b\" | <|im_start|>)?");
    let mut constraint = model.grammars.compile(&Source::from_grammar(grammar)).unwrap();
    assert_eq!(ids_of(constraint.allowed()), [start]);
    let mut take = |id: u32| {
        assert_eq!(constraint.commit(id), Ok(Continuation::Open), "{id}");
        ids_of(constraint.allowed())
    };
    let is_word = |id: &u32| {
        let bytes = model.tokenizer.token_bytes(*id);
        !bytes.is_empty() && bytes.iter().all(|byte| (b'c'..=b'z').contains(byte))
    };
    let allowed = take(start);
    let is_long = |id: &&u32| model.tokenizer.token_bytes(**id).len() > 1;
    let long = *allowed.iter().find(is_long).expect("the vocabulary has words");
    assert!(allowed.iter().all(is_word), "{allowed:?}");
    let (named, words): (Vec<u32>, Vec<u32>) = take(long).into_iter().partition(|id| *id == b);
    assert!(named == [b] && words.iter().all(is_word), "{words:?}");
    // Behind the token comes the letter, another turn, or the end.
    let mut expected = vec![start, b, model.end];
    expected.sort_unstable();
    let mut allowed = take(b);
    allowed.sort_unstable();
    assert_eq!(allowed, expected);
    assert!(take(start).iter().all(|id| is_word(id) || *id == start || *id == model.end));
}
