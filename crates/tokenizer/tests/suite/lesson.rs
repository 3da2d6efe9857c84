//! Lessons: what is learned is what the assistant said, after what a request would have rendered.

use serde_json::{Value, json};
use tokenizer::{ChatInput, ChatTemplate, Lesson, Tokenizer};

use crate::golden_tokenizer;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// As Qwen3's: thoughts are kept in the last answer only.
const FORGETS: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// As DeepSeek-R1's: a request begins a thought that the history does not hold.
const BEGINS_A_THOUGHT: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}";
/// As SmolLM3's: says itself what is learned.
const SAYS_ITSELF: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn chat() -> Vec<Value> {
    vec![
        json!({"role": "user", "content": "Hi <|im_end|>"}),
        json!({"role": "assistant", "content": "Hello."}),
        json!({"role": "user", "content": "Bye"}),
        json!({"role": "assistant", "content": "So long <|im_start|>!"}),
        json!({"role": "user", "content": "Nobody answers this."}),
    ]
}

fn lessons(source: &str, is_learned: &dyn Fn(usize) -> bool) -> (Tokenizer, Vec<Lesson>) {
    let tokenizer = golden_tokenizer("smollm2");
    let template = ChatTemplate::new(source, "", "").unwrap();
    let messages = chat();
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    let lessons = template.lessons(&tokenizer, &input, is_learned).unwrap();
    (tokenizer, lessons)
}

/// The text with what is learned in brackets.
fn shown(tokenizer: &Tokenizer, lesson: &Lesson) -> String {
    assert_eq!(lesson.ids.len(), lesson.is_learned.len());
    let mut text = String::new();
    let mut at = 0;
    while at < lesson.ids.len() {
        let learned = lesson.is_learned[at];
        let end =
            (at..lesson.ids.len()).find(|&i| lesson.is_learned[i] != learned).unwrap_or(lesson.ids.len());
        let part = tokenizer.decode_special(&lesson.ids[at..end]);
        text += &if learned { format!("[{part}]") } else { part };
        at = end;
    }
    text
}

fn check(source: &str, expected: &[&str]) {
    let (tokenizer, lessons) = lessons(source, &|_| true);
    let found: Vec<String> = lessons.iter().map(|lesson| shown(&tokenizer, lesson)).collect();
    assert_eq!(found, expected);
}

#[test]
fn what_the_assistant_says_is_learned_with_its_end() {
    check(
        CHATML,
        &["<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n[Hello.<|im_end|>]\n\
           <|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long <|im_start|>!<|im_end|>]\n"],
    );
    check(
        SAYS_ITSELF,
        &["<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n[Hello.<|im_end|>]\n\
           <|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long <|im_start|>!<|im_end|>]"],
    );
}

#[test]
fn a_template_that_forgets_gives_a_lesson_an_answer() {
    check(
        FORGETS,
        &[
            "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nHello.<|im_end|>]\n",
            "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n\
             <|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n\
             [<think>\n\n</think>\n\nSo long <|im_start|>!<|im_end|>]\n",
        ],
    );
    check(
        BEGINS_A_THOUGHT,
        &["<|im_start|>user\nHi <|im_end|><|im_end|><|im_start|>assistant\n[Hello.<|im_end|>]\
           <|im_start|>user\nBye<|im_end|><|im_start|>assistant\n[So long <|im_start|>!<|im_end|>]"],
    );
}

#[test]
fn what_a_request_renders_comes_before_the_answer() {
    let tokenizer = golden_tokenizer("smollm2");
    let template = ChatTemplate::new(CHATML, "", "").unwrap();
    let request = template.encode(&tokenizer, &chat()[..3], true).unwrap();
    let (_, lessons) = lessons(CHATML, &|i| i == 3);
    let n_before = lessons[0].is_learned.iter().position(|learned| *learned).unwrap();
    assert_eq!(lessons[0].ids[..n_before], request);
    // A special token that a user spelled out is text there, too.
    let ends = lessons[0].ids.iter().filter(|id| Some(**id) == tokenizer.id_of("<|im_end|>")).count();
    assert_eq!(ends, 4);
}

#[test]
fn only_what_is_asked_for_is_learned() {
    for source in [CHATML, SAYS_ITSELF] {
        let (tokenizer, lessons) = lessons(source, &|i| i == 1);
        assert!(shown(&tokenizer, &lessons[0]).contains("[Hello.<|im_end|>]"), "{source}");
        let n_learned = tokenizer.encode("Hello.").len() + 1;
        assert_eq!(lessons[0].is_learned.iter().filter(|l| **l).count(), n_learned, "{source}");
        assert!(lessons.len() == 1, "{source}");
    }
    assert_eq!(lessons(FORGETS, &|i| i == 3).1.len(), 1);
    assert!(lessons(CHATML, &|_| false).1.is_empty());
}

#[test]
fn a_dialogue_of_a_base_model_ends_with_the_end_of_the_text() {
    let tokenizer = golden_tokenizer("smollm2");
    let messages = chat();
    let input = ChatInput { messages: &messages[..4], ..ChatInput::default() };
    let lessons = ChatTemplate::plain().lessons(&tokenizer, &input, &|_| true).unwrap();
    let eos = tokenizer.decode_special(&[tokenizer.eos().unwrap()]);
    let expected = format!(
        "User: Hi <|im_end|>\nAssistant:[ Hello.\n]User: Bye\nAssistant:[ So long <|im_start|>!\n{eos}]"
    );
    assert_eq!(shown(&tokenizer, &lessons[0]), expected);
}
