//! The tools around a model: show, bench, chat, eval, export, quantize, import.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tokenizer::Tokenizer;

use crate::support::{Running, chat_model, loquat, output, root, speeches, succeed};
use crate::tiny::{self, TEMPLATE};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The command must fail, and say all of `words`.
fn refused(home: &Path, args: &[&str], words: &[&str]) {
    let output = output(home, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{args:?} succeeded");
    assert!(!error.contains("panicked"), "{args:?}: {error}");
    words.iter().for_each(|word| assert!(error.contains(word), "{args:?} does not say '{word}':\n{error}"));
}

fn a_text() -> PathBuf {
    let dir = speeches();
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().find(|path| path.extension().is_some_and(|e| e == "txt")).unwrap()
}

#[test]
fn show_tells_what_a_model_is_and_takes() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let shown = succeed(&home, &["model", "show", text(&model)]);
    for word in ["llama", "2 layers", "BF16", "<|im_end|>", "256 tokens", "fits here"] {
        assert!(shown.contains(word), "no '{word}' in\n{shown}");
    }
    let json: Value =
        serde_json::from_str(&succeed(&home, &["model", "show", text(&model), "--json"])).unwrap();
    // 2 (k, v) · 2 layers · 2 heads · 16 · 2 B
    assert_eq!(json["kv_bytes_per_token"], 256);
    assert_eq!(json["context_that_fits"], 256);
    let loaded = model::load(&model).unwrap();
    assert_eq!(json["parameters"], loaded.weights.config.n_params());
    let bytes: usize = loaded.weights.tensors.values().map(|t| t.n_bytes()).sum();
    assert_eq!(json["bytes"], bytes);
    refused(&home, &["model", "show", "nothing"], &["nothing"]);
    refused(&home, &["model", "show", "../../x"], &["../../x"]);
    let tensors = model.join("model.safetensors");
    fs::write(&tensors, &fs::read(&tensors).unwrap()[..100]).unwrap();
    refused(&home, &["model", "show", text(&model)], &["model.safetensors"]);
}

#[test]
fn show_is_right_about_the_memory_of_a_real_model() {
    let Some(path) = chat_model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let json: Value =
        serde_json::from_str(&succeed(dir.path(), &["model", "show", text(&path), "--json"])).unwrap();
    assert_eq!(json["parameters"], 134_515_008);
    assert_eq!(json["kinds"]["Q4_1"]["tensors"], 210);
    let limit = 1.02 * json["bytes"].as_f64().unwrap();
    assert!(json["memory_bytes"].as_f64().unwrap() < limit, "{json}");
}

#[test]
fn bench_measures_every_test_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let model = text(&model);
    let args = ["bench", model, "-p", "32", "-n", "4", "-b", "1,3", "-d", "0,40", "-r", "2", "-t", "1,2"];
    let lines = succeed(&home, &[&args[..], &["-o", "jsonl"]].concat());
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tests: Vec<(u64, &str)> =
        lines.iter().map(|l| (l["threads"].as_u64().unwrap(), l["test"].as_str().unwrap())).collect();
    let names = ["pp32", "tg4", "tg4 b3", "pp32 @ d40", "tg4 @ d40", "tg4 b3 @ d40"];
    let expected: Vec<(u64, &str)> = [1, 2].into_iter().flat_map(|t| names.map(|name| (t, name))).collect();
    assert_eq!(tests, expected);
    for line in &lines {
        let rates =
            ["tokens_per_s_min", "tokens_per_s", "tokens_per_s_max"].map(|k| line[k].as_f64().unwrap());
        assert!(rates[0] > 0.0 && rates[0] <= rates[1] && rates[1] <= rates[2], "{line}");
        assert!(line["limit_share"].as_f64().unwrap() > 0.0, "{line}");
        assert_eq!(line["seconds"].as_array().unwrap().len(), 2);
    }
    let table = succeed(&home, &["bench", model, "-p", "8", "-n", "0", "-r", "1", "-o", "md", "--kv", "f32"]);
    assert!(table.contains("| pp8 |") && table.contains("|---|") && table.contains("| f32 |"), "{table}");
    refused(&home, &["bench", model, "-d", "300"], &["positions", "256"]);
    refused(&home, &["bench", model, "-b", "0"], &["--batch 0"]);
    refused(&home, &["bench", model, "-r", "0"], &["--repetitions 0"]);
    refused(&home, &["bench", model, "--kv", "int3"], &["int3"]);
}

/// Runs a chat whose lines come from a pipe.
fn chat(home: &Path, args: &[&str], lines: &str) -> Output {
    let mut command = loquat(home);
    command.arg("chat").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn chat_goes_on_over_several_turns() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let saved = dir.path().join("saved.json");
    let lines = format!(
        "first\n/temperature 0\n/regenerate\nsecond \\\nline\n/save {}\n/clear\n/system be brief\nthird\n/quit\nnever",
        text(&saved)
    );
    let output = chat(&home, &[text(&model), "--max-tokens", "6", "--temperature", "0"], &lines);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(told.matches("tokens/s").count(), 4, "{told}");
    let saved: Value = serde_json::from_slice(&fs::read(saved).unwrap()).unwrap();
    assert_eq!(saved["model"], "tiny");
    let messages = saved["messages"].as_array().unwrap();
    let roles: Vec<&str> = messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(messages[2]["content"], "second \nline");
    let printed = String::from_utf8_lossy(&output.stdout);
    let first = messages[1]["content"].as_str().unwrap();
    // Greedy, so the second answer to the first message is the first one again.
    assert!(printed.starts_with(&format!("{first}\n{first}\n")), "{printed}");
    let output = chat(&home, &[text(&model)], "/frobnicate\n");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("/frobnicate"));
}

#[test]
fn chat_talks_to_a_server_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let mut command = loquat(&home);
    command.args(["serve", text(&model), "--port", "0", "--api-key", "secret"]);
    let mut server = Running::start(&mut command);
    let client = server.client();
    let with_key = ["--api-key", "secret", "--max-tokens", "5", "--temperature", "0"];
    let output = chat(&home, &[&[client.base.as_str()], &with_key[..]].concat(), "hello\n");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("5 written"), "{said}");
    let url = format!("{}/v1", client.base);
    for (args, word) in [
        (vec![url.as_str(), "--api-key", "wrong"], "401"),
        (vec![url.as_str(), "--api-key", "secret", "--server-model", "other"], "other"),
        (vec!["http://127.0.0.1:1"], "127.0.0.1:1"),
    ] {
        let output = chat(&home, &args, "hello\n");
        assert!(!output.status.success());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(word), "{args:?}: {error}");
    }
    assert_eq!(server.stop(), Some(0));
}

fn perplexity(home: &Path, model: &Path) -> f64 {
    let file = a_text();
    let args = [
        "eval",
        "perplexity",
        text(model),
        text(&file),
        "-c",
        "64",
        "--chunks",
        "20",
        "--kv",
        "f32",
        "--json",
    ];
    let json: Value = serde_json::from_str(&succeed(home, &args)).unwrap();
    // The second half of each context, but for the token that follows it.
    assert_eq!(json["tokens_scored"], 20 * 31);
    json["perplexity"].as_f64().unwrap()
}

/// There and back: the same weights, tokenizer and template, whatever the format.
#[test]
fn exported_models_are_the_same_models() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let (gguf, back) = (dir.path().join("tiny.gguf"), dir.path().join("back"));
    succeed(&home, &["model", "export", text(&model), text(&gguf)]);
    succeed(&home, &["model", "export", text(&gguf), text(&back), "--type", "BF16"]);
    let [one, two, three] = [&model, &gguf, &back].map(|path| model::load(path).unwrap());
    assert_eq!(one.weights.tensors.len(), two.weights.tensors.len());
    for (name, tensor) in &one.weights.tensors {
        let back = &three.weights.tensors[name];
        assert_eq!((back.kind, &back.dims), (tensor.kind, &tensor.dims), "{name}");
        assert_eq!(back.bytes().unwrap(), tensor.bytes().unwrap(), "{name}");
        assert_eq!(two.weights.tensors[name].to_f32().unwrap(), tensor.to_f32().unwrap(), "{name}");
    }
    for loaded in [&one, &two, &three] {
        assert_eq!(loaded.chat_template.as_deref(), Some(TEMPLATE));
    }
    let [first, last] = [&model, &back].map(|dir| {
        let read = |name: &str| fs::read(dir.join(name)).unwrap();
        Tokenizer::from_json_with_config(&read("tokenizer.json"), &read("tokenizer_config.json")).unwrap()
    });
    let sample = fs::read_to_string(a_text()).unwrap();
    let sample: String = sample.chars().take(5000).chain("<|im_end|> 12 34".chars()).collect();
    assert_eq!(first.encode_special(&sample), last.encode_special(&sample));
    assert_eq!((first.eos(), first.bos()), (last.eos(), last.bos()));
    let expected = perplexity(&home, &model);
    assert!(expected > 1.0 && expected.is_finite());
    assert_eq!(perplexity(&home, &gguf), expected);
    assert_eq!(perplexity(&home, &back), expected);
    refused(&home, &["model", "export", text(&model), text(&gguf)], &["tiny.gguf", "already"]);
    refused(&home, &["model", "export", text(&model), "/nowhere/x.gguf"], &["/nowhere/x.gguf"]);
    refused(&home, &["model", "export", text(&model), "x", "--type", "Q4_0"], &["Q4_0", "BF16"]);
}

#[test]
fn quantized_models_stay_close() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let exact = perplexity(&home, &model);
    for (kind, limit) in [("Q8_0", 0.002), ("Q4_1", 0.05), ("Q4_0", 0.05)] {
        let out = dir.path().join(format!("{kind}.gguf"));
        succeed(&home, &["model", "quantize", text(&model), kind, text(&out)]);
        let loaded = model::load(&out).unwrap();
        let kind_of = |name: &str| loaded.weights.tensors[name].kind.name();
        assert_eq!(kind_of("model.layers.0.mlp.up_proj.weight"), kind);
        assert_eq!(kind_of("model.embed_tokens.weight"), "Q8_0");
        assert_eq!(kind_of("model.norm.weight"), "F32");
        let off = (perplexity(&home, &out) / exact - 1.0).abs();
        assert!(off < limit, "{kind}: perplexity is off by {off}");
    }
    refused(&home, &["model", "quantize", text(&model), "Q9", "x.gguf"], &["Q9", "Q8_0"]);
    refused(&home, &["model", "quantize", text(&model), "Q8_0", "x.bin"], &["x.bin", ".gguf"]);
}

#[test]
fn imported_models_are_served_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "Tiny"));
    let gguf = dir.path().join("one.gguf");
    succeed(&home, &["model", "export", text(&model), text(&gguf)]);
    succeed(&home, &["model", "import", text(&model)]);
    succeed(&home, &["model", "import", text(&gguf), "--name", "second"]);
    fs::remove_dir_all(&model).unwrap();
    fs::remove_file(&gguf).unwrap();
    let list = succeed(&home, &["model", "list"]);
    assert!(list.contains("tiny") && list.contains("second"), "{list}");
    let mut command = loquat(&home);
    let mut server = Running::start(command.args(["up", "--port", "0"]));
    let models = server.client().get_json("/v1/models");
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["second", "tiny"]);
    assert_eq!(server.stop(), Some(0));
    assert!(succeed(&home, &["model", "show", "second"]).contains("llama"));
    succeed(&home, &["model", "rm", "second"]);
    succeed(&home, &["model", "rm", "tiny"]);
    assert_eq!(succeed(&home, &["model", "list"]), "");
    refused(&home, &["model", "show", "second"], &["second"]);
    refused(&home, &["model", "rm", "second"], &["second"]);
    refused(&home, &["model", "import", "/nowhere"], &["/nowhere"]);
}

/// Another reader than ours: the Python package that comes from the makers of the format.
#[test]
fn the_gguf_package_reads_what_we_write() {
    let python = root().join("var/venv/bin/python");
    let has_package = Command::new(&python).args(["-c", "import gguf"]).output();
    if !has_package.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: no package gguf in var/venv (./test installs it)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let out = dir.path().join("q.gguf");
    succeed(&home, &["model", "quantize", text(&model), "Q8_0", text(&out)]);
    let read = Command::new(python).arg("tests/read_gguf.py").arg(&out).current_dir(root()).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    let theirs: Value = serde_json::from_slice(&read.stdout).unwrap();
    let ours = model::load(&out).unwrap();
    assert_eq!(theirs["architecture"], "llama");
    assert_eq!(theirs["chat_template"], TEMPLATE);
    let down = &ours.weights.tensors["model.layers.1.mlp.down_proj.weight"].to_f32().unwrap();
    let sums = |values: &[f32]| values.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    let theirs_sum = theirs["sums"]["blk.1.ffn_down.weight"].as_f64().unwrap();
    assert!((theirs_sum / sums(down) - 1.0).abs() < 1e-6, "{theirs_sum} {}", sums(down));
    assert_eq!(theirs["sums"].as_object().unwrap().len(), ours.weights.tensors.len());
}

/// The flags under the names that llama-server and vLLM give them, and adapters of the served model.
#[test]
fn serve_takes_the_flags_of_its_peers() {
    let dir = tempfile::tempdir().unwrap();
    let golden = root().join("fixtures/golden");
    let (home, model) = (dir.path().join("home"), tiny::directory(dir.path(), "tiny"));
    let adapter = format!("misfit={}", golden.join("adapters/llama_all").display());
    let refused = loquat(&home)
        .args(["serve", text(&model), "--port", "0", "--lora-modules", &adapter])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("llama_all") && said.contains("lora_A"), "{said}");
    let mut command = loquat(&home);
    command.args(["serve", text(&model), "--port", "0", "-t", "1", "--alias", "mine", "--parallel", "2"]);
    command.args(["--cache-type-k", "q8_0", "--prompt-lookup", "4", "--api-key", "secret"]);
    let mut server = Running::start(&mut command);
    let client = server.client();
    // Only the name it was given is known there.
    for (name, known) in [("mine", true), ("tiny", false)] {
        let args = [client.base.as_str(), "--api-key", "secret", "--server-model", name, "--max-tokens", "5"];
        let output = chat(&home, &args, "hello\n");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), known, "{name}: {said}");
    }
}
