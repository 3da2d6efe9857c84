//! Descriptions made to break a server: each is refused by a sentence or works, in bounded time; the next good one works.

use std::time::{Duration, Instant};

use constrain::{CompileError, Source};
use serde_json::{Value, json};

use crate::walk::Model;

/// Generous, because tests share a machine: alone, the worst of these takes a second.
const PATIENCE: Duration = Duration::from_secs(120);

fn regex(text: impl Into<String>) -> Source {
    Source::Regex(text.into())
}

fn lark(text: impl Into<String>) -> Source {
    Source::Lark(text.into())
}

fn gbnf(text: impl Into<String>) -> Source {
    Source::Gbnf(text.into())
}

/// Compiles, goes a few tokens in, and returns the refusal, if it is one.
fn outcome(model: &Model, source: &Source) -> Option<String> {
    let start = Instant::now();
    let shown: String = format!("{source:?}").chars().take(100).collect();
    let outcome = match model.grammars.compile(source) {
        Ok(mut constraint) => {
            for _ in 0..20 {
                let allowed = crate::walk::ids_of(constraint.allowed());
                let Some(&id) = allowed.iter().find(|&&id| id != model.end) else { break };
                if constraint.commit(id) != Ok(engine::Continuation::Open) {
                    break;
                }
            }
            None
        }
        Err(CompileError::Invalid(why)) => Some(why),
        Err(CompileError::Internal(why)) => panic!("{shown}: {why}"),
    };
    assert!(start.elapsed() < PATIENCE, "{shown} took {:?}", start.elapsed());
    outcome
}

#[test]
fn what_means_nothing_is_refused() {
    let model = Model::new();
    let bad = [
        regex("("),
        regex("[z-a]"),
        regex("(?<=a)b"),
        regex(r"(a)\1"),
        regex("x".repeat(100_000)),
        regex("(".repeat(10_000) + &")".repeat(10_000)),
        lark(""),
        lark("start: missing"),
        lark("start: \"a"),
        lark("nothing: \"a\""),
        lark("A: A \"b\"\nstart: A"),
        lark(format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000))),
        lark("x".repeat(1 << 20)),
        gbnf("root ::= root \"a\" | \"a\""),
        gbnf(format!("root ::= {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000))),
        gbnf("root ::= \"a\" # ".to_owned() + &"x".repeat(1 << 20)),
        Source::JsonSchema(json!({"type": "king"})),
        Source::JsonSchema(json!({"type": "string", "pattern": "("})),
        Source::JsonSchema(json!({"$ref": "#/$defs/missing"})),
        Source::JsonSchema(json!({"$ref": "http://169.254.169.254/schema"})),
        Source::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 4})),
        Source::JsonSchema(json!({"items": [{"multipleOf": 999_983}]})),
        Source::JsonSchema(json!({"multipleOf": 0.123_456_7})),
        Source::JsonSchema(json!({"multipleOf": 1e300})),
        lark("start: %json {\"type\": \"integer\", \"multipleOf\": 999983}"),
        Source::JsonSchema(json!(false)),
        Source::JsonSchema(json!("text")),
        Source::JsonSchema(json!({"enum": vec!["long text"; 50_000]})),
        Source::Choice(vec!["a".into(); 10_000]),
        Source::Choice(vec!["a".repeat(1 << 20)]),
        Source::Choice(vec![String::new()]),
    ];
    for source in &bad {
        let shown: String = format!("{source:?}").chars().take(100).collect();
        let why = outcome(&model, source).unwrap_or_else(|| panic!("{shown} is taken"));
        assert!(why.len() > 5 && !why.contains("<state>"), "{shown}: {why}");
    }
    assert!(outcome(&model, &regex("[a-z]+")).is_none());
}

#[test]
fn what_is_heavy_is_bounded() {
    let model = Model::new();
    let chain = |n: usize| (0..n).map(|i| format!("r{i}: r{} \"a\"\n", i + 1)).collect::<String>();
    let terminals = |n: usize| (0..n).map(|i| format!("T{i}: T{} \"a\"\n", i + 1)).collect::<String>();
    let gbnf_chain = |n: usize, sign: &str| {
        (0..n).map(|i| format!("r{i} ::= r{}{sign} \"a\"\n", i + 1)).collect::<String>()
    };
    let gbnf_doubled = |n: usize| {
        (0..n).map(|i| format!("r{i} ::= r{} r{} | \"(\" r0 \")\"\n", i + 1, i + 1)).collect::<String>()
    };
    let nested =
        (0..100).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}));
    let either = (0..12).fold(json!({"type": "string"}), |inner, i| {
        json!({"anyOf": [{"type": "object", "properties": {(format!("p{i}")): inner.clone()}},
                         {"allOf": [inner.clone(), {"maxLength": i}]}]})
    });
    let recursive = json!({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}});
    let circle =
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    let wide: Value = (0..5000)
        .map(|i| (format!("property{i}"), json!({"type": "string", "pattern": "^(a|b)*c$"})))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let heavy = [
        regex("a{1000000000}"),
        regex("(a+)+$"),
        regex("(a{1000}){1000}"),
        regex("(a?){3000}a{3000}"),
        regex("(.*a.{50}){30}"),
        regex("(a|aa)+b"),
        regex(r"\p{L}{1,500}\p{N}{1,500}"),
        lark("start: start \"a\" | \"a\""),
        lark("start: a start | start a |\na: \"x\" |"),
        lark(format!("start: r0\n{}r20000: \"b\"", chain(20_000))),
        lark(format!("start: T0\n{}T9000: \"b\"", terminals(9_000))),
        gbnf(format!("root ::= r0\n{}r2000 ::= \"b\"", gbnf_chain(2_000, ""))),
        gbnf(format!("root ::= r0\n{}r2000 ::= \"b\" root?", gbnf_chain(2_000, "?"))),
        gbnf("root ::= (((\"a\"{9999}){9999}){9999}){9999}"),
        gbnf("root ::= (((\"a\" root? \"b\"){9999}){9999}){9999}"),
        gbnf("root ::= (\"a\"? \"a\"? root? \"a\"*){0,9999}".replace("root?", "(\"b\" root)?")),
        gbnf(format!("root ::= r0\n{}r40 ::= \"b\"", gbnf_doubled(40))),
        gbnf(format!("root ::= {}", "\"a\"? ".repeat(30_000))),
        gbnf(format!("root ::= \"x\" root \"y\" | {}", "[a-z]* ".repeat(9_000))),
        lark(format!("start: {}", "\"a\"? ".repeat(30_000))),
        Source::JsonSchema(nested),
        Source::JsonSchema(either),
        Source::JsonSchema(recursive),
        Source::JsonSchema(circle),
        Source::JsonSchema(json!({"type": "object", "properties": wide})),
        Source::JsonSchema(json!({"type": "string", "maxLength": 1_000_000_000})),
        Source::JsonSchema(json!({"type": "array", "minItems": 1_000_000, "items": {"type": "string"}})),
        Source::JsonSchema(json!({"type": "integer", "minimum": -1e300, "maximum": 1e300})),
        Source::JsonSchema(json!({"type": "integer", "multipleOf": 9_973})),
        Source::JsonSchema(json!({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"})),
    ];
    for source in &heavy {
        // Taken or refused, but neither a crash nor a minute.
        let why = outcome(&model, source);
        assert!(why.is_none_or(|why| why.len() > 5));
    }
    assert!(outcome(&model, &Source::JsonObject).is_none());
}

#[test]
fn a_thousand_grammars_leave_a_bounded_cache() {
    let model = Model::new();
    for i in 0..1000 {
        let source = regex(format!("a{{{}}}b{i}", i % 10));
        drop(model.grammars.compile(&source).unwrap());
    }
    assert_eq!(model.grammars.n_cached(), 64);
    assert!(model.grammars.cached(&regex("a{9}b999")).is_some());
    assert!(model.grammars.cached(&regex("a{0}b0")).is_none());
}
