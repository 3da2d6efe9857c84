//! The engine in virtual time: its scheduler and its pacer on a machine whose steps take what somebody says they do.
//! For planning, and for tests of both.

use std::collections::HashMap;
use std::time::Duration;

use crate::engine::EngineLimits;
use crate::pacer::Pacer;
use crate::request::TokenId;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Sequence, SequenceId};
use crate::step_cost::StepWork;

/// A token that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlayedToken {
    /// As [`Played::add`] returned it.
    pub id: u64,
    pub is_first: bool,
    pub is_last: bool,
}

/// An engine without a model, whose clock is the sum of what its steps take. Its blocks are as many as it is given; no two
/// prompts begin alike.
pub struct Played {
    scheduler: Scheduler,
    pacer: Pacer,
    now: f64,
    n_added: u64,
    open: HashMap<SequenceId, Open>,
}

struct Open {
    n_answer: usize,
    n_come: usize,
}

impl Played {
    /// With `n_blocks` of `block_tokens` positions.
    pub fn new(limits: &EngineLimits, n_blocks: usize, block_tokens: usize) -> Played {
        let scheduler = Scheduler::new(Limits {
            n_blocks,
            block_tokens,
            max_running: limits.max_running,
            max_batch_tokens: limits.max_batch_tokens,
            max_prompt_logits: limits.max_batch_tokens,
            max_draft_tokens: 0,
            prefix_cache: false,
        });
        let pacer = Pacer::new(limits.max_prefill_beside_decode);
        Played { scheduler, pacer, now: 0.0, n_added: 0, open: HashMap::new() }
    }

    /// Seconds since it began.
    pub fn now(&self) -> f64 {
        self.now
    }

    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Nothing to do until then.
    pub fn wait_until(&mut self, now: f64) {
        self.now = self.now.max(now);
    }

    /// A request that comes now. One that does not fit alone would wait for ever: that is for the caller to know.
    pub fn add(&mut self, n_prompt: usize, n_answer: usize) -> u64 {
        let id = SequenceId(self.n_added);
        self.n_added += 1;
        let prompt: Vec<TokenId> = vec![0; n_prompt.max(1)];
        self.scheduler.add(id, Sequence::new(prompt, ""));
        self.open.insert(id, Open { n_answer: n_answer.max(1), n_come: 0 });
        id.0
    }

    /// One step, which takes `seconds` of its work; what came of it. Nothing where there is nothing to do.
    pub fn step(&mut self, seconds: &mut dyn FnMut(&StepWork) -> f64) -> Vec<PlayedToken> {
        if self.is_idle() {
            return Vec::new();
        }
        let pacer = &self.pacer;
        let plan = self.scheduler.plan(&|crowd| pacer.pace(crowd));
        let work = StepWork::of(&plan);
        let seconds = seconds(&work);
        self.now += seconds;
        self.pacer.observe(&work, Duration::from_secs_f64(seconds));
        self.scheduler.commit(&plan);
        let ready = plan.rows.iter().filter(|row| row.catches_up).map(|row| row.id);
        ready.map(|id| self.accept(id)).collect()
    }

    fn accept(&mut self, id: SequenceId) -> PlayedToken {
        self.scheduler.accept(id, &[0]);
        let open = self.open.get_mut(&id).expect("what is planned was added");
        open.n_come += 1;
        let token =
            PlayedToken { id: id.0, is_first: open.n_come == 1, is_last: open.n_come == open.n_answer };
        if token.is_last {
            self.scheduler.remove(id);
            self.open.remove(&id);
        }
        token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_comes_and_takes_its_time() {
        let limits = EngineLimits { max_running: 4, ..EngineLimits::default() };
        let mut played = Played::new(&limits, 100, 16);
        let ids: Vec<u64> = (0..10).map(|_| played.add(100, 7)).collect();
        let (mut n_steps, mut n_prompt, mut first, mut last) = (0, 0, Vec::new(), Vec::new());
        let mut n_tokens = 0;
        while !played.is_idle() {
            let come = played.step(&mut |work| {
                assert!(work.n_decodes <= 4 && work.n_read <= 4 * 107, "{work:?}");
                n_steps += 1;
                n_prompt += work.n_prompt_tokens;
                0.5
            });
            n_tokens += come.len();
            first.extend(come.iter().filter(|token| token.is_first).map(|token| token.id));
            last.extend(come.iter().filter(|token| token.is_last).map(|token| token.id));
        }
        // (Where a prompt was cut before its last token, that one counts as one that decodes.)
        assert!(n_tokens == 70 && (980..=1000).contains(&n_prompt), "{n_tokens} {n_prompt}");
        for seen in [&mut first, &mut last] {
            seen.sort_unstable();
            assert_eq!(*seen, ids);
        }
        assert!((played.now() - 0.5 * f64::from(n_steps)).abs() < 1e-9);
        played.wait_until(1e6);
        assert!(played.step(&mut |_| 1.0).is_empty() && played.now() == 1e6, "nothing was left");
    }
}
