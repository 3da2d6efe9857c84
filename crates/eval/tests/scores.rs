//! Likelihoods and answers of a tiny model against the plain way to compute them: one sequence at a time, all of it.

use std::path::{Path, PathBuf};

use eval::{Error, Options, Reader, Score, Sequence, Task, Writer};
use model::{BLOCK_TOKENS, KvType, Scratch, StepInput, Transformer};
use tensor::Pool;
use tokenizer::Tokenizer;

const VOCAB: u32 = 131;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden")
}

fn model(pool: &Pool) -> Transformer {
    Transformer::new(model::load(&golden().join("models/qwen3")).unwrap().weights, pool).unwrap()
}

/// Of more ids than the model has, which is no harm in decoding.
fn tokenizer() -> Tokenizer {
    Tokenizer::from_json(&std::fs::read(golden().join("tokenizer/smollm2.tokenizer.json")).unwrap()).unwrap()
}

/// Logits after each id, computed alone.
fn logits(pool: &Pool, model: &Transformer, ids: &[u32]) -> Vec<Vec<f32>> {
    let n_blocks = ids.len().div_ceil(BLOCK_TOKENS);
    let mut kv = model.new_kv(n_blocks, KvType::F32);
    let mut step = StepInput::default();
    step.push_row(ids, 0, &(0..n_blocks as u32).collect::<Vec<_>>(), ids.len());
    let mut logits_nv = Vec::new();
    model.forward(pool, &step, &mut kv, &mut Scratch::default(), &mut logits_nv).unwrap();
    logits_nv.chunks_exact(VOCAB as usize).map(<[f32]>::to_vec).collect()
}

fn plain_score(pool: &Pool, model: &Transformer, sequence: &Sequence) -> Score {
    let all = logits(pool, model, &sequence.ids);
    let mut score = Score { logprob: 0.0, is_greedy: true };
    for position in sequence.n_context..sequence.ids.len() {
        let (logits, id) = (&all[position - 1], sequence.ids[position] as usize);
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        score.logprob += f64::from(logits[id]) - sum.ln();
        score.is_greedy &= logits.iter().all(|x| *x <= logits[id]);
    }
    score
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(VOCAB as usize) as u32).collect()
    }

    /// Sequences that share a beginning, which may end anywhere in a block, before or behind the shortest context.
    fn group(&mut self) -> Vec<Sequence> {
        let n_shared = 1 + self.below(45);
        let shared = self.ids(n_shared);
        let member = |random: &mut Random| {
            let n_more = 1 + random.below(12);
            let ids = [&shared[..], &random.ids(n_more)].concat();
            Sequence { n_context: 1 + random.below(ids.len() - 1), ids }
        };
        (0..1 + self.below(4)).map(|_| member(self)).collect()
    }
}

#[test]
fn scores_do_not_depend_on_what_is_computed_together() {
    let pool = Pool::new(2);
    let model = model(&pool);
    let mut random = Random(7);
    let mut groups: Vec<Vec<Sequence>> = (0..60).map(|_| random.group()).collect();
    // One in which the model's own choices are what is to be foretold.
    let mut ids = random.ids(9);
    for _ in 0..5 {
        let last = logits(&pool, &model, &ids).pop().unwrap();
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        ids.push(best as u32);
    }
    groups.push(vec![Sequence { n_context: 9, ids }]);
    // Room for one group at a time, for some, for all.
    for n_positions in [320, 1000, 20_000] {
        let found = Reader::new(&model, &pool, KvType::F32, n_positions).score(&groups).unwrap();
        for (group, scores) in groups.iter().zip(&found) {
            assert_eq!(group.len(), scores.len());
            for (sequence, score) in group.iter().zip(scores) {
                let expected = plain_score(&pool, &model, sequence);
                assert!((score.logprob - expected.logprob).abs() < 1e-3, "{score:?} {expected:?}");
                assert_eq!(score.is_greedy, expected.is_greedy);
            }
        }
        assert!(found.last().unwrap()[0].is_greedy);
    }
    let error = Reader::new(&model, &pool, KvType::F32, 16).score(&groups).unwrap_err();
    assert!(matches!(error, Error::Room { room: 16, .. }), "{error}");
}

#[test]
fn answers_are_the_likeliest_tokens() {
    let pool = Pool::new(2);
    let (model, tokenizer) = (model(&pool), tokenizer());
    let mut random = Random(3);
    let prompts: Vec<Vec<u32>> =
        (0..25).map(|_| 1 + random.below(40)).map(|n| Random(n as u64).ids(n)).collect();
    let plain = |prompt: &Vec<u32>| {
        let mut ids = prompt.clone();
        while ids.len() < prompt.len() + 12 {
            let last = logits(&pool, &model, &ids).pop().unwrap();
            ids.push((0..last.len()).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32);
            if tokenizer.is_special(*ids.last().unwrap()) {
                break;
            }
        }
        tokenizer.decode(&ids[prompt.len()..])
    };
    let expected: Vec<String> = prompts.iter().map(plain).collect();
    assert!(expected.iter().any(|text| text.chars().count() > 8));
    // Room for one stream, for some, for all.
    for n_positions in [64, 200, 20_000] {
        let mut reader = Reader::new(&model, &pool, KvType::F32, n_positions);
        let mut writer = Writer::new(&mut reader, &tokenizer);
        writer.max_tokens = 12;
        let mut n_done = 0;
        assert_eq!(writer.answer(&prompts, &mut || n_done += 1).unwrap(), expected);
        assert_eq!(n_done, prompts.len());
    }
    // An answer ends before what it shall end with.
    let letter = expected.iter().find_map(|text| text.chars().nth(3)).unwrap().to_string();
    let mut reader = Reader::new(&model, &pool, KvType::F32, 20_000);
    let mut writer = Writer::new(&mut reader, &tokenizer);
    let stops = [letter.as_str()];
    (writer.max_tokens, writer.stops) = (12, &stops);
    let cut = writer.answer(&prompts, &mut || ()).unwrap();
    let until = |text: &String| text.split(&letter).next().unwrap().to_owned();
    assert_eq!(cut, expected.iter().map(until).collect::<Vec<_>>());
}

/// Every file of the forms we know is read, and none is read as something else.
#[test]
fn the_published_files_are_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/eval");
    if !dir.exists() {
        eprintln!("SKIPPED: {} is missing", dir.display());
        return;
    }
    let mut n_read = 0;
    for folder in [dir.join("core"), dir] {
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|path| path.to_string_lossy().ends_with(".jsonl.gz"));
        for file in files {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            // Programs to be run, instructions to be checked: no answers to be compared.
            let unknown = ["human_eval", "HumanEval", "ifeval", "mbpp", "mt_bench"];
            let task = Task::open(&file, &Options { shots: 2, ..Options::default() });
            match unknown.iter().any(|start| name.starts_with(start)) {
                true => assert!(task.unwrap_err().to_string().contains("line 1"), "{name}"),
                false => {
                    let task = task.unwrap_or_else(|error| panic!("{name}: {error}"));
                    eprintln!("{name}: {} items of {:?}, {:?}", task.n_asked, task.form, task.delimiter);
                    n_read += 1;
                }
            }
        }
    }
    assert!(n_read > 25, "{n_read}");
}
