//! What a line of a chat means.

use anyhow::{Result, bail};

pub(super) const HELP: &str = "\
/help            this
/clear           begin a new conversation
/system TEXT     tell the model something before the conversation, which begins anew; without TEXT, nothing
/temperature X   0 takes the most likely token, 1 draws as the model was trained
/regenerate      another answer to the last message
/save FILE       write the conversation as JSON
/model MODEL     go on with another model: a file, a directory, a name or a URL
/quit            end; so does Ctrl-D
A line that ends with \\ goes on in the next one. // at the beginning stands for a message that begins with /.
";

#[derive(Debug, PartialEq)]
pub(super) enum Command<'a> {
    Say(&'a str),
    Help,
    Clear,
    System(&'a str),
    Temperature(f32),
    Regenerate,
    Save(&'a str),
    Model(&'a str),
    Quit,
    Nothing,
}

impl Command<'_> {
    pub(super) fn parse(line: &str) -> Result<Command<'_>> {
        let line = line.trim();
        let Some(rest) = line.strip_prefix('/') else {
            return Ok(if line.is_empty() { Command::Nothing } else { Command::Say(line) });
        };
        if rest.starts_with('/') {
            return Ok(Command::Say(rest));
        }
        let (word, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let argument = argument.trim();
        let needed = |what: &str| {
            if argument.is_empty() { bail!("/{word} needs {what}") } else { Ok(argument) }
        };
        Ok(match word {
            "help" | "?" => Command::Help,
            "clear" | "new" => Command::Clear,
            "system" => Command::System(argument),
            "temperature" | "temp" => match needed("a number")?.parse() {
                Ok(temperature) if (0.0..=2.0).contains(&temperature) => Command::Temperature(temperature),
                _ => bail!("/{word} {argument}: expected a number between 0 and 2"),
            },
            "regenerate" | "regen" => Command::Regenerate,
            "save" => Command::Save(needed("a file")?),
            "model" => Command::Model(needed("a model")?),
            "quit" | "exit" | "bye" => Command::Quit,
            _ => bail!("there is no /{word}; /help lists what there is"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_mean_what_help_says() {
        let check = |line, expected| assert_eq!(Command::parse(line).unwrap(), expected, "{line}");
        check("  hello ", Command::Say("hello"));
        check("", Command::Nothing);
        check("//usr", Command::Say("/usr"));
        check("/system  be brief ", Command::System("be brief"));
        check("/system", Command::System(""));
        check("/temperature 0.5", Command::Temperature(0.5));
        check("/save a b.json", Command::Save("a b.json"));
        check("/quit", Command::Quit);
        for (line, word) in [
            ("/temperature hot", "hot"),
            ("/temperature 3", "3"),
            ("/temperature NaN", "NaN"),
            ("/save", "a file"),
            ("/frobnicate", "/frobnicate"),
        ] {
            let error = Command::parse(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn help_names_every_command() {
        for word in HELP.lines().filter_map(|l| l.strip_prefix('/')).filter_map(|l| l.split(' ').next()) {
            let line = format!("/{word} 1");
            assert!(Command::parse(&line).is_ok(), "{line}");
        }
    }
}
