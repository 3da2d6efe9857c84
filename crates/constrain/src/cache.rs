//! The grammars of the last few requests.

use std::sync::Arc;

use crate::state::State;

/// Most recently used last. Small, so that looking through it costs less than a token.
#[derive(Default)]
pub(crate) struct Cache {
    entries: Vec<(String, Arc<State>)>,
}

impl Cache {
    pub(crate) fn get(&mut self, key: &str) -> Option<Arc<State>> {
        let at = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(at);
        let state = entry.1.clone();
        self.entries.push(entry);
        Some(state)
    }

    /// Takes the place of the one that was not used for the longest time, once there are `n_max`.
    pub(crate) fn insert(&mut self, key: String, state: Arc<State>, n_max: usize) {
        self.entries.retain(|(known, _)| *known != key);
        if self.entries.len() >= n_max {
            self.entries.remove(0);
        }
        self.entries.push((key, state));
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}
