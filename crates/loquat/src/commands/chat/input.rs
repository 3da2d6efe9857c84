//! Where a chat's lines come from: an editor with history on a terminal, plain lines elsewhere.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Lines remembered between chats.
const HISTORY_MAX: usize = 1000;
/// The longest message of a pipe.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

pub(super) enum Lines {
    Terminal { editor: Box<DefaultEditor>, history: PathBuf },
    Plain,
}

impl Lines {
    pub(super) fn open(history: &Path) -> Result<Lines> {
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Lines::Plain);
        }
        let config = rustyline::Config::builder().max_history_size(HISTORY_MAX)?.build();
        let mut editor = DefaultEditor::with_config(config).context("cannot use this terminal")?;
        if history.exists() {
            editor.load_history(history).with_context(|| format!("cannot read {}", history.display()))?;
        }
        Ok(Lines::Terminal { editor: Box::new(editor), history: history.to_owned() })
    }

    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Lines::Terminal { .. })
    }

    /// The next message, which may be several lines; `None` at the end.
    pub(super) fn next(&mut self, prompt: &str) -> Result<Option<String>> {
        let mut message = String::new();
        loop {
            let Some(line) = self.line(if message.is_empty() { prompt } else { "...> " })? else {
                return Ok((!message.is_empty()).then_some(message));
            };
            match line.strip_suffix('\\') {
                Some(line) => message = message + line + "\n",
                None => message += &line,
            }
            if message.len() > MESSAGE_BYTES_MAX {
                bail!("a message of more than {MESSAGE_BYTES_MAX} bytes");
            }
            if !message.ends_with('\n') {
                break;
            }
        }
        if let Lines::Terminal { editor, .. } = self {
            editor.add_history_entry(&message)?;
        }
        Ok(Some(message))
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Lines::Terminal { editor, .. } => loop {
                match editor.readline(prompt) {
                    Ok(line) => return Ok(Some(line)),
                    // Ctrl-C throws the line away, Ctrl-D ends.
                    Err(ReadlineError::Interrupted) => {}
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("cannot read from the terminal"),
                }
            },
            Lines::Plain => {
                let mut line = String::new();
                let n = std::io::stdin().lock().read_line(&mut line).context("cannot read standard input")?;
                Ok((n > 0).then(|| line.trim_end_matches(['\n', '\r']).to_owned()))
            }
        }
    }

    /// Keeps the history.
    pub(super) fn close(self) -> Result<()> {
        if let Lines::Terminal { mut editor, history } = self {
            editor.save_history(&history).with_context(|| format!("cannot write {}", history.display()))?;
        }
        Ok(())
    }
}
