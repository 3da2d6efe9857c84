//! Real clients against the real server: the official Python package and a real browser.

use std::process::Command;

use crate::demo::demo;
use crate::support::{Client, Running, chat_model, root};

const CHAT_MODEL: &str = "smollm2-135m-instruct-q4_1";

#[test]
fn the_openai_package_and_a_browser_work_unchanged() {
    if chat_model().is_none() {
        eprintln!("SKIPPED: the clients need the chat model");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let mut server = Running::start(&mut demo(home.path(), 4));
    let client = server.client();
    let python = root().join("var/venv/bin/python");
    match python.exists() {
        true => run(&client, Command::new(python).arg("tests/openai_sdk.py")),
        false => eprintln!("SKIPPED: no var/venv (./test makes it), so the openai package was not run"),
    }
    let browser = ["/usr/bin/chromium", "/usr/bin/chromium-browser"]
        .into_iter()
        .find(|p| std::path::Path::new(p).exists());
    match browser.filter(|_| root().join("console/node_modules").exists()) {
        Some(browser) => run(&client, Command::new("node").arg("tests/console.mjs").env("CHROMIUM", browser)),
        None => eprintln!("SKIPPED: no chromium or no console/node_modules (./test installs both)"),
    }
    assert_eq!(server.stop(), Some(0));
}

fn run(client: &Client, command: &mut Command) {
    let status = command
        .current_dir(root())
        .env("LOQUAT_URL", format!("{}/v1", client.base))
        .env("LOQUAT_KEY", &client.key)
        .env("LOQUAT_CHAT_MODEL", CHAT_MODEL)
        .env("LOQUAT_BASE_MODEL", "sotu")
        .env("SCREENSHOTS", root().join("var/screenshots"))
        .status()
        .unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
