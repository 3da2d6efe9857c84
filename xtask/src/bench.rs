//! `cargo xtask bench`.

use std::path::Path;

use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_root: &Path, _args: &Args) -> Result<()> {
    Ok(())
}
