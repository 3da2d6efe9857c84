//! [`Stripes`]: where a part's flat vector lies in the whole model's.
//!
//! A rank that computes a part of a model (some heads, some layers), or owns some of a part's numbers, has a vector of its own.
//! Its numbers are numbers of the whole's vector in runs: a matrix of which a part has columns is a run a row, a stage of
//! layers one run in all. What is written by one division of a model is so read by any other.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// `n` equally long runs of the whole's vector, `stride` from start to start; in the part's vector one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stripe {
    /// Of the first run.
    start: usize,
    end: usize,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    n: usize,
    #[serde(default, skip_serializing_if = "is_zero")]
    stride: usize,
}

/// All numbers of a part's vector, in its order and without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Stripes(Vec<Stripe>);

impl Stripe {
    /// `n` runs of `len`.
    ///
    /// # Panics
    /// If they overlap.
    pub fn new(start: usize, len: usize, [n, stride]: [usize; 2]) -> Stripe {
        assert!(n <= 1 || len <= stride, "runs of {len} every {stride}");
        match n == 1 || len == stride {
            true => Stripe { start, end: start + n * len, n: 1, stride: 0 },
            false => Stripe { start, end: start + len, n, stride },
        }
    }

    fn run(&self) -> usize {
        self.end - self.start
    }

    fn len(&self) -> usize {
        self.n * self.run()
    }

    /// Where the last run ends.
    fn last_end(&self) -> usize {
        self.end + (self.n - 1) * self.stride
    }

    /// Where a run lies in the whole, or some of it.
    fn at(&self, run: usize, part: Range<usize>) -> Range<usize> {
        let start = self.start + run * self.stride;
        start + part.start..start + part.end
    }
}

impl Stripes {
    /// The whole is its own part.
    pub fn whole(n: usize) -> Stripes {
        Stripes::of_ranges(&[Range { start: 0, end: n }])
    }

    /// Ranges of the whole, as they come.
    pub fn of_ranges(ranges: &[Range<usize>]) -> Stripes {
        let mut stripes = Stripes::default();
        ranges.iter().for_each(|range| stripes.push(Stripe::new(range.start, range.len(), [1, 0])));
        stripes
    }

    /// What comes next in the part.
    pub fn push(&mut self, stripe: Stripe) {
        if stripe.len() == 0 {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.n == 1 && stripe.n == 1 && last.end == stripe.start => last.end = stripe.end,
            _ => self.0.push(stripe),
        }
    }

    /// Length of the part's vector; `None` where it is none that there can be (of stripes that were read).
    pub fn checked_len(&self) -> Option<usize> {
        self.0.iter().try_fold(0_usize, |len, stripe| {
            let run = stripe.end.checked_sub(stripe.start)?;
            let last = stripe.stride.checked_mul(stripe.n.checked_sub(1)?)?;
            stripe.end.checked_add(last)?;
            (stripe.n == 1 || run <= stripe.stride).then_some(())?;
            len.checked_add(stripe.n.checked_mul(run)?)
        })
    }

    /// Length of the part's vector.
    #[expect(clippy::len_without_is_empty, reason = "a part that has nothing is no special one")]
    pub fn len(&self) -> usize {
        self.0.iter().map(Stripe::len).sum()
    }

    /// Every run, where it lies in the whole; in the order of the part, where each begins where the one before it ends.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        self.0.iter().flat_map(|stripe| (0..stripe.n).map(|run| stripe.at(run, 0..stripe.run())))
    }

    /// Of the part what lies in these ranges of it, which are in order and do not overlap.
    pub fn cut(&self, ranges: &[Range<usize>]) -> Stripes {
        let (mut cut, mut begun) = (Stripes::default(), 0);
        for stripe in &self.0 {
            let end = begun + stripe.len();
            let first = ranges.partition_point(|range| range.end <= begun);
            for range in ranges[first..].iter().take_while(|range| range.start < end) {
                cut.push_some(stripe, range.start.max(begun) - begun..range.end.min(end) - begun);
            }
            begun = end;
        }
        cut
    }

    /// Some numbers of a stripe: the end of a run, whole ones, the beginning of one.
    fn push_some(&mut self, stripe: &Stripe, part: Range<usize>) {
        let len = stripe.run();
        let (first, last) = (part.start / len, part.end / len);
        let (from, until) = (part.start % len, part.end % len);
        let mut push = |run: usize, of_run: Range<usize>, n: usize| {
            self.push(Stripe::new(stripe.at(run, of_run.clone()).start, of_run.len(), [n, stripe.stride]));
        };
        if first == last {
            return push(first, from..until, 1);
        }
        let whole = first + usize::from(from > 0);
        if from > 0 {
            push(first, from..len, 1);
        }
        if whole < last {
            push(whole, 0..len, last - whole);
        }
        push(last, 0..until, 1);
    }

    /// Of these stripes what lies in a range of the whole, where a part's numbers are in the order of the whole.
    pub fn inside(&self, range: &Range<usize>) -> Stripes {
        let mut inside = Stripes::default();
        let first = self.0.partition_point(|stripe| stripe.last_end() <= range.start);
        for stripe in self.0[first..].iter().take_while(|stripe| stripe.start < range.end) {
            if range.start <= stripe.start && stripe.last_end() <= range.end {
                inside.push(*stripe);
                continue;
            }
            for run in (0..stripe.n).map(|run| stripe.at(run, 0..stripe.run())) {
                let (start, end) = (run.start.max(range.start), run.end.min(range.end));
                inside.push(Stripe::new(start, end.saturating_sub(start), [1, 0]));
            }
        }
        inside
    }

    /// The part's numbers of a whole vector.
    pub fn take(&self, whole: &[f32], part: &mut [f32]) {
        let mut rest = part;
        for run in self.runs() {
            let (to, behind) = rest.split_at_mut(run.len());
            to.copy_from_slice(&whole[run]);
            rest = behind;
        }
    }

    /// Puts the part's numbers where they belong.
    pub fn put(&self, part: &[f32], whole: &mut [f32]) {
        let mut rest = part;
        for run in self.runs() {
            let (from, behind) = rest.split_at(run.len());
            whole[run].copy_from_slice(from);
            rest = behind;
        }
    }
}

fn one() -> usize {
    1
}

fn is_one(n: &usize) -> bool {
    *n == 1
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of a matrix, columns of another, a range behind them.
    fn stripes() -> Stripes {
        let mut stripes = Stripes::of_ranges(std::slice::from_ref(&(5..8)));
        stripes.push(Stripe::new(20, 3, [4, 10]));
        stripes.push(Stripe::new(70, 4, [2, 4]));
        stripes
    }

    fn numbers(stripes: &Stripes) -> Vec<usize> {
        stripes.runs().flatten().collect()
    }

    #[test]
    fn any_ranges_of_a_part_lie_where_its_numbers_do() {
        let stripes = stripes();
        let all = numbers(&stripes);
        assert_eq!(all.len(), stripes.len());
        assert_eq!(all[..6], [5, 6, 7, 20, 21, 22]);
        for a in 0..=all.len() {
            for b in a..=all.len() {
                for c in b..=all.len() {
                    let cut = stripes.cut(&[0..a, b..c]);
                    let expected = [&all[..a], &all[b..c]].concat();
                    assert_eq!(numbers(&cut), expected, "{a} {b} {c}");
                    assert_eq!(cut.checked_len(), Some(expected.len()));
                }
            }
        }
        assert_eq!(Stripes::whole(9).cut(&[0..3, 3..9]), Stripes::whole(9), "what touches is one");
    }

    #[test]
    fn any_range_of_the_whole_has_the_numbers_that_lie_in_it() {
        let (stripes, all) = (stripes(), numbers(&stripes()));
        for start in 0..90 {
            for end in start..90 {
                let expected: Vec<usize> =
                    all.iter().copied().filter(|at| (start..end).contains(at)).collect();
                assert_eq!(numbers(&stripes.inside(&(start..end))), expected, "{start}..{end}");
            }
        }
    }

    #[test]
    fn what_is_taken_is_put_back() {
        let whole: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let stripes = stripes();
        let mut part = vec![0.0; stripes.len()];
        stripes.take(&whole, &mut part);
        let mut put = vec![-1.0; 100];
        stripes.put(&part, &mut put);
        let there = numbers(&stripes);
        assert!((0..100).all(|i| put[i] == if there.contains(&i) { i as f32 } else { -1.0 }));
    }

    #[test]
    fn they_are_read_as_they_were_written_and_ranges_as_well() {
        let json = serde_json::to_string(&stripes()).unwrap();
        assert_eq!(serde_json::from_str::<Stripes>(&json).unwrap(), stripes());
        let ranges: Stripes = serde_json::from_str(r#"[{"start": 2, "end": 5}]"#).unwrap();
        assert_eq!(ranges, Stripes::of_ranges(&[Range { start: 2, end: 5 }]));
        for none in [
            r#"[{"start": 5, "end": 2}]"#,
            r#"[{"start": 0, "end": 2, "n": 0}]"#,
            r#"[{"start": 0, "end": 3, "n": 2, "stride": 2}]"#,
            r#"[{"start": 0, "end": 3, "n": 18446744073709551615, "stride": 9}]"#,
        ] {
            assert_eq!(serde_json::from_str::<Stripes>(none).unwrap().checked_len(), None, "{none}");
        }
    }
}
