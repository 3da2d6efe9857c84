//! What CI runs: each step named, timed, and the first failure ends it.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::run as command;

type Step<'a> = (&'a str, Box<dyn Fn() -> Result<()> + 'a>);

fn run_all(steps: Vec<Step>) -> Result<()> {
    let mut times = Vec::new();
    for (name, step) in steps {
        println!("\n\x1b[1m── {name}\x1b[0m");
        let start = Instant::now();
        step().with_context(|| format!("step '{name}' failed"))?;
        times.push((name, start.elapsed().as_secs_f64()));
    }
    println!();
    for (name, seconds) in times {
        println!("{name:<10} {seconds:>7.1} s");
    }
    Ok(())
}

pub(crate) fn run(root: &Path, long: bool) -> Result<()> {
    let cargo = |args: &[&str]| command(root, "cargo", args);
    let mut steps: Vec<Step> = vec![
        ("fmt", Box::new(|| cargo(&["fmt", "--all", "--check"]))),
        ("tidy", Box::new(|| crate::tidy::run(root))),
        ("console", Box::new(|| command(&root.join("console"), "npm", &["run", "--silent", "check"]))),
        (
            "clippy",
            Box::new(|| {
                cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])
            }),
        ),
        ("test", Box::new(|| cargo(&["nextest", "run", "--workspace", "--no-fail-fast"]))),
    ];
    if long {
        steps.push((
            "long",
            Box::new(|| {
                let packages = ["--package", "loquat", "--package", "engine"];
                let features = ["--features", "loquat/long,engine/long"];
                let args = [&["nextest", "run", "--release"][..], &packages, &features, &["--no-fail-fast"]];
                cargo(&args.concat())
            }),
        ));
    }
    run_all(steps)
}
