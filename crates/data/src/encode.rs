//! Documents to ids: a text gives one document, a row of chats as many as its template makes lessons of it.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokenizer::{ChatInput, ChatTemplate};

use crate::chat::{self, Chat, Example};
use crate::prepare::Prepared;
use crate::split::document_hash;
use crate::{Content, Document, chain};

/// Marks in the highest bits of an id, until ids and marks are stored apart: a document begins here.
const BEGINS: u32 = 1 << 30;
/// The model is to learn to write this id.
pub(crate) const LEARNED: u32 = 1 << 31;
const MARKS_SHIFT: u32 = 30;

/// The same marks as they are stored, a byte a token.
pub(crate) const MARK_BEGINS: u8 = (BEGINS >> MARKS_SHIFT) as u8;
pub(crate) const MARK_LEARNED: u8 = (LEARNED >> MARKS_SHIFT) as u8;

/// What a row became.
pub(crate) struct Encoded {
    /// Of the row's text.
    pub(crate) hash: u64,
    /// Ids, marked if they are of chats; or why the row cannot be learned from.
    pub(crate) documents: Result<Vec<Vec<u32>>, String>,
    /// The documents are a better answer and a worse one.
    pub(crate) is_pair: bool,
}

pub(crate) fn ids_of(marked: &[u32]) -> Vec<u32> {
    marked.iter().map(|id| id & !(BEGINS | LEARNED)).collect()
}

pub(crate) fn marks_of(marked: &[u32]) -> Vec<u8> {
    marked.iter().map(|id| (id >> MARKS_SHIFT) as u8).collect()
}

/// The documents of each row, in their order, whichever thread made them.
pub(crate) fn encode(
    prepared: &Prepared,
    template: Option<&ChatTemplate>,
    part: &[Document],
    n_threads: usize,
) -> Vec<Encoded> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let i = next.fetch_add(1, Ordering::Relaxed)
            && let Some(document) = part.get(i)
        {
            done.push((i, encode_row(prepared, template, document)));
        }
        done
    };
    let mut all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads.clamp(1, part.len().max(1))).map(|_| scope.spawn(work)).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().flat_map(join).collect()
    });
    all.sort_unstable_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, encoded)| encoded).collect()
}

fn encode_row(prepared: &Prepared, template: Option<&ChatTemplate>, document: &Document) -> Encoded {
    let hash = document_hash(&document.text);
    let (documents, is_pair) = match (prepared.content, template) {
        (Content::Chats(form), Some(template)) => match chat::read(&document.text, form) {
            Ok(Chat::One(example)) => (lessons(prepared, template, example), false),
            Ok(Chat::Pair(pair)) => (pair_of_lessons(prepared, template, pair), true),
            Err(why) => (Err(why), false),
        },
        _ => {
            let mut ids = prepared.tokenizer.encode(&document.text);
            ids.push(prepared.end_of_text);
            (Ok(vec![ids]), false)
        }
    };
    Encoded { hash, documents, is_pair }
}

fn pair_of_lessons(
    prepared: &Prepared,
    template: &ChatTemplate,
    pair: [Example; 2],
) -> Result<Vec<Vec<u32>>, String> {
    let mut documents = Vec::new();
    for (example, name) in pair.into_iter().zip(["chosen", "rejected"]) {
        let mut lessons = lessons(prepared, template, example)?;
        if lessons.len() != 1 {
            return Err(format!("{name}: several answers, which the chat template cannot write as one text"));
        }
        documents.append(&mut lessons);
    }
    Ok(documents)
}

fn lessons(
    prepared: &Prepared,
    template: &ChatTemplate,
    mut example: Example,
) -> Result<Vec<Vec<u32>>, String> {
    let n_before = example.messages.len();
    template.spell_tools(&mut example.messages, &example.tools, true);
    // A system message that tells of the tools may have come first.
    let n_added = example.messages.len() - n_before;
    let is_learned = |i: usize| i >= n_added && example.is_learned[i - n_added];
    let input = ChatInput { messages: &example.messages, tools: &example.tools, ..ChatInput::default() };
    let lessons =
        template.lessons(&prepared.tokenizer, &input, &is_learned).map_err(|error| chain(&error))?;
    let documents: Vec<Vec<u32>> = lessons
        .into_iter()
        .filter(|lesson| lesson.is_learned.contains(&true))
        .map(|lesson| {
            let marked = lesson.ids.iter().zip(&lesson.is_learned).enumerate();
            let mark = |(i, (id, learned)): (usize, (&u32, &bool))| {
                id | if i == 0 { BEGINS } else { 0 } | if *learned { LEARNED } else { 0 }
            };
            marked.map(mark).collect()
        })
        .collect();
    if documents.is_empty() {
        return Err("the chat template writes nothing that the assistant says".into());
    }
    Ok(documents)
}
