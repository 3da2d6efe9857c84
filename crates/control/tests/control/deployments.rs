use std::time::Duration;

use control::{Ask, Error, JobState, Replica};

use crate::{Stage, shell};

fn replica(name: &str, version: &str, own: bool) -> Replica {
    Replica {
        name: name.to_owned(),
        model: "m".to_owned(),
        version: version.to_owned(),
        url: "http://127.0.0.1:1".to_owned(),
        own,
        key: None,
        draining: false,
        seen_at: control::UnixMs(5),
    }
}

pub(crate) fn a_deployment_is_asked_for_changed_and_forgotten(stage: &Stage) {
    let (control, _) = stage.one();
    let deploy = |ask: Ask| control.deploy("m", &ask);
    let error = deploy(Ask { n_replicas: Some(2), ..Ask::default() }).unwrap_err();
    assert!(error.to_string().contains("no source"), "{error}");
    let first = deploy(Ask { n_replicas: Some(2), source: Some("v1".into()), ..Ask::default() }).unwrap();
    assert_eq!((first.n_replicas, first.n_min, first.n_max, first.live.as_str()), (2, 2, 2, "v1"));
    let scaled = deploy(Ask { n_min: Some(0), n_max: Some(1), ..Ask::default() }).unwrap();
    assert_eq!((scaled.n_replicas, scaled.live.as_str()), (1, "v1"));
    for ask in [
        Ask { n_min: Some(3), ..Ask::default() },
        Ask { n_replicas: Some(65), ..Ask::default() },
        Ask { source: Some(String::new()), ..Ask::default() },
    ] {
        let error = deploy(ask.clone()).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{ask:?}: {error}");
    }
    assert_eq!(control.list_deployments().unwrap(), [scaled]);
    let elsewhere = replica("elsewhere", "v1", false);
    control.put_replica(&elsewhere).unwrap();
    control.put_replica(&Replica { url: "ftp://x".into(), ..elsewhere }).unwrap_err();
    assert!(control.undeploy("m").unwrap());
    assert!(!control.undeploy("m").unwrap());
    assert!(control.list_replicas().unwrap().is_empty());
}

pub(crate) fn a_trial_ends_once_and_only_the_one_that_was_on(stage: &Stage) {
    let (control, _) = stage.one();
    control.start_canary("m", "v2", 10).unwrap_err();
    control.deploy("m", &Ask { source: Some("v1".into()), ..Ask::default() }).unwrap();
    for (source, percent) in [("v1", 10), ("v2", 0), ("v2", 100), ("", 5)] {
        control.start_canary("m", source, percent).unwrap_err();
    }
    control.start_canary("m", "v2", 10).unwrap();
    control.put_replica(&replica("ours", "v2", true)).unwrap();
    control.put_replica(&replica("theirs", "v2", false)).unwrap();
    assert!(!control.end_canary("m", "v3", true, "not that one").unwrap());
    assert!(control.end_canary("m", "v2", false, "bad").unwrap());
    assert!(!control.end_canary("m", "v2", true, "too late").unwrap(), "two gateways judge, one decides");
    let after = control.get_deployment("m").unwrap().unwrap();
    assert_eq!((after.live.as_str(), after.canary, after.message.as_deref()), ("v1", None, Some("bad")));
    let left = control.list_replicas().unwrap();
    assert!(left.len() == 1 && left[0].name == "ours" && left[0].draining, "{left:?}");
    control.start_canary("m", "v3", 10).unwrap();
    assert!(control.end_canary("m", "v3", true, "good").unwrap());
    assert_eq!(control.get_deployment("m").unwrap().unwrap().live, "v3");
}

pub(crate) fn a_stale_deployer_changes_nothing(stage: &Stage) {
    let ([here, there], clock) = stage.many();
    here.deploy("m", &Ask { source: Some("v1".into()), n_min: Some(0), n_max: Some(9), ..Ask::default() })
        .unwrap();
    let ttl = Duration::from_secs(5);
    let stale = here.acquire("deployer", "a", ttl).unwrap().unwrap();
    let job = here.start_replica(&stale, &shell("replica/m/1", "true", u32::MAX)).unwrap();
    here.put_replica(&replica("replica/m/1", "v1", true)).unwrap();
    clock.advance(5_000);
    let lease = there.acquire("deployer", "b", ttl).unwrap().unwrap();
    let refused = |outcome: control::Result<()>| {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::StaleLease { .. }), "{error}");
    };
    refused(here.start_replica(&stale, &shell("replica/m/2", "true", u32::MAX)).map(drop));
    refused(here.stop_replica(&stale, job));
    refused(here.drain_replica(&stale, "replica/m/1"));
    refused(here.record_scale(&stale, "m", 1, 3, "more").map(drop));
    refused(here.forget_replicas(&stale).map(drop));
    assert_eq!(there.list_jobs(9).unwrap().len(), 1);
    assert!(!there.list_replicas().unwrap()[0].draining);

    assert!(!there.record_scale(&lease, "m", 2, 3, "it was not 2").unwrap());
    assert!(!there.record_scale(&lease, "m", 1, 10, "over its bound").unwrap());
    assert!(there.record_scale(&lease, "m", 1, 3, "more").unwrap());
    assert_eq!(there.forget_replicas(&lease).unwrap(), 0, "its job is not over");
    there.drain_replica(&lease, "replica/m/1").unwrap();
    there.stop_replica(&lease, job).unwrap();
    assert!(there.list_replicas().unwrap()[0].draining);
    assert_eq!(there.get_job(job).unwrap().unwrap().state, JobState::Pending);
}
