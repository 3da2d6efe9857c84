//! A run as one rank of several processes, from group to group of those that are left.

use comm::{Comm, CommError, MpiComm, Record};

use super::{Context, Leader, Opened, Outcome, RankParts};
use crate::checkpoint::{Loaded, Reader};
use crate::rank::{Lead, Rank};
use crate::survive::{self, Kept};
use crate::{Error, Event, Result, agree};

/// Carries a created run out as one rank of several processes; `comm` leads to the others. Only on rank 0 `on_event` is
/// told what happens. Where ranks are lost and the others can go on by themselves, they do. Any other error on one rank
/// leaves the others waiting: end the process.
pub fn run_rank(
    context: &Context,
    (mut comm, record): (MpiComm, Record),
    on_event: &mut dyn FnMut(&Event),
) -> Result<Outcome> {
    record.work(0, "opening the run");
    let mut opened = Opened::open(context)?;
    let mut refused = Vec::new();
    let mut loaded = load(context, &opened, &comm, &mut refused)?;
    opened.forget_start();
    let (mut now, mut kept) = (context.clone(), Kept::default());
    loop {
        let life = Life { context: &now, opened: &opened, comm: &comm, record: &record };
        let ended = life.run(loaded, (&mut kept, std::mem::take(&mut refused)), on_event);
        let Err(Error::Comm(CommError::RanksLost { .. })) = &ended else { return ended };
        let before = comm.numbers().to_vec();
        let left = survive::go_on(&opened.plan, &mut comm, &mut kept)?;
        let (Some(n_ranks), Some(state)) = (left, kept.state.take()) else { return ended };
        loaded = Loaded { state, workers: Vec::new() };
        let hosts = comm.numbers().iter().filter_map(|rank| context.hosts.get(*rank).cloned());
        now = Context {
            n_ranks,
            n_threads: now.threads_of_a_rank() * n_ranks,
            hosts: hosts.take(n_ranks).collect(),
            after: Some(survive::lost(&before, comm.numbers(), &context.hosts)),
            ..context.clone()
        };
    }
}

/// What this rank goes on from: the newest checkpoint that all can read, or the beginning.
fn load(context: &Context, opened: &Opened, comm: &MpiComm, refused: &mut Vec<Event>) -> Result<Loaded> {
    let layout = opened.layout(context, comm.rank());
    let workers = opened.plan.workers_of(comm.rank(), comm.n_ranks());
    let reader = Reader { layout: &layout, stripes: &opened.part(comm.rank()).stripes, workers };
    let load = |step| opened.checkpoints.load(step, &reader);
    let found = agree::newest(&opened.checkpoints, comm, &load, refused)?;
    Ok(found.unwrap_or_else(|| opened.initial(&reader)))
}

/// A rank among the same others.
struct Life<'a> {
    context: &'a Context<'a>,
    opened: &'a Opened,
    comm: &'a MpiComm,
    record: &'a Record,
}

impl Life<'_> {
    /// Until the run is over or ranks are lost; what is to be kept then is in `kept`.
    fn run(
        &self,
        loaded: Loaded,
        (kept, refused): (&mut Kept, Vec<Event>),
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<Outcome> {
        let Life { context, opened, comm, record } = *self;
        let step = loaded.state.step;
        if comm.is_spare() || kept.ended.is_some() {
            record.work(step, if comm.is_spare() { "spare" } else { "leaving" });
            kept.state = Some(loaded.state);
            comm.leave()?;
            return Ok(kept.ended.unwrap_or(Outcome::Finished));
        }
        let mut leader = match comm.rank() {
            0 => Some(Leader::new(context, opened, step, on_event)?),
            _ => None,
        };
        if let Some(leader) = &mut leader {
            leader.lost_seconds = kept.stepped.map(|stepped| (context.seconds)() - stepped);
            leader.begin(refused, step, opened);
        }
        let comm = Box::new(comm.again());
        let mut rank = RankParts::new(context, opened)?.rank(comm, loaded, record.clone())?;
        kept.give(&mut rank);
        let trained = self.train(&mut rank, leader.as_mut());
        if let (Ok(outcome), Some(_)) = (&trained, &leader) {
            kept.ended = Some(*outcome);
        }
        record.work(rank.state.step, "leaving");
        let ended = trained.and_then(|outcome| Ok(rank.comm.leave().map(|()| outcome)?));
        if let Some(leader) = &mut leader {
            leader.flush_all();
        }
        kept.take(rank);
        ended
    }

    fn train(&self, rank: &mut Rank, mut leader: Option<&mut Leader>) -> Result<Outcome> {
        let lead = leader.as_deref_mut().map(|leader| leader as &mut dyn Lead);
        let finished = rank.run(lead, self.context.stop)?;
        let trained = rank.trained(finished)?;
        match leader {
            Some(leader) => leader.end(finished, self.opened, trained),
            None if finished => Ok(Outcome::Finished),
            None => Ok(Outcome::Interrupted),
        }
    }
}
