//! Kill −9 of the controller itself, over and over.
//!
//! The controller is this test's own executable, started again with an environment variable that turns
//! [`controller_process`] from a test that does nothing into a controller that never returns.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use control::{Control, JobState, LocalLauncher, Policy, Reconciler, ReconcilerOptions};
use telemetry::Metrics;

use crate::{shell, wait_for};

const PLACE_VARIABLE: &str = "LOQUAT_TEST_CONTROLLER";

#[test]
fn controller_process() {
    let Ok(place) = std::env::var(PLACE_VARIABLE) else {
        return;
    };
    let place = Path::new(&place);
    let control = open(place);
    let launcher = LocalLauncher::new(Path::new("/bin/sh"), &place.join("logs")).unwrap();
    let options = ReconcilerOptions {
        policy: Policy {
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_millis(10),
            ..Policy::default()
        },
        lease_ttl: Duration::from_millis(200),
        tick: Duration::from_millis(5),
        ..ReconcilerOptions::default()
    };
    let metrics = Metrics::new();
    let _reconciler = Reconciler::start(&control, Box::new(launcher), metrics.job(), options).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// The place's database: PostgreSQL where a file names one.
fn open(place: &Path) -> Control {
    match fs::read_to_string(place.join("url")) {
        Ok(url) => Control::connect(&url).unwrap(),
        Err(_) => Control::open(&place.join("control.db")).unwrap(),
    }
}

/// A controller process that does not outlive the test.
struct Controller(Child);

impl Controller {
    fn start(place: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::controller_process", "--nocapture"])
            .env(PLACE_VARIABLE, place)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill_9(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // Already dead when the test killed it; then there is nothing to do.
        if self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}

#[test]
fn a_controller_killed_leaves_its_job_to_the_next_one() {
    let place = tempfile::tempdir().unwrap();
    let control = Control::open(&place.path().join("control.db")).unwrap();
    let script =
        format!("cd {}; echo $$ >> runs; while [ ! -e end ]; do sleep 0.01; done", place.path().display());
    let id = control.submit(&shell("train", &script, 0)).unwrap().job.id;
    let first = Controller::start(place.path());
    let runs = || fs::read_to_string(place.path().join("runs")).unwrap_or_default();
    wait_for("the job to run", || runs().ends_with('\n').then_some(()));
    first.kill_9();

    let second = Controller::start(place.path());
    let token = control.lease_holder("reconciler").unwrap().map(|l| l.token);
    wait_for("the next controller", || {
        let now = control.lease_holder("reconciler").unwrap()?;
        (Some(now.token) != token).then_some(())
    });
    std::thread::sleep(Duration::from_millis(100));
    let job = control.get_job(id).unwrap().unwrap();
    assert_eq!((job.state, job.n_starts), (JobState::Running, 1), "it is adopted, not started again");

    // Nobody can tell how an adopted process ends, so it is started once more, finds its work done, and ends.
    fs::write(place.path().join("end"), "").unwrap();
    let job = wait_for("the job to end", || control.get_job(id).unwrap().filter(|job| job.state.is_over()));
    assert_eq!((job.state, job.n_starts, job.n_failures), (JobState::Succeeded, 2, 0));
    second.kill_9();
}

#[test]
fn controllers_killed_at_any_instant_never_run_a_job_twice_at_once() {
    kill_controllers(&tempfile::tempdir().unwrap(), 250);
}

#[test]
fn nor_do_they_over_postgresql() {
    let Some(server) = crate::postgres::Postgres::start() else { return };
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("url"), server.new_database()).unwrap();
    // Connecting takes longer than opening a file.
    kill_controllers(&place, 800);
}

fn kill_controllers(place: &tempfile::TempDir, life_min_ms: u64) {
    let control = open(place.path());
    // The directory is a lock that only one instance can hold; its owner's end is told from a second instance's start by
    // asking whether the recorded pid is alive. Every attempt is short, so that starts are many.
    let script = format!(
        "cd {}; if ! mkdir lock 2>/dev/null; then kill -0 $(cat lock/pid) 2>/dev/null && echo twice >> bad; fi; \
         mkdir -p lock; echo $$ > lock/pid; echo x >> runs; sleep 0.03; rm -r lock; [ -e end ] || exit 75",
        place.path().display()
    );
    let id = control.submit(&shell("train", &script, 0)).unwrap().job.id;
    // As long as it takes to come to the job twice, however busy this machine is.
    let begun = Instant::now();
    let first = Controller::start(place.path());
    wait_for("the job to run", || place.path().join("runs").exists().then_some(()));
    let life = (2 * begun.elapsed()).max(Duration::from_millis(life_min_ms));
    first.kill_9();
    // Pauses from nothing to a few starts, so that the kill falls into every part of a turn.
    for round in 0..12_u64 {
        let controllers = [Controller::start(place.path()), Controller::start(place.path())];
        std::thread::sleep(life + Duration::from_millis(round * 37 % 200));
        for controller in controllers {
            controller.kill_9();
        }
    }
    fs::write(place.path().join("end"), "").unwrap();
    let last = Controller::start(place.path());
    let job = wait_for("the job to end", || control.get_job(id).unwrap().filter(|job| job.state.is_over()));
    last.kill_9();
    assert_eq!(job.state, JobState::Succeeded);
    assert!(!place.path().join("bad").exists(), "two instances ran at once");
    let runs = fs::read_to_string(place.path().join("runs")).unwrap();
    let n_runs = u32::try_from(runs.lines().count()).unwrap();
    assert!(n_runs > 5, "the job hardly ran: {n_runs}");
    assert!(n_runs <= job.n_starts, "{n_runs} runs of {} recorded starts", job.n_starts);
}
