//! Real processes under the local launcher and the reconciler's thread.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use control::{
    Control, Ending, Job, JobId, JobSpec, JobState, Launcher, LocalLauncher, Needs, Observed, Policy,
    Reconciler, ReconcilerOptions, Shutdown, SlurmLauncher, SlurmOptions, StopHow,
};
use telemetry::Metrics;

use crate::kubernetes::{Kubernetes, more_than_every_launcher_must};
use crate::slurm::{Site, Slurm};
use crate::{shell, wait_for};

/// A control plane of its own in a directory of its own, with the shell as the program of its jobs.
struct Place<'a> {
    on: On<'a>,
    directory: tempfile::TempDir,
    control: Control,
    metrics: Metrics,
}

/// What runs the jobs.
#[derive(Clone, Copy)]
enum On<'a> {
    ThisMachine,
    Slurm(&'a Slurm),
    Kubernetes(&'a Kubernetes),
}

impl<'a> Place<'a> {
    fn new() -> Self {
        Self::on(On::ThisMachine)
    }

    fn on(on: On<'a>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let control = Control::open(&directory.path().join("control.db")).unwrap();
        let metrics = Metrics::new();
        Self { on, directory, control, metrics }
    }

    fn is_here(&self) -> bool {
        matches!(self.on, On::ThisMachine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn launcher(&self) -> LocalLauncher {
        LocalLauncher::new(Path::new("/bin/sh"), &self.path("logs")).unwrap()
    }

    fn reconciler(&self) -> Reconciler {
        let (launcher, options): (Box<dyn Launcher + Send>, _) = match self.on {
            On::ThisMachine => (Box::new(self.launcher()), quick()),
            On::Kubernetes(kubernetes) => {
                (Box::new(kubernetes.launcher(&self.path("logs"), &self.control)), quick())
            }
            On::Slurm(slurm) => {
                let options = SlurmOptions { conf: Some(slurm.conf()), sbatch: Vec::new() };
                let launcher = SlurmLauncher::new(Path::new("/bin/sh"), &self.path("logs"), options);
                // Each look is a command.
                (
                    Box::new(launcher.unwrap()),
                    ReconcilerOptions { tick: Duration::from_millis(300), ..quick() },
                )
            }
        };
        Reconciler::start(&self.control, launcher, self.metrics.job(), options).unwrap()
    }

    fn submit(&self, spec: &JobSpec) -> JobId {
        self.control.submit(spec).unwrap().job.id
    }

    fn job(&self, id: JobId) -> Job {
        self.control.get_job(id).unwrap().unwrap()
    }

    fn wait_state(&self, id: JobId, state: JobState) -> Job {
        wait_for(&format!("{id} to be {state:?}"), || {
            let job = self.job(id);
            assert!(job.state == state || !job.state.is_over(), "{job:?}");
            (job.state == state).then_some(job)
        })
    }

    /// Waits for `name` to exist and hold a line; returns the line.
    fn wait_line(&self, name: &str) -> String {
        wait_for(name, || {
            let text = fs::read_to_string(self.path(name)).ok()?;
            text.strip_suffix('\n').map(str::to_owned)
        })
    }
}

/// Short pauses, so that the tests are.
pub(crate) fn quick() -> ReconcilerOptions {
    ReconcilerOptions {
        policy: Policy {
            backoff_min: Duration::from_millis(20),
            stop_grace: Duration::from_millis(300),
            ..Policy::default()
        },
        lease_ttl: Duration::from_secs(5),
        tick: Duration::from_millis(20),
        ..ReconcilerOptions::default()
    }
}

/// Whether the process is there and not a zombie.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    state.is_some_and(|state| state != b'Z')
}

fn kill_9(pid: u32) {
    let killed =
        std::process::Command::new("/bin/sh").args(["-c", &format!("kill -9 {pid}")]).status().unwrap();
    assert!(killed.success());
}

fn a_job_runs_to_success_with_its_output_logged(place: &Place) {
    let mut spec = shell("hello", "echo out $GREETING; echo err >&2; pwd", 0);
    spec.env.insert("GREETING".to_owned(), "hi there".to_owned());
    let id = place.submit(&spec);
    let reconciler = place.reconciler();
    let job = place.wait_state(id, JobState::Succeeded);
    reconciler.stop(Shutdown::Leave);
    assert_eq!(job.ending, Some(Ending::Exited(0)));
    assert_eq!((job.n_starts, job.n_failures), (1, 0));
    assert!(job.process.is_none() && job.finished_at.is_some() && job.started_at.is_some());
    let log = place.control.job_log_tail(id, 10_000).unwrap();
    assert!(
        log.contains("attempt 1") && log.contains("\nout hi there\n") && log.contains("\nerr\n"),
        "{log}"
    );

    place.control.delete_job(id).unwrap();
    assert!(place.control.get_job(id).unwrap().is_none());
    assert_eq!(fs::read_dir(place.path("logs")).unwrap().count(), 0);
    let text = place.metrics.render();
    assert!(
        text.contains("loquat_job_starts_total 1\n") && text.contains("loquat_job_lease_held 0\n"),
        "{text}"
    );
}

fn a_failing_job_is_restarted_and_then_given_up(place: &Place) {
    let id = place.submit(&shell("fails", "echo try; exit 3", 2));
    let reconciler = place.reconciler();
    let job = place.wait_state(id, JobState::Failed);
    reconciler.stop(Shutdown::Leave);
    assert_eq!(job.ending, Some(Ending::Exited(3)));
    assert_eq!((job.n_starts, job.n_failures), (3, 3));
    assert_eq!(job.message.as_deref(), Some("attempt 3 exited with code 3"));
    let log = place.control.job_log_tail(id, 10_000).unwrap();
    assert_eq!(log.matches("\ntry\n").count(), 3, "{log}");
}

fn a_job_killed_is_started_again_and_goes_on(place: &Place) {
    // Goes on where it was: the second attempt finds the file of the first.
    let script = format!(
        "cd {}; if [ -e half ]; then echo done > whole; else echo $$ > half; exec sleep 600; fi",
        place.directory.path().display()
    );
    let id = place.submit(&shell("train", &script, 1));
    let reconciler = place.reconciler();
    let pid: u32 = place.wait_line("half").parse().unwrap();
    let recorded = place.job(id).process.unwrap().pid;
    assert!(!place.is_here() || recorded == pid, "the job's pid is the recorded one");
    kill_9(pid);
    let job = place.wait_state(id, JobState::Succeeded);
    reconciler.stop(Shutdown::Leave);
    assert_eq!((job.n_starts, job.n_failures), (2, 1));
    assert_eq!(place.wait_line("whole"), "done");
}

fn an_interrupted_job_goes_on_without_counting_as_failed(place: &Place) {
    let script = format!(
        "cd {}; echo x >> tries; [ $(wc -l < tries) = 3 ] || exit 75",
        place.directory.path().display()
    );
    let id = place.submit(&shell("patient", &script, 0));
    let reconciler = place.reconciler();
    let job = place.wait_state(id, JobState::Succeeded);
    reconciler.stop(Shutdown::Leave);
    assert_eq!((job.n_starts, job.n_failures), (3, 0));
}

fn a_cancelled_job_may_save_and_is_killed_if_it_will_not_end(place: &Place) {
    let here = place.directory.path().display();
    let polite = format!(
        "trap 'echo saved > {here}/saved; exit 75' TERM; echo up > {here}/polite; while :; do sleep 0.01; done"
    );
    let stubborn = format!("trap '' TERM; echo up > {here}/stubborn; while :; do sleep 0.01; done");
    let polite = place.submit(&shell("polite", &polite, 0));
    let stubborn = place.submit(&shell("stubborn", &stubborn, 0));
    let reconciler = place.reconciler();
    place.wait_line("polite");
    place.wait_line("stubborn");
    let pid = place.job(stubborn).process.unwrap().pid;
    place.control.cancel_job(polite).unwrap();
    place.control.cancel_job(stubborn).unwrap();
    let job = place.wait_state(polite, JobState::Cancelled);
    // A pod that is asked to go takes its last word with it.
    let told = !matches!(place.on, On::Kubernetes(_));
    assert_eq!(job.ending, Some(if told { Ending::Exited(75) } else { Ending::Signaled(15) }));
    assert_eq!(place.wait_line("saved"), "saved");
    let job = place.wait_state(stubborn, JobState::Cancelled);
    // Slurm tells whose word ended it and not what did.
    assert!(matches!(job.ending, Some(Ending::Signaled(9 | 15))), "{job:?}");
    assert!(!place.is_here() || job.ending == Some(Ending::Signaled(9)), "{job:?}");
    assert!(!place.is_here() || !lives(pid));
    reconciler.stop(Shutdown::Leave);
}

#[test]
fn what_a_job_left_running_is_ended_before_it_starts_again() {
    let place = Place::new();
    // The child leaves the group and the session; only the mark in its environment tells whose it is.
    // A killed process may stay in the table until its new parent asks for it, so its state is read, too.
    let script = format!(
        "cd {}; if [ -e child ]; then grep -q '^State:.[^ZX]' /proc/$(cat child)/status && echo alive > beside || echo gone > beside; \
         else setsid sh -c 'echo $$ > child; exec sleep 600' & while [ ! -s child ]; do sleep 0.01; done; exit 1; fi",
        place.directory.path().display()
    );
    let id = place.submit(&shell("leaves", &script, 1));
    let reconciler = place.reconciler();
    place.wait_state(id, JobState::Succeeded);
    reconciler.stop(Shutdown::Leave);
    let child: u32 = place.wait_line("child").parse().unwrap();
    assert!(!lives(child));
    assert_eq!(place.wait_line("beside"), "gone");
}

fn interrupted_by_a_shutdown_a_job_goes_on_with_the_next_controller(place: &Place) {
    let script = format!(
        "cd {}; trap 'echo saved > saved; exit 75' TERM; [ -e saved ] && exit 0; echo up > up; while :; do sleep 0.01; done",
        place.directory.path().display()
    );
    let id = place.submit(&shell("train", &script, 0));
    let first = place.reconciler();
    place.wait_line("up");
    first.stop(Shutdown::Interrupt);
    let job = place.job(id);
    assert_eq!((job.state, job.n_failures), (JobState::Interrupted, 0));
    assert_eq!(place.control.lease_holder("reconciler").unwrap(), None, "the lease is given up");
    let second = place.reconciler();
    let job = place.wait_state(id, JobState::Succeeded);
    second.stop(Shutdown::Leave);
    assert_eq!((job.n_starts, job.n_failures), (2, 0));
}

#[test]
fn a_program_that_is_not_there_fails_the_job_with_its_name() {
    let place = Place::new();
    let id = place.submit(&shell("x", "true", 1));
    let program = Path::new("/nowhere/loquat");
    let launcher = LocalLauncher::new(program, &place.path("logs")).unwrap();
    let reconciler =
        Reconciler::start(&place.control, Box::new(launcher), place.metrics.job(), quick()).unwrap();
    let job = place.wait_state(id, JobState::Failed);
    reconciler.stop(Shutdown::Leave);
    assert_eq!(job.ending, Some(Ending::NotStarted));
    let message = job.message.unwrap();
    assert!(message.contains("/nowhere/loquat") && message.contains("No such file"), "{message}");
}

#[test]
fn two_controllers_run_a_job_once() {
    let place = Place::new();
    let script = format!("cd {}; echo $$ >> runs; sleep 0.3", place.directory.path().display());
    let first = place.reconciler();
    let other = Control::open(&place.path("control.db")).unwrap();
    let second =
        Reconciler::start(&other, Box::new(place.launcher()), Metrics::new().job(), quick()).unwrap();
    let ids: Vec<JobId> = (0..3).map(|n| place.submit(&shell(&format!("job{n}"), &script, 0))).collect();
    for id in ids {
        assert_eq!(place.wait_state(id, JobState::Succeeded).n_starts, 1);
    }
    first.stop(Shutdown::Leave);
    second.stop(Shutdown::Leave);
    let runs = fs::read_to_string(place.path("runs")).unwrap();
    assert_eq!(runs.lines().count(), 3, "{runs:?}");
}

#[test]
fn a_prepared_process_does_nothing_until_released_and_ends_with_its_launcher() {
    let place = Place::new();
    let script = format!("echo ran > {}", place.path("ran").display());
    let id = place.submit(&shell("x", &script, 0));
    let mut launcher = place.launcher();
    let mut job = place.job(id);

    let abandoned = launcher.prepare(&job).unwrap().process;
    assert!(lives(abandoned.pid));
    launcher.abandon(&abandoned).unwrap();
    assert!(!Path::new(&format!("/proc/{}", abandoned.pid)).exists(), "it is reaped, too");

    let dropped = launcher.prepare(&job).unwrap().process;
    job.process = Some(dropped.clone());
    assert_eq!(launcher.poll(&job).unwrap(), Observed::Running);
    drop(launcher);
    wait_for("the gate to close", || (!lives(dropped.pid)).then_some(()));
    assert!(!place.path("ran").exists());

    let mut launcher = place.launcher();
    assert_eq!(launcher.poll(&job).unwrap(), Observed::Ended(Ending::Lost));
    let released = launcher.prepare(&job).unwrap().process;
    job.process = Some(released.clone());
    launcher.release(&released).unwrap();
    let ended = wait_for("the job to end", || match launcher.poll(&job).unwrap() {
        Observed::Running => None,
        ended => Some(ended),
    });
    assert_eq!(ended, Observed::Ended(Ending::Exited(0)));
    assert_eq!(launcher.poll(&job).unwrap(), ended, "the answer stays until it is recorded");
    launcher.forget(&released);
    assert_eq!(place.wait_line("ran"), "ran");
}

#[test]
fn a_recycled_pid_or_another_boot_is_not_taken_for_the_job() {
    let place = Place::new();
    let id = place.submit(&shell("x", "exec sleep 600", 0));
    let mut launcher = place.launcher();
    let mut job = place.job(id);
    let real = launcher.prepare(&job).unwrap().process;
    launcher.release(&real).unwrap();
    let mut older = real.clone();
    older.start_ticks -= 1;
    older.mark = "0".repeat(32);
    let mut other_boot = real.clone();
    other_boot.boot_id = "another".to_owned();
    for foreign in [older, other_boot] {
        job.process = Some(foreign.clone());
        assert_eq!(launcher.poll(&job).unwrap(), Observed::Ended(Ending::Lost), "{foreign:?}");
        launcher.stop(&foreign, StopHow::Ask).unwrap();
        launcher.stop(&foreign, StopHow::Kill).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    assert!(lives(real.pid), "a process that is not the job's was stopped");
    launcher.stop(&real, StopHow::Kill).unwrap();
    job.process = Some(real);
    wait_for("the process to end", || {
        (launcher.poll(&job).unwrap() == Observed::Ended(Ending::Signaled(9))).then_some(())
    });
}

/// What every launcher must do: each case is a test of child processes and a part of one on Slurm, which takes seconds to
/// start.
macro_rules! launcher_suite {
    ($($case:ident,)*) => {
        mod child_processes {
            $(#[test]
            fn $case() {
                super::$case(&super::Place::new());
            })*
        }

        #[test]
        fn the_suite_holds_on_slurm() {
            let Some(slurm) = Slurm::start(Site::loopback()) else { return };
            $(eprintln!("case {}", stringify!($case));
            $case(&Place::on(On::Slurm(&slurm)));)*
            a_job_on_hold_that_nobody_released_is_lost(&slurm);
            needs_are_asked_of_slurm(&slurm);
        }

        #[test]
        fn the_suite_holds_on_a_stand_in_for_kubernetes() {
            let kubernetes = Kubernetes::start();
            $(eprintln!("case {}", stringify!($case));
            $case(&Place::on(On::Kubernetes(&kubernetes)));)*
            more_than_every_launcher_must(&kubernetes);
            kubernetes.validate();
        }
    };
}

launcher_suite! {
    a_job_runs_to_success_with_its_output_logged,
    a_failing_job_is_restarted_and_then_given_up,
    a_job_killed_is_started_again_and_goes_on,
    an_interrupted_job_goes_on_without_counting_as_failed,
    a_cancelled_job_may_save_and_is_killed_if_it_will_not_end,
    interrupted_by_a_shutdown_a_job_goes_on_with_the_next_controller,
}

/// A controller died between the record and the release: the next one may not release it, and starts it again.
fn a_job_on_hold_that_nobody_released_is_lost(slurm: &Slurm) {
    let place = Place::on(On::Slurm(slurm));
    let id = place.submit(&shell("held", "true", 0));
    let options = SlurmOptions { conf: Some(slurm.conf()), sbatch: Vec::new() };
    let mut launcher = SlurmLauncher::new(Path::new("/bin/sh"), &place.path("logs"), options).unwrap();
    let job = place.job(id);
    let prepared = launcher.prepare(&job).unwrap();
    let recorded = Job { process: Some(prepared.process.clone()), ..job };
    assert_eq!(launcher.poll(&recorded).unwrap(), Observed::Ended(Ending::Lost));
    assert_eq!(launcher.poll(&recorded).unwrap(), Observed::Ended(Ending::Lost), "until it is forgotten");
    launcher.forget(&prepared.process);
    assert_eq!(launcher.poll(&recorded).unwrap(), Observed::Ended(Ending::Signaled(15)));
    // Another job's number is not this one's.
    let mut other = recorded;
    other.process.as_mut().unwrap().mark = "another".to_owned();
    assert_eq!(launcher.poll(&other).unwrap(), Observed::Ended(Ending::Lost));
    launcher.stop(&prepared.process, StopHow::Kill).unwrap();
}

/// Three ranks of two cores get room on two nodes of four, and their process learns where. Who asks for too much is told so.
fn needs_are_asked_of_slurm(slurm: &Slurm) {
    let place = Place::on(On::Slurm(slurm));
    let told = place.path("told");
    let text = format!(
        "{{ echo $SLURM_NTASKS $SLURM_CPUS_PER_TASK $SLURM_MEM_PER_CPU $LOQUAT_HOSTS; \
         $LOQUAT_REMOTE_SHELL n2 /bin/sh -c 'echo on $SLURMD_NODENAME'; }} | tr '\\n' ' ' > {0}.new; \
         echo >> {0}.new; mv {0}.new {0}",
        told.display()
    );
    let mut gang = shell("gang", &text, 0);
    gang.needs = Needs { cores: 2, memory_bytes: 200 << 20, accelerators: 0, ranks: 3 };
    let asks = |name: &str, needs| JobSpec { needs, ..shell(name, "true", 0) };
    let greedy = asks("greedy", Needs { cores: 1000, ..Needs::default() });
    let crowd = asks("crowd", Needs { cores: 3, ranks: 4, ..Needs::default() });
    let [gang, greedy, crowd] = [gang, greedy, crowd].map(|spec| place.submit(&spec));
    let reconciler = place.reconciler();
    place.wait_state(gang, JobState::Succeeded);
    assert_eq!(place.wait_line("told"), "3 2 100 n1,n2 on n2 ");
    for (id, words) in [(greedy, "cores"), (crowd, "ranks")] {
        let why = place.wait_state(id, JobState::Failed).message.unwrap_or_default();
        assert!(why.contains(words) && why.contains(if id == greedy { "4" } else { "3" }), "{why}");
    }
    reconciler.stop(Shutdown::Leave);
}

/// Control groups of a test.
struct Groups([PathBuf; 2]);

impl Drop for Groups {
    fn drop(&mut self) {
        for group in &self.0 {
            // There is something to remove only where the test failed.
            for below in fs::read_dir(group).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(below.path());
            }
            let _ = fs::remove_dir(group);
        }
    }
}

/// Two of version 1 that are ours, one with memory and one with cores; `None`, said loudly, where none can be made.
fn cgroups() -> Option<Groups> {
    let name = format!("loquat-test-{}", std::process::id());
    let groups = ["memory", "cpu"].map(|kind| Path::new("/sys/fs/cgroup").join(kind).join(&name));
    if groups.iter().any(|group| fs::create_dir(group).is_err()) {
        eprintln!("SKIPPED: no control group can be made here (it needs root and version 1 of them)");
        return None;
    }
    Some(Groups(groups))
}

#[test]
fn a_job_gets_no_more_than_it_asked_for() {
    let Some(groups) = cgroups() else { return };
    let place = Place::new();
    // What it may have of the cores, then some 200 MB.
    let text = "cat /sys/fs/cgroup/cpu$(sed -n 's/.*:cpu://p' /proc/self/cgroup)/cpu.cfs_quota_us; \
                head -c 200000000 /dev/zero | tail -c 200000000 | wc -c";
    let mut modest = shell("modest", text, 0);
    modest.needs = Needs { cores: 1, memory_bytes: 1 << 30, ..Needs::default() };
    let mut greedy = shell("greedy", text, 0);
    greedy.needs = Needs { cores: 1, memory_bytes: 50 << 20, ..Needs::default() };
    let (modest, greedy) = (place.submit(&modest), place.submit(&greedy));
    let launcher = Box::new(place.launcher().within(&groups.0).unwrap());
    let reconciler = Reconciler::start(&place.control, launcher, place.metrics.job(), quick()).unwrap();
    let told = [modest, greedy].map(|id| {
        wait_for("the end", || place.job(id).state.is_over().then_some(()));
        place.control.job_log_tail(id, 10_000).unwrap()
    });
    reconciler.stop(Shutdown::Leave);
    let [modest, greedy] = told.each_ref().map(|log| log.lines().skip(1).collect::<Vec<_>>());
    assert_eq!(modest, ["100000", "200000000"]);
    // The shell tells of it before or after the count of nothing.
    assert!(
        greedy.len() == 3 && ["100000", "Killed", "0"].iter().all(|line| greedy.contains(line)),
        "{greedy:?}"
    );
    // Only ours can be removed: none of a job's is left in them.
    groups.0.iter().for_each(|group| fs::remove_dir(group).unwrap());
    let refused = place.launcher().within(&groups.0).unwrap_err().to_string();
    assert!(refused.contains("cannot hold jobs"), "{refused}");
}
