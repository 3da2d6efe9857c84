//! A request under way: what the scheduler need not know about a sequence.

use std::time::{Duration, Instant};

use telemetry::{EngineMetrics, RequestEnd};

use crate::constraint::{Continuation, allows_others};
use crate::engine::{Stats, Submission};
use crate::request::{Event, FinishReason, Logprobs, Request, TokenId, Usage};
use crate::sampler::{Draw, SampleError, Sampler, TokenCounts};
use crate::scheduler::PlanRow;
use crate::stream::Sender;

pub(crate) struct Live {
    request: Request,
    sender: Sender,
    counts: TokenCounts,
    usage: Usage,
    /// One entry per prompt token scored so far; gone once sent, or never wanted.
    prompt_logprobs: Option<Vec<Option<Logprobs>>>,
    submitted: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// Of `usage.completion`, what the metrics know already.
    n_noted: usize,
    is_prompt_noted: bool,
}

/// What a step brought a sequence.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// The tokens drawn: the row's draft as far as it was right, and one more.
    pub(crate) tokens: Vec<TokenId>,
    /// Why the sequence ends, if it does.
    pub(crate) end: Option<FinishReason>,
}

impl Live {
    pub(crate) fn new(submission: Submission) -> Live {
        let Submission { request, sender, at } = submission;
        Live {
            counts: TokenCounts::new(&request.sampling, &request.tokens),
            usage: Usage { prompt: request.tokens.len(), ..Usage::default() },
            prompt_logprobs: request.prompt_logprobs.map(|_| vec![None]),
            request,
            sender,
            submitted: at,
            admitted: None,
            first_token: None,
            last_token: None,
            n_noted: 0,
            is_prompt_noted: false,
        }
    }

    pub(crate) fn n_prompt(&self) -> usize {
        self.usage.prompt
    }

    /// Tokens that may still come.
    pub(crate) fn n_left(&self) -> usize {
        self.request.max_tokens - self.usage.completion
    }

    pub(crate) fn was_admitted(&self) -> bool {
        self.admitted.is_some()
    }

    pub(crate) fn admit(&mut self, n_cached: usize, now: Instant) {
        self.admitted = Some(now);
        self.usage.cached = n_cached;
        self.sender.set_cached(n_cached);
    }

    /// Why this request should not go on, if so.
    pub(crate) fn unwanted(&self, now: Instant) -> Option<FinishReason> {
        if self.sender.is_abandoned() {
            return Some(FinishReason::Cancelled);
        }
        let is_late = self.request.deadline.is_some_and(|deadline| now - self.submitted > deadline);
        is_late.then_some(FinishReason::Deadline)
    }

    /// Takes a computed row: reports the prompt's log-probabilities, and when the sequence has caught up
    /// draws what its logits give and sends both.
    pub(crate) fn advance(&mut self, sampler: &mut Sampler, row: &PlanRow, logits_rv: &[f32]) -> Progress {
        let mut progress = Progress::default();
        if let Err(error) = self.try_advance(sampler, row, logits_rv, &mut progress) {
            progress.end = Some(FinishReason::Error(error.to_string()));
        }
        progress
    }

    fn try_advance(
        &mut self,
        sampler: &mut Sampler,
        row: &PlanRow,
        logits_rv: &[f32],
        progress: &mut Progress,
    ) -> Result<(), SampleError> {
        self.score_prompt(sampler, row, logits_rv)?;
        if !row.catches_up {
            return Ok(());
        }
        if self.request.max_tokens == 0 {
            progress.end = Some(FinishReason::Length);
            return Ok(());
        }
        // After a wrong guess the logits of the later ones answer a question that does not arise.
        let vocab = logits_rv.len() / row.n_logits;
        let first = row.n_logits - 1 - row.draft.len();
        for (i, logits_v) in logits_rv.chunks_exact(vocab).skip(first).enumerate() {
            let id = self.draw(sampler, logits_v)?;
            progress.tokens.push(id);
            progress.end = self.end_after(id).or_else(|| self.constrain(id));
            if progress.end.is_some() || row.draft.get(i) != Some(&id) {
                break;
            }
        }
        Ok(())
    }

    /// What the sequence would draw from a draft model's logits, `n_ahead` tokens from now: with the
    /// random number of that position, so that models which agree guess right at any temperature.
    pub(crate) fn guess(&self, sampler: &mut Sampler, logits_v: &[f32], n_ahead: usize) -> Option<TokenId> {
        // What a constraint allows is known for the next token only.
        let constraint = self.request.constraint.as_ref().filter(|_| n_ahead == 0);
        let drawn = sampler.draw(&Draw {
            logits_v,
            sampling: &self.request.sampling,
            counts: &self.counts,
            allowed: constraint.map(|constraint| constraint.allowed()),
            banned: &[],
            position: (self.usage.completion + n_ahead) as u64,
            logprobs: None,
        });
        // A draft model that gives nonsense has nothing to propose.
        drawn.ok().map(|drawn| drawn.id)
    }

    /// Draws the next token and sends it, unless it is a stop id.
    fn draw(&mut self, sampler: &mut Sampler, logits_v: &[f32]) -> Result<TokenId, SampleError> {
        let request = &self.request;
        let allowed = request.constraint.as_ref().map(|constraint| constraint.allowed());
        let is_short = self.usage.completion < request.min_tokens
            && allowed.is_none_or(|bits| allows_others(bits, &request.stop_ids));
        let drawn = sampler.draw(&Draw {
            logits_v,
            sampling: &request.sampling,
            counts: &self.counts,
            allowed,
            banned: if is_short { &request.stop_ids } else { &[] },
            position: self.usage.completion as u64,
            logprobs: request.logprobs,
        })?;
        self.usage.completion += 1;
        self.counts.add(&request.sampling, drawn.id);
        if !self.is_stop(drawn.id) {
            self.sender.send(Event::Token { id: drawn.id, logprobs: drawn.logprobs });
        }
        Ok(drawn.id)
    }

    /// Tells the constraint what was drawn, so that what may follow is known before the next step. Runs on the threads
    /// that draw, after the token was sent: all constrained sequences of a step share them, and nobody waits for it but
    /// the next step. At 128 cores this belongs beside the forward pass, on threads of its own.
    fn constrain(&mut self, id: TokenId) -> Option<FinishReason> {
        match self.request.constraint.as_mut()?.commit(id) {
            Ok(Continuation::Open) => None,
            Ok(Continuation::Complete) => Some(FinishReason::Stop),
            Err(why) => Some(FinishReason::Constraint(why)),
        }
    }

    fn is_stop(&self, id: TokenId) -> bool {
        !self.request.ignore_eos && self.request.stop_ids.contains(&id)
    }

    fn end_after(&self, id: TokenId) -> Option<FinishReason> {
        if self.is_stop(id) {
            return Some(FinishReason::Stop);
        }
        (self.usage.completion >= self.request.max_tokens).then_some(FinishReason::Length)
    }

    /// The logits of position p give the log-probability of prompt token p + 1.
    fn score_prompt(
        &mut self,
        sampler: &mut Sampler,
        row: &PlanRow,
        logits_rv: &[f32],
    ) -> Result<(), SampleError> {
        let (Some(scores), Some(n_top)) = (&mut self.prompt_logprobs, self.request.prompt_logprobs) else {
            return Ok(());
        };
        let end = row.start + row.n_tokens;
        let vocab = logits_rv.len() / row.n_logits.max(1);
        for position in end - row.n_logits..end {
            let predicted = position + 1;
            // A preempted sequence computes positions again that were scored before.
            if predicted == scores.len() && predicted < self.request.tokens.len() {
                let row_idx = row.n_logits - (end - position);
                let logits_v = &logits_rv[row_idx * vocab..][..vocab];
                let id = self.request.tokens[predicted];
                scores.push(Some(sampler.logprobs(logits_v, id, n_top)?));
            }
        }
        if end >= self.request.tokens.len() {
            let scores = self.prompt_logprobs.take().unwrap_or_default();
            self.sender.send(Event::PromptLogprobs(scores));
        }
        Ok(())
    }

    /// Brings metrics and statistics up to date after a step whose logits were ready at `computed`.
    pub(crate) fn note_progress(
        &mut self,
        row: &PlanRow,
        metrics: &EngineMetrics,
        stats: &mut Stats,
        computed: Instant,
    ) {
        if row.catches_up && !self.is_prompt_noted {
            self.is_prompt_noted = true;
            metrics.prompt_done(self.usage.prompt, self.usage.cached);
            stats.prompt_tokens += self.usage.prompt as u64;
        }
        let n_new = self.usage.completion - self.n_noted;
        if n_new == 0 {
            return;
        }
        self.n_noted += n_new;
        stats.generation_tokens += n_new as u64;
        // The tokens of one step came together; each is said to have taken its share of the time.
        let gaps = match self.last_token.replace(computed) {
            Some(last_token) => vec![(computed - last_token) / n_new as u32; n_new],
            None => {
                metrics.first_token(computed - self.submitted);
                self.first_token = Some(computed);
                vec![Duration::ZERO; n_new - 1]
            }
        };
        gaps.into_iter().for_each(|gap| metrics.token_gap(gap));
    }

    /// Sends the last event and tells the metrics.
    pub(crate) fn finish(self, reason: FinishReason, metrics: &EngineMetrics, now: Instant) {
        let admitted = self.admitted.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        metrics.finished(&RequestEnd {
            reason: in_metrics(&reason),
            n_prompt_tokens: self.usage.prompt,
            n_cached_tokens: self.usage.cached,
            n_generated_tokens: self.usage.completion,
            max_tokens: self.request.max_tokens,
            queue: admitted - self.submitted,
            prefill: first_token - admitted,
            decode: self.last_token.unwrap_or(first_token) - first_token,
            total: now - self.submitted,
        });
        self.sender.send(Event::Finished { reason, usage: self.usage });
    }
}

fn in_metrics(reason: &FinishReason) -> telemetry::FinishReason {
    match reason {
        FinishReason::Stop => telemetry::FinishReason::Stop,
        FinishReason::Length => telemetry::FinishReason::Length,
        FinishReason::Cancelled | FinishReason::Deadline => telemetry::FinishReason::Abort,
        FinishReason::Constraint(_) | FinishReason::Error(_) => telemetry::FinishReason::Error,
    }
}
