//! Fine-tuning and preferences: from a model, by LoRA or in full, on rows of many chats, with the same promise.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use data::{Content, Dataset, IngestPlan, TokenizerSource};
use model::{Adapter, Config, Lora, Objective, Trainable};
use serde_json::{Value, json};
use store::{Bundle, Store};
use tensor::Pool;
use tensor::packed::WeightKind;
use tokenizer::{BpeTrainer, ChatTemplate};
use train::{Context, Error, Event, Method, Plan, Teacher};

use crate::{carry_out_parts, context, prepared};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

/// A run that fine-tunes, ready to be created.
struct FineTune {
    store: Arc<dyn Store>,
    plan: Plan,
    files: model::Files,
    config: Config,
    /// Files of a teacher.
    teacher: Option<model::Files>,
}

impl FineTune {
    /// Of a random model, on rows of this kind.
    fn new(rows: impl Fn(usize) -> Value) -> FineTune {
        let (store, mut plan) = prepared();
        let dataset = ingest(&store, rows);
        plan.model["vocab_size"] = json!(dataset.info().vocab_size + 5);
        plan.model["max_position_embeddings"] = json!(64);
        let config = Config::from_json(plan.model.to_string().as_bytes()).unwrap();
        let random = Trainable::new(&config);
        let pool = Pool::new(1);
        let weights = random.to_weights(&pool, &random.init(5), WeightKind::Bf16);
        let (start, files) = train::start_files(&std::sync::Arc::new(pool), "tiny-base", weights).unwrap();
        plan.model = serde_json::from_str(&config.to_json("float32")).unwrap();
        plan.start = Some(start);
        plan.data[0].dataset = "chats".into();
        plan.data[0].sha256 = dataset.info().plan_sha256.clone();
        plan.context = 64;
        FineTune { store, plan, files, config, teacher: None }
    }

    /// From a random model of another shape, besides the data.
    fn taught(mut self, weight: f32) -> FineTune {
        let teacher = Config { n_layers: 3, ff_width: 40, ..self.config.clone() };
        self.plan.objective = Objective::Distill { weight, temperature: 2.0 };
        let random = Trainable::new(&teacher);
        let pool = Pool::new(1);
        let weights = random.to_weights(&pool, &random.init(6), WeightKind::Bf16);
        let (start, files) = train::start_files(&Arc::new(pool), "tiny-teacher", weights).unwrap();
        let config = serde_json::from_str(&teacher.to_json("float32")).unwrap();
        self.plan.teacher = Some(Teacher { model: start.model, sha256: start.sha256, config });
        self.teacher = Some(files);
        self
    }

    fn lora(mut self, merge: bool) -> FineTune {
        let changes = Lora { rank: 3, alpha: 12.0, targets: vec!["q_proj".into(), "down_proj".into()] };
        self.plan.method = Method::Lora { changes, merge };
        self
    }

    /// The published file and the bits of all losses, of a run that is stopped after these steps.
    fn carry_out(&self, run: &str, file: &str, parts: &[([usize; 2], Option<u64>)]) -> (Vec<u8>, Vec<u64>) {
        if let Some(teacher) = &self.teacher {
            train::keep_teacher(&self.store, run, teacher).unwrap();
        }
        train::create(&self.store, run, &self.plan, Some(&self.files)).unwrap();
        carry_out_parts(&self.store, run, parts.iter().copied());
        let (bundle, file) = file.split_once("/tiny/").unwrap();
        let bundle = Bundle::open(&self.store, &format!("{bundle}/tiny")).unwrap().expect("it is published");
        let steps = train::read_metrics(self.store.as_ref(), run).unwrap();
        let losses = steps.iter().filter_map(|event| match event {
            Event::Step(step) => Some(step.loss.to_bits()),
            _ => None,
        });
        (bundle.read(file).unwrap(), losses.collect())
    }

    /// The same bytes on any ranks and threads, stopped or not; and something was learned.
    fn check_exact(&self, file: &str) {
        let one = self.carry_out("one", file, &[([1, 1], None)]);
        let (first, last) = (f64::from_bits(one.1[0]), f64::from_bits(*one.1.last().unwrap()));
        assert!(last < first - 0.02, "nothing was learned: {first} then {last}");
        assert!(self.carry_out("four", file, &[([4, 4], None)]) == one, "4 ranks");
        let parts = [([1, 3], Some(1)), ([4, 2], Some(3)), ([3, 3], Some(4)), ([2, 2], None)];
        assert!(self.carry_out("parts", file, &parts) == one, "stopped and resumed on other ranks");
    }
}

/// The dataset `chats`, with a tokenizer that knows the template's special token.
fn ingest(store: &Arc<dyn Store>, rows: impl Fn(usize) -> Value) -> Dataset {
    let texts: Vec<String> = (0..200).map(|i| rows(i).to_string()).collect();
    let special_tokens = ["<|endoftext|>", "<|im_end|>"].map(str::to_owned).to_vec();
    let trainer = BpeTrainer { special_tokens, ..BpeTrainer::new(300) };
    let tokenizer = trainer.train(&texts, &mut |_| {}).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chats.jsonl"), texts.join("\n")).unwrap();
    let mut plan = IngestPlan::new("chats", vec![dir.path().into()], TokenizerSource::Given(tokenizer));
    plan.read.content = Content::Chats(None);
    plan.chat_template = Some(ChatTemplate::new(TEMPLATE, "", "").unwrap());
    plan.validation_fraction = 0.1;
    data::ingest(&plan, store, &mut |_| {}).unwrap();
    Dataset::open(store, "chats").unwrap()
}

fn chat(i: usize) -> Value {
    let answer = ["yes", "no", "perhaps not"][i % 3];
    json!({"messages": [{"role": "user", "content": format!("is {i} one?")}, {"role": "assistant", "content": answer}]})
}

fn pair(i: usize) -> Value {
    json!({"prompt": format!("is {i} one?"), "chosen": "I think so", "rejected": "go away"})
}

#[test]
fn adapters_of_packed_chats_are_exact() {
    let run = FineTune::new(chat).lora(false);
    run.check_exact("adapters/tiny/adapter_model.safetensors");
    let bundle = Bundle::open(&run.store, "adapters/tiny").unwrap().unwrap();
    let dir = tempfile::tempdir().unwrap();
    bundle.download_to(dir.path()).unwrap();
    Adapter::load(dir.path(), &run.config, &Pool::new(1)).unwrap();
    let settings: Value = serde_json::from_slice(&bundle.read("adapter_config.json").unwrap()).unwrap();
    assert_eq!(settings["base_model_name_or_path"], "tiny-base");
    assert!(Bundle::open(&run.store, "models/tiny").unwrap().is_none(), "the base was not trained");
}

#[test]
fn merged_changes_are_exact() {
    FineTune::new(chat).lora(true).check_exact("models/tiny/model.safetensors");
}

#[test]
fn fine_tuning_in_full_is_exact() {
    FineTune::new(chat).check_exact("models/tiny/model.safetensors");
}

#[test]
fn preferences_are_exact() {
    let mut run = FineTune::new(pair).lora(false);
    run.plan.objective = Objective::Dpo { beta: 0.5 };
    run.check_exact("adapters/tiny/adapter_model.safetensors");
    let steps = train::read_metrics(run.store.as_ref(), "one").unwrap();
    let margins = steps.iter().filter_map(|event| match event {
        Event::Step(step) => step.margin,
        _ => None,
    });
    let margins: Vec<f64> = margins.collect();
    assert_eq!(margins[0], 0.0, "the first step compares the start with itself");
    assert!(margins.last() > Some(&0.05), "{margins:?}");
}

#[test]
fn learning_from_a_teacher_is_exact() {
    let file = "models/tiny/model.safetensors";
    let run = FineTune::new(chat).taught(0.5);
    run.check_exact(file);
    let taught = run.carry_out("again", file, &[([1, 1], None)]).0;
    let alone =
        FineTune { plan: Plan { teacher: None, objective: Objective::CrossEntropy, ..run.plan }, ..run };
    assert!(alone.carry_out("alone", file, &[([1, 1], None)]).0 != taught, "the teacher taught nothing");
    FineTune::new(chat).lora(false).taught(0.3).check_exact("adapters/tiny/adapter_model.safetensors");
}

#[test]
fn teachers_that_do_not_fit_are_refused_by_name() {
    let create = |run: &FineTune| train::create(&run.store, "refused", &run.plan, Some(&run.files));
    let refused = |change: &dyn Fn(&mut Plan)| {
        let mut run = FineTune::new(chat).taught(0.5);
        change(&mut run.plan);
        create(&run).unwrap_err().to_string()
    };
    let field = |plan: &mut Plan, field: &str, value: u64| {
        plan.teacher.as_mut().unwrap().config[field] = json!(value);
    };
    let vocabulary = refused(&|plan| field(plan, "vocab_size", 77));
    assert!(vocabulary.contains("77 token ids") && vocabulary.contains("same vocabulary"), "{vocabulary}");
    assert!(refused(&|plan| field(plan, "max_position_embeddings", 8)).contains("context"));
    assert!(refused(&|plan| plan.teacher = None).contains("teacher"));
    assert!(refused(&|plan| plan.objective = Objective::CrossEntropy).contains("teacher"));
    let distill = |weight, temperature| Objective::Distill { weight, temperature };
    assert!(refused(&|plan| plan.objective = distill(f32::NAN, 1.0)).contains("weight"));
    assert!(refused(&|plan| plan.objective = distill(0.5, 0.0)).contains("temperature"));
    // Its files are not in the run, or are of another model.
    let run = FineTune::new(chat).taught(0.5);
    create(&run).unwrap();
    let stop = AtomicBool::new(false);
    let start = || train::run(&context(&run.store, "refused", &stop), &mut |_| {});
    assert!(matches!(start(), Err(Error::TeacherChanged { .. })));
    train::keep_teacher(&run.store, "refused", &run.files).unwrap();
    assert!(matches!(start(), Err(Error::TeacherChanged { .. })));
    for how in [
        Context { n_ranks: 2, n_team: 2, ..context(&run.store, "refused", &stop) },
        Context { n_ranks: 2, n_stages: 2, ..context(&run.store, "refused", &stop) },
    ] {
        let error = train::run(&how, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("compare with another model"), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let start = |run: &FineTune, name: &str| {
        train::create(&run.store, name, &run.plan, Some(&run.files))?;
        let stop = AtomicBool::new(false);
        train::run(&context(&run.store, name, &stop), &mut |_| {})
    };
    let mut run = FineTune::new(chat);
    run.plan.objective = Objective::Dpo { beta: 0.5 };
    assert!(matches!(start(&run, "no-pairs"), Err(Error::Pairs { .. })));
    run.plan.rows = 3;
    assert!(start(&run, "odd").unwrap_err().to_string().contains("rows"));
    let run = FineTune::new(pair);
    assert!(matches!(start(&run, "pairs"), Err(Error::Pairs { .. })));
    let mut run = FineTune::new(chat).lora(false);
    let planned = run.plan.start.take();
    assert!(start(&run, "no-start").unwrap_err().to_string().contains("method"));
    run.plan.start = planned;
    run.files.retain(|(name, _)| *name == "config.json");
    assert!(matches!(start(&run, "no-files"), Err(Error::StartChanged { .. })));
    let mut run = FineTune::new(chat).lora(false);
    let Method::Lora { changes, .. } = &mut run.plan.method else { unreachable!("it is LoRA") };
    changes.targets.push("c_attn".into());
    assert!(start(&run, "targets").unwrap_err().to_string().contains("c_attn"));
}

/// Checkpoints know their plan by its bytes.
#[test]
fn plans_of_before_keep_their_bytes() {
    let (_, plan) = prepared();
    let text = String::from_utf8(plan.to_json()).unwrap();
    for newer in ["start", "method", "objective"] {
        assert!(!text.contains(&format!("\"{newer}\"")), "{text}");
    }
    assert_eq!(Plan::from_json(text.as_bytes()).unwrap(), plan);
    let run = FineTune::new(chat).lora(true);
    assert_eq!(Plan::from_json(&run.plan.to_json()).unwrap(), run.plan);
}
