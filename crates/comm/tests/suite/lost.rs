//! Ranks that are killed, and those that are left and go on (Open MPI 5, ULFM).

use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};

use comm::{Comm, CommError, MpiComm, Record};

use crate::{expected, join, mpirun, under_mpirun, value};

/// `None`, and said so, where this MPI ends all ranks with the first.
fn surviving(case: &str, n_ranks: usize) -> Option<(String, Option<i32>)> {
    let version = Command::new(mpirun()?).arg("--version").output().unwrap().stdout;
    let version = String::from_utf8_lossy(&version);
    if !version.contains("(Open MPI) 5.") {
        eprintln!("SKIPPED: {version} has no --with-ft ulfm");
        return None;
    }
    under_mpirun(&["--with-ft", "ulfm"], case, n_ranks)
}

#[test]
fn those_that_are_left_go_on() {
    let Some((text, code)) = surviving("lost", 4) else { return };
    assert_eq!((code, text.matches("went on to the end").count()), (Some(0), 2), "{text}");
}

#[test]
fn without_the_launcher_nobody_goes_on() {
    let Some((text, _)) = under_mpirun(&[], "cannot", 2) else { return };
    assert_eq!(text.matches("were not started so that some may be lost").count(), 2, "{text}");
}

/// Not started so that some may be lost.
pub(crate) fn cannot() {
    let mut comm = join(Duration::from_secs(30), &Record::default()).unwrap();
    comm.barrier().unwrap();
    let error = comm.regroup().unwrap_err();
    println!("{error}: {}", error.source().unwrap());
    // Both get to say so: the launcher ends all with the first.
    std::thread::sleep(Duration::from_secs(1));
}

/// Sums until an error comes.
fn sum_until_lost(comm: &MpiComm) -> CommError {
    let begun = Instant::now();
    loop {
        if let Err(error) = comm.all_reduce_tree(&mut vec![1.0; 300_000]) {
            return error;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody was missed");
    }
}

fn kill_myself() -> ! {
    let pid = std::process::id().to_string();
    Command::new("kill").args(["-KILL", &pid]).status().unwrap();
    unreachable!("killed")
}

/// Of four ranks the third dies, the fourth is spare then, takes the place of the second when that dies, too, and ends with
/// the first.
pub(crate) fn lost() {
    let mut comm = join(Duration::from_secs(30), &Record::default()).unwrap();
    comm.all_reduce_tree(&mut vec![1.0; 1000]).unwrap();
    let first = comm.rank();
    if first == 2 {
        kill_myself();
    }
    let error = sum_until_lost(&comm);
    assert!(matches!(error, CommError::RanksLost { .. }), "{error:?}");
    // What was begun, and what begins now, ends with the same.
    assert!(matches!(comm.barrier(), Err(CommError::RanksLost { .. })));
    let begun = Instant::now();
    comm.regroup().unwrap();
    println!("rank {first} is one of {:?} after {:?}", comm.numbers(), begun.elapsed());
    assert_eq!((comm.numbers(), comm.n_ranks()), (&[0, 1, 3][..], 3));
    assert_eq!(comm.all_gather(&[first as f64]).unwrap(), [0.0, 1.0, 3.0]);
    comm.narrow(2).unwrap();
    let error = match first {
        0 => sum_until_lost(&comm),
        // It has other things to do for a while, and is not missed by the spare one.
        1 => {
            comm.all_reduce_tree(&mut vec![1.0; 300_000]).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            kill_myself()
        }
        _ => {
            assert!(comm.is_spare());
            comm.leave().unwrap_err()
        }
    };
    assert!(matches!(error, CommError::RanksLost { .. }), "{error:?}");
    comm.regroup().unwrap();
    assert_eq!(comm.numbers(), [0, 3]);
    comm.narrow(2).unwrap();
    let rank = comm.rank();
    let mut sums: Vec<f32> = (0..1_200_001).map(|at| value(rank, at)).collect();
    comm.all_reduce_tree(&mut sums).unwrap();
    assert!(sums.iter().enumerate().all(|(at, sum)| sum.to_bits() == expected(at, 0..2).to_bits()));
    comm.leave().unwrap();
    println!("rank {first} went on to the end");
}
