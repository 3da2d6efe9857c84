//! From which checkpoint processes go on: the newest of which each can read what it needs.

use comm::Comm;
use data::chain;

use crate::checkpoint::{Checkpoints, Loaded};
use crate::{Error, Event, Result};

/// Before the reason why a rank cannot go on from a checkpoint, and alone where it can.
const CAN: &[u8] = b"+";
const CANNOT: &str = "-";

/// `None` where there is none. Rank 0 says which ones there are: another may see fewer or more at the moment. One that
/// some rank cannot read is told of, and the one before it is tried.
pub(crate) fn newest(
    checkpoints: &Checkpoints,
    comm: &dyn Comm,
    load: &dyn Fn(u64) -> Result<Option<Loaded>>,
    refused: &mut Vec<Event>,
) -> Result<Option<Loaded>> {
    let mut steps = if comm.rank() == 0 { checkpoints.steps()? } else { Vec::new() };
    let mut last = None;
    loop {
        let next = steps.pop().map_or(-1.0, |step| step as f64);
        let next = comm.all_gather(&[next])?[0];
        if next < 0.0 {
            return last.map_or(Ok(None), |last: Error| {
                Err(Error::NoCheckpoint { run: checkpoints.run.clone(), last: Box::new(last) })
            });
        }
        let step = next as u64;
        let found = load(step);
        let own = match &found {
            Ok(Some(_)) => CAN.to_vec(),
            Ok(None) => CANNOT.into(),
            Err(error) => format!("{CANNOT}{}", chain(error)).into(),
        };
        let told = comm.all_gather_bytes(&own)?;
        if told.iter().all(|told| told == CAN) {
            return found;
        }
        // What was never published is there for no rank, and is passed over.
        for (rank, why) in told.iter().enumerate().filter(|(_, told)| told.len() > CAN.len()) {
            let what = format!("on rank {rank}: {}", String::from_utf8_lossy(&why[CANNOT.len()..]));
            refused.push(Event::CheckpointRefused { step, why: what.clone() });
            last = Some(checkpoints.refused(step, what));
        }
    }
}
