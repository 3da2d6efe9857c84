//! Whatever is drawn, the output fits; whatever fits can be drawn.

use std::collections::BTreeMap;

use constrain::{CompileError, Source};
use engine::Continuation;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::walk::{Model, ids_of};

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "kind": {"enum": ["cat", "dog", "bird"]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
            "score": {"type": ["number", "null"], "minimum": -2, "maximum": 2}
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": false,
        "$defs": {"tag": {"type": "string", "pattern": "^[a-z]{2,5}$"}}
    })
}

/// By hand, for this one schema: an independent reading of what it says.
fn check_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let map = value.as_object().expect("an object");
    assert!(map.keys().all(|key| ["name", "age", "kind", "tags", "score"].contains(&key.as_str())), "{text}");
    assert!((1..=8).contains(&map["name"].as_str().unwrap().chars().count()), "{text}");
    assert!(map["age"].as_u64().unwrap() <= 130, "{text}");
    assert!(["cat", "dog", "bird"].contains(&map["kind"].as_str().unwrap()), "{text}");
    let tags = map["tags"].as_array().unwrap();
    assert!(tags.len() <= 3, "{text}");
    for tag in tags.iter().map(|tag| tag.as_str().unwrap()) {
        assert!((2..=5).contains(&tag.len()) && tag.bytes().all(|b| b.is_ascii_lowercase()), "{text}");
    }
    if let Some(score) = map.get("score").filter(|score| !score.is_null()) {
        assert!((-2.0..=2.0).contains(&score.as_f64().unwrap()), "{text}");
    }
}

#[test]
fn json_is_valid_against_its_schema() {
    let model = Model::new();
    let constraint = model.grammars.compile(&Source::JsonSchema(person())).unwrap();
    let texts: Vec<String> = (0..50)
        .map(|seed| model.walk(&mut *constraint.fork(), seed, 2000).expect("every part of it is bounded"))
        .collect();
    texts.iter().for_each(|text| check_person(text));
    assert!(texts.iter().any(|text| text != &texts[0]), "they are drawn, not made up");
}

#[test]
fn any_object_is_json() {
    let model = Model::new();
    let constraint = model.grammars.compile(&Source::JsonObject).unwrap();
    let first = ids_of(constraint.allowed());
    assert!(first.iter().all(|&id| model.tokenizer.token_bytes(id)[0] == b'{'), "{first:?}");
    for seed in 0..20 {
        // Strings have no bound here, so not every walk ends.
        if let Some(text) = model.walk(&mut *constraint.fork(), seed, 3000) {
            // Numbers are not read: JSON has larger ones than f64.
            let object = serde_json::from_str::<BTreeMap<String, IgnoredAny>>(&text);
            assert!(object.is_ok(), "{object:?}: {text}");
        }
    }
}

#[test]
fn expressions_choices_and_grammars_hold() {
    let model = Model::new();
    let walk = |source: Source, seed| {
        let mut constraint = model.grammars.compile(&source).unwrap();
        model.walk(&mut *constraint, seed, 500).unwrap()
    };
    for seed in 0..20 {
        let date = walk(Source::Regex(r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])".into()), seed);
        assert!(date.len() == 7 && date.as_bytes()[4] == b'-', "{date}");
        assert!(
            date[..4].parse::<u32>().is_ok() && (1..=12).contains(&date[5..].parse::<u32>().unwrap()),
            "{date}"
        );
        let choices = ["yes", "no", "née \"quoted\"\\\n", "yes, but"].map(String::from);
        let chosen = walk(Source::Choice(choices.to_vec()), seed);
        assert!(choices.contains(&chosen), "{chosen}");
        let sum = walk(Source::Lark("start: NUMBER (\"+\" NUMBER){1,3}\nNUMBER: /[0-9]{1,2}/".into()), seed);
        assert!((2..=4).contains(&sum.split('+').count()), "{sum}");
        assert!(sum.split('+').all(|n| n.len() <= 2 && n.parse::<u32>().is_ok()), "{sum}");
    }
}

#[test]
fn what_fits_can_be_said_and_ends_only_where_it_is_complete() {
    let model = Model::new();
    let text = r#"{"name": "Ann", "age": 7, "kind": "cat", "tags": []}"#;
    let mut constraint = model.grammars.compile(&Source::JsonSchema(person())).unwrap();
    let mut last = Continuation::Open;
    for id in model.tokenizer.encode(text) {
        assert_eq!(last, Continuation::Open);
        let allowed = ids_of(constraint.allowed());
        assert!(allowed.contains(&id), "{:?} is not allowed", model.tokenizer.decode(&[id]));
        assert!(!allowed.contains(&model.end));
        last = constraint.commit(id).unwrap();
    }
    // Nothing can follow the last bracket, so nobody has to draw the end.
    assert_eq!(last, Continuation::Complete);
    // Where more could follow, the end is offered.
    let mut constraint = model.grammars.compile(&Source::Regex("a+".into())).unwrap();
    assert!(!ids_of(constraint.allowed()).contains(&model.end));
    let a = model.tokenizer.encode("a")[0];
    assert_eq!(constraint.commit(a), Ok(Continuation::Open));
    assert!(ids_of(constraint.allowed()).contains(&model.end));
    assert_eq!(constraint.commit(model.end), Ok(Continuation::Complete));
}

#[test]
fn properties_come_in_the_order_of_the_schema() {
    let model = Model::new();
    let ordered = |names: [&str; 2]| {
        let properties = names.map(|name| (name.to_owned(), json!({"const": 1})));
        let properties: Value = serde_json::Map::from_iter(properties).into();
        let schema = json!({"type": "object", "properties": properties, "required": names, "additionalProperties": false});
        let mut constraint = model.grammars.compile(&Source::JsonSchema(schema)).unwrap();
        model.walk(&mut *constraint, 1, 200).unwrap()
    };
    for names in [["a", "b"], ["b", "a"]] {
        let text = ordered(names);
        assert!(text.find(names[0]) < text.find(names[1]), "{text}");
    }
}

#[test]
fn a_constraint_that_is_broken_says_so() {
    let model = Model::new();
    let mut constraint = model.grammars.compile(&Source::Choice(vec!["yes".into()])).unwrap();
    let no = model.tokenizer.encode("q")[0];
    assert!(constraint.commit(no).unwrap_err().contains("grammar"));
    let empty = model.grammars.compile(&Source::Choice(Vec::new()));
    assert!(matches!(empty, Err(CompileError::Invalid(_))));
}
