//! Who started this process, as one rank of how many: `mpirun`, `srun` or nobody.

use std::path::{Path, PathBuf};

/// As the launcher says it, in the environment.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Launched {
    pub(super) rank: usize,
    pub(super) n_ranks: usize,
}

/// Pairs of variables that launchers set: this rank and how many there are. Slurm's batch script has the rank as well,
/// so there it is the number of tasks of a step that tells.
const VARIABLES: [[&str; 2]; 4] = [
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"],
    ["PMI_RANK", "PMI_SIZE"],
    ["PMIX_RANK", "PMIX_SIZE"],
    ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"],
];

impl Launched {
    /// `None` for a process that is alone. `variable` reads the environment.
    pub(super) fn of(variable: &dyn Fn(&str) -> Option<String>) -> Option<Launched> {
        let number = |name: &str| variable(name)?.parse::<usize>().ok();
        let found = VARIABLES.iter().find_map(|[rank, size]| Some((number(rank)?, number(size)?)));
        found.filter(|(_, n_ranks)| *n_ranks > 1).map(|(rank, n_ranks)| Launched { rank, n_ranks })
    }
}

/// Files that may be the MPI library: what was named, what belongs to the `mpirun` that is found first, the system's.
pub(super) fn libraries(named: Option<&Path>) -> Vec<PathBuf> {
    let beside = |mpirun: PathBuf| Some(mpirun.parent()?.parent()?.join("lib/libmpi.so.40"));
    let found = crate::in_path("mpirun").and_then(beside).filter(|library| library.exists());
    let named = named.map(Path::to_owned);
    named.into_iter().chain(found).chain(["libmpi.so.40", "libmpi.so"].map(PathBuf::from)).collect()
}

/// The words of a command line without these flags and their values.
pub(super) fn words(words: impl Iterator<Item = String>, without: &[&str]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        let flag = word.split_once('=').map_or(word.as_str(), |(flag, _)| flag);
        if !without.contains(&flag) {
            kept.push(word);
        } else if flag == word {
            // Its value is the next word.
            words.next();
        }
    }
    kept
}

/// What this machine calls itself.
pub(super) fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    if name.trim().is_empty() { "unknown".to_owned() } else { name.trim().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Option<(usize, usize)> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Launched::of(&variable).map(|launched| (launched.rank, launched.n_ranks))
    }

    #[test]
    fn flags_are_left_out_with_their_values() {
        let line = "--home h train --ranks 4 --launch=mpi --run r --restarts 2".split(' ').map(str::to_owned);
        assert_eq!(words(line, &["--ranks", "--launch", "--restarts"]).join(" "), "--home h train --run r");
    }

    #[test]
    fn launchers_are_recognized() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "4")]), Some((2, 4)));
        assert_eq!(of(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), Some((0, 2)));
        assert_eq!(of(&[("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "8")]), Some((3, 8)));
        // A batch script that starts its ranks later.
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", "x"), ("OMPI_COMM_WORLD_SIZE", "4")]), None);
    }
}
