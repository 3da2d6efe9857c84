//! `process_*`: what the operating system says about this process, read from `/proc` at each scrape (see proc(5)).

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// `/proc` counts time in ticks of USER_HZ, which is 100 in the kernel's interface on every architecture we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// Reads nothing until it is scraped. A value that `/proc` does not give (another system, a sandbox) is left out.
#[derive(Debug)]
pub(crate) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let stat = read("/proc/self/stat").and_then(|text| Stat::parse(&text));
        if let Some(stat) = &stat {
            let cpu = ConstCounter::new(stat.cpu_seconds);
            cpu.encode(encoder.encode_descriptor(
                "process_cpu_seconds",
                "User and system time of this process",
                None,
                cpu.metric_type(),
            )?)?;
        }
        let status = read("/proc/self/status").unwrap_or_default();
        let boot = read("/proc/stat").and_then(|text| field(&text, "btime "));
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Memory of this process that is in RAM",
                kibibytes(&status, "VmRSS:"),
            ),
            ("process_virtual_memory_bytes", "Address space of this process", kibibytes(&status, "VmSize:")),
            ("process_threads", "Threads of this process", field(&status, "Threads:")),
            ("process_open_fds", "Open file descriptors", open_fds()),
            (
                "process_max_fds",
                "Most file descriptors this process may open",
                read("/proc/self/limits").and_then(|text| field(&text, "Max open files")),
            ),
            (
                "process_start_time_seconds",
                "Start of this process since the epoch",
                stat.zip(boot).map(|(stat, boot)| boot + stat.start_seconds_since_boot),
            ),
        ];
        for (name, help, value) in gauges {
            let Some(value) = value else { continue };
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

struct Stat {
    cpu_seconds: f64,
    start_seconds_since_boot: f64,
}

impl Stat {
    /// The second field is the program's name in parentheses and may hold spaces and parentheses itself, so counting
    /// starts behind the last one: fields 14, 15 and 22 of proc(5) are then 11, 12 and 19.
    fn parse(text: &str) -> Option<Self> {
        let (_, after_name) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        Some(Self {
            cpu_seconds: (ticks(11)? + ticks(12)?) / TICKS_PER_SECOND,
            start_seconds_since_boot: ticks(19)? / TICKS_PER_SECOND,
        })
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The first number behind `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

fn kibibytes(text: &str, name: &str) -> Option<f64> {
    field(text, name).map(|n| n * 1024.0)
}

fn open_fds() -> Option<f64> {
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count() as f64)
}

#[cfg(test)]
mod tests {
    use super::Stat;

    #[test]
    fn a_program_name_with_parentheses_does_not_shift_the_fields() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 2 0 12345 1 1";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.cpu_seconds, 3.0);
        assert_eq!(stat.start_seconds_since_boot, 123.45);
        assert!(Stat::parse("7 (cut").is_none());
        assert!(Stat::parse("7 (cut) S 1 2").is_none());
    }
}
