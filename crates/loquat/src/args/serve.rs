//! The command line of `loquat serve`, which takes what llama-server and `vllm serve` take.

use std::ffi::OsString;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use super::Listen;

/// Tokens drafted by a model when nobody says; a sequence whose drafts fail gets shorter ones by itself.
const DRAFT_MAX_DEFAULT: u32 = 16;

#[derive(Args)]
pub(crate) struct Serve {
    /// A .gguf file, a Hugging Face directory or the name of a model kept here.
    #[arg(required_unless_present = "model")]
    models: Vec<String>,
    /// The same, as llama-server spells it.
    #[arg(short = 'm', long, conflicts_with = "models")]
    model: Option<String>,
    /// What clients call the (first) model, instead of its file's name.
    #[arg(short = 'a', long, alias = "alias")]
    pub(crate) served_model_name: Option<String>,
    /// Clients must send this key; without it the service is open to whoever reaches the address.
    #[arg(long, env = "LOQUAT_API_KEY")]
    pub(crate) api_key: Option<String>,
    /// LoRA adapters of the (first) model, as PEFT saves them: NAME=DIRECTORY, or NAME=NAME of one that a run published.
    /// Each is served as a model of that name.
    #[arg(long, value_name = "NAME=DIRECTORY", num_args = 1..)]
    pub(crate) lora_modules: Vec<String>,
    /// Clients may load adapters from this machine's disk and unload them (POST /v1/load_lora_adapter).
    #[arg(long)]
    pub(crate) allow_runtime_lora: bool,
    /// A smaller model with the same vocabulary that guesses ahead (also -md). Changes how fast answers come, never what
    /// they say. Its keys and values take memory of their own.
    #[arg(long, alias = "spec-draft-model", conflicts_with = "prompt_lookup")]
    model_draft: Option<String>,
    /// Tokens the draft model guesses at a time at most. [default: 16]
    #[arg(long, aliases = ["draft", "draft-n", "spec-draft-n-max"], requires = "model_draft", value_parser = clap::value_parser!(u32).range(1..=32))]
    draft_max: Option<u32>,
    /// Both as vLLM spells them: {"method": "ngram", "num_speculative_tokens": 4} or {"model": "…", …}.
    #[arg(long, value_parser = SpeculativeConfig::parse, conflicts_with_all = ["model_draft", "prompt_lookup"])]
    speculative_config: Option<SpeculativeConfig>,
    /// Be the replica of this name: say in the cluster's database where it is, and take requests of its gateways alone.
    #[arg(long, value_name = "NAME", conflicts_with = "api_key", hide = true)]
    pub(crate) replica: Option<String>,
    #[command(flatten)]
    pub(crate) listen: Listen,
}

/// How tokens are guessed ahead.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Guess {
    Off,
    /// From what stands in the text already.
    Lookup {
        k_max: usize,
    },
    /// By the model of this name or path.
    Draft {
        model: String,
        k_max: usize,
    },
}

impl Serve {
    /// For a server that only this process uses.
    pub(crate) fn local(model: &str, api_key: String, listen: Listen) -> Serve {
        Serve {
            models: vec![model.to_owned()],
            model: None,
            served_model_name: None,
            api_key: Some(api_key),
            lora_modules: Vec::new(),
            allow_runtime_lora: false,
            model_draft: None,
            draft_max: None,
            speculative_config: None,
            replica: None,
            listen,
        }
    }

    /// What is served, at least one.
    pub(crate) fn models(&self) -> Vec<&str> {
        self.model.iter().chain(&self.models).map(String::as_str).collect()
    }

    pub(crate) fn guess(&self) -> Result<Guess> {
        let guess = match (&self.model_draft, &self.speculative_config) {
            (Some(model), _) => {
                let k_max = self.draft_max.unwrap_or(DRAFT_MAX_DEFAULT) as usize;
                Guess::Draft { model: model.clone(), k_max }
            }
            (None, Some(config)) => config.guess().context("--speculative-config")?,
            (None, None) => self.listen.guess(),
        };
        if matches!(guess, Guess::Draft { .. }) && self.models().len() > 1 {
            bail!("a draft model goes with one model, not with {}", self.models().len());
        }
        Ok(guess)
    }
}

/// vLLM's JSON, as much of it as there is an engine for.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpeculativeConfig {
    method: Option<String>,
    model: Option<String>,
    num_speculative_tokens: Option<u32>,
    /// Of n-grams, which are looked up at every length here.
    #[serde(rename = "prompt_lookup_max")]
    _prompt_lookup_max: Option<u32>,
    #[serde(rename = "prompt_lookup_min")]
    _prompt_lookup_min: Option<u32>,
}

impl SpeculativeConfig {
    fn parse(json: &str) -> Result<SpeculativeConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn guess(&self) -> Result<Guess> {
        let n = self.num_speculative_tokens.unwrap_or(DRAFT_MAX_DEFAULT);
        if !(1..=32).contains(&n) {
            bail!("num_speculative_tokens is {n}, not 1 to 32");
        }
        let k_max = n as usize;
        match (self.method.as_deref(), &self.model) {
            (Some("ngram" | "[ngram]"), None) => Ok(Guess::Lookup { k_max }),
            (None | Some("draft_model"), Some(model)) => Ok(Guess::Draft { model: model.clone(), k_max }),
            (Some("ngram"), Some(model)) => bail!("the method ngram needs no model, there is {model}"),
            (None | Some("draft_model"), None) => bail!("it names no model"),
            (Some(method), _) => {
                bail!("the method {method} is not known here, only ngram and draft_model are")
            }
        }
    }
}

/// Rewrites llama.cpp's short names of two letters, which the parser would read as two flags.
pub(crate) fn spelled_out(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.collect();
    if let Some(serve) = args.iter().position(|arg| arg == "serve") {
        for arg in &mut args[serve + 1..] {
            let long = match arg.to_str() {
                Some("-np") => "--parallel",
                Some("-md") => "--model-draft",
                Some("-ctk") => "--cache-type-k",
                _ => continue,
            };
            *arg = long.into();
        }
    }
    args
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Command, Loquat};

    fn parse(line: &str) -> Result<Serve> {
        let words = line.split_whitespace().map(OsString::from);
        let loquat = Loquat::try_parse_from(spelled_out(["loquat".into()].into_iter().chain(words)))?;
        match loquat.command {
            Command::Serve(serve) => Ok(serve),
            _ => bail!("another command"),
        }
    }

    #[test]
    fn lines_for_other_servers_are_understood() {
        let serve =
            parse("serve -m big.gguf -md small.gguf --draft-max 4 -c 2048 -np 3 -t 2 -a name").unwrap();
        assert_eq!((serve.models(), serve.listen.max_num_seqs), (vec!["big.gguf"], 3));
        assert_eq!((serve.listen.ctx_size, serve.listen.threads), (2048, Some(2)));
        assert_eq!(serve.guess().unwrap(), Guess::Draft { model: "small.gguf".into(), k_max: 4 });
        let config = r#"{"model":"dir","num_speculative_tokens":5}"#;
        let serve = parse(&format!("serve big --max-model-len 100 --speculative-config {config}")).unwrap();
        assert_eq!(serve.listen.ctx_size, 100);
        assert_eq!(serve.guess().unwrap(), Guess::Draft { model: "dir".into(), k_max: 5 });
        let ngram = r#"{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":4}"#;
        let serve = parse(&format!("serve big --speculative-config {ngram}")).unwrap();
        assert_eq!(serve.guess().unwrap(), Guess::Lookup { k_max: 3 });
        assert_eq!(
            parse("serve a b --prompt-lookup 2").unwrap().guess().unwrap(),
            Guess::Lookup { k_max: 2 }
        );
        assert_eq!(parse("serve a").unwrap().guess().unwrap(), Guess::Off);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for line in [
            "serve",
            "serve a -m b",
            "serve a --draft-max 3",
            "serve a -md b --draft-max 0",
            "serve a -md b --prompt-lookup 3",
            r#"serve a --speculative-config {"method":"ngram","what":1}"#,
            "serve a --speculative-config ngram",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        for line in [
            "serve a b -md c",
            r#"serve a --speculative-config {"method":"eagle","model":"b"}"#,
            r#"serve a --speculative-config {"method":"ngram","num_speculative_tokens":99}"#,
            r#"serve a --speculative-config {"num_speculative_tokens":3}"#,
        ] {
            assert!(parse(line).unwrap().guess().is_err(), "{line}");
        }
    }
}
