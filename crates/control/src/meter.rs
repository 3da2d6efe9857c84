//! What this machine and the jobs on it use, as `/proc` tells it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::job::JobId;
use crate::nodes::{JobLoad, NodeLoad};
use crate::process::MARK_VARIABLE;

/// A machine with less of its disk free starts nothing new: a checkpoint needs room.
const DISK_FREE_MIN: u64 = 256 << 20;

/// Measures between two looks.
#[derive(Debug)]
pub(crate) struct Meter {
    /// Where jobs write.
    disk: PathBuf,
    before: Option<Look>,
}

/// Counters since the machine started, in clock ticks.
#[derive(Debug)]
struct Look {
    machine: Ticks,
    /// By attempt's mark.
    jobs: HashMap<String, Used>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ticks {
    /// Of all cores together.
    all: u64,
    busy: u64,
    n_cores: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    ticks: u64,
    memory_bytes: u64,
}

impl Meter {
    pub(crate) fn new(disk: PathBuf) -> Meter {
        Meter { disk, before: None }
    }

    /// What is used now; cores, on the mean since the last call. `jobs` are those that run here, with their marks.
    pub(crate) fn look(&mut self, jobs: &[(JobId, String)]) -> io::Result<NodeLoad> {
        let now = Look {
            machine: parse_ticks(&fs::read_to_string("/proc/stat")?),
            jobs: if jobs.is_empty() { HashMap::new() } else { used_by_mark()? },
        };
        let nothing = Look { machine: now.machine, jobs: HashMap::new() };
        let before = self.before.replace(now);
        let (before, now) = (before.as_ref().unwrap_or(&nothing), self.before.as_ref().unwrap_or(&nothing));
        let all = now.machine.all.saturating_sub(before.machine.all).max(1) as f64;
        let cores = |ticks: u64| ticks as f64 / all * now.machine.n_cores as f64;
        let load_of = |(id, mark): &(JobId, String)| {
            let used = now.jobs.get(mark).copied().unwrap_or_default();
            // An attempt seen for the first time has used nothing between two looks.
            let earlier = before.jobs.get(mark).map_or(used.ticks, |earlier| earlier.ticks);
            JobLoad {
                id: id.0,
                cores: cores(used.ticks.saturating_sub(earlier)),
                memory_bytes: used.memory_bytes,
            }
        };
        let disk_free_bytes = free_bytes(&self.disk)?;
        let full = disk_free_bytes < DISK_FREE_MIN;
        Ok(NodeLoad {
            cores: cores(now.machine.busy.saturating_sub(before.machine.busy)),
            memory_bytes: parse_memory_used(&fs::read_to_string("/proc/meminfo")?),
            disk_free_bytes,
            problem: full.then(|| format!("the disk of {} is nearly full", self.disk.display())),
            jobs: jobs.iter().map(load_of).collect(),
        })
    }
}

/// What the disk of `path` holds in all.
pub fn disk_bytes(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(found.f_blocks.saturating_mul(found.f_frsize))
}

fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// The first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal; then one line for each core.
fn parse_ticks(text: &str) -> Ticks {
    let mut lines = text.lines();
    let numbers = |line: &str| -> Vec<u64> {
        line.split_ascii_whitespace().skip(1).take(8).map(|word| word.parse().unwrap_or(0)).collect()
    };
    let all = numbers(lines.next().unwrap_or_default());
    let idle: u64 = all.iter().skip(3).take(2).sum();
    let n_cores = lines.take_while(|line| line.starts_with("cpu")).count() as u64;
    let all = all.iter().sum();
    Ticks { all, busy: all - idle, n_cores }
}

fn parse_memory_used(text: &str) -> u64 {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0)
    };
    kib("MemTotal").saturating_sub(kib("MemAvailable")).saturating_mul(1024)
}

/// What the living processes of each attempt use together.
fn used_by_mark() -> io::Result<HashMap<String, Used>> {
    let mut found = HashMap::<String, Used>::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // Another user's process cannot be read and cannot be ours; one that just ended reads as nothing.
        let Ok(environ) = fs::read(path.join("environ")) else { continue };
        let Some(mark) = mark_in(&environ) else { continue };
        let Ok(stat) = fs::read_to_string(path.join("stat")) else { continue };
        if let Some(used) = parse_used(&stat) {
            let sum = found.entry(mark).or_default();
            sum.ticks += used.ticks;
            sum.memory_bytes += used.memory_bytes;
        }
    }
    Ok(found)
}

fn mark_in(environ: &[u8]) -> Option<String> {
    let variables = environ.split(|byte| *byte == 0).filter_map(|v| std::str::from_utf8(v).ok());
    let mut values = variables.filter_map(|v| v.strip_prefix(MARK_VARIABLE)?.strip_prefix('='));
    values.next().map(str::to_owned)
}

/// Fields 14 and 15 (ticks in user and system), 24 (resident pages) of `/proc/PID/stat`.
fn parse_used(text: &str) -> Option<Used> {
    let (_, after_name) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let page = rustix::param::page_size() as u64;
    Some(Used { ticks: number(14)? + number(15)?, memory_bytes: number(24)? * page })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read_as_it_is_written() {
        let text = "cpu  10 1 5 80 4 0 0 0 0 0\ncpu0 5 0 3 40 2 0 0 0 0 0\ncpu1 5 1 2 40 2 0 0 0\nintr 7\n";
        assert_eq!(parse_ticks(text), Ticks { all: 100, busy: 16, n_cores: 2 });
        assert_eq!(parse_memory_used("MemTotal: 10 kB\nMemFree: 1 kB\nMemAvailable: 4 kB\n"), 6 << 10);
        assert_eq!(mark_in(b"A=1\0LOQUAT_JOB_MARK=m\0"), Some("m".to_owned()));
        assert_eq!(mark_in(b"A=1\0LOQUAT_JOB_MARKS=m\0"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 2 0 12345 1 3 9";
        let used = Used { ticks: 300, memory_bytes: 3 * rustix::param::page_size() as u64 };
        assert_eq!(parse_used(stat), Some(used));
    }

    #[test]
    fn a_busy_job_is_seen_by_its_mark() {
        let mark = crate::database::random_hex::<8>().unwrap();
        let script = "while :; do :; done";
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", script])
            .env(MARK_VARIABLE, &mark)
            .spawn()
            .unwrap();
        let mut meter = Meter::new(std::env::temp_dir());
        let jobs = [(JobId(3), mark)];
        meter.look(&jobs).unwrap();
        // A share of a core, and on a busy machine none for a while.
        let mut looks = (0..50).map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(400));
            meter.look(&jobs).unwrap()
        });
        let load = looks.find(|load| load.jobs[0].cores > 0.02);
        child.kill().unwrap();
        child.wait().unwrap();
        let load = load.expect("a loop that never got to run");
        assert!(load.jobs[0].cores <= load.cores + 0.5, "{load:?}");
        assert!(
            load.jobs[0].memory_bytes > 0 && load.memory_bytes > 0 && load.disk_free_bytes > 0,
            "{load:?}"
        );
    }
}
