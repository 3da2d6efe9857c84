use super::is_gbnf;
use crate::CompileError;

/// With a vocabulary of two tokens.
fn to_lark(text: &str) -> Result<String, CompileError> {
    super::to_lark(text, &|spelled| {
        ["<think>", "<[1]>"].iter().position(|token| *token == spelled).map(|id| id as u32)
    })
}

fn refused(text: &str) -> String {
    to_lark(text).expect_err(text).to_string()
}

#[test]
fn what_has_no_meaning_is_refused_where_it_stands() {
    for (text, why) in [
        ("", "a grammar needs a rule `root`"),
        ("start ::= \"a\"", "a grammar needs a rule `root`"),
        ("root ::= \"a\" thing\n", "line 1, column 14: the rule `thing` is not defined"),
        ("root ::= a\na ::= \"x\" |\n  b", "line 3, column 3: the rule `b` is not defined"),
        ("root ::= root \"a\" | \"a\"", "line 1, column 10: the rule `root` begins with itself"),
        ("root ::= a\na ::= b \"x\"\nb ::= \"y\"? a", "line 3, column 12: the rule `a` begins with itself"),
        ("root ::= a\na ::= (\"é\"* a) \"x\"", "line 2, column 13: the rule `a` begins with itself"),
        ("root ::= \"a\"\nspare ::= spare", "line 2, column 11: the rule `spare` begins with itself"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2, column 1: the rule `root` is defined twice"),
        ("root ::= \"a", "line 1, column 12: expected `\"`"),
        ("root ::= [ab", "line 1, column 13: expected `]`"),
        ("root ::= [a-", "line 1, column 13: expected `]`"),
        ("root ::= []", "line 1, column 10: no character is in this class"),
        ("root ::= [^\\x00-\\U0010FFFF]", "line 1, column 10: no character is in this class"),
        ("root ::= [z-a]", "line 1, column 11: the range ends before its beginning"),
        ("root ::= (\"a\"", "line 1, column 14: expected `)`"),
        ("root ::= \"a\")", "line 1, column 13: expected a literal"),
        ("root ::= * \"a\"", "line 1, column 10: expected a literal"),
        ("root := \"a\"", "line 1, column 6: expected `::=`"),
        ("root ::= \"a\"\n\"b\" ::= \"c\"", "line 2, column 5: expected a literal"),
        ("root ::= \"\\q\"", "line 1, column 11: this escape is not known"),
        ("root ::= \"\\x4\"", "line 1, column 11: expected 2 hexadecimal digits"),
        ("root ::= \"\\uD800\"", "line 1, column 11: this number stands for no character"),
        ("root ::= \"\\U00110000\"", "line 1, column 11: this number stands for no character"),
        ("root ::= \"\\ué123\"", "line 1, column 11: expected 4 hexadecimal digits"),
        ("root ::= \"a\"{}", "line 1, column 14: expected a number of repetitions"),
        ("root ::= \"a\"{2,1}", "line 1, column 13: the most repetitions are fewer than the least"),
        ("root ::= \"a\"{1000000000}", "line 1, column 14: there can be at most 10000 repetitions"),
        ("root ::= \"a\"{99999999999999999999}", "line 1, column 14: there can be at most 10000 repetitions"),
        ("root ::= \"a\"{1", "line 1, column 15: expected `}`"),
        ("root ::= <thin>", "line 1, column 10: `<thin>` is no token of this model"),
        ("root ::= <[2]>", "line 1, column 10: `<[2]>` is no token of this model"),
        ("root ::= <think", "line 1, column 10: expected the name of a token"),
        ("root ::= <think >", "line 1, column 10: expected the name of a token"),
        ("root ::= <\u{2003}>", "line 1, column 10: `<\u{2003}>` is no token of this model"),
        ("root ::= !<think>", "line 1, column 10: all tokens but one are not supported"),
    ] {
        assert!(refused(text).starts_with(why), "{text:?}: {}", refused(text));
    }
}

#[test]
fn what_is_too_large_is_refused() {
    let rules = |n: usize| (0..n).map(|i| format!("r{i} ::= \"a\"\n")).collect::<String>() + "root ::= r0";
    assert!(to_lark(&rules(2047)).is_ok());
    assert!(refused(&rules(2048)).contains("at most 2048 rules"));
    let groups = |n: usize| format!("root ::= {}\"a\"{}", "(".repeat(n), ")".repeat(n));
    assert!(to_lark(&groups(128)).is_ok());
    assert!(refused(&groups(129)).contains("more than 128 deep"));
    let classes = |n: u32| (0..n).map(|i| format!("[a-\\U{:08x}]", 0x10000 + i)).collect::<String>();
    assert!(refused(&format!("root ::= {}", classes(70_000))).contains("too large"));
    // A rule within itself, and a thousand ways to go on: each is to be compared with each.
    let ways: String = (0..900).map(|i| format!(" | ([a-z] | \"{i}\")* \"x{i}\" root")).collect();
    assert!(refused(&format!("root ::= \"a\" root \"b\"{ways}")).contains("too complex"));
}

#[test]
fn the_language_of_a_grammar_is_seen_in_its_first_rule() {
    for (text, expected) in [
        ("root ::= \"a\"", true),
        ("\n# one: two\n  root::=\"a\"", true),
        ("root\n  ::= \"a\"", true),
        ("start: \"::=\"", false),
        ("%llguidance {}\nstart: \"a\"", false),
        ("// root ::= x\nstart: \"a\"", false),
        ("", false),
        ("::= \"a\"", false),
    ] {
        assert_eq!(is_gbnf(text), expected, "{text:?}");
    }
}

/// Masks are cheap where texts run within one lexeme, so these must not be taken apart.
#[test]
fn strings_stay_whole_beside_what_ends_them() {
    let lark = to_lark(
        r#"
        root ::= value
        value ::= object | string space
        object ::= "{" space (pair ("," space pair)*)? "}" space
        pair ::= string space ":" space value
        string ::= "\"" ([^"\\\x00-\x1f] | "\\" .)* "\""
        space ::= ([ \n] space)?
        "#,
    )
    .unwrap();
    // The string with its space is one lexeme where it is a value; what repeats within it is in no rule.
    let rules = lark.lines().filter(|line| line.starts_with(['r', 'e', 's']));
    assert!(rules.clone().count() > 3 && rules.clone().all(|line| !line.contains("\\x{5d}-")), "{lark}");
    assert_eq!(lark.matches("\\x{5d}-").count(), 1, "{lark}");
}
