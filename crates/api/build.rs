//! Sees to it that the console's folder is there to embed: `cargo build` alone must work, without Node.

use std::path::Path;
use std::{env, fs, io};

const PLACEHOLDER: &str = "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Loquat</title>\n\
    <p>The console is not built yet: run <code>./run</code>, or <code>npm ci &amp;&amp; npm run build</code> in \
    <code>console/</code>, and build again.</p>\n";

fn main() -> io::Result<()> {
    let manifest_dir = env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?;
    let dist = Path::new(&manifest_dir).join("../../console/dist");
    let index = dist.join("index.html");
    if !index.exists() {
        fs::create_dir_all(&dist)?;
        fs::write(&index, PLACEHOLDER)?;
    }
    println!("cargo::rerun-if-changed={}", index.display());
    println!("cargo::rerun-if-changed={}", dist.display());
    Ok(())
}
