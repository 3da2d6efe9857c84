//! The run's metrics in the store: events as JSON lines, in objects of a fixed span of steps.
//!
//! Objects are written whole, so a line is never half there. A run that goes on from an earlier checkpoint tells the
//! steps after it again: the lines it is about to repeat are dropped first, so that every step stands once.

use std::sync::Arc;

use store::{ObjectName, Store};

use crate::{Event, Result};

/// Steps whose events share an object. 200 lines * ~200 B = 40 KB rewritten at each flush.
const CHUNK_STEPS: u64 = 200;

/// The most bytes of one object that a reader takes.
const CHUNK_BYTES_MAX: u64 = 16 << 20;

/// Appends to the metrics of one run.
pub(crate) struct MetricsLog {
    store: Arc<dyn Store>,
    run: String,
    chunk: u64,
    lines: Vec<String>,
    /// Lines that are not in the store yet.
    dirty: bool,
}

impl MetricsLog {
    /// Opens the log of a run that goes on after `step` finished steps.
    pub(crate) fn open(store: Arc<dyn Store>, run: &str, step: u64) -> Result<MetricsLog> {
        let chunk = step / CHUNK_STEPS;
        let kept = match store.head(&name(run, chunk)?)? {
            Some(meta) => parse(&store.get(&meta.name)?),
            None => Vec::new(),
        };
        let lines = kept.iter().filter(|e| e.step() <= step).map(Event::to_line).collect();
        let log = MetricsLog { store, run: run.to_owned(), chunk, lines, dirty: true };
        for later in log.store.list(&prefix(run))? {
            if later.name > name(run, chunk)? {
                log.store.delete(&later.name)?;
            }
        }
        Ok(log)
    }

    /// Takes an event; it reaches the store with the next [`MetricsLog::flush`].
    pub(crate) fn push(&mut self, event: &Event) -> Result<()> {
        // A checkpoint is there some steps after the one it is of: it is told among the lines of that later time, since an
        // object that is complete is not opened again.
        let chunk = self.chunk.max(event.step() / CHUNK_STEPS);
        if chunk != self.chunk {
            self.flush()?;
            self.lines.clear();
            self.chunk = chunk;
        }
        self.lines.push(event.to_line());
        self.dirty = true;
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.dirty {
            self.store.put(&name(&self.run, self.chunk)?, (self.lines.join("\n") + "\n").as_bytes())?;
            self.dirty = false;
        }
        Ok(())
    }
}

/// Every event of a run, in order. A line that is not an event of this version is passed over: newer builds may
/// report more.
pub fn read_metrics(store: &dyn Store, run: &str) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for object in store.list(&prefix(run))? {
        if object.bytes <= CHUNK_BYTES_MAX {
            events.extend(parse(&store.get(&object.name)?));
        }
    }
    Ok(events)
}

fn parse(bytes: &[u8]) -> Vec<Event> {
    bytes.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

fn prefix(run: &str) -> String {
    format!("runs/{run}/metrics")
}

fn name(run: &str, chunk: u64) -> Result<ObjectName> {
    Ok(ObjectName::parse(&format!("{}/{:08}.jsonl", prefix(run), chunk * CHUNK_STEPS))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(step: u64) -> Event {
        Event::Eval { step, nats_per_token: 1.0, bits_per_byte: step as f64, parts: Vec::new() }
    }

    fn steps(store: &Arc<dyn Store>) -> Vec<u64> {
        read_metrics(store.as_ref(), "r").unwrap().iter().map(Event::step).collect()
    }

    #[test]
    fn a_resumed_run_tells_every_step_once() {
        let store = store::open("mem:").unwrap();
        let mut log = MetricsLog::open(store.clone(), "r", 0).unwrap();
        for step in 0..=450 {
            log.push(&eval(step)).unwrap();
        }
        drop(log); // killed: what was not flushed is gone
        assert_eq!(steps(&store), (0..400).collect::<Vec<_>>());

        let mut log = MetricsLog::open(store.clone(), "r", 210).unwrap();
        for step in 211..=230 {
            log.push(&eval(step)).unwrap();
        }
        log.flush().unwrap();
        assert_eq!(steps(&store), (0..=230).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_told_late_costs_no_line() {
        let store = store::open("mem:").unwrap();
        let mut log = MetricsLog::open(store.clone(), "r", 0).unwrap();
        let checkpoint = Event::Checkpoint { step: 190, bytes: 1, seconds: 0.0, write_seconds: 1.0 };
        for step in 1..=450 {
            log.push(&eval(step)).unwrap();
            if step == 205 {
                log.push(&checkpoint).unwrap();
            }
        }
        log.flush().unwrap();
        let mut expected: Vec<u64> = (1..=450).collect();
        expected.insert(205, 190);
        assert_eq!(steps(&store), expected);
    }

    #[test]
    fn strange_lines_are_passed_over() {
        let store = store::open("mem:").unwrap();
        let line = eval(7).to_line();
        store
            .put(&name("r", 0).unwrap(), format!("{{\"event\":\"later\"}}\n{line}\nnoise").as_bytes())
            .unwrap();
        assert_eq!(steps(&store), [7]);
    }
}
