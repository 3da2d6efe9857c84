//! Who is connected, so that idle connections make room for new ones.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Notify;

use crate::serve::now_ms;

/// All open connections. At the limit, the one that idles longest is closed for a new one; if none idles, the new one
/// is turned away.
pub(crate) struct Connections {
    n_max: usize,
    open: Arc<Mutex<Open>>,
}

#[derive(Default)]
struct Open {
    next_id: u64,
    by_id: HashMap<u64, Weak<Connection>>,
}

/// One open connection; dropped when it ends.
pub(crate) struct Connection {
    id: u64,
    /// Requests whose answer is not wholly sent.
    n_busy: AtomicUsize,
    idle_since_ms: AtomicU64,
    close: Notify,
    open: Arc<Mutex<Open>>,
}

impl Connections {
    pub(crate) fn new(n_max: usize) -> Connections {
        Connections { n_max, open: Arc::default() }
    }

    pub(crate) fn admit(&self, now_ms: u64) -> Option<Arc<Connection>> {
        let n_open = self.lock().by_id.len();
        if n_open >= self.n_max && !self.close_idlest() {
            tracing::warn!(n_open, "turned a connection away, all others are busy");
            return None;
        }
        let mut open = self.lock();
        let id = open.next_id;
        open.next_id += 1;
        let connection = Arc::new(Connection {
            id,
            n_busy: AtomicUsize::new(0),
            idle_since_ms: AtomicU64::new(now_ms),
            close: Notify::new(),
            open: self.open.clone(),
        });
        open.by_id.insert(id, Arc::downgrade(&connection));
        Some(connection)
    }

    /// Closes the connection that idles longest, if any does, and says whether there was one.
    pub(crate) fn close_idlest(&self) -> bool {
        // The last owner's drop takes this lock, so the strong references outlive the guard.
        let all: Vec<Arc<Connection>> = self.lock().by_id.values().filter_map(Weak::upgrade).collect();
        let idle = all.iter().filter(|c| c.n_busy.load(Ordering::Acquire) == 0);
        let Some(idlest) = idle.min_by_key(|c| c.idle_since_ms.load(Ordering::Acquire)) else { return false };
        self.lock().by_id.remove(&idlest.id);
        idlest.close.notify_one();
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    pub(crate) async fn asked_to_close(&self) {
        self.close.notified().await;
    }

    /// Counts a request until the guard is dropped.
    pub(crate) fn enter(self: Arc<Connection>) -> Busy {
        self.n_busy.fetch_add(1, Ordering::AcqRel);
        Busy(self)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).by_id.remove(&self.id);
    }
}

pub(crate) struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.idle_since_ms.store(now_ms(), Ordering::Release);
        self.0.n_busy.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_idle_connection_makes_room() {
        let connections = Connections::new(2);
        let first = connections.admit(5).unwrap();
        let second = connections.admit(1).unwrap();
        let busy = second.clone().enter();
        // The second idled longer, but has something to do.
        let third = connections.admit(9).unwrap();
        assert_eq!(connections.lock().by_id.len(), 2);
        assert!(!connections.lock().by_id.contains_key(&first.id));
        let both = (third.clone().enter(), busy);
        assert!(connections.admit(10).is_none());
        drop((both, second, third, first));
        assert_eq!(connections.lock().by_id.len(), 0);
    }
}
