//! Ranks that are threads of one process.
//!
//! Every rank owns a slot that the others read between two barriers. An all-reduce is a reduce-scatter
//! (each rank sums its shard of the slots in tree order) and an all-gather (each rank copies the shards
//! of all): every value is read `n_ranks` times whatever the number of ranks, and nobody waits for a root.

use std::cell::{Cell, OnceCell};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::pending::{Beside, Pending};
use crate::post::{Job, Reply, Spare};
use crate::sent::Sent;
use crate::tree::Shards;
use crate::{Comm, CommError};

/// How long a rank waits for the others before it gives the group up. Longer than any step, evaluation or
/// checkpoint that another rank may be busy with.
const WAIT_MAX: Duration = Duration::from_secs(600);

/// Values that are summed between two replies: 1 MiB.
const PIECE_LEN: usize = 256 << 10;

/// A group of `n_ranks` ranks; each element is moved into the thread that runs that rank.
///
/// Errors: there are none.
pub fn threads(n_ranks: usize) -> Result<Vec<ThreadComm>, CommError> {
    if n_ranks == 0 {
        return Err(CommError::NoRanks);
    }
    let [group, beside] = [0, 1].map(|_| Arc::new(Group::new(n_ranks)));
    let comm = |rank| {
        let (sent, jobs) = (Sent::new(n_ranks), OnceCell::new());
        let member = Member { rank, group: group.clone(), sent: sent.clone() };
        let beside = Member { rank, group: beside.clone(), sent };
        ThreadComm { member, beside: Cell::new(Some(beside)), jobs }
    };
    Ok((0..n_ranks).map(comm).collect())
}

/// One thread's end of the group.
pub struct ThreadComm {
    member: Member,
    /// The end of a second group, for what goes on beside: moves into a thread of its own once it is needed.
    beside: Cell<Option<Member>>,
    jobs: OnceCell<Sender<(Job, Sender<Reply>)>>,
}

/// A rank in one of its groups.
struct Member {
    rank: usize,
    group: Arc<Group>,
    sent: Sent,
}

struct Group {
    meeting: Mutex<Meeting>,
    changed: Condvar,
    /// What each rank brings to a reduction.
    slots: Vec<RwLock<Vec<f32>>>,
    gathered: Vec<RwLock<Vec<u8>>>,
    mail: Mutex<VecDeque<Letter>>,
}

/// Values from one rank to another.
struct Letter {
    from: usize,
    to: usize,
    values: Vec<f32>,
}

/// Who has arrived at the current barrier.
struct Meeting {
    generation: u64,
    arrived: Vec<bool>,
    /// A rank that went away; nobody can be waited for any more.
    stopped: Option<usize>,
    /// Every rank that went away.
    gone: Vec<bool>,
}

impl Group {
    fn new(n_ranks: usize) -> Group {
        Group {
            meeting: Mutex::new(Meeting {
                generation: 0,
                arrived: vec![false; n_ranks],
                stopped: None,
                gone: vec![false; n_ranks],
            }),
            changed: Condvar::new(),
            slots: (0..n_ranks).map(|_| RwLock::default()).collect(),
            gathered: (0..n_ranks).map(|_| RwLock::default()).collect(),
            mail: Mutex::default(),
        }
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        // A panicking rank is reported through `stopped`, so the lock's own poison says nothing new.
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mail(&self) -> MutexGuard<'_, VecDeque<Letter>> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meet(&self, rank: usize, operation: &'static str) -> Result<(), CommError> {
        let mut meeting = self.meeting();
        let generation = meeting.generation;
        meeting.arrived[rank] = true;
        if meeting.arrived.iter().all(|a| *a) {
            meeting.arrived.fill(false);
            meeting.generation += 1;
            self.changed.notify_all();
            return Ok(());
        }
        let deadline = Instant::now() + WAIT_MAX;
        while meeting.generation == generation {
            if let Some(stopped) = meeting.stopped {
                return Err(CommError::RankStopped { rank: stopped, waiting: rank, operation });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = (0..meeting.arrived.len()).filter(|r| !meeting.arrived[*r]).collect();
                let seconds = WAIT_MAX.as_secs();
                return Err(CommError::TimedOut { waiting: rank, seconds, operation, missing });
            }
            meeting = self.changed.wait_timeout(meeting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Member {
    /// A rank that leaves, by its end or by a panic, frees those that wait for it.
    fn drop(&mut self) {
        let mut meeting = self.group.meeting();
        meeting.stopped = Some(self.rank);
        meeting.gone[self.rank] = true;
        drop(meeting);
        self.group.changed.notify_all();
    }
}

impl Member {
    fn n_ranks(&self) -> usize {
        self.group.slots.len()
    }

    fn meet(&self, operation: &'static str) -> Result<(), CommError> {
        self.group.meet(self.rank, operation)
    }

    /// Lays values out for the others, of which each reads a share, or all.
    fn bring(&self, values: &[f32], share_of: usize) {
        self.count(size_of_val(values) / share_of);
        set(&self.group.slots[self.rank], values);
    }

    /// So many bytes are read by each of the others.
    fn count(&self, n_bytes: usize) {
        for other in (0..self.n_ranks()).filter(|other| *other != self.rank) {
            self.sent.add(other, n_bytes);
        }
    }

    /// Sums what all have brought, of this rank's shard.
    fn sum_brought(
        &self,
        (shards, len): (&Shards, usize),
        values: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), CommError> {
        let operation = "reduce_scatter";
        self.meet(operation)?;
        {
            let slots: Vec<_> = self.group.slots.iter().map(read).collect();
            for (rank, slot) in slots.iter().enumerate() {
                self.check_len(operation, rank, slot.len(), len)?;
            }
            let mut sums = Vec::new();
            for (own, _) in shards.pieces(self.rank, PIECE_LEN) {
                let parts: Vec<&[f32]> = slots.iter().map(|slot| &slot[own.clone()]).collect();
                sums.resize(own.len(), 0.0);
                shards.sums(&own, &parts, &mut |at, sum| {
                    sum.write(&mut sums);
                    values(at, &sums);
                });
            }
        }
        // Nobody may overwrite what another rank still sums.
        self.meet(operation)
    }

    /// Takes what all others have brought of their shards.
    fn take_brought(&self, shards: &Shards, values: &mut dyn FnMut(usize, &[f32])) -> Result<(), CommError> {
        let operation = "all_gather_shards";
        self.meet(operation)?;
        for (rank, slot) in self.group.slots.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
            let slot = read(slot);
            self.check_len(operation, rank, slot.len(), shards.len_of(rank))?;
            for (theirs, at) in shards.pieces(rank, PIECE_LEN) {
                values(theirs.start, &slot[at..at + theirs.len()]);
            }
        }
        self.meet(operation)
    }

    /// Does one job beside the rank's own work.
    fn work(&self, job: Job, replies: &Sender<Reply>) -> Result<f64, CommError> {
        let begun = Instant::now();
        let mut values = |at: usize, piece: &[f32]| drop(replies.send(Reply::Values(at, piece.into())));
        match job {
            Job::ReduceScatter(mine, shards) => {
                let len = shards.end();
                self.bring(&mine[..len], self.n_ranks());
                self.sum_brought((&shards, len), &mut values)?;
            }
            Job::GatherShards(shard, shards) => {
                self.bring(&shard[..shards.len_of(self.rank)], 1);
                self.take_brought(&shards, &mut values)?;
            }
            Job::AllReduce(mine, shards) => {
                let len = shards.end();
                let mut own = Vec::with_capacity(shards.len_of(self.rank));
                self.bring(&mine[..len], self.n_ranks());
                let mut keep = |at: usize, piece: &[f32]| {
                    own.extend(piece);
                    values(at, piece);
                };
                self.sum_brought((&shards, len), &mut keep)?;
                self.bring(&own, 1);
                self.take_brought(&shards, &mut values)?;
            }
            other => unreachable!("{} does not go on beside", other.operation()),
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    fn check_len(
        &self,
        operation: &'static str,
        rank: usize,
        got: usize,
        expected: usize,
    ) -> Result<(), CommError> {
        if got == expected {
            return Ok(());
        }
        Err(CommError::LengthDiffers { operation, rank, waiting: self.rank, got, expected })
    }
}

/// Does jobs until its rank is gone, or one fails.
fn work_beside(member: &Member, todo: &Receiver<(Job, Sender<Reply>)>) {
    while let Ok((job, replies)) = todo.recv() {
        let done = member.work(job, &replies);
        let failed = done.is_err();
        if replies.send(Reply::Done(done)).is_err() || failed {
            return;
        }
    }
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn set<T: Copy>(slot: &RwLock<Vec<T>>, values: &[T]) {
    let mut slot = write(slot);
    slot.clear();
    slot.extend_from_slice(values);
}

impl Comm for ThreadComm {
    fn rank(&self) -> usize {
        self.member.rank
    }

    fn n_ranks(&self) -> usize {
        self.member.n_ranks()
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.member.meet("barrier")
    }

    fn reduce_scatter_tree(&self, values: &mut [f32]) -> Result<(), CommError> {
        if self.n_ranks() == 1 {
            return Ok(());
        }
        self.member.bring(values, self.n_ranks());
        let (shards, len) = (Shards::even(values.len(), self.n_ranks()), values.len());
        let mut put = |at: usize, piece: &[f32]| values[at..at + piece.len()].copy_from_slice(piece);
        self.member.sum_brought((&shards, len), &mut put)
    }

    fn all_gather_shards(&self, values: &mut [f32]) -> Result<(), CommError> {
        if self.n_ranks() == 1 {
            return Ok(());
        }
        let shards = Shards::even(values.len(), self.n_ranks());
        self.member.bring(&values[shards.of(self.rank())[0].clone()], 1);
        let mut put = |at: usize, piece: &[f32]| values[at..at + piece.len()].copy_from_slice(piece);
        self.member.take_brought(&shards, &mut put)
    }

    fn begin(&self, beside: Beside, values: Arc<[f32]>, shards: Shards) -> Result<Pending, CommError> {
        if self.n_ranks() == 1 {
            return Ok(Pending::there(beside, values, shards));
        }
        let jobs = self.jobs.get_or_init(|| {
            let (jobs, todo) = channel();
            if let Some(member) = self.beside.take() {
                std::thread::spawn(move || work_beside(&member, &todo));
            }
            jobs
        });
        let (replies, coming) = channel();
        jobs.send((beside.job(values, shards), replies)).map_err(|_| CommError::ThreadStopped)?;
        Ok(Pending::coming(coming, Spare::default()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let operation = "all_gather";
        self.member.count(bytes.len());
        set(&self.member.group.gathered[self.member.rank], bytes);
        self.member.meet(operation)?;
        let all = self.member.group.gathered.iter().map(|part| read(part).clone()).collect();
        self.member.meet(operation)?;
        Ok(all)
    }

    fn broadcast(&self, values: &mut [f32]) -> Result<(), CommError> {
        let operation = "broadcast";
        if self.member.rank == 0 {
            self.member.bring(values, 1);
        }
        self.member.meet(operation)?;
        {
            let root = read(&self.member.group.slots[0]);
            self.member.check_len(operation, 0, root.len(), values.len())?;
            values.copy_from_slice(&root);
        }
        self.member.meet(operation)
    }

    fn send(&self, to: usize, values: &[f32]) -> Result<(), CommError> {
        self.member.sent.add(to, size_of_val(values));
        let mut mail = self.member.group.mail();
        mail.push_back(Letter { from: self.member.rank, to, values: values.to_vec() });
        drop(mail);
        // Whoever has looked in vain and waits in a moment is waiting once this is free.
        drop(self.member.group.meeting());
        self.member.group.changed.notify_all();
        Ok(())
    }

    fn post(&self, to: usize, (values, len): (Arc<[f32]>, usize)) -> Result<(), CommError> {
        // Between threads nothing waits for whoever is to have it.
        self.send(to, &values[..len])
    }

    fn receive(&self, from: usize, values: &mut [f32]) -> Result<(), CommError> {
        let (operation, deadline) = ("receive", Instant::now() + WAIT_MAX);
        let mut meeting = self.member.group.meeting();
        loop {
            let mut mail = self.member.group.mail();
            let is_ours = |letter: &Letter| letter.from == from && letter.to == self.member.rank;
            if let Some(letter) = mail.iter().position(is_ours).and_then(|at| mail.remove(at)) {
                self.member.check_len(operation, from, letter.values.len(), values.len())?;
                values.copy_from_slice(&letter.values);
                return Ok(());
            }
            drop(mail);
            // What others have sent before they went is there.
            if meeting.gone[from] {
                return Err(CommError::RankStopped { rank: from, waiting: self.member.rank, operation });
            }
            if Instant::now() > deadline {
                let (waiting, seconds) = (self.member.rank, WAIT_MAX.as_secs());
                return Err(CommError::TimedOut { waiting, seconds, operation, missing: vec![from] });
            }
            // A letter may be put down just before the wait begins: never wait long.
            let tick = Duration::from_millis(10);
            meeting = self
                .member
                .group
                .changed
                .wait_timeout(meeting, tick)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Threads share memory: what they read of each other counts as sent.
    fn sent_to(&self) -> Vec<u64> {
        self.member.sent.by_rank()
    }

    fn leave(&self) -> Result<(), CommError> {
        self.barrier()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `rank_main` on every rank of a group and returns what each gave back.
    fn on_ranks<T: Send>(n_ranks: usize, rank_main: impl Fn(ThreadComm) -> T + Sync) -> Vec<T> {
        let group = threads(n_ranks).unwrap();
        std::thread::scope(|scope| {
            let running: Vec<_> = group.into_iter().map(|comm| scope.spawn(|| rank_main(comm))).collect();
            running.into_iter().map(|r| r.join().unwrap()).collect()
        })
    }

    #[test]
    fn all_reduce_sums_on_every_rank() {
        for n_ranks in [1, 2, 3, 4, 7, 8] {
            for len in [0, 1, 3, 1000] {
                let sums = on_ranks(n_ranks, |comm| {
                    let mut last = Vec::new();
                    for round in 0..5 {
                        last = (0..len).map(|i| (comm.rank() * i + round) as f32).collect();
                        comm.all_reduce_tree(&mut last).unwrap();
                    }
                    last
                });
                let ranks: usize = (0..n_ranks).sum();
                let expected: Vec<f32> = (0..len).map(|i| (ranks * i + 4 * n_ranks) as f32).collect();
                assert!(sums.iter().all(|s| *s == expected), "{n_ranks} ranks, {len} values");
            }
        }
    }

    #[test]
    fn gather_and_broadcast() {
        let all = on_ranks(4, |comm| {
            let mut values = [comm.rank() as f32 + 7.0; 3];
            comm.broadcast(&mut values).unwrap();
            (values, comm.all_gather(&[comm.rank() as f64]).unwrap())
        });
        assert!(all.iter().all(|(v, g)| *v == [7.0; 3] && *g == [0.0, 1.0, 2.0, 3.0]));
    }

    #[test]
    fn a_rank_that_leaves_frees_the_others() {
        let results = on_ranks(4, |comm| match comm.rank() {
            2 => None,
            _ => Some(comm.barrier()),
        });
        for result in results.into_iter().flatten() {
            assert!(matches!(result, Err(CommError::RankStopped { rank: _, .. })), "{result:?}");
        }
    }

    #[test]
    fn different_lengths_are_named() {
        let results = on_ranks(2, |comm| comm.all_reduce_tree(&mut vec![0.0; 4 + comm.rank()]));
        assert!(results.iter().any(|r| matches!(r, Err(CommError::LengthDiffers { .. }))), "{results:?}");
    }

    #[test]
    fn no_ranks_are_refused() {
        assert!(matches!(threads(0), Err(CommError::NoRanks)));
    }
}
