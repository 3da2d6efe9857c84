//! One output's way through a grammar.

use std::fmt;

use engine::{Constraint, Continuation, TokenId};
use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

pub(crate) struct State {
    matcher: Matcher,
    /// What may come next; always the matcher's answer after the last token.
    allowed: SimpleVob,
}

impl State {
    /// Where every output of this grammar begins.
    pub(crate) fn new(mut matcher: Matcher) -> Result<State, String> {
        let allowed = matcher.compute_mask().map_err(|e| plain(&e.to_string()))?;
        Ok(State { matcher, allowed })
    }

    /// A copy with caches of its own: drawing threads never wait for each other.
    pub(crate) fn fork(&self) -> State {
        State { matcher: self.matcher.deep_clone(), allowed: self.allowed.clone() }
    }
}

impl Constraint for State {
    fn allowed(&self) -> &[u32] {
        self.allowed.as_slice()
    }

    fn commit(&mut self, id: TokenId) -> Result<Continuation, String> {
        let explain = |e: &dyn fmt::Display| {
            format!("the output's grammar became too complex: {}", plain(&e.to_string()))
        };
        self.matcher.consume_token(id).map_err(|e| explain(&e))?;
        if self.matcher.is_stopped() {
            let reason = self.matcher.stop_reason();
            return if reason.is_ok() { Ok(Continuation::Complete) } else { Err(explain(&reason)) };
        }
        self.allowed = self.matcher.compute_mask().map_err(|e| explain(&e))?;
        Ok(Continuation::Open)
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(State::fork(self))
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "State({} ids may come next)", self.allowed.num_set())
    }
}

/// llguidance's messages without the state they may carry behind the first line.
pub(crate) fn plain(message: &str) -> String {
    message.split("\n<").next().unwrap_or_default().trim().to_owned()
}
