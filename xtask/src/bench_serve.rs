//! The service under load, beside llama-server: the same file, threads and clients, ours before and after the rival.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::load::{Load, Report};

const CLIENTS: [usize; 3] = [1, 8, 32];
const PROMPT_TOKENS: usize = 128;
const NEW_TOKENS: usize = 128;
const THREADS: &str = "2";
const START_MAX: Duration = Duration::from_secs(120);

pub(crate) fn run(root: &Path, model: &str, llama_server: Option<&Path>) -> Result<()> {
    crate::run(root, "cargo", &["build", "--release", "--quiet", "--package", "loquat"])?;
    println!("{PROMPT_TOKENS} tokens in, {NEW_TOKENS} out, streamed over HTTP");
    println!("(the engine without HTTP, same sizes: column 'loop tok/s' of `bench engine`)");
    println!("server       | clients |  tokens/s | first token p50 / p99 ms | gap p50 / p99 ms | peak MiB");
    ours(root, model, 1)?;
    match llama_server {
        Some(program) => {
            rival(root, model, program)?;
            ours(root, model, 2)
        }
        None => {
            println!("(give --llama-server to see llama.cpp's server on the same file)");
            Ok(())
        }
    }
}

fn ours(root: &Path, model: &str, salt: u64) -> Result<()> {
    with_ours(root, model, &[], |server, name| server.measure("loquat", name, salt))
}

/// Serves the model in a home of its own, with more flags, while `measure` is given the server and the model's name.
pub(crate) fn with_ours<T>(
    root: &Path,
    model: &str,
    flags: &[&str],
    measure: impl FnOnce(&Server, &str) -> Result<T>,
) -> Result<T> {
    let port = free_port()?;
    let home = std::env::temp_dir().join(format!("loquat-bench-{}", std::process::id()));
    let mut command = Command::new(root.join("target/release/loquat"));
    command
        .arg("--home")
        .arg(&home)
        .args(["serve", model, "--threads", THREADS, "--port", &port])
        .args(flags);
    let name = Path::new(model).file_stem().and_then(|n| n.to_str()).context("the model has no name")?;
    let name = name.to_lowercase();
    let done =
        Server::start(command.current_dir(root), &port, &name).and_then(|server| measure(&server, &name));
    std::fs::remove_dir_all(&home).with_context(|| format!("cannot remove {}", home.display()))?;
    done
}

fn rival(root: &Path, model: &str, program: &Path) -> Result<()> {
    let port = free_port()?;
    let slots = CLIENTS[CLIENTS.len() - 1];
    let context = (slots * 2 * (PROMPT_TOKENS + NEW_TOKENS)).to_string();
    let mut command = Command::new(program);
    command.args(["-m", model, "-t", THREADS, "-tb", THREADS, "-np", &slots.to_string(), "-c", &context]);
    command.args(["--port", &port]).current_dir(root);
    Server::start(&mut command, &port, "any")?.measure("llama-server", "any", 3)
}

/// A server of its own process group; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
}

impl Server {
    fn start(command: &mut Command, port: &str, model: &str) -> Result<Server> {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let mut server = Server { child, url: format!("http://127.0.0.1:{port}") };
        let started = Instant::now();
        while !ureq::get(format!("{}/health", server.url)).call().is_ok_and(|r| r.status() == 200) {
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended with {status} before it was ready");
            }
            if started.elapsed() > START_MAX {
                bail!("the server was not ready after {} s", START_MAX.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let first = Load { n_clients: 1, n_rounds: 1, prompt_tokens: 1, new_tokens: 1 };
        first.run(&server.url, model, 0)?;
        println!("started, and a first token after {:.2} s", started.elapsed().as_secs_f64());
        Ok(server)
    }

    fn measure(&self, name: &str, model: &str, salt: u64) -> Result<()> {
        for (i, n_clients) in CLIENTS.into_iter().enumerate() {
            let load = Load { n_clients, n_rounds: 2, prompt_tokens: PROMPT_TOKENS, new_tokens: NEW_TOKENS };
            let report = load.run(&self.url, model, salt << 8 | i as u64)?;
            self.print(name, n_clients, &report);
        }
        Ok(())
    }

    fn print(&self, name: &str, n_clients: usize, report: &Report) {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        println!(
            "{name:<12} | {n_clients:>7} | {:>9.1} | {:>11.0} / {:>10.0} | {:>7.1} / {:>6.1} | {:>8}",
            report.tokens_per_s,
            ms(report.first_token_p(50)),
            ms(report.first_token_p(99)),
            ms(report.gap_p(50)),
            ms(report.gap_p(99)),
            self.peak_mib().map_or("?".to_owned(), |mib| mib.to_string()),
        );
    }

    /// Peak resident memory, as Linux tells it.
    fn peak_mib(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? / 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself: then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string())
}
