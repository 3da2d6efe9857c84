//! The queue: who is admitted next. Pure.
//!
//! 1. A higher priority goes first.
//! 2. Among equals, the tenant that was served least.
//! 3. Of one tenant, first come, first served.
//!
//! Every [`OLDEST_EVERY`]-th admission goes to the oldest request of all, whatever its priority or
//! tenant, and raises it to the highest priority present: so nobody starves, nor is preempted for ever.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::prefix::BlockHash;
use crate::sequence::SequenceId;
use crate::tenants::Tenants;

pub(crate) const OLDEST_EVERY: u64 = 8;

#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// By age.
    entries: BTreeMap<SequenceId, Entry>,
    n_admissions: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) tenant: BlockHash,
    pub(crate) priority: i8,
}

impl Waiting {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.entries.keys().copied()
    }

    pub(crate) fn insert(&mut self, id: SequenceId, entry: Entry) {
        self.entries.insert(id, entry);
    }

    pub(crate) fn remove(&mut self, id: SequenceId) {
        self.entries.remove(&id);
    }

    /// The next admission is the oldest's.
    pub(crate) fn is_turn_of_oldest(&self) -> bool {
        self.n_admissions % OLDEST_EVERY == OLDEST_EVERY - 1
    }

    /// Who of `ready` is admitted next; they are in order of age.
    pub(crate) fn pick(&self, ready: &[SequenceId], tenants: &Tenants) -> Option<SequenceId> {
        if self.is_turn_of_oldest() { ready.first().copied() } else { self.first(ready, tenants) }
    }

    /// Who of `ready` comes first but for the turns of the oldest.
    pub(crate) fn first(&self, ready: &[SequenceId], tenants: &Tenants) -> Option<SequenceId> {
        let key = |id: &SequenceId| {
            let entry = &self.entries[id];
            (Reverse(entry.priority), tenants.n_served(&entry.tenant), *id)
        };
        ready.iter().copied().min_by_key(key)
    }

    /// Takes out who was picked.
    pub(crate) fn admit(&mut self, id: SequenceId) {
        self.entries.remove(&id);
        self.n_admissions += 1;
    }

    pub(crate) fn priority_max(&self) -> Option<i8> {
        self.entries.values().map(|entry| entry.priority).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Admits all of `arrivals` (tenant, priority), each charged 10 tokens, and returns their order.
    fn order(arrivals: &[(&str, i8)]) -> Vec<u64> {
        let (mut waiting, mut tenants) = (Waiting::default(), Tenants::default());
        for (i, &(tenant, priority)) in arrivals.iter().enumerate() {
            let tenant = BlockHash::root(tenant);
            tenants.join(tenant);
            waiting.insert(SequenceId(i as u64), Entry { tenant, priority });
        }
        let admit = |_: &(&str, i8)| {
            let ready: Vec<_> = waiting.ids().collect();
            let id = waiting.pick(&ready, &tenants).unwrap();
            waiting.admit(id);
            tenants.charge(&BlockHash::root(arrivals[id.0 as usize].0), 10);
            id.0
        };
        arrivals.iter().map(admit).collect()
    }

    #[test]
    fn one_tenant_is_served_in_order() {
        assert_eq!(order(&[("a", 0); 20]), (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn a_flood_does_not_hold_up_another_tenant() {
        let arrivals = [("a", 0), ("a", 0), ("a", 0), ("a", 0), ("b", 0), ("b", 0)];
        assert_eq!(order(&arrivals), [0, 4, 1, 5, 2, 3]);
    }

    #[test]
    fn higher_priorities_go_first_but_the_oldest_has_its_turn() {
        let mut arrivals = vec![("a", 0)];
        arrivals.extend([("b", 3); 10]);
        assert_eq!(order(&arrivals), [1, 2, 3, 4, 5, 6, 7, 0, 8, 9, 10]);
    }
}
