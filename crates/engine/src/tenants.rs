//! Who was served how much: the accounts that keep tenants' shares fair.
//!
//! Each tenant's account holds the tokens it was served. Whoever has the least comes first. A tenant
//! that was away starts level with the least served of those present, so nobody saves up a right to
//! flood the engine, and nobody loses a debt by leaving for a moment.

use std::collections::HashMap;

use crate::prefix::BlockHash;

/// Accounts of absent tenants that are kept. More than that come and go too quickly to owe much.
const ABSENT_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Tenants {
    accounts: HashMap<BlockHash, Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// Tokens computed for the tenant. Only differences matter.
    n_served: u64,
    /// Sequences waiting or running.
    n_present: usize,
}

impl Tenants {
    /// One more sequence of this tenant.
    pub(crate) fn join(&mut self, tenant: BlockHash) {
        let floor = self.floor();
        let account = self.accounts.entry(tenant).or_default();
        if account.n_present == 0 {
            account.n_served = account.n_served.max(floor);
        }
        account.n_present += 1;
    }

    /// One sequence less.
    pub(crate) fn leave(&mut self, tenant: &BlockHash) {
        let account = self.accounts.get_mut(tenant).expect("who leaves has joined");
        account.n_present -= 1;
        if account.n_present > 0 {
            return;
        }
        let n_absent = self.accounts.values().filter(|account| account.n_present == 0).count();
        let is_empty = n_absent == self.accounts.len();
        let floor = self.floor();
        // Whoever owes nothing would start level anyway.
        self.accounts.retain(|_, account| {
            account.n_present > 0 || !is_empty && n_absent <= ABSENT_MAX && account.n_served > floor
        });
    }

    pub(crate) fn charge(&mut self, tenant: &BlockHash, n_tokens: usize) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.n_served += n_tokens as u64;
        }
    }

    pub(crate) fn n_served(&self, tenant: &BlockHash) -> u64 {
        self.accounts.get(tenant).map_or(0, |account| account.n_served)
    }

    /// What the least served of the present has had.
    fn floor(&self) -> u64 {
        let present = self.accounts.values().filter(|account| account.n_present > 0);
        present.map(|account| account.n_served).min().unwrap_or(0)
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.accounts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newcomers_start_level_and_debts_outlast_a_pause() {
        let [a, b, c] = ["a", "b", "c"].map(BlockHash::root);
        let mut tenants = Tenants::default();
        tenants.join(a);
        tenants.charge(&a, 1000);
        tenants.join(b);
        assert_eq!(tenants.n_served(&b), 1000, "b starts where a is");
        tenants.charge(&b, 500);
        tenants.leave(&b);
        tenants.join(b);
        assert_eq!(tenants.n_served(&b), 1500, "b cannot shed its debt");
        tenants.charge(&a, 2000);
        tenants.leave(&b);
        tenants.join(c);
        assert_eq!(tenants.n_served(&c), 3000);
        assert_eq!(tenants.n_served(&b), 0, "the account without a debt is gone");
        tenants.leave(&a);
        tenants.leave(&c);
        assert!(tenants.is_empty());
    }
}
