//! Leases with fencing tokens: of two controllers that both believe to hold one, only the newer can write.
//!
//! Time alone cannot keep two holders apart (a process may sleep past its lease, a clock may jump), so every acquisition
//! gets a larger token, and [`Control::fenced`] checks it inside the very transaction that writes.

use std::time::Duration;

use crate::clock::UnixMs;
use crate::database::{Control, Stop};
use crate::error::{Error, Result};
use crate::sql::{Fault, Transaction, values};

/// The longest lease. One that ends later than this from now was written before the clock was set back, and is over.
const TTL_MAX: Duration = Duration::from_secs(60);

/// A held lease. It proves nothing by itself; writes that carry it are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub name: String,
    /// Grows with every acquisition.
    pub token: i64,
}

/// What the database says about a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseInfo {
    pub holder: String,
    pub token: i64,
    pub expires_at: UnixMs,
}

impl Control {
    /// Takes the lease `name` for `ttl` (at most a minute) if nobody holds it. Every success gives a new token, also to a
    /// holder of the same name: two processes may call themselves alike.
    pub fn acquire(&self, name: &str, holder: &str, ttl: Duration) -> Result<Option<Lease>> {
        let ttl = ttl.min(TTL_MAX);
        self.write("acquire a lease", |transaction| {
            let now = self.lease_now(transaction)?;
            let found = find(transaction, name)?;
            let last_token = match found {
                Some(found) if holds(&found, now) => return Ok(None),
                Some(found) => found.token,
                None => 0,
            };
            let token = last_token + 1;
            transaction.execute(
                "INSERT INTO leases (name, holder, token, expires_ms) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (name) DO UPDATE
                 SET holder = excluded.holder, token = excluded.token, expires_ms = excluded.expires_ms",
                values![name, holder, token, now.plus(ttl).0],
            )?;
            Ok(Some(Lease { name: name.to_owned(), token }))
        })
    }

    /// Extends the lease to `ttl` from now. A lease that ran out and was not taken by anyone is still renewed.
    /// Errors: [`Error::StaleLease`] when someone else took it.
    pub fn renew(&self, lease: &Lease, ttl: Duration) -> Result<()> {
        self.fenced(lease, "renew a lease", |transaction| {
            let expires_at = self.lease_now(transaction)?.plus(ttl.min(TTL_MAX));
            transaction.execute(
                "UPDATE leases SET expires_ms = ?2 WHERE name = ?1",
                values![&lease.name, expires_at.0],
            )?;
            Ok(())
        })
    }

    /// Gives the lease up, so that another controller need not wait for it to run out. A stale lease is left alone.
    pub fn release(&self, lease: &Lease) -> Result<()> {
        // The token grows too: whoever still carries this lease cannot write with it.
        let released = self.fenced(lease, "release a lease", |transaction| {
            transaction.execute(
                "UPDATE leases SET expires_ms = 0, token = token + 1 WHERE name = ?1",
                values![&lease.name],
            )?;
            Ok(())
        });
        match released {
            Err(Error::StaleLease { .. }) => Ok(()),
            other => other,
        }
    }

    /// Who holds the lease now, if anyone.
    pub fn lease_holder(&self, name: &str) -> Result<Option<LeaseInfo>> {
        self.read("read a lease", |transaction| {
            let now = self.lease_now(transaction)?;
            Ok(find(transaction, name)?.filter(|found| holds(found, now)))
        })
    }

    /// The one clock that all holders go by: the server's where there are many machines.
    pub(crate) fn lease_now(&self, transaction: &mut Transaction) -> Result<UnixMs, Fault> {
        match transaction {
            Transaction::Postgres(..) if self.0.clock.is_system() => {
                let now = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
                transaction.number(now, &[]).map(UnixMs)
            }
            _ => Ok(self.now()),
        }
    }

    /// Runs `write` in a transaction that commits only if `lease` is still the newest. There is one writer at a time, so
    /// nobody can take the lease between the check and the commit.
    pub(crate) fn fenced<T>(
        &self,
        lease: &Lease,
        doing: &'static str,
        write: impl FnOnce(&mut Transaction) -> Result<T, Stop>,
    ) -> Result<T> {
        self.write(doing, |transaction| match find(transaction, &lease.name)? {
            Some(found) if found.token == lease.token => write(transaction),
            _ => Err(Stop::Refused(Error::StaleLease { name: lease.name.clone(), token: lease.token })),
        })
    }
}

fn holds(found: &LeaseInfo, now: UnixMs) -> bool {
    found.expires_at > now && found.expires_at <= now.plus(TTL_MAX)
}

fn find(transaction: &mut Transaction, name: &str) -> Result<Option<LeaseInfo>, Fault> {
    let sql = "SELECT holder, token, expires_ms FROM leases WHERE name = ?1";
    let Some(row) = transaction.row(sql, values![name])? else { return Ok(None) };
    let expires_at = UnixMs(row.int(2)?);
    Ok(Some(LeaseInfo { holder: row.text(0)?.to_owned(), token: row.int(1)?, expires_at }))
}
