//! Processes told apart for good: a pid alone is recycled, a pid with its start time since boot is not.

use std::fs;
use std::io;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// The environment variable that every process of a job inherits; its value is the attempt's mark.
pub(crate) const MARK_VARIABLE: &str = "LOQUAT_JOB_MARK";

/// One process of one job, on this machine, in one boot of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessRef {
    pub pid: u32,
    /// Start in clock ticks since boot: field 22 of `/proc/PID/stat`. Survives exec, differs after a recycled pid.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`: start times of different boots cannot be compared.
    pub boot_id: String,
    /// Random; in the environment of the process and of whatever it starts.
    pub mark: String,
    /// The machine; empty where there is only one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
}

/// What `/proc/PID/stat` says that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    /// Neither a zombie nor dead.
    pub(crate) alive: bool,
    pub(crate) start_ticks: u64,
}

/// `None` when there is no such process.
pub(crate) fn stat(pid: u32) -> io::Result<Option<Stat>> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => match parse_stat(&text) {
            Some(stat) => Ok(Some(stat)),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat does not read as proc(5) has it"),
            )),
        },
        // ESRCH: the process went away between open and read.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The program's name is in parentheses and may hold any character, so counting starts behind the last parenthesis.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, after_name) = text.rsplit_once(") ")?;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { alive: !matches!(state, "Z" | "X" | "x"), start_ticks })
}

pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Sends `signal` to the process with this pid and start time; does nothing when it is gone.
///
/// The pidfd pins the process before its start time is read, so a pid recycled at any moment is never hit.
pub(crate) fn signal(pid: u32, start_ticks: u64, signal: Signal) -> io::Result<()> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let pinned = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pinned) => pinned,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    match stat(pid)? {
        Some(found) if found.alive && found.start_ticks == start_ticks => {}
        _ => return Ok(()),
    }
    match pidfd_send_signal(&pinned, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Living processes with `mark` in their environment, as (pid, start time).
pub(crate) fn marked(mark: &str) -> io::Result<Vec<(u32, u64)>> {
    let wanted = format!("{MARK_VARIABLE}={mark}").into_bytes();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Another user's process cannot be read and cannot be ours; one that just ended reads as nothing.
        let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else {
            continue;
        };
        if !environ.split(|byte| *byte == 0).any(|v| v == wanted) {
            continue;
        }
        if let Some(stat) = stat(pid)?.filter(|stat| stat.alive) {
            found.push((pid, stat.start_ticks));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 2 0 12345 1 1";
        let alive = Stat { alive: true, start_ticks: 12345 };
        assert_eq!(parse_stat(text), Some(alive));
        let zombie = parse_stat(&text.replace(") S", ") Z")).unwrap();
        assert!(!zombie.alive);
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[test]
    fn a_signal_for_another_start_time_is_not_sent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let found = stat(pid).unwrap().unwrap();
        assert!(found.alive);
        signal(pid, found.start_ticks + 1, Signal::KILL).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none(), "a recycled pid was hit");
        signal(pid, found.start_ticks, Signal::KILL).unwrap();
        child.wait().unwrap();
        assert_eq!(stat(pid).unwrap(), None);
        signal(pid, found.start_ticks, Signal::KILL).unwrap();
    }
}
