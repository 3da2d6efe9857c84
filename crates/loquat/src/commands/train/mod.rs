//! `loquat train`: one training run, by hand or as a job of the control plane.

mod board;
pub(crate) mod cluster;
mod dry_run;
mod launch;
mod memory;
mod plan;
mod ranks;
mod supervise;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use tensor::Pool;
use train::{Event, Outcome, Plan, Zero};

use self::launch::Launched;

use crate::args;
use crate::home::Home;
use crate::machine::{memory_available, process_memory_left};
use crate::pods::Group;
use crate::signals::Stop;
use crate::view::View;

/// Micro-batches that are tried out to know how long a step takes.
const TRIALS: usize = 5;

/// In which a supervisor says why the ranks before these ended.
const AFTER: &str = "LOQUAT_AFTER";

pub(crate) fn run(home: &Home, args: &args::Train) -> Result<ExitCode> {
    let launched = Launched::of(&|name| std::env::var(name).ok());
    if launched.is_none()
        && !args.dry_run
        && let Some(ended) = start_ranks(home, args)
    {
        return ended;
    }
    let store = home.store()?;
    let n_local = launched.as_ref().map_or(1, |launched| launched.n_local);
    let n_threads = args.threads.unwrap_or_else(|| (crate::n_threads() / n_local).max(1));
    let pool = Arc::new(Pool::new(n_threads));
    let limits = tensor::limits::measure(&pool);
    let peak_flops = if tensor::cpu::features().bf16 { limits.bf16_per_s } else { limits.f32_per_s };
    if args.dry_run {
        dry_run::run(args, plan::plan(home, args, &pool)?, (&pool, peak_flops))?;
        return Ok(ExitCode::SUCCESS);
    }
    let run = args.run_name();
    crate::pods::check_connected(launched.as_ref().map_or(1, |launched| launched.n_ranks))?;
    let member = match &launched {
        None => {
            plan_if_new(home, args, &pool)?;
            None
        }
        Some(launched) => match ranks::join((home, args), launched, &pool)? {
            Ok(member) => Some(member),
            Err(code) => return Ok(code),
        },
    };
    let n_ranks = launched.map_or(args.ranks, |launched| launched.n_ranks);
    // Of all ranks together: processes have as many each.
    let n_threads = if member.is_some() { n_threads * n_ranks } else { n_threads };
    drop(pool);
    // The run then ends after its step, with a checkpoint.
    let stop = Stop::on_signals()?;
    stop.on_usr1()?;
    let start = Instant::now();
    let context = train::Context {
        store: store.clone(),
        run: run.to_owned(),
        n_ranks,
        n_team: args.distributed.tp,
        n_stages: args.distributed.pp,
        hosts: member.as_ref().map_or(Vec::new(), |member| member.hosts.clone()),
        after: std::env::var(AFTER).ok(),
        zero: zero(args),
        n_threads,
        recompute: args.recompute,
        peak_flops,
        stop: stop.flag(),
        seconds: &|| start.elapsed().as_secs_f64(),
        started_unix: crate::now_unix_s() as f64,
    };
    let mut view = View::new();
    if !args.json {
        train::read_metrics(store.as_ref(), run)?.iter().for_each(|e| view.remember(e));
    }
    let mut on_event = |event: &Event| match args.json {
        true => print_line(&event.to_line()),
        false => view.show(event),
    };
    let outcome = match member {
        None => train::run(&context, &mut on_event)?,
        Some(member) => member.train(&context, &mut on_event)?,
    };
    Ok(match outcome {
        Outcome::Finished => ExitCode::SUCCESS,
        Outcome::Interrupted => ExitCode::from(control::EXIT_INTERRUPTED as u8),
    })
}

/// Where the ranks are processes of their own, and this one starts them and waits.
fn start_ranks(home: &Home, args: &args::Train) -> Option<Result<ExitCode>> {
    if let Some(group) = Group::of(&|name| std::env::var(name).ok()) {
        if args.ranks != 1 && args.ranks != group.n_pods() {
            let (asked, n_pods) = (args.ranks, group.n_pods());
            return Some(Err(anyhow!("--ranks {asked} was asked for, and there are {n_pods} pods")));
        }
        return Some(group.run(home, args.run_name(), |machines| supervise::run(home, args, machines)));
    }
    args.distributed.launch?;
    Some(supervise::run(home, args, &supervise::machines(args)).map(ExitCode::from))
}

/// Plans a run that does not exist; one that does is refused where the flags ask for another, or memory does not suffice.
fn plan_if_new(home: &Home, args: &args::Train, pool: &Arc<Pool>) -> Result<()> {
    let (store, run) = (home.store()?, args.run_name());
    match train::read_plan(&store, run)? {
        Some(plan) => {
            if args.resume.is_none() {
                train::create(&store, run, &plan::as_asked(&store, &plan, args)?, None)?;
            }
            check_memory(&plan, args)
        }
        None if args.resume.is_some() => bail!("{}", train::Error::NoRun { run: run.to_owned() }),
        None => create(home, args, pool),
    }
}

/// Plans the run: refused where it does not fit in memory, and of as many steps as were asked for.
fn create(home: &Home, args: &args::Train, pool: &Arc<Pool>) -> Result<()> {
    let mut planned = plan::plan(home, args, pool)?;
    check_memory(&planned.plan, args)?;
    if let (None, Some(minutes)) = (args.steps, args.minutes) {
        let of = (planned.weights.take(), planned.teacher.as_ref().map(|(weights, _)| weights.clone()));
        let seconds = plan::step_seconds(&planned.plan, of, pool, (TRIALS, args.recompute))?;
        plan::set_steps(&mut planned.plan, args, plan::steps_in(minutes, seconds)?)?;
    }
    let store = home.store()?;
    if planned.plan.tasks.is_some() {
        train::keep_tasks(&store, args.run_name(), &planned.task_files)?;
    }
    if let Some((_, files)) = &planned.teacher {
        train::keep_teacher(&store, args.run_name(), files)?;
    }
    Ok(train::create(&store, args.run_name(), &planned.plan, planned.files.as_ref())?)
}

fn check_memory(plan: &Plan, args: &args::Train) -> Result<()> {
    let ranks = memory::RanksHere::of(args, Launched::of(&|name| std::env::var(name).ok()).as_ref());
    memory::Needs::new(plan, ranks, args.recompute)?.check(memory_available(), process_memory_left())
}

fn zero(args: &args::Train) -> Zero {
    Zero::of_stage(args.distributed.zero).unwrap_or_default()
}

fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    // Whoever reads the lines may be gone; the run is worth more than its audience.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
