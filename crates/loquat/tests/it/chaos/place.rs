//! The cluster that is disturbed: who is in it, how each part breaks and how it is mended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{Control, Job, JobId};
use serde_json::json;
use store::{Bundle, Store};

use super::weed::Weed;
use crate::postgres::Postgres;
use crate::ranks::{Hosts, address};
use crate::slurm::{Host, Site, Slurm};
use crate::support::{Client, PATIENCE, Running, loquat, speeches};
use crate::tiny;

const CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 64}"#;
const SHAPE: &str = "--json --rows 2 --micro-batches 8 --context 64 --ranks 2 --threads 1";
const SERVE: [&str; 6] = ["--threads", "1", "--kv-mib", "8", "--max-num-seqs", "4"];
const N_REPLICAS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    /// The process that trains.
    Rank,
    /// The gateway that looks after replicas and promotions.
    Leader,
    /// The other one.
    Gateway,
    Replica,
    Database,
    /// A node of the object store.
    Storage,
    /// The daemon of a node of Slurm.
    Node,
    /// A machine with all that runs on it: nothing gets in or out for half a minute.
    Host,
}

impl Fault {
    /// How long it is before somebody mends it; `None` for what comes back by itself.
    fn lasts(self) -> Option<Duration> {
        match self {
            Fault::Rank | Fault::Replica => None,
            // A node is back before Slurm takes it for dead: its jobs live on meanwhile.
            Fault::Leader | Fault::Gateway | Fault::Database | Fault::Node => Some(Duration::from_secs(2)),
            Fault::Storage => Some(Duration::from_secs(4)),
            // Slurm takes the host for dead long before it is back.
            Fault::Host => Some(Duration::from_secs(30)),
        }
    }
}

pub(super) struct Place {
    directory: tempfile::TempDir,
    database: Postgres,
    url: String,
    weed: Option<Weed>,
    slurm: Option<Slurm>,
    /// Where Slurm's nodes are. (Dropped after what runs on them.)
    hosts: Option<Hosts>,
    /// Of each run, and those after which it writes a checkpoint.
    steps: (u64, u64),
    control: Control,
    gateways: Vec<Gateway>,
    /// What is to be started again, and when.
    broken: Vec<(Instant, Fault, usize)>,
    n_broken: usize,
    ended: bool,
}

struct Gateway {
    port: u16,
    running: Option<Running>,
    client: Client,
}

pub(super) fn run_name(n: usize) -> String {
    format!("chaos-{n}")
}

impl Place {
    /// `None`, said loudly, where there is no PostgreSQL. Each run has so many steps, and a checkpoint after so many.
    pub(super) fn start(on_slurm: bool, steps: (u64, u64)) -> Option<Place> {
        let hosts = if on_slurm { Hosts::up("k") } else { None };
        let here = hosts.as_ref().map_or("127.0.0.1", Hosts::tie_here);
        let database = Postgres::start_at(here)?;
        let url = database.new_database();
        let directory = tempfile::tempdir().unwrap();
        let slurm = if on_slurm { Slurm::start(site(here, hosts.as_ref())) } else { None };
        let control = Control::connect(&url).unwrap();
        let weed = Weed::start(here);
        let (gateways, broken, n_broken, ended) = (Vec::new(), Vec::new(), 0, false);
        let mut place = Place {
            directory,
            database,
            url,
            weed,
            slurm,
            hosts,
            steps,
            control,
            gateways,
            broken,
            n_broken,
            ended,
        };
        place.ingest();
        for i in 0..2 {
            let [port] = super::weed::free_ports();
            let mut running = Running::start(&mut place.up(i, port));
            let client = running.client();
            place.gateways.push(Gateway { port, running: Some(running), client });
        }
        place.deploy();
        Some(place)
    }

    fn home(&self, i: usize) -> PathBuf {
        self.directory.path().join(format!("home{i}"))
    }

    fn store_url(&self) -> String {
        match &self.weed {
            Some(_) => Weed::URL.to_owned(),
            None => self.directory.path().join("store").display().to_string(),
        }
    }

    /// `loquat` as a part of this cluster.
    fn loquat(&self, i: usize) -> Command {
        let mut command = loquat(&self.home(i));
        command.args(["--store", &self.store_url(), "--database", &self.url]);
        command.envs(self.weed.iter().flat_map(Weed::variables));
        command
    }

    fn succeed(&self, args: &[&str]) {
        let output = self.loquat(0).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn up(&self, i: usize, port: u16) -> Command {
        let mut command = self.loquat(i);
        command.args(["up", "--kv-mib", "8", "--port", &port.to_string()]).env("LOQUAT_LOG", "error");
        if let Some(slurm) = &self.slurm {
            command.args(["--launcher", "slurm"]).env("SLURM_CONF", slurm.conf());
        }
        command
    }

    fn ingest(&self) {
        std::fs::write(self.directory.path().join("config.json"), CONFIG).unwrap();
        let text = speeches();
        let text = text.to_str().unwrap();
        self.succeed(&["ingest", "--name", "d", "--vocab", "512", "--validation", "0.2", text]);
    }

    fn deploy(&self) {
        let model = tiny::directory(self.directory.path(), "served").display().to_string();
        let n = N_REPLICAS.to_string();
        let set = ["deploy", "set", "m", "--source", &model, "--replicas", &n];
        // Where gateways are on another host than replicas, these are found by their host's name.
        let listen = ["--", "--host", if self.hosts.is_some() { "0.0.0.0" } else { "127.0.0.1" }];
        self.succeed(&[&set[..], &listen, &SERVE].concat());
        let deadline = Instant::now() + PATIENCE;
        for gateway in &self.gateways {
            let is_well = || {
                let listed = gateway.client.get_json("/v1/replicas");
                listed["data"].as_array().unwrap().iter().filter(|replica| replica["state"] == "well").count()
                    == N_REPLICAS
            };
            while !is_well() {
                assert!(Instant::now() < deadline, "two replicas do not come: {}", self.state());
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    pub(super) fn clients(&self) -> Vec<Client> {
        self.gateways.iter().map(|gateway| gateway.client.clone()).collect()
    }

    /// Jobs as they are, for a failure's message.
    pub(super) fn state(&self) -> String {
        format!("{:#?}", self.control.list_jobs(10))
    }

    /// Asks for a run of this number: always the same plan.
    pub(super) fn submit(&self, n: usize) -> JobId {
        self.submit_run(&run_name(n))
    }

    fn submit_run(&self, run: &str) -> JobId {
        let (home, config) = (self.home(0), self.directory.path().join("config.json"));
        let (steps, every) = self.steps;
        let own = format!(
            "train --dataset d --run {run} --publish {run} --steps {steps} --checkpoint-every {every} {SHAPE} --config"
        );
        let mut args =
            vec!["--home".to_owned(), home.display().to_string(), "--store".to_owned(), self.store_url()];
        args.extend(own.split(' ').map(str::to_owned).chain([config.display().to_string()]));
        let spec = json!({"name": format!("train/{run}"), "args": args, "max_restarts": 1000});
        self.control.submit(&serde_json::from_value(spec).unwrap()).unwrap().job.id
    }

    /// A run from its submission to its end.
    pub(super) fn train(&self, run: &str) -> Duration {
        let started = Instant::now();
        let id = self.submit_run(run);
        while !self.is_over(id) {
            assert!(started.elapsed() < PATIENCE, "{}", self.state());
            std::thread::sleep(Duration::from_millis(50));
        }
        started.elapsed()
    }

    pub(super) fn job(&self, id: JobId) -> Job {
        self.control.get_job(id).unwrap().expect("what was acknowledged is there")
    }

    /// Not while the database is away.
    pub(super) fn is_over(&self, id: JobId) -> bool {
        self.control.get_job(id).is_ok_and(|job| job.is_some_and(|job| job.state.is_over()))
    }

    pub(super) fn store(&self) -> Arc<dyn Store> {
        match &self.weed {
            Some(weed) => weed.open(),
            None => store::open(&self.store_url()).unwrap(),
        }
    }

    pub(super) fn database(&self) -> &str {
        &self.url
    }

    pub(super) fn weights(&self, run: &str) -> Vec<u8> {
        let store = self.store();
        let bundle = Bundle::open(&store, &format!("models/{run}")).unwrap().expect("no model was published");
        bundle.read("model.safetensors").unwrap()
    }

    /// What can break here.
    pub(super) fn faults(&self) -> Vec<Fault> {
        use Fault::{Database, Gateway, Host, Leader, Node, Rank, Replica, Storage};
        let mut all = vec![Rank, Leader, Gateway, Replica, Database];
        all.extend(self.weed.as_ref().map(|_| Storage));
        all.extend(self.slurm.as_ref().map(|_| Node));
        all.extend(self.slurm.as_ref().and(self.hosts.as_ref()).map(|_| Host));
        all
    }

    /// Kills a part with signal 9; what does not come back by itself is started again by [`Place::mend`].
    pub(super) fn break_down(&mut self, fault: Fault) {
        let n = self.n_broken;
        self.n_broken += 1;
        let leader = self.leader();
        let which = match fault {
            Fault::Leader => leader,
            Fault::Gateway => 1 - leader,
            _ => n % 3,
        };
        self.broken.extend(fault.lasts().map(|lasts| (Instant::now() + lasts, fault, which)));
        match fault {
            Fault::Rank => kill_one(self.processes("--run"), n),
            Fault::Replica => kill_one(self.processes("--replica"), n),
            Fault::Leader | Fault::Gateway => {
                if let Some(mut running) = self.gateways[which].running.take() {
                    running.child.kill().unwrap();
                    running.child.wait().unwrap();
                }
            }
            Fault::Database => self.database.kill_9(),
            Fault::Storage => self.weed.as_mut().unwrap().kill_volume(which),
            Fault::Node => kill_one(self.slurmd(which), 0),
            Fault::Host => self.hosts.as_ref().unwrap().set_link(which + 1, "down"),
        }
    }

    /// Starts again what is due.
    pub(super) fn mend(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.broken).into_iter().partition(|(at, ..)| *at <= now);
        self.broken = later;
        let due: Vec<(Instant, Fault, usize)> = due;
        for (_, fault, which) in due {
            self.start_again(fault, which);
        }
    }

    pub(super) fn mend_all(&mut self) {
        for (_, fault, which) in std::mem::take(&mut self.broken) {
            self.start_again(fault, which);
        }
    }

    fn start_again(&mut self, fault: Fault, which: usize) {
        match fault {
            Fault::Leader | Fault::Gateway if self.gateways[which].running.is_none() => {
                let running = Running::start(&mut self.up(which, self.gateways[which].port));
                self.gateways[which].running = Some(running);
            }
            Fault::Database => self.database.resume(),
            Fault::Storage => self.weed.as_mut().unwrap().start_volume(which),
            Fault::Node => self.slurm.as_mut().unwrap().start_node(which),
            Fault::Host => self.hosts.as_ref().unwrap().set_link(which + 1, "up"),
            _ => {}
        }
    }

    /// The gateway that holds the deployer's lease, as far as anybody can say.
    fn leader(&self) -> usize {
        let holder = self.control.lease_holder("deployer").ok().flatten().map(|info| info.holder);
        let is_it = |gateway: &Gateway| {
            let pid = gateway.running.as_ref().map(|running| format!("pid {}", running.child.id()));
            pid.is_some() && pid == holder
        };
        self.gateways.iter().position(is_it).unwrap_or(0)
    }

    /// What the jobs said last, for whoever looks why a test failed.
    fn tell_logs(&self) {
        for i in 0..2 {
            for entry in std::fs::read_dir(self.home(i).join("jobs")).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> =
                    text.lines().filter(|line| !line.starts_with("{\"event\":\"step\"")).collect();
                println!(
                    "{}:\n{}",
                    entry.path().display(),
                    lines[lines.len().saturating_sub(15)..].join("\n")
                );
            }
        }
    }

    /// Jobs of this cluster whose command line has this word.
    fn processes(&self, word: &str) -> Vec<u32> {
        let own = self.directory.path();
        let is_it = |words: &[String]| {
            !words[0].ends_with("sh")
                && words.iter().any(|found| found == word)
                && words.iter().any(|found| Path::new(found).starts_with(own))
        };
        command_lines().into_iter().filter(|(_, words)| is_it(words)).map(|(pid, _)| pid).collect()
    }

    /// The daemon of a node of this Slurm: others may run on this machine, too.
    fn slurmd(&self, i: usize) -> Vec<u32> {
        let (name, conf) = (format!("n{}", i + 1), self.slurm.as_ref().unwrap().conf());
        let variable = format!("SLURM_CONF={}", conf.display());
        let is_ours = |pid: &u32| {
            let all = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            all.split(|byte| *byte == 0).any(|one| one == variable.as_bytes())
        };
        let is_it = |words: &[String]| words[0].ends_with("slurmd") && words.last() == Some(&name);
        let found = command_lines().into_iter().filter(|(_, words)| is_it(words)).map(|(pid, _)| pid);
        found.filter(is_ours).collect()
    }

    /// Nothing runs twice, and nothing runs that is not asked for.
    pub(super) fn check_orphans(&self) {
        for (word, max) in [("--run", 1), ("--replica", N_REPLICAS)] {
            let found = self.processes(word);
            assert!(found.len() <= max, "{} processes with {word}: {}", found.len(), self.state());
        }
    }

    /// Everything ends in order, and nothing is left: no process, no lease, no job of Slurm's.
    pub(super) fn end(mut self) {
        self.succeed(&["deploy", "remove", "m"]);
        let deadline = Instant::now() + PATIENCE;
        while !self.processes("--replica").is_empty() {
            assert!(Instant::now() < deadline, "replicas are left: {}", self.state());
            std::thread::sleep(Duration::from_millis(100));
        }
        for gateway in &mut self.gateways {
            assert_eq!(gateway.running.take().unwrap().stop(), Some(0));
        }
        let own = self.directory.path().display().to_string();
        let left: Vec<_> = command_lines()
            .into_iter()
            .filter(|(_, words)| words.iter().any(|word| word.starts_with(&own)))
            .collect();
        assert!(left.is_empty(), "processes are left: {left:?}");
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        for lease in ["deployer", "reconciler", &format!("reconciler@{}", host.trim())] {
            assert_eq!(self.control.lease_holder(lease).unwrap(), None, "the lease {lease} is left");
        }
        if let Some(slurm) = &self.slurm {
            let queue = Command::new("squeue").arg("-h").env("SLURM_CONF", slurm.conf()).output().unwrap();
            assert!(queue.stdout.is_empty(), "jobs are left: {}", String::from_utf8_lossy(&queue.stdout));
        }
        self.ended = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.ended {
            self.tell_logs();
        }
        // A failed test must leave no job of its own behind either.
        self.gateways.clear();
        for word in ["--replica", "--run"] {
            self.processes(word).into_iter().for_each(kill_9);
        }
    }
}

/// Slurm's three nodes: each a host of its own with room for one job, so that no host has all replicas of the model.
fn site(here: &str, hosts: Option<&Hosts>) -> Site {
    let Some(hosts) = hosts else { return Site::loopback() };
    let node = |i| Host { address: address(i), enter: hosts.enter(i) };
    Site { controller: here.to_owned(), nodes: [1, 2, 3].map(node), cpus: 1 }
}

fn kill_one(pids: Vec<u32>, n: usize) {
    if let Some(pid) = pids.get(n % pids.len().max(1)) {
        kill_9(*pid);
    }
}

fn kill_9(pid: u32) {
    // It may just have ended by itself.
    assert!(pid > 1, "{pid} is everybody");
    let kill = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
    assert!(kill.is_ok(), "{kill:?}");
}

/// Every process that has words.
fn command_lines() -> BTreeMap<u32, Vec<String>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        let words: Vec<String> = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        if !words.is_empty() {
            found.insert(pid, words);
        }
    }
    found
}
