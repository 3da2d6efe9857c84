//! A real PostgreSQL for tests: made in a directory of its own, on a free port, gone with its last user.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const PASSWORD: &str = "only-for-this-test";
const TLS_FILES: [&str; 2] = ["server.crt", "server.key"];

pub(crate) struct Postgres {
    directory: tempfile::TempDir,
    bin: PathBuf,
    address: String,
    port: u16,
    is_tls: bool,
    process: Option<Child>,
    n_databases: AtomicU32,
}

impl Postgres {
    /// `None`, said loudly, where PostgreSQL is not installed.
    pub(crate) fn start() -> Option<Postgres> {
        Self::start_at("127.0.0.1")
    }

    /// On an address of this machine, for everybody in its network of 256.
    pub(crate) fn start_at(address: &str) -> Option<Postgres> {
        Self::start_with(address, None)
    }

    /// With a certificate and its key, in PEM, it speaks TLS to who wants it.
    pub(crate) fn start_with(address: &str, tls: Option<[String; 2]>) -> Option<Postgres> {
        let Some(bin) = bin() else {
            eprintln!("SKIPPED: there is no PostgreSQL here (./test installs it)");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port();
        let password = directory.path().join("password");
        fs::write(&password, PASSWORD).unwrap();
        let is_tls = tls.is_some();
        for (name, text) in TLS_FILES.iter().zip(tls.into_iter().flatten()) {
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let (address, n_databases) = (address.to_owned(), AtomicU32::new(0));
        let mut server = Postgres { directory, bin, address, port, is_tls, process: None, n_databases };
        if is_root() {
            let owned = Command::new("chown").args(["-R", "postgres"]).arg(server.directory.path()).status();
            assert!(owned.unwrap().success());
        }
        let made = server
            .command("initdb")
            .args(["--auth=scram-sha-256", "--username=app", "--locale=C", "--encoding=UTF8", "--no-sync"])
            .arg("--pwfile")
            .arg(&password)
            .arg("--pgdata")
            .arg(server.data())
            .stdout(Stdio::null())
            .status();
        assert!(made.unwrap().success(), "initdb failed");
        let mut rules = fs::File::options().append(true).open(server.data().join("pg_hba.conf")).unwrap();
        writeln!(rules, "host all all {}/24 scram-sha-256", server.address).unwrap();
        server.resume();
        Some(server)
    }

    /// Starts the server and waits until it answers.
    pub(crate) fn resume(&mut self) {
        self.process = Some(self.spawn());
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.admin("SELECT 1").is_err() {
            assert!(Instant::now() < deadline, "PostgreSQL does not answer");
            std::thread::sleep(Duration::from_millis(50));
            // It refuses to start while a helper of the one that was killed is still there.
            let has_ended =
                self.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_some());
            if has_ended {
                self.process = Some(self.spawn());
            }
        }
    }

    fn spawn(&self) -> Child {
        let port = self.port.to_string();
        let mut command = self.command("postgres");
        if self.is_tls {
            let [certificate, key] =
                TLS_FILES.map(|name| self.directory.path().join(name).display().to_string());
            command.args(["-c", "ssl=on", "-c", &format!("ssl_cert_file={certificate}")]);
            command.args(["-c", &format!("ssl_key_file={key}")]);
        }
        command
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(self.directory.path())
            .args(["-p", &port, "-c", &format!("listen_addresses={}", self.address)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Ends the server as a crash would.
    pub(crate) fn kill_9(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Its helpers end by themselves when it is gone.
            drop(process.kill());
            drop(process.wait());
        }
    }

    /// The URL of a new, empty database.
    pub(crate) fn new_database(&self) -> String {
        let n = self.n_databases.fetch_add(1, Ordering::Relaxed);
        self.admin(&format!("CREATE DATABASE test{n}")).unwrap();
        self.url(&format!("test{n}"))
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://app:{PASSWORD}@{}:{}/{database}", self.address, self.port)
    }

    fn admin(&self, sql: &str) -> Result<(), postgres::Error> {
        let mut client = postgres::Client::connect(&self.url("postgres"), postgres::NoTls)?;
        client.batch_execute(sql)
    }

    /// A program of PostgreSQL's, which refuses to run as root.
    fn command(&self, program: &str) -> Command {
        let program = self.bin.join(program);
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir(self.directory.path()).stdin(Stdio::null());
        command
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill_9();
    }
}

fn bin() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    found.push(PathBuf::from("/usr/bin"));
    found.sort();
    found.into_iter().rev().find(|bin| bin.join("initdb").exists())
}

fn is_root() -> bool {
    fs::metadata(Path::new("/proc/self")).is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}
