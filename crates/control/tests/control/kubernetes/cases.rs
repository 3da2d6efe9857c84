//! What the Kubernetes launcher must do beyond the suite of all launchers: who made a Job and died, who sleeps, a server that
//! goes away, other people's objects.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use control::{
    Control, Ending, Error, Job, JobSpec, JobState, KubernetesLauncher, Launcher, Needs, Observed,
    Reconciler, Shutdown, StopHow,
};
use serde_json::json;
use telemetry::Metrics;

use super::Kubernetes;
use crate::launcher::quick;
use crate::{shell, wait_for};

pub(crate) fn more_than_every_launcher_must(kubernetes: &Kubernetes) {
    one_that_was_never_released_is_lost_and_its_sleeping_maker_cannot_release_it(kubernetes);
    what_a_dead_controller_made_is_taken_over(kubernetes);
    a_server_that_is_away_costs_no_attempt(kubernetes);
    every_option_makes_a_valid_manifest_and_ranks_are_pods(kubernetes);
    bad_options_are_refused_by_name(kubernetes);
}

struct Place {
    directory: tempfile::TempDir,
    control: Control,
}

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let control = Control::open(&directory.path().join("control.db")).unwrap();
        Place { directory, control }
    }

    fn launcher(&self, kubernetes: &Kubernetes) -> KubernetesLauncher {
        kubernetes.launcher(&self.directory.path().join("logs"), &self.control)
    }

    fn job(&self, spec: &JobSpec) -> Job {
        self.control.submit(spec).unwrap().job
    }
}

fn name_of(process: &control::ProcessRef) -> String {
    process.boot_id.split('/').nth(2).unwrap().to_owned()
}

fn one_that_was_never_released_is_lost_and_its_sleeping_maker_cannot_release_it(kubernetes: &Kubernetes) {
    let place = Place::new();
    let job = place.job(&shell("held", "true", 0));
    let (mut maker, mut next) = (place.launcher(kubernetes), place.launcher(kubernetes));
    let prepared = maker.prepare(&job).unwrap();
    let recorded = Job { process: Some(prepared.process.clone()), ..job };
    std::thread::sleep(Duration::from_millis(100));
    assert!(
        !kubernetes.objects().n_started.contains_key(&name_of(&prepared.process)),
        "it ran before its release"
    );
    assert_eq!(next.poll(&recorded).unwrap(), Observed::Ended(Ending::Lost));
    assert_eq!(next.poll(&recorded).unwrap(), Observed::Ended(Ending::Lost), "until it is forgotten");
    assert!(maker.release(&prepared.process).is_err());
    next.forget(&prepared.process);
    assert!(!kubernetes.objects().jobs.contains_key(&name_of(&prepared.process)));
    // What is gone is stopped without an error.
    next.stop(&prepared.process, StopHow::Ask).unwrap();
    next.stop(&prepared.process, StopHow::Kill).unwrap();
}

fn what_a_dead_controller_made_is_taken_over(kubernetes: &Kubernetes) {
    let place = Place::new();
    let ran = place.directory.path().join("ran");
    let job = place.job(&shell("twice", &format!("echo x >> {}", ran.display()), 0));
    let (mut maker, mut next) = (place.launcher(kubernetes), place.launcher(kubernetes));
    let made = maker.prepare(&job).unwrap().process;
    let taken = next.prepare(&job).unwrap().process;
    assert_eq!(name_of(&made), name_of(&taken), "one attempt, one object");
    assert_ne!(made.mark, taken.mark);
    // The maker wakes up, finds that it may not record it, and gives it up: that must not touch the other's.
    assert!(maker.abandon(&made).is_err());
    assert!(maker.release(&made).is_ok(), "it has given it up already");
    next.release(&taken).unwrap();
    let recorded = Job { process: Some(taken.clone()), ..job };
    let ended = wait_for("the job to end", || {
        next.tick();
        match next.poll(&recorded).unwrap() {
            Observed::Running => None,
            ended => Some(ended),
        }
    });
    assert_eq!(ended, Observed::Ended(Ending::Exited(0)));
    assert_eq!(std::fs::read_to_string(&ran).unwrap(), "x\n");
    // One that runs already is nobody's to start.
    let error = maker.prepare(&Job { process: None, ..recorded }).unwrap_err().to_string();
    assert!(error.contains("not ours to start"), "{error}");
    next.forget(&taken);
}

fn a_server_that_is_away_costs_no_attempt(kubernetes: &Kubernetes) {
    let place = Place::new();
    let reconciler = |launcher| {
        Reconciler::start(&place.control, Box::new(launcher), Metrics::new().job(), quick()).unwrap()
    };
    let running = reconciler(place.launcher(kubernetes));
    kubernetes.state.down.store(true, Ordering::SeqCst);
    let id = place.job(&shell("patient", "true", 0)).id;
    std::thread::sleep(Duration::from_millis(300));
    let job = place.control.get_job(id).unwrap().unwrap();
    assert_eq!((job.state, job.n_failures), (JobState::Pending, 0), "{job:?}");
    kubernetes.state.down.store(false, Ordering::SeqCst);
    wait_for("the job to end", || {
        let job = place.control.get_job(id).unwrap().unwrap();
        (job.state == JobState::Succeeded).then_some(())
    });
    running.stop(Shutdown::Leave);
}

fn every_option_makes_a_valid_manifest_and_ranks_are_pods(kubernetes: &Kubernetes) {
    let place = Place::new();
    let mut options = kubernetes.options();
    let more = json!({
        "secret": "loquat", "accelerator": "nvidia.com/gpu",
        "pod": {"nodeSelector": {"pool": "gpu"}, "serviceAccountName": "trainer",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "volumes": [{"name": "home", "emptyDir": {}}]},
        "container": {"volumeMounts": [{"name": "home", "mountPath": "/home/loquat"}],
            "resources": {"limits": {"ephemeral-storage": "1Gi"}}},
    });
    options.secret = Some("loquat".to_owned());
    options.pod = more["pod"].as_object().unwrap().clone();
    options.container = more["container"].as_object().unwrap().clone();
    let mut launcher =
        KubernetesLauncher::new(options, place.directory.path(), &place.control.cluster_id().unwrap())
            .unwrap();
    let env: BTreeMap<String, String> = [("DOLLARS".to_owned(), "$(HOME) $$".to_owned())].into();
    let here = place.directory.path().display();
    let script = format!(
        "echo $JOB_COMPLETION_INDEX of $LOQUAT_PODS; echo $LOQUAT_POD_GROUP > {here}/rank$JOB_COMPLETION_INDEX; \
         echo \"$DOLLARS of $LOQUAT_ADDRESS\" > {here}/said"
    );
    let needs = Needs { cores: 2, memory_bytes: 3 << 30, accelerators: 1, ranks: 3 };
    let job = place.job(&JobSpec { env, needs, ..shell("full", &script, 0) });
    let prepared = launcher.prepare(&job).unwrap();
    let process = prepared.process;
    launcher.release(&process).unwrap();
    let said = wait_for("a word", || {
        std::fs::read_to_string(place.directory.path().join("said")).ok().filter(|text| text.ends_with('\n'))
    });
    assert_eq!(said, "$(HOME) $$ of 10.0.0.7\n", "nothing of a job's words is Kubernetes' to replace");
    let container =
        &kubernetes.objects().jobs[&name_of(&process)]["spec"]["template"]["spec"]["containers"][0].clone();
    let requests = json!({"cpu": "2", "memory": "3221225472", "nvidia.com/gpu": "1"});
    assert_eq!(container["resources"]["requests"], requests);
    assert_eq!(container["resources"]["limits"]["ephemeral-storage"], "1Gi");
    wait_for("every rank", || {
        (0..3).all(|rank| place.directory.path().join(format!("rank{rank}")).exists()).then_some(())
    });
    // All of them are of one attempt, and of no other.
    let group = |rank: usize| {
        std::fs::read_to_string(place.directory.path().join(format!("rank{rank}")))
            .ok()
            .filter(|text| text.len() > 1)
    };
    let groups = wait_for("every rank's group", || (0..3).map(group).collect::<Option<Vec<String>>>());
    assert!(groups.iter().all(|group| group.trim() == process.mark), "{groups:?}");
    // Each line says whose it is.
    let recorded = Job { process: Some(process.clone()), log_path: prepared.log_path, ..job };
    let ended = wait_for("the job to end", || {
        launcher.tick();
        Some(launcher.poll(&recorded).unwrap()).filter(|seen| *seen != Observed::Running)
    });
    assert_eq!(ended, Observed::Ended(Ending::Exited(0)));
    let log = std::fs::read_to_string(recorded.log_path.as_ref().unwrap()).unwrap();
    assert!((0..3).all(|rank| log.contains(&format!("[{rank}] {rank} of 3\n"))), "{log}");
    launcher.forget(&process);
}

fn bad_options_are_refused_by_name(kubernetes: &Kubernetes) {
    let directory = tempfile::tempdir().unwrap();
    let refused = |change: &dyn Fn(&mut control::KubernetesOptions), words: &[&str]| {
        let mut options = kubernetes.options();
        change(&mut options);
        let error = KubernetesLauncher::new(options, directory.path(), "0123456789abcdef").unwrap_err();
        let text = telemetry::chain(&error);
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert!(!text.contains(super::TOKEN), "a token in an error: {text}");
        error
    };
    let wrong = directory.path().join("wrong");
    std::fs::write(&wrong, "wrong").unwrap();
    let token = |path: &Path| {
        let path = path.to_owned();
        move |options: &mut control::KubernetesOptions| options.token_file = Some(path.clone())
    };
    drop(refused(&token(&wrong), &["list", "401", "Unauthorized"]));
    drop(refused(&token(Path::new("/nowhere/token")), &["/nowhere/token"]));
    drop(refused(&|options| options.namespace = "other".into(), &["404"]));
    drop(refused(&|options| options.namespace = "a/../b".into(), &["a/../b"]));
    drop(refused(&|options| options.ca_file = Some(wrong.clone()), &["certificate", "wrong"]));
    let error = refused(&|options| options.server = "http://127.0.0.1:1".into(), &["127.0.0.1:1"]);
    assert!(matches!(error, Error::KubernetesUnreachable { .. }), "{error}");
}
