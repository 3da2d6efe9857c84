//! [`teams`]: some ranks of a group as groups of their own.
//!
//! Everything is said from rank to rank, over whatever connects all of them. That is for a few ranks each; larger groups would
//! want a collective of what carries them.

use std::borrow::Cow;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pending::{Beside, Pending};
use crate::post::{Reply, Spare};
use crate::tree::Shards;
use crate::{BYTES_MAX, Comm, CommError};

/// The rank's ends of three groups: of all; of its team, the `n_team` neighbours that it is one of; and of those that have its
/// place in the other teams.
///
/// Errors: the ranks are no whole number of teams.
pub fn teams(all: Box<dyn Comm>, n_team: usize) -> Result<[Box<dyn Comm>; 3], CommError> {
    let (rank, n_ranks) = (all.rank(), all.n_ranks());
    if n_team == 0 || !n_ranks.is_multiple_of(n_team) {
        return Err(CommError::NoTeams { n_ranks, n_team });
    }
    let (team, place) = (rank / n_team, rank % n_team);
    let all = Arc::new(Mutex::new(all));
    let group = |members: Vec<usize>, own: usize| -> Box<dyn Comm> {
        Box::new(Group { all: all.clone(), members, own })
    };
    let own_team = (team * n_team..(team + 1) * n_team).collect();
    let alike = (place..n_ranks).step_by(n_team).collect();
    Ok([group((0..n_ranks).collect(), rank), group(own_team, place), group(alike, team)])
}

struct Group {
    all: Arc<Mutex<Box<dyn Comm>>>,
    /// Their numbers among all.
    members: Vec<usize>,
    /// Which of them this rank is.
    own: usize,
}

impl Group {
    fn all(&self) -> MutexGuard<'_, Box<dyn Comm>> {
        // Only this rank's own thread takes it.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To and from each other member: what `mine` says it is to have, and as much as `theirs` says it brings. In a round
    /// each has one partner at most, the lower of whom sends first: nobody waits for somebody who waits.
    fn exchange<'a>(
        &self,
        mine: &dyn Fn(usize) -> Cow<'a, [f32]>,
        theirs: &dyn Fn(usize) -> usize,
    ) -> Result<Vec<Vec<f32>>, CommError> {
        let n = self.members.len();
        let mut came = vec![Vec::new(); n];
        // Whose numbers add up to the round's, but for whole circles, are partners: each pair once.
        for other in (0..n).map(|round| (round + n - self.own) % n).filter(|other| *other != self.own) {
            let (all, to) = (self.all(), self.members[other]);
            came[other].resize(theirs(other), 0.0);
            if self.own < other {
                all.send(to, &mine(other))?;
                all.receive(to, &mut came[other])?;
            } else {
                all.receive(to, &mut came[other])?;
                all.send(to, &mine(other))?;
            }
        }
        Ok(came)
    }

    /// Gives `take` the sums of what this rank owns.
    fn reduce(
        &self,
        values: &[f32],
        shards: &Shards,
        take: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), CommError> {
        let part = |rank: usize| -> Cow<[f32]> {
            match shards.of(rank) {
                [one] => Cow::Borrowed(&values[one.clone()]),
                ranges => ranges.iter().flat_map(|range| &values[range.clone()]).copied().collect(),
            }
        };
        let own = shards.len_of(self.own);
        let came = self.exchange(&part, &|_| own)?;
        let mine = part(self.own);
        let mut sums = vec![0.0; own];
        for (range, at) in shards.pieces(self.own, own.max(1)) {
            let of = at..at + range.len();
            let mut parts: Vec<&[f32]> =
                came.iter().map(|part| part.get(of.clone()).unwrap_or(&[])).collect();
            parts[self.own] = &mine[of.clone()];
            shards.sums(&range, &parts, &mut |at, sum| {
                sum.write(&mut sums[of.clone()]);
                take(at, &sums[of.clone()]);
            });
        }
        Ok(())
    }

    /// Gives `take` what the others own, from what this one does.
    fn gather(
        &self,
        own: &[f32],
        shards: &Shards,
        take: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), CommError> {
        let came = self.exchange(&|_| Cow::Borrowed(own), &|other| shards.len_of(other))?;
        for (other, part) in came.iter().enumerate().filter(|(other, _)| *other != self.own) {
            let pieces = shards.pieces(other, part.len().max(1)).into_iter();
            pieces.for_each(|(range, at)| take(range.start, &part[at..at + range.len()]));
        }
        Ok(())
    }
}

impl Comm for Group {
    fn rank(&self) -> usize {
        self.own
    }

    fn n_ranks(&self) -> usize {
        self.members.len()
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.all_gather_bytes(&[]).map(drop)
    }

    fn reduce_scatter_tree(&self, values: &mut [f32]) -> Result<(), CommError> {
        let shards = Shards::even(values.len(), self.n_ranks());
        let mut sums = Vec::new();
        self.reduce(values, &shards, &mut |_, sum| sums.extend(sum))?;
        values[shards.of(self.own)[0].clone()].copy_from_slice(&sums);
        Ok(())
    }

    fn all_gather_shards(&self, values: &mut [f32]) -> Result<(), CommError> {
        let shards = Shards::even(values.len(), self.n_ranks());
        let own = shards.own(self.own, values);
        self.gather(&own, &shards, &mut |at, piece| values[at..at + piece.len()].copy_from_slice(piece))
    }

    /// Nothing goes on beside: it is done when this returns.
    fn begin(&self, beside: Beside, values: Arc<[f32]>, shards: Shards) -> Result<Pending, CommError> {
        if self.n_ranks() == 1 {
            return Ok(Pending::there(beside, values, shards));
        }
        let (replies, coming) = channel();
        // The end of the channel is held here: nothing is lost.
        let mut give = |at: usize, piece: &[f32]| drop(replies.send(Reply::Values(at, piece.into())));
        match beside {
            Beside::Gather => self.gather(&values[..shards.len_of(self.own)], &shards, &mut give)?,
            Beside::ReduceScatter => self.reduce(&values, &shards, &mut give)?,
            Beside::AllReduce => {
                let mut own = Vec::with_capacity(shards.len_of(self.own));
                self.reduce(&values, &shards, &mut |at, sum| {
                    own.extend(sum);
                    give(at, sum);
                })?;
                self.gather(&own, &shards, &mut give)?;
            }
        }
        drop(replies.send(Reply::Done(Ok(0.0))));
        Ok(Pending::coming(coming, Spare::default()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let (operation, rank) = ("all_gather", self.members[self.own]);
        if bytes.len() > BYTES_MAX {
            return Err(CommError::TooLong { operation, rank, n_bytes: bytes.len() as u64 });
        }
        // Bits travel as they are, whatever numbers they would be.
        let len = [f32::from_bits(bytes.len() as u32)];
        let lens = self.exchange(&|_| Cow::Borrowed(&len[..]), &|_| 1)?;
        let len = |other: usize| lens[other].first().map_or(0, |len| len.to_bits() as usize);
        let word = |four: &[u8]| {
            let mut word = [0; 4];
            word[..four.len()].copy_from_slice(four);
            f32::from_bits(u32::from_le_bytes(word))
        };
        let words: Vec<f32> = bytes.chunks(4).map(word).collect();
        let came = self.exchange(&|_| Cow::Borrowed(&words[..]), &|other| len(other).div_ceil(4))?;
        let bytes_of = |(other, words): (usize, &Vec<f32>)| {
            if other == self.own {
                return bytes.to_vec();
            }
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_bits().to_le_bytes()).collect();
            bytes.truncate(len(other));
            bytes
        };
        Ok(came.iter().enumerate().map(bytes_of).collect())
    }

    fn broadcast(&self, values: &mut [f32]) -> Result<(), CommError> {
        if self.own > 0 {
            return self.all().receive(self.members[0], values);
        }
        self.members[1..].iter().try_for_each(|to| self.all().send(*to, values))
    }

    fn send(&self, to: usize, values: &[f32]) -> Result<(), CommError> {
        self.all().send(self.members[to], values)
    }

    fn post(&self, to: usize, values: (Arc<[f32]>, usize)) -> Result<(), CommError> {
        self.all().post(self.members[to], values)
    }

    fn receive(&self, from: usize, values: &mut [f32]) -> Result<(), CommError> {
        self.all().receive(self.members[from], values)
    }

    fn sent_to(&self) -> Vec<u64> {
        let sent = self.all().sent_to();
        self.members.iter().map(|member| sent.get(*member).copied().unwrap_or(0)).collect()
    }

    /// Of all: once for all groups.
    fn leave(&self) -> Result<(), CommError> {
        self.all().leave()
    }
}
