use std::time::Duration;

use control::Error;

use crate::Stage;

const TTL: Duration = Duration::from_secs(5);

pub(crate) fn a_lease_has_one_holder_until_it_runs_out_or_is_given_up(stage: &Stage) {
    let (control, clock) = stage.one();
    let first = control.acquire("l", "a", TTL).unwrap().unwrap();
    assert_eq!(control.acquire("l", "b", TTL).unwrap(), None);
    // Holders may be named alike and still be two processes.
    assert_eq!(control.acquire("l", "a", TTL).unwrap(), None);
    assert_eq!(control.lease_holder("l").unwrap().unwrap().holder, "a");
    clock.advance(4_000);
    control.renew(&first, TTL).unwrap();
    clock.advance(4_999);
    assert_eq!(control.acquire("l", "b", TTL).unwrap(), None);
    clock.advance(1);
    assert_eq!(control.lease_holder("l").unwrap(), None);
    let second = control.acquire("l", "b", TTL).unwrap().unwrap();
    assert!(second.token > first.token);

    let stale = control.renew(&first, TTL).unwrap_err();
    assert!(matches!(stale, Error::StaleLease { .. }), "{stale}");
    control.release(&first).unwrap();
    assert_eq!(control.lease_holder("l").unwrap().unwrap().holder, "b");

    control.release(&second).unwrap();
    assert_eq!(control.lease_holder("l").unwrap(), None);
    // What was given up cannot be taken back without asking.
    control.renew(&second, TTL).unwrap_err();
    assert!(control.acquire("l", "c", TTL).unwrap().unwrap().token > second.token);
    assert!(control.acquire("other", "c", TTL).unwrap().is_some());
}

pub(crate) fn a_lease_that_ran_out_unnoticed_is_renewed(stage: &Stage) {
    let (control, clock) = stage.one();
    let lease = control.acquire("l", "a", TTL).unwrap().unwrap();
    clock.advance(60_000);
    control.renew(&lease, TTL).unwrap();
    assert_eq!(control.acquire("l", "b", TTL).unwrap(), None);
}

pub(crate) fn a_clock_set_back_does_not_leave_a_lease_behind_for_hours(stage: &Stage) {
    let (control, clock) = stage.one();
    control.acquire("l", "dead", Duration::from_secs(9_999)).unwrap().unwrap();
    clock.advance(59_999);
    assert_eq!(control.acquire("l", "b", TTL).unwrap(), None, "a minute is the longest");
    clock.advance(1);
    control.acquire("l", "dead too", TTL).unwrap().unwrap();
    clock.advance(-3_600_000);
    assert!(control.acquire("l", "b", TTL).unwrap().is_some());
}

pub(crate) fn of_many_processes_exactly_one_acquires(stage: &Stage) {
    let (controls, clock) = stage.many::<4>();
    for round in 0..10 {
        let won: usize = std::thread::scope(|scope| {
            let tries: Vec<_> = controls
                .iter()
                .map(|control| scope.spawn(|| control.acquire("l", "x", TTL).unwrap().is_some()))
                .collect();
            tries.into_iter().map(|t| usize::from(t.join().unwrap())).sum()
        });
        assert_eq!(won, 1, "round {round}");
        clock.advance(5_000);
    }
}
