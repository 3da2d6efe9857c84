//! The board: where every rank posts what it is doing, so that a hang explains itself.
//!
//! It lies in the run, in the store: that is there when the links between ranks are not. A rank posts now and then from a
//! thread of its own, so that one whose step hangs still says where.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use comm::{Doing, Hello, Record};
use serde::{Deserialize, Serialize};
use store::{ObjectName, Store};

/// A post is a few numbers and words.
const POST_BYTES_MAX: u64 = 16 << 10;

#[derive(Clone)]
pub(super) struct Board {
    store: Arc<dyn Store>,
    run: String,
}

/// What a rank posts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Post {
    pub(super) rank: usize,
    pub(super) host: String,
    pub(super) pid: u32,
    pub(super) posted_unix: u64,
    pub(super) doing: Doing,
    /// It has lost others and ends.
    pub(super) gave_up: bool,
}

/// Posts until it is dropped.
#[derive(Default)]
pub(super) struct Posting {
    ended: Arc<AtomicBool>,
    gave_up: Arc<AtomicBool>,
}

impl Posting {
    /// From now on posts say so.
    pub(super) fn give_up(&self) {
        self.gave_up.store(true, Ordering::Relaxed);
    }
}

impl Drop for Posting {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Board {
    pub(super) fn new(store: Arc<dyn Store>, run: &str) -> Board {
        Board { store, run: run.to_owned() }
    }

    fn name(&self, rank: usize) -> Result<ObjectName> {
        Ok(ObjectName::parse(&format!("runs/{}/ranks/{rank:05}.json", self.run))?)
    }

    pub(super) fn post(&self, own: &Hello, record: &Record, gave_up: bool) -> Result<()> {
        let Hello { rank, host, pid, .. } = own.clone();
        let (posted_unix, doing) = (crate::now_unix_s(), record.doing());
        let post = Post { rank, host, pid, posted_unix, doing, gave_up };
        Ok(self.store.put(&self.name(rank)?, &serde_json::to_vec(&post)?)?)
    }

    /// Begins to post every so often.
    pub(super) fn keep_posting(&self, own: Hello, record: Record, every: Duration) -> Posting {
        let (board, posting) = (self.clone(), Posting::default());
        let Posting { ended, gave_up } = &posting;
        let (ended, gave_up) = (ended.clone(), gave_up.clone());
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Err(error) = board.post(&own, &record, gave_up.load(Ordering::Relaxed)) {
                    tracing::warn!("cannot post what this rank is doing: {error:#}");
                }
                std::thread::sleep(every);
            }
        });
        posting
    }

    /// The posts of so many ranks; `None` where one has none that can be read.
    pub(super) fn posts(&self, n_ranks: usize) -> Vec<Option<Post>> {
        (0..n_ranks).map(|rank| self.read(rank).ok().flatten().filter(|post| post.rank == rank)).collect()
    }

    fn read(&self, rank: usize) -> Result<Option<Post>> {
        let name = self.name(rank)?;
        let Some(meta) = self.store.head(&name)?.filter(|meta| meta.bytes <= POST_BYTES_MAX) else {
            return Ok(None);
        };
        Ok(Some(serde_json::from_slice(&self.store.get(&meta.name)?)?))
    }

    /// One line a rank: what it was doing when it last posted.
    pub(super) fn lines(&self, n_ranks: usize) -> Vec<String> {
        let now = crate::now_unix_s();
        let line = |(rank, post): (usize, Option<Post>)| match post {
            None => format!("  rank {rank}: has posted nothing"),
            Some(Post { host, pid, posted_unix, doing, .. }) => {
                let ago = now.saturating_sub(posted_unix);
                format!("  rank {rank} on {host}, process {pid}: {doing}; posted {ago} s ago")
            }
        };
        self.posts(n_ranks).into_iter().enumerate().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posts_are_read_and_noise_is_not() {
        let store = store::open("mem:").unwrap();
        let board = Board::new(store.clone(), "r");
        let own = Hello { host: "h1".into(), pid: 7, rank: 1, n_ranks: 4, same: Default::default() };
        let record = Record::default();
        record.work(12, "gradients");
        board.post(&own, &record, false).unwrap();
        store.put(&board.name(2).unwrap(), b"\xff\x00noise").unwrap();
        store.put(&board.name(3).unwrap(), &vec![b'['; 1 << 20]).unwrap();
        let lines = board.lines(4);
        assert!(lines[1].contains("rank 1 on h1, process 7: step 12, gradients for 0."), "{lines:?}");
        for rank in [0, 2, 3] {
            assert_eq!(lines[rank], format!("  rank {rank}: has posted nothing"));
        }
    }
}
