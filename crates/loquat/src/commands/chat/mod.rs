//! `loquat chat`: a conversation in the terminal.
//!
//! A model given as a file is served in this process, on a port of its own that only this process has the key of; from
//! there on it is the same as a server elsewhere. So what is seen here is what a client of the API gets.

mod command;
mod input;
mod server;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;

use crate::args;
use crate::args::Listen;
use crate::commands::up::Replica;
use crate::home::Home;
use command::Command;
use input::Lines;
use server::{Answer, Ask, Server};

pub(crate) fn run(home: &Home, args: &args::Chat) -> Result<ExitCode> {
    let partner = Partner::open(home, args, &args.model)?;
    let interrupt = Interrupt::new()?;
    let mut lines = Lines::open(&home.path().join("chat-history"))?;
    let mut chat = Chat {
        home,
        args,
        partner,
        interrupt,
        system: args.system.clone(),
        temperature: args.temperature,
        turns: Vec::new(),
        n_answers: 0,
    };
    if lines.is_terminal() {
        println!("{}: /help lists what else you can type; Ctrl-C stops an answer, Ctrl-D ends", chat.name());
    }
    while let Some(text) = lines.next(&format!("{}> ", "you"))? {
        // A wrong word or a server that is gone must not end the conversation.
        match chat.take(&text) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if lines.is_terminal() => eprintln!("error: {error:#}"),
            Err(error) => return Err(error),
        }
    }
    lines.close()?;
    chat.partner.close()?;
    Ok(ExitCode::SUCCESS)
}

/// Whom one talks to.
struct Partner {
    server: Server,
    /// The server, when it is this process.
    replica: Option<Replica>,
}

impl Partner {
    fn open(home: &Home, args: &args::Chat, model: &str) -> Result<Partner> {
        if model.starts_with("http://") || model.starts_with("https://") {
            let server = Server::connect(model, args.api_key.clone(), args.server_model.as_deref())?;
            return Ok(Partner { server, replica: None });
        }
        let key = random_key()?;
        let listen = Listen::local(args.threads, args.kv_mib);
        let serve = args::Serve::local(model, key.clone(), listen);
        let replica = Replica::start(home, &serve)?;
        let server = Server::connect(&format!("http://{}", replica.address()), Some(key), None)?;
        Ok(Partner { server, replica: Some(replica) })
    }

    fn close(self) -> Result<()> {
        self.replica.map_or(Ok(()), Replica::stop)
    }
}

fn random_key() -> Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).context("no random numbers")?;
    Ok(hex::encode(bytes))
}

/// Ctrl-C: ends an answer while there is one, else the program.
struct Interrupt {
    idle: Arc<AtomicBool>,
    hit: Arc<AtomicBool>,
}

impl Interrupt {
    fn new() -> Result<Interrupt> {
        let (idle, hit) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        signal_hook::flag::register_conditional_default(SIGINT, idle.clone())?;
        signal_hook::flag::register(SIGINT, hit.clone())?;
        Ok(Interrupt { idle, hit })
    }

    /// Runs `work`, which looks at the flag it is given.
    fn during<T>(&self, work: impl FnOnce(&AtomicBool) -> T) -> T {
        self.hit.store(false, Ordering::Relaxed);
        self.idle.store(false, Ordering::Relaxed);
        let result = work(&self.hit);
        self.idle.store(true, Ordering::Relaxed);
        result
    }
}

struct Chat<'a> {
    home: &'a Home,
    args: &'a args::Chat,
    partner: Partner,
    interrupt: Interrupt,
    system: Option<String>,
    temperature: f32,
    /// Messages of user and assistant in turn.
    turns: Vec<Value>,
    n_answers: u64,
}

impl Chat<'_> {
    fn name(&self) -> &str {
        &self.partner.server.model
    }

    /// Does what a line says; false ends the conversation.
    fn take(&mut self, text: &str) -> Result<bool> {
        match Command::parse(text)? {
            Command::Say(text) => self.say(text)?,
            Command::Help => print!("{}", command::HELP),
            Command::Clear => self.turns.clear(),
            Command::System(system) => {
                self.system = (!system.is_empty()).then(|| system.to_owned());
                self.turns.clear();
            }
            Command::Temperature(temperature) => self.temperature = temperature,
            Command::Regenerate => self.regenerate()?,
            Command::Save(path) => self.save(Path::new(path))?,
            Command::Model(model) => self.change_model(model)?,
            Command::Quit => return Ok(false),
            Command::Nothing => {}
        }
        Ok(true)
    }

    fn say(&mut self, text: &str) -> Result<()> {
        self.turns.push(json!({"role": "user", "content": text}));
        let answered = self.answer();
        if answered.is_err() {
            // A message without an answer would be in the way of the next one.
            self.turns.pop();
        }
        answered
    }

    fn regenerate(&mut self) -> Result<()> {
        if self.turns.last().is_none_or(|turn| turn["role"] != "assistant") {
            bail!("there is no answer yet to give again");
        }
        let old = self.turns.pop();
        let answered = self.answer();
        if answered.is_err() {
            self.turns.extend(old);
        }
        answered
    }

    /// Has the messages answered, shows the answer as it comes, and keeps it.
    fn answer(&mut self) -> Result<()> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let ask = Ask {
            messages: system.chain(self.turns.iter().cloned()).collect(),
            temperature: self.temperature,
            top_p: self.args.top_p,
            max_tokens: self.args.max_tokens,
            seed: self.args.seed.map(|seed| seed.wrapping_add(self.n_answers)),
        };
        let show = |piece: &str| {
            print!("{piece}");
            // A terminal that has gone away is noticed by the next read.
            let _ = std::io::stdout().flush();
        };
        let answer = self.interrupt.during(|stop| self.partner.server.ask(&ask, stop, &mut { show }))?;
        println!();
        self.n_answers += 1;
        tell(&answer);
        self.turns.push(json!({"role": "assistant", "content": answer.text}));
        Ok(())
    }

    fn save(&self, path: &Path) -> Result<()> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.turns.iter().cloned()).collect();
        let conversation = json!({"model": self.name(), "messages": messages});
        let text = serde_json::to_string_pretty(&conversation)? + "\n";
        // What is there may be somebody's work.
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
        written.with_context(|| format!("cannot save to {}", path.display()))?;
        eprintln!("saved {} messages to {}", messages.len(), path.display());
        Ok(())
    }

    /// The conversation goes on with another model.
    fn change_model(&mut self, model: &str) -> Result<()> {
        let partner = Partner::open(self.home, self.args, model)?;
        std::mem::replace(&mut self.partner, partner).close()?;
        eprintln!("now {}", self.name());
        Ok(())
    }
}

/// Numbers of an answer, apart from its text: on standard error.
fn tell(answer: &Answer) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let after_first = answer.n_tokens.saturating_sub(1) as f64;
    let speed = after_first / (answer.total - answer.to_first).as_secs_f64().max(1e-9);
    let cached = if answer.n_cached > 0 { format!(" ({} cached)", answer.n_cached) } else { String::new() };
    let end = match answer.end.as_deref() {
        Some("length") => ", cut at its limit",
        Some(_) => "",
        None => ", stopped",
    };
    let counts = match answer.n_prompt {
        Some(n_prompt) => format!("{n_prompt} tokens read{cached}, {} written", answer.n_tokens),
        None => format!("{} pieces written", answer.n_tokens),
    };
    let line = format!("[{counts}, first after {:.0} ms, {speed:.1} tokens/s{end}]", ms(answer.to_first));
    match std::io::stderr().is_terminal() {
        true => eprintln!("\x1b[2m{line}\x1b[0m"),
        false => eprintln!("{line}"),
    }
}
