//! `loquat train` as one rank of several processes: join the others, agree, train, and say why where that fails.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Result, bail};
use comm::{Comm, CommError, Hello, MpiComm, MpiSettings, Record, handshake};
use store::Store;
use tensor::Pool;
use train::{Event, Outcome};

use super::board::Board;
use super::launch::{self, Launched};
use crate::args;
use crate::home::Home;

/// Other ranks were lost or came too late: start again, from the last checkpoint.
pub(super) const EXIT_RANKS_LOST: u8 = 76;
/// The ranks do not belong together: starting again would not help.
pub(super) const EXIT_REFUSED: u8 = 78;

/// How often a rank posts what it is doing, at most and at least.
const POST_EVERY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];
/// So long a rank that gives up waits for the others to post or to say why, and for the store to answer.
const LAST_POSTS: Duration = Duration::from_millis(1500);
const EXPLAIN_MAX: Duration = Duration::from_secs(10);

/// Flags that ranks may have each for itself.
const OF_ONE_RANK: &[&str] = &["--home", "--threads", "--mpi-library"];

/// What goes on beside the others of the group.
pub(super) struct Member {
    comm: MpiComm,
    record: Record,
    own: Hello,
    /// Of every rank.
    pub(super) hosts: Vec<String>,
    limit: Duration,
}

impl Member {
    /// Joins the ranks that were started together.
    pub(super) fn join(args: &args::Train, launched: &Launched) -> Result<Member> {
        let Launched { rank, n_ranks, .. } = *launched;
        if args.ranks != 1 && args.ranks != n_ranks {
            bail!("--ranks {} was asked for, and {n_ranks} processes were started", args.ranks);
        }
        let (record, limit) = (Record::default(), args.distributed.limit());
        let libraries = launch::libraries(args.distributed.mpi_library.as_deref());
        let settings = MpiSettings { libraries, rank, n_ranks, limit, record: record.clone() };
        let comm = MpiComm::join(settings)?;
        let own =
            Hello { host: launch::host(), pid: std::process::id(), rank, n_ranks, same: Default::default() };
        Ok(Member { comm, record, own, hosts: Vec::new(), limit })
    }

    /// Rank 0 plans the run, if there is none yet. Where it cannot, no rank goes on.
    pub(super) fn plan(&self, plan: impl FnOnce() -> Result<()>) -> Result<()> {
        self.record.work(0, "planning");
        let planned = if self.comm.rank() == 0 { plan() } else { Ok(()) };
        let went_well = self.comm.all_gather(&[f64::from(u8::from(planned.is_ok()))])?[0] == 1.0;
        if !went_well {
            self.comm.leave()?;
        }
        planned?;
        if went_well {
            return Ok(());
        }
        // Rank 0 says why; mpirun ends all of them with the first that goes, maybe before it has.
        std::thread::sleep(LAST_POSTS);
        bail!("rank 0 could not plan the run")
    }

    /// Compares what must be the same on every rank.
    pub(super) fn agree(&mut self, store: &Arc<dyn Store>, args: &args::Train) -> Result<Option<ExitCode>> {
        let run = args.run_name();
        let nothing = |error: train::Error| format!("none ({error})");
        let plan = train::plan_sha256(store, run).unwrap_or_else(nothing);
        let mut same = vec![
            ("version".to_owned(), version()),
            ("plan".to_owned(), plan),
            ("arguments".to_owned(), launch::words(std::env::args().skip(1), OF_ONE_RANK).join(" ")),
            ("cpu".to_owned(), format!("{:?}", tensor::cpu::features())),
        ];
        if let Ok(Some(plan)) = train::read_plan(store, run) {
            same.extend(plan.data.iter().map(|part| {
                let found = data::Dataset::open(store, &part.dataset).map(|d| d.info().plan_sha256.clone());
                (format!("dataset {}", part.dataset), found.unwrap_or_else(|e| format!("none ({e})")))
            }));
        }
        self.own.same = same.into_iter().collect();
        match handshake(&self.comm, &self.own)? {
            Ok(all) => {
                self.hosts = all.into_iter().map(|hello| hello.host).collect();
                Ok(None)
            }
            Err(refused) => {
                eprintln!("error: {refused}");
                self.comm.leave()?;
                Ok(Some(ExitCode::from(EXIT_REFUSED)))
            }
        }
    }

    /// Trains to the end. Where ranks are lost, tells which and what each was doing.
    pub(super) fn train(self, context: &train::Context, on_event: &mut dyn FnMut(&Event)) -> Result<Outcome> {
        let Member { comm, record, own, limit, .. } = self;
        let board = Board::new(context.store.clone(), &context.run);
        let every = (limit / 4).clamp(POST_EVERY[0], POST_EVERY[1]);
        let posting = board.keep_posting(own.clone(), record.clone(), every);
        let ended = train::run_rank(context, (comm, record.clone()), on_event);
        if let Err(train::Error::Comm(error)) = &ended
            && is_loss(error)
        {
            posting.give_up();
            give_up(error, board, (own, record));
        }
        if ended.is_err() && own.rank > 0 {
            // The first says why and what came before; mpirun ends all of them with the first that goes.
            std::thread::sleep(LAST_POSTS);
        }
        Ok(ended?)
    }
}

/// What this build is: ranks of another would do other things in another order.
fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

fn is_loss(error: &CommError) -> bool {
    matches!(
        error,
        CommError::TimedOut { .. }
            | CommError::RankStopped { .. }
            | CommError::RanksLost { .. }
            | CommError::Mpi { .. }
    )
}

/// Tells what is known, and ends the process: whoever started the ranks starts them again.
fn give_up(error: &CommError, board: Board, (own, record): (Hello, Record)) -> ! {
    let doing = record.doing();
    eprintln!("error: {error} (step {}, {}, on {})", doing.step, doing.work, own.host);
    // The lowest rank that is not missing tells of all.
    let first = (0..own.n_ranks).find(|rank| !error.missing().contains(rank));
    let tells = first == Some(own.rank);
    let (done, wait) = channel();
    std::thread::spawn(move || {
        if let Err(error) = board.post(&own, &record, true) {
            eprintln!("cannot post what this rank was doing: {error:#}");
        }
        std::thread::sleep(LAST_POSTS);
        if tells {
            eprintln!("what every rank was doing:\n{}", board.lines(own.n_ranks).join("\n"));
        } else {
            // Who tells may have noticed later; mpirun ends all of them with the first that goes.
            std::thread::sleep(2 * LAST_POSTS);
        }
        // Nobody may wait any more.
        let _ = done.send(());
    });
    // A store that is gone, too, must not keep the job from ending.
    if wait.recv_timeout(EXPLAIN_MAX).is_err() {
        eprintln!("the store does not answer; what the others were doing is not known");
    }
    std::process::exit(EXIT_RANKS_LOST.into());
}

/// A process that was started as one of several, joined and agreed with the others; or what it ends with.
pub(super) fn join(
    (home, args): (&Home, &args::Train),
    launched: &Launched,
    pool: &Arc<Pool>,
) -> Result<Result<Member, ExitCode>> {
    let agreed = || -> Result<Result<Member, ExitCode>> {
        let mut member = Member::join(args, launched)?;
        member.plan(|| super::plan_if_new(home, args, pool))?;
        Ok(match member.agree(&home.store()?, args)? {
            None => Ok(member),
            Some(code) => Err(code),
        })
    };
    agreed().or_else(|error| lost_or(error).map(Err))
}

/// Before there is a run to post in.
fn lost_or(error: anyhow::Error) -> Result<ExitCode> {
    match error.downcast_ref::<CommError>() {
        Some(lost) if is_loss(lost) => {
            eprintln!("error: {error:#} (on {})", launch::host());
            Ok(ExitCode::from(EXIT_RANKS_LOST))
        }
        _ => Err(error),
    }
}
