//! What to do about a model's replicas: from how many of which version there should be and which there are. Pure.
//!
//! A new version comes one replica at a time, beside the old ones, and an old one goes only when a new one has been seen to
//! be well in its place: at no time are fewer well than before, as long as the new ones are.

use crate::deployments::{Deployment, is_address};

/// A replica that a job of ours runs, or is about to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    pub name: String,
    pub version: String,
    /// It has generated a token lately.
    pub well: bool,
    pub draining: bool,
    /// Requests it has, as far as is known here.
    pub in_flight: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start one of this version.
    Start { version: String },
    /// No new requests.
    Drain { name: String },
    /// It has drained: end it.
    Stop { name: String },
}

/// The next steps for one model; `None` is a model that replicas shall not serve any more.
pub fn rollout(wanted: Option<&Deployment>, running: &[Running]) -> Vec<Step> {
    let mut steps: Vec<Step> = running
        .iter()
        // Who was never well has no requests; who has none left may go.
        .filter(|replica| replica.draining && replica.in_flight == 0)
        .map(|replica| Step::Stop { name: replica.name.clone() })
        .collect();
    let active: Vec<&Running> = running.iter().filter(|replica| !replica.draining).collect();
    let Some(wanted) = wanted else {
        steps.extend(active.iter().map(|replica| drain(replica)));
        return steps;
    };
    let canary = wanted.canary.as_ref().map(|canary| canary.source.as_str());
    let of = |version: Option<&str>| -> Vec<&Running> {
        active.iter().copied().filter(|r| Some(r.version.as_str()) == version).collect()
    };
    let (live, trial) = (of(Some(&wanted.live)), of(canary));
    let is_old = |r: &&&Running| r.version != wanted.live && Some(r.version.as_str()) != canary;
    let old: Vec<&Running> = active.iter().filter(is_old).copied().collect();
    // Somebody else starts and stops what is an address.
    let is_ours = |source: &str| !is_address(source);
    let n = if is_ours(&wanted.live) { wanted.n_replicas as usize } else { 0 };

    // A trial takes one replica, as long as there is anything to try it on.
    let n_trial = usize::from(canary.is_some_and(is_ours) && n > 0);
    steps.extend(match (canary, trial.len()) {
        (Some(version), 0) if n_trial == 1 => vec![Step::Start { version: version.to_owned() }],
        _ => surplus(&trial, trial.len().saturating_sub(n_trial)),
    });
    // One more than wanted at most, while versions change.
    let room = if old.is_empty() { n } else { n + 1 };
    let n_start = n.saturating_sub(live.len()).min(room.saturating_sub(live.len() + old.len()));
    steps.extend((0..n_start).map(|_| Step::Start { version: wanted.live.clone() }));
    steps.extend(surplus(&live, live.len().saturating_sub(n)));
    let n_well = live.iter().filter(|replica| replica.well).count();
    // Old ones that are not well are no loss; the others go as they are replaced.
    let ill = old.iter().filter(|replica| !replica.well).count();
    steps.extend(surplus(&old, (n_well + old.len()).saturating_sub(n).max(ill).min(old.len())));
    steps
}

/// `n` of the replicas to drain: those that are not well first, then those with the least to do.
fn surplus(replicas: &[&Running], n: usize) -> Vec<Step> {
    let mut sorted = replicas.to_vec();
    sorted.sort_by_key(|replica| (replica.well, replica.in_flight));
    sorted.into_iter().take(n).map(drain).collect()
}

fn drain(replica: &Running) -> Step {
    Step::Drain { name: replica.name.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMs;
    use crate::deployments::Canary;

    fn deployment(n: u32, live: &str, canary: Option<&str>) -> Deployment {
        let canary = canary.map(|source| Canary { source: source.to_owned(), percent: 10 });
        Deployment {
            model: "m".to_owned(),
            n_replicas: n,
            n_min: 0,
            n_max: 9,
            live: live.to_owned(),
            canary,
            args: Vec::new(),
            needs: Default::default(),
            message: None,
            created_at: UnixMs(0),
            changed_at: UnixMs(0),
        }
    }

    /// Steps done by a world in which new replicas become well after a while, crash, and requests end; returns the fewest
    /// well ones seen on the way and the most there were at once.
    fn run(wanted: Option<&Deployment>, running: &mut Vec<Running>, seed: &mut u64) -> (usize, usize) {
        let (mut fewest, mut most) = (usize::MAX, 0);
        for turn in 0..200 {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            for step in rollout(wanted, running) {
                match step {
                    Step::Start { version } => running.push(Running {
                        name: format!("{version}-{turn}-{}", running.len()),
                        version,
                        well: false,
                        draining: false,
                        in_flight: 0,
                    }),
                    Step::Drain { name } => {
                        running.iter_mut().filter(|r| r.name == name).for_each(|r| r.draining = true)
                    }
                    Step::Stop { name } => running.retain(|r| r.name != name),
                }
            }
            fewest = fewest.min(running.iter().filter(|r| r.well && !r.draining).count());
            most = most.max(running.iter().filter(|r| !r.draining).count());
            for (i, replica) in running.iter_mut().enumerate() {
                let chance = (*seed >> (8 * (i % 6))) & 7;
                replica.well |= chance < 2;
                replica.in_flight =
                    if replica.well && !replica.draining { 3 } else { replica.in_flight.saturating_sub(1) };
            }
        }
        (fewest, most)
    }

    fn versions(running: &[Running]) -> Vec<&str> {
        let mut versions: Vec<&str> = running.iter().map(|r| r.version.as_str()).collect();
        versions.sort_unstable();
        versions
    }

    #[test]
    fn replicas_become_what_is_wanted_and_never_fewer_on_the_way() {
        for seed in 0..300 {
            let mut random = seed;
            let mut running = Vec::new();
            run(Some(&deployment(3, "v1", None)), &mut running, &mut random);
            assert_eq!(versions(&running), ["v1"; 3], "seed {seed}");
            // A new version: never fewer than three well ones, never more than four at all.
            let (fewest, most) = run(Some(&deployment(3, "v2", None)), &mut running, &mut random);
            assert_eq!(versions(&running), ["v2"; 3], "seed {seed}");
            assert!(fewest >= 3 && most <= 4, "seed {seed}: {fewest} to {most}");
            // A trial beside them, promoted, and one rolled back.
            run(Some(&deployment(3, "v2", Some("v3"))), &mut running, &mut random);
            assert_eq!(versions(&running), ["v2", "v2", "v2", "v3"], "seed {seed}");
            let (fewest, _) = run(Some(&deployment(3, "v3", None)), &mut running, &mut random);
            assert_eq!(versions(&running), ["v3"; 3], "seed {seed}");
            assert!(fewest >= 3, "seed {seed}");
            run(Some(&deployment(3, "v3", Some("v4"))), &mut running, &mut random);
            run(Some(&deployment(3, "v3", None)), &mut running, &mut random);
            assert_eq!(versions(&running), ["v3"; 3], "seed {seed}");
            // More, fewer, none, and away.
            for n in [5, 1, 0, 2] {
                run(Some(&deployment(n, "v3", None)), &mut running, &mut random);
                assert_eq!(running.len(), n as usize, "seed {seed}");
            }
            run(None, &mut running, &mut random);
            assert!(running.is_empty(), "seed {seed}");
        }
    }

    #[test]
    fn a_version_that_never_gets_well_replaces_nothing() {
        let well = |i: usize| Running {
            name: format!("old{i}"),
            version: "v1".to_owned(),
            well: true,
            draining: false,
            in_flight: 1,
        };
        let mut running: Vec<Running> = (0..2).map(well).collect();
        assert_eq!(
            rollout(Some(&deployment(2, "bad", None)), &running),
            [Step::Start { version: "bad".to_owned() }]
        );
        running.push(Running { name: "new".to_owned(), version: "bad".to_owned(), well: false, ..well(9) });
        assert_eq!(rollout(Some(&deployment(2, "bad", None)), &running), []);
    }
}
