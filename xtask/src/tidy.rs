//! The rules that no compiler checks. Each finding names its file and line; all are printed before it fails.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Which crate may use which. An edge that is not here is a design change: it needs a reason in docs/decisions/.
const EDGES: &[(&str, &[&str])] = &[
    ("telemetry", &[]),
    ("store", &[]),
    ("tokenizer", &[]),
    ("data", &["store", "tokenizer"]),
    ("tensor", &[]),
    ("mpi", &[]),
    ("comm", &["mpi"]),
    // The tokenizer: a GGUF file holds a vocabulary, too.
    ("model", &["tensor", "tokenizer"]),
    // The tokenizer and tasks: a run writes samples of text as it learns, and is asked.
    ("train", &["data", "model", "tensor", "comm", "store", "tokenizer", "eval"]),
    // Without the engine, so that training can use it, too.
    ("eval", &["model", "tensor", "tokenizer"]),
    ("engine", &["model", "tensor", "telemetry"]),
    ("control", &["telemetry"]),
    ("constrain", &["engine", "tokenizer"]),
    // Without HTTP and without a clock: simulations and `plan` run it, too.
    ("gateway", &[]),
    ("api", &["constrain", "engine", "gateway", "tokenizer", "telemetry"]),
    (
        "loquat",
        &[
            "api",
            "comm",
            "control",
            "data",
            "engine",
            "eval",
            "gateway",
            "model",
            "store",
            "telemetry",
            "tensor",
            "tokenizer",
            "train",
        ],
    ),
    ("xtask", &[]),
];

/// Only these may be async: the others own plain threads.
const ASYNC: &[&str] = &["api", "store", "loquat"];

/// Kernels, and the one place that talks to a C library.
const UNSAFE: &[&str] = &["crates/tensor/", "crates/mpi/"];

const FILE_LINES_MAX: usize = 600;
const FILE_BYTES_MAX: u64 = 40_000;

/// Licences that may be linked into an Apache-2.0 binary, as SPDX names.
const LICENCES: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "MIT-0",
    "Unicode-3.0",
    "CC0-1.0",
    "Unlicense",
    "BSL-1.0",
    "CDLA-Permissive-2.0",
    // File-level copyleft; only inside a build-time macro (rust-embed's path expansion), never linked in.
    "MPL-2.0",
];

pub(crate) fn run(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    let metadata = metadata(root)?;
    check_edges(&metadata, &mut findings);
    check_licences(&metadata, &mut findings);
    for file in tracked(root)? {
        check_file(root, &file, &mut findings)?;
    }
    for finding in &findings {
        println!("tidy: {finding}");
    }
    match findings.len() {
        0 => {
            println!("tidy: nothing found");
            Ok(())
        }
        n => bail!("tidy: {n} findings"),
    }
}

fn metadata(root: &Path) -> Result<Value> {
    let args = ["metadata", "--format-version", "1", "--locked"];
    let output = Command::new("cargo").args(args).current_dir(root).output().context("cannot start cargo")?;
    serde_json::from_slice(&output.stdout).context("cargo metadata gave no JSON")
}

fn check_edges(metadata: &Value, findings: &mut Vec<String>) {
    let ours: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).collect();
    let packages = metadata["packages"].as_array().into_iter().flatten();
    for package in packages.filter(|p| p["source"].is_null()) {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = EDGES.iter().find(|(n, _)| *n == name) else {
            findings.push(format!("crate {name} is not in the list of edges (xtask/src/tidy.rs)"));
            continue;
        };
        let normal = package["dependencies"].as_array().into_iter().flatten().filter(|d| d["kind"].is_null());
        for dependency in normal.filter_map(|d| d["name"].as_str()) {
            if ours.contains(dependency) && !allowed.contains(&dependency) {
                findings.push(format!("crate {name} must not use {dependency}"));
            }
            if ["tokio", "futures", "axum"].contains(&dependency) && !ASYNC.contains(&name) {
                findings.push(format!("crate {name} must not be async (it uses {dependency})"));
            }
        }
    }
}

/// cargo-deny takes minutes to build on two cores; the licence list is the part of it that works without a network.
fn check_licences(metadata: &Value, findings: &mut Vec<String>) {
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let licence = package["license"].as_str().unwrap_or_default().replace('/', " OR ");
        let fits = |choice: &str| {
            let parts = choice.trim_matches(['(', ')', ' ']).split(" AND ");
            parts.map(|p| p.trim_matches(['(', ')', ' '])).all(|p| LICENCES.contains(&p))
        };
        // Either one of the alternatives fits, or (for "A AND (B OR C)") every licence named does.
        let each = licence.split([' ', '(', ')']).filter(|w| !matches!(*w, "" | "AND" | "OR"));
        let every = !licence.contains("WITH")
            && each.clone().count() > 0
            && each.clone().all(|l| LICENCES.contains(&l));
        if !licence.split(" OR ").any(fits) && !every {
            findings.push(format!("crate {name} has licence '{licence}', which is not in the list"));
        }
    }
}

fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let args = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").args(args).current_dir(root).output().context("cannot start git")?;
    let names = String::from_utf8(output.stdout).context("file names are not UTF-8")?;
    Ok(names.lines().map(PathBuf::from).filter(|p| root.join(p).is_file()).collect())
}

fn check_file(root: &Path, file: &Path, findings: &mut Vec<String>) -> Result<()> {
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let name = file.display().to_string();
    if !["rs", "md", "toml", "sh", "svelte", "ts"].contains(&extension) {
        return Ok(());
    }
    let text = fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {name}"))?;
    if extension == "rs" {
        check_rust(&name, &text, findings);
    }
    if ["README.md", "ARCHITECTURE.md"].contains(&name.as_str()) || name.starts_with("docs/") {
        for (i, line) in text.lines().enumerate().filter(|(_, l)| l.contains("shared/")) {
            findings.push(format!("{name}:{}: strangers have no shared/: {line}", i + 1));
        }
    }
    if name == "ARCHITECTURE.md" && text.lines().count() > 300 {
        findings.push(format!("{name}: more than 300 lines"));
    }
    Ok(())
}

fn check_rust(name: &str, text: &str, findings: &mut Vec<String>) {
    if name == "xtask/src/tidy.rs" {
        return; // It names what it forbids.
    }
    let n_lines = text.lines().count();
    if n_lines > FILE_LINES_MAX || text.len() as u64 > FILE_BYTES_MAX {
        findings.push(format!("{name}: {n_lines} lines, {} bytes: split it", text.len()));
    }
    let may_be_unsafe = UNSAFE.iter().any(|dir| name.starts_with(dir));
    let is_root = name.ends_with("/src/lib.rs") || name.ends_with("/src/main.rs");
    if is_root && !may_be_unsafe && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(format!("{name}: lacks #![forbid(unsafe_code)]"));
    }
    for (i, line) in text.lines().enumerate() {
        for (bad, why) in BANNED {
            if line.contains(bad) {
                findings.push(format!("{name}:{}: {bad}: {why}", i + 1));
            }
        }
    }
}

const BANNED: &[(&str, &str)] = &[
    ("#[ignore", "a test that does not run proves nothing"),
    ("todo!(", "a stub is not done"),
    ("unimplemented!(", "a stub is not done"),
    ("allow(clippy::too_many_arguments", "use a named struct"),
    ("/work/", "no path of one machine"),
];
