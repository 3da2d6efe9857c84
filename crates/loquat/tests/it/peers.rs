//! Files we write, read by transformers and by llama.cpp: the same logits. Only in `./test --long`, because both take
//! gigabytes or minutes to install; where one is missing, its test says so.

use std::fs::File;
use std::io::BufWriter;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{BLOCK_TOKENS, Conversion, KvType, Scratch, StepInput, Transformer, gguf, hf};
use serde_json::{Value, json};
use tensor::Pool;
use tensor::packed::WeightKind;
use tokenizer::{BpeTrainer, GgufVocab, Tokenizer};

use crate::support::{PATIENCE, chat_model, root, succeed};

/// The tiny random models whose logits transformers gave us.
const ARCHITECTURES: [&str; 9] =
    ["llama", "llama_linear", "llama_llama3", "llama_yarn", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"];

/// A program from the variable `name` or from its place in this directory.
fn peer(name: &str, place: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).map_or_else(|| root().join(place), PathBuf::from);
    if !path.exists() {
        eprintln!("SKIPPED: {name} is not set and {} is missing", path.display());
        return None;
    }
    Some(path)
}

/// Log-probabilities after each of the tokens, as our own model computes them from the same files.
fn ours(path: &Path, tokens: &[u32]) -> Vec<Vec<f64>> {
    let pool = Pool::new(2);
    let model = Transformer::new(model::load(path).unwrap().weights, &pool).unwrap();
    let n_blocks = tokens.len().div_ceil(BLOCK_TOKENS);
    let mut kv = model.new_kv(n_blocks, KvType::F32);
    let (mut step, mut logits_nv) = (StepInput::default(), Vec::new());
    step.push_row(tokens, 0, &(0..n_blocks as u32).collect::<Vec<_>>(), tokens.len());
    model.forward(&pool, &step, &mut kv, &mut Scratch::default(), &mut logits_nv).unwrap();
    logits_nv.chunks_exact(model.config().vocab).map(log_softmax).collect()
}

fn log_softmax(logits_v: &[f32]) -> Vec<f64> {
    let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits_v.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits_v.iter().map(|&x| f64::from(x - max) - sum.ln()).collect()
}

/// The largest distance from ours to `theirs`: for each position some ids and their log-probabilities.
fn distance<'a>(ours: impl Iterator<Item = &'a Vec<f64>>, theirs: &[Vec<(u32, f64)>]) -> f64 {
    let mut worst = 0.0;
    for (ours, theirs) in ours.zip(theirs) {
        for &(id, logprob) in theirs {
            worst = f64::max(worst, (ours[id as usize] - logprob).abs());
        }
    }
    worst
}

#[test]
fn transformers_reads_our_directories() {
    let Some(python) = peer("LOQUAT_PEERS_PYTHON", "var/venv-peers/bin/python") else { return };
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| 5 + i * 37 % 120).collect();
    let check = |path: &Path, text: Option<&str>, limit: f64| {
        let mut command = Command::new(&python);
        command.arg("tests/peer_logits.py").arg(path).arg(json!(tokens).to_string()).args(text);
        let output = command.current_dir(root()).output().unwrap();
        assert!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
        let top: Vec<Vec<(u32, f64)>> = serde_json::from_value(theirs["top"].clone()).unwrap();
        assert_eq!(top.len(), tokens.len());
        let worst = distance(ours(path, &tokens).iter(), &top);
        eprintln!("{}: log-probabilities differ by {worst:.1e} at most", path.display());
        assert!(worst < limit, "{}: {worst}", path.display());
        theirs["ids"].clone()
    };
    for name in ARCHITECTURES {
        let loaded = model::load(&root().join("fixtures/golden/models").join(name)).unwrap();
        let out = dir.path().join(name);
        hf::write_dir(&loaded.weights, &out).unwrap();
        check(&out, None, 1e-4);
    }
    let Some(chat) = chat_model() else { return };
    let out = dir.path().join("smollm2");
    succeed(dir.path(), &["model", "export", chat.to_str().unwrap(), out.to_str().unwrap()]);
    let text = "What is 12 + 34? Grüße 🙂<|im_end|>\n  done";
    let read = |name: &str| std::fs::read(out.join(name)).unwrap();
    let tokenizer = Tokenizer::from_json_with_config(&read("tokenizer.json"), &read("tokenizer_config.json"));
    let ids = check(&out, Some(text), 2e-3);
    assert_eq!(ids, json!(tokenizer.unwrap().encode_special(text)));
}

/// Text files under `dir`, also packed ones, in a fixed order.
fn text_files(dir: &Path) -> Vec<PathBuf> {
    let is_text = |path: &Path| {
        let name = path.to_str().unwrap().trim_end_matches(".gz");
        [".txt", ".json", ".jsonl", ".csv"].iter().any(|end| name.ends_with(end))
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(text_files(&path));
        } else if is_text(&path) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Ids of each line as `tokenizers` of Hugging Face gives them, [`u32::MAX`] after each.
fn peer_ids(python: &Path, tokenizer: &Path, text: &str, dir: &Path) -> Vec<u32> {
    let (input, out) = (dir.join("text"), dir.join("ids"));
    std::fs::write(&input, text).unwrap();
    let output = Command::new(python)
        .arg("tests/peer_ids.py")
        .args([tokenizer, &out])
        .stdin(File::open(&input).unwrap())
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(&out).unwrap();
    bytes.chunks_exact(4).map(|id| u32::from_le_bytes(id.try_into().unwrap())).collect()
}

/// The same ids as Hugging Face on every corpus at hand, with a published vocabulary and with one of our own.
#[test]
fn ids_are_those_of_hugging_face() {
    let Some(python) = peer("LOQUAT_PEERS_PYTHON", "var/venv-peers/bin/python") else { return };
    let data = root().join("../shared/data");
    if !data.exists() {
        return eprintln!("SKIPPED: {} is missing", data.display());
    }
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<(PathBuf, String)> = text_files(&data)
        .into_iter()
        .map(|path| {
            let packed = path.extension().is_some_and(|extension| extension == "gz");
            let text = if packed { unpack(&path) } else { std::fs::read_to_string(&path).unwrap() };
            (path, text)
        })
        .collect();
    assert!(texts.len() > 10, "{} texts", texts.len());
    let trained = BpeTrainer::new(32_768).train(texts.iter().map(|(_, text)| text), &mut |_| {}).unwrap();
    let mut vocabularies = vec![dir.path().join("trained.json")];
    std::fs::write(&vocabularies[0], trained.to_json()).unwrap();
    if let Some(chat) = chat_model() {
        let out = dir.path().join("smollm2");
        succeed(dir.path(), &["model", "export", chat.to_str().unwrap(), out.to_str().unwrap()]);
        vocabularies.push(out.join("tokenizer.json"));
    }
    for vocabulary in vocabularies {
        let tokenizer = Tokenizer::from_json(&std::fs::read(&vocabulary).unwrap()).unwrap();
        let mut n_ids = 0;
        for (path, text) in &texts {
            let theirs = peer_ids(&python, &vocabulary, text, dir.path());
            n_ids += theirs.len();
            let mut theirs = theirs.split(|&id| id == u32::MAX);
            for (n, line) in text.split('\n').enumerate() {
                let ours = tokenizer.encode_special(line);
                assert_eq!(Some(&ours[..]), theirs.next(), "{}, line {}: {line}", path.display(), n + 1);
            }
            assert_eq!(theirs.map(<[u32]>::len).sum::<usize>(), 0, "{}", path.display());
        }
        let n_bytes: usize = texts.iter().map(|(_, text)| text.len()).sum();
        eprintln!(
            "{}: {n_ids} ids of {n_bytes} bytes in {} files are the same",
            vocabulary.display(),
            texts.len()
        );
    }
}

/// A llama-server over one file.
struct LlamaServer {
    child: Child,
    base: String,
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        // A test that failed must not leave a server behind; one that has ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl LlamaServer {
    fn start(program: &Path, file: &Path, log: &Path) -> LlamaServer {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(program);
        // Exact arithmetic wherever it has the choice.
        command.arg("-m").arg(file).args(["-c", "96", "-np", "1", "-t", "2", "-fa", "off", "-ctk", "f32"]);
        command.args(["-ctv", "f32", "--no-warmup", "--host", "127.0.0.1", "--port", &port.to_string()]);
        let log = File::create(log).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        LlamaServer { child, base: format!("http://127.0.0.1:{port}") }
    }

    fn wait(&mut self, log: &Path) {
        let deadline = Instant::now() + PATIENCE;
        while ureq::get(format!("{}/health", self.base)).call().is_err() {
            let ended = self.child.try_wait().unwrap();
            let said = || std::fs::read_to_string(log).unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "llama-server: {ended:?}\n{}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Continues the tokens greedily: the tokens it takes, and the likeliest ones at each step.
    fn continue_greedily(&self, tokens: &[u32], n: usize) -> (Vec<u32>, Vec<Vec<(u32, f64)>>) {
        let body = json!({
            "prompt": tokens, "n_predict": n, "temperature": 0, "n_probs": 5, "cache_prompt": false
        });
        let mut response = ureq::post(format!("{}/completion", self.base)).send(body.to_string()).unwrap();
        let answer: Value = serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
        let steps = answer["completion_probabilities"].as_array().unwrap();
        let pair = |top: &Value| {
            (u32::try_from(top["id"].as_u64().unwrap()).unwrap(), top["logprob"].as_f64().unwrap())
        };
        let top = |step: &Value| step["top_logprobs"].as_array().unwrap().iter().map(pair).collect();
        (steps.iter().map(|step| pair(step).0).collect(), steps.iter().map(top).collect())
    }
}

#[test]
fn llama_cpp_reads_our_gguf_files() {
    // No more than the shortest window: GGUF files of models with one end there.
    const N: usize = 12;
    let Some(program) = peer("LLAMA_SERVER", "var/llama/bin/llama-server") else { return };
    let dir = tempfile::tempdir().unwrap();
    let prompt: Vec<u32> = (0..9).map(|i| 5 + i * 37 % 120).collect();
    let check = |path: &Path, limit: f64| {
        let log = dir.path().join("log");
        let mut server = LlamaServer::start(&program, path, &log);
        server.wait(&log);
        let (tokens, top) = server.continue_greedily(&prompt, N);
        // A random model may end its text early.
        assert!(!tokens.is_empty(), "{}: not one token", path.display());
        let all = [&prompt[..], &tokens[..tokens.len() - 1]].concat();
        let ours = ours(path, &all);
        let ours = || ours.iter().skip(prompt.len() - 1);
        let worst = distance(ours(), &top);
        eprintln!("{}: log-probabilities differ by {worst:.1e} at most", path.display());
        assert!(worst < limit, "{}: {worst}", path.display());
        for (step, (ours, &token)) in ours().zip(&tokens).enumerate() {
            let best = ours.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            // The same token, unless two are as likely as the arithmetic can tell.
            assert!(best - ours[token as usize] < limit, "{}: step {step}", path.display());
        }
    };
    for name in ARCHITECTURES {
        let path = dir.path().join(format!("{name}.gguf"));
        write_golden(name, &path);
        // llama.cpp looks GELU up in a table of 16-bit floats.
        check(&path, if ["gemma3", "gpt2"].contains(&name) { 5e-3 } else { 1e-4 });
    }
    let Some(chat) = chat_model() else { return };
    let path = |name: &str| dir.path().join(name);
    let (exact, f32, q8) = (path("smollm2"), path("smollm2.gguf"), path("q8.gguf"));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    succeed(dir.path(), &["model", "export", &text(&chat), &text(&exact)]);
    succeed(dir.path(), &["model", "export", &text(&exact), &text(&f32)]);
    succeed(dir.path(), &["model", "quantize", &text(&exact), "Q8_0", &text(&q8)]);
    check(&f32, 5e-3);
    // Activations have 8 bits there, one scale for 32 of them: 0.24 was seen.
    check(&q8, 0.5);
}

/// A golden model as GGUF in F32 (llama.cpp rounds activations to the kind of the weights), with names for its ids that no text needs.
fn write_golden(name: &str, path: &Path) {
    let mut loaded = model::load(&root().join("fixtures/golden/models").join(name)).unwrap();
    let exact = Conversion { kind: WeightKind::F32, pure: true, vectors: false };
    loaded.weights.convert(exact, &Arc::new(Pool::new(1)));
    let tokens = (0..loaded.weights.config.vocab).map(|id| format!("t{id}")).collect();
    let vocab = GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        merges: vec!["t 1".into()],
        eos: Some(130),
        ..GgufVocab::default()
    };
    let extras = gguf::Extras { name, vocab: Some(&vocab), chat_template: None };
    let mut file = BufWriter::new(File::create(path).unwrap());
    gguf::write(&mut file, &loaded.weights, extras).unwrap();
}

/// Where files of tasks lie, and a model that can do some of them.
fn tasks_and_model() -> Option<(PathBuf, PathBuf)> {
    let data = root().join("../shared/data/eval/core");
    if !data.exists() {
        eprintln!("SKIPPED: {} is missing", data.display());
        return None;
    }
    Some((data, chat_model()?))
}

/// The same accuracies as an evaluation of one sequence at a time by transformers, on some items of each form.
#[test]
fn accuracies_are_those_of_the_reference() {
    let Some(python) = peer("LOQUAT_PEERS_PYTHON", "var/venv-peers/bin/python") else { return };
    let Some((data, chat)) = tasks_and_model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("smollm2");
    let model = model.to_str().unwrap();
    succeed(dir.path(), &["model", "export", chat.to_str().unwrap(), model]);
    for (name, limit, delimiter) in
        [("arc_easy", 50, "\nAnswer: "), ("winograd_wsc", 100, " "), ("bigbench_qa_wikidata", 100, " ")]
    {
        let packed = data.join(format!("{name}.jsonl.gz"));
        let file = dir.path().join(format!("{name}.jsonl"));
        std::fs::write(&file, unpack(&packed)).unwrap();
        let limit = limit.to_string();
        let output = Command::new(&python)
            .args(["tests/reference_eval.py", model, file.to_str().unwrap(), &limit, delimiter])
            // Its threads would spin against those of other tests.
            .env("OMP_NUM_THREADS", "1")
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
        let packed = packed.to_str().unwrap();
        let args = ["eval", "tasks", model, packed, "--limit", &limit, "--kv", "f32", "--json"];
        let ours: Value = serde_json::from_str(&succeed(dir.path(), &args)).unwrap();
        assert_eq!(ours["delimiter"], delimiter);
        for (metric, theirs) in theirs.as_object().unwrap() {
            let found = ours["metrics"].as_array().unwrap().iter().find(|m| m["name"] == **metric).unwrap();
            eprintln!("{name}: {found}, by transformers {theirs}");
            let off = |key: &str| (found[key].as_f64().unwrap() - theirs[key].as_f64().unwrap()).abs();
            // One near-tie in fifty may fall the other way.
            assert!(off("value") < 0.0201 && off("stderr") < 0.003, "{name}, {metric}: {found} and {theirs}");
        }
    }
}

fn unpack(packed: &Path) -> String {
    let output = Command::new("gzip").arg("-dc").arg(packed).output().unwrap();
    assert!(output.status.success(), "{}", packed.display());
    String::from_utf8(output.stdout).unwrap()
}

/// A task in the words of lm-evaluation-harness.
fn harness_task(name: &str, file: &Path, delimiter: &str) -> String {
    let (file, delimiter) = (json!(file.to_str().unwrap()), json!(delimiter));
    format!(
        r#"task: {name}
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {file} }} }}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: {delimiter}
metric_list: [{{ metric: acc }}]
"#
    )
}

/// The same accuracies and errors as lm-evaluation-harness finds on the same files.
#[test]
fn accuracies_are_those_of_lm_evaluation_harness() {
    let Some(python) = peer("LOQUAT_PEERS_PYTHON", "var/venv-peers/bin/python") else { return };
    let Some((data, chat)) = tasks_and_model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (model, found) = (dir.path().join("smollm2"), dir.path().join("found"));
    succeed(dir.path(), &["model", "export", chat.to_str().unwrap(), model.to_str().unwrap()]);
    let tasks = [("arc_easy", 60, "\nAnswer: "), ("copa", 100, " ")];
    for (name, limit, delimiter) in tasks {
        let lines: Vec<String> =
            unpack(&data.join(format!("{name}.jsonl.gz"))).lines().map(str::to_owned).collect();
        let file = dir.path().join(format!("{name}.jsonl"));
        std::fs::write(&file, lines[..limit].join("\n")).unwrap();
        std::fs::write(dir.path().join(format!("{name}.yaml")), harness_task(name, &file, delimiter))
            .unwrap();
    }
    let output = Command::new(&python)
        .args(["-m", "lm_eval", "--model", "hf", "--model_args"])
        .arg(format!("pretrained={},dtype=float32", model.display()))
        .args(["--tasks", "arc_easy,copa", "--device", "cpu", "--batch_size", "4", "--include_path"])
        .arg(dir.path())
        .arg("--output_path")
        .arg(&found)
        .envs([("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")])
        .env("HF_HOME", dir.path().join("hf"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let theirs = harness_results(&found);
    for (name, _, _) in tasks {
        let file = dir.path().join(format!("{name}.jsonl"));
        let args =
            ["eval", "tasks", model.to_str().unwrap(), file.to_str().unwrap(), "--kv", "f32", "--json"];
        let ours: Value = serde_json::from_str(&succeed(dir.path(), &args)).unwrap();
        let found = ours["metrics"].as_array().unwrap().iter().find(|m| m["name"] == "acc").unwrap();
        let theirs = &theirs["results"][name];
        eprintln!("{name}: {found}, by lm-evaluation-harness {theirs}");
        let off =
            |ours: &str, other: &str| (found[ours].as_f64().unwrap() - theirs[other].as_f64().unwrap()).abs();
        // One near-tie in sixty may fall the other way.
        assert!(off("value", "acc,none") < 0.0168 && off("stderr", "acc_stderr,none") < 0.003, "{name}");
    }
}

/// The one file of results that it leaves somewhere under `dir`.
fn harness_results(dir: &Path) -> Value {
    let entries = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = entries(dir).collect();
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(entries(&path));
        } else if path.extension().is_some_and(|extension| extension == "json") {
            return serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        }
    }
    panic!("lm-evaluation-harness left no results");
}
