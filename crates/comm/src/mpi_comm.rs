//! Ranks that are processes which MPI started, on one machine or many.
//!
//! Sums are taken in the order of [`crate::tree`], as between threads, not by MPI's own reductions, whose order is the
//! library's choice: so the bits of a run do not depend on what carries them.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use mpi::World;

use crate::pending::{Beside, Pending};
use crate::post::{Job, Loss, NAP, Post, Posted, Reply, Spare, failed};
use crate::sent::Sent;
use crate::tree::Shards;
use crate::{Comm, CommError, Record};

/// How long MPI's own end may take once ranks were lost; undisturbed it takes milliseconds.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a rank joins the others.
pub struct MpiSettings {
    /// Files that may be the library, the likeliest first.
    pub libraries: Vec<PathBuf>,
    /// This rank, and how many the launcher says it started.
    pub rank: usize,
    pub n_ranks: usize,
    /// An operation without progress for so long is given up, and names who is missing.
    pub limit: Duration,
    pub record: Record,
}

/// One process' end of the group.
pub struct MpiComm {
    rank: usize,
    n_ranks: usize,
    n_launched: usize,
    /// Of every rank that is left, spare ones among them, the number that it began with.
    numbers: Vec<usize>,
    limit: Duration,
    /// The thread that speaks MPI, which wants always the same one.
    jobs: Sender<(Job, Sender<Reply>)>,
    /// What is being sent. Kept, since fresh memory costs as much as sending it.
    outbox: RefCell<Arc<[f32]>>,
    spare: Spare,
    sent: Sent,
}

impl MpiComm {
    /// Joins the ranks that were started with this process.
    ///
    /// Errors: there is no library; it is not the launcher's; others do not come within the limit.
    pub fn join(settings: MpiSettings) -> Result<MpiComm, CommError> {
        let (joined, answer) = channel();
        let (jobs, todo) = channel();
        let (limit, waiting, launched) = (settings.limit, settings.rank, settings.n_ranks);
        let (spare, sent) = (Spare::default(), Sent::new(launched));
        let MpiSettings { libraries, record, .. } = settings;
        let shared = (spare.clone(), sent.clone());
        std::thread::spawn(move || {
            record.begin("join");
            let world = World::join(&libraries).map_err(failed("joining the other ranks"));
            record.end();
            let world = world.and_then(|world| check(world, launched));
            match world {
                Ok(world) => {
                    let (spare, sent) = shared;
                    let numbers = (0..world.n_ranks()).collect();
                    let (n_ranks, loss) = (world.n_ranks(), Loss::None);
                    let posted = Posted::default();
                    let post = Post { world, n_ranks, numbers, loss, limit, record, spare, sent, posted };
                    if joined.send(Ok((post.world.rank(), post.world.n_ranks()))).is_ok() {
                        speak(post, &todo);
                    }
                }
                Err(error) => drop(joined.send(Err(error))),
            }
        });
        let (rank, n_ranks) = match answer.recv_timeout(limit) {
            Ok(joined) => joined?,
            Err(RecvTimeoutError::Disconnected) => return Err(CommError::ThreadStopped),
            Err(RecvTimeoutError::Timeout) => {
                let (seconds, operation) = (limit.as_secs(), "join");
                return Err(CommError::TimedOut { waiting, seconds, operation, missing: Vec::new() });
            }
        };
        let (outbox, numbers) = (RefCell::new(Arc::from([])), (0..n_ranks).collect());
        Ok(MpiComm { rank, n_ranks, n_launched: launched, numbers, limit, jobs, outbox, spare, sent })
    }

    /// Another end of the same rank, which speaks through the same thread.
    pub fn again(&self) -> MpiComm {
        let outbox = RefCell::new(Arc::from([]));
        let MpiComm { rank, n_ranks, n_launched, limit, .. } = *self;
        let (jobs, spare, sent) = (self.jobs.clone(), self.spare.clone(), self.sent.clone());
        MpiComm { rank, n_ranks, n_launched, numbers: self.numbers.clone(), limit, jobs, outbox, spare, sent }
    }

    /// After [`CommError::RanksLost`]: the group of those that are left, once each of them has come here. It has any number
    /// of ranks, so it can say things to each other, and sums only after [`MpiComm::narrow`].
    ///
    /// Errors: the launcher or the library ends all ranks with the first; one that is left does not come within the limit.
    pub fn regroup(&mut self) -> Result<(), CommError> {
        let replies = self.ask(Job::Regroup)?;
        loop {
            match self.patiently(&replies, "regroup")? {
                Reply::Left(rank, numbers) => (self.rank, self.numbers) = (rank, numbers),
                Reply::Done(done) => {
                    done?;
                    self.n_ranks = self.numbers.len();
                    return Ok(());
                }
                Reply::Values(..) | Reply::Bytes(_) | Reply::Parted => {}
            }
        }
    }

    /// From now on the group is the first so many of those that are left; the others, spare, can only leave, which waits
    /// until all do.
    pub fn narrow(&mut self, n_ranks: usize) -> Result<(), CommError> {
        assert!(n_ranks <= self.numbers.len(), "{n_ranks} of {}", self.numbers.len());
        self.fill(&self.ask(Job::Narrow(n_ranks))?, &mut [])?;
        self.n_ranks = n_ranks;
        Ok(())
    }

    pub fn is_spare(&self) -> bool {
        self.rank >= self.n_ranks
    }

    /// Of every rank that is left, spare ones among them, the number that it began with.
    pub fn numbers(&self) -> &[usize] {
        &self.numbers
    }

    /// The next reply of an operation that waits inside of MPI, which has no limit of its own.
    fn patiently(&self, replies: &Receiver<Reply>, operation: &'static str) -> Result<Reply, CommError> {
        replies.recv_timeout(2 * self.limit).map_err(|error| match error {
            RecvTimeoutError::Disconnected => CommError::ThreadStopped,
            RecvTimeoutError::Timeout => {
                let (waiting, seconds) = (self.numbers[self.rank], 2 * self.limit.as_secs());
                CommError::TimedOut { waiting, seconds, operation, missing: Vec::new() }
            }
        })
    }

    /// What MPI's own end came to. `None`: where ranks were lost the launcher may wait for the dead ones for ever, and then
    /// this one ends without it. All have agreed that they are at the end: nothing depends on it.
    fn farewell(&self, replies: &Receiver<Reply>) -> Result<Option<Reply>, CommError> {
        if self.numbers.len() == self.n_launched {
            return self.patiently(replies, "leave").map(Some);
        }
        match replies.recv_timeout(FAREWELL) {
            Ok(reply) => Ok(Some(reply)),
            Err(RecvTimeoutError::Disconnected) => Err(CommError::ThreadStopped),
            Err(RecvTimeoutError::Timeout) => Ok(None),
        }
    }

    /// The sum that the MPI library takes itself, in its own order: what ours is measured against.
    pub fn library_sum(&self, values: &mut [f32]) -> Result<(), CommError> {
        let replies = self.ask(Job::LibrarySum(values.to_vec()))?;
        self.fill(&replies, values)
    }

    fn ask(&self, job: Job) -> Result<Receiver<Reply>, CommError> {
        let (replies, answers) = channel();
        self.jobs.send((job, replies)).map_err(|_| CommError::ThreadStopped)?;
        Ok(answers)
    }

    /// Puts what comes where it belongs, until the job is done.
    fn fill(&self, replies: &Receiver<Reply>, values: &mut [f32]) -> Result<(), CommError> {
        loop {
            match replies.recv().map_err(|_| CommError::ThreadStopped)? {
                Reply::Values(at, piece) => {
                    values[at..at + piece.len()].copy_from_slice(&piece);
                    self.spare.put(piece);
                }
                Reply::Bytes(_) | Reply::Left(..) | Reply::Parted => {}
                Reply::Done(done) => return done.map(drop),
            }
        }
    }

    /// A copy of `values` to send, and its length: the memory may be longer.
    fn outgoing(&self, values: &[f32]) -> (Arc<[f32]>, usize) {
        let mut outbox = self.outbox.borrow_mut();
        match Arc::get_mut(&mut outbox).filter(|kept| kept.len() >= values.len()) {
            Some(kept) => kept[..values.len()].copy_from_slice(values),
            None => *outbox = Arc::from(values),
        }
        (outbox.clone(), values.len())
    }
}

/// Does jobs until the rank is gone or something went wrong: then messages may be anywhere, and nothing more is said but to
/// find those that are left, where that can be done. Whatever else was begun ends with the same error.
fn speak(mut post: Post, todo: &Receiver<(Job, Sender<Reply>)>) {
    let mut given_up = None;
    while let Some((job, replies)) = next(&mut post, todo) {
        let (is_last, is_regroup) = (matches!(job, Job::Leave), matches!(job, Job::Regroup));
        let done = match (&given_up, post.loss) {
            (Some(missed), _) => Err(post.timed_out(job.operation(), Vec::clone(missed))),
            (None, Loss::Known | Loss::Agreed) if !is_regroup => Err(post.lost(job.operation())),
            _ => post.work(job, &replies),
        };
        if is_last && done.is_ok() {
            drop(replies.send(Reply::Parted));
            drop(replies.send(Reply::Done(post.world.leave().map(|()| 0.0).map_err(failed("leaving")))));
            return;
        }
        let goes_on = match &done {
            Ok(_) => true,
            Err(CommError::RanksLost { .. }) => post.learn_of_loss(),
            Err(CommError::TimedOut { missing, .. }) => {
                given_up = Some(missing.clone());
                true
            }
            Err(_) => false,
        };
        // Whoever began it may not wait for it any more, once something went wrong.
        let is_heard = replies.send(Reply::Done(done)).is_ok();
        if !(goes_on && (is_heard || given_up.is_some() || post.loss != Loss::None)) {
            return;
        }
    }
}

/// The next job; until there is one, sees to what was posted. `None`: the rank is gone.
fn next(post: &mut Post, todo: &Receiver<(Job, Sender<Reply>)>) -> Option<(Job, Sender<Reply>)> {
    // One that fails does so again in the next job, which says so.
    while post.push_posted().unwrap_or(false) {
        match todo.recv_timeout(NAP) {
            Err(RecvTimeoutError::Timeout) => {}
            job => return job.ok(),
        }
    }
    todo.recv().ok()
}

fn check(world: World, launched: usize) -> Result<World, CommError> {
    let (n_ranks, library) = (world.n_ranks(), world.library());
    if n_ranks == launched {
        return Ok(world);
    }
    // All ranks see the same: they part in order, and each says why.
    world.leave().map_err(failed("leaving"))?;
    Err(CommError::OtherLibrary { launched, seen: n_ranks, library })
}

impl Comm for MpiComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.all_gather_bytes(&[]).map(drop)
    }

    fn reduce_scatter_tree(&self, values: &mut [f32]) -> Result<(), CommError> {
        if self.n_ranks == 1 {
            return Ok(());
        }
        let (mine, len) = self.outgoing(values);
        let replies = self.ask(Job::ReduceScatter(mine, Shards::even(len, self.n_ranks)))?;
        self.fill(&replies, values)
    }

    fn all_gather_shards(&self, values: &mut [f32]) -> Result<(), CommError> {
        if self.n_ranks == 1 {
            return Ok(());
        }
        let shards = Shards::even(values.len(), self.n_ranks);
        let (shard, _) = self.outgoing(&values[shards.of(self.rank)[0].clone()]);
        let replies = self.ask(Job::GatherShards(shard, shards))?;
        self.fill(&replies, values)
    }

    fn begin(&self, beside: Beside, values: Arc<[f32]>, shards: Shards) -> Result<Pending, CommError> {
        if self.n_ranks == 1 {
            return Ok(Pending::there(beside, values, shards));
        }
        let replies = self.ask(beside.job(values, shards))?;
        Ok(Pending::coming(replies, self.spare.clone()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let replies = self.ask(Job::GatherBytes(bytes.to_vec()))?;
        let mut all = Vec::new();
        loop {
            match replies.recv().map_err(|_| CommError::ThreadStopped)? {
                Reply::Bytes(bytes) => all = bytes,
                Reply::Values(..) | Reply::Left(..) | Reply::Parted => {}
                Reply::Done(done) => return done.map(|_| all),
            }
        }
    }

    // On many nodes a tree would spare rank 0's link; this is used once a run.
    fn broadcast(&self, values: &mut [f32]) -> Result<(), CommError> {
        if self.rank > 0 {
            return self.receive(0, values);
        }
        (1..self.n_ranks).try_for_each(|to| self.send(to, values))
    }

    /// Returns when MPI has taken it, which may be when the other receives it.
    fn send(&self, to: usize, values: &[f32]) -> Result<(), CommError> {
        let (mine, len) = self.outgoing(values);
        let replies = self.ask(Job::Send(to, mine, len))?;
        self.fill(&replies, &mut [])
    }

    fn post(&self, to: usize, (values, len): (Arc<[f32]>, usize)) -> Result<(), CommError> {
        let replies = self.ask(Job::Post(to, values, len))?;
        self.fill(&replies, &mut [])
    }

    fn receive(&self, from: usize, values: &mut [f32]) -> Result<(), CommError> {
        let replies = self.ask(Job::Receive(from, values.len()))?;
        self.fill(&replies, values)
    }

    fn sent_to(&self) -> Vec<u64> {
        self.sent.by_rank()
    }

    fn leave(&self) -> Result<(), CommError> {
        let replies = self.ask(Job::Leave)?;
        let mut parted = false;
        loop {
            let reply = match (parted, self.is_spare()) {
                // For as long as the others train. Should they hang, their end is the end of the job.
                (false, true) => replies.recv().map_err(|_| CommError::ThreadStopped)?,
                // The end is said inside of MPI, which has no limit of its own.
                (false, false) => self.patiently(&replies, "leave")?,
                (true, _) => match self.farewell(&replies)? {
                    Some(reply) => reply,
                    None => return Ok(()),
                },
            };
            match reply {
                Reply::Done(done) => return done.map(drop),
                Reply::Parted => parted = true,
                Reply::Values(..) | Reply::Bytes(_) | Reply::Left(..) => {}
            }
        }
    }
}
