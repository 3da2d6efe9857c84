//! The objective on held-out rows, shared among ranks.

use std::ops::Range;

use data::{Batches, NO_TARGET};
use model::{LossSum, Objective};

use crate::exchange::{Exchange, Fixed, Kind};
use crate::layout::Zero;
use crate::loader::Rows;
use crate::rank::Rank;
use crate::{EvalPart, Event, Result};

impl Rank<'_> {
    /// The mean of the objective, and bits a byte, over the first validation rows of every dataset, shared among ranks, summed in
    /// row order. `None` where nothing is held out.
    pub(crate) fn evaluate(&mut self) -> Result<Option<Event>> {
        self.record.work(self.state.step, "evaluation");
        let validation = self.validation.clone();
        let mut parts = Vec::new();
        for part in validation.iter() {
            let sums = self.held_out_sums(&part.batches)?;
            let sums = self.of_stages(self.comm.all_gather(&sums)?)?.pop().unwrap_or_default();
            let total = |at: usize| sums.iter().skip(at).step_by(4).sum::<f64>();
            parts.push(EvalPart {
                dataset: part.dataset.clone(),
                nats_per_token: total(0) / total(1).max(1.0),
                bits_per_byte: total(2) / std::f64::consts::LN_2 / total(3).max(1.0),
            });
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let weights: f64 = validation.iter().map(|part| part.weight).sum();
        let mean = |of: &dyn Fn(&EvalPart) -> f64| -> f64 {
            parts.iter().zip(validation.iter()).map(|(part, v)| of(part) * v.weight / weights).sum()
        };
        let (nats_per_token, bits_per_byte) =
            (mean(&|part| part.nats_per_token), mean(&|part| part.bits_per_byte));
        if parts.len() == 1 {
            parts.clear();
        }
        Ok(Some(Event::Eval { step: self.state.step, nats_per_token, bits_per_byte, parts }))
    }

    /// Of each of this rank's batches of held-out rows: the objective's sum, what counts in it, nats of tokens, bytes.
    fn held_out_sums(&mut self, held_out: &Batches) -> Result<Vec<f64>> {
        let n_rows = (self.plan.evaluate.rows_max as u64).min(held_out.n_rows());
        // A pair is judged whole.
        let n_rows = if held_out.is_pairs() { n_rows.next_multiple_of(2) } else { n_rows };
        let rows = self.plan.rows as u64;
        let mut sums = Vec::new();
        let (n_batches, n_ranks) = (n_rows.div_ceil(rows), self.comm.n_ranks());
        let mine = share(n_batches, self.comm.rank(), n_ranks);
        // Where parameters are divided all ranks compute as often, some of them on nothing.
        let n_turns =
            if self.layout.zero == Zero::Parameters { n_batches.div_ceil(n_ranks as u64) } else { 0 };
        for batch in (mine.start..).take(n_turns.max(mine.end - mine.start) as usize) {
            let is_mine = mine.contains(&batch);
            let mut batch_rows = Rows::default();
            if is_mine {
                for index in batch * rows..((batch + 1) * rows).min(n_rows) {
                    batch_rows.push(held_out.row(index)?);
                }
            }
            batch_rows.pad(self.plan.rows * self.plan.context);
            let tokens = self.loss(&batch_rows, Objective::CrossEntropy)?;
            self.keep_together((batch - mine.start + 1) as usize)?;
            let of_pairs = self.plan.objective.is_of_pairs();
            let sum = if of_pairs { self.loss(&batch_rows, self.plan.objective)? } else { tokens };
            if !is_mine {
                continue;
            }
            let real = batch_rows.targets_bt.iter().filter(|target| **target != NO_TARGET);
            let bytes: u64 = real.map(|target| u64::from(self.token_bytes[*target as usize])).sum();
            sums.extend([sum.nats, sum.n_tokens as f64, tokens.nats, bytes as f64]);
        }
        Ok(sums)
    }

    fn loss(&mut self, rows: &Rows, objective: Objective) -> Result<LossSum> {
        let params = (self.layout.zero < Zero::Parameters).then_some(&self.state.params[..]);
        let fixed = Fixed {
            pool: &self.pool,
            comm: &*self.comm,
            team: self.team.as_ref().map(|team| &*team.comm),
            pipe: self.pipe.as_ref(),
            layout: &self.layout,
            params: &self.state.params,
            seconds: self.seconds,
        };
        let mut exchange = Exchange::new(fixed, &mut self.memory);
        exchange.begin(Kind::Loss, 0);
        let loss = self.model.loss_of(&self.pool, params, (rows.batch(), objective), &mut exchange);
        exchange.finish()?;
        Ok(loss)
    }
}

/// A rank's share of `n` things, in order.
fn share(n: u64, rank: usize, n_ranks: usize) -> Range<u64> {
    let (rank, n_ranks) = (rank as u64, n_ranks as u64);
    n * rank / n_ranks..n * (rank + 1) / n_ranks
}
