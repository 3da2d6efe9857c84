//! `loquat key`: who may use the API.

use std::process::ExitCode;

use anyhow::{Result, bail};
use control::KeyId;

use crate::args::KeyCommand;
use crate::home::Home;

pub(crate) fn run(home: &Home, command: &KeyCommand) -> Result<ExitCode> {
    let control = home.control()?;
    match command {
        KeyCommand::Create { name, role } => {
            println!("{}", control.create_key(name, *role)?.expose());
            eprintln!("keep it: it is shown this once and cannot be read back");
        }
        KeyCommand::List => {
            for key in control.list_keys()? {
                println!("{:<6} {:<7} {}", key.id.0, key.role.as_str(), key.name);
            }
        }
        KeyCommand::Revoke { id } => {
            if !control.revoke_key(KeyId(*id))? {
                bail!("there is no key {id}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
