//! PostgreSQL killed under those who use it.

use std::time::{Duration, Instant};

use control::{Control, Error, ModelKind, Role};

use crate::postgres::Postgres;
use crate::{HandClock, shell, wait_for};

#[test]
fn without_the_database_keys_are_known_changes_refused_and_all_goes_on_when_it_is_back() {
    let Some(mut server) = Postgres::start() else { return };
    let url = server.new_database();
    let clock = HandClock::new();
    let control = Control::connect_with(&url, clock.clock()).unwrap();
    let key = control.create_key("k", Role::Use).unwrap();
    control.put_model("m", ModelKind::Chat, "models/m").unwrap();
    let lease = control.acquire("reconciler", "a", Duration::from_secs(60)).unwrap().unwrap();
    assert!(control.check_key(key.expose()).unwrap().is_some());

    server.kill_9();
    let started = Instant::now();
    for _ in 0..60 {
        clock.advance(1_000);
        assert!(control.check_key(key.expose()).unwrap().is_some(), "serving goes on");
        assert!(control.check_key("sk-loquat-wrong").unwrap().is_none());
    }
    let error = control.submit(&shell("train", "true", 0)).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("submit a job") && text.contains("postgres://app@127.0.0.1"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(10), "refusals take no time: {:?}", started.elapsed());

    server.resume();
    wait_for("the database", || control.list_models().ok());
    // What was acknowledged before the crash is there, and the lease is still held.
    assert_eq!(control.list_models().unwrap().len(), 1);
    control.renew(&lease, Duration::from_secs(60)).unwrap();
    assert!(control.submit(&shell("train", "true", 0)).unwrap().created);
}

#[test]
fn a_restart_between_two_calls_is_not_noticed() {
    let Some(mut server) = Postgres::start() else { return };
    let control = Control::connect(&server.new_database()).unwrap();
    control.submit(&shell("first", "true", 0)).unwrap();
    server.kill_9();
    server.resume();
    control.submit(&shell("second", "true", 0)).unwrap();
    assert_eq!(control.list_jobs(9).unwrap().len(), 2);
}

#[test]
fn of_many_writers_at_once_none_is_lost_and_none_doubled() {
    let Some(server) = Postgres::start() else { return };
    let url = server.new_database();
    std::thread::scope(|scope| {
        for n in 0..6 {
            let url = &url;
            scope.spawn(move || {
                let control = Control::connect(url).unwrap();
                for job in 0..20 {
                    // Everybody submits the same twenty jobs and one of their own.
                    control.submit(&shell(&format!("shared{job}"), "true", 0)).unwrap();
                }
                control.submit(&shell(&format!("own{n}"), "true", 0)).unwrap();
            });
        }
    });
    let jobs = Control::connect(&url).unwrap().list_jobs(999).unwrap();
    assert_eq!(jobs.len(), 26);
}
