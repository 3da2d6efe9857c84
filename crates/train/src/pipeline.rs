//! When a stage of a pipeline computes what: plain data, known before the step begins.
//!
//! One forward, one backward (Narayanan et al. 2019, "PipeDream"; with one update a step as in "Efficient Large-Scale Language
//! Model Training on GPU Clusters", 2021): a stage computes forward passes until the first gradient can come back, then one of
//! each in turn. So stage s of N keeps N - s micro-batches at most, where all forward passes first would keep all, and every
//! stage takes them in their order, both ways: gradients are summed as on one rank.

/// What a stage does next, with one of its step's micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Forward(usize),
    Backward(usize),
    /// The last stage goes back at once. A stage that has all layers is one.
    Both(usize),
}

/// Micro-batches that a stage has begun and not finished, at most.
pub fn in_flight([stage, n_stages]: [usize; 2], n_micro_batches: usize) -> usize {
    (n_stages - stage).min(n_micro_batches).max(1)
}

/// All that stage `stage` of `n_stages` does in a step.
pub(crate) fn schedule([stage, n_stages]: [usize; 2], n_micro_batches: usize) -> Vec<Action> {
    if stage + 1 == n_stages {
        return (0..n_micro_batches).map(Action::Both).collect();
    }
    // With one more it is full.
    let ahead = in_flight([stage, n_stages], n_micro_batches) - 1;
    let mut actions: Vec<Action> = (0..ahead).map(Action::Forward).collect();
    for micro_batch in 0..n_micro_batches {
        if micro_batch + ahead < n_micro_batches {
            actions.push(Action::Forward(micro_batch + ahead));
        }
        actions.push(Action::Backward(micro_batch));
    }
    actions
}

/// Which part of a step a stage waits, where all take as long and messages take no time.
pub fn bubble(n_stages: usize, n_micro_batches: usize) -> f64 {
    (n_stages - 1) as f64 / (n_micro_batches + n_stages - 1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a forward pass takes, and a backward pass.
    const TAKES: [u64; 2] = [1, 2];

    /// When all are finished, and how many micro-batches each stage had in flight at most. Whoever waits for what never comes
    /// is a panic.
    fn play(n_stages: usize, n_micro_batches: usize) -> (u64, Vec<usize>) {
        let mut todo: Vec<_> = (0..n_stages)
            .map(|stage| schedule([stage, n_stages], n_micro_batches).into_iter().peekable())
            .collect();
        // When each was done, forward and backward, of every stage and micro-batch.
        let mut done = vec![vec![[None; 2]; n_micro_batches]; n_stages];
        let mut now = vec![0; n_stages];
        let (mut flying, mut most) = (vec![0_usize; n_stages], vec![0; n_stages]);
        loop {
            let mut moved = false;
            for stage in 0..n_stages {
                let Some(action) = todo[stage].peek().copied() else { continue };
                let (of, passes) = match action {
                    Action::Forward(of) => (of, 0..1),
                    Action::Backward(of) => (of, 1..2),
                    Action::Both(of) => (of, 0..2),
                };
                let needs = match passes.start {
                    0 if stage == 0 => Some(0),
                    0 => done[stage - 1][of][0],
                    _ => done[stage + 1][of][1],
                };
                let Some(there) = needs else { continue };
                for pass in passes {
                    assert!(done[stage][of][pass].is_none(), "{action:?} of stage {stage} again");
                    assert!(
                        pass == 0 || done[stage][of][0].is_some(),
                        "{action:?} of stage {stage} too early"
                    );
                    now[stage] = now[stage].max(there) + TAKES[pass];
                    done[stage][of][pass] = Some(now[stage]);
                    flying[stage] = if pass == 0 { flying[stage] + 1 } else { flying[stage] - 1 };
                    most[stage] = most[stage].max(flying[stage]);
                }
                todo[stage].next();
                moved = true;
            }
            if todo.iter_mut().all(|todo| todo.peek().is_none()) {
                break;
            }
            assert!(moved, "every stage waits: {n_stages} stages, {n_micro_batches} micro-batches");
        }
        let all = done.iter().flatten().flatten();
        assert!(all.clone().all(Option::is_some), "every pass of every micro-batch once");
        (now.into_iter().max().unwrap_or(0), most)
    }

    #[test]
    fn stages_wait_as_long_and_keep_as_much_as_the_theory_says() {
        for n_stages in 1..=9 {
            for n_micro_batches in 1..=20 {
                let (time, most) = play(n_stages, n_micro_batches);
                let busy = n_micro_batches as u64 * (TAKES[0] + TAKES[1]);
                let waits = 1.0 - busy as f64 / time as f64;
                assert!(
                    (waits - bubble(n_stages, n_micro_batches)).abs() < 1e-9,
                    "{n_stages} {n_micro_batches}"
                );
                let bound = |stage: usize| in_flight([stage, n_stages], n_micro_batches);
                assert_eq!(most, (0..n_stages).map(bound).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_stage_takes_micro_batches_in_their_order() {
        use Action::{Backward as B, Both, Forward as F};
        assert_eq!(schedule([0, 1], 2), [Both(0), Both(1)]);
        assert_eq!(schedule([1, 2], 2), [Both(0), Both(1)]);
        assert_eq!(schedule([0, 2], 3), [F(0), F(1), B(0), F(2), B(1), B(2)]);
        assert_eq!(schedule([0, 4], 2), [F(0), F(1), B(0), B(1)]);
        assert_eq!(schedule([1, 3], 4), [F(0), F(1), B(0), F(2), B(1), F(3), B(2), B(3)]);
    }
}
