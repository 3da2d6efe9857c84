//! `loquat demo`: the whole way once. Text becomes a dataset, a job trains a model on it while you watch, and the model
//! is served beside a chat model. Started again, it goes on where it was.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use control::{Job, JobSpec, JobState, ModelKind};
use data::{Dataset, IngestPlan, TokenizerSource};
use train::Event;

use crate::args;
use crate::commands::{ingest, up};
use crate::follow::{Follow, Recorder};
use crate::home::Home;
use crate::service::{RunsOn, Service};
use crate::signals::Stop;
use crate::view::View;

const VOCAB: usize = 4096;
const VALIDATION_FRACTION: f64 = 0.03;
/// A training job is started again after so many failures before it counts as failed.
const MAX_RESTARTS: u32 = 20;
const POLL: Duration = Duration::from_millis(100);

pub(crate) fn run(home: &Home, args: &args::Demo) -> Result<ExitCode> {
    let stop = Stop::on_signals()?;
    println!("{}", tensor::cpu::describe());
    let service = Service::start(
        home,
        (&args.listen, None),
        &RunsOn::ThisMachine(args::Offer { node_jobs: 4, ..args::Offer::default() }),
    )?;
    let key = up::console_key(home, &service.control)?;
    println!("console   {}/#key={key}", service.url());
    if let Some(path) = &args.chat_model {
        keep_chat_model(&service, path)?;
    }
    let outcome = train_and_publish(home, args, &service, &stop);
    match outcome {
        Ok(true) => {
            service.refresh_models()?;
            up::tell(&service.state, &service.url(), Some(&key));
            stop.wait();
        }
        Ok(false) => {}
        Err(error) => {
            service.shut_down()?;
            return Err(error);
        }
    }
    println!("stopping: running answers finish, jobs save and stop");
    service.shut_down()?;
    Ok(ExitCode::SUCCESS)
}

fn keep_chat_model(service: &Service, path: &Path) -> Result<()> {
    let path =
        path.canonicalize().with_context(|| format!("cannot open the chat model {}", path.display()))?;
    let name = super::model::name_of(&path.display().to_string());
    service.control.put_model(&name, ModelKind::Chat, &path.display().to_string())?;
    Ok(())
}

/// Returns whether the model is there; `false` means that the user stopped it.
fn train_and_publish(home: &Home, args: &args::Demo, service: &Service, stop: &Stop) -> Result<bool> {
    let store = home.store()?;
    if service.control.get_model(&args.name)?.is_some() {
        return Ok(true);
    }
    if let Err(data::Error::NoDataset { .. }) = Dataset::open(&store, &args.name) {
        let tokenizer = TokenizerSource::Train { vocab_size: VOCAB };
        let mut plan = IngestPlan::new(&args.name, args.text.clone(), tokenizer);
        plan.validation_fraction = VALIDATION_FRACTION;
        ingest::ingest(home, &plan)?;
    }
    if stop.is_set() {
        return Ok(false);
    }
    let job = service.control.submit(&job(home, args)?)?.job;
    follow(home, args, service, stop, job)
}

fn job(home: &Home, args: &args::Demo) -> Result<JobSpec> {
    let mut words = home.as_args();
    let name = &args.name;
    words.extend(["train", "--run", name, "--dataset", name, "--publish", name, "--json"].map(str::to_owned));
    words.extend(match args.steps {
        Some(steps) => ["--steps".to_owned(), steps.to_string()],
        None => ["--minutes".to_owned(), args.minutes.to_string()],
    });
    words.extend(["--checkpoint-every".to_owned(), args.checkpoint_every.to_string()]);
    if let Some(threads) = args.listen.threads {
        words.extend(["--threads".to_owned(), threads.to_string()]);
    }
    Ok(JobSpec {
        name: format!("train-{name}"),
        args: words,
        max_restarts: MAX_RESTARTS,
        ..JobSpec::default()
    })
}

/// Shows the job's events until it is over or the user stops.
fn follow(home: &Home, args: &args::Demo, service: &Service, stop: &Stop, mut job: Job) -> Result<bool> {
    let mut view = View::new();
    train::read_metrics(home.store()?.as_ref(), &args.name)?.iter().for_each(|e| view.remember(e));
    let mut recorder = Recorder::new(service.state.metrics.train(&args.name));
    let mut log = Follow::from_end_of(job.log_path.as_deref());
    let mut n_failures = job.n_failures;
    while !stop.is_set() {
        for line in log.lines(job.log_path.as_deref())? {
            match serde_json::from_str::<Event>(&line) {
                Ok(event) => {
                    recorder.record(&event);
                    view.show(&event);
                }
                Err(_) => println!("{line}"),
            }
        }
        let id = job.id;
        job = service.control.get_job(id)?.with_context(|| format!("{id} is gone"))?;
        if job.n_failures > n_failures {
            n_failures = job.n_failures;
            let why = job.message.as_deref().unwrap_or("it failed");
            println!("the training job {why}; it goes on from its last checkpoint");
        }
        match job.state {
            JobState::Succeeded => return Ok(true),
            JobState::Failed => {
                let tail = service.control.job_log_tail(id, 4096)?;
                bail!("training failed: {}\n{tail}", job.message.unwrap_or_default());
            }
            JobState::Cancelled => bail!("the training job was cancelled"),
            JobState::Pending | JobState::Running | JobState::Interrupted => std::thread::sleep(POLL),
        }
    }
    Ok(false)
}
