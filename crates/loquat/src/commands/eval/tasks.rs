//! `loquat eval tasks`: a table of scores.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use eval::{Metric, Options, Progress, Reader, Report, Task};
use model::BLOCK_TOKENS;
use serde_json::{Value, json};
use store::{Bundle, ObjectName};
use tensor::Pool;

use crate::args;
use crate::home::Home;
use crate::machine::{bytes_text, memory_available};
use crate::service::BUNDLE;
use crate::serving;
use crate::session;
use crate::view::{bar, progress};

pub(super) fn run(home: &Home, args: &args::Tasks) -> Result<ExitCode> {
    // All files are read before the model is: a wrong one is told at once.
    let options = Options {
        shots: args.shots,
        seed: args.seed,
        limit: args.limit,
        delimiter: args.delimiter.as_ref().map(|text| text.replace("\\n", "\n")),
    };
    let files = files(home, &args.files)?;
    let tasks: Vec<Task> = files.iter().map(|file| Task::open(file, &options)).collect::<Result<_, _>>()?;
    let path = crate::commands::model::resolve(home, &args.model)?;
    let pool = Pool::new(args.threads.unwrap_or_else(crate::n_threads));
    let (model, loaded) = session::load(&path, &pool)?;
    let tokenizer = serving::tokenizer_of(&path, &loaded)?;
    drop(loaded);
    let block_bytes = model.kv_block_bytes(args.kv.kv_type());
    let n_positions = ((args.kv_mib << 20) / block_bytes * BLOCK_TOKENS).max(BLOCK_TOKENS);
    let bytes = (n_positions / BLOCK_TOKENS * block_bytes) as u64;
    if let Some(left) = memory_available().filter(|left| bytes > *left) {
        bail!("--kv-mib {}: only {} are free", args.kv_mib, bytes_text(left));
    }
    let mut reader = Reader::new(&model, &pool, args.kv.kv_type(), n_positions);
    if !args.json {
        println!("{}", header());
    }
    let mut reports = Vec::new();
    for (task, file) in tasks.iter().zip(&files) {
        let started = Instant::now();
        let report = eval::run(task, &mut reader, &tokenizer, &mut |so_far| show(&task.name, so_far));
        progress("");
        let report = report.with_context(|| format!("cannot evaluate {}", file.display()))?;
        let seconds = started.elapsed().as_secs_f64();
        match args.json {
            true => println!("{}", to_json(args, &report, seconds)?),
            false => print!("{}", rows(&report, seconds)),
        }
        reports.push(report);
    }
    if let Some(object) = &args.report {
        home.store()?.put(&ObjectName::parse(object)?, &serde_json::to_vec(&reports)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The files that were named; those of a bundle are brought here.
fn files(home: &Home, named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in named {
        let Some(prefix) = path.to_str().and_then(|text| text.strip_prefix(BUNDLE)) else {
            files.push(path.clone());
            continue;
        };
        let bundle = Bundle::open(&home.store()?, prefix)?;
        let bundle = bundle.with_context(|| format!("there are no tasks at {prefix} in the store"))?;
        let dir = home.path().join(prefix);
        bundle.download_to(&dir)?;
        files.extend(bundle.manifest().files.iter().map(|file| dir.join(&file.name)));
    }
    Ok(files)
}

fn header() -> String {
    format!(
        "{:<28}{:>7}{:>7}  {:<16}{:>8}{:>10}{:>9}",
        "task", "items", "shots", "metric", "value", "error", "time"
    )
}

/// The task's name stands before its first metric.
fn rows(report: &Report, seconds: f64) -> String {
    let row = |(i, Metric { name, value, stderr }): (usize, &Metric)| match i {
        0 => format!(
            "{:<28}{:>7}{:>7}  {name:<16}{value:>8.4}{:>10}{:>9}\n",
            report.task,
            report.items,
            report.shots,
            format!("± {stderr:.4}"),
            format!("{seconds:.1} s")
        ),
        _ => format!("{:<42}  {name:<16}{value:>8.4}{:>10}\n", "", format!("± {stderr:.4}")),
    };
    let mut rows: String = report.metrics.iter().enumerate().map(row).collect();
    if report.truncated > 0 {
        rows += &format!("{:<44}{} prompts were too long and lost their beginning\n", "", report.truncated);
    }
    rows
}

fn to_json(args: &args::Tasks, report: &Report, seconds: f64) -> Result<Value> {
    let mut json = json!({"model": args.model, "seed": args.seed, "seconds": seconds});
    let report = serde_json::to_value(report)?;
    if let (Some(json), Value::Object(report)) = (json.as_object_mut(), report) {
        json.extend(report);
    }
    Ok(json)
}

fn show(task: &str, so_far: Progress) {
    let Progress { done, total, metric } = so_far;
    let share = done as f64 / total.max(1) as f64;
    let metric = metric.map_or(String::new(), |m| format!("  {} {:.4} ± {:.4}", m.name, m.value, m.stderr));
    progress(&format!("{task} {} {done}/{total}{metric}", bar(share, 24)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_row() {
        let metric = |name, value| Metric { name, value, stderr: 0.0123 };
        let report: Report = Report {
            task: "copa".into(),
            form: serde_json::from_value(json!("multiple_choice")).unwrap(),
            items: 100,
            shots: 0,
            delimiter: " ".into(),
            metrics: vec![metric("acc", 0.66), metric("acc_norm", 0.7)],
            truncated: 1,
        };
        let text = format!("{}\n{}", header(), rows(&report, 1.25));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[1].starts_with("copa") && lines[1].ends_with("± 0.0123    1.2 s"), "{text}");
        assert_eq!(lines[1].find("0.6600"), lines[2].find("0.7000"), "{text}");
        assert!(lines[3].contains("1 prompts"), "{text}");
    }
}
