//! The pods of one job find each other by the store, and the first starts the ranks in all of them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use store::{ObjectName, Store};

use super::agent::{self, Agent, Place};
use crate::home::Home;
use crate::signals::Stop;

/// Pods start together but for images that are fetched first.
const GATHER_MAX: Duration = Duration::from_secs(900);
const GATHER_EVERY: Duration = Duration::from_millis(500);
/// A pod that is asked to stop waits so long for the first to save: less than Kubernetes gives it.
const LAST_WORDS: Duration = Duration::from_secs(100);
const TICK: Duration = Duration::from_millis(200);

/// One of several pods of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// Of this attempt of the job.
    id: String,
    index: usize,
    n_pods: usize,
    address: IpAddr,
}

/// Where ranks are started, and with what.
pub(crate) struct Machines {
    pub(crate) hosts: Vec<String>,
    /// A program and its words.
    pub(crate) remote_shell: String,
    pub(crate) n_ranks: usize,
}

impl Group {
    /// As the manifest and Kubernetes say it in the environment; `None` for a pod that is alone.
    pub(crate) fn of(variable: &dyn Fn(&str) -> Option<String>) -> Option<Group> {
        let number = |name: &str| variable(name)?.parse::<usize>().ok();
        let group = Group {
            id: variable("LOQUAT_POD_GROUP")?,
            index: number("JOB_COMPLETION_INDEX")?,
            n_pods: number("LOQUAT_PODS")?,
            address: variable("LOQUAT_ADDRESS")?.parse().ok()?,
        };
        (group.n_pods > 1 && group.index < group.n_pods).then_some(group)
    }

    pub(crate) fn n_pods(&self) -> usize {
        self.n_pods
    }

    /// Says where this pod is. The first then has `supervise` start ranks on all of them; the others do what it says until it
    /// is done. `run` is the run's name.
    pub(crate) fn run(
        &self,
        home: &Home,
        run: &str,
        supervise: impl FnOnce(&Machines) -> Result<u8>,
    ) -> Result<ExitCode> {
        let store = home.store()?;
        let prefix = format!("runs/{run}/pods/{}", self.id);
        let agent = Agent::start(self.address)?;
        let place = serde_json::to_vec(&agent.place)?;
        store.put(&name(&prefix, self.index)?, &place)?;
        if self.index > 0 {
            return serve(&agent).map(ExitCode::from);
        }
        let places = self.gather(&store, &prefix)?;
        let table = home.path().join(format!("pods-{}.json", self.id));
        write_private(&table, &serde_json::to_vec(&places)?)?;
        let machines = self.machines(home, &places, &table)?;
        let ended = supervise(&machines);
        let code = ended.as_ref().map_or(1, |code| *code);
        for place in places.values().filter(|place| place.address != agent.place.address) {
            if let Err(error) = agent::call(place, "end", code.to_string().as_bytes()) {
                eprintln!("a pod was not told of the end: {error:#}");
            }
        }
        for index in 0..self.n_pods {
            store.delete(&name(&prefix, index)?)?;
        }
        std::fs::remove_file(&table).with_context(|| format!("cannot remove {}", table.display()))?;
        ended.map(ExitCode::from)
    }

    /// Waits until every pod has said where it is.
    fn gather(&self, store: &Arc<dyn Store>, prefix: &str) -> Result<BTreeMap<String, Place>> {
        let (stop, deadline) = (Stop::on_signals()?, Instant::now() + GATHER_MAX);
        let mut places = BTreeMap::new();
        for index in 0..self.n_pods {
            let name = name(prefix, index)?;
            while store.head(&name)?.is_none() {
                if stop.is_set() || Instant::now() > deadline {
                    bail!("pod {index} of {} has not started", self.n_pods);
                }
                std::thread::sleep(GATHER_EVERY);
            }
            let place: Place = serde_json::from_slice(&store.get(&name)?)
                .with_context(|| format!("{name} does not say where a pod is"))?;
            places.insert(place.address.ip().to_string(), place);
        }
        if places.len() < self.n_pods {
            bail!("{} pods have {} addresses", self.n_pods, places.len());
        }
        Ok(places)
    }

    fn machines(&self, home: &Home, places: &BTreeMap<String, Place>, table: &Path) -> Result<Machines> {
        let words =
            [std::env::current_exe()?, "--home".into(), home.path().into(), "pod-shell".into(), table.into()];
        let words: Vec<String> = words.iter().map(|word: &PathBuf| word.display().to_string()).collect();
        if let Some(word) = words.iter().find(|word| word.contains(char::is_whitespace)) {
            bail!("mpirun would take {word:?} for several words; use a path without spaces");
        }
        let own = self.address.to_string();
        // The first pod first: rank 0 is where mpirun is.
        let others = places.keys().filter(|host| **host != own).cloned();
        let hosts = std::iter::once(own.clone()).chain(others).collect();
        Ok(Machines { hosts, remote_shell: words.join(" "), n_ranks: self.n_pods })
    }
}

fn name(prefix: &str, index: usize) -> Result<ObjectName> {
    Ok(ObjectName::parse(&format!("{prefix}/{index:05}.json"))?)
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, bytes));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Does what the first pod says until that has ended; returns what it ended with.
fn serve(agent: &Agent) -> Result<u8> {
    let stop = Stop::on_signals()?;
    let mut asked = None;
    loop {
        if let Some(code) = agent.ended(TICK) {
            return Ok(code);
        }
        // All pods are asked at once, and the first has ranks here that save.
        if stop.is_set() && asked.get_or_insert_with(Instant::now).elapsed() > LAST_WORDS {
            bail!("this pod was asked to stop, and the first pod of the job does not say that it has");
        }
    }
}

/// `loquat pod-shell`: what `mpirun` calls instead of ssh.
pub(crate) fn shell(table: &Path, host: &str, command: &[String]) -> Result<ExitCode> {
    let bytes = std::fs::read(table).with_context(|| format!("cannot read {}", table.display()))?;
    let places: BTreeMap<String, Place> = serde_json::from_slice(&bytes)?;
    let place = places.get(host).with_context(|| format!("{host} is no pod of this job"))?;
    Ok(ExitCode::from(agent::call(place, "run", command.join(" ").as_bytes())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_known_by_all_of_its_variables() {
        let of = |words: &[(&str, &str)]| {
            Group::of(&|name| {
                words.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            })
        };
        let all = [
            ("LOQUAT_POD_GROUP", "m"),
            ("JOB_COMPLETION_INDEX", "1"),
            ("LOQUAT_PODS", "2"),
            ("LOQUAT_ADDRESS", "10.0.0.7"),
        ];
        let group = of(&all).unwrap();
        assert_eq!((group.index, group.n_pods(), group.address.to_string().as_str()), (1, 2, "10.0.0.7"));
        for i in 0..all.len() {
            let mut some = all.to_vec();
            some.remove(i);
            assert_eq!(of(&some), None);
        }
        let mut alone = all;
        alone[2].1 = "1";
        assert_eq!(of(&alone), None);
    }
}
