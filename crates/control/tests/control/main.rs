//! The control plane from outside: state in one or many processes, and real processes really killed.

mod crash;
mod deployments;
mod jobs;
mod keys;
mod kubernetes;
mod launcher;
mod leases;
mod models;
mod nodes;
mod outage;
#[path = "../support/postgres.rs"]
mod postgres;
mod promotions;
mod slurm;
mod tables;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use control::{Clock, Control, JobSpec, UnixMs};

/// A clock that moves only when told to.
#[derive(Clone)]
struct HandClock(Arc<AtomicI64>);

impl HandClock {
    fn new() -> Self {
        Self(Arc::new(AtomicI64::new(1_800_000_000_000)))
    }

    fn clock(&self) -> Clock {
        let now = self.clone();
        Clock::new(move || UnixMs(now.0.load(Ordering::SeqCst)))
    }

    fn advance(&self, ms: i64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

/// Where a case of the suite gets its databases from.
enum Stage {
    Sqlite(tempfile::TempDir),
    Postgres(postgres::Postgres),
}

impl Stage {
    /// A new database.
    fn one(&self) -> (Control, HandClock) {
        let ([control], clock) = self.many();
        (control, clock)
    }

    /// A new database as `N` processes see it.
    fn many<const N: usize>(&self) -> ([Control; N], HandClock) {
        let clock = HandClock::new();
        let controls = match self {
            Stage::Sqlite(directory) => {
                let path = directory.path().join("control.db");
                std::array::from_fn(|_| Control::open_with(&path, clock.clock()).unwrap())
            }
            Stage::Postgres(server) => {
                let url = server.new_database();
                std::array::from_fn(|_| Control::connect_with(&url, clock.clock()).unwrap())
            }
        };
        (controls, clock)
    }
}

/// What every database must hold: each case is a test on SQLite and a part of one on PostgreSQL, which takes seconds to
/// start.
macro_rules! suite {
    ($($file:ident::$case:ident,)*) => {
        mod on_sqlite {
            $(#[test]
            fn $case() {
                crate::$file::$case(&crate::Stage::Sqlite(tempfile::tempdir().unwrap()));
            })*
        }

        #[test]
        fn the_suite_holds_on_postgresql() {
            let Some(server) = postgres::Postgres::start() else { return };
            let stage = Stage::Postgres(server);
            $(eprintln!("case {}", stringify!($case));
            $file::$case(&stage);)*
        }
    };
}

suite! {
    nodes::jobs_are_shared_by_nodes_and_each_runs_once,
    nodes::a_name_has_one_machine_until_it_is_given_up,
    nodes::a_job_beyond_all_nodes_or_its_quota_is_refused,
    nodes::a_gang_takes_its_part_of_several_nodes,
    keys::a_key_keeps_its_role,
    deployments::a_deployment_is_asked_for_changed_and_forgotten,
    deployments::a_trial_ends_once_and_only_the_one_that_was_on,
    deployments::a_stale_deployer_changes_nothing,
    promotions::a_promotion_is_carried_on_by_whoever_leads_and_by_nobody_else,
    keys::a_key_is_shown_once_and_known_afterwards,
    keys::a_revoked_key_is_refused_at_once_here_and_within_seconds_elsewhere,
    keys::a_clock_set_back_does_not_keep_a_revoked_key_alive,
    keys::bad_names_are_refused,
    keys::keys_that_are_read_in_time_are_known_without_waiting,
    keys::a_key_made_elsewhere_is_good_at_once_unless_wrong_ones_are_tried_by_the_dozen,
    keys::keys_are_checked_while_they_are_created_and_revoked,
    models::a_model_is_put_replaced_listed_and_deleted,
    models::names_and_sources_that_cannot_be_are_refused,
    leases::a_lease_has_one_holder_until_it_runs_out_or_is_given_up,
    leases::a_lease_that_ran_out_unnoticed_is_renewed,
    leases::a_clock_set_back_does_not_leave_a_lease_behind_for_hours,
    leases::of_many_processes_exactly_one_acquires,
    jobs::a_submission_is_idempotent_while_its_job_is_not_over,
    jobs::a_cancellation_is_kept_and_an_unfinished_job_is_not_deleted,
    jobs::specs_that_cannot_run_are_refused,
    jobs::the_queue_is_bounded,
}

/// A job that runs `script` in the shell, for launchers whose program is the shell.
fn shell(name: &str, script: &str, max_restarts: u32) -> JobSpec {
    JobSpec {
        name: name.to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        max_restarts,
        ..JobSpec::default()
    }
}

/// Waits until `done` gives something; generous, for a busy machine.
fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
