//! Promotions in the database.

use std::time::Duration;

use control::{Ask, Effect, Error, JobSpec, JobState, Move, Pipeline, PromotionId, Stage, advance};

use crate::Stage as Database;

fn pipeline() -> Pipeline {
    let text = r#"{"model": "m", "train": {"args": []}, "gate": [{"metric": "validation/bits_per_byte", "at_most": 2}],
        "canary": {"percent": 20}}"#;
    serde_json::from_str(text).unwrap()
}

fn spec() -> JobSpec {
    serde_json::from_str(r#"{"name": "promote/1/train", "args": ["train"], "max_restarts": 0}"#).unwrap()
}

pub(crate) fn a_promotion_is_carried_on_by_whoever_leads_and_by_nobody_else(database: &Database) {
    let ([control, other], clock) = database.many();
    let started = control.start_promotion(&pipeline()).unwrap();
    assert_eq!((started.stage, started.candidate.as_str()), (Stage::Train, "m@1"));
    let refused = other.start_promotion(&pipeline()).unwrap_err();
    assert!(matches!(refused, Error::PromotionConflict { id: PromotionId(1), .. }), "{refused}");

    // One submits the job; the other, whose lease came later, sees it, and the first one's second try changes nothing.
    let stale = control.acquire("deployer", "a", Duration::from_secs(1)).unwrap().unwrap();
    let (known, seen) = control.survey_promotions().unwrap().remove(0);
    let next = advance(&known, &seen, control.now()).unwrap();
    assert_eq!(next.effect, Effect::RunJob);
    assert!(control.record_move(&stale, &known, &next, Some(&spec())).unwrap());
    assert!(!control.record_move(&stale, &known, &next, Some(&spec())).unwrap(), "it is known differently");
    clock.advance(2_000);
    let lease = other.acquire("deployer", "b", Duration::from_secs(60)).unwrap().unwrap();
    let (known, seen) = other.survey_promotions().unwrap().remove(0);
    assert_eq!(seen.job.as_ref().unwrap().0, JobState::Pending);
    assert_eq!(advance(&known, &seen, other.now()), None);
    assert_eq!(other.list_jobs(9).unwrap().len(), 1);

    // Its deployment appears while the candidate is on its way: the move that knew of none is refused.
    let to = |stage, effect| Move { stage, why: "because".to_owned(), effect };
    let scores = [("validation/bits_per_byte".to_owned(), 1.5)].into();
    assert!(other.record_move(&lease, &known, &to(Stage::Gate, Effect::KeepScores(scores)), None).unwrap());
    let known = other.get_promotion(started.id).unwrap().unwrap();
    assert_eq!(known.scores["validation/bits_per_byte"], 1.5);
    let ask = Ask { source: Some("old".to_owned()), ..Ask::default() };
    control.deploy("m", &ask).unwrap();
    assert!(!other.record_move(&lease, &known, &to(Stage::Live, Effect::Deploy), None).unwrap());
    let on_trial = to(Stage::Canary, Effect::StartTrial);
    assert!(matches!(control.record_move(&stale, &known, &on_trial, None), Err(Error::StaleLease { .. })));
    assert!(other.record_move(&lease, &known, &on_trial, None).unwrap());
    assert_eq!(control.get_deployment("m").unwrap().unwrap().canary.unwrap().source, "m@1");

    // A person ends it; what the trial left is taken back in the same step.
    assert!(control.cancel_promotion(started.id).unwrap().cancelled);
    let (known, seen) = other.survey_promotions().unwrap().remove(0);
    let next = advance(&known, &seen, other.now()).unwrap();
    assert!(other.record_move(&lease, &known, &next, None).unwrap());
    let over = control.get_promotion(started.id).unwrap().unwrap();
    let stages: Vec<Stage> = over.history.iter().map(|happening| happening.stage).collect();
    assert_eq!(stages, [Stage::Train, Stage::Train, Stage::Gate, Stage::Canary, Stage::Cancelled]);
    assert_eq!(control.get_deployment("m").unwrap().unwrap().canary, None);
    assert!(control.survey_promotions().unwrap().is_empty());
    assert_eq!(control.start_promotion(&pipeline()).unwrap().candidate, "m@2");
    assert!(matches!(control.cancel_promotion(PromotionId(9)), Err(Error::NoPromotion(_))));
}
