//! Bytes between the machines of a run.

use std::collections::BTreeMap;

use train::Link;

/// Links that a line has room for.
const SHOWN_MAX: usize = 4;

/// Bytes from one place to another.
#[derive(Debug, PartialEq)]
pub(crate) struct Traffic {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) bytes: u64,
}

/// The busiest first. Places are machines where there are several, and ranks where all are on one.
pub(crate) fn traffic(links: &[Link], hosts: &[String]) -> Vec<Traffic> {
    let are_several = hosts.iter().any(|host| *host != hosts[0]);
    let place = |rank: usize| match hosts.get(rank).filter(|_| are_several) {
        Some(host) => host.clone(),
        None => format!("rank {rank}"),
    };
    let mut sums: BTreeMap<(String, String), u64> = BTreeMap::new();
    for link in links {
        let ends = (place(link.from), place(link.to));
        if ends.0 != ends.1 {
            *sums.entry(ends).or_default() += link.bytes;
        }
    }
    let mut all: Vec<Traffic> =
        sums.into_iter().map(|((from, to), bytes)| Traffic { from, to, bytes }).collect();
    all.sort_by_key(|traffic| std::cmp::Reverse(traffic.bytes));
    all
}

/// The busiest links; nothing where there are none.
pub(crate) fn line(traffic: &[Traffic], seconds: f64) -> Option<String> {
    let rate = |bytes: u64| bytes as f64 / 1e6 / seconds.max(1e-9);
    let link = |t: &Traffic| format!("{} to {} {:.2} MB/s", t.from, t.to, rate(t.bytes));
    let told: Vec<String> = traffic.iter().take(SHOWN_MAX).map(link).collect();
    (!told.is_empty()).then(|| format!("links: {}", told.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_summed_between_machines() {
        let link = |from, to, bytes| Link { from, to, bytes };
        let links = [link(0, 1, 5), link(0, 2, 7), link(1, 2, 8), link(2, 0, 1)];
        let told = |hosts: &[&str]| -> Vec<String> {
            let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
            traffic(&links, &hosts).iter().map(|t| format!("{}>{} {}", t.from, t.to, t.bytes)).collect()
        };
        assert_eq!(told(&["a", "a", "b"]), ["a>b 15", "b>a 1"]);
        let by_rank = ["rank 1>rank 2 8", "rank 0>rank 2 7", "rank 0>rank 1 5", "rank 2>rank 0 1"];
        assert_eq!(told(&["a", "a", "a"]), by_rank);
        assert_eq!(told(&[]), by_rank);
        let between = traffic(&links, &["a", "a", "b"].map(str::to_owned));
        assert_eq!(line(&between, 1e-5).as_deref(), Some("links: a to b 1.50 MB/s, b to a 0.10 MB/s"));
        assert_eq!(line(&[], 1.0), None);
    }
}
