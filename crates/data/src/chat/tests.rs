use serde_json::{Value, json};

use super::*;

fn one(row: Value) -> Example {
    match read(&row.to_string(), None) {
        Ok(Chat::One(example)) => example,
        other => panic!("{row}: {other:?}"),
    }
}

fn check(row: Value, roles: &str, learned: &[usize]) {
    let example = one(row.clone());
    let found: Vec<&str> = example.messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(found.join(" "), roles, "{row}");
    let indices: Vec<usize> = (0..found.len()).filter(|i| example.is_learned[*i]).collect();
    assert_eq!(indices, learned, "{row}");
}

#[test]
fn every_form_is_told_by_its_fields() {
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    check(json!({"messages": messages, "prompt": "a topic"}), "user assistant", &[1]);
    check(json!({"prompt": "a", "response": "b"}), "user assistant", &[1]);
    check(json!({"prompt": "a", "completion": "b", "system": "s"}), "system user assistant", &[2]);
    check(
        json!({"prompt": messages, "completion": [{"role": "assistant", "content": "c"}]}),
        "user assistant assistant",
        &[2],
    );
    check(json!({"instruction": "a", "input": "", "output": "b"}), "user assistant", &[1]);
    check(
        json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"}]}),
        "system user assistant",
        &[2],
    );
    let with_input = one(json!({"instruction": "Add.", "input": "1 2", "output": "3"}));
    assert_eq!(with_input.messages[0]["content"], "Add.\n\n1 2");
}

#[test]
fn pairs_differ_in_what_is_learned() {
    let rows = [
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        json!({"instruction": "a", "input": "", "output": "b", "chosen": "b", "rejected": "c"}),
        json!({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}),
        json!({"prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}),
    ];
    for row in rows {
        let Ok(Chat::Pair([chosen, rejected])) = read(&row.to_string(), None) else { panic!("{row}") };
        assert_eq!(chosen.messages[0], rejected.messages[0], "{row}");
        assert_eq!(
            (&chosen.messages[1]["content"], &rejected.messages[1]["content"]),
            (&json!("b"), &json!("c"))
        );
        assert_eq!((&chosen.is_learned, &rejected.is_learned), (&vec![false, true], &vec![false, true]));
    }
    let as_alpaca = json!({"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"}).to_string();
    assert!(matches!(read(&as_alpaca, Some(Form::Alpaca)), Ok(Chat::One(_))));
}

#[test]
fn calls_and_parts_become_what_templates_take() {
    let example = one(json!({"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": null, "weight": 0, "tool_calls":
            [{"id": "1", "type": "function", "function": {"name": "w", "arguments": "{\"city\": \"Bern\"}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "assistant", "content": "", "tool_call": {"name": "x", "arguments": {"n": 1}}},
    ], "tools": [{"type": "function", "function": {"name": "w"}}]}));
    assert_eq!(example.messages[0], json!({"role": "system", "content": "be\nbrief"}));
    assert_eq!(example.messages[2]["tool_calls"][0]["function"]["arguments"], json!({"city": "Bern"}));
    assert_eq!(example.messages[4]["tool_calls"][0]["function"], json!({"name": "x", "arguments": {"n": 1}}));
    assert_eq!(example.is_learned, [false, false, false, false, true]);
    assert_eq!(example.tools.len(), 1);
}

#[test]
fn what_is_wrong_is_named() {
    let refused = |row: &str, word: &str| {
        let error = read(row, None).unwrap_err();
        assert!(error.contains(word), "{row}: {error}");
    };
    refused("{\"messages\": [", "column");
    refused("[1]", "object");
    refused(r#"{"text": "plain"}"#, "text");
    refused(r#"{"messages": []}"#, "messages: it is empty");
    refused(
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}"#,
        "messages[1].role",
    );
    refused(r#"{"messages": [{"role": "user"}]}"#, "messages[0].content");
    refused(r#"{"messages": [{"role": "user", "content": 7}]}"#, "messages[0].content");
    refused(
        r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
        "messages[0].content[0]",
    );
    refused(r#"{"messages": [{"role": "user", "content": "a"}]}"#, "nothing to learn");
    refused(r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}"#, "weight 0");
    refused(r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}"#, "messages[0].weight");
    refused(
        r#"{"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}"#,
        "messages[0].tool_calls[0]",
    );
    refused(r#"{"conversations": [{"from": "alien", "value": "x"}]}"#, "conversations[0].from");
    refused(r#"{"conversations": [{"from": "gpt"}]}"#, "conversations[0].value");
    refused(r#"{"prompt": "a", "response": ""}"#, "response");
    refused(r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#, "chosen");
    refused(r#"{"chosen": "b", "rejected": "c"}"#, "prompt");
    refused(r#"{"instruction": 5, "output": "b"}"#, "instruction");
}
