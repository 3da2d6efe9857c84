//! Counting: means with their standard errors.

use serde::Serialize;

/// A mean over items.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metric {
    pub name: &'static str,
    pub value: f64,
    /// Of the mean, items taken as drawn from many: the sample's deviation over the root of their number.
    pub stderr: f64,
}

/// Sums of one metric.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    name: &'static str,
    n: usize,
    sum: f64,
    sum_of_squares: f64,
}

impl Tally {
    pub(crate) fn new(name: &'static str) -> Tally {
        Tally { name, n: 0, sum: 0.0, sum_of_squares: 0.0 }
    }

    pub(crate) fn add(&mut self, value: f64) {
        self.n += 1;
        self.sum += value;
        self.sum_of_squares += value * value;
    }

    pub(crate) fn metric(&self) -> Metric {
        let n = self.n as f64;
        let mean = self.sum / n.max(1.0);
        let squares = (self.sum_of_squares - n * mean * mean).max(0.0);
        let stderr = if self.n < 2 { 0.0 } else { (squares / (n - 1.0) / n).sqrt() };
        Metric { name: self.name, value: mean, stderr }
    }
}

/// The first of the largest, as everybody counts ties.
pub(crate) fn first_best(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.into_iter().enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_those_of_a_sample() {
        let mut tally = Tally::new("acc");
        [1.0, 0.0, 1.0, 1.0].into_iter().for_each(|value| tally.add(value));
        let metric = tally.metric();
        assert_eq!(metric.value, 0.75);
        // Squares 3·(1/4)² + (3/4)² = 3/4; 3/4 / 3 / 4 = 1/16.
        assert!((metric.stderr - 0.25).abs() < 1e-12);
        assert_eq!(Tally::new("acc").metric().stderr, 0.0);
    }

    #[test]
    fn ties_go_to_the_first() {
        assert_eq!(first_best([-3.0, -1.0, -1.0]), 1);
        assert_eq!(first_best([f64::NEG_INFINITY, f64::NEG_INFINITY]), 0);
    }
}
