//! The rows of a rank's micro-batches, made ready by a thread while the ones before them are computed.

use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};

use data::{Mixture, NO_TARGET};

use crate::{Error, Result};

/// Micro-batches that are ready at most.
const READY_MAX: usize = 2;

/// Rows that are computed at once.
#[derive(Default)]
pub(crate) struct Rows {
    pub(crate) tokens_bt: Vec<u32>,
    pub(crate) targets_bt: Vec<u32>,
    pub(crate) starts_bt: Vec<u32>,
    /// Some rows hold several documents.
    pub(crate) is_packed: bool,
}

impl Rows {
    pub(crate) fn push(&mut self, row: data::Row) {
        self.is_packed |= row.starts.last().is_some_and(|start| *start > 0);
        self.tokens_bt.extend(row.tokens);
        self.targets_bt.extend(row.targets);
        self.starts_bt.extend(row.starts);
    }

    /// Fills up to `n` tokens with rows that count for nothing.
    pub(crate) fn pad(&mut self, n: usize) {
        self.tokens_bt.resize(n, 0);
        self.targets_bt.resize(n, NO_TARGET);
        self.starts_bt.resize(n, 0);
    }

    /// So many tokens that count for nothing.
    pub(crate) fn nothing(n: usize) -> Rows {
        let mut rows = Rows::default();
        rows.pad(n);
        rows
    }

    pub(crate) fn batch(&self) -> model::MicroBatch<'_> {
        let starts_bt = self.is_packed.then_some(&self.starts_bt[..]);
        model::MicroBatch { tokens_bt: &self.tokens_bt, targets_bt: &self.targets_bt, starts_bt }
    }
}

/// Which rows a rank computes, and in which order: a pure function of the plan.
#[derive(Clone)]
pub(crate) struct Order {
    pub(crate) steps: Range<u64>,
    /// Of a step.
    pub(crate) micro_batches: u64,
    /// This rank's among them, as it computes them.
    pub(crate) mine: Vec<usize>,
    /// Of a micro-batch.
    pub(crate) rows: u64,
}

impl Order {
    /// The rows of a micro-batch in the order of the data.
    pub(crate) fn rows_of(&self, step: u64, micro_batch: usize) -> Range<u64> {
        let first = (step * self.micro_batches + micro_batch as u64) * self.rows;
        first..first + self.rows
    }
}

pub(crate) struct Loader {
    ready: Receiver<Result<Rows>>,
}

impl Loader {
    /// Begins at once. The thread ends when the loader is dropped.
    pub(crate) fn start(mixture: Mixture, order: Order) -> Loader {
        let (send, ready) = sync_channel(READY_MAX);
        std::thread::spawn(move || {
            for step in order.steps.clone() {
                for micro_batch in order.mine.iter().copied() {
                    let mut rows = Rows::default();
                    let loaded = order.rows_of(step, micro_batch).try_for_each(|index| {
                        rows.push(mixture.row(index)?);
                        Ok(())
                    });
                    if send.send(loaded.map(|()| rows)).is_err() {
                        return;
                    }
                }
            }
        });
        Loader { ready }
    }

    /// The next micro-batch in the order.
    pub(crate) fn next(&self) -> Result<Rows> {
        self.ready.recv().map_err(|_| Error::LoaderStopped)?
    }
}
