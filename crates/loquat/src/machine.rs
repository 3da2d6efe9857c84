//! How much memory this process may still take.

use std::fs;

/// Bytes that can be allocated without swapping: what the system has left, or the container if that is less. `None`
/// where neither can be read.
pub(crate) fn memory_available() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo_available(&text));
    let container = cgroup_left();
    system.into_iter().chain(container).min()
}

/// Bytes that this machine has, or the container if that is less.
pub(crate) fn memory_total() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text, "MemTotal:"));
    let container = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let container = container.and_then(|text| text.trim().parse().ok());
    system.into_iter().chain(container).min()
}

/// NVIDIA devices, as their driver or a container's runtime shows them: `/dev/nvidia0`, `/dev/nvidia1`, …
pub(crate) fn accelerators() -> u32 {
    let names = fs::read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter(|name| name.to_str().is_some_and(is_accelerator)).count() as u32
}

fn is_accelerator(name: &str) -> bool {
    name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// What tells this machine from one that has the same name, also after a restart where it can be told.
pub(crate) fn machine_id() -> String {
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let known = read("/etc/machine-id").filter(|id| !id.is_empty());
    known.or_else(|| read("/proc/sys/kernel/random/boot_id")).unwrap_or_default()
}

/// Bytes that this process may still take where its kinds of memory are limited (`ulimit -d` and `-v`); `None` where they
/// are not.
pub(crate) fn process_memory_left() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    limits_left(&limits, &status)
}

fn limits_left(limits: &str, status: &str) -> Option<u64> {
    let left = |name: &str, used: &str| {
        let limit = limits.lines().find_map(|line| line.strip_prefix(name))?;
        let limit: u64 = limit.split_whitespace().next()?.parse().ok()?;
        let used = status.lines().find_map(|line| line.strip_prefix(used))?;
        let kib: u64 = used.split_whitespace().next()?.parse().ok()?;
        Some(limit.saturating_sub(kib.checked_mul(1024)?))
    };
    let data = left("Max data size", "VmData:");
    data.into_iter().chain(left("Max address space", "VmSize:")).min()
}

fn meminfo_available(text: &str) -> Option<u64> {
    meminfo(text, "MemAvailable:")
}

fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Of cgroup v2; a container sees its own group at the root.
fn cgroup_left() -> Option<u64> {
    let number = |file: &str| {
        let text = fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

/// Bytes as a person reads them.
pub(crate) fn bytes_text(bytes: u64) -> String {
    let units = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match units.iter().find(|(_, unit)| bytes as f64 >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / unit),
        None => format!("{bytes} B"),
    }
}

/// Counts as a person reads them: 134.5 million.
pub(crate) fn count_text(n: u64) -> String {
    match n {
        n if n >= 1_000_000_000 => format!("{:.2} billion", n as f64 / 1e9),
        n if n >= 1_000_000 => format!("{:.1} million", n as f64 / 1e6),
        n => n.to_string(),
    }
}

/// What other machines call this one.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes_text(12), "12 B");
        assert_eq!(bytes_text(98_362_432), "98.4 MB");
        assert_eq!(bytes_text(1_234_567_890), "1.2 GB");
        assert_eq!(count_text(134_515_008), "134.5 million");
        assert_eq!(count_text(7_000_000_000), "7.00 billion");
        assert_eq!(count_text(999), "999");
    }

    #[test]
    fn devices_that_compute_are_counted() {
        let names = ["nvidia0", "nvidia12", "nvidia", "nvidiactl", "nvidia-uvm", "nvidia-caps", "sda"];
        let found: Vec<_> = names.into_iter().filter(|name| is_accelerator(name)).collect();
        assert_eq!(found, ["nvidia0", "nvidia12"]);
    }

    #[test]
    fn limits_are_read() {
        let limits = "Limit    Soft Limit  Hard Limit  Units\n\
                      Max data size             4096000              unlimited            bytes\n\
                      Max address space         unlimited            unlimited            bytes\n";
        assert_eq!(limits_left(limits, "VmSize:\t 9000 kB\nVmData:\t    1000 kB\n"), Some(3_072_000));
        assert_eq!(limits_left(limits, "VmData:\t 9000 kB\n"), Some(0));
        assert_eq!(
            limits_left(&limits.replace("4096000", "unlimited"), "VmData:\t 1 kB\nVmSize:\t 1 kB\n"),
            None
        );
        assert_eq!(limits_left("", ""), None);
    }

    #[test]
    fn meminfo_is_read() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
        assert_eq!(meminfo_available("MemAvailable: lots\n"), None);
    }
}
