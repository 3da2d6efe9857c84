//! `loquat data`: what training sees of a dataset.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use data::{Batches, Dataset, NO_TARGET, Row, Split};
use tokenizer::Tokenizer;

use crate::args::DataCommand;
use crate::home::Home;

/// Around what is learned: colour on a terminal, brackets elsewhere.
const COLOUR: [&str; 2] = ["\x1b[32m", "\x1b[0m"];
const BRACKETS: [&str; 2] = ["⟦", "⟧"];

pub(crate) fn run(home: &Home, command: &DataCommand) -> Result<ExitCode> {
    let DataCommand::Show { dataset, context, rows, skip, validation } = command;
    ensure!((1..=1 << 20).contains(context), "--context {context}: it must be 1 to 2^20");
    let dataset = Dataset::open(&home.store()?, dataset)?;
    let split = if *validation { Split::Validation } else { Split::Train };
    let batches = Batches::new(&dataset, split, 0, *context)?;
    let (n_cut, n_dropped) = batches.n_cut_and_dropped();
    println!("{} rows of {context} tokens", batches.n_rows());
    if dataset.info().chats.is_some() {
        println!(
            "{n_cut} chats are longer than a row and end with it, {n_dropped} are left out: nothing to learn is in their row"
        );
    }
    let marks = if std::io::stdout().is_terminal() { COLOUR } else { BRACKETS };
    let tokenizer = dataset.tokenizer();
    for index in (*skip..batches.n_rows()).take(usize::try_from(*rows).unwrap_or(usize::MAX)) {
        let row = batches.row_at(index)?;
        let n_learned = row.targets.iter().filter(|target| **target != NO_TARGET).count();
        println!("\nrow {index}: {} tokens, {n_learned} of them learned", row.tokens.len());
        print!("{}", text(&row, &tokenizer, marks));
    }
    Ok(ExitCode::SUCCESS)
}

/// The documents of a row, each from a line of its own, with what is learned between marks: the tokens that others
/// foretell. What fills a row up behind the last document that teaches something is left out.
fn text(row: &Row, tokenizer: &Tokenizer, [begin, end]: [&str; 2]) -> String {
    let teaches = row.targets.iter().rposition(|target| *target != NO_TARGET).unwrap_or(0);
    let n = row.starts.iter().rposition(|start| *start == row.starts[teaches]).map_or(0, |last| last + 1);
    let is_learned =
        |i: usize| i > 0 && row.targets[i - 1] != NO_TARGET && row.starts[i - 1] == row.starts[i];
    let mut out = String::new();
    let mut at = 0;
    while at < n {
        let until = (at..n).find(|&i| row.starts[i] != row.starts[at] || is_learned(i) != is_learned(at));
        let until = until.unwrap_or(n);
        let ends = until == n || row.starts[until] != row.starts[at];
        // A document's last token is only ever foretold.
        let last = Some(row.targets[until - 1]).filter(|target| ends && *target != NO_TARGET);
        let (mut plain, mut learned) = (row.tokens[at..until].to_vec(), Vec::new());
        if is_learned(at) {
            std::mem::swap(&mut plain, &mut learned);
        }
        learned.extend(last);
        out += &tokenizer.decode_special(&plain);
        if !learned.is_empty() {
            out += &format!("{begin}{}{end}", tokenizer.decode_special(&learned));
        }
        if ends {
            out.push('\n');
        }
        at = until;
    }
    out
}
