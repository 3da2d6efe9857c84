//! A real Slurm for tests: munge, a controller and three nodes, on loopback or on hosts that somebody made, in a directory
//! of their own.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Slurm {
    directory: tempfile::TempDir,
    site: Site,
    processes: Vec<Child>,
}

/// Where its parts are.
pub(crate) struct Site {
    /// The controller's address, which is this process's as well.
    pub(crate) controller: String,
    pub(crate) nodes: [Host; 3],
    /// Of each node.
    pub(crate) cpus: u32,
}

pub(crate) struct Host {
    pub(crate) address: String,
    /// Words before a command that let it run there.
    pub(crate) enter: Vec<String>,
}

impl Site {
    /// Three nodes that differ in their ports only.
    pub(crate) fn loopback() -> Site {
        let host = || Host { address: "127.0.0.1".to_owned(), enter: Vec::new() };
        Site { controller: "127.0.0.1".to_owned(), nodes: [host(), host(), host()], cpus: 4 }
    }
}

const NODES: [&str; 3] = ["n1", "n2", "n3"];

impl Slurm {
    /// `None`, said loudly, where Slurm is not installed or may not be started.
    pub(crate) fn start(site: Site) -> Option<Slurm> {
        let is_root =
            fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
        let has =
            |program: &str| ["/usr/sbin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
        if !is_root || !["munged", "slurmctld", "slurmd", "sbatch"].iter().all(|program| has(program)) {
            eprintln!("SKIPPED: there is no Slurm here, or this is not root (./test --long installs it)");
            return None;
        }
        let mut slurm = Slurm { directory: tempfile::tempdir().unwrap(), site, processes: Vec::new() };
        for dir in ["munge", "state", "tmp", "log", "spool/n1", "spool/n2", "spool/n3"] {
            fs::create_dir_all(slurm.path(dir)).unwrap();
        }
        // munged looks at every directory above its socket.
        sh(&format!("chmod 755 {}", slurm.directory.path().display()));
        fs::write(slurm.conf(), slurm.configuration()).unwrap();
        slurm.start_munge();
        let mut controller = Command::new("slurmctld");
        controller.arg("-D");
        slurm.spawn(controller, "slurmctld");
        for i in 0..NODES.len() {
            slurm.start_node(i);
        }
        slurm.wait_for("n[1-3]");
        Some(slurm)
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.path("slurm.conf")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start_munge(&mut self) {
        let (dir, key) = (self.path("munge"), self.path("munge/key"));
        fs::write(&key, [7; 1024]).unwrap();
        sh(&format!("chown -R munge {0}; chmod 400 {1}", dir.display(), key.display()));
        let file = |option: &str, name: &str| format!("--{option}={}", dir.join(name).display());
        let child = Command::new("setpriv")
            .args(["--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground", "--force"])
            .args([file("key-file", "key"), file("socket", "socket"), file("pid-file", "pid")])
            .args([file("seed-file", "seed"), file("log-file", "log")])
            .stderr(Stdio::null())
            .spawn();
        self.processes.push(child.unwrap());
        let deadline = Instant::now() + Duration::from_secs(20);
        while !dir.join("socket").exists() {
            assert!(Instant::now() < deadline, "munged does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the daemon of a node, for the first time or again.
    pub(crate) fn start_node(&mut self, i: usize) {
        let words: Vec<&str> = self.site.nodes[i]
            .enter
            .iter()
            .map(String::as_str)
            .chain(["slurmd", "-D", "-N", NODES[i]])
            .collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        self.spawn(command, &format!("slurmd-{}", NODES[i]));
    }

    fn spawn(&mut self, mut command: Command, log: &str) {
        let log = fs::File::options().create(true).append(true).open(self.path(&format!("log/{log}.err")));
        command.env("SLURM_CONF", self.conf()).stdin(Stdio::null()).stdout(Stdio::null());
        self.processes.push(command.stderr(log.unwrap()).spawn().unwrap());
    }

    /// Waits until these nodes are idle.
    fn wait_for(&self, nodes: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let seen = Command::new("sinfo")
                .args(["-h", "-t", "idle", "-o", "%N"])
                .env("SLURM_CONF", self.conf())
                .output();
            let seen = String::from_utf8_lossy(&seen.unwrap().stdout).trim().to_owned();
            if seen == nodes {
                return;
            }
            assert!(Instant::now() < deadline, "nodes are {seen:?}, not {nodes}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn configuration(&self) -> String {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let (host, dir) = (host.trim().split('.').next().unwrap(), self.directory.path().display());
        let ports: Vec<TcpListener> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |i: usize| ports[i].local_addr().unwrap().port();
        let Site { controller, nodes: hosts, cpus } = &self.site;
        let node = |(i, name): (usize, &&str)| {
            let address = &hosts[i].address;
            format!(
                "NodeName={name} NodeHostname={host} NodeAddr={address} Port={} CPUs={cpus} RealMemory=4000\n",
                port(i + 1)
            )
        };
        let nodes: String = NODES.iter().enumerate().map(node).collect();
        format!(
            "ClusterName=loquat-test\nSlurmctldHost={host}({controller})\nSlurmctldPort={}\nSlurmUser=root\n\
             AuthType=auth/munge\nAuthInfo=socket={dir}/munge/socket\nCredType=cred/munge\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n\
             AccountingStorageType=accounting_storage/none\nMpiDefault=none\nReturnToService=2\nSlurmdTimeout=5\n\
             KillWait=2\nMinJobAge=300\nSchedulerParameters=batch_sched_delay=1,sched_interval=2\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_Core_Memory\nDefMemPerCPU=100\nStateSaveLocation={dir}/state\n\
             SlurmdSpoolDir={dir}/spool/%n\nSlurmctldPidFile={dir}/ctld.pid\nSlurmdPidFile={dir}/slurmd.%n.pid\n\
             SlurmctldLogFile={dir}/log/ctld\nSlurmdLogFile={dir}/log/%n\nSlurmdParameters=config_overrides\n\
             TmpFS={dir}/tmp\n{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n",
            port(0)
        )
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // Jobs first, while somebody is there to end them.
        drop(Command::new("scancel").args(["-u", "root"]).env("SLURM_CONF", self.conf()).status());
        std::thread::sleep(Duration::from_millis(500));
        for mut process in self.processes.drain(..).rev() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

fn sh(line: &str) {
    assert!(Command::new("/bin/sh").args(["-c", line]).status().unwrap().success(), "{line}");
}
