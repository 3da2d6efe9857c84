//! `loquat backup` and `loquat restore`: the database and the store of a cluster, copied while it runs, and brought back.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use control::{Control, Lease, Tables};
use serde_json::{Value, json};
use store::{Backup, Copied, ObjectName, Progress, Store};

use crate::args;
use crate::home::Home;
use crate::machine::bytes_text;
use crate::service::BUNDLE;
use crate::view::progress;

/// Tables are read before objects are copied, so what they speak of was there; what went meanwhile is not in tables that are
/// read after it.
const TRIES: usize = 10;

/// Who takes a backup holds this lease, so that no two prune each other's content.
const LEASE: &str = "backup";
const LEASE_TTL: Duration = Duration::from_secs(60);
const RENEW_EVERY: Duration = Duration::from_secs(15);
const TICK: Duration = Duration::from_millis(50);

pub(crate) fn backup(home: &Home, args: &args::Backup) -> Result<ExitCode> {
    if args.list {
        return list(&Backup::open(&home.store_at(&args.destination)?)?);
    }
    if !home.has_database()? {
        bail!("{} holds no cluster: there is no database", home.path().display());
    }
    let (control, store) = (home.control()?, home.store()?);
    home.check_cluster(&control, store.as_ref())?;
    let backup = Backup::create(&home.store_at(&args.destination)?, &store, &control.cluster_id()?)?;
    let turn = Turn::take(&control, args.keep.is_some())?;
    let (tables, copied) = copy(&control, &store, &backup)?;
    let id = format!("{}-{}", utc(control.now().0), crate::random_hex(4)?);
    let meta = json!({
        "schema_version": tables.schema_version,
        "taken_ms": control.now().0,
        "loquat": env!("CARGO_PKG_VERSION"),
        "objects": copied.n_objects(),
        "bytes": copied.bytes(),
    });
    let snapshot = backup.publish(&id, &copied, &tables.to_json(), meta)?;
    println!("{} ({} new)", line(&id, snapshot.meta()), bytes_text(copied.progress.bytes_copied));
    for note in left_out(&tables, &copied) {
        println!("not in it: {note}");
    }
    if let Some(n_kept) = args.keep {
        let (n_snapshots, n_contents) = backup.prune(n_kept as usize)?;
        println!("removed {n_snapshots} older snapshots and {n_contents} contents that only they had");
    }
    turn.end()?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn restore(home: &Home, args: &args::Restore) -> Result<ExitCode> {
    let backup = Backup::open(&home.store_at(&args.source)?)?;
    let newest = || backup.snapshots()?.pop().with_context(|| format!("{} has no snapshot", backup.url()));
    let id = args.snapshot.clone().map_or_else(newest, Ok)?;
    let snapshot = backup.snapshot(&id)?;
    // Before anything is written: whether this program can read it.
    let mut tables = Tables::from_json(&snapshot.state()?).with_context(|| format!("snapshot {id}"))?;
    let mut shown = Shown::new(if args.check { "read" } else { "restored" });
    if args.check {
        snapshot.check(&mut |progress| shown.show(progress))?;
        shown.end();
        println!("{}: whole", line(&id, snapshot.meta()));
        return Ok(ExitCode::SUCCESS);
    }
    tables.move_jobs(&home.as_args())?;
    let (vacant, store) = (home.vacant()?, home.store()?);
    snapshot.restore_to(store.as_ref(), &mut |progress| shown.show(progress))?;
    shown.end();
    // Last of all: a cluster is there when its database is.
    vacant.restore(&tables)?;
    println!("restored {}", line(&id, snapshot.meta()));
    Ok(ExitCode::SUCCESS)
}

fn list(backup: &Backup) -> Result<ExitCode> {
    for id in backup.snapshots()? {
        match backup.snapshot(&id) {
            Ok(snapshot) => println!("{}", line(&id, snapshot.meta())),
            Err(error) => println!("{id}  {error}"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn line(id: &str, meta: &Value) -> String {
    let number = |name: &str| meta[name].as_u64().unwrap_or(0);
    let (n_objects, bytes) = (number("objects"), bytes_text(number("bytes")));
    format!("snapshot {id}: {n_objects} objects, {bytes}, schema {}", number("schema_version"))
}

/// Tables of one moment, and all objects that they speak of.
fn copy(control: &Control, store: &Arc<dyn Store>, backup: &Backup) -> Result<(Tables, Copied)> {
    let mut shown = Shown::new("copied");
    let mut n_tries = 0;
    loop {
        let tables = control.tables()?;
        let copied = backup.copy(store, &mut |progress| shown.show(progress))?;
        n_tries += 1;
        match missing(&tables, &copied)? {
            None => {
                shown.end();
                return Ok((tables, copied));
            }
            Some((model, prefix)) if n_tries == TRIES => {
                shown.end();
                bail!(
                    "the model {model} is {prefix} in the store, and nothing is there: remove the model, or bring it back"
                )
            }
            Some(_) => {}
        }
    }
}

/// A model whose bundle was not there.
fn missing<'a>(tables: &'a Tables, copied: &Copied) -> Result<Option<(&'a str, &'a str)>> {
    for [model, source] in tables.texts("models", ["name", "source"]) {
        if let Some(prefix) = source.strip_prefix(BUNDLE)
            && !copied.has(&ObjectName::parse(&format!("{prefix}/manifest.json"))?)
        {
            return Ok(Some((model, prefix)));
        }
    }
    Ok(None)
}

/// Models that are files of a machine.
fn left_out(tables: &Tables, copied: &Copied) -> Vec<String> {
    let models = tables.texts("models", ["name", "source"]);
    let is_kept = |source: &str| {
        source.starts_with(BUNDLE)
            || models.iter().any(|[name, _]| *name == source)
            || ObjectName::parse(&format!("models/{source}/manifest.json"))
                .is_ok_and(|name| copied.has(&name))
    };
    let deployed = tables.texts("deployments", ["model", "live"]);
    let on_trial = tables.texts("deployments", ["model", "canary"]);
    let all = models.iter().chain(&deployed).chain(&on_trial);
    let outside = all.filter(|[_, source]| !is_kept(source));
    let mut notes: Vec<String> =
        outside.map(|[model, source]| format!("{source}, the model {model}")).collect();
    notes.sort();
    notes.dedup();
    notes
}

/// The right to write to the backup of this cluster, kept for as long as it takes.
struct Turn {
    control: Control,
    lease: Option<Lease>,
    stop: Arc<AtomicBool>,
    keeping: Option<std::thread::JoinHandle<()>>,
}

impl Turn {
    /// A database that takes no writes (a full disk is a reason to make a backup) is no reason not to, unless the turn is
    /// `needed` to remove things.
    fn take(control: &Control, needed: bool) -> Result<Turn> {
        let lease = match control.acquire(LEASE, &crate::machine::host_name(), LEASE_TTL) {
            Ok(None) => bail!(
                "another backup of this cluster is being taken, or one was cut off less than a minute ago"
            ),
            Ok(lease) => lease,
            Err(error) if needed => return Err(error.into()),
            Err(error) => {
                eprintln!("warning: {error}; nothing keeps another backup from being taken now");
                None
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let keeping = lease.clone().map(|lease| {
            let (control, stop) = (control.clone(), stop.clone());
            std::thread::spawn(move || keep(&control, &lease, &stop))
        });
        Ok(Turn { control: control.clone(), lease, stop, keeping })
    }

    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(keeping) = self.keeping.take()
            && keeping.join().is_err()
        {
            bail!("the thread that kept the lease of the backup has panicked");
        }
        self.lease.take().map_or(Ok(()), |lease| Ok(self.control.release(&lease)?))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // After an error the lease runs out by itself; the thread must not renew it any more.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn keep(control: &Control, lease: &Lease, stop: &AtomicBool) {
    let mut renewed = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
        if renewed.elapsed() >= RENEW_EVERY {
            if let Err(error) = control.renew(lease, LEASE_TTL) {
                eprintln!("warning: {error}");
            }
            renewed = Instant::now();
        }
    }
}

/// How far it is: a line that is drawn again on a terminal, one every ten seconds elsewhere.
struct Shown {
    done: &'static str,
    started: Instant,
    told: Instant,
    is_terminal: bool,
    drawn: bool,
}

impl Shown {
    fn new(done: &'static str) -> Shown {
        let now = Instant::now();
        Shown { done, started: now, told: now, is_terminal: std::io::stderr().is_terminal(), drawn: false }
    }

    fn show(&mut self, so_far: &Progress) {
        let every = if self.is_terminal { Duration::from_millis(150) } else { Duration::from_secs(10) };
        if self.told.elapsed() < every {
            return;
        }
        self.told = Instant::now();
        let text = progress_text(self.done, so_far, self.started.elapsed().as_secs_f64());
        if self.is_terminal {
            progress(&text);
            self.drawn = true;
        } else {
            eprintln!("{text}");
        }
    }

    fn end(&self) {
        if self.drawn {
            eprintln!();
        }
    }
}

fn progress_text(done: &str, progress: &Progress, seconds: f64) -> String {
    let Progress { n_objects, n_objects_total, bytes, bytes_total, bytes_copied } = *progress;
    let share = bytes as f64 / bytes_total.max(1) as f64;
    let left =
        if share > 0.02 { format!(", about {:.0} s left", seconds / share - seconds) } else { String::new() };
    format!(
        "{done} {n_objects} of {n_objects_total} objects, {} of {}, {} new{left}",
        bytes_text(bytes),
        bytes_text(bytes_total),
        bytes_text(bytes_copied)
    )
}

/// A time as names of snapshots begin with it: their order is that of time.
fn utc(unix_ms: i64) -> String {
    let unix_ms = u64::try_from(unix_ms).unwrap_or(0);
    let (days, second, ms) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400, unix_ms % 1000);
    // The calendar by years that begin in March, so that the day that some years lack is the last one of a year.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}.{ms:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        // date -u -d @N +%Y%m%dT%H%M%SZ
        for (unix_s, text) in [
            (0_i64, "19700101T000000Z"),
            (951_782_399, "20000228T235959Z"),
            (951_782_400, "20000229T000000Z"),
            (1_709_251_199, "20240229T235959Z"),
            (1_709_251_200, "20240301T000000Z"),
            (4_107_542_400, "21000301T000000Z"),
            (1_798_761_599, "20261231T235959Z"),
        ] {
            assert_eq!(utc(1000 * unix_s + 7), text.replace('Z', ".007Z"));
        }
    }

    #[test]
    fn progress_tells_what_is_left() {
        let progress =
            Progress { n_objects: 1, n_objects_total: 4, bytes: 250, bytes_total: 1000, bytes_copied: 0 };
        let text = progress_text("copied", &progress, 10.0);
        assert!(text.starts_with("copied 1 of 4 objects") && text.ends_with("about 30 s left"), "{text}");
        assert!(!progress_text("read", &Progress::default(), 0.0).contains("left"));
    }
}
