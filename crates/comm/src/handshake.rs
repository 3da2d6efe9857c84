//! Before the first step: do all ranks mean the same run?

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Comm, CommError};

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub host: String,
    pub pid: u32,
    /// The number that the launcher gave this rank, and of how many.
    pub rank: usize,
    pub n_ranks: usize,
    /// All that must be the same on every rank, by name: version, plan, dataset.
    pub same: BTreeMap<String, String>,
}

/// In what ranks differ, one line each.
#[derive(Debug, thiserror::Error)]
pub struct Refused(pub Vec<String>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the ranks do not belong together: {}", self.0.join("; "))
    }
}

/// A hello is some fields of a line each.
const HELLO_BYTES_MAX: usize = 64 << 10;
/// Differences that are told.
const TOLD_MAX: usize = 8;

/// Every rank's hello, in the order of ranks; or in what they differ, the same on every rank.
pub fn handshake(comm: &dyn Comm, own: &Hello) -> Result<Result<Vec<Hello>, Refused>, CommError> {
    let bytes = serde_json::to_vec(own).unwrap_or_else(|e| panic!("a hello is plain data: {e}"));
    let all = comm.all_gather_bytes(&bytes)?;
    Ok(compare(&all))
}

fn compare(all: &[Vec<u8>]) -> Result<Vec<Hello>, Refused> {
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        let hello =
            if bytes.len() > HELLO_BYTES_MAX { None } else { serde_json::from_slice::<Hello>(bytes).ok() };
        hello.ok_or_else(|| Refused(vec![format!("rank {rank} does not speak as this version does")]))
    };
    let hellos: Vec<Hello> = all.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    let mut differences = differences(&hellos);
    differences.truncate(TOLD_MAX);
    if differences.is_empty() { Ok(hellos) } else { Err(Refused(differences)) }
}

fn differences(hellos: &[Hello]) -> Vec<String> {
    let name = |at: usize| format!("rank {at} (process {} on {})", hellos[at].pid, hellos[at].host);
    let mut differences = Vec::new();
    for (at, hello) in hellos.iter().enumerate() {
        let twice = hellos[..at].iter().position(|other| other.rank == hello.rank);
        match twice {
            Some(other) => differences.push(format!(
                "the launcher gave the number {} to {} and to {}",
                hello.rank,
                name(other),
                name(at)
            )),
            None if hello.rank != at => {
                differences.push(format!("{} was given the number {}", name(at), hello.rank));
            }
            None => {}
        }
        if hello.n_ranks != hellos.len() {
            differences.push(format!(
                "{} was told of {} ranks, {} came",
                name(at),
                hello.n_ranks,
                hellos.len()
            ));
        }
    }
    for at in 1..hellos.len() {
        let (first, other) = (&hellos[0].same, &hellos[at].same);
        let mut fields: Vec<&String> = first.keys().chain(other.keys()).collect();
        fields.sort_unstable();
        fields.dedup();
        for field in fields.into_iter().filter(|field| first.get(*field) != other.get(*field)) {
            let value =
                |same: &BTreeMap<String, String>| same.get(field).map_or("nothing".into(), String::clone);
            let (a, b) = (value(first), value(other));
            differences.push(format!("{field}: {} has {a}, {} has {b}", name(0), name(at)));
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(rank: usize) -> Hello {
        let same = [("plan", "aa"), ("version", "1")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        Hello { host: format!("h{rank}"), pid: 10 + rank as u32, rank, n_ranks: 3, same: same.into() }
    }

    fn refused(hellos: &[Hello], words: &[&str]) {
        let bytes: Vec<Vec<u8>> = hellos.iter().map(|h| serde_json::to_vec(h).unwrap()).collect();
        let text = compare(&bytes).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(text.contains(word), "no '{word}' in: {text}"));
    }

    #[test]
    fn differences_are_named() {
        let good = [hello(0), hello(1), hello(2)];
        let bytes: Vec<Vec<u8>> = good.iter().map(|h| serde_json::to_vec(h).unwrap()).collect();
        assert_eq!(compare(&bytes).unwrap(), good);

        let mut other = good.clone();
        other[2].same.insert("plan".into(), "bb".into());
        refused(&other, &["plan", "aa", "bb", "rank 2 (process 12 on h2)"]);
        other[1].same.remove("version");
        refused(&other, &["version", "nothing"]);
        let mut twice = good.clone();
        twice[2].rank = 1;
        refused(&twice, &["the number 1", "rank 1 (process 11 on h1)", "rank 2 (process 12 on h2)"]);
        let mut more = good.clone();
        more[0].n_ranks = 4;
        refused(&more, &["told of 4 ranks, 3 came"]);
    }

    #[test]
    fn noise_is_refused() {
        let good = serde_json::to_vec(&hello(0)).unwrap();
        for noise in [vec![], vec![0xff; 100], good[..good.len() / 2].to_vec(), vec![b'['; 1 << 20]] {
            let text = compare(&[good.clone(), noise]).unwrap_err().to_string();
            assert!(text.contains("rank 1 does not speak"), "{text}");
        }
    }
}
