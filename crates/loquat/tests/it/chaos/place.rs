//! The cluster that is disturbed: who is in it, how each part breaks and how it is mended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{Control, Job, JobId};
use serde_json::json;
use store::{Bundle, Store};

use super::weed::Weed;
use crate::postgres::Postgres;
use crate::support::{Client, PATIENCE, Running, loquat, speeches};
use crate::tiny;

const CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 64}"#;
const SHAPE: &str =
    "--json --steps 150 --checkpoint-every 10 --rows 2 --micro-batches 8 --context 64 --ranks 2 --threads 1";
const SERVE: [&str; 7] = ["--", "--threads", "1", "--kv-mib", "8", "--max-num-seqs", "4"];

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
    /// A node of Slurm.
    Node,
}

pub(super) struct Place {
    directory: tempfile::TempDir,
    database: Postgres,
    url: String,
    weed: Option<Weed>,
    slurm: Option<crate::slurm::Slurm>,
    slurmds: Vec<Child>,
    control: Control,
    gateways: Vec<Gateway>,
    /// What is to be started again, and when.
    broken: Vec<(Instant, Fault, usize)>,
    n_broken: usize,
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
    /// `None`, said loudly, where there is no PostgreSQL.
    pub(super) fn start(on_slurm: bool) -> Option<Place> {
        let database = Postgres::start()?;
        let url = database.new_database();
        let directory = tempfile::tempdir().unwrap();
        let slurm = if on_slurm { crate::slurm::Slurm::start() } else { None };
        let control = Control::connect(&url).unwrap();
        let weed = Weed::start();
        let (gateways, broken, slurmds) = (Vec::new(), Vec::new(), Vec::new());
        let mut place =
            Place { directory, database, url, weed, slurm, slurmds, control, gateways, broken, n_broken: 0 };
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
        let set = ["deploy", "set", "m", "--source", &model, "--replicas", "2"];
        self.succeed(&[&set[..], &SERVE].concat());
        let deadline = Instant::now() + PATIENCE;
        for gateway in &self.gateways {
            let is_well = || {
                let listed = gateway.client.get_json("/v1/replicas");
                listed["data"].as_array().unwrap().iter().filter(|replica| replica["state"] == "well").count()
                    == 2
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
        let own = format!("train --dataset d --run {run} --publish {run} {SHAPE} --config");
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

    pub(super) fn weights(&self, run: &str) -> Vec<u8> {
        let store: Arc<dyn Store> = match &self.weed {
            Some(weed) => weed.open(),
            None => store::open(&self.store_url()).unwrap(),
        };
        let bundle = Bundle::open(&store, &format!("models/{run}")).unwrap().expect("no model was published");
        bundle.read("model.safetensors").unwrap()
    }

    /// What can break here.
    pub(super) fn faults(&self) -> &'static [Fault] {
        use Fault::{Database, Gateway, Leader, Node, Rank, Replica, Storage};
        match (&self.weed, &self.slurm) {
            (Some(_), Some(_)) => &[Rank, Leader, Gateway, Replica, Database, Storage, Node],
            (Some(_), None) => &[Rank, Leader, Gateway, Replica, Database, Storage],
            (None, Some(_)) => &[Rank, Leader, Gateway, Replica, Database, Node],
            (None, None) => &[Rank, Leader, Gateway, Replica, Database],
        }
    }

    /// Kills a part with signal 9; what does not come back by itself is started again by [`Place::mend`].
    pub(super) fn break_down(&mut self, fault: Fault) {
        let n = self.n_broken;
        self.n_broken += 1;
        let leader = self.leader();
        let mut again = |after_ms, which| {
            self.broken.push((Instant::now() + Duration::from_millis(after_ms), fault, which));
        };
        match fault {
            Fault::Rank => kill_one(self.processes("--run"), n),
            Fault::Replica => kill_one(self.processes("--replica"), n),
            Fault::Leader | Fault::Gateway => {
                let which = if fault == Fault::Leader { leader } else { 1 - leader };
                again(2_000, which);
                if let Some(mut running) = self.gateways[which].running.take() {
                    running.child.kill().unwrap();
                    running.child.wait().unwrap();
                }
            }
            Fault::Database => {
                again(2_000, 0);
                self.database.kill_9();
            }
            Fault::Storage => {
                again(4_000, n % 3);
                self.weed.as_mut().unwrap().kill_volume(n % 3);
            }
            // Back before Slurm takes it for dead: its jobs live on meanwhile.
            Fault::Node => {
                again(2_000, n % 3);
                kill_one(slurmd(&node(n % 3)), 0);
            }
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
            Fault::Node => {
                let conf = self.slurm.as_ref().unwrap().conf();
                let mut command = Command::new("slurmd");
                command.args(["-D", "-N", &node(which)]).env("SLURM_CONF", conf);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                self.slurmds.push(command.spawn().unwrap());
            }
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

    /// Everything ends in order, and nothing is left: no process, no lease.
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
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A failed test must leave no job of its own behind either.
        self.gateways.clear();
        for word in ["--replica", "--run"] {
            self.processes(word).into_iter().for_each(kill_9);
        }
        for slurmd in &mut self.slurmds {
            drop(slurmd.kill());
            drop(slurmd.wait());
        }
    }
}

fn node(i: usize) -> String {
    format!("n{}", i + 1)
}

fn slurmd(node: &str) -> Vec<u32> {
    let is_it =
        |words: &[String]| words[0].ends_with("slurmd") && words.last().is_some_and(|last| last == node);
    command_lines().into_iter().filter(|(_, words)| is_it(words)).map(|(pid, _)| pid).collect()
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
