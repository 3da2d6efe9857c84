//! One suite for every kind of ranks: threads of this process, and processes that a real `mpirun` starts.
//!
//! This program starts itself again under `mpirun`: the test `as_one_rank` is what each of those processes runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use comm::{Beside, Comm, CommError, Hello, MpiComm, MpiSettings, Record, handshake, teams, threads, tree};

/// What a rank that `mpirun` started is told of.
const SIZE: &str = "OMPI_COMM_WORLD_SIZE";
const CASE: &str = "LOQUAT_COMM_CASE";
/// What a rank exits with that has found the missing one.
const FOUND: i32 = 42;

/// `mpirun` as `./test` installs it, or the system's.
fn mpirun() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../var/venv-mpi/bin/mpirun");
    let found = if own.exists() { Some(own) } else { in_path("mpirun") };
    if found.is_none() {
        eprintln!("SKIPPED: there is no mpirun (./test installs one)");
    }
    found
}

fn in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.exists())
}

/// Runs `case` on so many ranks; its output and exit code.
fn under_mpi(case: &str, n_ranks: usize) -> Option<(String, Option<i32>)> {
    let mut command = Command::new(mpirun()?);
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &n_ranks.to_string()]);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "as_one_rank", "--nocapture"]);
    let output = command.env(CASE, case).env("OMPI_ALLOW_RUN_AS_ROOT", "1").output().unwrap();
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    Some((String::from_utf8_lossy(&text).into_owned(), output.status.code()))
}

fn join(limit: Duration, record: &Record) -> Result<MpiComm, CommError> {
    let library = mpirun().unwrap().parent().unwrap().join("../lib/libmpi.so.40");
    let libraries = vec![library, "libmpi.so.40".into()];
    let n_ranks = std::env::var(SIZE).unwrap().parse().unwrap();
    let rank = std::env::var("OMPI_COMM_WORLD_RANK").unwrap().parse().unwrap();
    MpiComm::join(MpiSettings { libraries, rank, n_ranks, limit, record: record.clone() })
}

/// A value that depends on all of its arguments, of very different sizes.
fn value(rank: usize, at: usize) -> f32 {
    ((rank * 7919 + at * 104_729) % 1013) as f32 * 10f32.powi(((rank + at) % 7) as i32 - 3)
}

/// In the order of the tree, slowly.
fn expected(at: usize, ranks: std::ops::Range<usize>) -> f32 {
    if ranks.len() == 1 {
        return value(ranks.start, at);
    }
    let mid = ranks.start + ranks.len() / 2;
    expected(at, ranks.start..mid) + expected(at, mid..ranks.end)
}

/// Every promise of [`Comm`].
fn suite(comm: &dyn Comm) {
    let (rank, n_ranks) = (comm.rank(), comm.n_ranks());
    comm.barrier().unwrap();
    for len in [0, 1, 3, 1000, tree::SHARD_ALIGN, 7 * tree::SHARD_ALIGN + 5, 1_200_001] {
        let own: Vec<f32> = (0..len).map(|at| value(rank, at)).collect();
        let is_sum = |at: usize, sum: f32| sum.to_bits() == expected(at, 0..n_ranks).to_bits();

        let mut sums = own.clone();
        comm.all_reduce_tree(&mut sums).unwrap();
        let wrong = sums.iter().enumerate().find(|(at, sum)| !is_sum(*at, **sum));
        assert_eq!(wrong, None, "sum of {len} on rank {rank} of {n_ranks}");

        let mut scattered = own.clone();
        comm.reduce_scatter_tree(&mut scattered).unwrap();
        let shard = tree::shard(len, rank, n_ranks);
        for at in 0..len {
            let is_right =
                if shard.contains(&at) { is_sum(at, scattered[at]) } else { scattered[at] == own[at] };
            assert!(is_right, "{len} at {at} of rank {rank}");
        }

        let mut gathered = own.clone();
        comm.all_gather_shards(&mut gathered).unwrap();
        for owner in 0..n_ranks {
            let wrong = tree::shard(len, owner, n_ranks).find(|at| gathered[*at] != value(owner, *at));
            assert_eq!(wrong, None, "{len} of {owner} on {rank}");
        }

        let mut copied = own;
        comm.broadcast(&mut copied).unwrap();
        assert!((0..len).all(|at| copied[at] == value(0, at)), "broadcast of {len}");
    }
    let uneven: Vec<f64> = (0..rank).map(|i| (10 * rank + i) as f64).collect();
    let all: Vec<f64> = (0..n_ranks).flat_map(|r| (0..r).map(move |i| (10 * r + i) as f64)).collect();
    assert_eq!(comm.all_gather(&uneven).unwrap(), all);
    direct(comm);
    beside(comm);
    let sent = comm.bytes_sent();
    assert_eq!(sent > 0, n_ranks > 1, "{sent} bytes sent");
}

/// Several operations at once, beside others, on shards of several ranges, some of them empty.
fn beside(comm: &dyn Comm) {
    let (rank, n_ranks) = (comm.rank(), comm.n_ranks());
    let borders = [0, 5, 700_000, 700_001, 1_000_003];
    let ranges = |rank: usize| {
        let part = |pair: &[usize]| {
            let border = |rank: usize| pair[0] + (pair[1] - pair[0]) * rank / n_ranks;
            border(rank)..border(rank + 1)
        };
        borders.windows(2).map(part).filter(|range| !range.is_empty()).collect::<Vec<_>>()
    };
    let shards = tree::Shards::new((0..n_ranks).map(ranges).collect());
    let len = borders[4];
    // Longer than what is sent.
    let own: std::sync::Arc<[f32]> = (0..len + 9).map(|at| value(rank, at)).collect();
    let begin = |kind| {
        let values = if kind == Beside::Gather { shards.own(rank, &own) } else { own.clone() };
        comm.begin(kind, values, shards.clone()).unwrap()
    };
    let pending = [Beside::ReduceScatter, Beside::AllReduce, Beside::Gather].map(begin);
    comm.barrier().unwrap();
    let [scattered, sums, gathered] = pending.map(|pending| {
        let mut values = vec![f32::NAN; len];
        let mut put = |at: usize, piece: &[f32]| values[at..at + piece.len()].copy_from_slice(piece);
        assert!(pending.finish(&mut put).unwrap() >= 0.0);
        values
    });
    let sum = |at: usize| expected(at, 0..n_ranks).to_bits();
    assert!((0..len).all(|at| sums[at].to_bits() == sum(at)), "sums on {rank} of {n_ranks}");
    for owner in 0..n_ranks {
        for at in ranges(owner).into_iter().flatten() {
            let is_own = owner == rank;
            assert!(!is_own || scattered[at].to_bits() == sum(at), "{at} on {rank} of {n_ranks}");
            assert!(is_own || gathered[at] == value(owner, at), "{at} of {owner} on {rank} of {n_ranks}");
        }
    }
    sums_of_nodes(comm, (&own, len), &shards);
    let mut all: Vec<f32> = own[..len].to_vec();
    comm.all_gather_of(&mut all, &shards).unwrap();
    assert!(
        (0..n_ranks).all(|owner| ranges(owner).into_iter().flatten().all(|at| all[at] == value(owner, at)))
    );
}

/// Not one sum over all ranks: some of the first, some of the others, and none of the last.
fn sums_of_nodes(comm: &dyn Comm, (own, len): (&std::sync::Arc<[f32]>, usize), shards: &tree::Shards) {
    let (rank, n_ranks) = (comm.rank(), comm.n_ranks());
    let ends = [n_ranks / 2, n_ranks - 1].map(|end| end.max(1));
    let nodes: Vec<_> = [0..ends[0], ends[0]..ends[1]].into_iter().filter(|node| !node.is_empty()).collect();
    if n_ranks == 1 {
        return;
    }
    assert_eq!(shards.end(), len);
    let of_nodes = shards.clone().with_nodes(&nodes);
    let mut sums = vec![f32::NAN; nodes.len() * len];
    let pending = comm.begin(Beside::ReduceScatter, own.clone(), of_nodes).unwrap();
    pending.finish(&mut |at, piece| sums[at..at + piece.len()].copy_from_slice(piece)).unwrap();
    for (i, node) in nodes.iter().enumerate() {
        for at in shards.of(rank).iter().cloned().flatten() {
            assert_eq!(
                sums[i * len + at].to_bits(),
                expected(at, node.clone()).to_bits(),
                "{at} of {node:?}"
            );
        }
    }
}

/// From each rank to the next, the even ones first.
fn direct(comm: &dyn Comm) {
    let (rank, n_ranks) = (comm.rank(), comm.n_ranks());
    if n_ranks == 1 {
        return;
    }
    let (next, last) = ((rank + 1) % n_ranks, (rank + n_ranks - 1) % n_ranks);
    let own: Vec<f32> = (0..300_000).map(|at| value(rank, at)).collect();
    let mut got = vec![0.0; own.len()];
    if rank.is_multiple_of(2) {
        comm.send(next, &own).unwrap();
        comm.receive(last, &mut got).unwrap();
    } else {
        comm.receive(last, &mut got).unwrap();
        comm.send(next, &own).unwrap();
    }
    assert!((0..got.len()).all(|at| got[at] == value(last, at)), "from {last} to {rank}");
    // All give first, and nobody waits for somebody who waits. What was sent behind it does not overtake it.
    let longer: std::sync::Arc<[f32]> = own.iter().copied().chain([f32::NAN; 7]).collect();
    comm.post(next, (longer.clone(), own.len())).unwrap();
    comm.post(next, (longer, 5)).unwrap();
    got.fill(0.0);
    comm.receive(last, &mut got).unwrap();
    assert!((0..got.len()).all(|at| got[at] == value(last, at)), "given by {last} to {rank}");
    let mut few = [0.0; 5];
    comm.receive(last, &mut few).unwrap();
    assert!((0..5).all(|at| few[at] == value(last, at)), "given by {last} to {rank}");
}

#[test]
fn threads_keep_the_promises() {
    for n_ranks in [1, 2, 3, 4, 7, 8] {
        std::thread::scope(|scope| {
            for comm in threads(n_ranks).unwrap() {
                scope.spawn(move || {
                    suite(&comm);
                    comm.leave().unwrap();
                });
            }
        });
    }
}

/// Among all, in a team, and then among those that have its place in the other teams.
fn suites_of_teams(comm: Box<dyn Comm>) {
    let n_ranks = comm.n_ranks();
    let [all, team, alike] = teams(comm, 2).unwrap();
    assert_eq!([all.n_ranks(), team.n_ranks(), alike.n_ranks()], [n_ranks, 2, n_ranks / 2]);
    suite(&*all);
    suite(&*team);
    suite(&*alike);
    alike.leave().unwrap();
}

#[test]
fn teams_keep_the_promises() {
    std::thread::scope(|scope| {
        for comm in [4, 6].into_iter().flat_map(|n_ranks| threads(n_ranks).unwrap()) {
            scope.spawn(move || suites_of_teams(Box::new(comm)));
        }
    });
    for n_ranks in [4, 6] {
        let Some((text, code)) = under_mpi("teams", n_ranks) else { return };
        assert_eq!((code, text.matches("kept every promise").count()), (Some(0), n_ranks), "{text}");
    }
}

#[test]
fn teams_are_whole() {
    for n_team in [0, 3, 8] {
        let comm = threads(4).unwrap().remove(0);
        let error = teams(Box::new(comm), n_team).err().unwrap().to_string();
        assert!(error.contains(&format!("4 ranks are no whole number of teams of {n_team}")), "{error}");
    }
}

#[test]
fn mpi_keeps_the_promises() {
    for n_ranks in [2, 3, 4] {
        let Some((text, code)) = under_mpi("suite", n_ranks) else { return };
        assert_eq!((code, text.matches("kept every promise").count()), (Some(0), n_ranks), "{text}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let Some((text, code)) = under_mpi("late", 4) else { return };
    assert_eq!(code, Some(FOUND), "{text}");
    assert!(text.contains("rank 0 waited 2 s in reduce_scatter; missing: [2]"), "{text}");
    assert!(text.contains("waiting for [2]"), "{text}");
}

#[test]
fn ranks_that_differ_are_told_so() {
    let Some((text, code)) = under_mpi("differ", 2) else { return };
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("plan: rank 0").count(), 2, "every rank says it: {text}");
}

#[test]
fn the_wrong_library_is_recognized() {
    let Some((text, code)) = under_mpi("alone", 1) else { return };
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("the launcher started 2 ranks") && text.contains("sees 1"), "{text}");
}

/// Not a test by itself: what `mpirun` runs.
#[test]
fn as_one_rank() {
    let Ok(case) = std::env::var(CASE) else { return };
    let record = Record::default();
    match case.as_str() {
        "suite" => {
            let comm = join(Duration::from_secs(60), &record).unwrap_or_else(|e| panic!("{e}"));
            suite(&comm);
            comm.leave().unwrap();
            println!("rank {} kept every promise", comm.rank());
        }
        "teams" => {
            suites_of_teams(Box::new(join(Duration::from_secs(60), &record).unwrap()));
            println!("it kept every promise");
        }
        "late" => late(&record),
        "differ" => {
            let comm = join(Duration::from_secs(60), &record).unwrap();
            let same = [("plan".to_owned(), format!("digest {}", comm.rank()))].into();
            let (rank, n_ranks) = (comm.rank(), comm.n_ranks());
            let hello = Hello { host: "here".into(), pid: 1, rank, n_ranks, same };
            println!("{}", handshake(&comm, &hello).unwrap().unwrap_err());
            comm.leave().unwrap();
        }
        "alone" => {
            let libraries =
                vec![mpirun().unwrap().parent().unwrap().join("../lib/libmpi.so.40"), "libmpi.so.40".into()];
            let limit = Duration::from_secs(60);
            let settings = MpiSettings { libraries, rank: 0, n_ranks: 2, limit, record };
            println!("{}", MpiComm::join(settings).err().unwrap());
        }
        other => panic!("no case {other}"),
    }
}

/// Rank 2 comes far too late; the others name it, within their limit.
fn late(record: &Record) {
    let comm = join(Duration::from_secs(2), record).unwrap();
    comm.barrier().unwrap();
    if comm.rank() == 2 {
        std::thread::sleep(Duration::from_secs(60));
    }
    let begun = Instant::now();
    let error = comm.reduce_scatter_tree(&mut vec![1.0; 100_000]).unwrap_err();
    assert_eq!(error.missing(), [2]);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    println!("{error}; {}", record.doing());
    // All of them get to say so.
    std::thread::sleep(Duration::from_secs(1));
    std::process::exit(FOUND);
}
