//! The thread that speaks MPI for a rank: messages in flight, a few at a time, and patience that ends.
//!
//! Nothing here waits inside MPI, which on a cut link is for ever: messages are started, asked after, and given up.

mod loss;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mpi::{Request, Test, World};

pub(crate) use self::loss::Loss;
use crate::sent::Sent;
use crate::tree::Shards;
use crate::{BYTES_MAX, CommError, Record, pieces};

/// Values of one message: 1 MiB. Large enough that its overhead does not count, small enough to be summed in the cache
/// while the next ones travel.
const PIECE_LEN: usize = 256 << 10;
/// Pieces that are under way with every other rank. 8 MiB of memory a rank.
const WINDOW: usize = 8;
/// How often it is asked in vain before the thread sleeps between questions.
const ASKS_MAX: u32 = 2000;
pub(crate) const NAP: Duration = Duration::from_micros(50);

/// What a rank asks its thread to do.
pub(crate) enum Job {
    ReduceScatter(Arc<[f32]>, Shards),
    GatherShards(Arc<[f32]>, Shards),
    AllReduce(Arc<[f32]>, Shards),
    GatherBytes(Vec<u8>),
    Send(usize, Arc<[f32]>, usize),
    /// A send that is not waited for.
    Post(usize, Arc<[f32]>, usize),
    Receive(usize, usize),
    /// MPI's own sum, for comparison.
    LibrarySum(Vec<f32>),
    /// After ranks were lost: finds those that are left.
    Regroup,
    /// From now on the first so many are the group; the others are spare.
    Narrow(usize),
    Leave,
}

/// What comes back: pieces as they are there, and then how it ended.
pub(crate) enum Reply {
    Values(usize, Box<[f32]>),
    Bytes(Vec<Vec<u8>>),
    /// Which of those that are left this rank is, and of each the number that it began with.
    Left(usize, Vec<usize>),
    /// All have come to the end; what follows is MPI's own.
    Parted,
    /// With the seconds that it took.
    Done(Result<f64, CommError>),
}

/// Buffers to receive into, shared with the rank that empties them.
#[derive(Clone, Default)]
pub(crate) struct Spare(Arc<Mutex<Vec<Box<[f32]>>>>);

impl Spare {
    pub(crate) fn put(&self, buffer: Box<[f32]>) {
        if buffer.len() == PIECE_LEN {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }

    fn take(&self, len: usize) -> Box<[f32]> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let kept = if len == PIECE_LEN { kept() } else { None };
        kept.unwrap_or_else(|| vec![0.0; len].into_boxed_slice())
    }
}

pub(crate) struct Post {
    pub(crate) world: World,
    /// The group: the first so many of the world. The others are spare, and only wait.
    pub(crate) n_ranks: usize,
    /// Of every rank of the world, the number that it began with.
    pub(crate) numbers: Vec<usize>,
    /// How far ranks that were lost have been dealt with.
    pub(crate) loss: Loss,
    /// Without any progress for so long, an operation is given up.
    pub(crate) limit: Duration,
    pub(crate) record: Record,
    pub(crate) spare: Spare,
    pub(crate) sent: Sent,
    pub(crate) posted: Posted,
}

/// Messages that nobody waits for, but who they are for.
pub(crate) struct Posted {
    flights: VecDeque<Flight>,
    /// When one of them was last begun or received.
    progress: Instant,
}

impl Default for Posted {
    fn default() -> Posted {
        Posted { flights: VecDeque::new(), progress: Instant::now() }
    }
}

/// A message under way.
struct Flight {
    peer: usize,
    request: Request,
    landed: Option<Test>,
}

/// The messages of one step of an operation.
type Flights = Vec<Flight>;

impl Post {
    /// Does one job; says how it ended.
    pub(crate) fn work(&mut self, job: Job, replies: &Sender<Reply>) -> Result<f64, CommError> {
        let begun = Instant::now();
        self.record.begin(job.operation());
        // A rank that is gone takes no replies: nothing is lost.
        let mut values = |at, piece| drop(replies.send(Reply::Values(at, piece)));
        match job {
            Job::ReduceScatter(mine, shards) => self.reduce_scatter((&mine, &shards), &mut values)?,
            Job::GatherShards(shard, shards) => self.gather_shards((&shard, &shards), &mut values)?,
            Job::AllReduce(mine, shards) => {
                let mut sums: Vec<f32> = Vec::with_capacity(shards.len_of(self.world.rank()));
                let mut keep = |at, piece: Box<[f32]>| {
                    sums.extend(&piece);
                    values(at, piece);
                };
                self.reduce_scatter((&mine, &shards), &mut keep)?;
                self.gather_shards((&sums.into(), &shards), &mut values)?;
            }
            Job::GatherBytes(bytes) => drop(replies.send(Reply::Bytes(self.gather_bytes(&bytes)?))),
            Job::Send(to, mine, len) => self.send(to, (&mine, len))?,
            Job::Post(to, mine, len) => self.post(to, (&mine, len))?,
            Job::Receive(from, len) => self.receive((from, len), &mut values)?,
            Job::LibrarySum(mine) => {
                let sums = self.world.all_reduce_of_the_library(&mine).map_err(failed("library_sum"))?;
                values(0, sums.into());
            }
            Job::Regroup => self.regroup(replies)?,
            Job::Narrow(n_ranks) => self.n_ranks = n_ranks,
            Job::Leave => self.part()?,
        }
        self.record.end();
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Every rank's shard in pieces, and in how many steps the longest is sent.
    fn cut(&self, shards: &Shards) -> (Pieces, usize) {
        let pieces: Pieces = (0..self.n_ranks).map(|rank| shards.pieces(rank, PIECE_LEN)).collect();
        let n_steps = pieces.iter().map(Vec::len).max().unwrap_or(0);
        (pieces, n_steps)
    }

    fn others(&self) -> Vec<usize> {
        (0..self.n_ranks).filter(|rank| *rank != self.world.rank()).collect()
    }

    /// Gives `values` the pieces of this rank's shard of the sum. Every rank sends every other one its part of that one's
    /// shard; whoever owns a shard sums its parts in the order of [`crate::tree`].
    fn reduce_scatter(
        &mut self,
        (mine, shards): (&Arc<[f32]>, &Shards),
        values: &mut dyn FnMut(usize, Box<[f32]>),
    ) -> Result<(), CommError> {
        let (rank, whole) = (self.world.rank(), shards);
        let (shards, n_steps) = self.cut(shards);
        let others = self.others();
        let operation = "reduce_scatter";
        let start = &mut |post: &mut Post, step: usize| {
            let mut flights = Vec::new();
            for peer in &others {
                if let Some((own, _)) = shards[rank].get(step) {
                    flights.push(post.receive_from(*peer, (operation, REDUCE), own.len())?);
                }
                if let Some((theirs, _)) = shards[*peer].get(step) {
                    flights.push(post.send_to(*peer, (operation, REDUCE), (mine, theirs.clone()))?);
                }
            }
            Ok(flights)
        };
        let landed = &mut |post: &mut Post, step: usize, flights: Flights| {
            let Some((own, _)) = shards[rank].get(step) else { return };
            let received = received(flights);
            let mut parts: Vec<&[f32]> = received.iter().map(|(_, piece)| &piece[..]).collect();
            parts.insert(rank, &mine[own.clone()]);
            whole.sums(own, &parts, &mut |at, sum| {
                let mut summed = post.spare.take(own.len());
                sum.write(&mut summed);
                values(at, summed);
            });
            received.into_iter().for_each(|(_, piece)| post.spare.put(piece));
        };
        self.carry_out(operation, n_steps, start, landed)
    }

    /// Sends this rank's shard to all, gives `values` the pieces of theirs.
    fn gather_shards(
        &mut self,
        (shard, shards): (&Arc<[f32]>, &Shards),
        values: &mut dyn FnMut(usize, Box<[f32]>),
    ) -> Result<(), CommError> {
        let rank = self.world.rank();
        let (shards, n_steps) = self.cut(shards);
        let others = self.others();
        let operation = "all_gather_shards";
        let start = &mut |post: &mut Post, step: usize| {
            let mut flights = Vec::new();
            for peer in &others {
                if let Some((theirs, _)) = shards[*peer].get(step) {
                    flights.push(post.receive_from(*peer, (operation, GATHER), theirs.len())?);
                }
                if let Some((own, at)) = shards[rank].get(step) {
                    let part = *at..at + own.len();
                    flights.push(post.send_to(*peer, (operation, GATHER), (shard, part))?);
                }
            }
            Ok(flights)
        };
        let landed = &mut |_: &mut Post, step: usize, flights: Flights| {
            for (peer, piece) in received(flights) {
                values(shards[peer][step].0.start, piece);
            }
        };
        self.carry_out(operation, n_steps, start, landed)
    }

    /// Lengths first, so that what is received is known to be whole.
    fn gather_bytes(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let operation = "all_gather";
        let lens = self.exchange_bytes((operation, LENGTHS), &(own.len() as u64).to_le_bytes(), |_| 8)?;
        let len = |bytes: &Vec<u8>| bytes.first_chunk::<8>().map_or(0, |eight| u64::from_le_bytes(*eight));
        let lens: Vec<u64> = lens.iter().map(len).collect();
        if let Some(rank) = lens.iter().position(|n| *n > BYTES_MAX as u64) {
            return Err(CommError::TooLong { operation, rank, n_bytes: lens[rank] });
        }
        self.exchange_bytes((operation, BYTES), own, |rank| lens[rank] as usize)
    }

    fn exchange_bytes(
        &mut self,
        (operation, tag): (&'static str, u16),
        own: &[u8],
        len_of: impl Fn(usize) -> usize,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let others = self.others();
        let mut all = vec![Vec::new(); self.n_ranks];
        all[self.world.rank()] = own.to_vec();
        let start = &mut |post: &mut Post, _: usize| {
            let mut flights = Vec::new();
            for peer in &others {
                let request =
                    post.world.receive_bytes(*peer, tag, len_of(*peer)).map_err(failed(operation))?;
                flights.push(Flight { peer: *peer, request, landed: None });
                let request = post.world.send_bytes(*peer, tag, own).map_err(failed(operation))?;
                post.sent.add(*peer, own.len());
                flights.push(Flight { peer: *peer, request, landed: None });
            }
            Ok(flights)
        };
        let landed = &mut |_: &mut Post, _: usize, flights: Flights| {
            for flight in flights {
                if let Some(Test::ReceivedBytes(bytes)) = flight.landed {
                    all[flight.peer] = bytes.into_vec();
                }
            }
        };
        self.carry_out(operation, 1, start, landed)?;
        Ok(all)
    }

    fn send(&mut self, to: usize, (mine, len): (&Arc<[f32]>, usize)) -> Result<(), CommError> {
        let parts: Vec<_> = pieces(0..len, PIECE_LEN).collect();
        let start = &mut |post: &mut Post, step: usize| {
            Ok(vec![post.send_to(to, ("send", DIRECT), (mine, parts[step].clone()))?])
        };
        self.carry_out("send", parts.len(), start, &mut |_, _, _| {})
    }

    fn post(&mut self, to: usize, (mine, len): (&Arc<[f32]>, usize)) -> Result<(), CommError> {
        for part in pieces(0..len, PIECE_LEN) {
            let flight = self.send_to(to, ("post", DIRECT), (mine, part))?;
            self.posted.flights.push_back(flight);
        }
        self.posted.progress = Instant::now();
        Ok(())
    }

    /// Sees to what was posted; whether some of it is still under way. MPI may move it only when it is asked after.
    pub(crate) fn push_posted(&mut self) -> Result<bool, CommError> {
        let mut moved = false;
        for flight in &mut self.posted.flights {
            if flight.landed.is_none() {
                match flight.request.test().map_err(failed("post"))? {
                    Test::Pending => {}
                    landed => (flight.landed, moved) = (Some(landed), true),
                }
            }
        }
        self.posted.flights.retain(|flight| flight.landed.is_none());
        if moved {
            self.posted.progress = Instant::now();
        }
        let Some(first) = self.posted.flights.front() else { return Ok(false) };
        if self.posted.progress.elapsed() < self.limit {
            return Ok(true);
        }
        let missing = vec![self.numbers[first.peer]];
        Err(self.timed_out("post", missing))
    }

    fn receive(
        &mut self,
        (from, len): (usize, usize),
        values: &mut dyn FnMut(usize, Box<[f32]>),
    ) -> Result<(), CommError> {
        let parts: Vec<_> = pieces(0..len, PIECE_LEN).collect();
        let start = &mut |post: &mut Post, step: usize| {
            Ok(vec![post.receive_from(from, ("receive", DIRECT), parts[step].len())?])
        };
        let landed = &mut |_: &mut Post, step: usize, flights: Flights| {
            received(flights).into_iter().for_each(|(_, piece)| values(parts[step].start, piece));
        };
        self.carry_out("receive", parts.len(), start, landed)
    }

    fn send_to(
        &mut self,
        peer: usize,
        (operation, tag): (&'static str, u16),
        (values, part): (&Arc<[f32]>, Range<usize>),
    ) -> Result<Flight, CommError> {
        self.sent.add(peer, 4 * part.len());
        let request = self.world.send(peer, tag, (values.clone(), part)).map_err(failed(operation))?;
        Ok(Flight { peer, request, landed: None })
    }

    fn receive_from(
        &mut self,
        peer: usize,
        (operation, tag): (&'static str, u16),
        len: usize,
    ) -> Result<Flight, CommError> {
        let request = self.world.receive(peer, tag, self.spare.take(len)).map_err(failed(operation))?;
        Ok(Flight { peer, request, landed: None })
    }

    /// Takes so many steps, each of some messages, [`WINDOW`] of them at a time and finished in their order.
    fn carry_out(
        &mut self,
        operation: &'static str,
        n_steps: usize,
        start: &mut dyn FnMut(&mut Post, usize) -> Result<Flights, CommError>,
        landed: &mut dyn FnMut(&mut Post, usize, Flights),
    ) -> Result<(), CommError> {
        let mut under_way: VecDeque<Flights> = VecDeque::new();
        let (mut n_started, mut n_done, mut n_asked) = (0, 0, 0);
        let mut progress = Instant::now();
        while n_done < n_steps {
            while n_started < n_steps && under_way.len() < WINDOW {
                under_way.push_back(start(self, n_started)?);
                n_started += 1;
            }
            self.push_posted()?;
            let mut moved = false;
            for flight in under_way.iter_mut().flatten().filter(|flight| flight.landed.is_none()) {
                match flight.request.test().map_err(failed(operation))? {
                    Test::Pending => {}
                    landed => (flight.landed, moved) = (Some(landed), true),
                }
            }
            let is_whole = |flights: &mut Flights| flights.iter().all(|flight| flight.landed.is_some());
            while let Some(flights) = under_way.pop_front_if(is_whole) {
                landed(self, n_done, flights);
                (n_done, moved) = (n_done + 1, true);
            }
            if moved {
                (progress, n_asked) = (Instant::now(), 0);
                continue;
            }
            n_asked += 1;
            self.wait(operation, n_asked, (progress, &under_way))?;
        }
        Ok(())
    }

    /// Between two questions: others may want the core.
    fn wait(
        &self,
        operation: &'static str,
        n_asked: u32,
        (progress, under_way): (Instant, &VecDeque<Flights>),
    ) -> Result<(), CommError> {
        if n_asked < ASKS_MAX {
            std::thread::yield_now();
            return Ok(());
        }
        std::thread::sleep(NAP);
        if !n_asked.is_multiple_of(ASKS_MAX) {
            return Ok(());
        }
        let late = under_way.iter().flatten().filter(|flight| flight.landed.is_none());
        let mut missing: Vec<usize> = late.map(|flight| self.numbers[flight.peer]).collect();
        missing.sort_unstable();
        missing.dedup();
        self.record.waits_for(missing.clone());
        if progress.elapsed() < self.limit {
            return Ok(());
        }
        Err(self.timed_out(operation, missing))
    }

    pub(crate) fn timed_out(&self, operation: &'static str, missing: Vec<usize>) -> CommError {
        let waiting = self.numbers[self.world.rank()];
        CommError::TimedOut { waiting, seconds: self.limit.as_secs(), operation, missing }
    }
}

/// Of every rank the pieces that it owns, and where they lie in what it owns.
type Pieces = Vec<Vec<(Range<usize>, usize)>>;

const LENGTHS: u16 = 1;
const BYTES: u16 = 2;
const REDUCE: u16 = 3;
const GATHER: u16 = 4;
const DIRECT: u16 = 5;

impl Job {
    pub(crate) fn operation(&self) -> &'static str {
        match self {
            Job::ReduceScatter(..) => "reduce_scatter",
            Job::GatherShards(..) => "all_gather_shards",
            Job::AllReduce(..) => "all_reduce",
            Job::GatherBytes(_) => "all_gather",
            Job::Send(..) => "send",
            Job::Post(..) => "post",
            Job::Receive(..) => "receive",
            Job::LibrarySum(_) => "library_sum",
            Job::Regroup => "regroup",
            Job::Narrow(_) => "narrow",
            Job::Leave => "leave",
        }
    }
}

pub(crate) fn failed(operation: &'static str) -> impl Fn(mpi::Error) -> CommError {
    move |source| match source {
        mpi::Error::Lost { .. } => CommError::RanksLost { operation, source },
        _ => CommError::Mpi { operation, source },
    }
}

/// What came, in the order of ranks.
fn received(flights: Flights) -> Vec<(usize, Box<[f32]>)> {
    let piece = |flight: Flight| match flight.landed {
        Some(Test::Received(values)) => Some((flight.peer, values)),
        _ => None,
    };
    flights.into_iter().filter_map(piece).collect()
}
