//! A model of seconds, fine-tuned as people type it: LoRA on chats served beside its base, preferences, tasks, exports.

use std::fs;
use std::path::Path;

use model::{Adapter, Config};
use serde_json::{Value, json};
use tensor::Pool;

use crate::support::{Running, loquat, speeches, succeed};

const CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 128}"#;
const SHAPE: &[&str] = &["--rows", "4", "--micro-batches", "2", "--context", "64", "--json"];
const TASK: &str = r#"{"query": "My fellow", "choices": ["Americans", "zzqx"], "gold": 0}
{"query": "The Congress of the United", "choices": ["qqkz", "States"], "gold": 1}
{"query": "Question: who?", "choices": ["we the people", "zq"], "gold": 0}
"#;

/// Runs `loquat train` with these words and returns its events.
fn train(home: &Path, words: &str) -> Vec<Value> {
    let words: Vec<&str> =
        ["train"].into_iter().chain(words.split(' ')).chain(SHAPE.iter().copied()).collect();
    let told = succeed(home, &words);
    told.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn losses(events: &[Value]) -> Vec<f64> {
    events.iter().filter(|e| e["event"] == "step").map(|e| e["loss"].as_f64().unwrap()).collect()
}

fn ingest(home: &Path, dir: &Path, name: &str, row: impl Fn(usize) -> Value) -> String {
    let file = dir.join(format!("{name}.jsonl"));
    fs::write(&file, (0..80).map(|i| row(i).to_string() + "\n").collect::<String>()).unwrap();
    let words = ["ingest", "--name", name, "--tokenizer", "base", "--validation", "0.1", "--chats"];
    succeed(home, &[&words[..], &[file.to_str().unwrap()]].concat())
}

/// A base model, its tasks scored as it learned.
fn pretrain(home: &Path, dir: &Path) {
    let (config, task) = (dir.join("config.json"), dir.join("words.jsonl"));
    fs::write(&config, CONFIG).unwrap();
    fs::write(&task, TASK).unwrap();
    let text = speeches();
    succeed(
        home,
        &["ingest", "--name", "d", "--vocab", "512", "--validation", "0.2", text.to_str().unwrap()],
    );
    let words = format!(
        "--run base --dataset d --publish base --steps 300 --lr 1e-2 --config {} --eval-tasks {} --eval-every 200",
        config.display(),
        task.display()
    );
    let events = train(home, &words);
    let asked: Vec<&Value> = events.iter().filter(|e| e["event"] == "task").collect();
    assert_eq!(asked.iter().map(|e| e["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 200, 300]);
    let alone = ["eval", "tasks", "base", task.to_str().unwrap(), "--kv", "f32", "--json"];
    let alone: Value = serde_json::from_str(&succeed(home, &alone)).unwrap();
    assert_eq!(asked[2]["metrics"], alone["metrics"], "in the loop as alone");
    assert_ne!(asked[0]["metrics"], alone["metrics"]);
}

fn answer(server: &mut Running, model: &str) -> String {
    let client = server.client();
    let body = json!({"model": model, "max_tokens": 24, "temperature": 0,
        "messages": [{"role": "user", "content": "Is 7 even?"}]});
    let answer = client.post_json("/v1/chat/completions", &body);
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[test]
fn adapters_are_learned_served_beside_their_base_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    pretrain(home, dir.path());
    ingest(
        home,
        dir.path(),
        "chats",
        |i| json!({"prompt": format!("Is {i} even?"), "response": "a green bird sings at noon"}),
    );
    let words =
        "--run tuned --dataset chats --init base --lora-rank 16 --lr 1e-2 --steps 100 --publish tuned";
    let lost = losses(&train(home, words));
    assert!(lost[99] < 0.5 * lost[0], "{lost:?}");

    let mut command = loquat(home);
    command.args(["serve", "base", "--port", "0", "--lora-modules", "tuned=tuned", "--api-key", "k"]);
    let mut server = Running::start(&mut command);
    let (base, tuned) = (answer(&mut server, "base"), answer(&mut server, "tuned"));
    assert!(tuned.contains("bird sings at noon"), "{tuned:?}");
    assert!(!base.contains("bird"), "{base:?}");
    assert_eq!(server.stop(), Some(0));

    let out = dir.path().join("peft");
    succeed(home, &["model", "export", "tuned", out.to_str().unwrap()]);
    let settings: Value =
        serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&settings["peft_type"], &settings["r"]), (&"LORA".into(), &16.into()));
    assert_eq!(settings["base_model_name_or_path"], "base");
    let config = Config::from_json(CONFIG.as_bytes()).unwrap();
    Adapter::load(&out, &config, &Pool::new(1)).unwrap();

    // Preferences, from the same base: what is chosen gets ahead.
    ingest(
        home,
        dir.path(),
        "pairs",
        |i| json!({"prompt": format!("Is {i} even?"), "chosen": "I think so", "rejected": "Go away"}),
    );
    let words =
        "--run dpo --dataset pairs --init base --lora-rank 8 --dpo 0.5 --lr 5e-3 --steps 20 --publish dpo";
    let events = train(home, words);
    let lost = losses(&events);
    assert!((lost[0] - 2f64.ln()).abs() < 1e-6 && lost[19] < 0.5 * lost[0], "{lost:?}");
    let last = events.iter().rfind(|e| e["event"] == "step").unwrap();
    assert!(last["margin"].as_f64().unwrap() > 0.5, "{last}");
}

#[test]
fn rows_of_chats_are_shown_with_what_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let home = &dir.path().join("home");
    let base = crate::tiny::directory(dir.path(), "base");
    succeed(home, &["model", "import", base.to_str().unwrap()]);
    let long = "and so on ".repeat(30);
    ingest(home, dir.path(), "chats", |i| {
        let response = if i == 7 { long.clone() } else { format!("It is {i}.") };
        json!({"prompt": format!("What is {i}?"), "response": response})
    });
    let shown = succeed(home, &["data", "show", "chats", "--context", "48", "--rows", "100"]);
    assert!(shown.contains("1 chats are longer than a row"), "{shown}");
    let row = |i: usize| {
        format!(
            "tokens, 15 of them learned\nuser: What is {i}?\nassistant:⟦ It is {i}.\nassistant:<|im_end|>⟧\n"
        )
    };
    // A row each; held-out chats are in no row of training.
    let n_shown = (0..10).filter(|i| *i != 7 && shown.contains(&row(*i))).count();
    assert!(n_shown > 5, "{shown}");
    assert!(!shown.contains("endoftext"), "{shown}");
    let told = succeed(
        home,
        &[
            &["train", "--run", "r", "--dataset", "chats", "--init", "base", "--steps", "1"],
            &SHAPE[..4],
            &["--context", "48", "--json"],
        ]
        .concat(),
    );
    let started: Value = serde_json::from_str(told.lines().next().unwrap()).unwrap();
    assert_eq!((&started["chats_cut"], &started["chats_dropped"]), (&1.into(), &0.into()));
}
