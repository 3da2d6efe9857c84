//! A task from beginning to end.

use std::f64::consts::LN_2;

use serde::Serialize;
use tokenizer::Tokenizer;

use crate::item::{Form, Item};
use crate::reader::{Reader, Score, Sequence};
use crate::score::{Metric, Tally, first_best};
use crate::task::{Task, encode};
use crate::writer::Writer;
use crate::{Result, answer};

/// Items between two reports of progress.
const ITEMS_AT_ONCE: usize = 32;
/// Questions answered side by side; the last few of them leave the machine idle in part.
const QUESTIONS_AT_ONCE: usize = 256;
/// New tokens of an answer that ends in a number, and of one that names something.
const NUMBER_TOKENS_MAX: usize = 256;
const NAME_TOKENS_MAX: usize = 32;

/// What came out of a task.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub task: String,
    pub form: Form,
    pub items: usize,
    pub shots: usize,
    pub delimiter: String,
    pub metrics: Vec<Metric>,
    /// Sequences that were too long for the model and lost their beginning.
    pub truncated: usize,
}

/// How far a task is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    pub done: usize,
    pub total: usize,
    /// The first metric so far.
    pub metric: Option<&'a Metric>,
}

/// Asks every item of a task.
///
/// # Errors
/// If an item does not fit into the model or its memory, or the model fails.
pub fn run(
    task: &Task,
    reader: &mut Reader,
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    let mut asking = Asking { task, tokenizer, tallies: tallies(task.form), n_truncated: 0 };
    match task.form {
        Form::Number | Form::Aliases => asking.ask(reader, progress)?,
        _ => asking.weigh(reader, progress)?,
    }
    Ok(Report {
        task: task.name.clone(),
        form: task.form,
        items: task.n_asked,
        shots: task.shots,
        delimiter: task.delimiter.clone(),
        metrics: asking.tallies.iter().map(Tally::metric).collect(),
        truncated: asking.n_truncated,
    })
}

/// What is counted, the usual first. Bits a byte of the right continuation tell small models apart that guess alike.
fn tallies(form: Form) -> Vec<Tally> {
    let names: &[&'static str] = match form {
        Form::MultipleChoice | Form::HellaSwag => &["acc", "acc_norm", "acc_bytes", "bits_per_byte"],
        Form::Lettered | Form::Schema | Form::LanguageModeling => &["acc", "bits_per_byte"],
        Form::Number => &["exact_match", "flexible_match"],
        Form::Aliases => &["exact_match"],
    };
    names.iter().map(|name| Tally::new(name)).collect()
}

struct Asking<'a> {
    task: &'a Task,
    tokenizer: &'a Tokenizer,
    tallies: Vec<Tally>,
    n_truncated: usize,
}

impl Asking<'_> {
    /// Items that are decided by likelihoods.
    fn weigh(&mut self, reader: &mut Reader, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let context_max = reader.model.context_max();
        let mut done = 0;
        while done < self.task.n_asked {
            let items = done..(done + ITEMS_AT_ONCE).min(self.task.n_asked);
            let groups: Result<Vec<Vec<Sequence>>> =
                items.clone().map(|index| self.sequences(index, context_max)).collect();
            let scores = reader.score(&groups?)?;
            for (index, scores) in items.clone().zip(scores) {
                self.count_scores(index, &scores);
            }
            done = items.end;
            self.report(done, progress);
        }
        Ok(())
    }

    fn sequences(&mut self, index: usize, context_max: usize) -> Result<Vec<Sequence>> {
        let mut sequences = Vec::new();
        for (context, continuation) in self.task.ways(index) {
            let (sequence, was_cut) = encode(self.tokenizer, &context, continuation, context_max)?;
            self.n_truncated += usize::from(was_cut);
            sequences.push(sequence);
        }
        Ok(sequences)
    }

    fn count_scores(&mut self, index: usize, scores: &[Score]) {
        let logprobs = || scores.iter().map(|score| score.logprob);
        let is = |right: bool| f64::from(u8::from(right));
        let bits = |gold: usize, text: &str| -scores[gold].logprob / LN_2 / text.len() as f64;
        let values = match self.task.item(index) {
            Item::Choice { choices, gold, .. } => {
                let best_by = |length: fn(&String) -> usize| {
                    first_best(logprobs().zip(choices).map(|(logprob, text)| logprob / length(text) as f64))
                };
                let acc = is(first_best(logprobs()) == *gold);
                let norm = is(best_by(|text| text.chars().count()) == *gold);
                let bytes = is(best_by(String::len) == *gold);
                match self.task.form {
                    // Letters are all as long.
                    Form::Lettered => vec![acc, bits(*gold, &choices[*gold])],
                    _ => vec![acc, norm, bytes, bits(*gold, &choices[*gold])],
                }
            }
            Item::Schema { continuation, gold, .. } => {
                vec![is(first_best(logprobs()) == *gold), bits(*gold, continuation)]
            }
            Item::Continuation { continuation, .. } => vec![is(scores[0].is_greedy), bits(0, continuation)],
            Item::Answer { .. } => unreachable!("answers are not weighed"),
        };
        self.add(&values);
    }

    /// Items that are decided by what the model answers.
    fn ask(&mut self, reader: &mut Reader, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let (max_tokens, stops): (usize, &[&str]) = match self.task.form {
            Form::Aliases => (NAME_TOKENS_MAX, &["\n", ".", ","]),
            _ => (NUMBER_TOKENS_MAX, &["Question:"]),
        };
        let room = reader.model.context_max().saturating_sub(max_tokens).max(1);
        let mut done = 0;
        while done < self.task.n_asked {
            let items = done..(done + QUESTIONS_AT_ONCE).min(self.task.n_asked);
            let prompts: Vec<Vec<u32>> = items.clone().map(|index| self.prompt(index, room)).collect();
            let mut writer = Writer::new(reader, self.tokenizer);
            (writer.max_tokens, writer.stops) = (max_tokens, stops);
            let mut n = done;
            let total = self.task.n_asked;
            let answers = writer.answer(&prompts, &mut || {
                n += 1;
                progress(Progress { done: n, total, metric: None });
            })?;
            for (index, said) in items.clone().zip(answers) {
                let Item::Answer { expected, .. } = self.task.item(index) else { unreachable!("it asks") };
                let verdict = answer::judge(&said, expected);
                let values = [verdict.strict, verdict.flexible].map(|right| f64::from(u8::from(right)));
                self.add(&values[..self.tallies.len()]);
            }
            done = items.end;
            self.report(done, progress);
        }
        Ok(())
    }

    /// What is too long loses its beginning.
    fn prompt(&mut self, index: usize, room: usize) -> Vec<u32> {
        let tokenizer = self.tokenizer;
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let mut ids: Vec<u32> = bos.into_iter().chain(tokenizer.encode(&self.task.question(index))).collect();
        let n_cut = ids.len().saturating_sub(room);
        self.n_truncated += usize::from(n_cut > 0);
        ids.drain(..n_cut);
        ids
    }

    fn add(&mut self, values: &[f64]) {
        assert_eq!(values.len(), self.tallies.len(), "a value for each metric");
        self.tallies.iter_mut().zip(values).for_each(|(tally, value)| tally.add(*value));
    }

    fn report(&self, done: usize, progress: &mut dyn FnMut(Progress)) {
        let metric = self.tallies.first().map(Tally::metric);
        progress(Progress { done, total: self.task.n_asked, metric: metric.as_ref() });
    }
}
