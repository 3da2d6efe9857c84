//! Sums over ranks, beside the MPI library's own: `mpirun -n 2 bench_comm`. Ours keeps one order of sums whatever the
//! number of ranks; what that costs is the ratio. Both in turns in the same process, the least of many rounds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use comm::{Comm, MpiComm, MpiSettings, Record};

const ROUNDS: usize = 30;
/// f32 values: 64 KiB, 1 MiB, 64 MiB.
const LENS: [usize; 3] = [16 << 10, 256 << 10, 16 << 20];

fn main() {
    let number = |name: &str| -> usize {
        let text =
            std::env::var(name).unwrap_or_else(|_| panic!("start this with mpirun: there is no {name}"));
        text.parse().unwrap_or_else(|_| panic!("{name} is {text}"))
    };
    let libraries: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (rank, n_ranks) = (number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE"));
    let libraries = if libraries.is_empty() { vec!["libmpi.so.40".into()] } else { libraries };
    let (limit, record) = (Duration::from_secs(60), Record::default());
    let comm = MpiComm::join(MpiSettings { libraries, rank, n_ranks, limit, record });
    let comm = comm.unwrap_or_else(|error| panic!("{error}"));
    for len in LENS {
        validate(&comm, len);
        bench(&comm, len);
    }
    comm.leave().unwrap_or_else(|error| panic!("{error}"));
}

/// Small whole numbers: every order gives the same sum.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| ((at + rank) % 7) as f32).collect()
}

fn validate(comm: &MpiComm, len: usize) {
    let (mut ours, mut theirs) = (values(comm.rank(), len), values(comm.rank(), len));
    comm.all_reduce_tree(&mut ours).unwrap_or_else(|error| panic!("{error}"));
    comm.library_sum(&mut theirs).unwrap_or_else(|error| panic!("{error}"));
    assert!(ours == theirs, "the sums differ");
}

fn bench(comm: &MpiComm, len: usize) {
    let mut sums = values(comm.rank(), len);
    let (mut ours, mut theirs) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        ours = ours.min(seconds(comm, || comm.all_reduce_tree(&mut sums)));
        theirs = theirs.min(seconds(comm, || comm.library_sum(&mut sums)));
        // Sums of sums grow without end.
        sums.fill(1.0);
    }
    if comm.rank() == 0 {
        let (n_ranks, mib) = (comm.n_ranks(), len as f64 * 4.0 / f64::from(1 << 20));
        println!(
            "sum of {mib:>7.3} MiB over {n_ranks} ranks: ours {:>8.2} ms, {:.2} GB/s; MPI_Allreduce {:>8.2} ms; ratio {:.2}",
            ours * 1e3,
            len as f64 * 4.0 / ours / 1e9,
            theirs * 1e3,
            ours / theirs
        );
    }
}

/// From when all are there until this rank is done.
fn seconds(comm: &MpiComm, work: impl FnOnce() -> Result<(), comm::CommError>) -> f64 {
    comm.barrier().unwrap_or_else(|error| panic!("{error}"));
    let start = Instant::now();
    work().unwrap_or_else(|error| panic!("{error}"));
    start.elapsed().as_secs_f64()
}
