use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::clock::Clock;
use crate::database::Control;
use crate::deployments::Ask;
use crate::job::JobSpec;
use crate::jobs::End;
use crate::leases::Lease;
use crate::testing::Random;

fn pipeline() -> Pipeline {
    let text = r#"{"model": "m", "train": {"args": ["--dataset", "d"]}, "evaluate": {"tasks": ["wet.jsonl"]},
        "gate": [{"metric": "wet/acc", "at_least": 0.5}, {"metric": "validation/bits_per_byte", "at_most": 2.0}],
        "canary": {"percent": 20, "minutes": 5}, "serve": {"replicas": 2}}"#;
    serde_json::from_str(text).unwrap()
}

#[test]
fn pipelines_that_cannot_be_are_refused() {
    let check = |change: fn(&mut Pipeline), expected: &str| {
        let mut changed = pipeline();
        change(&mut changed);
        let error = changed.check().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    pipeline().check().unwrap();
    check(|p| p.source = Some("x".into()), "either `train` or `source`");
    check(|p| p.train = None, "either `train` or `source`");
    check(|p| p.model = "a b".into(), "model name");
    check(|p| p.canary.percent = 100, "1 to 99");
    check(|p| p.canary.minutes = 0, "at least a minute");
    check(|p| p.evaluate.as_mut().unwrap().tasks.clear(), "no tasks");
    check(|p| p.gate[0].at_least = None, "gate wet/acc needs a number");
    check(|p| p.gate[0].at_least = Some(f64::NAN), "gate wet/acc needs a number");
    check(|p| p.gate = vec![p.gate[0].clone(); 101], "more than 100");
    check(|p| p.train.as_mut().unwrap().args = vec!["x".repeat(70_000)], "bytes");
    let unknown = serde_json::from_str::<Pipeline>(r#"{"model": "m", "source": "s", "gates": []}"#);
    assert!(unknown.unwrap_err().to_string().contains("gates"));
}

#[test]
fn a_threshold_holds_or_says_why_not() {
    let check = |score: Option<f64>, expected: &str| {
        let scores = score.map(|score| ("a/b".to_owned(), score)).into_iter().collect();
        let threshold = Threshold { metric: "a/b".into(), at_least: Some(0.25), at_most: Some(0.75) };
        assert_eq!(miss(&threshold, &scores).unwrap_or_default(), expected);
    };
    check(Some(0.25), "");
    check(Some(0.75), "");
    check(Some(0.2), "a/b is 0.2000, at least 0.25 is wanted");
    check(Some(0.8), "a/b is 0.8000, at most 0.75 is allowed");
    check(None, "a/b was not measured");
}

/// Histories of a usual run.
const SEEDS: u64 = 400;
const STEPS: usize = 400;

/// Two controllers that take turns, are interrupted between their look and their word, and lose their lease; jobs that
/// end as they like; people who cancel and deploy. The database is the real one.
struct World {
    random: Random,
    now: Arc<AtomicI64>,
    control: Control,
    leases: [Option<Lease>; 2],
    /// What the candidate is worth, and what gateways will say of it.
    scores: BTreeMap<String, f64>,
    verdict: Verdict,
    /// Moves that came too late and changed nothing.
    n_late: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Good,
    Bad,
    None,
}

impl World {
    fn new(seed: u64) -> World {
        let now = Arc::new(AtomicI64::new(1_800_000_000_000));
        let clock = Arc::clone(&now);
        let control = Control::in_memory(Clock::new(move || UnixMs(clock.load(Ordering::SeqCst)))).unwrap();
        let mut world = World {
            random: Random(seed),
            now,
            control,
            leases: [None, None],
            scores: BTreeMap::new(),
            verdict: Verdict::Good,
            n_late: 0,
        };
        world.verdict = [Verdict::Good, Verdict::Bad, Verdict::None][world.below(3)];
        for metric in ["wet/acc", "validation/bits_per_byte"] {
            let score = [0.4, 0.6, 1.5, f64::NAN][world.below(4)];
            world.scores.insert(metric.to_owned(), score);
        }
        world
    }

    fn below(&mut self, n: usize) -> usize {
        self.random.below(n as u64) as usize
    }

    fn percent(&mut self, share: usize) -> bool {
        self.below(100) < share
    }

    /// One controller's turn; between its look and its word the other may take one, and the world may turn.
    fn turn(&mut self, who: usize, depth: usize) {
        if self.leases[who].is_none() || self.percent(3) {
            let lease = self.control.acquire("deployer", "x", Duration::from_secs(5)).unwrap();
            self.leases[who] = lease.or(self.leases[who].take());
        }
        let Some(lease) = self.leases[who].clone() else { return };
        for (promotion, mut seen) in self.control.survey_promotions().unwrap() {
            seen.scores = self.percent(80).then(|| Ok(self.scores.clone()));
            let Some(next) = advance(&promotion, &seen, self.control.now()) else { continue };
            if depth == 0 && self.percent(20) {
                self.disturb();
                self.turn(1 - who, 1);
            }
            let spec = JobSpec {
                name: format!("promote/{}/{}", promotion.id.0, promotion.stage.as_str()),
                args: vec!["x".to_owned()],
                ..JobSpec::default()
            };
            match self.control.record_move(&lease, &promotion, &next, Some(&spec)) {
                Ok(true) => {}
                Ok(false) => self.n_late += 1,
                Err(Error::StaleLease { .. }) => {
                    self.leases[who] = None;
                    self.n_late += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Time passes, jobs end, gateways judge.
    fn disturb(&mut self) {
        let ms = self.below(20_000) as i64;
        self.now.fetch_add(ms, Ordering::SeqCst);
        for job in self.control.unfinished_jobs().unwrap() {
            if !self.percent(30) {
                continue;
            }
            let lease = self.control.acquire("reconciler", "r", Duration::from_secs(1)).unwrap().unwrap();
            let state = match self.below(10) {
                _ if job.desired == crate::job::Desired::Cancelled => JobState::Cancelled,
                0 => JobState::Failed,
                1 => JobState::Cancelled,
                _ => JobState::Succeeded,
            };
            let message = Some("as it happened".to_owned());
            let end = End { state, ending: None, message, n_failures: 0, n_short: 0, retry_at: None };
            assert!(self.control.record_end(&lease, job.id, None, &end).unwrap());
            self.control.release(&lease).unwrap();
        }
        let Some(deployment) = self.control.get_deployment("m").unwrap() else { return };
        if let Some(canary) = &deployment.canary
            && self.verdict != Verdict::None
            && self.percent(20)
        {
            let promote = self.verdict == Verdict::Good;
            self.control.end_canary("m", &canary.source, promote, "as gateways saw it").unwrap();
        }
    }
}

fn live(control: &Control) -> Option<String> {
    control.get_deployment("m").unwrap().map(|deployment| deployment.live)
}

/// Runs one history; returns how it ended and how many moves came too late.
fn history(seed: u64) -> (Stage, usize) {
    let mut world = World::new(seed);
    let was_deployed = world.percent(70);
    if was_deployed {
        let ask = Ask { source: Some("old".to_owned()), ..Ask::default() };
        world.control.deploy("m", &ask).unwrap();
    }
    let id = world.control.start_promotion(&pipeline()).unwrap().id;
    let again = world.control.start_promotion(&pipeline()).unwrap_err();
    assert!(again.to_string().contains("promotion-1 of m is not over"), "{again}");
    let is_cancelled_at = world.below(120);
    let mut n_after = 0;
    for step in 0..STEPS {
        if step == is_cancelled_at {
            world.control.cancel_promotion(id).unwrap();
        }
        // What is over stays as it is, also when controllers look again.
        n_after += usize::from(world.control.survey_promotions().unwrap().is_empty());
        if n_after >= 10 && world.control.unfinished_jobs().unwrap().is_empty() {
            break;
        }
        let who = world.below(2);
        world.turn(who, 0);
        world.disturb();
    }
    let found = world.control.get_promotion(id).unwrap().unwrap();
    check_end(&world, &found, was_deployed);
    (found.stage, world.n_late)
}

fn check_end(world: &World, found: &Promotion, was_deployed: bool) {
    assert!(found.stage.is_over(), "{found:?}");
    let names: Vec<String> =
        world.control.list_jobs(9).unwrap().into_iter().map(|job| job.spec.name).collect();
    let mut unique = names.clone();
    unique.sort();
    unique.dedup();
    assert!(unique.len() == names.len() && names.len() <= 2, "a stage ran twice: {names:?}");
    let passes = found.pipeline.gate.iter().all(|threshold| miss(threshold, &world.scores).is_none());
    let is_live = live(&world.control).as_deref() == Some("m@1");
    assert_eq!(found.stage == Stage::Live, is_live, "{found:?}");
    assert!(!is_live || passes && (!was_deployed || world.verdict == Verdict::Good), "{found:?}");
    if !is_live {
        assert_eq!(live(&world.control), was_deployed.then(|| "old".to_owned()), "{found:?}");
        let deployment = world.control.get_deployment("m").unwrap();
        assert!(
            deployment.is_none_or(|deployment| deployment.canary.is_none()),
            "a trial is left: {found:?}"
        );
    }
    let stages: Vec<Stage> = found.history.iter().map(|happening| happening.stage).collect();
    assert!(stages.is_sorted(), "{stages:?}");
    assert!(world.control.unfinished_jobs().unwrap().is_empty(), "a job is left: {found:?}");
}

#[test]
fn whatever_happens_only_a_good_model_goes_live_and_no_stage_runs_twice() {
    let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
    let mut n_late = 0;
    for seed in 0..SEEDS {
        let outcome = std::panic::catch_unwind(|| history(seed));
        let Ok((stage, late)) = outcome else { panic!("a history failed with seed {seed}") };
        *ends.entry(stage.as_str()).or_default() += 1;
        n_late += late;
    }
    eprintln!("{SEEDS} seeds: {ends:?}, {n_late} moves too late");
    // The histories must hold what they are meant to test.
    for stage in ["live", "rejected", "rolled_back", "failed", "cancelled"] {
        assert!(ends.get(stage).is_some_and(|n| *n > SEEDS as usize / 100), "{ends:?}");
    }
    assert!(n_late > SEEDS as usize / 10, "{n_late}");
}
