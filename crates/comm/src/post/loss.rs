//! The end of a group: all leave together, or ranks are lost and those that are left find each other.

use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use mpi::Test;

use super::{ASKS_MAX, NAP, Post, Posted, Reply, failed};
use crate::CommError;

/// Of a rank that is spare.
const LONG_NAP: Duration = Duration::from_millis(20);

/// Between the first sign that ranks were lost and the new group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    None,
    /// This rank has learned of it.
    Known,
    /// All that are left have agreed that there is one.
    Agreed,
}

impl Post {
    /// All have come to the end. A spare rank waits here for the others.
    pub(super) fn part(&mut self) -> Result<(), CommError> {
        let is_spare = self.world.rank() >= self.n_ranks;
        while self.push_posted()? {
            std::thread::sleep(NAP);
        }
        let gathered = if is_spare { Ok(()) } else { self.gather_bytes(&[]).map(drop) };
        if !self.can_survive()? {
            return gathered;
        }
        // One that has heard from all could go while another has not: they go together or not at all.
        gathered?;
        if self.agree(("leave", true), is_spare)? {
            return Ok(());
        }
        self.loss = Loss::Agreed;
        let (function, text) = ("MPIX_Comm_iagree", "another rank has learned of it".to_owned());
        Err(failed("leave")(mpi::Error::Lost { function, text }))
    }

    /// Whether those that are left can go on.
    pub(crate) fn learn_of_loss(&mut self) -> bool {
        if self.loss == Loss::None {
            self.loss = Loss::Known;
        }
        self.world.can_survive().unwrap_or(false)
    }

    /// What is said in place of an operation, until there is a new group.
    pub(crate) fn lost(&self, operation: &'static str) -> CommError {
        let text = "it is known already".to_owned();
        failed(operation)(mpi::Error::Lost { function: operation, text })
    }

    fn can_survive(&self) -> Result<bool, CommError> {
        self.world.can_survive().map_err(failed("surviving"))
    }

    /// Finds those that are left, however many more are lost on the way.
    pub(super) fn regroup(&mut self, replies: &Sender<Reply>) -> Result<(), CommError> {
        let operation = "regroup";
        let own = self.numbers[self.world.rank()];
        loop {
            self.world.revoke().map_err(failed(operation))?;
            // Spare ranks wait in a question of this kind, which nothing but an answer ends.
            if self.loss != Loss::Agreed {
                self.agree((operation, false), false)?;
            }
            self.loss = Loss::Known;
            self.posted = Posted::default();
            self.world.shrink().map_err(failed(operation))?;
            self.n_ranks = self.world.n_ranks();
            self.numbers = vec![own; self.n_ranks];
            match self.gather_bytes(&(own as u64).to_le_bytes()) {
                Ok(all) => {
                    let number = |bytes: &Vec<u8>| {
                        bytes.first_chunk::<8>().map_or(own, |eight| u64::from_le_bytes(*eight) as usize)
                    };
                    self.numbers = all.iter().map(number).collect();
                    self.loss = Loss::None;
                    drop(replies.send(Reply::Left(self.world.rank(), self.numbers.clone())));
                    return Ok(());
                }
                Err(CommError::RanksLost { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether all that are left say yes; without a limit where `patient`.
    fn agree(&mut self, (operation, own): (&'static str, bool), patient: bool) -> Result<bool, CommError> {
        let mut request = self.world.agree(own).map_err(failed(operation))?;
        let (begun, mut n_asked) = (Instant::now(), 0);
        loop {
            if let Test::Agreed(all) = request.test().map_err(failed(operation))? {
                return Ok(all);
            }
            n_asked += 1;
            let is_late = !patient && begun.elapsed() > self.limit;
            match n_asked {
                _ if is_late => return Err(self.timed_out(operation, Vec::new())),
                ..ASKS_MAX => std::thread::yield_now(),
                _ if patient => std::thread::sleep(LONG_NAP),
                _ => std::thread::sleep(NAP),
            }
        }
    }
}
