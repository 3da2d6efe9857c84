//! A SeaweedFS of three nodes: three masters that agree, three volume servers that each hold copies of the others', and a filer
//! with the S3 gateway, which alone is asked from elsewhere.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::root;

const ACCESS_KEY: &str = "chaos-access";
const SECRET_KEY: &str = "chaos-secret";
const READY_MAX: Duration = Duration::from_secs(60);

pub(super) struct Weed {
    directory: tempfile::TempDir,
    program: PathBuf,
    peers: String,
    volume_ports: [u16; 3],
    /// Address and port.
    s3: SocketAddr,
    volumes: [Option<Child>; 3],
    others: Vec<Child>,
}

impl Weed {
    pub(super) const URL: &str = "s3://chaos/store";

    /// `None`, said loudly, where the program is missing. S3 is spoken at this address.
    pub(super) fn start(address: &str) -> Option<Weed> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let in_path = std::env::split_paths(&path).map(|dir| dir.join("weed"));
        let found =
            std::iter::once(root().join("var/venv/bin/weed")).chain(in_path).find(|weed| weed.is_file());
        let Some(program) = found else {
            eprintln!(
                "SKIPPED IN PART: no SeaweedFS (./test installs it): objects lie in a directory, no storage node dies"
            );
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let [master0, master1, master2, s3_port] = free_ports();
        let volume_ports = {
            let [a, b, c] = free_ports();
            [a, b, c]
        };
        let peers = [master0, master1, master2].map(|port| format!("127.0.0.1:{port}")).join(",");
        let mut weed = Weed {
            directory,
            program,
            peers,
            volume_ports,
            s3: SocketAddr::new(address.parse().unwrap(), s3_port),
            volumes: [None, None, None],
            others: Vec::new(),
        };
        for (i, port) in [master0, master1, master2].into_iter().enumerate() {
            let args = format!(
                "master -ip=127.0.0.1 -port={port} -port.grpc={} -peers={} -mdir={} -telemetry=false -defaultReplication=010 \
                 -volumeSizeLimitMB=64 -electionTimeout=2s",
                port + 10_000,
                weed.peers,
                weed.dir(&format!("m{i}"))
            );
            let child = weed.spawn(&args, &format!("master{i}"));
            weed.others.push(child);
        }
        (0..3).for_each(|i| weed.start_volume(i));
        weed.start_gateway();
        weed.wait_ready();
        Some(weed)
    }

    fn dir(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path.display().to_string()
    }

    fn spawn(&self, args: &str, name: &str) -> Child {
        let log = fs::File::create(self.directory.path().join(name)).unwrap();
        Command::new(&self.program)
            .args(args.split_whitespace())
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub(super) fn start_volume(&mut self, i: usize) {
        let port = self.volume_ports[i];
        let args = format!(
            "volume -ip=127.0.0.1 -port={port} -port.grpc={} -dir={} -max=60 -mserver={} -dataCenter=dc1 -rack=r{i}",
            port + 10_000,
            self.dir(&format!("v{i}")),
            self.peers
        );
        self.volumes[i] = Some(self.spawn(&args, &format!("volume{i}")));
    }

    fn start_gateway(&mut self) {
        let [filer_port] = free_ports();
        let config = serde_json::json!({"identities": [{
            "name": "chaos", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        let path = self.directory.path().join("s3.json");
        fs::write(&path, config.to_string()).unwrap();
        let (dir, s3) = (self.directory.path().display().to_string(), self.s3);
        self.dir("f");
        let args = format!(
            "filer -ip=127.0.0.1 -port={filer_port} -port.grpc={} -master={} -defaultReplicaPlacement=010 -defaultStoreDir={dir}/f \
             -localSocket={dir}/filer.sock",
            filer_port + 10_000,
            self.peers
        );
        let child = self.spawn(&args, "filer");
        self.others.push(child);
        let args = format!(
            "s3 -ip.bind={} -port={} -port.grpc={} -filer=127.0.0.1:{filer_port}.{} -config={} -port.iceberg=0 \
             -localSocket={dir}/s3.sock",
            s3.ip(),
            s3.port(),
            s3.port() + 10_000,
            filer_port + 10_000,
            path.display()
        );
        let child = self.spawn(&args, "s3");
        self.others.push(child);
    }

    fn wait_ready(&self) {
        let deadline = Instant::now() + READY_MAX;
        while !self.takes_objects() {
            assert!(
                Instant::now() < deadline,
                "SeaweedFS does not start: see {}",
                self.directory.path().display()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn takes_objects(&self) -> bool {
        let is_there = TcpStream::connect(self.s3).is_ok();
        let name = store::ObjectName::parse("ready").unwrap();
        is_there
            && store::open_with(Self::URL, &self.options())
                .and_then(|store| store.put(&name, b"ready"))
                .is_ok()
    }

    fn options(&self) -> store::S3Options {
        store::S3Options {
            endpoint: format!("http://{}", self.s3),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
            allow_http: true,
            ..store::S3Options::default()
        }
    }

    pub(super) fn open(&self) -> Arc<dyn store::Store> {
        store::open_with(Self::URL, &self.options()).unwrap()
    }

    /// What every S3 client knows it by.
    pub(super) fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL_S3", format!("http://{}", self.s3)),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ]
    }

    /// Ends a storage node as a crash would.
    pub(super) fn kill_volume(&mut self, i: usize) {
        if let Some(mut child) = self.volumes[i].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        for child in self.volumes.iter_mut().flatten().chain(&mut self.others) {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Ports that are free, and so are those 10,000 above them, where SeaweedFS speaks gRPC.
pub(super) fn free_ports<const N: usize>() -> [u16; N] {
    let mut held: Vec<(TcpListener, TcpListener)> = Vec::new();
    while held.len() < N {
        let Ok(low) = TcpListener::bind("127.0.0.1:0") else { continue };
        let port = low.local_addr().unwrap().port();
        let Some(above) = port.checked_add(10_000) else { continue };
        if let Ok(high) = TcpListener::bind(("127.0.0.1", above)) {
            held.push((low, high));
        }
    }
    let ports: Vec<u16> = held.iter().map(|(low, _)| low.local_addr().unwrap().port()).collect();
    ports.try_into().unwrap()
}
