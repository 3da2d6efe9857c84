//! A file's items with what is laid before them: examples, and what stands between question and answer.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use tokenizer::Tokenizer;

use crate::item::{Form, Item};
use crate::reader::Sequence;
use crate::{Error, Result, lines};

/// Between examples, as lm-evaluation-harness has it.
const BETWEEN_SHOTS: &str = "\n\n";

/// How a file is asked.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Worked examples before each item, drawn from the others.
    pub shots: usize,
    /// Of what is drawn.
    pub seed: u64,
    /// The first so many items only.
    pub limit: Option<usize>,
    /// Between a question and its answer; `None` is a space, or `\nAnswer: ` where questions are called so.
    pub delimiter: Option<String>,
}

/// Items, ready to be asked.
#[derive(Debug)]
pub struct Task {
    /// The file's name without its endings.
    pub name: String,
    pub form: Form,
    pub shots: usize,
    pub delimiter: String,
    /// How many of the items are asked; all may be examples.
    pub n_asked: usize,
    seed: u64,
    items: Vec<Item>,
}

impl Task {
    /// Reads a file of one form.
    ///
    /// # Errors
    /// If it cannot be read, or an item is wrong: by file, line and field.
    pub fn open(path: &Path, options: &Options) -> Result<Task> {
        let failed = |source| Error::Read { path: path.to_owned(), line: 0, source };
        Task::read(path, File::open(path).map_err(failed)?, options)
    }

    /// Reads what a file of this name holds.
    ///
    /// # Errors
    /// As [`Task::open`].
    pub fn read(path: &Path, file: impl Read, options: &Options) -> Result<Task> {
        let lines = lines::read(path, file)?;
        let form = Form::of(&lines[0])?;
        let mut items = Vec::with_capacity(lines.len());
        for line in &lines {
            let found = Form::of(line)?;
            if found != form {
                return Err(line.bad(format!("it is of the form {found:?}, the first one is {form:?}")));
            }
            items.push(form.read(line)?);
        }
        if options.shots >= items.len() {
            let problem =
                format!("it has {} items, too few for {} examples before each", items.len(), options.shots);
            return Err(Error::File { path: path.to_owned(), problem });
        }
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let name = name.split('.').next().unwrap_or_default().to_owned();
        let n_asked = options.limit.unwrap_or(items.len()).min(items.len());
        let delimiter = options.delimiter.clone().unwrap_or_else(|| usual_delimiter(&items[0]).to_owned());
        Ok(Task { name, form, shots: options.shots, delimiter, n_asked, seed: options.seed, items })
    }

    pub(crate) fn item(&self, index: usize) -> &Item {
        &self.items[index]
    }

    /// Each way to go on, with what comes before it.
    pub(crate) fn ways(&self, index: usize) -> Vec<(String, &str)> {
        let before = self.examples(index);
        let way = |context: &str| format!("{before}{context}{}", self.delimiter);
        match &self.items[index] {
            Item::Choice { context, choices, .. } => {
                choices.iter().map(|choice| (way(context), choice.as_str())).collect()
            }
            Item::Schema { contexts, continuation, .. } => {
                contexts.iter().map(|context| (way(context), continuation.as_str())).collect()
            }
            Item::Continuation { context, continuation } => vec![(way(context), continuation)],
            Item::Answer { .. } => Vec::new(),
        }
    }

    /// What an answer is asked for with.
    pub(crate) fn question(&self, index: usize) -> String {
        let Item::Answer { context, .. } = &self.items[index] else { return String::new() };
        format!("{}{context}{}", self.examples(index), self.delimiter.trim_end())
    }

    fn examples(&self, index: usize) -> String {
        let others = draw(self.seed, index, self.items.len(), self.shots);
        others.into_iter().map(|other| self.example(other) + BETWEEN_SHOTS).collect()
    }

    fn example(&self, index: usize) -> String {
        let (context, answer) = match &self.items[index] {
            Item::Choice { context, choices, gold } => (context, &choices[*gold]),
            Item::Schema { contexts, continuation, gold } => (&contexts[*gold], continuation),
            Item::Continuation { context, continuation } => (context, continuation),
            Item::Answer { context, worked, .. } => (context, worked),
        };
        format!("{context}{}{answer}", self.delimiter)
    }
}

fn usual_delimiter(first: &Item) -> &'static str {
    let Item::Choice { context, .. } = first else { return " " };
    let starts = ["Question:", "Passage:"].iter().any(|word| context.starts_with(word));
    let asks = starts || context.contains("\nQuestion:");
    if asks && !context.trim_end().ends_with("Answer:") { "\nAnswer: " } else { " " }
}

/// `n` of the `n_items` that are not `index`, all different; the same for the same seed.
fn draw(seed: u64, index: usize, n_items: usize, n: usize) -> Vec<usize> {
    let mut state = seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut drawn = Vec::with_capacity(n);
    while drawn.len() < n {
        let other = (split_mix(&mut state) % n_items as u64) as usize;
        if other != index && !drawn.contains(&other) {
            drawn.push(other);
        }
    }
    drawn
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Ids of a context and what follows it. Spaces at the context's end belong to the first word that follows, and the
/// border is where the context alone would end: so does lm-evaluation-harness. What is too long loses its beginning;
/// the second value says whether it did.
pub(crate) fn encode(
    tokenizer: &Tokenizer,
    context: &str,
    continuation: &str,
    context_max: usize,
) -> Result<(Sequence, bool)> {
    let trimmed = context.trim_end();
    let whole = format!("{context}{continuation}");
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    // Nothing comes before the first token of a text but what begins every text.
    let first = bos.or_else(|| tokenizer.bos().or(tokenizer.eos()).filter(|_| trimmed.is_empty()));
    let mut ids: Vec<u32> = first.into_iter().chain(tokenizer.encode(&whole)).collect();
    let n_context =
        first.iter().count() + if trimmed.is_empty() { 0 } else { tokenizer.encode(trimmed).len() };
    if ids.len() < 2 {
        return Err(Error::NoTokens(whole.chars().take(40).collect()));
    }
    let n_scored = ids.len() - n_context.clamp(1, ids.len() - 1);
    if n_scored > context_max {
        return Err(Error::Room { need: n_scored, room: context_max });
    }
    // The last token is foretold, not read.
    let n_cut = ids.len().saturating_sub(context_max + 1);
    ids.drain(..n_cut);
    Ok((Sequence { n_context: ids.len() - n_scored, ids }, n_cut > 0))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn write(name: &str, bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    const ITEMS: &str = "\u{feff}{\"query\":\"Question: a?\",\"choices\":[\"yes\",\"no\"],\"gold\":0}\n\n\
        {\"query\":\"Question: b?\",\"choices\":[\"yes\",\"no\"],\"gold\":1}\r\n{\"query\":\"Question: c?\",\"choices\":[\"yes\",\"no\"],\"gold\":1}";

    #[test]
    fn items_are_laid_out_with_examples_of_others() {
        for (name, bytes) in
            [("t.jsonl", ITEMS.as_bytes().to_vec()), ("t.jsonl.gz", packed(ITEMS.as_bytes()))]
        {
            let (_dir, path) = write(name, &bytes);
            let options = Options { shots: 2, seed: 3, limit: Some(2), ..Options::default() };
            let task = Task::open(&path, &options).unwrap();
            assert_eq!((task.name.as_str(), task.n_asked, task.delimiter.as_str()), ("t", 2, "\nAnswer: "));
            let ways = task.ways(1);
            assert_eq!(ways.iter().map(|(_, choice)| *choice).collect::<Vec<_>>(), ["yes", "no"]);
            let context = &ways[0].0;
            let [a, c] = ["Question: a?\nAnswer: yes\n\n", "Question: c?\nAnswer: no\n\n"];
            assert!(
                [[a, c].concat(), [c, a].concat()].contains(&context.replace("Question: b?\nAnswer: ", ""))
            );
            assert!(context.ends_with("Question: b?\nAnswer: "), "{context}");
            assert_eq!(task.ways(1), Task::open(&path, &options).unwrap().ways(1), "a seed is a seed");
        }
    }

    #[test]
    fn bad_files_are_refused_by_name() {
        let truncated = packed(ITEMS.as_bytes());
        let truncated = &truncated[..truncated.len() - 12];
        let long = format!("{{\"query\":\"{}\"", "x".repeat(5 << 20));
        let mixed = format!("{ITEMS}\n{{\"context\":\"a\",\"continuation\":\"b\"}}");
        for (name, bytes, words) in [
            ("a.jsonl", &b""[..], "it is empty"),
            ("a.jsonl", b"\n \n", "it is empty"),
            ("a.jsonl", b"{}", "line 1: its fields"),
            ("a.jsonl", b"[1]", "line 1: it is no JSON object"),
            ("a.jsonl", b"{\"query\":\"\xff\"}", "line 1: it is no JSON object"),
            ("a.jsonl", mixed.as_bytes(), "line 5: it is of the form LanguageModeling"),
            ("a.jsonl", long.as_bytes(), "line 1: it has more than"),
            ("a.jsonl.gz", ITEMS.as_bytes(), "after line 0"),
            ("a.jsonl.gz", truncated, "after line"),
        ] {
            let (_dir, path) = write(name, bytes);
            let error = Task::open(&path, &Options::default()).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(name), "{words}: {error}");
        }
        let (_dir, path) = write("a.jsonl", ITEMS.as_bytes());
        let many = Options { shots: 3, ..Options::default() };
        assert!(Task::open(&path, &many).unwrap_err().to_string().contains("3 items"));
        assert!(Task::open(&path.join("nothing"), &many).unwrap_err().to_string().contains("nothing"));
    }
}
