//! Ranks that are left when others are lost go on in the same processes, from the last step that one of them has finished.
//!
//! That takes ranks that each have the whole state. What is lost is the step that was under way: of the ranks that are left
//! some may have finished it and some not, and never differ by more, since no step ends without a word from all. Those that
//! are behind get the state of one that is not. As many go on as can each sum a node of the step's micro-batches; the others are
//! spare, and take the place of the next ones that are lost.

use comm::{Comm, CommError, MpiComm};
use serde::{Deserialize, Serialize};

use crate::guard::Health;
use crate::layout::Zero;
use crate::rank::Rank;
use crate::state::State;
use crate::{Error, Outcome, Plan, Result};

/// What a rank keeps between two groups.
#[derive(Default)]
pub(crate) struct Kept {
    /// After its last step, where it has all of it.
    pub(crate) state: Option<State>,
    /// It was to get the state of another, and has not all of it.
    pub(crate) is_torn: bool,
    /// As in [`Rank`].
    looked: u64,
    first: u64,
    /// The first rank has done all that there was to do, but to part.
    pub(crate) ended: Option<Outcome>,
    /// When the last step was over; nothing where there was no group before.
    pub(crate) stepped: Option<f64>,
}

impl Kept {
    /// For a rank of the next group.
    pub(crate) fn give(&self, rank: &mut Rank) {
        if self.stepped.is_some() {
            (rank.looked, rank.first) = (self.looked, self.first);
        }
    }

    /// Of a rank that has lost others. What is divided cannot be put together without them.
    pub(crate) fn take(&mut self, rank: Rank) {
        (self.looked, self.first, self.stepped) = (rank.looked, rank.first, Some(rank.stepped));
        let has_all = rank.team.is_none() && rank.pipe.is_none() && rank.layout.zero == Zero::Nothing;
        let is_whole = has_all && rank.plan.diloco.is_none();
        self.state = Some(rank.state).filter(|_| is_whole);
    }
}

/// What ranks tell each other of that.
#[derive(Clone, Serialize, Deserialize)]
struct Told {
    step: Option<u64>,
    tokens: u64,
    elapsed_seconds: f64,
    health: Health,
    looked: u64,
    ended: Option<Outcome>,
}

impl Told {
    fn of(kept: &Kept) -> Told {
        let state = kept.state.as_ref().filter(|_| !kept.is_torn);
        Told {
            step: state.map(|state| state.step),
            tokens: state.map_or(0, |state| state.tokens),
            elapsed_seconds: state.map_or(0.0, |state| state.elapsed_seconds),
            health: state.map_or_else(Health::default, |state| state.health),
            looked: kept.looked,
            ended: kept.ended,
        }
    }
}

/// Makes a group of those that are left. Then `comm` is in it, `kept` is up to date, and it says how many ranks share the
/// steps; nothing where those that are left cannot go on by themselves.
pub(crate) fn go_on(plan: &Plan, comm: &mut MpiComm, kept: &mut Kept) -> Result<Option<usize>> {
    if kept.state.is_none() {
        return Ok(None);
    }
    loop {
        match regroup(plan, comm, kept) {
            // More are lost meanwhile.
            Err(Error::Comm(CommError::RanksLost { .. })) => {}
            ended => return ended,
        }
    }
}

fn regroup(plan: &Plan, comm: &mut MpiComm, kept: &mut Kept) -> Result<Option<usize>> {
    comm.regroup()?;
    let all = tell(comm, &Told::of(kept))?;
    kept.ended = all.iter().find_map(|told| told.ended);
    // Other numbers of ranks divide what the optimizer remembers (`Layout`).
    let keep_all = |n: &usize| comm::tree::are_nodes(plan.parts(), *n);
    let n_ranks = (1..=all.len()).rev().find(keep_all).unwrap_or(1);
    let Some(newest) = all.iter().filter_map(|told| told.step).max() else { return Ok(None) };
    if kept.ended.is_none() {
        bring(comm, (&all[..], newest, n_ranks), kept)?;
        kept.looked =
            all.iter().filter(|told| told.step == Some(newest)).map(|told| told.looked).min().unwrap_or(0);
    }
    comm.narrow(n_ranks)?;
    Ok(Some(n_ranks))
}

fn tell(comm: &MpiComm, own: &Told) -> Result<Vec<Told>> {
    let bytes = serde_json::to_vec(own).unwrap_or_else(|e| panic!("numbers are plain data: {e}"));
    let all = comm.all_gather_bytes(&bytes)?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|_| Error::RankUnclear { rank })
    };
    all.iter().enumerate().map(read).collect()
}

/// Those of the group that are behind get the newest state.
fn bring(comm: &MpiComm, (all, newest, n_ranks): (&[Told], u64, usize), kept: &mut Kept) -> Result<()> {
    let is_newest = |told: &Told| told.step == Some(newest);
    let Some(giver) = all.iter().position(is_newest) else { return Ok(()) };
    let behind: Vec<usize> = (0..n_ranks).filter(|rank| !is_newest(&all[*rank])).collect();
    let rank = comm.rank();
    if rank == giver
        && let Some(state) = &kept.state
    {
        for to in behind {
            [&state.params, &state.adam_m, &state.adam_v]
                .into_iter()
                .try_for_each(|vector| comm.send(to, vector))?;
        }
    } else if behind.contains(&rank)
        && let Some(state) = &mut kept.state
    {
        kept.is_torn = true;
        for vector in [&mut state.params, &mut state.adam_m, &mut state.adam_v] {
            comm.receive(giver, vector)?;
        }
        let Told { tokens, elapsed_seconds, health, .. } = all[giver].clone();
        (state.step, state.tokens, state.elapsed_seconds, state.health) =
            (newest, tokens, elapsed_seconds, health);
        kept.is_torn = false;
    }
    Ok(())
}

/// Of ranks that began with these numbers, which are not there any more.
pub(crate) fn lost(before: &[usize], now: &[usize], hosts: &[String]) -> String {
    let name = |rank: &usize| match hosts.get(*rank) {
        Some(host) => format!("rank {rank} on {host}"),
        None => format!("rank {rank}"),
    };
    let lost: Vec<String> = before.iter().filter(|rank| !now.contains(rank)).map(name).collect();
    format!("{} lost", lost.join(", "))
}
