use control::{Desired, Error, JobId, JobSpec, JobState};

use crate::{Stage, shell};

pub(crate) fn a_submission_is_idempotent_while_its_job_is_not_over(stage: &Stage) {
    let (control, clock) = stage.one();
    let first = control.submit(&shell("train", "true", 3)).unwrap();
    assert!(first.created);
    assert_eq!(first.job.state, JobState::Pending);
    assert_eq!(first.job.created_at, control.now());
    clock.advance(5);
    let again = control.submit(&shell("train", "true", 3)).unwrap();
    assert!(!again.created);
    assert_eq!(again.job, first.job);

    let error = control.submit(&shell("train", "false", 3)).unwrap_err();
    assert!(error.to_string().contains("train") && error.to_string().contains("job-1"), "{error}");
    let other = control.submit(&shell("other", "false", 3)).unwrap();
    let ids: Vec<JobId> = control.list_jobs(10).unwrap().iter().map(|j| j.id).collect();
    assert_eq!(ids, [other.job.id, first.job.id]);
    assert_eq!(control.list_jobs(1).unwrap().len(), 1);
    assert_eq!(control.get_job(first.job.id).unwrap(), Some(first.job));
    assert_eq!(control.get_job(JobId(99)).unwrap(), None);
}

pub(crate) fn a_cancellation_is_kept_and_an_unfinished_job_is_not_deleted(stage: &Stage) {
    let (control, _) = stage.one();
    let id = control.submit(&shell("train", "true", 3)).unwrap().job.id;
    assert_eq!(control.cancel_job(id).unwrap().desired, Desired::Cancelled);
    assert_eq!(control.cancel_job(id).unwrap().desired, Desired::Cancelled);
    let error = control.delete_job(id).unwrap_err();
    assert!(matches!(error, Error::JobUnfinished(_)), "{error}");
    for error in [
        control.cancel_job(JobId(99)).unwrap_err(),
        control.delete_job(JobId(99)).unwrap_err(),
        control.job_log_tail(JobId(99), 10).unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "no job job-99");
    }
    assert_eq!(control.job_log_tail(id, 1_000).unwrap(), "", "it never ran");
}

pub(crate) fn specs_that_cannot_run_are_refused(stage: &Stage) {
    let (control, _) = stage.one();
    let good = shell("train", "true", 3);
    let check = |spec: JobSpec| {
        let error = control.submit(&spec).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    };
    check(shell("", "true", 0));
    check(shell("a b", "true", 0));
    check(shell("train", "a\0b", 0));
    check(shell("train", &"x".repeat(70_000), 0));
    for (name, value) in [("", "x"), ("A=B", "x"), ("A", "x\0")] {
        let env = [(name.to_owned(), value.to_owned())].into();
        check(JobSpec { env, ..good.clone() });
    }
    assert!(control.list_jobs(10).unwrap().is_empty());
}

pub(crate) fn the_queue_is_bounded(stage: &Stage) {
    let (control, _) = stage.one();
    for n in 0..1_000 {
        control.submit(&shell(&format!("job{n}"), "true", 0)).unwrap();
    }
    let error = control.submit(&shell("one-more", "true", 0)).unwrap_err();
    assert!(matches!(error, Error::TooMany { max: 1_000, .. }), "{error}");
    // A repeated submission still finds its job.
    assert!(!control.submit(&shell("job7", "true", 0)).unwrap().created);
}
