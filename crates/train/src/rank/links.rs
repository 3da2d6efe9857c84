//! What ranks send to each other, link by link.

use super::{Lead, Rank};
use crate::{Event, Link, Result};

/// Links that are told of: the busiest of the n · (n - 1) that there are.
const TOLD_MAX: usize = 256;

/// What has been told so far.
#[derive(Default)]
pub(crate) struct Links {
    /// Bytes to every rank.
    told: Vec<u64>,
    since: f64,
}

impl Rank<'_> {
    /// Tells how many bytes have gone from whom to whom since this was last told.
    pub(super) fn tell_links(&mut self, lead: &mut Option<&mut dyn Lead>) -> Result<()> {
        let n_ranks = self.comm.n_ranks();
        if n_ranks == 1 {
            return Ok(());
        }
        let sent = self.comm.sent_to();
        self.links.told.resize(n_ranks, 0);
        let own: Vec<f64> =
            sent.iter().zip(&self.links.told).map(|(now, told)| (now - told) as f64).collect();
        let all = self.comm.all_gather(&own)?;
        let now = (self.seconds)();
        let seconds = now - std::mem::replace(&mut self.links.since, now);
        self.links.told = sent;
        let Some(lead) = lead else { return Ok(()) };
        let link =
            |(i, bytes): (usize, &f64)| Link { from: i / n_ranks, to: i % n_ranks, bytes: *bytes as u64 };
        let mut links: Vec<Link> = all.iter().enumerate().map(link).filter(|link| link.bytes > 0).collect();
        links.sort_by_key(|link| std::cmp::Reverse(link.bytes));
        links.truncate(TOLD_MAX);
        lead.event(Event::Links { step: self.state.step, seconds, links });
        Ok(())
    }
}
