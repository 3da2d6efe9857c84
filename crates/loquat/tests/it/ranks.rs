//! One run on several processes that a real `mpirun` starts, on one machine and on three that are network namespaces:
//! the same bytes as on one rank, whatever happens to ranks and links on the way.

#[cfg(feature = "long")]
mod bad_links;
mod bad_ranks;
mod diloco;
mod divided;
mod lost;
mod pipelines;
mod pods;
#[cfg(feature = "long")]
mod slurm;
mod teams;

#[cfg(feature = "long")]
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{PATIENCE, loquat, root, speeches, succeed, wait_exit};

const SHAPE: &str = "--json --rows 1 --micro-batches 8 --context 32 --checkpoint-every 5";

/// Of 107 thousand parameters: several shards.
const CONFIG: &str = r#"{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "max_position_embeddings": 32}"#;

/// The directory of the `mpirun` that `./test` installs, or of the system's.
fn mpi() -> Option<PathBuf> {
    let own = root().join("var/venv-mpi/bin");
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::iter::once(own).chain(std::env::split_paths(&dirs)).find(|dir| dir.join("mpirun").exists());
    if found.is_none() {
        eprintln!("SKIPPED: there is no mpirun (./test installs one)");
    }
    found
}

fn path_with(dir: &Path) -> String {
    format!("{}:{}", dir.display(), std::env::var("PATH").unwrap_or_default())
}

struct Runs {
    home: tempfile::TempDir,
    mpi: PathBuf,
}

impl Runs {
    /// A home with a dataset; `None`, and said so, where there is no MPI.
    fn prepared() -> Option<Runs> {
        let runs = Runs { mpi: mpi()?, home: tempfile::tempdir().unwrap() };
        std::fs::write(runs.home.path().join("config.json"), CONFIG).unwrap();
        let text = speeches();
        let words =
            ["ingest", "--name", "d", "--vocab", "512", "--validation", "0.2", text.to_str().unwrap()];
        succeed(runs.home.path(), &words);
        Some(runs)
    }

    fn words(&self, run: &str, steps: u64, extra: &str) -> Vec<String> {
        let config = self.home.path().join("config.json");
        let words = format!(
            "train --dataset d --run {run} --publish {run} --steps {steps} {SHAPE} --config {} {extra}",
            config.display()
        );
        words.split_whitespace().map(str::to_owned).collect()
    }

    fn command(&self, words: Vec<String>) -> Command {
        let mut command = loquat(self.home.path());
        command.args(words).env("PATH", path_with(&self.mpi));
        command
    }

    /// Output of both kinds, and the exit code.
    fn run(&self, run: &str, steps: u64, extra: &str) -> (String, Option<i32>) {
        let output = self.command(self.words(run, steps, extra)).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8_lossy(&text).into_owned(), output.status.code())
    }

    fn must_run(&self, run: &str, steps: u64, extra: &str) -> String {
        let (text, code) = self.run(run, steps, extra);
        assert_eq!(code, Some(0), "{run}: {text}");
        text
    }

    fn weights(&self, model: &str) -> Vec<u8> {
        let dir = self.home.path().join("store/models").join(model);
        let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let file = files.into_iter().find(|path| path.to_string_lossy().ends_with("model.safetensors"));
        std::fs::read(file.expect("no weights were published")).unwrap()
    }

    /// Starts a supervised run and waits until it has a checkpoint.
    fn begin(&self, mut command: Command, run: &str) -> Begun {
        let told = self.home.path().join(format!("{run}.out"));
        let file = std::fs::File::create(&told).unwrap();
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        let begun = Begun { child, told };
        let checkpoints = self.home.path().join("store/runs").join(run).join("checkpoints");
        let is_there =
            |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().path().join("manifest.json").exists();
        begun.wait_until(|| std::fs::read_dir(&checkpoints).is_ok_and(|mut dir| dir.any(is_there)));
        begun
    }

    /// Starts a supervised run that has a checkpoint and most of its steps before it, and says of how many steps and
    /// under what name: of more and more, since a checkpoint takes seconds and a quick machine's step a few milliseconds.
    fn begin_midway(&self, run: &str, command: impl Fn(&str, u64) -> Command) -> (Begun, u64, String) {
        for steps in [1200, 4800, 19_200] {
            let name = format!("{run}-{steps}");
            let begun = self.begin(command(&name, steps), &name);
            let n_done = begun.text().matches("\"event\":\"step\"").count() as u64;
            if 4 * n_done < steps {
                return (begun, steps, name);
            }
            begun.end();
        }
        panic!("a quarter of 19,200 steps is over before a checkpoint is there");
    }

    /// Processes that are a rank of the run, not what started them.
    fn ranks(&self, run: &str) -> Vec<u32> {
        let entries = std::fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let is_rank = |pid: &u32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
            let has = |word: &str| words.contains(&word.as_bytes());
            words[0] == env!("CARGO_BIN_EXE_loquat").as_bytes()
                && has(run)
                && has("train")
                && !has("--launch")
        };
        pids.filter(is_rank).collect()
    }
}

/// A supervised run that goes on.
struct Begun {
    child: Child,
    told: PathBuf,
}

impl Begun {
    fn text(&self) -> String {
        std::fs::read_to_string(&self.told).unwrap_or_default()
    }

    fn wait_until(&self, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "it does not come: {}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How long it takes until ranks have begun for the second time.
    fn recovery(&self) -> Duration {
        let start = Instant::now();
        self.wait_until(|| self.text().matches("\"event\":\"started\"").count() >= 2);
        start.elapsed()
    }

    fn end(mut self) -> String {
        assert_eq!(wait_exit(&mut self.child), Some(0), "{}", self.text());
        self.text()
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        // A test that failed must leave nothing behind. The supervisor's end is the end of what it started.
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
            std::thread::sleep(Duration::from_secs(3));
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[test]
fn processes_train_the_same_bytes_as_one() {
    let Some(runs) = Runs::prepared() else { return };
    runs.must_run("one", 8, "");
    let told = runs.must_run("four", 8, "--launch mpi --ranks 4");
    assert_eq!(told.matches("\"event\":\"finished\"").count(), 1, "rank 0 tells for all: {told}");
    assert!(told.contains("\"slowest\":"), "{told}");
    assert!(runs.weights("four") == runs.weights("one"), "4 processes");
    for (n_ranks, stage) in [(2, 1), (3, 0), (4, 2), (2, 3), (3, 3), (8, 3)] {
        let run = format!("divided-{n_ranks}-{stage}");
        let told = runs.must_run(&run, 8, &format!("--launch mpi --ranks {n_ranks} --zero {stage}"));
        assert!(told.contains("\"travel_seconds\":"), "{told}");
        assert!(runs.weights(&run) == runs.weights("one"), "{n_ranks} processes, --zero {stage}");
    }
}

#[test]
fn ranks_that_differ_are_refused_on_every_rank() {
    let Some(runs) = Runs::prepared() else { return };
    let mpirun = |parts: [Vec<String>; 2]| {
        let mut command = Command::new(runs.mpi.join("mpirun"));
        command.args(["--oversubscribe", "--bind-to", "none"]);
        for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
            command.env(name, "1");
        }
        for (i, part) in parts.into_iter().enumerate() {
            command.args((i > 0).then_some(":")).args(["-n", "1"]).args(part);
        }
        let output = command.env("PATH", path_with(&runs.mpi)).output().unwrap();
        (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
    };
    let rank = |lr: &str, first: &[&str]| -> Vec<String> {
        let program = [env!("CARGO_BIN_EXE_loquat"), "--home", runs.home.path().to_str().unwrap()];
        let words = runs.words("differ", 3, &format!("--lr {lr}"));
        first.iter().chain(&program).map(|word| (*word).to_owned()).chain(words).collect()
    };
    let (told, code) = mpirun([rank("1e-3", &[]), rank("2e-3", &[])]);
    assert_eq!(code, Some(78), "{told}");
    assert_eq!(told.matches("error: the ranks do not belong together: arguments").count(), 2, "{told}");
    assert!(told.contains("--lr 1e-3") && told.contains("--lr 2e-3"), "{told}");

    let twice = ["env", "OMPI_COMM_WORLD_RANK=1"];
    let (told, code) = mpirun([rank("1e-3", &twice), rank("1e-3", &[])]);
    assert_eq!(code, Some(78), "{told}");
    assert_eq!(told.matches("the launcher gave the number 1 to rank 0").count(), 2, "{told}");
    assert!(!runs.home.path().join("store/models").exists(), "nothing was trained");
}

#[test]
fn a_killed_rank_costs_the_steps_since_the_last_checkpoint() {
    let Some(runs) = Runs::prepared() else { return };
    let extra = "--launch mpi --ranks 4 --rank-limit 30 --on-loss start-again";
    let command = |run: &str, steps| runs.command(runs.words(run, steps, extra));
    let (begun, steps, run) = runs.begin_midway("killed", command);
    let ranks = runs.ranks(&run);
    assert_eq!(ranks.len(), 4, "{}", begun.text());
    let random = Instant::now().elapsed().subsec_nanos() as usize + std::process::id() as usize;
    let victim = ranks[random % 4].to_string();
    assert!(Command::new("kill").args(["-KILL", &victim]).status().unwrap().success());
    let recovery = begun.recovery();
    let told = begun.end();
    assert!(recovery < Duration::from_secs(30), "{recovery:?}: {told}");
    assert!(told.contains("3 restarts left") && told.contains("\"after\":"), "{told}");
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}

#[test]
fn a_rank_that_hangs_is_named_and_replaced() {
    let Some(runs) = Runs::prepared() else { return };
    let command =
        |run: &str, steps| runs.command(runs.words(run, steps, "--launch mpi --ranks 2 --rank-limit 3"));
    let (begun, steps, run) = runs.begin_midway("hung", command);
    let victim = runs.ranks(&run)[1].to_string();
    assert!(Command::new("kill").args(["-STOP", &victim]).status().unwrap().success());
    let recovery = begun.recovery();
    let told = begun.end();
    assert!(recovery < Duration::from_secs(30), "{recovery:?}: {told}");
    for word in
        ["waited 3 s in", "missing: [", "what every rank was doing:", &format!("process {victim}: step ")]
    {
        assert!(told.contains(word), "no '{word}': {told}");
    }
    runs.must_run("whole", steps, "");
    assert!(runs.weights(&run) == runs.weights("whole"), "{told}");
}

/// Three machines: network namespaces on one switch, which nothing else is tied to unless it is asked for.
pub(crate) struct Hosts {
    name: String,
    /// A program that stands for the switch.
    switch: Option<Child>,
}

impl Hosts {
    /// `None`, and said so, where this user may make none.
    pub(crate) fn up(name: &str) -> Option<Hosts> {
        let hosts = Hosts { name: format!("lq{}{name}", std::process::id()), switch: None };
        let sw = format!("{}s", hosts.name);
        let made = ip(&["netns", "add", &sw])
            && ip(&["-n", &sw, "link", "add", "br0", "type", "bridge"])
            && ip(&["-n", &sw, "link", "set", "br0", "up"])
            && (1..=3).all(|i| hosts.add(&sw, i));
        if !made {
            eprintln!("SKIPPED: network namespaces cannot be made here (they need root and iproute2)");
            return None;
        }
        Some(hosts)
    }

    /// On a switch that holds each frame for so many milliseconds and loses so many of a hundred.
    #[cfg(feature = "long")]
    fn up_behind_slow_switch(name: &str, [delay_ms, loss_percent]: [u32; 2]) -> Option<Hosts> {
        let mut hosts = Hosts { name: format!("lq{}{name}", std::process::id()), switch: None };
        let names: Vec<String> = (1..=3).map(|i| format!("{}{i}", hosts.name)).collect();
        let mut command = Command::new("python3");
        command
            .arg(root().join("tests/slow_switch.py"))
            .args([delay_ms, loss_percent].map(|n| n.to_string()));
        command.args(&names).stdout(Stdio::piped());
        let mut is_up = names.iter().all(|name| ip(&["netns", "add", name]));
        if is_up && let Ok(mut switch) = command.spawn() {
            let mut word = [0; 2];
            is_up = switch
                .stdout
                .take()
                .is_some_and(|mut out| out.read_exact(&mut word).is_ok() && word == *b"up");
            hosts.switch = Some(switch);
        }
        let set_up = |(i, host): (usize, &String)| {
            ip(&["-n", host, "link", "set", "lo", "up"])
                && ip(&["-n", host, "addr", "add", &format!("198.18.7.{}/24", i + 1), "dev", "eth0"])
                && ip(&["-n", host, "link", "set", "eth0", "up"])
        };
        if !(is_up && names.iter().enumerate().all(set_up)) {
            eprintln!(
                "SKIPPED: no switch can be made here (it needs root, iproute2, python3 and /dev/net/tun)"
            );
            return None;
        }
        Some(hosts)
    }

    fn add(&self, sw: &str, i: usize) -> bool {
        let (host, port, address) =
            (format!("{}{i}", self.name), format!("p{i}"), format!("{}/24", address(i)));
        ip(&["netns", "add", &host])
            && ip(&["-n", &host, "link", "set", "lo", "up"])
            && ip(&[
                "link", "add", "eth0", "netns", &host, "type", "veth", "peer", "name", &port, "netns", sw,
            ])
            && ip(&["-n", sw, "link", "set", &port, "master", "br0"])
            && ip(&["-n", sw, "link", "set", &port, "up"])
            && ip(&["-n", &host, "addr", "add", &address, "dev", "eth0"])
            && ip(&["-n", &host, "link", "set", "eth0", "up"])
    }

    /// Ties this machine to the switch, as a fourth host; returns its address there.
    pub(crate) fn tie_here(&self) -> &'static str {
        let (sw, own, address) = (format!("{}s", self.name), format!("{}h", self.name), "198.18.7.254");
        let is_tied = ip(&["link", "add", &own, "type", "veth", "peer", "name", "p0", "netns", &sw])
            && ip(&["-n", &sw, "link", "set", "p0", "master", "br0"])
            && ip(&["-n", &sw, "link", "set", "p0", "up"])
            && ip(&["addr", "add", &format!("{address}/24"), "dev", &own])
            && ip(&["link", "set", &own, "up"]);
        assert!(is_tied, "a namespace can be made, but this machine not be tied to it");
        address
    }

    pub(crate) fn set_link(&self, i: usize, state: &str) {
        assert!(ip(&["-n", &format!("{}s", self.name), "link", "set", &format!("p{i}"), state]));
    }

    /// The words before a command that let it run on a host, which calls itself by its address there.
    pub(crate) fn enter(&self, i: usize) -> Vec<String> {
        let (net, name) = (format!("--net=/run/netns/{}{i}", self.name), format!("hostname {}", address(i)));
        ["nsenter", &net, "unshare", "--uts", "sh", "-c", &format!("{name}; exec \"$@\""), "sh"]
            .map(str::to_owned)
            .into()
    }

    /// What comes to each host comes at this rate.
    #[cfg(feature = "long")]
    fn slow_down(&self, rate: &str) {
        for i in 1..=3 {
            let (host, port) = (format!("{}s", self.name), format!("p{i}"));
            let slow = ["rate", rate, "burst", "64kb", "latency", "100ms"];
            let words =
                [&["netns", "exec", &host, "tc", "qdisc", "add", "dev", &port, "root", "tbf"][..], &slow]
                    .concat();
            assert!(ip(&words), "links cannot be shaped");
        }
    }

    /// What stands for ssh: a host whose link is down does not answer.
    fn shell(&self, runs: &Runs) -> PathBuf {
        let file = runs.home.path().join("shell");
        let text = format!(
            "#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nhost={}${{1##*.}}; shift\n\
             ip -n $host link show eth0 | grep -q LOWER_UP || exit 255\n\
             exec nsenter --net=/run/netns/$host unshare --uts bash -c \"hostname $host; export PATH={}; $*\"\n",
            self.name,
            path_with(&runs.mpi)
        );
        std::fs::write(&file, text).unwrap();
        assert!(Command::new("chmod").arg("+x").arg(&file).status().unwrap().success());
        file
    }

    /// A supervisor on the first host, ranks on all.
    fn command(&self, runs: &Runs, run: &str, steps: u64, extra: &str) -> Command {
        let shell = self.shell(runs);
        let hosts = "198.18.7.1,198.18.7.2,198.18.7.3";
        let extra = format!("--launch mpi --hosts {hosts} --remote-shell {} {extra}", shell.display());
        let mut words = runs.words(run, steps, &extra);
        for option in [
            "--mca btl tcp,self",
            "--mca btl_tcp_if_include 198.18.7.0/24",
            "--prtemca prte_if_include 198.18.7.0/24",
        ] {
            words.extend(["--mpirun-option".to_owned(), option.to_owned()]);
        }
        let host = format!("{}1", self.name);
        let mut command = Command::new("nsenter");
        command.args([&format!("--net=/run/netns/{host}"), "unshare", "--uts", "sh", "-c"]);
        command.arg(format!("hostname {host}; exec \"$@\"")).arg("sh").arg(env!("CARGO_BIN_EXE_loquat"));
        command.arg("--home").arg(runs.home.path()).args(words).env("PATH", path_with(&runs.mpi));
        command.stdin(Stdio::null());
        command
    }
}

/// Of a host.
pub(crate) fn address(i: usize) -> String {
    format!("198.18.7.{i}")
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if let Some(switch) = &mut self.switch {
            let _ = switch.kill();
            let _ = switch.wait();
        }
        for end in ["1", "2", "3", "s"] {
            let host = format!("{}{end}", self.name);
            let inside = Command::new("ip").args(["netns", "pids", &host]).output().map(|o| o.stdout);
            for pid in String::from_utf8_lossy(&inside.unwrap_or_default()).split_whitespace() {
                let _ = Command::new("kill").args(["-KILL", pid]).status();
            }
            ip(&["netns", "del", &host]);
        }
    }
}

fn ip(words: &[&str]) -> bool {
    Command::new("ip").args(words).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn a_cut_link_is_explained_and_the_run_goes_on_without_that_host() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("a")) else { return };
    let steps = 200;
    runs.must_run("whole", steps, "");
    let status = hosts.command(&runs, "calm", steps, "--ranks 4").stdout(Stdio::null()).status().unwrap();
    assert!(
        status.success() && runs.weights("calm") == runs.weights("whole"),
        "4 ranks on 3 hosts: {status}"
    );

    let command = |run: &str, steps| hosts.command(&runs, run, steps, "--ranks 4 --rank-limit 3");
    let (begun, steps, run) = runs.begin_midway("cut", command);
    hosts.set_link(2, "down");
    let recovery = begun.recovery();
    hosts.set_link(2, "up");
    let told = begun.end();
    assert!(recovery < Duration::from_secs(30), "{recovery:?}: {told}");
    for word in ["waited 3 s in", "what every rank was doing:", "198.18.7.2 does not answer", "waiting for ["]
    {
        assert!(told.contains(word), "no '{word}': {told}");
    }
    runs.must_run("undisturbed", steps, "");
    assert!(runs.weights(&run) == runs.weights("undisturbed"), "{told}");
}

/// `./test --long`: 8 ranks with divided state on three hosts whose links are slow, two of which lose ranks on the way.
#[cfg(feature = "long")]
#[test]
fn eight_ranks_on_slow_links_that_lose_two_of_them() {
    let (Some(runs), Some(hosts)) = (Runs::prepared(), Hosts::up("b")) else { return };
    hosts.slow_down("50mbit");
    let steps = 60;
    runs.must_run("whole", steps, "");
    let begun = runs.begin(hosts.command(&runs, "slow", steps, "--ranks 8 --zero 1 --rank-limit 20"), "slow");
    for n_lives in 2..=3 {
        let victim = runs.ranks("slow")[n_lives].to_string();
        assert!(Command::new("kill").args(["-KILL", &victim]).status().unwrap().success());
        begun.wait_until(|| begun.text().matches("\"event\":\"started\"").count() >= n_lives);
    }
    let told = begun.end();
    assert!(runs.weights("slow") == runs.weights("whole"), "{told}");
}
