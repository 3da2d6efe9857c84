//! Stop strings over a text that arrives in pieces.

/// Holds back only what may still become a stop string, and ends the text before the first one that is complete.
#[derive(Debug, Default)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Text not yet passed on. Always a proper prefix of some stop string once `push` has returned.
    held: String,
}

/// What may be passed on, and whether a stop string ended the text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) text: String,
    pub(crate) stopped: bool,
}

impl StopMatcher {
    /// Stop strings must not be empty.
    pub(crate) fn new(stops: Vec<String>) -> StopMatcher {
        assert!(stops.iter().all(|stop| !stop.is_empty()), "an empty stop string");
        StopMatcher { stops, held: String::new() }
    }

    pub(crate) fn push(&mut self, piece: &str) -> Passed {
        if self.stops.is_empty() {
            return Passed { text: piece.to_owned(), stopped: false };
        }
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return Passed { text: std::mem::take(&mut self.held), stopped: true };
        }
        let n_passed = self.held.len() - self.possible_start();
        let rest = self.held.split_off(n_passed);
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// What was held back, once it is clear that nothing follows.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of `held` that begin a stop string.
    fn possible_start(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0).min(self.held.len());
        (1..=longest)
            .rev()
            .filter(|n| self.held.is_char_boundary(self.held.len() - n))
            .find(|n| self.stops.iter().any(|stop| stop.starts_with(&self.held[self.held.len() - n..])))
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text passed on when `text` comes in pieces of `size` characters.
    fn passed(stops: &[&str], text: &str, size: usize) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let chars: Vec<char> = text.chars().collect();
        let mut out = String::new();
        for piece in chars.chunks(size) {
            let Passed { text, stopped } = matcher.push(&piece.iter().collect::<String>());
            out.push_str(&text);
            if stopped {
                return (out, true);
            }
        }
        (out + &matcher.finish(), false)
    }

    #[test]
    fn the_cut_does_not_depend_on_the_pieces() {
        let cases: [(&[&str], &str, &str, bool); 9] = [
            (&["\n\n"], "one\ntwo\n\nthree", "one\ntwo", true),
            (&["END"], "the EN of it", "the EN of it", false),
            (&["END"], "the ENEND!", "the EN", true),
            (&["abab"], "aababab", "a", true),
            (&["aab"], "aaaab", "aa", true),
            (&["é!"], "caféé!", "café", true),
            (&["🙂"], "a🙃🙂b", "a🙃", true),
            (&["xyz", "y"], "wxy", "wx", true),
            (&[], "all of it", "all of it", false),
        ];
        for (stops, text, want, stopped) in cases {
            for size in 1..=text.chars().count() {
                assert_eq!(passed(stops, text, size), (want.into(), stopped), "{stops:?} {text:?} by {size}");
            }
        }
    }

    #[test]
    fn nothing_is_held_back_without_need() {
        let mut matcher = StopMatcher::new(vec!["stop".into()]);
        assert_eq!(matcher.push("no s").text, "no ");
        assert_eq!(matcher.push("un").text, "sun");
        assert_eq!(matcher.push("sto").text, "");
        assert_eq!(matcher.finish(), "sto");
    }
}
